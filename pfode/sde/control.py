"""Step sizes of stochastic equations: powers of two of one unit, so that all points that were tried are kept."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfode.ode.control import PID

__all__ = ["Dyadic"]

_FINEST = 2**22  # points that are told apart
_NEAR = 1e-3


@dataclass(frozen=True)
class Dyadic(PID):
    """A controller whose steps go from one multiple of unit / 2^k to the next, k as the error wants it.

    A step that is rejected is halved, and steps grow only where they still end at every point that a rejected one had
    tried. What is known of the path is so never left out, without which adaptive steps may converge to a wrong limit
    where the noise does not commute (Foster & Jelincic 2023, theorem 1.8). The points are nodes of a Brownian tree.

    Args:
        unit, origin: as `Brownian` has them; None: as the solve's driver has them.
        towards: 1 where steps lead away from the origin, else -1; chosen by the solve.
        the others: as for PID.
    """

    unit: float | None = None
    origin: float | None = None
    towards: int = 1

    @property
    def stretch(self) -> float:
        return 1 + 1e-6

    def fit(self, batching: Any, t: Any, h: Any) -> Any:
        """To the next multiple of a cell, the largest unit / 2^k that is at most h and of which t is a multiple; of one
        at most h where t, a stop, is a multiple of none. Downwards in time from the end of the last cell."""
        unit, origin = self.unit or 1.0, self.origin or 0.0
        if not isinstance(t, Tensor):
            share = abs(t - origin) / unit
            cell = 2.0 ** (math.frexp(min(h, unit) / unit)[1] - 1)
            node = round(share * _FINEST)
            if node and abs(share * _FINEST - node) < _NEAR:
                cell = min(cell, (node & -node) / _FINEST)
            return (self._next(math.floor, share / cell) * cell - share) * self.towards * unit
        share = (t - origin).abs() / unit
        cell = torch.ldexp(torch.ones_like(share), torch.frexp(h.clamp(max=unit) / unit).exponent - 1)
        nodes = torch.round(share * _FINEST).long()
        known = (nodes != 0) & ((share * _FINEST - nodes).abs() < _NEAR)
        cell = torch.where(known, torch.minimum(cell, (nodes & -nodes).to(cell.dtype) / _FINEST), cell)
        return (self._next(torch.floor, share / cell) * cell - share) * self.towards * unit

    def _next(self, floor: Any, cells: Any) -> Any:
        """The number of cells up to the next end of one."""
        return floor(cells + 1e-6) + 1 if self.towards > 0 else -floor(-cells + 1e-6) - 1
