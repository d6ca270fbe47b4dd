"""What is asked of `sample`, `encode` and `decode`: how to step, what to begin from, where to run, what to keep.

The public functions take keywords and make these values of them at once; what they call takes the values.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pfode.denoiser import Denoiser
from pfode.errors import UsageError
from pfode.plans.executor import Point
from pfode.plans.parallel import Parallel
from pfode.plans.table import Plan
from pfode.samplers.adaptive import Adaptive, AdaptiveRecipe
from pfode.samplers.catalogue import Recipe
from pfode.samplers.settle import batch_size, find_device, settled

__all__ = ["Beginning", "Keep", "Label", "Place", "Sampler", "Stepping"]

PLAN_FILE = ".safetensors"
Sampler = str | os.PathLike[str] | Recipe | AdaptiveRecipe | Plan
Label = int | str | Sequence[int | str | None] | Tensor | None


@dataclass(frozen=True)
class Stepping:
    """How to step: a ready plan, or what settles one.

    Args:
        sampler, steps, fitted: see `pfode.sample`; a plan or its file may stand in place of a sampler's name.
        plan: a ready one or its file, in place of all others.
        options: of `make_plan` or `make_adaptive`.
        familiar: the options that an error names first.

    Raises:
        UsageError: a plan that is none, or one that is given together with what settles a plan.
    """

    sampler: Sampler = "auto"
    steps: int | None = None
    plan: Plan | Adaptive | str | os.PathLike[str] | None = None
    fitted: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    familiar: str = "sampler, steps, nfe, grid"

    def __post_init__(self) -> None:
        if self.ready is None:
            return
        named = self.plan is None or self.sampler == "auto"
        if not named or any(value is not None for value in (self.steps, *self.options.values())):
            raise UsageError("plan given together with what it settles", f"leave out {self.familiar}, ...")

    @functools.cached_property
    def ready(self) -> Plan | Adaptive | None:
        """The plan that is given, as `plan` or in place of a sampler's name, itself or its file.

        Raises:
            UsageError: no plan. FileError: a file that is missing or damaged.
        """
        given = self.plan if self.plan is not None else self.sampler
        if isinstance(given, Plan | Adaptive):
            return given
        if isinstance(given, os.PathLike) or (isinstance(given, str) and given.endswith(PLAN_FILE)):
            return Plan.load(given)
        if self.plan is not None:
            raise UsageError(f"plan: need a Plan or its file, got {self.plan!r:.60}", "make_plan(...), or a path")
        return None

    def settle(self, denoiser: Denoiser) -> Plan | Adaptive:
        """The plan for a denoiser: the one given, else see `settled`."""
        if self.ready is not None:
            return self.ready
        sampler: Any = self.sampler  # what is no sampler is refused there
        return settled(denoiser, sampler, self.steps, fitted=self.fitted, **self.options)


@dataclass(frozen=True, eq=False)
class Beginning:
    """What to begin from: states x, or data init to be noised, or noise of a shape; of which classes; see `sample`.

    Args:
        mask: where the data init are drawn anew, see `sample`.
        brownian: take the noise of stochastic samplers from one Brownian path per seed.
    """

    x: Tensor | None = None
    init: Tensor | None = None
    mask: Tensor | None = None
    shape: Sequence[int] | None = None
    label: Label = None
    brownian: bool = False


@dataclass(frozen=True)
class Place:
    """Where to run: samples per denoiser call, the dtype of the state, the device; see `sample`.

    Raises:
        UsageError: a batch that is no positive integer.
    """

    batch: int | None = None
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        batch_size(self.batch)

    @property
    def size(self) -> int:
        """Samples per denoiser call."""
        return batch_size(self.batch)

    def device_of(self, denoiser: Denoiser, x: Tensor | None) -> torch.device:
        """The device asked for, else the denoiser's, else that of the states x, else the CPU.

        Raises:
            UsageError, MissingError: as `find_device`.
        """
        states = "cpu" if x is None else x.device
        where = self.device if self.device is not None else getattr(denoiser, "device", None)
        return find_device(states if where is None else where)


@dataclass(frozen=True)
class Keep:
    """What to do at the nodes and what to keep of them, or how to run without coming to them; see `sample`.

    Raises:
        UsageError: another word for nan than "raise" and "flag"; nodes that a run in sweeps does not come to.
    """

    callback: Callable[[Point], Tensor | None] | None = None
    trajectory: bool = False
    nan: str = "raise"
    parallel: Parallel | None = None

    def __post_init__(self) -> None:
        for name, given in (("callback", self.callback is not None), ("trajectory", self.trajectory)):
            if self.parallel is not None and given:
                raise UsageError(f"{name}: parallel makes all nodes at once", f"leave {name} out, or parallel")
        if self.nan not in ("raise", "flag"):
            raise UsageError(f"nan: got {self.nan!r}", 'nan="raise" or nan="flag"')
