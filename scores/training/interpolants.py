"""Interpolants between data x_0, at t = 0, and a source x_1, at t = 1: x = a(t) x_0 + b(t) x_1 + g(t) e, e ~ N(0, 1).

The velocity u = a' x_0 + b' x_1 + g' e is what flow matching regresses on (Albergo, Boffi & Vanden-Eijnden 2023). A
new one is a function from a noise level to an `Interpolant` and a line in `INTERPOLANTS`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["INTERPOLANTS", "Interpolant", "interpolate"]

EDGE = 1e-4  # times are kept this far from the ends where g' is infinite
Curve = Callable[[Tensor], Tensor]


class Interpolant(NamedTuple):
    """The functions a, b and g of the time; g is None where there is no noise on the way."""

    a: Curve
    b: Curve
    g: Curve | None = None


def linear(std: float) -> Interpolant:
    """(1 - t) x_0 + t x_1: straight lines (Lipman et al. 2023; Liu et al. 2023)."""
    return Interpolant(lambda t: 1 - t, lambda t: t)


def trigonometric(std: float) -> Interpolant:
    """cos(pi t/2) x_0 + sin(pi t/2) x_1: keeps a variance of 1 (Albergo & Vanden-Eijnden 2023)."""
    return Interpolant(lambda t: torch.cos(0.5 * math.pi * t), lambda t: torch.sin(0.5 * math.pi * t))


def bridge(std: float) -> Interpolant:
    """Straight lines with the noise of a Brownian bridge, std sqrt(t (1 - t)) (Tong et al. 2024, SB-CFM).

    With the entropic coupling `Entropic(2 std^2)` it is a Schrodinger bridge.
    """
    return Interpolant(lambda t: 1 - t, lambda t: t, lambda t: std * torch.sqrt(t * (1 - t)))


INTERPOLANTS: dict[str, Callable[[float], Interpolant]] = {
    "linear": linear, "trigonometric": trigonometric, "bridge": bridge,
}  # fmt: skip


def interpolate(kind: Interpolant, t: Tensor, x0: Tensor, x1: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """The state and its velocity at times t.

    Args:
        t: (n,). x0, x1, e: (n, ...), e standard normal.
    """
    if kind.g is not None:
        t = t.clamp(EDGE, 1 - EDGE)
    parts = [(kind.a, x0), (kind.b, x1)]
    parts += [] if kind.g is None else [(kind.g, e)]
    x, velocity = torch.zeros_like(x0), torch.zeros_like(x0)
    for curve, point in parts:
        value, slope = _with_slope(curve, t)
        shape = (-1, *[1] * (x0.ndim - 1))
        x, velocity = x + value.reshape(shape) * point, velocity + slope.reshape(shape) * point
    return x, velocity


def _with_slope(curve: Curve, t: Tensor) -> tuple[Tensor, Tensor]:
    """A function of the time and its derivative at times t."""
    with torch.enable_grad():
        start = t.detach().requires_grad_()
        value = curve(start)
        (slope,) = torch.autograd.grad(value.sum(), start)
    return value.detach(), slope
