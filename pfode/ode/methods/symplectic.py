"""Symplectic methods for pairs (q, p): q attempts at a speed that depends on p, and p at one that depends on q.

The state is a tuple, list, dict or dataclass of two trees, and the field returns both derivatives. Kicks move p, drifts
move q, each as if the other stood still; a kick is at the time that the drifts before it have come to, a drift at the
kicks' time, so fields that depend on t keep the order. Fields that are not separable lose it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pfode.errors import UsageError
from pfode.ode.solver import Step, Time, column, hermite
from pfode.ode.state import Field

__all__ = ["SYMPLECTIC", "Symplectic"]


@dataclass(frozen=True, eq=False)
class Symplectic:
    """Kicks and drifts in turn, a kick first; for fixed steps.

    Args:
        name, order: of the method.
        kicks, drifts: shares of the step. A kick more than drifts makes the method symmetric in time if the shares are;
            then the last kick's derivative serves the next step.
    """

    name: str
    order: int
    kicks: tuple[float, ...]
    drifts: tuple[float, ...]
    error_order = 0

    def init(self, field: Field, t: Time, y: Tensor, slope: Tensor | None = None) -> Tensor | None:
        if len(self.kicks) == len(self.drifts):
            return None
        _sizes(field)
        slope = field(field.time(t), y) if slope is None else slope
        return slope.split(_sizes(field), -1)[1].clone()

    def step(self, field: Field, t0: Time, t1: Time, y0: Tensor, carry: Tensor | None) -> Step:
        sizes, h = _sizes(field), t1 - t0
        q, p = y0.split(sizes, -1)
        force, width = carry, column(h, y0)
        kicked = drifted = 0.0
        for i, kick in enumerate(self.kicks):
            if force is None:
                now = torch.cat([q, p], -1)
                force = field(_at(field, t0, t1, drifted), now).split(sizes, -1)[1]
            p = p + (kick * width) * force
            kicked += kick
            if i < len(self.drifts):
                speed = field(_at(field, t0, t1, kicked), torch.cat([q, p], -1)).split(sizes, -1)[0]
                q = q + (self.drifts[i] * width) * speed
                drifted += self.drifts[i]
                force = None
        y1 = torch.cat([q, p], -1)
        following = force.clone() if carry is not None and force is not None else None

        def dense(theta: Tensor) -> Tensor:
            f0 = field(field.time(t0), y0).clone()
            return hermite(h, y0, f0, y1, field(field.time(t1), y1))(theta)

        return Step(y1, None, dense, following)

    def back(self, field: Field, t0: Time, t1: Time, y1: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The state and carry that the step from t0 to t1 came from.

        Raises:
            UsageError: a method that is not symmetric in time.
        """
        if self.kicks != self.kicks[::-1] or self.drifts != self.drifts[::-1] or len(self.kicks) == len(self.drifts):
            raise UsageError(f"{self.name} cannot be run backwards exactly", 'method="leapfrog"')
        step = self.step(field, t1, t0, y1, carry)
        return step.y1, step.carry


def _at(field: Field, t0: Time, t1: Time, share: float) -> Tensor:
    """The time after a share of the step; sums of shares are 1 only up to rounding."""
    share = round(share, 14)
    return field.time(t0 if share == 0 else t1 if share == 1 else t0 + share * (t1 - t0))


def _sizes(field: Field) -> list[int]:
    """How many numbers of the flat state are q, and how many p."""
    sizes = field.layout.pair()
    if sizes is None:
        found = type(field.layout.example).__name__
        raise UsageError(f"y0: a symplectic method needs a pair (q, p), got a {found}", "y0=(q, p)")
    return sizes


_OUT = 1 / (2 - 2 ** (1 / 3))  # Yoshida 1990: a step of this size, one back, and one of this size
_BACK = 1 - 2 * _OUT
SYMPLECTIC = (
    Symplectic("semi-implicit-euler", 1, (1.0,), (1.0,)),
    Symplectic("leapfrog", 2, (0.5, 0.5), (1.0,)),
    # it looks 0.35 of a step beyond either end
    Symplectic("yoshida4", 4, (_OUT / 2, (_OUT + _BACK) / 2, (_OUT + _BACK) / 2, _OUT / 2), (_OUT, _BACK, _OUT)),
)
