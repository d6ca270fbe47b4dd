"""Denoisers around another denoiser, which they show as their own; thresholding and clipping of D."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from pfode.bounds import clipped, thresholded
from pfode.denoiser import Denoiser, at, fingerprint
from pfode.errors import UsageError, number
from pfode.labels import class_count


class Wrapper:
    """What a denoiser around another shows as its own."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser: Any = denoiser
        self.process = denoiser.process
        self.labels: Sequence[str] | None = getattr(denoiser, "labels", None)
        self.classes: int | None = class_count(denoiser)
        self.unseen: frozenset[int] = frozenset(getattr(denoiser, "unseen", ()))  # classes, see `pfode.labels`
        self.shape: tuple[int, ...] | None = getattr(denoiser, "shape", None)
        self.data_std: float | None = getattr(denoiser, "data_std", None)
        self.dtype: torch.dtype | None = getattr(denoiser, "dtype", None)
        self.device: torch.device | None = getattr(denoiser, "device", None)
        self.evals: int = getattr(denoiser, "evals", 1)
        self.timed: bool = getattr(denoiser, "timed", False)  # whether it differs from time to time, see `at`

    @property
    def fingerprint(self) -> str | None:
        """That of the denoiser underneath."""
        return fingerprint(self.denoiser)

    def around(self, change: Callable[[Any], Any]) -> Self:
        """The same around a changed denoiser."""
        raise NotImplementedError

    def at(self, t: float | Tensor) -> Self:
        """What stands in for this denoiser at time t, under the same preconditioning; `evals` are those there.

        A tensor of times gives what serves them all.
        """
        return self.around(lambda denoiser: at(denoiser, t))

    def label_index(self, name: str | int) -> int:
        """See `Denoiser.label_index`."""
        return method(self.denoiser, "label_index", "give the number of the class")(name)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """See `Denoiser.to`; a denoiser without parameters stays as it is."""
        return self.around(lambda d: d.to(device, dtype) if hasattr(d, "to") else d)

    def compiled(self) -> Self:
        """See `Denoiser.compiled`."""
        return self.around(lambda d: method(d, "compiled", "wrap its network in torch.compile yourself")())


class Bounded(Wrapper):
    """A denoiser whose output is kept in bounds, before any solver sees it."""

    def __init__(self, denoiser: Denoiser, bound: Callable[[Tensor], Tensor]):
        super().__init__(denoiser)
        self.bound = bound

    def around(self, change: Callable[[Any], Any]) -> "Bounded":
        return Bounded(change(self.denoiser), self.bound)

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """D within its bounds."""
        return self.bound(self.denoiser(x, t, **cond).to(x.dtype))

    def guided(self, scale: float) -> Denoiser:
        """The denoiser underneath guided by a scale, in the same bounds."""
        if scale == 1 and not hasattr(self.denoiser, "guided"):
            return self
        return Bounded(method(self.denoiser, "guided", "wrap it yourself: pfode.scores.guide")(scale), self.bound)


def threshold(denoiser: Denoiser, quantile: float = 0.995, limit: float = 1.0) -> Denoiser:
    """Dynamic thresholding of D for data in [-limit, limit] (Saharia et al. 2022): see `thresholded`.

    Raises:
        UsageError: a quantile outside [0, 1], or a limit that is not positive.
    """
    quantile, limit = number("quantile", quantile, 0, 1), number("limit", limit)
    if not limit > 0:
        raise UsageError(f"limit: need a number above 0, got {limit:g}", "limit=1.0")
    return Bounded(denoiser, functools.partial(thresholded, quantile=quantile, limit=limit))


def clip(denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """D clipped to [low, high].

    Raises:
        UsageError: numbers that are no bounds.
    """
    low, high = number("low", low), number("high", high)
    if not low < high:
        raise UsageError(f"clip: need low < high, got {low:g} and {high:g}", "clip(denoiser, -1.0, 1.0)")
    return Bounded(denoiser, functools.partial(clipped, low=low, high=high))


def known(t: Tensor | float) -> float | Tensor:
    """A single time on the host as a number; other times as a tensor, of which nothing is read back."""
    if torch.compiler.is_compiling() or (isinstance(t, Tensor) and (t.ndim or t.device.type != "cpu")):
        return torch.as_tensor(t, dtype=torch.float64)
    return float(t.detach() if isinstance(t, Tensor) else t)


def method(denoiser: Any, name: str, hint: str) -> Callable[..., Any]:
    """A method the denoiser may have.

    Raises:
        UsageError: it has not.
    """
    found = getattr(denoiser, name, None)
    if found is None:
        raise UsageError(f"{type(denoiser).__name__} has no .{name}(...)", hint)
    return found
