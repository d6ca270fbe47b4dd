"""What a plan is fitted on: noise, and the end points of a fine solution from it, the teacher's."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pfode import noise
from pfode.denoiser import Denoiser, at, conditions
from pfode.errors import NumericalError, UsageError, number
from pfode.labels import class_indices
from pfode.plans.executor import run
from pfode.process import float64
from pfode.samplers.catalogue import make_plan
from pfode.samplers.fit.cache import Cache
from pfode.samplers.fit.team import Team
from pfode.samplers.settle import find_device, prepared, sample_shape, state_dtype

__all__ = ["CHECK", "FIT", "GROUP", "STREAM", "Group", "Source", "joined"]

GROUP = 8  # samples that share a guidance scale
FIT, CHECK = 2**60, 2**61  # first seeds of the noise fitted on and of the noise that chooses; users' seeds are small
STREAM = 3 * 2**60  # first seed of the noise that is used a few times and dropped


@dataclass(frozen=True, eq=False)
class Group:
    """Samples under one guidance scale: x_T, the converged end points, both (batch, ...), and what calls are given."""

    denoiser: Denoiser
    x: Tensor
    target: Tensor
    cond: Mapping[str, Any]  # tensors, each (batch, ...): a class, a style

    def __len__(self) -> int:
        return len(self.x)

    def part(self, size: int) -> Iterator["Group"]:
        """The same in parts of at most `size` samples."""
        for i in range(0, len(self), size):
            few = slice(i, i + size)
            cond = {key: value[few] for key, value in self.cond.items()}
            yield Group(self.denoiser, self.x[few], self.target[few], cond)

    def call(self, x: Tensor, t: float) -> Tensor:
        """D, for the group's samples or several times as many: all of them, then all of them again.

        The denoiser gets a copy of x, and a copy of what it returns is given back: it may work in place, or return one
        buffer again and again.
        """
        times = len(x) // len(self)
        cond = {key: value.repeat(times, *(1 for _ in value.shape[1:])) for key, value in self.cond.items()}
        x0 = at(self.denoiser, t)(x.clone(), float64(t), **cond)
        return x0.to(x.dtype, copy=True)


class Source:
    """Draws samples and integrates them finely.

    Args:
        denoiser: what a plan is fitted to.
        settings: label, guidance, seed, teacher (steps), n and check (samples) of `fit_plan`.
        shape, dtype, device: as for `sample`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        settings: dict[str, Any],
        shape: Sequence[int] | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ):
        self.denoiser, self.settings = prepared(denoiser, None, device), settings
        self.shape, self.dtype = sample_shape(denoiser, None, shape), state_dtype(dtype, None)
        self.device = find_device(device or getattr(self.denoiser, "device", None) or "cpu")
        self.scales = _ends(settings["guidance"])
        label, names = settings["label"], getattr(denoiser, "labels", None)
        self.labels = (list(range(len(names))) if names else None) if label == "all" else label

    @property
    def guided(self) -> bool:
        """Whether the denoiser is guided, by itself or by the settings."""
        return self.scales is not None or getattr(self.denoiser, "evals", 1) > 1

    def groups(self, first: int, n: int, cache: Cache, progress: Callable[[int, int], None]) -> list[Group]:
        """n samples with their end points: noise from `first` on, the classes in turn, scales spread over the range.

        Args:
            cache: keeps the end points.
            progress: called with the samples integrated, and all.

        Raises:
            NumericalError: end points that are not finite. FileError: a damaged cache.
        """
        made = self._drawn(first, n)
        ends = self._teach(made, first, cache, progress)
        return [replace(group, target=end) for group, end in zip(made, ends, strict=True)]

    def piece(self, first: int, n: int, index: int, team: Team) -> list[Group]:
        """The index-th n samples of a stream of noise with their end points, which the processes share.

        Raises:
            NumericalError: end points that are not finite.
        """
        made = self._drawn(first + index * n, n)
        mine = list(team.own(made))
        whole = torch.cat([end.cpu() for end in self._ends(joined(mine))]) if mine else torch.zeros(0, device="cpu")
        ends = team.whole(whole.split([len(group) for group in mine]))
        _need_finite(ends)
        return [replace(group, target=end.to(group.x)) for group, end in zip(made, ends, strict=True)]

    def _drawn(self, first: int, n: int) -> list[Group]:
        """n samples with noise from `first` on, whose targets are still to be found."""
        count = math.ceil(n / GROUP)
        seeds = [first + (self.settings["seed"] << 32) + i for i in range(n)]
        labels = self._labels(n)
        made = []
        for i in range(count):
            few = slice(i * GROUP, (i + 1) * GROUP)
            denoiser = self.denoiser
            if self.scales is not None:
                low, high = self.scales
                denoiser = prepared(denoiser, low + (high - low) * (i + 0.5) / count)
            x = noise.normal(seeds[few], noise.INITIAL, self.shape, self.dtype, self.device)
            x = float(denoiser.process.sigma(denoiser.process.t_max)) * x
            cond = {} if labels is None else {"label": labels[few]}
            made.append(Group(denoiser, x, x, cond | conditions(denoiser, seeds[few], self.device)))
        return made

    def _ends(self, groups: Iterable[Group]) -> Iterator[Tensor]:
        """The end points of a fine solution, group by group."""
        plan = make_plan("exp-ab3", self.denoiser.process, self.settings["teacher"], grid="karras")
        for group in groups:
            yield run(plan, group.denoiser, group.x, **group.cond)

    def _labels(self, n: int) -> Tensor | None:
        """The classes of n samples, in turn, shape (n,); None where there are none."""
        if self.labels is None:
            return None
        some = self.labels if isinstance(self.labels, list | tuple) else [self.labels]
        each = [one for _, one in zip(range(n), itertools.cycle(some), strict=False)]
        indices = class_indices(self.denoiser, each, n)
        assert indices is not None
        return indices.to(self.device)

    def _teach(
        self, groups: list[Group], first: int, cache: Cache, progress: Callable[[int, int], None]
    ) -> list[Tensor]:
        """The end points of a fine solution, from the cache if they are there."""
        keys = ("n" if first == FIT else "check", "teacher", "label", "guidance", "seed", "words")
        path = cache.path(
            "teacher", {key: self.settings[key] for key in keys if key in self.settings} | {"first": first}
        )
        total = sum(map(len, groups))
        kept = cache.read(path, {"x0": (total, *self.shape)})
        if kept is not None:
            ends = kept["x0"].to(self.device, self.dtype)
        else:
            parts = []
            for end in self._ends(groups):
                parts.append(end)
                progress(sum(map(len, parts)), total)
            ends = torch.cat(parts)
            cache.write(path, {"x0": ends.cpu()})
        _need_finite([ends])
        return list(ends.split([len(group) for group in groups]))


def joined(groups: Sequence[Group], most: int = 128) -> Iterator[Group]:
    """The samples of successive groups under one denoiser in groups of up to so many."""
    for _, run_of in itertools.groupby(groups, lambda group: id(group.denoiser)):
        same = list(run_of)
        many = max(1, most // len(same[0]))
        for few in (same[i : i + many] for i in range(0, len(same), many)):
            cond = {key: torch.cat([group.cond[key] for group in few]) for key in few[0].cond}
            x, target = (torch.cat([getattr(group, name) for group in few]) for name in ("x", "target"))
            yield Group(few[0].denoiser, x, target, cond)


def _need_finite(ends: Sequence[Tensor]) -> None:
    """Raise NumericalError if end points are not finite."""
    if not all(end.isfinite().all() for end in ends):
        raise NumericalError("the fine solution is not finite", "check the network and its precision")


def _ends(guidance: float | tuple[float, float] | None) -> tuple[float, float] | None:
    """The ends of the range of scales."""
    if guidance is None:
        return None
    low, high = guidance if isinstance(guidance, tuple | list) and len(guidance) == 2 else (guidance, guidance)
    low, high = number("guidance", low), number("guidance", high)
    if low > high:
        raise UsageError(f"guidance: the range {low:g} to {high:g} is empty", f"guidance=({high:g}, {low:g})")
    return low, high
