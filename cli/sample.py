"""pfode sample: draw pictures, write the sheet, say what was done."""

import contextlib
import functools
import hashlib
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import pfode
from pfode.cli.models import model_digest
from pfode.cli.options import Command, FileName, Finite
from pfode.cli.settings import (
    DTYPES,
    OF_THE_GUIDANCE,
    check_digest,
    format_seeds,
    format_set,
    is_adaptive,
    parse_interval,
    parse_seeds,
    parse_set,
    seed_range,
    settle,
)
from pfode.cli.streams import Output, bar, output
from pfode.errors import NumericalError, OtherModelWarning, UnsoundWarning, UsageError, WriteError, number
from pfode.files import write_atomic
from pfode.header import read_header
from pfode.scores.io.find import model_path
from pfode.scores.io.pictures import read_picture

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from pfode.plans.table import Plan
    from pfode.process import Process
    from pfode.samplers import Adaptive

SHEET = 100  # pictures of --separate that the contact sheet shows
OF_THE_MODEL = "model"


@click.command(cls=Command, name="sample")
@click.option(
    "--model",
    type=FileName(),
    default="emoji",
    show_default=True,
    metavar="NAME|FILE|FOLDER|ID",
    help="`pfode info models`, a file, a folder of diffusers, or owner/name on the hub.",
)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, metavar="N", help="Number of steps.")
@click.option("--nfe", type=click.IntRange(1), metavar="N", help="As many steps as fit in N denoiser calls.")
@click.option(
    "--sampler",
    type=FileName(),
    default="auto",
    show_default=True,
    metavar="NAME|PLAN",
    help="`pfode samplers`, or a plan file.",
)
@click.option(
    "--fitted/--no-fitted", default=True, help="Whether auto takes a plan fitted to the model, where there is one."
)
@click.option("--grid", metavar="NAME", help="Where the steps lie: karras, time, 'beta(0.5,0.7)' ...")
@click.option("--chart", metavar="NAME", help="Coordinates to step in, see `pfode samplers`.")
@click.option("--rtol", type=Finite(0, 1), metavar="X", help="How exactly the adaptive samplers solve: 1e-3, ...")
@click.option("--atol", type=Finite(0), metavar="X", help="The same for small values; goes with --rtol by itself.")
@click.option("--eta", type=Finite(0), metavar="X", help="Amount of noise of the samplers that take it.")
@click.option(
    "--set", multiple=True, metavar="NAME=VALUE", help="Another option of the sampler, see `pfode samplers NAME`."
)
@click.option(
    "--lower-order-final/--no-lower-order-final", default=False, help="The last steps of orders ..., 3, 2, 1."
)
@click.option(
    "--afs",
    type=Finite(0, word=OF_THE_MODEL),
    is_flag=False,
    flag_value=OF_THE_MODEL,
    metavar="[STD]",
    help="A first step without a call, as for Gaussian data of this deviation; by default what the model says.",
)
@click.option(
    "--brownian/--no-brownian", default=False, help="Noise from one path per seed, the same for any number of steps."
)
@click.option("--init", type=FileName(), metavar="PICTURE", help="Begin with this picture, noised.")
@click.option(
    "--strength",
    type=Finite(0, 1),
    default=0.6,
    show_default=True,
    metavar="X",
    help="The share of noise that --init is given; all steps are made from there.",
)
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
@click.option("--negative", metavar="NAME", help="Class to guide away from, instead of none.")
@click.option("--guidance-interval", metavar="LO,HI", help="Guide only where LO < sigma/alpha <= HI.")
@click.option(
    "--guidance-rescale", type=Finite(0, 1), metavar="X", help="How far to undo what guidance adds to the contrast."
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the network; the state stays float32 or better.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda|mps", help="Where to compute.")
@click.option("--batch", type=click.IntRange(1), metavar="N", help="Pictures at a time; changes no picture.")
@click.option(
    "--out", type=FileName(), default="sheet.png", show_default=True, metavar="FILE.png", help="The contact sheet."
)
@click.option("--scale", type=click.IntRange(1, 64), metavar="N", help="Enlarge each picture on the sheet.")
@click.option(
    "--separate",
    type=FileName(),
    metavar="DIR",
    help="Also every picture as a file, results.jsonl and run.json; continues there.",
)
@click.option("--overwrite", is_flag=True, help="Start --separate anew instead of continuing.")
@click.option(
    "--nan",
    type=click.Choice(["raise", "flag"]),
    default="raise",
    show_default=True,
    help="At a picture that is not finite: stop, or leave it out and exit with 5 at the end.",
)
@click.option("--trajectory", type=FileName(), metavar="FILE", help="Also an animation: .gif, .png or .webp.")
@click.option("--like", type=FileName(), metavar="FILE.png", help="Repeat the settings of a picture; flags still win.")
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
    from pfode.plans.table import foreign
    from pfode.samplers.sampling import unsound

    if options["separate"] is None and many.launched():
        raise UsageError("several processes share the pictures of a folder", "--separate DIR")
    job = prepare(options)
    plan, n = job.plan, len(job.seeds)
    if foreign(plan, job.net):
        out.note(f"{options['sampler']} was fitted to another model: a hand-made sampler may serve better")
        warnings.simplefilter("ignore", OtherModelWarning)
    if (text := unsound(plan)) is not None:
        out.note(text)
        warnings.simplefilter("ignore", UnsoundWarning)
    how = f"grid {plan.meta.get('grid', 'of the plan')}" if job.fixed else f"rtol {plan.meta['rtol']:g}"
    names = f"model {options['model']}, sampler {plan.name}, {how}"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        out.note(f"{names}, n {n}, seeds {format_seeds(job.seeds)}, device {job.device}")
    done = one_sheet(job, out) if options["separate"] is None else many.draw(job, out)
    if done is None:
        return
    drawn, seconds, cost = done.get("drawn", n), done["seconds"], done.pop("cost")
    mean = f" (on average {cost.mean:.1f})" if cost.each else ""
    out.note(f"steps {cost.steps}, NFE {cost.nfe}{mean}, evals {cost.evals} ({seconds:.2f} s)")
    summary = {
        "out": done["files"][0],
        "n": n,
        **cost.figures,
        **({"nfe_of_each": list(cost.each)} if cost.each else {}),
        **done,
        "images_per_second": drawn / seconds,
        "settings": settings(job, cost),
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
            seeds=job.seeds,
            **job.how,
            callback=progress if progress.visible and job.fixed else None,
            trajectory=job.options["trajectory"] is not None,
            nan=job.options["nan"],
        )
    seconds = time.perf_counter() - began
    files = write(job, result)
    if result.bad:
        raise non_finite(flaws(job, result), job, f"crossed out in {files[0]}; the other pictures are sound")
    return {"files": files, "cost": Cost.of(result), "seconds": seconds}


@dataclass(frozen=True)
class Cost:
    """What pictures took: steps, NFE and evals, the most where they differ, and then the NFE of each."""

    steps: int | None
    nfe: int | None
    evals: int | None
    each: tuple[int, ...] = ()

    @classmethod
    def of(cls, result: Any) -> "Cost":
        """That of a result."""
        each = result.stats.get("nfe")
        return cls(result.steps, result.nfe, result.evals, () if each is None else tuple(each.tolist()))

    @classmethod
    def over(cls, pictures: Sequence[dict[str, Any]]) -> "Cost":
        """That of pictures that differ, from what is known of each; of none at all nothing is known."""
        if not pictures:
            return cls(None, None, None)
        most = (max(picture[key] for picture in pictures) for key in ("steps", "nfe", "evals"))
        return cls(*most, each=tuple(picture["nfe"] for picture in pictures))

    @property
    def mean(self) -> float:
        """NFE per picture."""
        return sum(self.each) / len(self.each)

    @property
    def figures(self) -> dict[str, Any]:
        found = {"steps": self.steps, "nfe": self.nfe, "evals": self.evals}
        return found | ({"nfe_mean": self.mean} if len(self.each) > 1 else {})


@dataclass(frozen=True)
class Job:
    """What is to be drawn: the options, what they name, and the seeds."""

    options: dict[str, Any]
    net: Any  # guided
    model: Any  # as it was loaded
    plan: "Plan | Adaptive"
    init: "Tensor | None"
    digests: dict[str, str | None]  # of the files that model, sampler and init name
    device: "torch.device"
    seeds: list[int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one picture."""
        return picture_shape(self.model)

    def pixels(self, x: "Tensor") -> "np.ndarray":
        """The pictures of samples, or of states of the variance of data."""
        from pfode.cli import images

        decode = getattr(self.model, "decode", None)
        return images.to_pixels(x if decode is None else decode(x))

    @property
    def fixed(self) -> bool:
        """Whether all pictures have the same steps."""
        return isinstance(self.plan, pfode.Plan)

    @property
    def dtype(self) -> "torch.dtype":
        """Of the state."""
        import torch

        return torch.float64 if self.options["dtype"] == "fp64" else torch.float32

    @functools.cached_property
    def classes(self) -> list[int]:
        """The class of each picture by number; empty: unconditional."""
        return find_classes(self.options["label"], self.net, len(self.seeds))

    @property
    def how(self) -> dict[str, Any]:
        """How `pfode.sample` is to draw, apart from the seeds."""
        return {
            "plan": self.plan,
            "init": self.init,
            "label": self.classes or None,
            "batch": self.options["batch"],
            "dtype": self.dtype,
            "device": self.device,
            "brownian": self.options["brownian"],
        }

    @property
    def sheet(self) -> "Job":
        """The pictures on the sheet: all, or the first ones of --separate."""
        return self if self.options["separate"] is None else replace(self, seeds=self.seeds[:SHEET])

    @property
    def columns(self) -> int:
        """Of the sheet."""
        from pfode.cli import images

        classes = len(self.net.labels) if self.options["label"] == "all" else 0
        return images.sheet_columns(len(self.sheet.seeds), classes)

    @property
    def scale(self) -> int:
        """Of the pictures on the sheet."""
        from pfode.cli import images

        _, height, width = self.shape
        return self.options["scale"] or images.default_scale(len(self.sheet.seeds), height, width, self.columns)


def prepare(options: dict[str, Any]) -> Job:
    """Load model and plan, resolve the rest. Everything that can be wrong is found here, before sampling.

    Raises:
        PfodeError: an option that the model, the plan or the machine cannot carry out.
    """
    import torch

    from pfode.cli import images
    from pfode.samplers.sampling import find_device

    device = find_device(options["device"])
    path = model_path(options["model"])
    net: Any = pfode.load(path)
    if hasattr(net, "decode"):
        net = net.to(device)
    if options["dtype"]:
        net = net.to(dtype=getattr(torch, DTYPES[options["dtype"]]))
    digests: dict[str, str | None] = {"sampler": None, "init": None}
    digests["model"] = model_digest(path)
    check_digest(options, "model", digests["model"])
    shape, model = picture_shape(net), net
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UsageError(
            f"model {options['model']!r}: samples of shape {shape} are no pictures", "use pfode.sample in Python"
        )
    if options["label"] is None and net.labels:
        options = {**options, "label": "all"}
    find_classes(options["label"], net, 1)  # raises where there is no such class
    net = guided(options, net)
    plan, digests["sampler"] = find_plan(options, net)
    if options["trajectory"] is not None and not isinstance(plan, pfode.Plan):
        problem = f"--trajectory: {plan.name} chooses its own steps for every picture: they share no frames"
        raise UsageError(problem, "leave it out, or a sampler of fixed steps")
    if options["brownian"] and not plan.stochastic:
        raise UsageError(f"--brownian: {plan.name} draws no noise", "leave it out, or see the samplers that do")
    init = None
    if options["init"] is not None:
        if shape != model.shape:
            raise UsageError(f"--init: model {options['model']!r} draws latents, not pictures", "leave --init out")
        raw = read_picture(options["init"])
        init = images.from_picture(options["init"], raw, shape)
        digests["init"] = hashlib.sha256(raw).hexdigest()
        check_digest(options, "init", digests["init"])
    n = options["n"] or (len(net.labels) if options["label"] == "all" and net.labels else 16)
    seeds = parse_seeds(options["seeds"]) if options["seeds"] is not None else seed_range(options["seed"], n)
    job = Job(options, net, model, plan, init, digests, device, seeds)
    shown = len(job.sheet.seeds)
    size = images.sheet_size(shown, *shape[1:], job.scale, job.columns)
    frames = plan.steps + 1 if options["trajectory"] is not None and isinstance(plan, pfode.Plan) else 0
    if size[0] * size[1] * frames > 4 * images.MAX_PIXELS:
        frames = f"{frames} frames of twice {size[1]} x {size[0]} pixels"
        raise UsageError(f"--trajectory: {frames} are too many", "a smaller --n or --scale")
    return job


def picture_shape(net: Any) -> tuple[int, ...]:
    """The shape of one picture of a model."""
    return tuple(getattr(net, "picture_shape", net.shape) or ())


def settings(job: Job, cost: Cost, index: int | None = None) -> dict[str, Any]:
    """How the sheet, or one picture of it, was made; `options` are what to type to make it again."""
    plan = job.plan
    given = ("model", "sampler", "init", "guidance", *OF_THE_GUIDANCE, "dtype")
    options = {key: job.options[key] for key in given if job.options[key] is not None}
    if job.options["brownian"]:
        options["brownian"] = True
    if job.options["sampler"] == "auto" and job.digests["sampler"] is not None:
        options["steps"] = plan.steps
    elif job.digests["sampler"] is None:
        options |= {"sampler": plan.name}
        if isinstance(plan, pfode.Plan):
            free = "afs" in plan.meta  # a step, too, but none that the plan has to make
            options |= {"steps": plan.steps + free}
        recorded = ("grid", "chart", "eta", "lower_order_final", "afs", "rtol", "atol")
        options |= {key: plan.meta[key] for key in recorded if key in plan.meta}
        own = format_set(plan.meta)
        options |= {"set": own} if own else {}
        options |= {"strength": job.options["strength"]} if job.init is not None else {}
    if index is None:
        options["scale"] = job.scale
        options |= {"label": job.options["label"]} if job.options["label"] else {}
        if job.seeds == list(range(job.seeds[0], job.seeds[0] + len(job.seeds))):
            options |= {"seed": job.seeds[0], "n": len(job.seeds)}
        else:
            options["seeds"] = format_seeds(job.seeds)
    else:
        options |= {"seed": job.seeds[index], "n": 1}
        if job.options["label"]:
            options["label"] = job.net.labels[job.classes[index]] if job.classes else "none"
    return {
        "version": pfode.__version__,
        "options": options,
        "model": {"name": job.options["model"], "digest": job.digests["model"]},
        "plan": job.digests["sampler"],
        "init": job.digests["init"],
        "sampler": plan.name,
        "grid": plan.meta.get("grid"),
        **cost.figures,
        "shape": list(job.shape),
        "process": job.net.process.config(),
    }


def find_plan(options: dict[str, Any], net: Any) -> "tuple[Plan | Adaptive, str | None]":
    """The plan or the adaptive sampler to run, and the digest of its file if it comes from one."""
    from pfode.samplers.sampling import settled

    name = options["sampler"]
    if not name.endswith(".safetensors"):
        if is_adaptive(name):
            chosen = {key: options[key] for key in ("chart", "rtol", "atol")}
        else:
            chosen = {key: options[key] for key in ("steps", "nfe", "grid", "chart", "eta", "lower_order_final")}
            chosen |= {"afs": data_std(options, net), **parse_set(options["set"])}
        if options["init"] is not None:
            chosen["start"] = start(net.process, options["strength"])
        plan = settled(net, name, fitted=options["fitted"], **chosen)
        if isinstance(plan, pfode.Plan) and "fitted" in plan.meta:
            return plan, checked_digest(options, net.plans.files[plan.nfe])
        return plan, None
    plan = pfode.Plan.load(name)
    if plan.process != net.process:
        message = f"{name}: the plan was made for {plan.process}, the model has {net.process}"
        raise UsageError(message, "take a plan that was made for this model, or a name of `pfode samplers`")
    return plan, checked_digest(options, name)


def checked_digest(options: dict[str, Any], plan: str | Path) -> str:
    """The digest of a plan's file, which must be the one that the options were recorded with, if they were."""
    digest = read_header(plan).metadata.get("pfode.digest", "")
    check_digest(options, "sampler", digest)
    return digest


def data_std(options: dict[str, Any], net: Any) -> float | None:
    """The deviation of the data that --afs is to assume."""
    if options["afs"] != OF_THE_MODEL:
        return options["afs"]
    found = getattr(net, "data_std", None)
    if found is None:
        raise UsageError(f"--afs: model {options['model']!r} does not say how its data are spread", "--afs 0.5")
    return found


def start(process: "Process", strength: float) -> float | None:
    """The time at which sigma / (alpha + sigma), the share of noise, is the strength; None for the first one."""
    lowest = process.sigma(process.t_min) / (process.alpha(process.t_min) + process.sigma(process.t_min))
    if strength < lowest:
        raise UsageError(f"--strength {strength:g}: the model knows no noise below {lowest:.2g}", "--strength 0.6")
    if strength == 1:
        return None
    return min(process.time(2 * math.log(1 / strength - 1)), process.t_max)


def guided(options: dict[str, Any], net: Any) -> Any:
    """The network under the guidance that is asked for.

    Raises:
        UsageError: no class to guide to, or guidance that cannot be.
    """
    from pfode.samplers.sampling import MAX_GUIDANCE
    from pfode.scores import guide

    if options["guidance"] is None:
        return net
    scale = number("--guidance", options["guidance"], -MAX_GUIDANCE, MAX_GUIDANCE)
    if scale not in (0, 1) and options["label"] in (None, "none"):
        raise UsageError(f"--guidance {scale:g} needs a class to guide to", "--label all")
    interval = None if options["guidance_interval"] is None else parse_interval(options["guidance_interval"])
    rescale = options["guidance_rescale"] or 0.0
    return guide(net, scale, negative=options["negative"], interval=interval, rescale=rescale)


def find_classes(wanted: str | None, net: Any, n: int) -> list[int]:
    """The class of each picture by number; empty for none.

    Raises:
        UsageError: no such class, or a model without classes.
    """
    if wanted in (None, "none"):
        return []
    if wanted == "all" and net.labels:
        return [i % len(net.labels) for i in range(n)]
    return [net.label_index(wanted)] * n


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


def flaw(job: Job, seed: int, step: int, t: float, why: str | None = None) -> str:
    """Where a picture was lost, and, of an adaptive sampler, why."""
    of = f" of {job.plan.steps}" if isinstance(job.plan, pfode.Plan) else ""
    return f"seed {seed} after step {step}{of}, t = {t:.6g}" + (f": {why}" if why else "")


def flaws(job: Job, result: Any) -> list[str]:
    """The same of every picture that a result lost."""
    return [flaw(job, result.seeds[bad.index], bad.step, bad.time, bad.why) for bad in result.bad]


def non_finite(lost: list[str], job: Job, hint: str) -> NumericalError:
    """The error that names the first few pictures that are not finite."""
    more = [f"and {len(lost) - 3} more"] if len(lost) > 3 else []
    return NumericalError(f"{len(lost)} of {len(job.seeds)} pictures not finite: {'; '.join(lost[:3] + more)}", hint)


def write(job: Job, result: Any) -> list[str]:
    """Write everything that was asked for; the sheet comes first in the list and last on the disk."""
    films = [write_film(job, result)] if job.options["trajectory"] is not None else []
    return [write_sheet(job, job.pixels(result.x), Cost.of(result)), *films]


def write_sheet(job: Job, pixels: "np.ndarray", cost: Cost) -> str:
    """Write the contact sheet of all pictures of the job."""
    from pfode.cli import images

    sheet = images.contact_sheet(pixels, job.scale, job.columns)
    write_atomic(job.options["out"], images.encode_png(sheet, settings(job, cost)))
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

    plan: Any = job.plan
    level = math.hypot(*(float(level[plan.node][k]) for level in (plan.alpha, plan.sigma)))
    seen = result.preview[k] if k < len(result.preview) else result.x
    pixels = [job.pixels(x) for x in (result.trajectory[k] / level, seen)]
    views = [images.contact_sheet(part, job.scale, job.columns) for part in pixels]
    between = np.full_like(views[0][:, : 4 * images.GAP], 255)
    return np.concatenate([views[0], between, views[1]], axis=1)
