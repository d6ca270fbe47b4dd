"""Solvers that can be stepped backwards exactly, up to rounding: reversible Heun, and any method made so.

    y0, carry0 = solver.back(field, t0, t1, y1, carry1)        undoes `step` from t0 to t1, without gradients

Both keep a second state z beside y. Neither damps: over long times z and y drift apart, in dissipative problems until
the solution is lost.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pfode.errors import number
from pfode.ode.methods.explicit import RungeKutta
from pfode.ode.solver import Step, Time, column, hermite
from pfode.ode.state import Field

__all__ = ["Coupled", "ReversibleHeun"]


@dataclass(frozen=True)
class ReversibleHeun:
    """Reversible Heun, of order 2 at one evaluation per step (Kidger et al. 2021, algorithm 1).

        z1 = 2 y0 - z0 + h f(t0, z0),    y1 = y0 + h (f(t0, z0) + f(t1, z1)) / 2

    Its carry is z and f(t, z); the error is estimated against Euler's method.
    """

    name: str = "reversible-heun"
    order: int = 2
    error_order: int = 2

    def init(self, field: Field, t: Time, y: Tensor, slope: Tensor | None = None) -> Any:
        return y, field(field.time(t), y).clone() if slope is None else slope

    def step(self, field: Field, t0: Time, t1: Time, y0: Tensor, carry: Any) -> Step:
        z0, f0 = carry
        h = column(t1 - t0, y0)
        z1 = 2 * y0 - z0 + h * f0
        f1 = field(field.time(t1), z1).clone()
        y1 = y0 + h * (f0 + f1) / 2
        return Step(y1, h * (f1 - f0) / 2, hermite(t1 - t0, y0, f0, y1, f1), (z1, f1))

    def back(self, field: Field, t0: Time, t1: Time, y1: Tensor, carry: Any) -> tuple[Tensor, Any]:
        """The state and the carry at the start of a step, from those at its end: to rounding."""
        z1, f1 = carry
        h = column(t1 - t0, y1)
        z0 = 2 * y1 - z1 - h * f1
        f0 = field(field.time(t0), z0).clone()
        return y1 - h * (f0 + f1) / 2, (z0, f0)


@dataclass(frozen=True)
class Coupled:
    """Any Runge-Kutta method made reversible, of its own order (McCallum & Foster 2024, section 3).

        y1 = c y0 + (1 - c) z0 + psi(t0, t1, z0),    z1 = z0 - psi(t1, t0, y1)

    with psi the increment of the base method. Two steps of the base for one; its carry is z.

    Args:
        base: the method.
        coupling: c, below 1: the nearer to it, the less is lost going back, and the less stable the method.

    Raises:
        UsageError: no number in (0, 1].
    """

    base: RungeKutta
    coupling: float = 0.999

    def __post_init__(self) -> None:
        number("coupling", self.coupling, 1e-3, 1.0)

    @property
    def name(self) -> str:
        return f"reversible-{self.base.name}"

    @property
    def order(self) -> int:
        return self.base.order

    @property
    def error_order(self) -> int:
        return self.base.error_order

    def init(self, field: Field, t: Time, y: Tensor, slope: Tensor | None = None) -> Any:
        return y

    def step(self, field: Field, t0: Time, t1: Time, y0: Tensor, carry: Any) -> Step:
        z0, c = carry, self.coupling
        forth = self.base.step(field, t0, t1, z0, None)
        error = forth.error
        y1 = c * y0 + (1 - c) * z0 + (forth.y1 - z0)
        back = self.base.step(field, t1, t0, y1, None)
        missed = y0 - back.y1  # of the way back from y1

        def dense(theta: Tensor) -> Tensor:
            rest = (1 - theta).reshape(theta.shape + (1,) * (y0.ndim + 1 - theta.ndim))
            rest = rest.to(y0.real.dtype if y0.is_complex() else y0.dtype)
            return back.dense(1 - theta) + rest * missed

        return Step(y1, error, dense, z0 - (back.y1 - y1))

    def back(self, field: Field, t0: Time, t1: Time, y1: Tensor, carry: Any) -> tuple[Tensor, Any]:
        """The state and the carry at the start of a step, from those at its end: to rounding."""
        c = self.coupling
        z0 = carry + (self.base.step(field, t1, t0, y1, None).y1 - y1)
        return (y1 - (1 - c) * z0 - (self.base.step(field, t0, t1, z0, None).y1 - z0)) / c, z0
