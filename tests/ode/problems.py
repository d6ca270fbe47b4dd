"""Initial value problems with known solutions, none of them autonomous, linear or scalar only by accident."""

import itertools
import math

import torch
from torch import Tensor


def rational(t: Tensor, y: Tensor) -> Tensor:
    """y' = (y1 / t, y1 (y0 + 2 y1 - 1) / (t (y0 - 1))) of SciPy's tests: y = (t / (t + 10), 10 t / (t + 10)^2)."""
    a, b = y.unbind(-1)
    return torch.stack([b / t, b * (a + 2 * b - 1) / (t * (a - 1))], -1)


def rational_solution(t: Tensor) -> Tensor:
    return torch.stack([t / (t + 10), 10 * t / (t + 10) ** 2], -1)


def swing(t: Tensor, y: Tensor) -> Tensor:
    """y' = -2 t y^2 + cos(t) q, q' = -sin(t) y ... a nonlinear, non-autonomous pair whose solution is `swung`.

    With u = (1 + t^2)^-1 and v = sin t: y' = -2 t y^2 + (q - v), q' = cos t + (y - u) q.
    """
    u, v = 1 / (1 + t * t), torch.sin(t)
    a, b = y.unbind(-1)
    return torch.stack([-2 * t * a * a + (b - v), torch.cos(t) + (a - u) * b], -1)


def swung(t: Tensor) -> Tensor:
    return torch.stack([1 / (1 + t * t), torch.sin(t)], -1)


def falls(errors: list[float]) -> list[float]:
    """log2 of the fall from each error to the next."""
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]
