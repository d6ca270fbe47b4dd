"""Langevin steps at fixed noise levels: annealed Langevin dynamics, and correctors after the step of another method.

A Langevin step x + h s(x) + sqrt(2h) xi leaves p_t what it is up to O(h). Here h = k sigma^2, and the score is
s = -eps/sigma, so that the step is x - k sigma eps + sqrt(2k) sigma xi. `pfode.samplers.mala` has steps that are exact.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from pfode.chart import Node
from pfode.errors import integer, number
from pfode.samplers.methods import Integrator, Method, Trail
from pfode.samplers.stochastic import Ancestral
from pfode.samplers.tape import Linear

__all__ = ["AnnealedLangevin", "Corrected"]

MAX_ROUNDS = 1000


def langevin(trail: Trail, x: Linear, node: Node, k: float, rounds: int) -> Linear:
    """So many Langevin steps from x at the noise level of a node; the plan's prediction is eps."""
    for _ in range(rounds):
        x, eps = trail.stage(x, node)
        x = x - eps * (k * node.sigma) + trail.tape.fresh() * (math.sqrt(2 * k) * node.sigma)
    return x


@dataclass(frozen=True)
class AnnealedLangevin(Method):
    """Langevin steps at every noise level in turn, nothing between (Song & Ermon 2019, algorithm 1).

    From level to level x/alpha stays as it is. With eps / sigma_last^2 of the paper for `size`, they are its steps. A
    grid that ends at clean data ends with the denoiser's answer. On a grid of one short step it is plain Langevin
    dynamics at one level.

    Args:
        integrator: of the steps that begin or end without noise level, alpha = 0 or sigma = 0.
        rounds: steps at a level.
        size: h / sigma^2.
    """

    integrator: Integrator
    rounds: int = 5
    size: float = 0.1
    stochastic: ClassVar[bool] = True  # type: ignore[misc]
    options: ClassVar[tuple[str, ...]] = ("rounds", "size")

    def __post_init__(self) -> None:
        integer("rounds", self.rounds, 1, MAX_ROUNDS)
        number("size", self.size, 1e-9, 1)

    @property
    def calls(self) -> int:  # type: ignore[override]
        return self.rounds

    def step(self, trail: Trail, target: Node) -> Linear:
        if not trail.node.regular:
            return self.integrator.step(trail, target)
        trail.x = langevin(trail, trail.x, trail.node, self.size, self.rounds)
        if target.sigma == 0:
            return self.integrator.step(trail, target)
        return trail.x * (target.alpha / trail.node.alpha)


@dataclass(frozen=True)
class Corrected(Method):
    """A predictor's step, then Langevin steps at the level that it came to (Song et al. 2021, algorithms 4 and 5).

    h = size (1 - rho^2) sigma^2, rho the fall of sigma/alpha in the step: small steps need small corrections, and the
    order of the predictor, 1, is kept. The paper's h = 2 (snr |xi|/|s|)^2 is, on average, 2 snr^2 sigma^2 for any step.

    Args:
        predictor: the step that is corrected.
        rounds: Langevin steps after it.
        size: see above.
    """

    predictor: Ancestral
    rounds: int = 1
    size: float = 0.1
    stochastic: ClassVar[bool] = True  # type: ignore[misc]
    options: ClassVar[tuple[str, ...]] = ("rounds", "size")

    def __post_init__(self) -> None:
        integer("rounds", self.rounds, 1, MAX_ROUNDS)
        number("size", self.size, 1e-9, 1)

    @property
    def calls(self) -> int:  # type: ignore[override]
        return self.predictor.calls + self.rounds

    def step(self, trail: Trail, target: Node) -> Linear:
        x = self.predictor.step(trail, target)
        if target.sigma == 0 or not trail.node.regular:
            return x
        fall = -math.expm1(2 * (target.v - trail.node.v))
        return langevin(trail, x, target, self.size * fall, self.rounds)
