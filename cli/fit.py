"""pfode fit: plans of few calls, fitted to a model without data."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import pfode
from pfode import defaults
from pfode.cli.model_option import Chosen, choose, model_option
from pfode.cli.options import Command, FileName
from pfode.cli.progress import FitBar
from pfode.cli.prompts import load_words, prompt_options
from pfode.cli.settings import DTYPES, listed
from pfode.cli.streams import output, table
from pfode.cli.trust import trust_option
from pfode.errors import FileError, UsageError
from pfode.files import lock_folder, make_folder

if TYPE_CHECKING:
    from pfode.plans.table import Plan

__all__ = ["command"]

LOSSES = ("balanced", "log", "root", "l1", "l2", "geman-mcclure")


@click.command(cls=Command, name="fit")
@model_option(
    "Model to fit to: a name of `pfode info models`, a file, a folder of diffusers, owner/name on the hub, or a "
    "denoiser of your own, or a function that makes one; avatars@2 is --guidance 2."
)
@trust_option
@prompt_options
@click.option(
    "--nfe",
    default=",".join(map(str, defaults.Fit.CALLS)),
    metavar="LIST",
    help="Numbers of denoiser calls; a plan is fitted for each.",
)
@click.option(
    "--out",
    type=FileName(),
    default="plans",
    metavar="DIR",
    help="Folder of the plans, and of fits that are not finished.",
)
@click.option(
    "--start",
    type=FileName(),
    multiple=True,
    default=(defaults.Fit.START,),
    metavar="NAME|PLAN",
    help="Sampler or plan to begin with; of several the best. {nfe} in the name of a file stands for the calls.",
)
@click.option("--grid", metavar="NAME", help="Grid of --start.")
@click.option("--chart", metavar="NAME", help="Chart of --start.")
@click.option(
    "--parameterisation",
    type=click.Choice(["general", "dyweight"]),
    default=defaults.Fit.PARAMETERISATION,
    help="Numbers to fit: all, or those of DyWeight.",
)
@click.option("--time-only", is_flag=True, help="Fit the times and query times, not the coefficients.")
@click.option(
    "--loss", type=click.Choice(LOSSES), default=defaults.Fit.LOSS, help="Loss on the errors of the end points."
)
@click.option("--iterations", type=click.IntRange(1), default=defaults.Fit.ITERATIONS, help="Most iterations.")
@click.option("--n", type=click.IntRange(1), default=defaults.Fit.SAMPLES, help="Samples to fit on.")
@click.option(
    "--active",
    type=click.IntRange(1),
    default=defaults.Fit.ACTIVE,
    help="Samples used in one iteration.",
)
@click.option(
    "--check",
    type=click.IntRange(1),
    default=defaults.Fit.CHECK,
    help="Other samples, which choose the best iteration.",
)
@click.option(
    "--teacher",
    type=click.IntRange(1),
    default=defaults.Fit.TEACHER,
    help="Steps of the fine solution that is the target.",
)
@click.option(
    "--label",
    default=defaults.Fit.LABEL,
    metavar="NAME|all|none",
    help="Class of the samples, if the model has classes.",
)
@click.option("--guidance", metavar="W|LO,HI", help="Scale of classifier-free guidance, or a range of scales.")
@click.option("--seed", type=click.IntRange(0, 2**20 - 1), default=defaults.SEED, help="Seed of the samples.")
@click.option("--dtype", type=click.Choice(["fp32", "fp64"]), default="fp32", help="Precision of the state.")
@click.option("--device", default=defaults.DEVICE, metavar="auto|cpu|cuda|mps", help="Device to compute on.")
@click.option("--batch", type=click.IntRange(1), default=defaults.BATCH, help="Samples per denoiser call.")
@click.option(
    "--tune",
    is_flag=True,
    help="Then learn with what condition each call asks the network: MODEL.tuned-N.safetensors, for this model alone.",
)
@click.option(
    "--tune-steps", type=click.IntRange(1), default=defaults.Fit.TUNE_STEPS, help="Steps of the optimiser of --tune."
)
@click.option("--tune-batch", type=click.IntRange(1), default=defaults.Fit.TUNE_BATCH, help="Samples in one of them.")
@click.option("--checkpoint", is_flag=True, help="Tune in the memory of one call, each call made once more.")
@click.option("--overwrite", is_flag=True, help="Replace plans that were fitted with other settings.")
@click.pass_context
def command(ctx: click.Context, **options: Any) -> None:
    """Fit plans of few denoiser calls to a model.

    Writes MODEL.plan-N.safetensors to --out: `pfode sample --sampler FILE` runs it, `pfode info FILE` shows it, and
    beside the model's own file `--sampler auto` finds it. Finished plans are kept, an interrupted one continues.
    """
    out = output(ctx)
    counts = listed("--nfe", options["nfe"], int, "whole numbers", "--nfe 4,6,8")
    import torch

    from pfode.samplers.fit.starts import stated
    from pfode.samplers.settle import find_device

    device, folder = find_device(options["device"]), Path(options["out"])
    guidance = find_range(options["guidance"])
    built_in = guidance[1] if isinstance(guidance, tuple) else guidance  # into a pipeline under prompts
    words = load_words(options, built_in)
    model = choose(options["model"], words=words, device=device)
    net = model.denoiser
    if not words:
        guidance = one_guidance(guidance, model)
    elif not isinstance(guidance, tuple):
        guidance = None
    how = {key: options[key] for key in ("iterations", "n", "active", "check", "teacher", "loss", "seed", "time_only")}
    how |= {key: options[key] for key in ("parameterisation", "grid", "chart", "batch")}
    how |= {key: options[key] for key in ("tune", "tune_steps", "tune_batch", "checkpoint")}
    kind = "tuned" if options["tune"] else "plan"
    how |= {"device": device, "dtype": getattr(torch, DTYPES[options["dtype"]]), "cache": find_cache(net, folder)}
    how |= {
        "label": find_label(options["label"], net),
        "guidance": guidance,
    }
    starts = {nfe: [find_start(name.replace("{nfe}", str(nfe))) for name in options["start"]] for nfe in counts}
    if how["cache"] is None:
        out.note(f"{model.name} has no fingerprint to tell it by: a fit that is interrupted begins anew")
    make_folder(folder)
    ctx.call_on_close(lock_folder(folder, "fit").close)
    done = []
    for nfe, start in starts.items():
        file = folder / f"{model.stem}.{kind}-{nfe}.safetensors"
        plan = pfode.Plan.load(file) if file.exists() and not options["overwrite"] else None
        kept = plan is not None
        with FitBar(out, nfe) as progress:
            plan = plan or pfode.fit_plan(net, nfe, start=start, callback=progress, **how)
        if kept:
            check_same(file, plan, net, how | {"begun": stated(start, how["grid"], how["chart"])})
        else:
            plan.save(file)
        said = plan.meta["fitted"]
        found = {"file": str(file), "nfe": nfe, "kept": kept, "iterations": said["iterations"], **said["validation"]}
        done.append(found)
        out.note(f"{file}: {'kept' if kept else 'written'}")
    rows = [
        [str(p["nfe"]), f"{p['rms']:.4g}", f"{p['rms'] / p['start rms']:.3f}", f"{p['median']:.4g}",
         f"{p['median'] / p['start median']:.3f}", p["file"]]
        for p in done
    ]  # fmt: skip
    out.emit(
        {"out": str(folder), "plans": done},
        table(("NFE", "rms", "rms / start", "median", "median / start", "file"), rows),
    )


def find_start(name: str) -> "str | Plan":
    """The name of a sampler, or the plan of a file."""
    return pfode.Plan.load(name) if name.endswith(".safetensors") else name


def find_label(text: str, net: Any) -> int | str | None:
    """The label as `fit_plan` takes it: the number of a class, "all", or None for no class."""
    from pfode.labels import class_count, class_index

    if text in ("all", "none"):
        return {"all": "all", "none": None}[text]
    return class_index(getattr(net, "labels", None), text, class_count(net))


def find_cache(net: Any, folder: Path) -> Path | None:
    """The folder in which a fit is kept while it goes on; None for a denoiser that could not be told from another."""
    from pfode.denoiser import fingerprint

    return None if fingerprint(net) is None or hasattr(net, "denoiser") else folder / "cache"


def find_range(text: str | None) -> float | tuple[float, float] | None:
    """The scale of --guidance, or the two ends of a range.

    Raises:
        UsageError: neither.
    """
    if text is None:
        return None
    ends = listed("--guidance", text, float, "one or two numbers", "--guidance 1,4")
    if len(ends) == 1:
        return ends[0]
    if len(ends) == 2:
        return ends[0], ends[1]
    raise UsageError(f"--guidance: need one or two numbers, got {text!r:.60}", "--guidance 1,4")


def one_guidance(given: float | tuple[float, float] | None, model: "Chosen") -> float | tuple[float, float] | None:
    """The scale of --guidance or of the model's name.

    Raises:
        UsageError: both.
    """
    if given is None or model.guidance is None:
        return model.guidance if given is None else given
    text = ",".join(f"{scale:g}" for scale in (given if isinstance(given, tuple) else (given,)))
    problem = f"--model {model.name}@{model.guidance:g} and --guidance {text} exclude each other"
    raise UsageError(problem, "give one of them")


def check_same(file: Path, plan: "Plan", net: Any, how: dict[str, Any]) -> None:
    """Refuse an existing plan that is not the one these settings would give.

    Raises:
        UsageError: fitted to another model, or with other settings. FileError: no plan that `fit` wrote.
    """
    from pfode.denoiser import fingerprint

    said = plan.meta.get("fitted", {})
    try:
        sound = {"iterations", "settings", "validation"} <= said.keys() and all(map(math.isfinite, _figures(said)))
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound and said != {}:
        raise FileError(f"{file}: no plan that pfode fit wrote", "--overwrite, or another --out")
    wanted = json.loads(json.dumps({key: how[key] for key in said.get("settings", {}) if key in how}))
    differ = [key for key, value in wanted.items() if said["settings"][key] != value]
    if sound and said["settings"].get("words") != getattr(net, "words", None):
        problem = f"{file} is there already, fitted to other prompts, guidance or size"
        raise UsageError(problem, "--overwrite, or another --out")
    if said.get("model") != fingerprint(net):
        differ.insert(0, "model")
    if differ:
        other = {"model": "to another model", "begun": "from another start"}.get(differ[0])
        if other is None:
            other = f"with other settings: {differ[0]} is {said['settings'][differ[0]]} there, {wanted[differ[0]]} here"
        raise UsageError(f"{file} is there already, fitted {other}", "--overwrite, or another --out")


def _figures(said: dict[str, Any]) -> list[float]:
    """The row of a fitted plan in the table."""
    return [said["validation"][key] for key in ("rms", "median", "start rms", "start median")]
