"""`sample`: draw from a denoiser, batch by batch, every sample by its own seed."""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode import noise
from pfode.arguments import need_denoiser, sample_states
from pfode.denoiser import Denoiser, conditions, forwards
from pfode.errors import (
    MemoryLimitError,
    NumericalError,
    PfodeError,
    UnsoundWarning,
    UsageError,
    number,
)
from pfode.inpainting import Inpainted, share_drawn
from pfode.plans.executor import Failure, Point, find_failures, iterate, not_finite, replaced, run
from pfode.plans.parallel import Parallel, sweep
from pfode.plans.table import Plan
from pfode.plans.unrolled import spread
from pfode.samplers.adaptive import Adaptive, Stopped
from pfode.samplers.request import Beginning, Keep, Place, Sampler, Stepping
from pfode.samplers.settle import (
    MAX_BYTES,
    classes,
    data_std,
    data_to_begin_from,
    first_time,
    prepared,
    sample_shape,
    seed_list,
    state_dtype,
    usual_count,
)

__all__ = [
    "Samples",
    "batches",
    "joined",
    "non_finite",
    "sample",
    "unsound",
]

EACH = ("nfe", "evals", "steps", "rejected")  # what samples of an adaptive sampler differ in
IN_SWEEPS: tuple[str, ...] = ("nfe", "evals", "sweeps")  # and of a plan that is run in sweeps
WIDE, MANY = 3.0, 100  # how wide what a plan draws may be, in plans of at most so many calls
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")  # in the RuntimeErrors of torch


@dataclass(frozen=True)
class Samples:
    """What `sample` returns.

    Args:
        x: the samples, shape (n, *shape); seeds: one per sample.
        plan: what was run, a Plan or an Adaptive; nfe: denoiser calls; evals: network forwards per sample; times: of
            the nodes. The samples of an adaptive sampler differ: nfe and evals are the largest, times the two ends.
        bad: index, step and time of the samples that are not finite (only with nan="flag").
        trajectory: states at nodes 0 ... steps, and preview: denoiser outputs on the way, when asked for.
        stats: seconds in all, and the batch used at last: smaller than asked for where memory ran out; of an adaptive
            sampler also nfe, evals, steps (accepted) and rejected of every sample, shape (n,).
    """

    x: Tensor
    seeds: list[int]
    plan: Plan | Adaptive
    nfe: int
    evals: int
    times: Tensor
    bad: list[Failure] = field(default_factory=list)
    trajectory: list[Tensor] = field(default_factory=list)
    preview: list[Tensor] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Moves from node to node; of an adaptive sampler the most."""
        return self.plan.steps if isinstance(self.plan, Plan) else int(self.stats["steps"].max())


def sample(
    denoiser: Denoiser,
    n: int | None = None,
    steps: int | None = None,
    sampler: Sampler = "auto",
    grid: Any = None,
    seed: int = 0,
    *,
    nfe: int | None = None,
    seeds: Sequence[int] | None = None,
    x: Tensor | None = None,
    init: Tensor | None = None,
    mask: Tensor | None = None,
    shape: Sequence[int] | None = None,
    plan: Plan | Adaptive | str | os.PathLike[str] | None = None,
    label: int | str | Sequence[int | str | None] | Tensor | None = None,
    guidance: float | None = None,
    strength: float | None = None,
    start: float | None = None,
    stop: float | None = None,
    final: str = "denoise",
    afs: bool | float | None = None,
    brownian: bool = False,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    compile: bool = False,
    callback: Callable[[Point], Tensor | None] | None = None,
    trajectory: bool = False,
    nan: str = "raise",
    fitted: bool = True,
    parallel: bool | float | Parallel | None = None,
    **options: Any,
) -> Samples:
    """Draw n samples.

    Args:
        denoiser: `(x, t, **cond) -> x0` with a process.
        n: how many (16 if nothing says otherwise, one per class of label="all"); sample i has seed `seed + i`, or
            `seeds[i]`.
        steps, nfe, sampler, grid, start, stop, final, options (eta, chart, lower_order_final, ...): of the plan, see
            `make_plan` (20 steps when none is given); or plan, or sampler: a ready plan, or its file. Adaptive samplers
            ("rk45", ...) choose the steps of every sample by itself: sampler, start, stop, final, options (rtol, atol,
            chart, max_steps), see `make_adaptive`.
        x: states at the first time, shape (n, *shape), instead of noise.
        init: data to begin from, shape `shape` or (n, *shape), noised to the first time: image-to-image with
            `strength`, the share of noise, sigma / (alpha + sigma), at the first time (1 is all noise), or `start`.
        mask: inpainting: 1 where init is drawn anew, 0 where it is kept, in between a mean of the two; of a shape that
            broadcasts to (n, *shape), such as (height, width). At the first time of the process, where no `strength`
            or `start` says another, what is to be drawn anew is not looked at.
        shape: of one sample, where the denoiser does not say.
        label: a class (number or name), one per sample, where None is no class, or "all", every class in turn.
        guidance: scale of classifier-free guidance.
        afs: make the first step without a call, as if the data were Gaussian of mean 0 and this standard deviation;
            True: the denoiser's `data_std`.
        brownian: take the noise of stochastic samplers from one Brownian path per seed, the same for any steps.
        batch: samples per denoiser call (64); halved, and the batch begun again, where memory runs out.
        dtype: of the state, float32 or float64. device: where to run.
        compile: run the network through torch.compile.
        callback: called at every node of every batch; a tensor it returns replaces the state there.
        trajectory: keep the states and previews at the nodes.
        nan: "raise" an error that names sample, step and time, or "flag" the samples in `bad`.
        fitted: let "auto" take a plan that was fitted to the denoiser (its `plans`) where one has just the calls asked
            for and nothing else of a plan is settled.
        parallel: evaluate the rows of the plan in sweeps of one large call each, until every sample's states change by
            less than a tolerance (True: 1e-3; 0.0: until they are the plan's own): fewer calls one after the other, in
            more altogether, see `pfode.plans.parallel`. A number is the tolerance; a `Parallel` says more. `stats` then
            has the sweeps and the calls (nfe, evals) of every sample.

    Raises:
        UsageError: options that cannot be carried out; NumericalError: a sample that is not finite;
            MemoryLimitError: out of memory at a single sample.
    """
    keep = Keep(callback, trajectory, nan, _parallel(parallel))
    need_denoiser(denoiser)
    x = None if x is None else sample_states("x", x)
    seeds = seed_list(n, seed, seeds, x, usual_count(denoiser, label))
    place = Place(batch, dtype, device)
    start = first_time(denoiser.process, init, strength, start)
    denoiser = prepared(denoiser, guidance, device, compile)
    options |= {"nfe": nfe, "grid": grid, "start": start, "stop": stop, "afs": data_std(denoiser, afs)}
    options |= {} if final == "denoise" else {"final": final}
    made = Stepping(sampler, steps, plan, fitted, options).settle(denoiser)
    text = unsound(made)
    if text is not None:
        warnings.warn(text, UnsoundWarning, stacklevel=2)
    return joined(batches(denoiser, made, seeds, Beginning(x, init, mask, shape, label, brownian), place, keep), made)


def joined(batches: Iterable[Samples], plan: Plan | Adaptive) -> Samples:
    """The samples of `batches` as one, with the seconds that they took."""
    began = time.perf_counter()
    parts = list(batches)
    bad, done = [], 0
    for part in parts:
        bad += [replace(flaw, index=done + flaw.index) for flaw in part.bad]
        done += len(part.x)
    return Samples(
        x=torch.cat([part.x for part in parts]),
        seeds=[seed for part in parts for seed in part.seeds],
        plan=plan,
        nfe=max(part.nfe for part in parts),
        evals=max(part.evals for part in parts),
        times=plan.times,
        bad=bad,
        trajectory=[torch.cat(states) for states in zip(*(part.trajectory for part in parts), strict=True)],
        preview=[torch.cat(outputs) for outputs in zip(*(part.preview for part in parts), strict=True)],
        stats={"seconds": time.perf_counter() - began, "batch": parts[-1].stats["batch"]}
        | {
            key: torch.cat([part.stats[key] for part in parts])
            for key in dict.fromkeys((*EACH, *IN_SWEEPS))
            if key in parts[0].stats
        },
    )


def unsound(plan: Plan | Adaptive) -> str | None:
    """What to say of a plan whose errors grow from step to step, of few steps mostly; None of a sound one."""
    if not isinstance(plan, Plan) or plan.nfe > MANY:
        return None
    ratio = spread(plan)
    if ratio <= WIDE:
        return None
    chart = "another chart" if plan.meta.get("chart") == "flow" else 'chart "flow"'
    return (
        f"plan {plan.name!r}: its {plan.nfe} calls are too few: what it draws is about {ratio:.0f} times too wide; "
        f'more steps, {chart}, another grid, or sampler "auto"'
    )


def batches(
    denoiser: Denoiser,
    plan: Plan | Adaptive,
    seeds: Sequence[int],
    beginning: Beginning,
    place: Place,
    keep: Keep,
) -> Iterator[Samples]:
    """The loop of `sample`: every batch as it ends, with memory for one; `bad` counts from the batch's first sample.

    Args:
        denoiser: ready to run, see `prepared`. plan, seeds: what to run, and one seed per sample.
        beginning, place, keep: what to begin from, where to run, what to keep.

    Raises:
        as `sample`; the batches before have been handed out.
    """
    if isinstance(plan, Adaptive):
        _refuse(
            plan, callback=keep.callback is not None, trajectory=keep.trajectory, parallel=keep.parallel is not None
        )
    if beginning.brownian and not (isinstance(plan, Plan) and plan.stochastic):
        raise UsageError(f"brownian: {plan.name} draws no noise", "leave brownian out, or a stochastic sampler")
    x, dtype, batch = beginning.x, state_dtype(place.dtype, beginning.x), place.size
    shape = sample_shape(denoiser, x, beginning.shape)
    if len(seeds) * math.prod(shape) > MAX_BYTES // 4:
        raise UsageError(f"n: {len(seeds)} samples of shape {shape} are more than 1 TB", "draw them in parts")
    init = data_to_begin_from(beginning.init, x, shape, len(seeds))
    mask = _mask(beginning.mask, init, shape, len(seeds))
    labels = classes(denoiser, beginning.label, len(seeds))
    where = place.device_of(denoiser, x)
    done = 0
    while done < len(seeds):
        began = time.perf_counter()
        some = slice(done, done + batch)
        chosen = list(seeds[some])
        drawn, net = None, denoiser
        try:
            with torch.no_grad():
                cond: dict[str, Any] = {} if labels is None else {"label": labels[some].to(where)}
                cond |= conditions(denoiser, chosen, where)
                cond |= {"brownian": True} if beginning.brownian else {}
                data = None if init is None else init[some].to(where, dtype)
                seen = data
                if mask is not None and data is not None:
                    net = Inpainted(denoiser, data, mask[some].to(where, dtype))
                    seen = data * (1 - net.mask) if plan.first[0] >= plan.process.t_max else data
                first = _first(plan, chosen, shape, dtype, where, seen) if x is None else x[some].to(where, dtype)
                drawn = _draw(plan, net, first, chosen, cond, keep)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if len(chosen) == 1:
                hint = "a smaller network, a lower precision of it (bf16), or a device with more memory"
                raise MemoryLimitError(f"out of memory at a single sample of shape {shape}", hint) from error
        if drawn is None:  # here the error is gone, and with it what it held
            batch = len(chosen) // 2
            if where.type == "cuda":
                torch.cuda.empty_cache()
            continue
        states, previews, bad, each = drawn
        last, process = float(plan.times[-1]), plan.process
        if isinstance(net, Inpainted) and process.sigma(last) == 0:
            states[-1] = net.ended(states[-1], process.alpha(last))
        if bad and keep.nan == "raise":
            raise non_finite(plan, replace(bad[0], index=done + bad[0].index))
        done += len(chosen)
        yield Samples(
            x=states[-1],
            seeds=chosen,
            plan=plan,
            nfe=plan.nfe if isinstance(plan, Plan) and not each else int(each["nfe"].max()),
            evals=forwards(denoiser, plan.t) if isinstance(plan, Plan) and not each else int(each["evals"].max()),
            times=plan.times,
            bad=bad,
            trajectory=states if keep.trajectory else [],
            preview=previews,
            stats={"seconds": time.perf_counter() - began, "batch": batch, **each},
        )


def _mask(mask: Tensor | None, init: Tensor | None, shape: tuple[int, ...], n: int) -> Tensor | None:
    """The mask of inpainting, (n, *shape)."""
    if mask is None:
        return None
    if init is None:
        raise UsageError("mask: says where init= is drawn anew", "give init=, the data to be kept elsewhere")
    return share_drawn(mask, shape, n)


def _parallel(given: bool | float | Parallel | None) -> Parallel | None:
    """How to run in sweeps; None for row by row."""
    if given is None or given is False or isinstance(given, Parallel):
        return given or None
    return Parallel() if given is True else Parallel(number("parallel", given, 0))


def _refuse(plan: Adaptive, **asked: bool) -> None:
    """What needs steps that are the same for all samples."""
    for name, wanted in asked.items():
        if wanted:
            problem = f"{name}: {plan.name} has no nodes that all samples share"
            raise UsageError(problem, f"leave {name} out, or a sampler of fixed steps")


class _Drawn(NamedTuple):
    """A batch: its states (the last alone unless a trajectory is asked for), previews, what is not finite, and, of an
    adaptive sampler, what each sample took."""

    states: list[Tensor]
    previews: list[Tensor]
    bad: list[Failure]
    each: dict[str, Tensor]


def _draw(
    plan: Plan | Adaptive,
    denoiser: Denoiser,
    x: Tensor,
    seeds: list[int],
    cond: dict[str, Any],
    keep: Keep,
) -> _Drawn:
    if isinstance(plan, Adaptive):
        done = plan.run(denoiser, x, **cond)
        return _Drawn([done.x], [], [*done.failed], {key: getattr(done, key) for key in EACH})
    states, previews, spoilt = [x], [], []
    each: dict[str, Tensor] = {}
    if keep.parallel is not None:
        swept = sweep(plan, denoiser, x, seeds, keep.parallel, **cond)
        counts = swept.calls.cpu(), swept.calls.cpu() * getattr(denoiser, "evals", 1), swept.sweeps.cpu()
        states, each = [swept.x], dict(zip(IN_SWEEPS, counts, strict=True))
    elif keep.callback is None and not keep.trajectory:
        states = [run(plan, denoiser, x, seeds, **cond)]
    else:
        points, sent = iterate(plan, denoiser, x, seeds, **cond), None
        for _ in range(plan.steps):
            point = points.send(sent)
            sent = keep.callback(point) if keep.callback else None
            end = replaced(point.x, sent)
            states = [*states, end] if keep.trajectory else [end]
            previews += [point.x0] if keep.trajectory else []
            spoilt.append(~(torch.isfinite(end) & torch.isfinite(point.x0)).flatten(1).all(1))
    lost = not_finite(states[-1])
    if not lost:
        return _Drawn(states, previews, [], each)
    found = find_failures(plan, denoiser, x, seeds, **cond) if keep.callback is None else {}
    return _Drawn(states, previews, [found.get(i) or _seen(plan, i, spoilt) for i in lost], each)


def _seen(plan: Plan, index: int, spoilt: list[Tensor]) -> Failure:
    """Where a sample was first seen not to be finite, for what a replay does not show; the end if nowhere before."""
    step = next((k for k, samples in enumerate(spoilt) if samples[index]), plan.steps - 1)
    return Failure(index, step + 1, float(plan.t[plan.step == step][0]))


def non_finite(plan: Plan | Adaptive, bad: Failure) -> NumericalError:
    if isinstance(bad, Stopped):
        return bad.error
    hint = "the denoiser (or the callback) gave NaN or infinity there: check the network and its precision"
    of = f" of {plan.steps}" if isinstance(plan, Plan) else ""
    where = f"step {bad.step}{of}, t = {bad.time:.6g}"
    return NumericalError(f"sample {bad.index} is not finite after {where}", hint)


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, PfodeError):
        return False
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(words in str(error).lower() for words in NO_MEMORY)


def _first(
    plan: Plan | Adaptive,
    seeds: list[int],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    data: Tensor | None = None,
) -> Tensor:
    """The data noised to the plan's first time; pure noise without any."""
    t, alpha, sigma = plan.first.tolist()
    if data is None and alpha > 0.15 * sigma and t < plan.process.t_max:
        level = f"t = {t:g}, where data is not drowned in noise (alpha/sigma = {alpha / sigma:.3g})"
        raise UsageError(f"the plan starts at {level}", "give init=, the data, or x=, the noised data at that time")
    x = sigma * noise.normal(seeds, noise.INITIAL, shape, dtype, device)
    return x if data is None else x + alpha * data
