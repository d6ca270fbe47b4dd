"""Methods: how a step from one node to the next is made, as formulas in states and predictions (docs/design.md, B).

A method sees a `Trail`: where it is, what it knows, a chart to integrate in. It returns the state at the target as a
combination of states, predictions and noise; rows are the tape's affair. With z = x/m the PF-ODE is dz/du = w n.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from pfode.chart import Chart, Node, lagrange
from pfode.prediction import PREDICTIONS
from pfode.process import Process
from pfode.samplers.tape import NOTHING, Linear, Tape, combined
from pfode.tableau import Tableau

__all__ = [
    "Integrator",
    "LastStep",
    "Method",
    "Multistep",
    "Pndm",
    "PredictorCorrector",
    "Res3",
    "RungeKutta",
    "Space",
    "Trail",
    "constant",
    "exact",
    "halved",
    "official",
    "taylor",
    "variable",
]


@dataclass(frozen=True)
class Space:
    """A chart of a process."""

    chart: Chart
    process: Process

    def integrate(self, known: Sequence[Node], start: Node, stop: Node) -> list[float]:
        """Exact weights, from start to stop, of the interpolant through the known nodes."""
        return self.chart.integrate(self.process, known, start, stop)

    def moments(self, start: Node, stop: Node, n: int) -> list[float]:
        """Integrals of w(u) (u - u_start)^q du, q < n."""
        return self.chart.moments(self.process, start, stop, n)

    def whole(self, start: Node, stop: Node) -> float:
        """The integral of w from start to stop."""
        return self.moments(start, stop, 1)[0]

    def between(self, start: Node, stop: Node, *fractions: float) -> list[Node]:
        """Nodes on the way, by fractions of the clock."""
        inner = [start.u + c * (stop.u - start.u) for c in fractions if 0 < c < 1]
        made = iter(self.chart.at(self.process, inner) if inner else [])
        return [next(made) if 0 < c < 1 else stop if c else start for c in fractions]

    def at_time(self, t: float) -> Node:
        """The node at a time of the process."""
        return self.chart.nodes(self.process, [t])[0]

    def at_ratio(self, node: Node, factor: float) -> Node:
        """The node whose sigma/alpha is this many times that of a node; clean data for 0."""
        return self.at_time(self.process.time(-2 * (node.v + math.log(factor))) if factor else self.process.t_data)

    def again(self, node: Node) -> Node:
        """A node of another chart of the same process, in this one."""
        return self.at_time(node.t)


@dataclass
class Trail:
    """A trajectory in the making: what a method sees.

    x, the state, is at `node`; `seen` is the state that this node's prediction was made for (x unless corrected since).
    """

    space: Space
    tape: Tape
    steps: int
    node: Node
    lower_order_final: bool = False
    index: int = 0  # of the step being made
    x: Linear = NOTHING
    seen: Linear = NOTHING
    other: Linear = NOTHING  # the second of two coupled trajectories
    past: list[tuple[Node, Linear]] = field(default_factory=list)  # nodes and predictions, newest first
    last: "LastStep | None" = None
    added: Linear = NOTHING  # the noise that the last step ended with
    predicted: bool = False  # whether past[0] is this node's

    def predict(self) -> Linear:
        """n at the node: the step's own call of the denoiser."""
        if not self.predicted:
            self.x, n = self.tape.evaluate(self.x, self.node)
            self.seen = self.x
            self.past.insert(0, (self.node, n))
            self.predicted = True
        return self.past[0][1]

    def stage(self, x: Linear, node: Node) -> tuple[Linear, Linear]:
        """An inner call: the state, now in the register, and n there."""
        return self.tape.evaluate(x, node)

    @property
    def cap(self) -> int:
        """The highest order of this step."""
        return self.steps - self.index if self.lower_order_final else self.steps

    def known(self, order: int) -> tuple[list[Node], list[Linear]]:
        """The nodes of the last predictions and these, this node's the first, at most `order` of them."""
        self.predict()
        nodes, predictions = zip(*self.past[: min(order, self.cap)], strict=True)
        return list(nodes), list(predictions)

    def moved(self, x: Linear, target: Node, weights: Sequence[float], predictions: Sequence[Linear]) -> Linear:
        """x_1 = m_1 (x_0/m_0 + sum_j W_j n_j)."""
        return x * (target.m / self.node.m) + combined((target.m * w for w in weights), predictions)

    def towards_data(self, target: Node, keep: float = 1.0, n: Linear | None = None) -> Linear:
        """x_1 = k (sigma_1/sigma_0) x + (alpha_1 - k alpha_0 sigma_1/sigma_0) D: DDIM's step, k of the noise kept."""
        start, named = self.node, PREDICTIONS[self.space.chart.prediction]
        n = self.predict() if n is None else n
        stays = keep * target.sigma / start.sigma
        weight = target.alpha - start.alpha * stays
        if named.singular and start.alpha == 0:
            return self.x * stays + n * weight
        p, q = named.of_x0(start.alpha, start.sigma)
        return self.x * stays + (n - self.seen * p) * (weight / q)

    def arrive(self, x: Linear, target: Node, memory: int) -> None:
        """The step is made; the last `memory` predictions serve on, but not that of a node where the chart fails."""
        regular = self.node.regular
        self.past = self.past[:memory] if regular else []
        self.last = (
            LastStep(self.space, self.node, self.x, tuple(self.past[: self.cap]), self.added) if regular else None
        )
        self.x, self.node, self.predicted, self.index = x, target, False, self.index + 1


@dataclass(frozen=True)
class LastStep:
    """The step before: its space, where it began, the state and the predictions there, the noise it ended with."""

    space: Space
    node: Node
    x: Linear
    past: tuple[tuple[Node, Linear], ...]
    added: Linear


class Method(ABC):
    """A rule for one step.

    Class attributes: `options` are the fields that make_plan takes, `pair` says that the state before the last is kept.
    """

    calls: int  # denoiser calls per step
    options: ClassVar[tuple[str, ...]] = ()
    pair: ClassVar[bool] = False

    @property
    def memory(self) -> int:
        """How many predictions at nodes a step looks back on, its own among them."""
        return 1

    @property
    def stochastic(self) -> bool:
        """Whether noise is drawn beyond the initial one."""
        return False

    def chart(self, chart: Chart) -> Chart:
        """The chart to work in when this one is asked for."""
        return chart

    @abstractmethod
    def step(self, trail: Trail, target: Node) -> Linear:
        """The state at the target."""


class Integrator(Method):
    """A deterministic method; the rules at the two ends of a trajectory are here, once for all of them.

    A step onto sigma = 0 (x = alpha D) where the chart or an inner stage cannot go, one from or onto alpha = 0 where
    the chart does not hold: DDIM's step, which is exact for the D it is given.
    """

    def step(self, trail: Trail, target: Node) -> Linear:
        trail.predict()
        self.correct(trail)
        return self.inner(trail, target) if self.reaches(trail.node, target) else trail.towards_data(target)

    def reaches(self, start: Node, target: Node) -> bool:
        """Whether chart and stages hold all the way."""
        return start.regular and target.regular and (target.sigma > 0 or self.calls == 1)

    def correct(self, trail: Trail) -> None:
        """Put a better state in place of the one that was predicted."""

    @abstractmethod
    def inner(self, trail: Trail, target: Node) -> Linear:
        """The step between two nodes at which the chart holds; this node's prediction is known."""


Weights = Callable[[Space, Sequence[Node], Node], list[float]]


@dataclass(frozen=True)
class Multistep(Integrator):
    """z_1 = z_0 + sum_j W_j n_{-j}: one call per step, order grown from 1 as nodes become known."""

    order: int
    weights: Weights
    calls: int = 1

    @property
    def memory(self) -> int:
        return self.order

    def inner(self, trail: Trail, target: Node) -> Linear:
        nodes, predictions = trail.known(self.order)
        return trail.moved(trail.x, target, self.weights(trail.space, nodes, target), predictions)


def exact(space: Space, known: Sequence[Node], target: Node) -> list[float]:
    """Adams-Bashforth integrated exactly against w: exponential Adams in the log clocks (order = number of nodes)."""
    return space.integrate(known, known[0], target)


_X, _W = np.polynomial.legendre.leggauss(4)  # exact for polynomials of degree 7


def variable(space: Space, known: Sequence[Node], target: Node) -> list[float]:
    """Adams-Bashforth of the uneven steps in u, times the mean of w.

    The official DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2), where the slope enters with half the step.
    """
    basis = lagrange([node.u for node in known], known[0].u + 0.5 * (target.u - known[0].u) * (1 + _X))
    whole = space.whole(known[0], target)
    return [whole * float(0.5 * _W @ value) for value in basis]


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def constant(space: Space, known: Sequence[Node], target: Node) -> list[float]:
    """Adams-Bashforth weights of equal steps, whatever the grid: iPNDM (Zhang & Chen 2022, appendix B)."""
    whole = space.whole(known[0], target)
    return [whole * w for w in ADAMS_BASHFORTH[len(known) - 1]]


def halved(space: Space, known: Sequence[Node], target: Node) -> list[float]:
    """Exact but for half the curvature of three nodes: the third order of DPM-Solver(++) as it is published in code."""
    if len(known) < 3:
        return exact(space, known, target)
    h = target.u - known[0].u
    moments = [moment / h**q for q, moment in enumerate(space.moments(known[0], target, 3))]
    moments[2] *= 0.5
    back = np.array([(node.u - known[0].u) / h for node in known])
    return np.linalg.solve(np.vander(back, increasing=True).T, moments).tolist()


def official(space: Space, known: Sequence[Node], target: Node) -> list[float]:
    """DPM-Solver(++)(3M): `halved`, begun with `variable`."""
    return (variable if len(known) < 3 else halved)(space, known, target)


def taylor(space: Space, known: Sequence[Node], target: Node) -> list[float]:
    """n + n' u + n'' u^2/2 with backward differences for n' and n'': ER-SDE-Solver-3 (Cui et al. 2023, algorithm 3)."""
    if len(known) < 3:
        return exact(space, known, target)
    m0, m1, m2 = space.moments(known[0], target, 3)
    a, b, c = (node.u for node in known)
    first = np.array([1 / (a - b), -1 / (a - b), 0.0])
    second = 2 / (a - c) * (first - np.array([0.0, 1 / (b - c), -1 / (b - c)]))
    return (np.array([m0, 0.0, 0.0]) + m1 * first + 0.5 * m2 * second).tolist()


@dataclass(frozen=True)
class RungeKutta(Integrator):
    """A tableau in the clock u, its stages exponential or classical.

    classical: z_i = z_0 + h sum_j a_ij w(u_j) n_j. exponential: every stage's interpolant is integrated against w
    exactly, W_ij = integral of w l_j + (a_ij - integral of l_j) mean w, with l_j the Lagrange basis on the stages of
    non-zero weight (those of equal c share theirs): a_ij again where w = 1, and no error from w where n is smooth.
    DPM-Solver-2, DPM-Solver-3 and DPM-Solver++(2S) (Lu et al. 2022) and RES-2S (Zhang et al. 2023) are such forms.

    Args:
        tableau: an explicit one.
        classical: which form.
        support: for every row of the tableau (`Tableau.rows`) stages that the exponential form interpolates through
            besides those of non-zero weight.
    """

    tableau: Tableau
    classical: bool = False
    support: tuple[tuple[int, ...], ...] = ()

    @property
    def calls(self) -> int:  # type: ignore[override]
        return self.tableau.stages

    def inner(self, trail: Trail, target: Node) -> Linear:
        start, space = trail.node, trail.space
        nodes = space.between(start, target, *self.tableau.c, 1.0)
        predictions = [trail.predict()]
        x = trail.x
        for i in range(self.calls):
            weights = self._classical(space, nodes, i) if self.classical else self._exponential(space, nodes, i)
            x = trail.moved(trail.x, nodes[i + 1], weights, predictions)
            if i + 1 < self.calls:
                predictions.append(trail.stage(x, nodes[i + 1])[1])
        return x

    def _classical(self, space: Space, nodes: Sequence[Node], i: int) -> list[float]:
        h = nodes[-1].u - nodes[0].u
        row = self.tableau.rows[i]
        return [h * a * space.chart.weight(space.process, nodes[j]) if a else 0.0 for j, a in enumerate(row)]

    def _exponential(self, space: Space, nodes: Sequence[Node], i: int) -> list[float]:
        row, c = self.tableau.rows[i], self.tableau.c
        extra = self.support[i] if self.support else ()
        end = c[i + 1] if i + 1 < len(c) else 1.0
        used = [j for j, w in enumerate(row) if w != 0 or j in extra]
        points = sorted({c[j] for j in used})
        share = [1 / sum(c[k] == c[j] for k in used) for j in used]
        integrals = space.integrate([nodes[c.index(p)] for p in points], nodes[0], nodes[i + 1])
        plain = [0.5 * end * float(_W @ v) for v in lagrange(points, 0.5 * end * (1 + _X))]  # with w = 1
        mean = space.whole(nodes[0], nodes[i + 1]) / end
        weights = [0.0] * (i + 1)
        for j, part in zip(used, share, strict=True):
            k = points.index(c[j])
            weights[j] = part * integrals[k] + (row[j] - part * plain[k]) * mean
        return weights


@dataclass(frozen=True)
class Res3(Integrator):
    """The exponential Runge-Kutta method of stiff order 3 with c = (0, c2, c3) (Hochbruck & Ostermann 2005, eq. 5.9).

    gamma = (3 c3^2 - 2 c3) / (c2 (2 - 3 c2)); RES-3S of Zhang et al. 2023. At w = 1, c2 = 1/2, c3 = 1: Kutta's method.
    """

    c2: float = 0.5
    c3: float = 1.0
    calls: int = 3

    def inner(self, trail: Trail, target: Node) -> Linear:
        space, start, h = trail.space, trail.node, target.u - trail.node.u
        second, third = space.between(start, target, self.c2, self.c3)
        gamma = (3 * self.c3**2 - 2 * self.c3) / (self.c2 * (2 - 3 * self.c2))
        whole_2, slope_2 = space.moments(start, second, 2)
        whole_3, slope_3 = space.moments(start, third, 2)
        whole, slope = space.moments(start, target, 2)
        n = trail.predict()
        _, n_2 = trail.stage(trail.moved(trail.x, second, [whole_2], [n]), second)
        a = (gamma * slope_2 + slope_3) / (self.c2 * h)
        _, n_3 = trail.stage(trail.moved(trail.x, third, [whole_3 - a, a], [n, n_2]), third)
        b = slope / ((gamma * self.c2 + self.c3) * h)
        return trail.moved(trail.x, target, [whole - (1 + gamma) * b, gamma * b, b], [n, n_2, n_3])


@dataclass(frozen=True)
class PredictorCorrector(Integrator):
    """UniPC (Zhao et al. 2023, algorithms 1-4): one call per step serves the corrector of this node and the predictor.

    The predictor of order p interpolates p predictions, the corrector of order q those and the new one, both
    integrated exactly; where one has a single slope, B/2 stands for its exact weight: B = integral of w (bh2) or
    h w(u_1) (bh1). The register holds predicted states; corrected ones are only used to go on from.
    """

    predictor: int
    corrector: int
    bh: int = 2
    calls: int = 1

    @property
    def memory(self) -> int:
        return max(self.predictor, self.corrector)

    def reaches(self, start: Node, target: Node) -> bool:
        return super().reaches(start, target) and (self.bh == 2 or target.sigma > 0)  # w(u_1) may be infinite there

    def inner(self, trail: Trail, target: Node) -> Linear:
        nodes, predictions = trail.known(self.predictor)
        return trail.moved(trail.x, target, self._weights(trail.space, nodes, target, nodes[0]), predictions)

    def correct(self, trail: Trail) -> None:
        last = trail.last
        if last is None or not self.corrector:
            return
        n = trail.predict()
        nodes, predictions = zip(*last.past[: self.corrector], strict=True)
        weights = self._weights(last.space, [last.node, *nodes[1:], trail.node], trail.node, last.node)
        # the base point first, the new node last; `moved` starts at trail.node, so the scale is said here
        target = last.space.again(trail.node)
        combination = combined((target.m * w for w in weights), [*predictions, n])
        trail.x = trail.tape.settled(last.x * (target.m / last.node.m) + combination + trail.added)

    def _weights(self, space: Space, known: Sequence[Node], target: Node, start: Node) -> list[float]:
        if len(known) != 2:
            return space.integrate(known, start, target)
        whole, h = space.whole(start, target), target.u - start.u
        b = whole if self.bh == 2 else h * space.chart.weight(space.process, target)
        slope = 0.5 * b * h / (known[1].u - start.u)
        return [whole - slope, slope]


@dataclass(frozen=True)
class Pndm(Integrator):
    """PNDM (Liu et al. 2022): three steps of a pseudo Runge-Kutta method, then `constant` of order 4.

    Its inner points lie half-way in time, so that its order is 2.
    """

    calls: int = 1

    @property
    def memory(self) -> int:
        return 4

    def inner(self, trail: Trail, target: Node) -> Linear:
        if len(trail.past) >= self.memory:
            nodes, predictions = trail.known(self.memory)
            return trail.moved(trail.x, target, constant(trail.space, nodes, target), predictions)
        if target.sigma == 0:
            return trail.towards_data(target)
        half = trail.space.at_time(0.5 * (trail.node.t + target.t))
        n = [trail.predict()]
        for node in (half, half, target):
            x = trail.moved(trail.x, node, [trail.space.whole(trail.node, node)], n[-1:])
            n.append(trail.stage(x, node)[1])
        whole = trail.space.whole(trail.node, target)
        return trail.moved(trail.x, target, [whole * b for b in (1 / 6, 1 / 3, 1 / 3, 1 / 6)], n)
