"""The timesteps of a run, and which of them a pipeline means by what it passes to `step`."""

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfode.errors import UsageError
from pfode.process import float64

__all__ = ["Timesteps"]

_ROUNDING = 4e-6  # of the largest timestep: how far a copy that went through other arithmetic may lie from its original


class Timesteps:
    """The time that the network is given in every row of a plan, in its own units, float32.

    Args:
        values: these, on the host, where they are looked up; the attribute is the tensor that pipelines iterate over.
        node: whether a row begins a step.
        counts: whether the numbers count training steps, which others round to whole ones.
    """

    def __init__(self, values: Tensor, node: Tensor, counts: bool, device: torch.device | str | None):
        self.host = values.to(torch.float32)
        self.values = self.host.to(device)
        self.node, self.counts = node, counts

    def alias(self, timestep: Any) -> int | None:
        """The row of one of our own timesteps, known by its place in memory, so that nothing is read from the device.

        None for anything else: a copy, a number, or several timesteps.
        """
        if isinstance(timestep, Tensor) and timestep.dtype is torch.float32 and timestep.numel() == 1:
            away = timestep.data_ptr() - self.values.data_ptr()
            if 0 <= away < 4 * len(self.values) and timestep.device == self.values.device:
                return away // 4
        return None

    def find(self, timestep: Any, position: int) -> tuple[float, int | None]:
        """The value of a timestep, and the row that it belongs to.

        A copy may have any dtype: its original is the timestep that is equal to it after the same rounding, or, for a
        whole number, the one that lies within 1 of it. Where several rows have the same it is the one at
        `position`, where the run is, or else the one that begins a step.

        Args:
            timestep: a number, a list, an array or a tensor; if it holds several values, they must be the same.

        Returns:
            The row is None where no row has this timestep.

        Raises:
            UsageError: no number, several values that differ, or a rounding that fits several timesteps.
        """
        value, dtype = _value(timestep)
        own = self.host.double()
        alike = self.host.to(dtype).double() == value if dtype.is_floating_point else own == value
        if not alike.any():
            alike = (own - value).abs() <= _ROUNDING * own.abs().max()
        if not alike.any() and self.counts and value == round(value):
            alike = (own - value).abs() < 1
        rows = alike.nonzero().flatten().tolist()
        if not rows:
            return value, None
        if position in rows:
            return value, position
        rows = [row for row in rows if self.node[row]] or rows[:1]
        if len(rows) > 1:
            problem = f"timestep: {value:g} in {dtype} may be any of {[f'{own[row].item():g}' for row in rows[:4]]}"
            raise UsageError(problem, "pass the elements of scheduler.timesteps as they are")
        return value, rows[0]


def _value(timestep: Any) -> tuple[float, torch.dtype]:
    """The one number of a timestep, and the dtype in which it was rounded."""
    given = timestep.detach() if isinstance(timestep, Tensor) else None
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if isinstance(timestep, list | tuple):
            given = float64([float(value) for value in timestep])
        elif not isinstance(timestep, Tensor | str | bytes):
            given = torch.from_numpy(np.array(timestep))
    if given is None or given.dtype in (torch.bool, torch.complex64, torch.complex128) or given.numel() == 0:
        raise UsageError(f"timestep: need a number, got {timestep!r:.60}", "one of scheduler.timesteps")
    values = given.flatten().double()
    if not torch.isfinite(values).all():
        raise UsageError(f"timestep: need a finite number, got {values[0].item():g}", "one of scheduler.timesteps")
    if (values != values[0]).any():
        first, other = values[0].item(), values[values != values[0]][0].item()
        problem = f"timestep: samples at different timesteps ({first:g} and {other:g}) in one batch"
        raise UsageError(problem, "the same timestep for all samples, or one scheduler per sample")
    return values[0].item(), given.dtype
