"""Stochastic methods: integrators of the PF-ODE with noise taken away and put back, and of reverse SDEs.

s = sigma/alpha throughout, rho = s_1/s_0 the fall of a step.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from pfode.chart import Chart, Node, er_sde, sde
from pfode.errors import UsageError, integer, number
from pfode.samplers.methods import Integrator, Method, PredictorCorrector, Space, Trail
from pfode.samplers.tape import Linear

__all__ = [
    "Ancestral",
    "AncestralMidpoint",
    "Churn",
    "ErSde",
    "Noisy",
    "Reverse",
    "SaSolver",
    "parts",
]

MAX_ETA = 100.0  # eta and tau of the reverse SDE, where 1 is the usual one: beyond, its exponentials leave float64


@dataclass(frozen=True)
class Noisy(Method):
    """An integrator, and fresh noise after each of its steps, eta of it."""

    integrator: Integrator
    eta: float = 1.0
    options: ClassVar[tuple[str, ...]] = ("eta",)
    largest: ClassVar[float] = 1e9  # eta -> inf is a limit: all noise is drawn anew

    def __post_init__(self) -> None:
        number("eta", self.eta, 0, self.largest)

    @property
    def memory(self) -> int:
        return self.integrator.memory

    @property
    def calls(self) -> int:  # type: ignore[override]
        return self.integrator.calls

    @property
    def stochastic(self) -> bool:
        return self.eta > 0


@dataclass(frozen=True)
class Ancestral(Noisy):
    """An integrator's step to a lower noise level, then fresh noise up to the target's.

    The fresh part is min(1, eta sqrt(1 - rho^2)) of sigma_1. With DDIM's step eta = 1 is the exact posterior
    q(x_1 | x_0, D) of DDPM (Ho et al. 2020, eq. 7), other eta those of DDIM (Song et al. 2021, eq. 16).
    """

    def step(self, trail: Trail, target: Node) -> Linear:
        fresh, left = parts(trail.node, target, self.eta)
        if fresh == 0 or target.sigma == 0:
            return self.integrator.step(trail, target)
        down = trail.space.at_ratio(target, left)
        x = self.integrator.step(trail, down) * (target.alpha / down.alpha)
        return x + trail.tape.noise(trail.node, target) * (target.sigma * fresh)


def parts(start: Node, target: Node, eta: float) -> tuple[float, float]:
    """The part of the target's noise that is fresh, min(1, eta sqrt(1 - rho^2)), and what is left of the old one."""
    if eta == 0:
        return 0.0, 1.0
    rho2 = math.exp(2 * (target.v - start.v))
    left2 = max(0.0, (1 - eta**2) + eta**2 * rho2)  # without cancellation at eta = 1
    return min(1.0, eta * math.sqrt(-math.expm1(2 * (target.v - start.v)))), math.sqrt(left2)


@dataclass(frozen=True)
class AncestralMidpoint(Method):
    """DPM-Solver++(SDE), k-diffusion's sample_dpmpp_sde: an ancestral step to the middle in log s, on with its D.

    With r other than 1/2 the inner point is that part of the way, and D is extrapolated to the middle.
    """

    eta: float = 1.0
    calls: int = 2
    r: float = 0.5
    options: ClassVar[tuple[str, ...]] = ("eta",)

    def __post_init__(self) -> None:
        number("eta", self.eta, 0, MAX_ETA)
        number("r", self.r, 1e-3, 1)

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, trail: Trail, target: Node) -> Linear:
        n, start = trail.predict(), trail.node
        if target.sigma == 0 or not start.regular:
            return self._move(trail, target, n)
        (inner,) = trail.space.between(start, target, self.r)
        later, part = trail.stage(self._move(trail, inner, n), inner)[1], 0.5 / self.r
        return self._move(trail, target, later * part + n * (1 - part))

    def _move(self, trail: Trail, target: Node, n: Linear) -> Linear:
        """An ancestral step from the node to a target with this D."""
        fresh, left = parts(trail.node, target, self.eta) if target.sigma else (0.0, 1.0)
        x = trail.towards_data(target, left, n)
        return x + trail.tape.noise(trail.node, target) * (target.sigma * fresh) if fresh else x


@dataclass(frozen=True)
class Reverse(Noisy):
    """A reverse SDE whose linear part is exact: an integrator in its chart, then fresh noise.

    In the chart x/m of the SDE what is left of the old noise is k = (m_1/m_0) (s_0/s_1) of sigma_1, the fresh part
    sqrt(1 - k^2). For `sde(eta)`, k = rho^eta: DPM-Solver++(2M SDE, 3M SDE) and, with eta = tau^2 and a corrector that
    sees the same noise, SA-Solver (Xue et al. 2023, eq. 14-15).
    """

    largest: ClassVar[float] = MAX_ETA

    def chart(self, chart: Chart) -> Chart:
        return sde(self.eta)

    def step(self, trail: Trail, target: Node) -> Linear:
        return self.reverse(trail, target, self.stochastic)

    def reverse(self, trail: Trail, target: Node, noisy: bool) -> Linear:
        """The step in the chart of the trail."""
        trail.predict()
        self.integrator.correct(trail)
        start = trail.node
        if self.integrator.reaches(start, target):
            keep = target.m / start.m * math.exp(start.v - target.v) * start.alpha / target.alpha
            x = self.integrator.inner(trail, target)
        else:
            keep = 0.0 if noisy else 1.0
            x = trail.towards_data(target, keep)
        fresh = math.sqrt(max(0.0, 1 - keep**2)) * target.sigma if noisy else 0.0
        trail.added = trail.tape.noise(start, target) * fresh if fresh else Linear({})
        return x + trail.added


@dataclass(frozen=True)
class ErSde(Reverse):
    """ER-SDE-Solver: `Reverse` in the chart of its noise scale phi, k = phi(s_1) s_0 / (phi(s_0) s_1)."""

    options: ClassVar[tuple[str, ...]] = ()

    def chart(self, chart: Chart) -> Chart:
        return er_sde()


@dataclass(frozen=True)
class SaSolver(Reverse):
    """SA-Solver: `Reverse` with eta = tau^2 in steps that begin where s lies between two levels, else the PF-ODE.

    A corrector of order k interpolates k predictions, the new one among them; 0: none. The default levels are those of
    0.2 <= t <= 0.8 of the linear VP process, the interval of the paper's experiments.
    """

    integrator: Integrator = field(default=None, init=False)  # type: ignore[assignment]
    predictor: int = 3
    corrector: int = 4
    tau: float = 1.0
    between: tuple[float, float] = (0.72, 25.0)
    options: ClassVar[tuple[str, ...]] = ("predictor", "corrector", "tau", "between")

    def __post_init__(self) -> None:
        number("tau", self.tau, 0, MAX_ETA)
        try:
            low, high = map(float, self.between)
        except (TypeError, ValueError):
            low = high = math.nan
        if not 0 <= low < high:
            raise UsageError(f"between: need two rising levels of sigma/alpha, got {self.between}", "(0.72, 25.0)")
        orders = integer("predictor", self.predictor, 1, 5), integer("corrector", self.corrector, 0, 6)
        if orders[1] == 1:
            raise UsageError(
                "corrector: order 1 is implicit Euler, for which SA-Solver has no form", "0 (none) or 2 to 6"
            )
        object.__setattr__(self, "integrator", PredictorCorrector(orders[0], max(0, orders[1] - 1), bh=1))

    @property
    def stochastic(self) -> bool:
        return self.tau > 0

    def chart(self, chart: Chart) -> Chart:
        return sde(0)

    def step(self, trail: Trail, target: Node) -> Linear:
        low, high = self.between
        noisy = self.stochastic and low <= math.exp(min(trail.node.v, 700)) <= high
        trail.space = Space(sde(self.tau**2 if noisy else 0), trail.space.process)
        trail.node, target = trail.space.again(trail.node), trail.space.again(target)
        return self.reverse(trail, target, noisy)


@dataclass(frozen=True)
class Churn(Method):
    """Noise added before a step of an integrator that then takes it away (Karras et al. 2022, algorithm 2).

    Where S_tmin <= s <= S_tmax, s becomes s (1 + gamma) with gamma = min(S_churn / steps, sqrt(2) - 1), but never
    beyond the process's noisiest level; the noise is S_noise times what that needs.
    """

    integrator: Integrator
    churn: float = 40.0
    s_tmin: float = 0.0
    s_tmax: float = 1e9
    s_noise: float = 1.0
    options: ClassVar[tuple[str, ...]] = ("churn", "s_tmin", "s_tmax", "s_noise")

    def __post_init__(self) -> None:
        for name in self.options:
            number(name, getattr(self, name), 0)

    @property
    def calls(self) -> int:  # type: ignore[override]
        return self.integrator.calls

    @property
    def stochastic(self) -> bool:
        return self.churn > 0

    def step(self, trail: Trail, target: Node) -> Linear:
        space, start = trail.space, trail.node
        highest = space.at_time(space.process.t_max)
        s = math.exp(start.v) if start.regular else math.inf
        gamma = min(self.churn / trail.steps, math.sqrt(2) - 1) if self.s_tmin <= s <= self.s_tmax else 0.0
        grown = min(start.v + math.log1p(gamma), highest.v)
        if grown > start.v and start.regular:
            up = space.at_time(space.process.time(-2 * grown))
            added = self.s_noise * math.sqrt(math.exp(2 * up.v) - s**2)
            trail.x = trail.x * (up.alpha / start.alpha) + trail.tape.noise(start, target) * (up.alpha * added)
            trail.node = up
        return self.integrator.step(trail, target)
