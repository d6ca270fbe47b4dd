"""Fitted plans: the numbers of a plan moved until its ends are those of a fine solution (docs/design.md, section 6).

No data are needed: noise, the converged end points of the same PF-ODE (`samples`), and the fixed network. From the
plans that make up its `starts` a fit takes the best, moves its `parameters` by Levenberg-Marquardt steps (`levenberg`)
on a robust loss (`losses`), and keeps the best iterate on noise of its own.
"""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfode import defaults, grids
from pfode.denoiser import Denoiser, conditioning, fingerprint, inmost, network_digest
from pfode.errors import NumericalError, UsageError, integer, unknown
from pfode.files import lock_folder, make_folder
from pfode.plans.table import Plan
from pfode.samplers.catalogue import Recipe
from pfode.samplers.fit.cache import Cache
from pfode.samplers.fit.levenberg import Errors, Objective, State
from pfode.samplers.fit.losses import LOSSES, PHASES
from pfode.samplers.fit.parameters import Parameters
from pfode.samplers.fit.samples import CHECK, FIT, GROUP, Group, Source
from pfode.samplers.fit.starts import GridLike, starts, stated
from pfode.samplers.fit.team import Team
from pfode.samplers.fit.tuning import Tuning
from pfode.samplers.fit.tuning import tune as tune_plan

__all__ = ["Progress", "fit_plan"]

PARAMETERISATIONS = ("general", "dyweight")
LIMITS = {"teacher": grids.MAX_STEPS, "batch": 2**31}
MAX_NFE = 200  # of a fitted plan
MAX_BYTES = 2**34  # that the quadratic functions of an iteration, or all samples, may take
PATIENCE = 3  # iterations in which the noise that chooses shows no gain of GAIN
GAIN = 0.02  # in the logarithm of the median, in the last phase of both errors' product


@dataclass(frozen=True)
class Progress:
    """How far a fit is, for its callback.

    Attributes:
        stage: "teacher", "fit", then "tune". done, total: samples of the teacher, iterations of the fit, steps.
        rms, median: end-point errors of the best plan so far on the noise that chooses; of the fit alone.
        start_rms, start_median: those of the starting plan; while it is tuned, of the fitted one.
    """

    stage: str
    done: int
    total: int
    rms: float = math.nan
    median: float = math.nan
    start_rms: float = math.nan
    start_median: float = math.nan


def fit_plan(
    denoiser: Denoiser,
    nfe: int,
    *,
    start: str | Recipe | Plan | Sequence[str | Recipe | Plan] = defaults.Fit.START,
    grid: GridLike = None,
    chart: str | None = None,
    parameterisation: str = defaults.Fit.PARAMETERISATION,
    time_only: bool = False,
    loss: str = defaults.Fit.LOSS,
    features: Callable[[Tensor], Tensor] | None = None,
    iterations: int = defaults.Fit.ITERATIONS,
    n: int = defaults.Fit.SAMPLES,
    active: int = defaults.Fit.ACTIVE,
    check: int = defaults.Fit.CHECK,
    teacher: int = defaults.Fit.TEACHER,
    label: int | str | Sequence[int | str] | None = defaults.Fit.LABEL,
    guidance: float | tuple[float, float] | None = None,
    seed: int = 0,
    shape: Sequence[int] | None = None,
    batch: int = defaults.BATCH,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    tune: bool = False,
    tune_steps: int = defaults.Fit.TUNE_STEPS,
    tune_batch: int = defaults.Fit.TUNE_BATCH,
    checkpoint: bool = False,
    cache: str | Path | None = None,
    callback: Callable[[Progress], None] | None = None,
) -> Plan:
    """A plan of nfe denoiser calls whose end points are as near as they get to those of a fine solution.

    It starts from a hand-made plan and is never worse than it, in root mean square or median, on noise that was not
    fitted on. The seeds of all noise are far from those of `sample`. The same arguments give the same plan.

    Args:
        denoiser: what the plan is for; its `fingerprint`, where it has one, goes into the plan, which then warns when
            it is run with another.
        nfe: rows.
        start: a recipe, "recipe@chart", "auto" or a plan of nfe rows; of several the one with the least loss is taken,
            and "auto" is several: what it is for `make_plan`, and `STARTS`. A plan that `make_plan` made keeps its
            recipe, any other its coefficients. grid, chart: of the recipe.
        parameterisation: "general" (`General`), or "dyweight" (`DyWeight`).
        time_only: fit times and query times alone.
        loss: of a sample's mean square error: "l2", "l1", "root", "log" or "geman-mcclure", from the one that samples
            which landed elsewhere dominate to those that they cannot; "balanced" is "log" while that helps, then with
            the mean square beside it.
        features: (batch, *shape) -> (batch, ...), in which errors are then measured.
        iterations: at most; it ends when nothing is gained any more. With a cache a later call may ask for more.
        n: samples fitted on; active: those of them, drawn anew, that an iteration has tangents of; check: samples that
            choose the best iterate and end the fit.
        teacher: steps of the fine solution, by exp-ab3.
        label: a class, or several in turn; "all" for every class, where there are any; None for none.
        guidance: a scale, or the ends of a range over which the samples are spread.
        shape, batch, dtype, device: as for `sample`.
        tune: go on from the fitted plan by gradients through the calls, and learn beside its numbers with what
            condition each row asks the network (`tuning`): a tuned plan, which belongs to this network alone. For
            networks of torch modules (`pfode.scores.Denoiser`). In the processes of a `torch.distributed` group, as
            `accelerate launch` makes one, the work is shared, and the plan the same in all of them.
        tune_steps: of the optimiser. tune_batch: samples in one of them, rounded up to eights.
        checkpoint: keep no more than one call's memory for the gradients, and call once more instead.
        cache: a folder (made where missing) that keeps the teacher's end points and the state of the fit: called
            again after an interruption, it continues, to the same plan.
        callback: called with the progress.

    Raises:
        UsageError: options that cannot be carried out; NumericalError: a teacher whose end points are not finite.
        WriteError, FileError: the cache.
    """
    nfe, seed = integer("nfe", nfe, 1, MAX_NFE), integer("seed", seed, 0, 2**20 - 1)
    if not isinstance(loss, str) or loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    if not isinstance(parameterisation, str) or parameterisation not in PARAMETERISATIONS:
        raise unknown("parameterisation", parameterisation, PARAMETERISATIONS)
    if not isinstance(time_only, bool):
        raise UsageError(f"time_only: got {time_only!r:.60}", "time_only=True or time_only=False")
    for name, value in (("tune", tune), ("checkpoint", checkpoint)):
        if not isinstance(value, bool):
            raise UsageError(f"{name}: got {value!r:.60}", f"{name}=True or {name}=False")
    if tune and features is not None:
        raise UsageError("tune: errors are measured in the samples themselves there", "leave features= out")
    for name, function in (("features", features), ("callback", callback)):
        if function is not None and not callable(function):
            raise UsageError(f"{name}: {type(function).__name__} cannot be called", f"{name}=None, or a function")
    if cache is not None and not isinstance(cache, str | os.PathLike):
        raise UsageError(f"cache: need a folder, got {cache!r:.60}", 'cache="folder"')
    if time_only and parameterisation != "general":
        raise UsageError("time_only: dyweight is another parameterisation", 'parameterisation="general"')
    counts = {"iterations": iterations, "n": n, "active": active, "check": check, "teacher": teacher, "batch": batch}
    counts = {name: integer(name, value, 1, LIMITS.get(name, 2**62)) for name, value in counts.items()}
    settings = {
        "nfe": nfe, "parameterisation": parameterisation, "time_only": time_only, "loss": loss,
        **{name: value for name, value in counts.items() if name != "batch"},
        "label": label, "guidance": guidance, "seed": seed, "features": features is not None,
        "begun": stated(start, grid, chart),
    }  # fmt: skip
    tuning = Tuning(integer("tune_steps", tune_steps, 1, 10**7), integer("tune_batch", tune_batch, 1), checkpoint)
    words = getattr(denoiser, "words", None)  # a digest of prompts, which the fingerprint of the weights is not of
    settings |= {} if words is None else {"words": words}
    source = Source(denoiser, settings, shape, dtype, device)
    if tune:
        conditioning(source.denoiser)
    begun = starts(start, denoiser.process, nfe, grid, chart, source.guided, parameterisation, time_only)
    _check_size(settings, source.shape, max(parameters.size for parameters in begun))
    say, team = callback or (lambda progress: None), Team()
    kept = _cache(cache if team.rank == 0 else None, source, settings["features"])
    lock = contextlib.nullcontext()
    if cache is not None and team.rank == 0:
        lock = lock_folder(cache, "fit", "wait for it, or another cache")
    with lock, torch.no_grad():
        plan = team.first(lambda: _fit(source, settings, begun, features, counts["batch"], kept, say))
        return _tuned(plan, source, tuning, kept, say) if tune else plan


def _tuned(plan: Plan, source: Source, tuning: Tuning, cache: Cache, say: Callable[[Progress], None]) -> Plan:
    """The plan tuned, whose meta says how."""
    checked = source.groups(CHECK, source.settings["check"], cache, lambda done, total: None)

    def tell(done: int, best: Errors, start: Errors) -> None:
        say(Progress("tune", done, tuning.steps, best.rms, best.median, start.rms, start.median))

    made, best = tune_plan(plan, source, checked, tuning, cache, tell)
    fitted = {**plan.meta["fitted"], "network": network_digest(inmost(source.denoiser).net)}
    validation = {**fitted["validation"], "rms": best.rms, "median": best.median}
    validation |= {f"plain {name}": fitted["validation"][name] for name in ("rms", "median")}
    settings = {**fitted["settings"], "tune": True, "tune_steps": tuning.steps, "tune_batch": tuning.batch}
    meta = {**plan.meta, "fitted": {**fitted, "settings": settings, "validation": validation}}
    return replace(made, name=f"tuned-{plan.nfe}", meta=meta)


def _cache(folder: str | os.PathLike[str] | None, source: Source, features: bool) -> Cache:
    """The cache of a fit, in a folder that is made where it is missing.

    Raises:
        UsageError: the denoiser, or the features, have no digest by which its files could be told from others.
    """
    denoiser, found = source.denoiser, fingerprint(source.denoiser)
    if folder is not None:
        if found is None or features:
            what = "features have" if features else "this denoiser has"
            raise UsageError(f"cache: {what} no fingerprint to tell its files by", "leave the cache out")
        if hasattr(denoiser, "denoiser"):
            problem = f"cache: {type(denoiser).__name__} has the fingerprint of the denoiser underneath"
            raise UsageError(problem, "give that one and guidance=, or leave the cache out")
        make_folder(folder)
    return Cache(folder, {"model": found, "shape": list(source.shape), "dtype": str(source.dtype)})


def _check_size(settings: dict[str, Any], shape: tuple[int, ...], numbers: int) -> None:
    """Refuse what cannot be kept in memory, before anything is made.

    Args:
        shape: of a sample. numbers: that are fitted.

    Raises:
        UsageError: too many samples, or too many numbers for so many.
    """
    most = MAX_BYTES // (16 * math.prod(shape))
    for name in ("n", "check"):
        integer(name, settings[name], 1, most)
    size = 8 * min(settings["active"], settings["n"]) * numbers**2
    if size > MAX_BYTES:
        problem = f"nfe, active: {settings['active']} samples by {numbers} numbers would take {size / 2**30:,.0f} GiB"
        raise UsageError(problem, "fewer calls, a smaller active=, or time_only=True")


def _fit(
    source: Source,
    settings: dict[str, Any],
    begun: list[Parameters],
    features: Callable[[Tensor], Tensor] | None,
    batch: int,
    cache: Cache,
    say: Callable[[Progress], None],
) -> Plan:
    """The iterations, from where the cache has them."""

    def teaching(done: int, total: int) -> None:
        say(Progress("teacher", done, total))

    fitted = source.groups(FIT, settings["n"], cache, teaching)
    checked = source.groups(CHECK, settings["check"], cache, teaching)
    active, total = math.ceil(settings["active"] / GROUP), settings["iterations"]
    phases = PHASES.get(settings["loss"], (settings["loss"],))
    objectives = [Objective(parameters, phases, features, batch) for parameters in begun]
    objective = _best(objectives, settings["loss"], fitted[:active])
    parameters = objective.parameters
    first = parameters.numbers(torch.zeros(parameters.size, dtype=torch.float64, device="cpu"))
    start = objective.errors(first, checked)
    path = cache.path("fit", {**settings, "iterations": None, "start": first.vector.tolist()})
    state = State.load(path, parameters.size, len(phases))
    best = objective.errors(parameters.numbers(state.best), checked) if state.done else start
    while True:
        say(Progress("fit", state.done, total, best.rms, best.median, start.rms, start.median))
        if (state.failed or state.stale >= PATIENCE) and state.phase + 1 < len(phases):
            state = State(state.best, state.best, done=state.done, phase=state.phase + 1)
        if state.done >= total or state.failed or state.stale >= PATIENCE:
            break
        draw = torch.Generator().manual_seed((settings["seed"] << 20) + state.done)
        some = torch.randperm(len(fitted), generator=draw, device="cpu")[:active]
        objective.iterate(state, [fitted[i] for i in sorted(some.tolist())])
        state.done += 1
        if not state.failed:
            latest = objective.errors(parameters.numbers(state.theta), checked)
            mark = latest.gain(start) if state.phase else math.log(latest.median)
            state.stale = 0 if mark < state.mark - GAIN else state.stale + 1
            state.mark = min(mark, state.mark)
            if latest.gain(start) < best.gain(start):
                best, state.best = latest, state.theta
        state.save(path)
    return _plan(parameters, state, best, start, settings, cache.model["model"])


def _best(objectives: list[Objective], loss: str, groups: Sequence[Group]) -> Objective:
    """The objective whose starting plan has the least loss on these groups.

    Raises:
        NumericalError: none of them ends in finite samples.
    """
    found = []
    for objective in objectives:
        zeros = torch.zeros(objective.parameters.size, dtype=torch.float64, device="cpu")
        found.append(objective.errors(objective.parameters.numbers(zeros), groups))
    usual = [max(min(values) ** 2, 1e-300) for values in zip(*((e.median, e.rms) for e in found), strict=True)]
    losses = [LOSSES[loss][0](errors.each, *usual).mean().item() for errors in found]
    if not any(map(math.isfinite, losses)):
        raise NumericalError("no starting plan ends in finite samples and features", "check network and features")
    losses = [value if math.isfinite(value) else math.inf for value in losses]
    return objectives[min(range(len(losses)), key=losses.__getitem__)]


def _plan(
    parameters: Parameters, state: State, best: Errors, start: Errors, settings: dict[str, Any], model: str | None
) -> Plan:
    """The best plan, whose meta says how it came about."""
    begun = parameters.start
    validation = {
        "rms": best.rms, "median": best.median, "start rms": start.rms, "start median": start.median,
        "n": len(best.each),
    }  # fmt: skip
    fitted = {
        "model": model,
        "start": {"name": begun.name, **begun.meta},
        "settings": settings,
        "iterations": state.done,
        "validation": validation,
    }
    return replace(parameters.plan(state.best), name=f"fitted-{begun.nfe}", meta={"grid": "fitted", "fitted": fitted})
