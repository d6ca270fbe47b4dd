"""What a solver is: a value with `init` and a pure `step` over explicit state.

    carry = solver.init(field, t, y)
    y1, error, dense, carry, ... = solver.step(field, t0, t1, y0, carry)

y has shape (n,) in joint mode, (batch, d) in per-sample mode. t0 and t1 are floats; where times need gradients 0-d
tensors; and of shape (batch,) where every sample has its own step size. t1 < t0 steps backwards, t1 = t0 must return y0
in a sample whose field is finite. A carry is a tree of tensors (or None) that belongs to (t, y); in per-sample mode its
tensors have the batch first, so that samples which reject their step keep their part of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pfode.ode.state import Field
from pfode.tableau import Tableau

__all__ = ["RMS", "Dense", "OfTableau", "Solver", "Step", "Time", "clock", "column", "hermite"]

Time = float | Tensor


@dataclass(frozen=True)
class RMS:
    """The root mean square over `count` numbers, of each sample with `dim` = 1."""

    count: int
    dim: int | None = None

    def __call__(self, error: Tensor) -> Tensor:
        return self.root(error) / math.sqrt(self.count)

    def root(self, error: Tensor) -> Tensor:
        """The square root of the sum: the mean's for errors in units sqrt(count) times as large."""
        return torch.linalg.vector_norm(error, dim=self.dim)


Dense = Callable[[Tensor], Tensor]


class Step(NamedTuple):
    """One step.

    Fields:
        y1: the state at t1.
        error: estimate of its local error, shaped like y; None without one.
        dense: theta -> y(t0 + theta (t1 - t0)); theta is of `clock` dtype and shape (m,) -> (m, n) in joint mode,
            (m, batch) -> (m, batch, d) in per-sample mode. Valid until the next step unless the field is pure.
        carry: what the next step may use, if this one is accepted.
        again: what it may use if this one is rejected; None: the carry this one began with.
        ok: whether the step solved its equations, a boolean tensor of shape () or (batch,); None: nothing to solve.
        jacobians, iterations: counted work, an int or shape (batch,).
        nfe: evaluations of the field that each sample needed, shape (batch,); None: all that were made.
        measured: the error in units of the field's tolerance, in its norm, if the solver knows it already.
    """

    y1: Tensor
    error: Tensor | None
    dense: Dense
    carry: Any = None
    again: Any = None
    ok: Tensor | None = None
    jacobians: int | Tensor = 0
    iterations: int | Tensor = 0
    nfe: Tensor | None = None
    measured: Tensor | None = None


class Solver(Protocol):
    """A method. `error_order`: its error estimate is O(h^error_order); 0 if it has none."""

    @property
    def name(self) -> str:
        """The method's name, for messages."""
        ...

    @property
    def order(self) -> int:
        """The order of convergence: the error at a time is O(h^order) for equal steps h."""
        ...

    @property
    def error_order(self) -> float:
        """The error estimate of a step is O(h^error_order); 0 without one."""
        ...

    def init(self, field: Field, t: Time, y: Tensor, slope: Tensor | None = None) -> Any:
        """The carry at (t, y); `slope` is f(t, y) where it is known already."""
        ...

    def step(self, field: Field, t0: Time, t1: Time, y0: Tensor, carry: Any) -> Step:
        """The step from t0 to t1, from the state y0 and its carry."""
        ...


class OfTableau:
    """What every solver with a tableau says of itself."""

    tableau: Tableau

    @property
    def name(self) -> str:
        """The tableau's name."""
        return self.tableau.name

    @property
    def order(self) -> int:
        """The order of convergence."""
        return self.tableau.order

    @property
    def error_order(self) -> int:
        """The error estimate is O(h^error_order); 0 without one."""
        return self.tableau.error_order if len(self.tableau.error) else 0


def clock(device: torch.device) -> torch.dtype:
    """The dtype of times: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def column(h: Time, y: Tensor) -> Time:
    """A step size as a factor of states like y: (batch,) becomes (batch, 1) of their real dtype."""
    return h[:, None].to(y.real.dtype if y.is_complex() else y.dtype) if isinstance(h, Tensor) and h.ndim else h


def hermite(h: Time, y0: Tensor, f0: Tensor, y1: Tensor, f1: Tensor) -> Dense:
    """Cubic dense output from states and slopes at both ends; keeps a method's order up to 4."""

    def dense(theta: Tensor) -> Tensor:
        x = theta.reshape(theta.shape + (1,) * (y0.ndim + 1 - theta.ndim))
        x = x.to(y0.real.dtype if y0.is_complex() else y0.dtype)
        h00, h10, h01, h11 = (
            (1 + 2 * x) * (1 - x) ** 2,
            x * (1 - x) ** 2,
            x**2 * (3 - 2 * x),
            x**2 * (x - 1),
        )
        return h00 * y0 + h01 * y1 + (h10 * f0 + h11 * f1) * column(h, y0)

    return dense
