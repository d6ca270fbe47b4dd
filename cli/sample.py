"""pfode sample: draw pictures, write the sheet, say what was done."""

import contextlib
import math
import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import pfode
from pfode.cli.common import Command, Finite, Output, bar, output
from pfode.cli.recipe import check_digest, format_seeds, parse_seeds, seed_range, settle
from pfode.errors import MissingError, NumericalError, UsageError, WriteError, unknown
from pfode.files import read_header, write_atomic
from pfode.scores.shipped import model_path

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from pfode.plan import Plan

SHEET = 100  # pictures of --separate that the contact sheet shows
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


@click.command(cls=Command, name="sample")
@click.option(
    "--model", default="emoji", show_default=True, metavar="NAME|FILE", help="`pfode info models`, or a file."
)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, metavar="N", help="Number of steps.")
@click.option("--nfe", type=click.IntRange(1), metavar="N", help="As many steps as fit in N denoiser calls.")
@click.option(
    "--sampler", default="auto", show_default=True, metavar="NAME|PLAN", help="`pfode samplers`, or a plan file."
)
@click.option("--grid", metavar="NAME", help="Where the steps lie: karras, time, log-snr ...")
@click.option("--chart", metavar="NAME", help="Coordinates to step in, see `pfode samplers`.")
@click.option("--eta", type=Finite(0), metavar="X", help="Amount of noise of the samplers that take it.")
@click.option("--n", type=click.IntRange(1), default=16, show_default=True, metavar="N", help="Number of pictures.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Of picture 0; i has seed + i."
)
@click.option("--seeds", metavar="LIST", help="The seeds themselves: 0-63,80.")
@click.option(
    "--label",
    metavar="NAME|all|none",
    help="Class of the pictures; all: every class in turn, where the model has classes the default; none: no class.",
)
@click.option("--guidance", type=Finite(), metavar="W", help="Classifier-free guidance scale (doubles the evals).")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the network; the state stays float32 or better.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to compute.")
@click.option("--batch", type=click.IntRange(1), metavar="N", help="Pictures at a time; changes no picture.")
@click.option("--out", default="sheet.png", show_default=True, metavar="FILE.png", help="The contact sheet.")
@click.option("--scale", type=click.IntRange(1, 64), metavar="N", help="Enlarge each picture on the sheet.")
@click.option(
    "--separate", metavar="DIR", help="Also every picture as a file, results.jsonl and run.json; continues there."
)
@click.option("--overwrite", is_flag=True, help="Start --separate anew instead of continuing.")
@click.option(
    "--nan",
    type=click.Choice(["raise", "flag"]),
    default="raise",
    show_default=True,
    help="At a picture that is not finite: stop, or leave it out and exit with 5 at the end.",
)
@click.option("--trajectory", metavar="FILE", help="Also an animation: .gif, .png or .webp.")
@click.option("--like", metavar="FILE.png", help="Repeat the settings of a picture; flags still win.")
@click.pass_context
def command(ctx: click.Context, **options: Any) -> None:
    """Draw pictures from a score network.

    Writes a contact sheet and prints its path. The settings are in the PNG's text: --like SHEET.png repeats them,
    `pfode info SHEET.png` shows them.
    """
    out = output(ctx)
    options = settle(ctx, options)
    check_outputs(options["out"], options["trajectory"], options["separate"])
    if options["overwrite"] and options["separate"] is None:
        raise UsageError("--overwrite: nothing is continued without --separate", "--separate DIR")
    from pfode.cli import many

    if options["separate"] is None and many.launched():
        raise UsageError("several processes share the pictures of a folder", "--separate DIR")
    job = prepare(options)
    plan, n = job.plan, len(job.seeds)
    names = f"model {options['model']}, sampler {plan.name}, grid {plan.meta.get('grid', 'of the plan')}"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        out.note(f"{names}, n {n}, seeds {format_seeds(job.seeds)}, device {job.device}")
    done = one_sheet(job, out) if options["separate"] is None else many.draw(job, out)
    if done is None:
        return
    drawn, seconds, evals = done.get("drawn", n), done["seconds"], done["evals"]
    out.note(f"steps {plan.steps}, NFE {plan.nfe}, evals {evals} ({seconds:.2f} s)")
    summary = {
        "out": done["files"][0],
        "n": n,
        "steps": plan.steps,
        "nfe": plan.nfe,
        **done,
        "images_per_second": drawn / seconds,
        "recipe": recipe(job, evals),
    }
    out.emit(summary, done["files"][0])


def one_sheet(job: "Job", out: Output) -> dict[str, Any]:
    """Draw all pictures, then write the sheet and the animation.

    Raises:
        NumericalError: pictures that are not finite; with --nan flag the others have been written.
    """
    began = time.perf_counter()
    with Progress(len(job.seeds), out) as progress:
        result = pfode.sample(
            job.net,
            plan=job.plan,
            seeds=job.seeds,
            label=job.label,
            guidance=job.options["guidance"],
            batch=job.options["batch"],
            dtype=job.dtype,
            device=job.device,
            callback=progress if progress.visible else None,
            trajectory=job.options["trajectory"] is not None,
            nan=job.options["nan"],
        )
    seconds = time.perf_counter() - began
    files = write(job, result)
    if result.bad:
        flaws = [(job.seeds[bad.index], bad.step, bad.time) for bad in result.bad]
        raise non_finite(flaws, job, f"crossed out in {files[0]}; the other pictures are sound")
    return {"files": files, "evals": result.evals, "seconds": seconds}


@dataclass(frozen=True)
class Job:
    """What the options resolve to."""

    options: dict[str, Any]
    net: Any
    digest: str | None  # of the model's file
    plan: "Plan"
    plan_digest: str | None  # of the plan's file, if it came from one
    seeds: list[int]
    label: "Tensor | int | None"
    classes: list[str]  # the class of each picture; empty: unconditional
    dtype: "torch.dtype"  # of the state
    device: str
    columns: int
    scale: int
    shown: int  # pictures on the sheet


def prepare(options: dict[str, Any]) -> Job:
    """Load model and plan, resolve the rest. Everything that can be wrong is found here, before sampling.

    Raises:
        PfodeError: an option that the model, the plan or the machine cannot carry out.
    """
    import torch

    from pfode.cli import images

    device = find_device(options["device"])
    path = model_path(options["model"])
    net = pfode.load(options["model"])
    dtype = torch.float64 if options["dtype"] == "fp64" else torch.float32
    if options["dtype"]:
        net = net.to(dtype=getattr(torch, DTYPES[options["dtype"]]))
    digest = read_header(path).metadata.get("pfode.digest") if path.is_file() else None
    check_digest(options, "model", digest)
    shape: tuple[int, ...] = tuple(net.shape or ())
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UsageError(
            f"model {options['model']!r}: samples of shape {shape} are no pictures", "use pfode.sample in Python"
        )
    plan, plan_digest = find_plan(options, net)
    labels: list[str] = list(net.labels or ())
    n = options["n"] or (len(labels) if options["label"] == "all" and labels else 16)
    if options["label"] is None and labels:
        options = {**options, "label": "all"}
    seeds = parse_seeds(options["seeds"]) if options["seeds"] is not None else seed_range(options["seed"], n)
    if options["guidance"] not in (None, 0, 1) and options["label"] in (None, "none"):
        raise UsageError(f"--guidance {options['guidance']:g} needs a class to guide to", "--label all")
    indices = find_labels(options["label"], net, len(seeds))
    shown = len(seeds) if options["separate"] is None else min(len(seeds), SHEET)
    columns = images.sheet_columns(shown, len(labels) if options["label"] == "all" else 0)
    scale = options["scale"] or images.default_scale(shown, *shape[1:], columns)
    size = images.sheet_size(shown, *shape[1:], scale, columns)
    if options["trajectory"] is not None and size[0] * size[1] * (plan.steps + 1) > 4 * images.MAX_PIXELS:
        frames = f"{plan.steps + 1} frames of twice {size[1]} x {size[0]} pixels"
        raise UsageError(f"--trajectory: {frames} are too many", "a smaller --n or --scale")
    return Job(
        options=options,
        net=net,
        digest=digest,
        plan=plan,
        plan_digest=plan_digest,
        seeds=seeds,
        label=torch.tensor(indices) if options["label"] == "all" else indices[0] if indices else None,
        classes=[labels[i] for i in indices],
        dtype=dtype,
        device=device,
        columns=columns,
        scale=scale,
        shown=shown,
    )


def recipe(job: Job, evals: int, index: int | None = None) -> dict[str, Any]:
    """How the sheet, or one picture of it, was made; `options` are what to type to make it again."""
    plan = job.plan
    given = ("model", "sampler", "guidance", "dtype")
    options = {key: job.options[key] for key in given if job.options[key] is not None}
    if job.plan_digest is None:
        options |= {"sampler": plan.name, "steps": plan.steps}
        options |= {key: plan.meta[key] for key in ("grid", "chart", "eta") if key in plan.meta}
    if index is None:
        options["scale"] = job.scale
        options |= {"label": job.options["label"]} if job.options["label"] else {}
        if job.seeds == list(range(job.seeds[0], job.seeds[0] + len(job.seeds))):
            options |= {"seed": job.seeds[0], "n": len(job.seeds)}
        else:
            options["seeds"] = format_seeds(job.seeds)
    else:
        options |= {"seed": job.seeds[index], "n": 1}
        options |= {"label": job.classes[index]} if job.classes else {"label": "none"} if job.options["label"] else {}
    return {
        "version": pfode.__version__,
        "options": options,
        "model": {"name": job.options["model"], "digest": job.digest},
        "plan": job.plan_digest,
        "sampler": plan.name,
        "grid": plan.meta.get("grid"),
        "steps": plan.steps,
        "nfe": plan.nfe,
        "evals": evals,
        "shape": list(job.net.shape),
        "process": job.net.process.config(),
    }


def find_plan(options: dict[str, Any], net: Any) -> "tuple[Plan, str | None]":
    """The plan to run, and the digest of its file if it comes from one."""
    name = options["sampler"]
    if not name.endswith(".safetensors"):
        chosen = {key: options[key] for key in ("steps", "nfe", "grid", "chart", "eta")}
        return pfode.make_plan(name, process=net.process, **chosen), None
    plan = pfode.Plan.load(name)
    if plan.process != net.process:
        message = f"{name}: the plan was made for {plan.process}, the model has {net.process}"
        raise UsageError(message, "take a plan that was made for this model, or a name of `pfode samplers`")
    digest = read_header(name).metadata.get("pfode.digest", "")
    check_digest(options, "sampler", digest)
    return plan, digest


def find_labels(wanted: str | None, net: Any, n: int) -> list[int]:
    """The class of each picture by number; empty for none.

    Raises:
        UsageError: no such class, or a model without classes.
    """
    if wanted in (None, "none"):
        return []
    if wanted == "all" and net.labels:
        return [i % len(net.labels) for i in range(n)]
    return [net.label_index(wanted)] * n


def find_device(name: str) -> str:
    """The device to use.

    Raises:
        UsageError: no device of that name exists. MissingError: it is not on this machine.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps") or not re.fullmatch(r"[a-z]+(:\d{1,3})?", name):
        raise unknown("device", name, ("auto", "cpu", "cuda", "mps"))
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[kind]:
        raise MissingError(f"device {name!r} is not available on this machine", "--device cpu")
    if kind == "cuda" and ":" in name and int(name[5:]) >= torch.cuda.device_count():
        raise MissingError(f"device {name!r}: there are {torch.cuda.device_count()} GPUs", "--device cuda")
    return name


def check_outputs(out: str, trajectory: str | None, separate: str | None) -> None:
    """Find out before sampling whether the results can be written.

    Raises:
        UsageError: a name that no output can have. WriteError: a folder that takes no file.
    """
    if Path(out).suffix.lower() != ".png":
        raise UsageError(f"--out {out}: the sheet is a PNG", "--out sheet.png")
    if trajectory is not None:
        suffix = Path(trajectory).suffix.lower()
        if suffix not in (".gif", ".png", ".apng", ".webp"):
            raise UsageError(f"--trajectory {trajectory}: unknown kind {suffix!r}", "use .gif, .png or .webp")
        if os.path.realpath(trajectory) == os.path.realpath(out):
            raise UsageError(f"--trajectory and --out are the same file {out}", "give them different names")
    if separate is not None:
        for name in filter(None, (out, trajectory)):
            if _within(name, separate) and re.fullmatch(r"\d+\.png", Path(name).name):
                raise UsageError(f"{name} has the name of a picture of --separate", "give it another name")
        _check_writable(separate, "--separate", made=True)
    for option, name in (("--out", out), ("--trajectory", trajectory)):
        if name is not None:
            _check_writable(name, option, made=separate is not None and _within(name, separate))
        if name is not None and os.path.isdir(name):
            raise WriteError(f"{name}: is a folder", f"give {option} the name of a file")


def _within(name: str, folder: str) -> bool:
    return os.path.realpath(os.path.dirname(name) or ".") == os.path.realpath(folder)


def _check_writable(name: str, option: str, made: bool) -> None:
    """Whether a file `name` can be made; `made`: the folders above it will be, where they are missing."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(f"{name}.temporary")  # too long a name?
        folder = Path(name).parent
        while made and not os.path.exists(folder):
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WriteError(f"{name}: cannot be written: {error.strerror}", f"give {option} another place") from error


# ---- sampling and writing


class Progress:
    """A bar over the pictures, with their rate and the time left; the callback of `pfode.sample`."""

    def __init__(self, n: int, out: Output):
        self.bar = bar(out, n, unit=" pictures")
        self.visible = not self.bar.disable
        self.done = 0  # in the batches before

    def __call__(self, point: Any) -> None:
        self.bar.set_postfix_str(f"NFE {point.nfe}", refresh=False)
        self.bar.update(self.done + len(point.x) * point.step // point.steps - self.bar.n)
        if point.step == point.steps:
            self.done += len(point.x)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def non_finite(flaws: list[tuple[int, int, float]], job: Job, hint: str) -> NumericalError:
    """The error that names (seed, step, time) of the first few pictures that are not finite."""
    named = [f"seed {seed} after step {step} of {job.plan.steps}, t = {t:.6g}" for seed, step, t in flaws[:3]]
    more = [f"and {len(flaws) - 3} more"] if len(flaws) > 3 else []
    return NumericalError(f"{len(flaws)} of {len(job.seeds)} pictures not finite: {'; '.join(named + more)}", hint)


def write(job: Job, result: Any) -> list[str]:
    """Write everything that was asked for; the sheet comes first in the list and last on the disk."""
    from pfode.cli import images

    films = [write_film(job, result)] if job.options["trajectory"] is not None else []
    return [write_sheet(job, images.to_pixels(result.x), result.evals), *films]


def write_sheet(job: Job, pixels: "np.ndarray", evals: int) -> str:
    """Write the contact sheet of all pictures of the job."""
    from pfode.cli import images

    sheet = images.contact_sheet(pixels, job.scale, job.columns)
    write_atomic(job.options["out"], images.encode_png(sheet, recipe(job, evals)))
    return job.options["out"]


def write_film(job: Job, result: Any) -> str:
    """Write the animation of a result with its trajectory."""
    from pfode.cli import images

    path = job.options["trajectory"]
    frames = [_frame(job, result, k) for k in range(len(result.trajectory))]
    write_atomic(path, images.encode_animation(frames, Path(path).suffix.lower()))
    return path


def _frame(job: Job, result: Any, k: int) -> "np.ndarray":
    """Sheet of the states at node k, brought to the variance of the data, beside what the denoiser sees in them."""
    import numpy as np

    from pfode.cli import images

    level = math.hypot(*(float(level[job.plan.node][k]) for level in (job.plan.alpha, job.plan.sigma)))
    seen = result.preview[k] if k < len(result.preview) else result.x
    pixels = [images.to_pixels(x) for x in (result.trajectory[k] / level, seen)]
    views = [images.contact_sheet(part, job.scale, job.columns) for part in pixels]
    between = np.full_like(views[0][:, : 4 * images.GAP], 255)
    return np.concatenate([views[0], between, views[1]], axis=1)
