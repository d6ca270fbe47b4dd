"""Methods: how a step from one node to the next becomes rows of a plan (idea B).

A method knows nothing of models, grids or noise levels: it turns (chart, nodes whose predictions are known, target)
into weights on those predictions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pfode.chart import Chart, Node
from pfode.errors import UsageError
from pfode.prediction import PREDICTIONS
from pfode.process import Process


@dataclass(frozen=True)
class Row:
    """One denoiser call at `node`, then x = r x + sum_j b_j m_{-j} (newest first) + c xi, which has the level of `target`."""

    node: Node
    target: Node
    r: float
    b: list[float]
    c: float = 0.0


@dataclass(frozen=True)
class Space:
    """Where a method works: a chart of a process."""

    chart: Chart
    process: Process

    def integrate(self, known: Sequence[Node], target: Node) -> list[float]:
        """Exact weights of the interpolant through the known nodes (newest first), from the newest to the target."""
        return self.chart.integrate(self.process, known, known[0], target)

    def at_clock(self, u: float) -> Node:
        """The node whose clock shows u."""
        return self.at_time(self.process.time(-2 * self.chart.inverse(self.process, u)))

    def at_ratio(self, node: Node, factor: float) -> Node:
        """The node whose sigma/alpha is `factor` (0 to 1) of this one's; clean data for 0."""
        return self.at_time(self.process.time(-2 * (node.v + math.log(factor))) if factor else self.process.t_data)

    def at_time(self, t: float) -> Node:
        """The node at time t."""
        return self.chart.nodes(self.process, [t])[0]


class Method(ABC):
    """A rule for one step, from the newest known node to the target."""

    order: int
    calls: int  # denoiser calls per step
    stochastic = False

    @abstractmethod
    def step(self, space: Space, known: Sequence[Node], target: Node) -> tuple[list[Row], bool]:
        """The rows of one step, and whether the node it leaves may serve later steps.

        `known` are the nodes whose predictions lie in the window, newest first.
        """


class Integrator(Method):
    """A deterministic method; the rules at the two ends of a trajectory are here, once for all of them.

    A step onto sigma = 0 where the chart or an inner stage cannot go is x = alpha D. A step from alpha = 0 where the
    chart does not hold is the row x = (sigma_1/sigma_0) x + alpha_1 D, and its node leaves the history.
    """

    def step(self, space: Space, known: Sequence[Node], target: Node) -> tuple[list[Row], bool]:
        start = known[0]
        if not start.regular:
            return [x0_row(space, start, target)], False
        if target.sigma == 0 and (self.calls > 1 or not target.regular):
            return [x0_row(space, start, target)], True
        return self.rows(space, known, target), True

    @abstractmethod
    def rows(self, space: Space, known: Sequence[Node], target: Node) -> list[Row]:
        """The rows of a step between two nodes at which the chart holds."""


Weights = Callable[[Space, Sequence[Node], Node], list[float]]


@dataclass(frozen=True)
class Multistep(Integrator):
    """z_1 = z_0 + sum_j W_j n_{-j} with z = x/m: one call per step, order grown from 1 as nodes become known."""

    order: int
    weights: Weights
    calls: int = 1

    def rows(self, space: Space, known: Sequence[Node], target: Node) -> list[Row]:
        weights = self.weights(space, known[: self.order], target)
        return [Row(known[0], target, target.m / known[0].m, [target.m * w for w in weights])]


def exact(space: Space, known: Sequence[Node], target: Node) -> list[float]:
    """Adams-Bashforth integrated exactly against w: exponential Adams in the log clocks (order = number of nodes)."""
    return space.integrate(known, target)


def midpoint(space: Space, known: Sequence[Node], target: Node) -> list[float]:
    """The official DPM-Solver++(2M) weights: the slope enters with half the step (Lu et al. 2022b, algorithm 2)."""
    (whole,) = space.integrate(known[:1], target)
    if len(known) == 1:
        return [whole]
    slope = 0.5 * (target.u - known[0].u) / (known[0].u - known[1].u)
    return [whole * (1 + slope), -whole * slope]


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def constant(space: Space, known: Sequence[Node], target: Node) -> list[float]:
    """Adams-Bashforth weights of equal steps, whatever the grid: iPNDM (Zhang & Chen 2022, appendix B)."""
    (whole,) = space.integrate(known[:1], target)
    return [whole * w for w in ADAMS_BASHFORTH[len(known) - 1]]


@dataclass(frozen=True)
class RungeKutta(Integrator):
    """An explicit tableau as classical stages in the chart's clock, dz/du = w(u) n; inner stages are rows.

    Args:
        a: strictly lower triangle, one tuple per stage after the first; b: weights of the result; order: claimed.
    """

    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "c", (0.0, *(math.fsum(row) for row in self.a)))
        if abs(math.fsum(self.b) - 1) > 1e-14 or [len(row) for row in self.a] != list(range(1, len(self.b))):
            raise ValueError(f"tableau of order {self.order}: b must sum to 1 and a be strictly lower triangular")

    @property
    def calls(self) -> int:  # type: ignore[override]
        return len(self.b)

    def rows(self, space: Space, known: Sequence[Node], target: Node) -> list[Row]:
        start = known[0]
        width = target.u - start.u
        stages = [start] + [target if c == 1 else space.at_clock(start.u + c * width) for c in self.c[1:]]
        weights = [width * space.chart.weight(space.process, stage) for stage in stages]
        tableau = [(0.0,) * len(self.b), *(row + (0.0,) * (len(self.b) - len(row)) for row in self.a), self.b]
        rows = []
        for i, (here, there) in enumerate(zip(stages, [*stages[1:], target], strict=True)):
            moves = [there.m * weights[j] * (tableau[i + 1][j] - tableau[i][j]) for j in range(i, -1, -1)]
            rows.append(Row(here, there, there.m / here.m, moves))
        return rows


HEUN = RungeKutta(2, a=((1.0,),), b=(0.5, 0.5))


@dataclass(frozen=True)
class Ancestral(Method):
    """An integrator's step to a lower noise level, then fresh noise up to the target's.

    With rho = (sigma_1/alpha_1) / (sigma_0/alpha_0) the fresh part is min(1, eta sqrt(1 - rho^2)) of sigma_1; eta = 1 is
    the exact posterior q(x_1 | x_0, D) of DDPM (Ho et al. 2020, eq. 7), eta = 0 the integrator itself.
    """

    integrator: Integrator
    eta: float = 1.0
    stochastic = True

    def __post_init__(self) -> None:
        if not 0 <= self.eta < math.inf:
            raise UsageError(f"eta: need a number of at least 0, got {self.eta}", "eta=1.0")

    @property
    def order(self) -> int:  # type: ignore[override]
        return 1

    @property
    def calls(self) -> int:  # type: ignore[override]
        return self.integrator.calls

    def step(self, space: Space, known: Sequence[Node], target: Node) -> tuple[list[Row], bool]:
        fresh = min(1.0, self.eta * math.sqrt(-math.expm1(2 * (target.v - known[0].v))))
        down = target if fresh == 0 or target.sigma == 0 else space.at_ratio(target, math.sqrt(1 - fresh**2))
        rows, keep = self.integrator.step(space, known, down)
        scale = target.alpha / down.alpha
        last = rows[-1]
        rows[-1] = Row(last.node, target, scale * last.r, [scale * w for w in last.b], target.sigma * fresh)
        return rows, keep


def x0_row(space: Space, start: Node, target: Node) -> Row:
    """x_1 = (sigma_1/sigma_0) x + (alpha_1 - alpha_0 sigma_1/sigma_0) D, said in the chart's prediction."""
    keep = target.sigma / start.sigma
    weight = target.alpha - start.alpha * keep
    named = PREDICTIONS[space.chart.prediction]
    if named.blind and start.alpha == 0:
        return Row(start, target, keep, [weight])
    p, q = named.of_x0(start.alpha, start.sigma)
    return Row(start, target, keep - weight * p / q, [weight / q])
