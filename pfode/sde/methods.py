"""The steppers: one for all tableaus, and the few methods that are none.

They are solvers of pfode/ode (solver.py says what that is) on a StochasticField: what drives the step is asked for its
increments by the step's ends, so a step that is taken again meets the same noise. There is no dense output: all output
times of a stochastic equation are stops.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pfode.ode.solver import Dense, Step, Time, column
from pfode.sde.problem import StochasticField
from pfode.sde.tableau import Row, Tableau

__all__ = ["Doubling", "LogODE", "Milstein", "ReversibleHeun", "StochasticRungeKutta", "StochasticSolver"]


class StochasticSolver(Protocol):
    """A method: a Solver that says which equations it is for.

    `area`: whether it uses space-time areas; `strong`: its order of strong convergence for each kind of noise; `weak`.
    """

    @property
    def name(self) -> str: ...
    @property
    def calculus(self) -> tuple[str, ...]: ...
    @property
    def noises(self) -> tuple[str, ...]: ...
    @property
    def area(self) -> bool: ...
    @property
    def strong(self) -> Mapping[str, float]: ...
    @property
    def weak(self) -> float: ...
    @property
    def order(self) -> Any: ...
    @property
    def error_order(self) -> float: ...
    def init(self, field: Any, t: Time, y: Tensor, slope: Tensor | None = None) -> Any: ...
    def step(self, field: Any, t0: Time, t1: Time, y0: Tensor, carry: Any) -> Step: ...


def _end(y1: Tensor) -> Dense:
    """Dense output at theta = 1 alone: output times are stops."""
    return lambda theta: y1.expand(len(theta), *y1.shape)


class NoiseTerms:
    """What multiplies g in a step: the terms named in tableau.py, each of shape (samples, channels)."""

    def __init__(self, h: Time, w: Tensor, area: Tensor | None):
        self.size = abs(h) if not isinstance(h, Tensor) else column(h.abs(), w)
        self.known = {"W": w} if area is None else {"W": w, "H": area}

    def __call__(self, term: str) -> Tensor:
        found = self.known.get(term)
        if found is None:
            found = self.known[term] = self._make(term)
        return found

    @property
    def root(self) -> Any:
        """sqrt(s)."""
        return self.size.sqrt() if isinstance(self.size, Tensor) else math.sqrt(self.size)

    def _make(self, term: str) -> Tensor:
        w, s = self.known["W"], self.size
        if term == "U":
            return torch.add(self.known["H"], w, alpha=0.5)
        if term == "r":
            return torch.zeros_like(w) + self.root
        safe = torch.where(s == 0, 1.0, s) if isinstance(s, Tensor) else s  # samples that stand still have W = 0
        root = safe.sqrt() if isinstance(safe, Tensor) else math.sqrt(safe)
        if term == "I2":
            return (w * w - s) / (2 * root)
        if term == "J2":
            return w * w / (2 * root)
        return (w * w - 3 * s) * w / (6 * safe)


@functools.lru_cache(256)
def _program(tableau: Tableau) -> tuple[tuple[float, ...], list[tuple[str, ...]], list[list[tuple[Any, ...]]]]:
    """The stages' times, the noise terms each evaluation of g is multiplied by, and the rows without zeros: a list of
    (0, j, weight) for h f_j and (1, j, term, weight)."""
    rows = [stage.at for stage in tableau.stages] + [tableau.end, *tableau.error]
    return tuple(stage.c for stage in tableau.stages), tableau.terms(), [_sparse(row) for row in rows]


def _sparse(row: Row) -> list[tuple[Any, ...]]:
    made: list[tuple[Any, ...]] = [(0, j, weight) for j, weight in enumerate(row.f) if weight]
    for term, weights in row.g.items():
        made += [(1, j, term, weight) for j, weight in enumerate(weights) if weight]
    return made


@dataclass(frozen=True)
class StochasticRungeKutta:
    """A method with a tableau; it keeps nothing from step to step."""

    tableau: Tableau

    @property
    def name(self) -> str:
        """The tableau's name."""
        return self.tableau.name

    @property
    def calculus(self) -> tuple[str, ...]:
        """Of the equations it is for."""
        return self.tableau.calculus

    @property
    def noises(self) -> tuple[str, ...]:
        """The kinds of noise that it takes."""
        return self.tableau.noises

    @property
    def area(self) -> bool:
        """Whether it uses space-time areas."""
        return self.tableau.area

    @property
    def strong(self) -> Mapping[str, float]:
        """Orders of strong convergence."""
        return self.tableau.strong

    @property
    def weak(self) -> float:
        """The order of weak convergence."""
        return self.tableau.weak

    @property
    def order(self) -> float:
        """The least order of strong convergence."""
        return min(self.tableau.strong.values())

    @property
    def error_order(self) -> float:
        """The error estimate is O(h^error_order); 0 without one."""
        return self.tableau.error_order

    def init(self, field: StochasticField, t: Time, y: Tensor, slope: Tensor | None = None) -> None:
        return None

    def step(self, field: StochasticField, t0: Time, t1: Time, y0: Tensor, carry: Any) -> Step:
        tableau, h = self.tableau, t1 - t0
        nodes, terms, rows = _program(tableau)
        noise = NoiseTerms(h, *field.increment(t0, t1, tableau.area))
        size = column(h, y0)
        done = field.diffusions
        drifts: list[Tensor] = []
        pushed: list[dict[str, Tensor]] = []
        for stage, t, row in zip(tableau.stages, field.times(t0, t1, nodes), rows, strict=False):
            z = _combined(y0, row, drifts, pushed)
            if "f" in stage.evaluates:
                drifts.append(field(t, z) * size)
            if "g" in stage.evaluates:
                g = field.diffusion(t, z) if field.forms_diffusion else None
                pushed.append({term: field.times_noise(t, z, g, noise(term)) for term in terms[len(pushed)]})
        count = len(tableau.stages)
        y1 = _combined(y0, rows[count], drifts, pushed)
        error = None
        for row in rows[count + 1 :]:
            part = _combined(None, row, drifts, pushed).abs()
            error = part if error is None else error + part
        return Step(y1, error, _end(y1), iterations=field.diffusions - done)


def _combined(y: Tensor | None, row: list[tuple[Any, ...]], drifts: list[Tensor], pushed: list[Any]) -> Tensor:
    """y plus a row's combination of evaluations."""
    z = y
    for kind, j, *rest in row:
        part = pushed[j][rest[0]] if kind else drifts[j]
        weight = rest[-1]
        z = weight * part if z is None else torch.add(z, part, alpha=weight)
    assert z is not None
    return z


@dataclass(frozen=True)
class Milstein:
    """Milstein's method with derivatives, y + h f + g W + g' g (W^2 - s) / 2; for Stratonovich equations W^2 alone.

    Kloeden & Platen 1992, section 10.3. One product with the Jacobian of g a step; for scalar noise g is evaluated
    twice, as its direction is g itself. Additive noise has no derivative.
    """

    calculus_of: str
    name: str = "milstein"
    noises: tuple[str, ...] = ("diagonal", "scalar", "additive")
    area: bool = False
    order: float = 1
    error_order: float = 0
    weak: float = 1

    @property
    def calculus(self) -> tuple[str, ...]:
        """Of the equations it is for."""
        return (self.calculus_of,)

    @property
    def strong(self) -> Mapping[str, float]:
        """Orders of strong convergence."""
        return dict.fromkeys(self.noises, 1)

    def init(self, field: StochasticField, t: Time, y: Tensor, slope: Tensor | None = None) -> None:
        return None

    def step(self, field: StochasticField, t0: Time, t1: Time, y0: Tensor, carry: Any) -> Step:
        noise = NoiseTerms(t1 - t0, *field.increment(t0, t1, False))
        done, products, w = field.diffusions, field.products, noise("W")
        t = field.times(t0, t1, (0.0,))[0]
        y = torch.add(y0, field(t, y0) * column(t1 - t0, y0))
        square = w * w - noise.size if self.calculus_of == "ito" else w * w
        if field.sde.noise == "additive":
            y = y + field.times_noise(t, y0, field.diffusion(t, y0), w)
        elif field.sde.noise == "diagonal":  # elementwise: the derivative along ones is the Jacobian's diagonal
            g, slope = field.along(t, y0, torch.ones_like(y0), elementwise=True)
            y = torch.addcmul(torch.addcmul(y, g, w), g * slope, square, value=0.5)
        else:
            g = field.diffusion(t, y0).clone()
            _, slope = field.along(t, y0, g)
            y = torch.addcmul(torch.addcmul(y, g, w), slope, square, value=0.5)
        made = field.diffusions - done
        return Step(y, None, _end(y), jacobians=field.products - products, iterations=made)


@dataclass(frozen=True)
class ReversibleHeun:
    """Reversible Heun for Stratonovich equations (Kidger, Foster, Li & Lyons 2021, algorithm 1): one evaluation a step.

        z1 = 2 y0 - z0 + h f0 + g0 W,    y1 = y0 + h (f0 + f1) / 2 + (g0 + g1) W / 2

    with f1 and g1 at (t1, z1). Its carry is z, f(t, z) and g(t, z); `back` undoes a step.
    """

    name: str = "reversible-heun"
    calculus: tuple[str, ...] = ("stratonovich",)
    noises: tuple[str, ...] = ("diagonal", "scalar", "additive", "general")
    area: bool = False
    order: float = 0.5
    error_order: float = 1
    weak: float = 1

    @property
    def strong(self) -> Mapping[str, float]:
        """Orders of strong convergence."""
        return {"diagonal": 1, "scalar": 1, "additive": 1, "general": 0.5}

    def init(self, field: StochasticField, t: Time, y: Tensor, slope: Tensor | None = None) -> Any:
        time = field.time(t)
        return y, field(time, y).clone(), field.diffusion(time, y).clone()

    def step(self, field: StochasticField, t0: Time, t1: Time, y0: Tensor, carry: Any) -> Step:
        z0, f0, g0 = carry
        h, done = column(t1 - t0, y0), field.diffusions
        w, _ = field.increment(t0, t1, False)
        moved = h * f0 + field.times_noise(y0, y0, g0, w)
        z1 = 2 * y0 - z0 + moved
        t = field.time(t1)
        f1, g1 = field(t, z1).clone(), field.diffusion(t, z1).clone()
        end = h * f1 + field.times_noise(t, z1, g1, w)
        y1 = y0 + 0.5 * (moved + end)
        return Step(y1, 0.5 * (end - moved), _end(y1), (z1, f1, g1), iterations=field.diffusions - done)

    def back(self, field: StochasticField, t0: Time, t1: Time, y1: Tensor, carry: Any) -> tuple[Tensor, Any]:
        z1, f1, g1 = carry
        h = column(t1 - t0, y1)
        w, _ = field.increment(t0, t1, False)
        end = h * f1 + field.times_noise(y1, y1, g1, w)
        z0 = 2 * y1 - z1 - end
        t = field.time(t0)
        f0, g0 = field(t, z0).clone(), field.diffusion(t, z0).clone()
        return y1 - 0.5 * (end + h * f0 + field.times_noise(t, z0, g0, w)), (z0, f0, g0)


@dataclass(frozen=True)
class LogODE:
    """The log-ODE method with a midpoint step, for Stratonovich equations (Foster, Lyons & Oberhauser 2020, section 4).

        z = y + (h f + g W) / 2,    y1 = y + h f(z) + g(z) W + sum_kl A_kl (dg_l / dy) g_k

    A the Levy area of the Brownian motion, approximated from W and H (Davie's or Foster's way, `levy`): the driver is
    asked for it.
    """

    levy: str = "foster"
    name: str = "log-ode"
    calculus: tuple[str, ...] = ("stratonovich",)
    noises: tuple[str, ...] = ("diagonal", "scalar", "additive", "general")
    area: bool = True
    order: float = 0.5
    error_order: float = 0
    weak: float = 1

    @property
    def strong(self) -> Mapping[str, float]:
        """Orders of strong convergence."""
        return {"diagonal": 1, "scalar": 1, "additive": 1, "general": 0.5}

    def init(self, field: StochasticField, t: Time, y: Tensor, slope: Tensor | None = None) -> None:
        return None

    def step(self, field: StochasticField, t0: Time, t1: Time, y0: Tensor, carry: Any) -> Step:
        h, done, products = column(t1 - t0, y0), field.diffusions, field.products
        w, _ = field.increment(t0, t1, True)
        start, middle = field.times(t0, t1, (0.0, 0.5))
        g = field.diffusion(start, y0)
        z = y0 + 0.5 * (h * field(start, y0) + field.times_noise(start, y0, g, w))
        y1 = y0 + h * field(middle, z)
        g = field.diffusion(middle, z).clone()
        y1 = y1 + field.times_noise(middle, z, g, w)
        if g.ndim == 3 and field.sde.noise == "general":  # else the brackets vanish
            area = field.levy_area(t0, t1, self.levy)
            for channel in range(g.shape[-1]):
                direction = torch.matmul(g, area[..., channel, None])[..., 0]
                y1 = y1 + field.along(middle, z, direction)[1][..., channel]
        made = field.diffusions - done
        return Step(y1, None, _end(y1), jacobians=field.products - products, iterations=made)


@dataclass(frozen=True)
class Doubling:
    """A method with an estimate of its error: the step once and in two halves, of which the halves are the result.

    Args:
        base: the method. Three times its evaluations.
    """

    base: StochasticSolver
    error_order: float = 1

    @property
    def name(self) -> str:
        """The base's name."""
        return self.base.name

    @property
    def calculus(self) -> tuple[str, ...]:
        """Of the equations it is for."""
        return self.base.calculus

    @property
    def noises(self) -> tuple[str, ...]:
        """The kinds of noise that it takes."""
        return self.base.noises

    @property
    def area(self) -> bool:
        """Whether it uses space-time areas."""
        return self.base.area

    @property
    def strong(self) -> Mapping[str, float]:
        """Orders of strong convergence."""
        return self.base.strong

    @property
    def weak(self) -> float:
        """The order of weak convergence."""
        return self.base.weak

    @property
    def order(self) -> Any:
        """The base's order."""
        return self.base.order

    def init(self, field: StochasticField, t: Time, y: Tensor, slope: Tensor | None = None) -> Any:
        return self.base.init(field, t, y, slope)

    def step(self, field: StochasticField, t0: Time, t1: Time, y0: Tensor, carry: Any) -> Step:
        middle = t0 + 0.5 * (t1 - t0)
        whole = self.base.step(field, t0, t1, y0, carry)
        first = self.base.step(field, t0, middle, y0, carry)
        second = self.base.step(field, middle, t1, first.y1, first.carry)
        parts = (whole, first, second)
        return second._replace(
            error=second.y1 - whole.y1,
            jacobians=sum(part.jacobians for part in parts),
            iterations=sum(part.iterations for part in parts),
        )
