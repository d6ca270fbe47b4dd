"""Series of different lengths, each with its own times and missing values, as padded tensors."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pfode.errors import UsageError, number

__all__ = ["Scale", "Series", "generator"]


def generator(*words: Any) -> torch.Generator:
    """Random numbers that depend on some words and on nothing else."""
    key = hashlib.sha256(repr(words).encode()).digest()[:8]
    return torch.Generator("cpu").manual_seed(int.from_bytes(key, "big") >> 1)


@dataclass(frozen=True, eq=False)
class Series:
    """Several series. What is padding has times of NaN.

    Attributes:
        t: times, shape (series, length), rising, NaN after the last one.
        x: values, shape (series, length, channels), NaN where nothing was observed.
        label: of each series, shape (series,): int64 of a class, or real numbers; None: there are none.
        ids, channels, classes: their names.
    """

    t: Tensor
    x: Tensor
    label: Tensor | None = None
    ids: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        t, x = self.t, self.x
        if (
            t.ndim != 2
            or x.ndim != 3
            or x.shape[:2] != t.shape
            or not (x.is_floating_point() and t.is_floating_point())
        ):
            raise UsageError(
                "Series: need real t of shape (series, length) and x of shape (series, length, channels), got "
                f"{tuple(t.shape)} and {tuple(x.shape)}",
                "read(table), or pad series with NaN",
            )
        if self.label is not None and self.label.shape != t.shape[:1]:
            raise UsageError(f"Series: {len(t)} series and labels of shape {tuple(self.label.shape)}")
        named = ("ids", self.ids, len(t)), ("channels", self.channels, x.shape[-1])
        for name, values, count in named:
            if not values:
                object.__setattr__(self, name, tuple(str(i) for i in range(count)))
            elif len(values) != count:
                raise UsageError(f"Series: {count} {name}, and {len(values)} names for them")

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, at: Any) -> "Series":
        """Some of the series, by a slice, a list of places or a tensor; no longer than the longest of them."""
        places = torch.arange(len(self), device="cpu")[at].reshape(-1)
        ids, label = tuple(self.ids[i] for i in places.tolist()), self.label
        label = None if label is None else label[places.to(label.device)]
        here = places.to(self.t.device)
        return replace(self, t=self.t[here], x=self.x[here], label=label, ids=ids).trimmed()

    def trimmed(self) -> "Series":
        """The same without what is padding in all series."""
        length = max(1, int((~torch.isnan(self.t)).sum(1).max())) if len(self) else 1
        return replace(self, t=self.t[:, :length], x=self.x[:, :length])

    def to(self, *args: Any, **kwargs: Any) -> "Series":
        """The same on another device or in another dtype; labels of classes keep theirs."""
        label = self.label
        if label is not None:
            moved = label.to(*args, **kwargs)
            label = moved if label.is_floating_point() else moved.to(label.dtype)
        return replace(self, t=self.t.to(*args, **kwargs), x=self.x.to(*args, **kwargs), label=label)

    @property
    def observed(self) -> Tensor:
        """Where there is a value, a boolean tensor like x."""
        return ~torch.isnan(self.x)

    @property
    def lengths(self) -> Tensor:
        """How many times each series has, shape (series,)."""
        return (~torch.isnan(self.t)).sum(1)

    def split(self, shares: Sequence[float], seed: int = 0) -> list["Series"]:
        """Parts of about these shares of the series. Which part a series is in depends on its id and the seed only: new
        series do not move old ones.

        Raises:
            UsageError: shares that are no numbers from 0 to 1, or do not make 1.
        """
        edges, total = [], 0.0
        for share in shares:
            total += number("shares", share, 0.0, 1.0)
            edges.append(total)
        if abs(total - 1) > 1e-6:
            raise UsageError(f"shares: need numbers that make 1, got {list(shares)}", "[0.7, 0.15, 0.15]")
        drawn = [float(torch.rand((), generator=generator("split", seed, name), device="cpu")) for name in self.ids]
        parts: list[list[int]] = [[] for _ in shares]
        for i, value in enumerate(drawn):
            parts[min(sum(value >= edge for edge in edges[:-1]), len(edges) - 1)].append(i)
        return [self[part] for part in parts]

    def dropped(self, share: float, seed: int = 0) -> "Series":
        """The series without a share of their times, at random: of each at least two are kept, and its first one.

        Raises:
            UsageError: a share that is no number from 0 to 1.
        """
        share, t, x = number("share", share, 0.0, 1.0), self.t, self.x
        times, values = torch.full_like(t, math.nan), torch.full_like(x, math.nan)
        for i, (name, length) in enumerate(zip(self.ids, self.lengths.tolist(), strict=True)):
            order = torch.randperm(max(length - 1, 0), generator=generator("drop", seed, name), device="cpu") + 1
            kept = max(min(length, 2), round(length * (1 - share))) - 1
            at = torch.cat([order.new_zeros(1), order[:kept].sort().values]).to(t.device)
            times[i, : len(at)], values[i, : len(at)] = t[i, at], x[i, at]
        return replace(self, t=times, x=values).trimmed()

    def until(self, t: float) -> "Series":
        """What was observed up to a time."""
        past = self.t <= t
        return replace(
            self, t=torch.where(past, self.t, math.nan), x=torch.where(past[..., None], self.x, math.nan)
        ).trimmed()


@dataclass(frozen=True, eq=False)
class Scale:
    """Units of series, from the part that a model is trained on.

    Attributes:
        mean, std: of each channel, shape (channels,).
        origin, unit: time is measured from the origin in this unit.
    """

    mean: Tensor
    std: Tensor
    origin: float = 0.0
    unit: float = 1.0

    @classmethod
    def of(cls, series: Series) -> "Scale":
        """Mean 0 and standard deviation 1 of each channel over what was observed; times from 0 to 1.

        Raises:
            UsageError: no series.
        """
        if not len(series):
            raise UsageError("Scale.of: no series to measure", "the training part")
        seen = series.observed
        count = seen.sum((0, 1)).clamp(min=1)
        values = torch.where(seen, series.x, 0.0)
        mean = values.sum((0, 1)) / count
        spread = (torch.where(seen, series.x - mean, 0.0).square().sum((0, 1)) / count).sqrt()
        times = series.t[~torch.isnan(series.t)]
        first, last = float(times.min()), float(times.max())
        return cls(mean, torch.where(spread > 0, spread, 1.0), first, last - first if last > first else 1.0)

    def apply(self, series: Series) -> Series:
        """Series in these units."""
        mean, std = self.mean.to(series.x), self.std.to(series.x)
        return replace(series, x=(series.x - mean) / std, t=(series.t - self.origin) / self.unit)

    def values(self, x: Tensor) -> Tensor:
        """Values, shape (..., channels), in their own units again."""
        return x * self.std.to(x) + self.mean.to(x)

    def spreads(self, std: Tensor) -> Tensor:
        """Standard deviations in their own units again."""
        return std * self.std.to(std)

    def times(self, t: Tensor) -> Tensor:
        """Times in their own unit again."""
        return t * self.unit + self.origin


def padded(rows: Iterable[tuple[Tensor, Tensor]], channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """t and x of series given one by one: (length,) and (length, channels)."""
    listed = list(rows)
    most = max((len(t) for t, _ in listed), default=1)
    t = torch.full((len(listed), most), math.nan, dtype=dtype, device="cpu")
    x = torch.full((len(listed), most, channels), math.nan, dtype=dtype, device="cpu")
    for i, (times, values) in enumerate(listed):
        t[i, : len(times)], x[i, : len(times)] = times, values
    return t, x
