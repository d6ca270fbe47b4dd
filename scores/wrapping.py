"""Denoisers that wrap another denoiser: what they pass on, and those whose output is clipped or thresholded."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from pfode.bounds import clipped, thresholded
from pfode.denoiser import Denoiser, at, fingerprint, tuned
from pfode.errors import UsageError, number
from pfode.labels import class_count
from pfode.process import float64

__all__ = ["Bounded", "Wrapper", "as_time", "clip", "need_method", "threshold"]


class Wrapper:
    """Base of a denoiser that wraps another and passes its optional attributes on.

    Args:
        denoiser: the wrapped one; attributes that it lacks take the defaults of `pfode.denoiser.Denoiser`.
    """

    def __init__(self, denoiser: Denoiser):
        self.denoiser: Any = denoiser
        self.process = denoiser.process
        self.labels: Sequence[str] | None = getattr(denoiser, "labels", None)
        self.classes: int | None = class_count(denoiser)
        self.unseen: frozenset[int] = frozenset(getattr(denoiser, "unseen", ()))  # classes, see `pfode.labels`
        self.shape: tuple[int, ...] | None = getattr(denoiser, "shape", None)
        self.data_std: float | None = getattr(denoiser, "data_std", None)
        self.bins: int | None = getattr(denoiser, "bins", None)
        self.moments: tuple[Tensor, Tensor] | None = getattr(denoiser, "moments", None)
        self.dtype: torch.dtype | None = getattr(denoiser, "dtype", None)
        self.device: torch.device | None = getattr(denoiser, "device", None)
        self.evals: int = getattr(denoiser, "evals", 1)
        self.time_dependent: bool = getattr(denoiser, "time_dependent", False)  # whether `at` gives another denoiser

    @property
    def fingerprint(self) -> str | None:
        """The digest of the wrapped denoiser's weights, None where it does not give one."""
        return fingerprint(self.denoiser)

    def rewrap(self, change: Callable[[Any], Any]) -> Self:
        """The same wrapper around `change(denoiser)`, for every denoiser that it wraps."""
        raise NotImplementedError

    def at(self, t: float | Tensor) -> Self:
        """The denoiser that stands in for this one at time t: equal preconditioning, and `evals` as they are there.

        Args:
            t: a time of the process, or a tensor (batch,) of times, for which one denoiser stands in at all of them.
        """
        return self.rewrap(lambda denoiser: at(denoiser, t))

    @property
    def conditioning(self) -> Mapping[str, int]:
        """The conditioning layers of the wrapped denoiser's network, with their widths.

        Raises:
            UsageError: the wrapped denoiser has no `conditioning`.
        """
        return need_method(self.denoiser, "conditioning", "only the networks of pfode.scores.Denoiser are tuned")

    def tuned(self, offsets: Mapping[str, Tensor]) -> Self:
        """The same with these offsets in the wrapped denoiser; see `pfode.denoiser.tuned`."""
        return self.rewrap(lambda denoiser: tuned(denoiser, offsets))

    def label_index(self, name: str | int) -> int:
        """The number of a class; see `pfode.scores.Denoiser.label_index`.

        Raises:
            UsageError: the wrapped denoiser has no such class, or no `label_index`.
        """
        return need_method(self.denoiser, "label_index", "give the number of the class")(name)

    def conditions(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """What calls for samples of these seeds are given besides the class: what the wrapped denoiser says."""
        found = getattr(self.denoiser, "conditions", None)
        return {} if found is None else found(seeds)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """A copy whose networks are on a device and in a dtype; a denoiser without a `to` method stays as it is."""
        return self.rewrap(lambda d: d.to(device, dtype) if hasattr(d, "to") else d)

    def compiled(self) -> Self:
        """The same with every network through torch.compile.

        Raises:
            UsageError: a wrapped denoiser has no `compiled` method.
        """
        return self.rewrap(lambda d: need_method(d, "compiled", "wrap its network in torch.compile yourself")())


class Bounded(Wrapper):
    """A denoiser whose output goes through a function that keeps it within bounds: see `clip` and `threshold`.

    Args:
        denoiser: the wrapped one.
        bound: from x0 of shape (batch, ...) to the bounded x0 of the same shape.
    """

    def __init__(self, denoiser: Denoiser, bound: Callable[[Tensor], Tensor]):
        super().__init__(denoiser)
        self.bound = bound

    def rewrap(self, change: Callable[[Any], Any]) -> "Bounded":
        """See `Wrapper.rewrap`."""
        return Bounded(change(self.denoiser), self.bound)

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """bound(D(x, t)), in the dtype of x."""
        return self.bound(self.denoiser(x, t, **cond).to(x.dtype))

    def guided(self, scale: float) -> Denoiser:
        """The wrapped denoiser guided by a scale, within the same bounds.

        Raises:
            UsageError: the wrapped denoiser cannot be guided.
        """
        if scale == 1 and not hasattr(self.denoiser, "guided"):
            return self
        return Bounded(need_method(self.denoiser, "guided", "wrap it yourself: pfode.scores.guide")(scale), self.bound)


def threshold(denoiser: Denoiser, quantile: float = 0.995, limit: float = 1.0) -> Denoiser:
    """A denoiser with dynamic thresholding of its output; see `pfode.bounds.thresholded` (Saharia et al. 2022).

    Args:
        denoiser: the wrapped one.
        quantile: of |D| within each sample, from 0 to 1, to which the output is clamped before it is scaled.
        limit: the data lie within [-limit, limit].

    Raises:
        UsageError: a quantile outside [0, 1], or a limit that is not positive.
    """
    quantile, limit = number("quantile", quantile, 0, 1), number("limit", limit)
    if not limit > 0:
        raise UsageError(f"limit: need a number above 0, got {limit:g}", "limit=1.0")
    return Bounded(denoiser, functools.partial(thresholded, quantile=quantile, limit=limit))


def clip(denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """A denoiser whose output is clipped to [low, high].

    Raises:
        UsageError: not finite, or low is not below high.
    """
    low, high = number("low", low), number("high", high)
    if not low < high:
        raise UsageError(f"clip: need low < high, got {low:g} and {high:g}", "clip(denoiser, -1.0, 1.0)")
    return Bounded(denoiser, functools.partial(clipped, low=low, high=high))


def as_time(t: Tensor | float) -> float | Tensor:
    """A time as `at` takes it: a number where it is one time on the CPU, else a float64 tensor.

    A tensor on another device is not read back, as that would wait for the device.
    """
    if torch.compiler.is_compiling() or (isinstance(t, Tensor) and (t.ndim or t.device.type != "cpu")):
        return float64(t)
    return float(t.detach() if isinstance(t, Tensor) else t)


def need_method(denoiser: Any, name: str, hint: str) -> Callable[..., Any]:
    """An optional method of a denoiser.

    Raises:
        UsageError: the denoiser does not have it.
    """
    found = getattr(denoiser, name, None)
    if found is None:
        raise UsageError(f"{type(denoiser).__name__} has no .{name}(...)", hint)
    return found
