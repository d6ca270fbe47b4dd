"""Adams methods on any grid: explicit (Adams-Bashforth) or with a corrector (Adams-Bashforth-Moulton, PECE).

The derivative is interpolated in Newton's form over past times x_0, x_1, ..., in units of the step from t0,

    f(x) = sum_q f[x_0, ..., x_q] (x - x_0) ... (x - x_(q-1)),      y(theta) = y0 + h int_0^theta f(x) dx

(Hairer, Norsett & Wanner 1993, III.1 and III.5), so the steps need not be equal, term q alone is what order q + 1 adds,
and the same integral up to theta is dense output of the method's order. The corrector's x_0 is 1, the end of the step,
with the derivative at the predicted state. A Runge-Kutta method of at least that order makes the first steps.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pfode.errors import integer
from pfode.ode.methods.explicit import RungeKutta
from pfode.ode.methods.tables import DOPRI5, DOPRI8, RK4
from pfode.ode.solver import Dense, Step, Time, clock
from pfode.ode.state import Field

__all__ = ["ADAMS", "MOST", "Adams", "Past", "terms"]

MOST = 9  # the order of a method whose starting steps have a local error of O(h^9)


class Past(NamedTuple):
    """Times and derivatives, the newest first: shapes (k,) and (k, *y.shape)."""

    t: Tensor
    slopes: Tensor


@functools.cache
def _gauss(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], exact to degree 2 MOST - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(MOST)
    return tuple(torch.from_numpy(v).to(device, dtype) for v in (nodes / 2 + 0.5, weights / 2))  # type: ignore[return-value]


def terms(x: Tensor, theta: Tensor) -> Tensor:
    """Weights of the derivatives at x (k,) in the terms of int_0^theta f: theta of shape (m,) -> (m, k, k)."""
    nodes, weights = _gauss(x.dtype, x.device)
    eye = torch.eye(len(x), dtype=torch.bool, device=x.device)
    gaps = torch.where(eye, 1.0, x[:, None] - x)  # [j, m]
    divided = torch.cumprod(gaps, 1).T.reciprocal().tril()  # [q, j]: f[x_0 ... x_q] = sum_j divided[q, j] f(x_j)
    factors = (theta[:, None] * nodes)[..., None] - x[:-1]
    products = torch.cat([factors.new_ones((*factors.shape[:-1], 1)), torch.cumprod(factors, -1)], -1)
    return (theta[:, None] * torch.einsum("g,mgq->mq", weights, products))[..., None] * divided


@dataclass(frozen=True, eq=False)
class Adams:
    """An Adams method for fixed steps.

    Args:
        order: 1 to 9; with a corrector from 2.
        corrector: predict, evaluate, correct, evaluate: two evaluations a step, and far more stable.
        iterations: how often it is corrected.
        select: use no more terms than get smaller, in every step: high orders are unstable at steps where low ones are
            not, and then their terms grow. Decided on the device.

    Raises:
        UsageError: another order.
    """

    order: int = 4
    corrector: bool = True
    iterations: int = 1
    select: bool = False
    error_order = 0

    def __post_init__(self) -> None:
        integer("order", self.order, 1 + self.corrector, MOST)
        integer("iterations", self.iterations, 1)

    @property
    def name(self) -> str:
        return f"{'abm' if self.corrector else 'ab'}{self.order}"

    @property
    def past(self) -> int:
        """How many derivatives are kept."""
        return self.order - self.corrector

    def init(self, field: Field, t: Time, y: Tensor, slope: Tensor | None = None) -> Past:
        slope = field(field.time(t), y) if slope is None else slope
        return Past(_tensor(t, y)[None], slope[None].clone())

    def step(self, field: Field, t0: Time, t1: Time, y0: Tensor, carry: Past) -> Step:
        ready = len(carry.slopes) == self.past
        y1, dense = (self._multistep if ready else self._start)(field, t0, t1, y0, carry)
        slope = field(field.time(t1), y1)
        kept = Past(
            torch.cat([_tensor(t1, y0)[None], carry.t])[: self.past],
            torch.cat([slope[None], carry.slopes])[: self.past],
        )
        return Step(y1, None, dense, kept)

    def _start(self, field: Field, t0: Time, t1: Time, y0: Tensor, carry: Past) -> tuple[Tensor, Dense]:
        tableau = RK4 if self.order <= 4 else DOPRI5 if self.order == 5 else DOPRI8
        step = RungeKutta(tableau).step(field, t0, t1, y0, carry.slopes[0])
        return step.y1, step.dense

    def _multistep(self, field: Field, t0: Time, t1: Time, y0: Tensor, carry: Past) -> tuple[Tensor, Dense]:
        h, slopes = t1 - t0, carry.slopes
        x = (carry.t - t0) / h
        y1 = y0 + self._increment(x, slopes, h)
        if self.corrector:
            x = torch.cat([torch.ones_like(x[:1]), x])
            for _ in range(self.iterations):
                slopes = torch.cat([field(field.time(t1), y1)[None], carry.slopes])
                y1 = y0 + self._increment(x, slopes, h)

        def dense(theta: Tensor) -> Tensor:
            weights = self._used(terms(x, theta.reshape(-1)), slopes).to(slopes.dtype)
            if theta.ndim == 1:
                return y0 + h * _combined(weights, slopes)
            return y0 + h * torch.einsum("mbk,kbd->mbd", weights.view(*theta.shape, -1), slopes)

        return y1, dense

    def _increment(self, x: Tensor, slopes: Tensor, h: Time) -> Tensor:
        return h * _combined(self._used(terms(x, torch.ones_like(x[:1])), slopes), slopes)[0]

    def _used(self, weights: Tensor, slopes: Tensor) -> Tensor:
        """The sum of the terms that are used: (m, k, k) -> (m, k)."""
        if not self.select:
            return weights.sum(1)
        with torch.no_grad():
            sizes = torch.linalg.vector_norm(_combined(weights[-1], slopes).flatten(1), dim=1)
            used = torch.arange(len(sizes), device=sizes.device) <= sizes.argmin()
        return (weights * used[:, None]).sum(1)


def _tensor(t: Time, y: Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=clock(y.device), device=y.device)


def _combined(weights: Tensor, slopes: Tensor) -> Tensor:
    """(m, k) weights of (k, *shape) -> (m, *shape)."""
    return (weights.to(slopes.dtype) @ slopes.flatten(1)).view(-1, *slopes.shape[1:])


ADAMS = (Adams(3, corrector=False), Adams(4, corrector=False), Adams(4), Adams(5))
