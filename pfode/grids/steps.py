"""Rules on the indices of training steps: diffusers' timestep_spacing."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pfode.errors import UsageError, integer
from pfode.grids.ends import clock
from pfode.grids.rule import Grid, named, spelt
from pfode.process import Process, VPDiscrete, float64

__all__ = ["leading", "linspace", "trailing"]

_INDICES = 1000  # training steps that a continuous process is given where a rule works on their indices


@named("trailing")
def trailing() -> Grid:
    """Indices of the training steps, evenly spaced and rounded, from the last one down (Lin et al. 2024, table 2).

    As `timestep_spacing` of diffusers. This rule, `leading` and `linspace` take the time of a `VPDiscrete` as the index
    and give any other process 1000 of them, even in its time before the shift, the last at t_max.

    Raises:
        UsageError: when placed, more steps than indices.
    """

    def lay(first: int, last: int, n: int) -> np.ndarray:
        return np.rint(np.arange(first + 1, last + 1, -(first - last) / n))[:n] - 1  # arange may add one by rounding

    return _index_grid("trailing", lay)


@named("leading")
def leading(offset: int = 0, drop: int = 0) -> Grid:
    """Multiples of a whole number of indices, plus an offset (Lin et al. 2024, table 2); see `trailing`.

    The first node lies below t_max, which costs quality. drop = 0 spaces as DDIM, DDPM and Euler of diffusers do,
    drop = 1, one place more of which the lowest is left out, as DPM-Solver, UniPC and DEIS do.
    """
    offset, drop = integer("leading: offset", offset, 0, 1000), integer("leading: drop", drop, 0, 1)

    def lay(first: int, last: int, n: int) -> np.ndarray:
        stride = (first - last) // (n + drop)
        return last + 1 + offset + stride * (np.arange(n)[::-1] + float(drop))

    return _index_grid(spelt("leading", [offset, drop], [0, 0]), lay, late=True, drop=drop)


@named("linspace")
def linspace(drop: int = 0) -> Grid:
    """Indices evenly spaced from the last to the first one, rounded (Lin et al. 2024, table 2).

    See `trailing`; drop as in `leading`.
    """
    drop = integer("linspace: drop", drop, 0, 1)

    def lay(first: int, last: int, n: int) -> np.ndarray:
        return np.rint(np.linspace(last + 1, first, n + drop))[::-1][:n]

    return _index_grid(spelt("linspace", [drop], [0]), lay)


def _index_grid(name: str, lay: Callable[[int, int, int], np.ndarray], late: bool = False, drop: int = 0) -> Grid:
    """A rule on the indices of training steps.

    `lay(first, last, n)` gives n of them, the highest at most `first`, all above `last` (-1 is clean data).
    """

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        to_index, to_time = _indices(process)
        first = math.floor(to_index(high) + 1e-6)
        last = max(math.ceil(to_index(low) - 1e-6), round(to_index(process.t_min)) - 1)
        if n + drop > first - last:
            problem = f"grid {name}: {n} steps do not fit on the {first - last} indices from {first} to {last + 1}"
            raise UsageError(problem, 'fewer steps, or grid="time"')
        inner = to_time(torch.from_numpy(lay(first, last, n).copy()))
        return torch.cat([inner.clamp_min(process.t_min), float64([low])])

    return Grid(name, place, to_data=True, late=late)


def _indices(process: Process) -> tuple[Callable[[float], float], Callable[[Tensor], Tensor]]:
    """Time -> index of the training step, and back: clean data is -1."""
    if isinstance(process, VPDiscrete):
        return lambda t: t, lambda index: index
    ends = process.t_data if math.isfinite(process.t_data) else process.t_min
    top, bottom = clock(process, process.t_max, ends).tolist()
    count, zero = (_INDICES, -1) if math.isfinite(process.t_data) else (_INDICES - 1, 0)

    def to_index(t: float) -> float:
        clock = process.uniform_clock(float64(t)).item()
        return max((clock - bottom) / (top - bottom) * count + zero, -1.0)

    return to_index, lambda index: process.from_uniform_clock(bottom + (index - zero) / count * (top - bottom))
