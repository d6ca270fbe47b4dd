"""Exactly invertible methods: steps whose start can be computed from their end, through the state before the last."""

from dataclasses import dataclass
from typing import ClassVar

from pfode.chart import Node
from pfode.errors import number
from pfode.samplers.methods import Integrator, Trail
from pfode.samplers.tape import Linear

__all__ = ["Bdia", "Belm", "Edict"]


@dataclass(frozen=True)
class Belm(Integrator):
    """O-BELM (Wang et al. 2024, eq. 18), exactly invertible: a two-step method through the state before the last.

    With y = x/alpha and h = |u_1 - u_0|, h' = |u_0 - u_-1|: y_1 = (h/h')^2 y_-1 + (1 - (h/h')^2) y_0 - h (h + h')/h' n.
    """

    calls: int = 1
    pair: ClassVar[bool] = True

    def inner(self, trail: Trail, target: Node) -> Linear:
        start, n = trail.node, trail.predict()
        h = target.u - start.u
        if trail.last is None:
            return trail.moved(trail.x, target, [h], [n])
        before = start.u - trail.last.node.u
        ratio = (h / before) ** 2
        back = trail.last.x * (ratio * target.m / trail.last.node.m)
        return back + trail.x * ((1 - ratio) * target.m / start.m) + n * (target.m * h * (h + before) / before)


@dataclass(frozen=True)
class Bdia(Integrator):
    """BDIA-DDIM (Zhang et al. 2024, eq. 18), exactly invertible: DDIM's step on and gamma of the step back undone.

    gamma = 1 has order 2, but then an error that changes its sign from step to step never dies out.
    """

    gamma: float = 0.5
    calls: int = 1
    pair: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("gamma",)

    def __post_init__(self) -> None:
        number("gamma", self.gamma, 0, 1)

    def inner(self, trail: Trail, target: Node) -> Linear:
        start, n = trail.node, trail.predict()

        def ddim(node: Node) -> Linear:
            return trail.moved(trail.x, node, [node.u - start.u], [n])

        if trail.last is None:
            return ddim(target)
        return ddim(target) + (trail.last.x - ddim(trail.last.node)) * self.gamma


@dataclass(frozen=True)
class Edict(Integrator):
    """EDICT (Wallace et al. 2023, eq. 13-16), exactly invertible: two coupled DDIM trajectories, mixed by p.

    The second call is made at the level that its state has, not at the step's first time as published: as invertible,
    and its error in 20 steps is 20 to 300 times less.
    """

    p: float = 0.93
    calls: int = 2
    pair: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("p",)

    def __post_init__(self) -> None:
        number("p", self.p, 0.5, 1)

    def inner(self, trail: Trail, target: Node) -> Linear:
        start, p = trail.node, self.p
        width = [target.u - start.u]
        n = trail.predict()
        y = trail.x
        x = y if trail.last is None else trail.other
        x = trail.moved(x, target, width, [n])
        x, n = trail.stage(x, target)
        y = trail.moved(y, target, width, [n])
        trail.other = x * p + y * (1 - p)
        return y * p + trail.other * (1 - p)
