"""How guidance combines two outputs of a network: functions of tensors, each sample by itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pfode.bounds import flat, per_sample
from pfode.errors import UsageError, number
from pfode.process import Process, float64

Schedule = Callable[[Tensor], Any]  # times, float64, 0-d or (batch,) -> scales of their shape
ROUNDING = 1e-6  # of a noise level that is compared with the ends of an interval

__all__ = ["Rule", "Schedule", "column", "projected", "rescaled"]


@dataclass(frozen=True, eq=False)
class Rule:
    """out_0 + scale (out - out_0) and its refinements, where guidance leads away from out_0 and towards out.

    Args:
        scale: a number, a tensor of shape (batch,), or a schedule.
        interval: the scale is 1 unless low < sigma/alpha <= high (Kynkaanniemi et al. 2024, eq. 6).
        rescale: see `rescaled`. eta, norm: see `projected`.

    Raises:
        UsageError: values out of range.
    """

    scale: float | Tensor | Schedule
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    eta: float = 1.0
    norm: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.scale, Tensor) and not callable(self.scale):
            _set(self, scale=_finite(self.scale))
        _set(self, rescale=number("rescale", self.rescale, 0, 1), eta=number("eta", self.eta))
        if self.norm is not None:
            _set(self, norm=number("norm", self.norm, 0))
            if self.norm == 0:
                raise UsageError("norm: need a number above 0, got 0", "leave it out, or try 2.5 to 15")
        if self.interval is not None:
            _set(self, interval=_interval(self.interval))

    @property
    def varies(self) -> bool:
        """Whether the scale depends on the time."""
        return callable(self.scale) or self.interval is not None

    @property
    def projects(self) -> bool:
        """Whether the denoiser itself is needed, not only what its network returns."""
        return self.eta != 1 or self.norm is not None

    @property
    def needs(self) -> tuple[bool, bool]:
        """Whether out_0 and out are needed."""
        if self.varies or isinstance(self.scale, Tensor):
            return True, True
        return self.scale != 1, self.scale != 0 or self.projects or self.rescale > 0

    def at(self, t: float | Tensor, process: Process) -> "Rule":
        """The rule at a time, or at the times of a batch, where its scale is a number or a tensor.

        Raises:
            UsageError: a schedule's scale that is not finite, or of another shape.
        """
        if not self.varies:
            return self
        times = float64(t)
        scale = torch.as_tensor(
            self.scale(times) if callable(self.scale) else self.scale, dtype=times.dtype, device=times.device
        )
        if scale.shape not in ((), times.shape):
            raise UsageError(f"scale: got shape {tuple(scale.shape)} for times of shape {tuple(times.shape)}")
        if self.interval is not None:
            low, high = ((1 + ROUNDING) * end for end in self.interval)
            level = torch.exp(-0.5 * process.log_snr(times))
            scale = torch.where((level > low) & (level <= high), scale, 1.0)
        return replace(self, scale=scale if isinstance(t, Tensor) else scale.item(), interval=None)

    def mix(self, away: Tensor, towards: Tensor, x0: Tensor | None = None, unit: float | Tensor = 1.0) -> Tensor:
        """The guided output, (batch, ...).

        Args:
            away, towards: out_0 and out, (batch, ...).
            x0: the denoiser's output where the network's is `towards`; used if the rule projects.
            unit: |d x0 / d towards|, a number or of a shape that broadcasts.
        """
        assert not callable(self.scale)
        scale = column(self.scale, away)
        if x0 is None:
            out = torch.lerp(away, towards, scale)
        else:
            norm = None if self.norm is None else self.norm / unit
            out = towards + (scale - 1) * projected(towards - away, x0, self.eta, norm)
        return rescaled(out, towards, self.rescale) if self.rescale else out


def projected(update: Tensor, x0: Tensor, eta: float, norm: float | Tensor | None = None) -> Tensor:
    """Adaptive projected guidance (Sadat et al. 2025, algorithm 1): the update shortened to `norm`, its part along x0
    multiplied by eta.

    The momentum of the algorithm is left out: it would make the denoiser depend on the calls before, so that it is no
    function of (x, t), and neither encoding nor a probability exists.

    Args:
        update: out - out_0, (batch, ...). x0: the denoiser's output, of that shape.
        eta: 1 keeps the parallel part. norm: the largest length, a number or broadcastable; None for no limit.
    """
    if norm is not None:
        update = update * (norm / per_sample(torch.linalg.vector_norm(flat(update), dim=1), x0)).clamp_max(1)
    if eta == 1:
        return update
    square = flat(x0).square().sum(1).clamp_min(torch.finfo(x0.dtype).tiny)
    along = (flat(update) * flat(x0)).sum(1) / square
    return update - (1 - eta) * per_sample(along, x0) * x0


def rescaled(guided: Tensor, given: Tensor, phi: float) -> Tensor:
    """The guided output, its standard deviation brought phi of the way to that of `given` (Lin et al. 2024, eq. 14-16).

    Args:
        guided, given: the guided and the unguided output, (batch, ...); deviations are those within a sample.
        phi: from 0 to 1.
    """
    now, wanted = (flat(out).std(1, correction=0) for out in (guided, given))
    ratio = torch.where(now > 0, wanted / now, 1.0)
    return guided * per_sample(1 - phi + phi * ratio, guided)


def column(value: Any, x: Tensor) -> Any:
    """A tensor of shape (batch,) cast to x and shaped to broadcast against it; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return per_sample(value.to(x), x) if value.ndim else value.to(x)


def _finite(scale: Any) -> float:
    """The scale as a number.

    Raises:
        UsageError: it is none, or not finite.
    """
    try:
        value = math.nan if isinstance(scale, str | bool) else float(scale)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(
            f"guidance scale must be a finite number, or a function of the time, got {scale!r:.60}",
            "1 means no guidance; try 1.5 to 4",
        )
    return value


def _interval(given: Any) -> tuple[float, float]:
    """An interval of sigma/alpha as (low, high).

    Raises:
        UsageError: other than two numbers with 0 <= low < high.
    """
    try:
        low, high = map(float, given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"interval: need two numbers, got {given!r:.60}", "interval=(0.28, 2.9)") from error
    if not 0 <= low < high:
        raise UsageError(
            f"interval: need 0 <= low < high, of sigma/alpha, got ({low:g}, {high:g})", "interval=(0.28, 2.9)"
        )
    return low, high


def _set(rule: Rule, **values: Any) -> None:
    """Set fields of the frozen rule, while it is made."""
    for key, value in values.items():
        object.__setattr__(rule, key, value)
