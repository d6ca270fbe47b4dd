"""From words to values: what people write of samples, devices, guidance and steps, settled once for every way in.

`sample`, `encode`, `fit_plan`, `bench` and the command line take the same words; what they mean is here and nowhere
else. Everything that can be wrong is found before the first call of a network.
"""

import math
from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from pfode import defaults, noise
from pfode.arguments import guided, method_of, need_denoiser, sample_states
from pfode.denoiser import Denoiser
from pfode.errors import MissingError, UsageError, integer, number, shortened, unknown
from pfode.grids import Grid
from pfode.labels import class_count, class_indices
from pfode.plans.table import Plan
from pfode.process import Process
from pfode.samplers.adaptive import ADAPTIVE, Adaptive, AdaptiveRecipe, find_adaptive, make_adaptive
from pfode.samplers.catalogue import Recipe, make_plan, recipe_and_grid

__all__ = [
    "batch_size",
    "classes",
    "data_std",
    "data_to_begin_from",
    "find_device",
    "first_time",
    "fitted_plan",
    "prepared",
    "sample_shape",
    "seed_list",
    "settled",
    "start_time",
    "state_dtype",
    "usual_count",
]

MAX_SAMPLES = 10**7
MAX_BYTES = 2**40  # of all samples together
DEVICES = ("auto", "cpu", "cuda", "mps")


# ---- which samples


def seed_list(
    n: int | None, seed: int, seeds: Sequence[int] | None, x: Tensor | None, default: int = defaults.SAMPLES
) -> list[int]:
    """One seed per sample: those given, else seed, seed + 1, ... for n samples, as many as x has, or the default.

    Raises:
        UsageError: no seeds, counts that disagree, or more samples than can be made.
    """
    if seeds is None:
        count = integer("n", len(x) if x is not None and n is None else default if n is None else n, 1, MAX_SAMPLES)
        first = integer("seed", seed, 0, 2**64 - 1)
        integer("seed of the last sample", first + count - 1, 0, 2**64 - 1)
        chosen = list(range(first, first + count))
    elif not isinstance(seeds, Sized) or isinstance(seeds, str | bytes | dict):
        raise UsageError(f"seeds: need integers, got {shortened(seeds)}", "seeds=[0, 1, 2]")
    else:
        try:
            chosen = noise.check_seeds(seeds)
        except TypeError as error:
            raise UsageError(f"seeds: need integers, got {shortened(seeds)}", "seeds=[0, 1, 2]") from error
    counts = {"n": n, "seeds": None if seeds is None else len(chosen), "x": None if x is None else len(x)}
    given = {name: count for name, count in counts.items() if count is not None}
    if not chosen or len(set(given.values())) > 1:
        raise UsageError(f"n, seeds and x disagree, or are empty: {given}", "give one of them")
    return chosen


def usual_count(denoiser: Denoiser, label: Any) -> int:
    """How many samples are drawn where nothing says it: one of every class for the label "all", else 16."""
    every = class_count(denoiser) if isinstance(label, str) and label == "all" else None
    return every or defaults.SAMPLES


def classes(denoiser: Denoiser, label: Any, n: int) -> Tensor | None:
    """The classes of n samples by number: see `class_indices`; "all" takes every class in turn.

    Raises:
        UsageError: a label that is not there, or "all" where there are no classes.
    """
    names = getattr(denoiser, "labels", None) or ()
    if isinstance(label, str) and label == "all" and "all" not in names:
        count = class_count(denoiser)
        if not count:
            raise UsageError('label "all": this network has no classes, or does not say which', "leave the label out")
        label = [i % count for i in range(n)]
    return class_indices(denoiser, label, n)


def sample_shape(denoiser: Denoiser, x: Tensor | None, shape: Sequence[int] | None) -> tuple[int, ...]:
    """The shape of one sample."""
    own = getattr(denoiser, "shape", None)
    wanted = tuple(x.shape[1:]) if x is not None else own if shape is None else shape
    if not isinstance(wanted, tuple | list) or not wanted:
        raise UsageError(f"shape: need that of one sample, got {wanted!r}", "shape=(3, 32, 32)")
    sides = tuple(integer("shape", side, 1) for side in wanted)
    if math.prod(sides) > MAX_BYTES // 4:
        raise UsageError(f"shape: a sample of shape {shortened(sides)} is larger than 1 TB", "shape=(3, 32, 32)")
    if own is not None and sides != tuple(own):
        raise UsageError(f"shape: the denoiser makes samples of shape {tuple(own)}, got {sides}", "leave shape= out")
    return sides


def data_to_begin_from(init: Tensor | None, x: Tensor | None, shape: tuple[int, ...], n: int) -> Tensor | None:
    """The data to begin from, shape (n, *shape)."""
    if init is None:
        return None
    if x is not None:
        raise UsageError("init and x exclude each other", "init= takes data, x= what is noised already")
    if not isinstance(init, Tensor) or init.shape not in (shape, (n, *shape)):
        got = f"shape {tuple(init.shape)}" if isinstance(init, Tensor) else f"{init!r:.60}"
        raise UsageError(f"init: need a tensor of shape {shape} or {(n, *shape)}, got {got}")
    if init.layout != torch.strided:
        raise UsageError(f"init: need a dense tensor, got layout {init.layout}", "init=init.to_dense()")
    if n * math.prod(shape) and (not init.is_floating_point() or init.element_size() == 1):
        raise UsageError(f"init: need floating-point numbers, got {init.dtype}", "init=picture.float() / 127.5 - 1")
    return sample_states("init", init.expand(n, *shape))


# ---- where, and in what precision


def batch_size(batch: int | None) -> int:
    """Samples per denoiser call."""
    return defaults.BATCH if batch is None else integer("batch", batch, 1)


def state_dtype(dtype: torch.dtype | None, x: Tensor | None) -> torch.dtype:
    """The dtype of the state: float32 or float64, as asked for, else as x has it.

    Raises:
        UsageError: another dtype.
    """
    if dtype is None:
        return torch.float32 if x is None else torch.promote_types(x.dtype, torch.float32)
    if dtype not in (torch.float32, torch.float64):
        hint = "lower the network's instead: net.to(dtype=...)"
        raise UsageError(f"dtype: the state is float32 or float64, got {shortened(dtype)}", hint)
    return dtype


def find_device(name: torch.device | str) -> torch.device:
    """A device that is there: "cpu", "cuda", "cuda:1", "mps", or "auto", which is CUDA where it is there, else the CPU.

    Raises:
        UsageError: no such kind of device. MissingError: it is not on this machine.
    """
    if not isinstance(name, torch.device | str | int):
        raise unknown("device", name, DEVICES)
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        count = torch.get_device_module(device).device_count()
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        if name == "gpu":
            raise UsageError("unknown device 'gpu'", 'device="cuda"') from error
        raise unknown("device", name, DEVICES) from error
    if not 0 <= (device.index or 0) < count:
        seen = f"this torch sees {count} {device.type.upper()} devices"
        raise MissingError(f"device {str(name)!r}: {seen}", 'device="cpu"')
    return device


# ---- which denoiser


def prepared(denoiser: Denoiser, guidance: float | None, device: Any = None, compile: bool = False) -> Denoiser:
    """The denoiser on its device, guided and compiled as asked."""
    need_denoiser(denoiser)
    if device is not None and hasattr(denoiser, "to"):  # one without parameters follows x
        denoiser = denoiser.to(find_device(device))  # type: ignore[attr-defined]
    if compile:
        denoiser = method_of(denoiser, "compiled", "wrap its network in torch.compile yourself")()
    return guided(denoiser, guidance)


# ---- which steps


def settled(
    denoiser: Denoiser,
    sampler: str | Recipe | AdaptiveRecipe = "auto",
    steps: int | None = None,
    *,
    fitted: bool = False,
    **options: Any,
) -> Plan | Adaptive:
    """What a sampler is for a denoiser: adaptive, or a plan, of 20 steps where nothing says how many.

    Args:
        fitted: let "auto" take a `fitted_plan`.
        options: of `make_adaptive` or `make_plan`.

    Raises:
        UsageError: as they do; the options of one for the other.
    """
    row = find_adaptive(sampler)
    if row is not None:
        return make_adaptive(row, denoiser.process, steps=steps, **options)
    for name in ("rtol", "atol", "max_steps"):
        if options.pop(name, None) is not None:
            taken = sampler if isinstance(sampler, str) else sampler.name
            taken = recipe_and_grid(taken)[0].name if isinstance(sampler, str) and sampler != "auto" else taken
            hint = f"leave it out, or an adaptive sampler: {', '.join(ADAPTIVE)}"
            raise UsageError(f"{name}: the steps of {taken} lie on a grid, whatever their errors", hint)
    found = fitted_plan(denoiser, steps, **options) if fitted and sampler == "auto" else None
    if found is not None:
        return found
    if steps is None and options.get("nfe") is None and isinstance(options.get("grid"), str | Grid | None):
        steps = defaults.STEPS
    options.setdefault("guided", getattr(denoiser, "evals", 1) > 1)
    return make_plan(sampler, denoiser.process, steps, **options)  # type: ignore[arg-type]


def fitted_plan(
    denoiser: Denoiser, steps: int | None = None, *, nfe: int | None = None, final: str = "denoise", **options: Any
) -> Plan | None:
    """The plan fitted to a denoiser that has exactly the calls asked for, where nothing else of a plan is settled.

    One that was chosen by calibration counts too, guided for a guided denoiser and unguided for others.

    Args:
        steps or nfe: the number of calls. final, options: as for `make_plan`; any of them given leaves no choice.
    """
    plans, count = getattr(denoiser, "plans", None), nfe if steps is None else steps
    if not plans or count not in plans or (steps is not None and nfe is not None) or final != "denoise":
        return None
    if not all(value is None or value is False for value in options.values()):
        return None
    found, guided = plans[count], getattr(denoiser, "evals", 1) > 1
    chosen = found.meta.get("calibrated")
    return found if chosen is None or guided == (chosen.get("guidance") is not None) else None


def data_std(denoiser: Denoiser, afs: bool | float | None) -> float | None:
    """The standard deviation that the analytical first step is to use: `afs`, or the denoiser's own where it is True.

    Raises:
        UsageError: no such number, or a denoiser that does not say.
    """
    if afs is None or afs is False:
        return None
    if afs is not True:
        return number("afs", afs, 0)
    declared = getattr(denoiser, "data_std", None)
    if declared is None:
        raise UsageError("afs: this denoiser does not say how its data are spread", "afs=0.5, their standard deviation")
    return declared


def first_time(process: Process, init: Any, strength: float | None, start: float | None) -> float | None:
    """The time to begin at: `start`, or the `start_time` of a strength; None for the first one of the process.

    Raises:
        UsageError: as `start_time`; a strength without the data `init` that it is for, or beside a start.
    """
    if strength is None:
        return start
    if init is None or start is not None:
        raise UsageError("strength: says how much noise init= gets, in place of start=", "give init= and no start=")
    return start_time(process, strength)


def start_time(process: Process, strength: float) -> float | None:
    """The time at which sigma / (alpha + sigma), the share of noise, is the strength; None for the first one.

    Raises:
        UsageError: a strength outside (0, 1], or below the least noise that the process knows.
    """
    strength = number("strength", strength, 0, 1)
    lowest = process.sigma(process.t_min) / (process.alpha(process.t_min) + process.sigma(process.t_min))
    if strength < lowest:
        raise UsageError(f"strength {strength:g}: the model knows no noise below {lowest:.2g}", "strength=0.6")
    if strength == 1:
        return None
    return min(process.time(2 * math.log(1 / strength - 1)), process.t_max)
