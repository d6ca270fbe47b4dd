"""Methods: how a step from one node to the next becomes rows of a plan (idea B).

A method knows nothing of models, grids or noise levels: it turns (chart, nodes whose predictions are known, target)
into weights on those predictions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pfode.chart import Chart, Node
from pfode.errors import number
from pfode.prediction import PREDICTIONS
from pfode.process import Process


@dataclass(frozen=True)
class Row:
    """One denoiser call at `node`, then x = r x + sum_j b_j m_{-j} (newest first) + c xi, at the level of `target`."""

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

    def integrate(self, known: Sequence[Node], start: Node, stop: Node) -> list[float]:
        """Exact weights, from start to stop, of the interpolant through the known nodes."""
        return self.chart.integrate(self.process, known, start, stop)

    def at_ratio(self, node: Node, factor: float) -> Node:
        """The node whose sigma/alpha is `factor` (0 to 1) of this one's; clean data for 0."""
        t = self.process.time(-2 * (node.v + math.log(factor))) if factor else self.process.t_data
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
    return space.integrate(known, known[0], target)


def midpoint(space: Space, known: Sequence[Node], target: Node) -> list[float]:
    """The official DPM-Solver++(2M) weights: the slope enters with half the step (Lu et al. 2022b, algorithm 2)."""
    (whole,) = space.integrate(known[:1], known[0], target)
    if len(known) == 1:
        return [whole]
    slope = 0.5 * (target.u - known[0].u) / (known[0].u - known[1].u)
    return [whole * (1 + slope), -whole * slope]


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def constant(space: Space, known: Sequence[Node], target: Node) -> list[float]:
    """Adams-Bashforth weights of equal steps, whatever the grid: iPNDM (Zhang & Chen 2022, appendix B)."""
    (whole,) = space.integrate(known[:1], known[0], target)
    return [whole * w for w in ADAMS_BASHFORTH[len(known) - 1]]


@dataclass(frozen=True)
class Heun(Integrator):
    """An Euler row to the target, then a second row there that corrects it to the interpolant through both predictions.

    Where w = 1 that is Heun's method of Karras et al. 2022, algorithm 1; elsewhere its exponential form.
    """

    order: int = 2
    calls: int = 2

    def rows(self, space: Space, known: Sequence[Node], target: Node) -> list[Row]:
        start = known[0]
        (euler,) = space.integrate([start], start, target)
        there, here = space.integrate([target, start], start, target)
        first = Row(start, target, target.m / start.m, [target.m * euler])
        return [first, Row(target, target, 1.0, [target.m * there, target.m * (here - euler)])]


@dataclass(frozen=True)
class Ancestral(Method):
    """An integrator's step to a lower noise level, then fresh noise up to the target's.

    With rho = (sigma_1/alpha_1) / (sigma_0/alpha_0) the fresh part is min(1, eta sqrt(1 - rho^2)) of sigma_1. eta = 1
    is the exact posterior q(x_1 | x_0, D) of DDPM (Ho et al. 2020, eq. 7), eta = 0 the integrator itself.
    """

    integrator: Integrator
    eta: float = 1.0
    stochastic = True

    def __post_init__(self) -> None:
        number("eta", self.eta, 0)

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
