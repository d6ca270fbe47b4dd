"""What is asked of `sample`, `encode` and `decode`: how to step, what to begin from, where to run, what to keep.

The public functions take keywords and make these values of them at once; what they call takes the values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pfode.denoiser import Denoiser
from pfode.errors import UsageError
from pfode.plans.executor import Point
from pfode.plans.table import Plan
from pfode.samplers.adaptive import Adaptive, AdaptiveRecipe
from pfode.samplers.catalogue import Recipe
from pfode.samplers.settle import batch_size, find_device, settled

__all__ = ["Beginning", "Keep", "Label", "Place", "Stepping"]

Label = int | str | Sequence[int | str | None] | Tensor | None


@dataclass(frozen=True)
class Stepping:
    """How to step: a ready plan, or what settles one.

    Args:
        sampler, steps, fitted: see `pfode.sample`.
        plan: a ready one, in place of all others.
        options: of `make_plan` or `make_adaptive`.
        familiar: the options that an error names first.

    Raises:
        UsageError: a plan that is none, or one that is given together with what settles a plan.
    """

    sampler: str | Recipe | AdaptiveRecipe = "auto"
    steps: int | None = None
    plan: Plan | Adaptive | None = None
    fitted: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    familiar: str = "sampler, steps, nfe, grid"

    def __post_init__(self) -> None:
        if self.plan is None:
            return
        if not isinstance(self.plan, Plan | Adaptive):
            raise UsageError(f"plan: need a Plan, got {self.plan!r:.60}", "make_plan(...) or Plan.load(path)")
        if self.sampler != "auto" or any(value is not None for value in (self.steps, *self.options.values())):
            raise UsageError("plan given together with what it settles", f"leave out {self.familiar}, ...")

    def settle(self, denoiser: Denoiser) -> Plan | Adaptive:
        """The plan for a denoiser: the one given, else see `settled`."""
        if self.plan is not None:
            return self.plan
        return settled(denoiser, self.sampler, self.steps, fitted=self.fitted, **self.options)


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
    """What to do at the nodes and what to keep of them; see `sample`.

    Raises:
        UsageError: another word for nan than "raise" and "flag".
    """

    callback: Callable[[Point], Tensor | None] | None = None
    trajectory: bool = False
    nan: str = "raise"

    def __post_init__(self) -> None:
        if self.nan not in ("raise", "flag"):
            raise UsageError(f"nan: got {self.nan!r}", 'nan="raise" or nan="flag"')
