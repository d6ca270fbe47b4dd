"""The plans that a fit starts from, each with the parameters that move it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pfode.errors import UsageError
from pfode.grids import Grid
from pfode.plans.table import Plan
from pfode.process import Process
from pfode.samplers import auto
from pfode.samplers.catalogue import Recipe, make_plan
from pfode.samplers.fit.parameters import DyWeight, General, Parameters
from pfode.samplers.fit.tangents import Numbers

__all__ = ["STARTS", "starts", "stated"]

Start = str | Recipe | Plan | Sequence[str | Recipe | Plan]
GridLike = str | Grid | Tensor | Sequence[float] | None
STARTS = {  # beside what auto takes by hand: the least loss decides, and with it where the first nodes lie
    "exp-ab2@trig": ("cosine(0.5)", "cosine"),
    "ipndm3@ddim": ("ays-svd",),
    "ipndm3@trig": ("cosine(0.5)", "ays-svd"),
    "unipc2@flow": ("cosine(0.5)",),
}


def stated(start: Start, grid: GridLike = None, chart: str | None = None) -> list[Any]:
    """What a fit starts from, as JSON, for its settings: the names, the numbers of plans, then grid and chart."""
    several = list(start) if isinstance(start, Sequence) and not isinstance(start, str) else [start]
    found: list[Any] = []
    for one in several:
        plan = isinstance(one, Plan)
        found.append([one.name, *Numbers.of(one).vector.tolist()] if plan else getattr(one, "name", one))
    return [*found, grid.tolist() if isinstance(grid, Tensor) else grid if grid is None else str(grid), chart]


def starts(
    start: Start,
    process: Process,
    nfe: int,
    grid: GridLike,
    chart: str | None,
    guided: bool,
    kind: str,
    time_only: bool,
) -> list[Parameters]:
    """The parameters of every starting plan.

    Args:
        start, grid, chart, time_only: as for `fit_plan`. kind: its parameterisation.
        guided: whether the denoiser is, for "auto".

    Raises:
        UsageError: none, or one that does not lead from t_max to clean data in nfe calls.
    """
    several = list(start) if isinstance(start, Sequence) and not isinstance(start, str) else [start]
    if not several:
        raise UsageError("start: got none", 'start="auto"')
    if kind == "dyweight" and several == ["auto"]:
        several = ["ipndm3@ddim"]
    if "auto" in several and grid is None and chart is None and kind == "general":
        for name, rules in STARTS.items():
            sampler, named = name.split("@")
            several += [make_plan(sampler, process, nfe=nfe, grid=rule, chart=named) for rule in rules]
    found: list[Parameters] = []
    for one in several:
        plan, sampler, named = _start(one, process, nfe, grid, chart, guided)
        if not plan.first[0] >= process.t_max * (1 - 1e-6) or plan.sigma[-1] > 0:
            problem = f"start: plan {plan.name!r} does not lead from t_max to clean data"
            raise UsageError(problem, "leave its ends alone")
        if plan.nfe != nfe:
            raise UsageError(f"start: plan {plan.name!r} makes {plan.nfe} calls, not {nfe}", "another sampler or nfe")
        if kind == "dyweight":
            found.append(DyWeight(plan))
        else:
            found.append(General(plan, _rebuild(plan, sampler, named), time_only))
    return found


def _start(
    one: object, process: Process, nfe: int, grid: GridLike, chart: str | None, guided: bool
) -> tuple[Plan, str | Recipe | None, str | None]:
    """A starting plan, its recipe, if that is known, and the chart."""
    if isinstance(one, Plan):
        if grid is not None or chart is not None:
            raise UsageError("a plan to start from has its own grid and chart", "leave grid and chart out")
        if one.process != process:
            raise UsageError(f"start: the plan was made for {one.process}, the denoiser has {process}")
        return one, one.meta.get("sampler"), one.meta.get("chart")
    if not isinstance(one, str | Recipe):
        raise UsageError(f"start: need a recipe or a plan, got {one!r:.60}", 'start="auto"')
    sampler, named = one, chart
    if isinstance(one, str) and "@" in one:
        sampler, named = one.split("@", 1)
    if sampler == "auto":
        chosen = auto.choose(process, nfe, guided)
        sampler, named = chosen.sampler, chosen.chart if named is None else named
    return make_plan(sampler, process, nfe=nfe, grid=grid, chart=named, guided=guided), sampler, named


def _rebuild(plan: Plan, sampler: str | Recipe | None, chart: str | None) -> Callable[[Tensor], Plan] | None:
    """The plan's recipe on other times; None where its recipe is not known, or has options that are not."""
    if plan.nfe < 2 or sampler is None or "afs" in plan.meta or "fitted" in plan.meta:
        return None

    def rebuild(times: Tensor) -> Plan:
        return make_plan(sampler, plan.process, grid=times, chart=chart)

    try:
        again = rebuild(plan.times)
        same = torch.allclose(Numbers.of(again).vector, Numbers.of(plan).vector, 1e-6, 1e-9)
    except UsageError:
        return None
    return rebuild if again.nfe == plan.nfe and same else None
