"""What `pfode sample` is to draw: its options as a model, a plan, seeds and pictures, checked before any work."""

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pfode
from pfode.cli.model_option import choose
from pfode.cli.prompts import OF_THE_PROMPT, format_size, load_words
from pfode.cli.settings import (
    DTYPES,
    OF_THE_GUIDANCE,
    check_digest,
    flag,
    format_seeds,
    format_set,
    is_adaptive,
    parse_interval,
    parse_seeds,
    parse_set,
    seed_range,
)
from pfode.errors import UsageError
from pfode.header import read_header
from pfode.scores.io.pictures import read_picture

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from pfode.plans.table import Plan
    from pfode.samplers import Adaptive, Samples
    from pfode.samplers.request import Keep

__all__ = ["OF_THE_MODEL", "Cost", "Job", "prepare", "settings"]

SHEET = 100  # pictures of --separate that the contact sheet shows
OF_THE_MODEL = "model"  # --afs without a value


@dataclass(frozen=True)
class Cost:
    """What pictures cost: steps, denoiser calls (NFE) and network evaluations (evals).

    Where pictures differ, which those of adaptive samplers do, these are the most, and `each` holds the NFE of each.
    """

    steps: int | None
    nfe: int | None
    evals: int | None
    each: tuple[int, ...] = ()

    @classmethod
    def of(cls, result: Any) -> "Cost":
        """The cost of a `Samples`."""
        each = result.stats.get("nfe")
        return cls(result.steps, result.nfe, result.evals, () if each is None else tuple(each.tolist()))

    @classmethod
    def over(cls, pictures: Sequence[dict[str, Any]]) -> "Cost":
        """The cost of pictures that differ, each given by its "steps", "nfe" and "evals"; all None for no pictures."""
        if not pictures:
            return cls(None, None, None)
        most = (max(picture[key] for picture in pictures) for key in ("steps", "nfe", "evals"))
        return cls(*most, each=tuple(picture["nfe"] for picture in pictures))

    @property
    def mean(self) -> float:
        """The mean NFE of the pictures."""
        return sum(self.each) / len(self.each)

    @property
    def figures(self) -> dict[str, Any]:
        found = {"steps": self.steps, "nfe": self.nfe, "evals": self.evals}
        return found | ({"nfe_mean": self.mean} if len(self.each) > 1 else {})


@dataclass(frozen=True)
class Start:
    """What --init and --mask are.

    Args:
        init, mask: as samples of the model, see `pfode.sample`; picture, hole: as pictures (channels, height, width)
            and (1, height, width), where samples are latents.
    """

    init: "Tensor | None" = None
    mask: "Tensor | None" = None
    picture: "Tensor | None" = None
    hole: "Tensor | None" = None

    def kept(self, pictures: "Tensor") -> "Tensor":
        """Pictures (n, channels, height, width) with what is kept put back, which decoding changes."""
        if self.picture is None or self.hole is None:
            return pictures
        return self.picture.to(pictures).lerp(pictures, self.hole.to(pictures))


@dataclass(frozen=True)
class Job:
    """A run of `pfode sample`: the options, the model, plan and picture that they name, and the seeds."""

    options: dict[str, Any]
    net: Any  # guided
    model: Any  # as it was loaded
    plan: "Plan | Adaptive"
    start: "Start"
    digests: dict[str, str | None]  # of the files that model, sampler, init and mask name
    device: "torch.device"
    seeds: list[int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one picture: (channels, height, width)."""
        return picture_shape(self.model)

    def pixels(self, x: "Tensor") -> "np.ndarray":
        """Samples (n, ...) as pictures, uint8 (n, height, width[, 3]); latents are decoded."""
        from pfode.cli import images

        return images.to_pixels(decoded(self.model, x))

    def pictures(self, x: "Tensor") -> "np.ndarray":
        """The same of samples at the end, where what --mask keeps is that of --init to the pixel."""
        from pfode.cli import images

        return images.to_pixels(self.start.kept(decoded(self.model, x)))

    @property
    def fixed(self) -> bool:
        """Whether all pictures have the same steps."""
        return isinstance(self.plan, pfode.Plan)

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of the state."""
        import torch

        return torch.float64 if self.options["dtype"] == "fp64" else torch.float32

    @functools.cached_property
    def classes(self) -> list[int]:
        """The class of each picture by number; none without classes."""
        from pfode.samplers.settle import classes

        if self.options["prompt"]:
            return [i % len(self.options["prompt"]) for i in range(len(self.seeds))]
        found = classes(self.net, _label(self.options), len(self.seeds))
        return [] if found is None else found.tolist()

    def draw(self, keep: "Keep", some: Sequence[int] | None = None, labels: Sequence[str] | None = None) -> "Samples":
        """Draw pictures: see `batches`."""
        from pfode.samplers.sampling import joined

        return joined(self.batches(keep, some, labels), self.plan)

    def batches(
        self, keep: "Keep", some: Sequence[int] | None = None, labels: Sequence[str] | None = None
    ) -> "Iterator[Samples]":
        """Draw the pictures of some indices, or all, batch by batch; `labels` replace their classes."""
        from pfode.samplers.request import Beginning, Place
        from pfode.samplers.sampling import batches
        from pfode.samplers.settle import prepared

        some = range(len(self.seeds)) if some is None else some
        label = labels or ([self.classes[i] for i in some] if self.classes else None)
        start, brownian = self.start, self.options["brownian"]
        beginning = Beginning(init=start.init, mask=start.mask, label=label, brownian=brownian)
        net, place = prepared(self.net, None, self.device), Place(self.options["batch"], self.dtype, self.device)
        return batches(net, self.plan, [self.seeds[i] for i in some], beginning, place, keep)

    @property
    def sheet(self) -> "Job":
        """The job of the pictures on the sheet: all of them, or with --separate the first hundred."""
        return self if self.options["separate"] is None else replace(self, seeds=self.seeds[:SHEET])

    @property
    def columns(self) -> int:
        """The number of columns of the sheet."""
        from pfode.cli import images

        if self.options["text"] is not None:
            return max(1, math.isqrt(len(self.seeds)))
        return images.sheet_columns(len(self.sheet.seeds), drawn_classes(self.net, self.options))

    @property
    def scale(self) -> int:
        """How many times the pictures are enlarged on the sheet."""
        from pfode.cli import images

        _, height, width = self.shape
        return self.options["scale"] or images.default_scale(len(self.sheet.seeds), height, width, self.columns)


def prepare(options: dict[str, Any]) -> Job:
    """The job that the options describe. Everything that can be wrong is found here, before anything is drawn.

    Raises:
        PfodeError: an option that the model, the plan or the machine cannot carry out.
    """
    from pfode.cli import images
    from pfode.samplers.settle import classes, find_device, usual_count

    device = find_device(options["device"])
    model, digest = load_model(options, device)
    if options["prompt"]:  # what the pipeline settled
        options = {**options, "guidance": model.guidance, "size": format_size(picture_shape(model))}
    if options["text"] is not None:
        from pfode.cli.typeset import check_text

        check_text(options["text"], options["model"], tuple(labels(model)))
        options = {**options, "label": "all", "n": options["n"] or 1}
    elif options["label"] is None and labels(model):
        options = {**options, "label": "all"}
    classes(model, _label(options), 1)  # raises where there is no such class
    net = guided(options, model)
    plan, plan_digest = find_plan(options, net)
    start, found = read_start(options, model)
    n = options["n"] or images.usual_count(drawn_classes(net, options), *picture_shape(model)[1:])
    n = n or usual_count(net, options["label"])
    seeds = parse_seeds(options["seeds"]) if options["seeds"] is not None else seed_range(options["seed"], n)
    digests = {"model": digest, "sampler": plan_digest, **found}
    job = Job(options, net, model, plan, start, digests, device, seeds)
    check_pictures(job)
    return job


def load_model(options: dict[str, Any], device: "torch.device") -> tuple[Any, str | None]:
    """The model in its precision, with its digest; its autoencoder, if it has one, on the device.

    Raises:
        PfodeError: as `choose`. FileError: not the model of --like. UsageError: its samples are no pictures.
    """
    import torch

    words = load_words(options, options["guidance"])
    chosen = choose(
        options["model"], words=words, device=device, dtype=getattr(torch, DTYPES[options["dtype"] or "fp32"])
    )
    model: Any = chosen.denoiser
    if hasattr(model, "decode"):
        model = model.to(device)
    if options["dtype"]:
        if not hasattr(model, "to"):
            raise UsageError(f"--dtype: {type(model).__name__} has no .to(dtype=...)", "leave it out")
        model = model.to(dtype=getattr(torch, DTYPES[options["dtype"]]))
    digest = chosen.digest
    check_digest(options, "model", digest)
    shape = picture_shape(model)
    if not shape:
        problem = f"model {options['model']!r}: does not say the shape of its samples"
        raise UsageError(problem, "pfode.Denoiser(..., shape=(3, 32, 32)), or an attribute `shape`")
    if len(shape) != 3 or shape[0] not in (1, 3):
        problem = f"model {options['model']!r}: samples of shape {shape} are no pictures"
        raise UsageError(problem, "use pfode.sample in Python")
    return model, digest


def read_start(options: dict[str, Any], model: Any) -> tuple[Start, dict[str, str | None]]:
    """The pictures of --init and --mask for a model, and their digests.

    Raises:
        UsageError: a model whose latents no picture can be turned into. FileError: no picture, not that of --like, or
            two of different sides.
    """
    from pfode.cli import images

    if options["init"] is None:
        return Start(), {"init": None}
    shape = picture_shape(model)
    latent = shape != tuple(model.shape)
    if latent and not hasattr(model, "encode"):
        raise UsageError(f"--init: model {options['model']!r} draws latents, not pictures", "leave --init out")
    raw, digests = read_picture(options["init"]), {}
    digests["init"] = hashlib.sha256(raw).hexdigest()
    picture = images.from_picture(options["init"], raw, shape)
    hole = None
    if options["mask"] is not None:
        white = read_picture(options["mask"])
        digests["mask"] = hashlib.sha256(white).hexdigest()
        images.check_sides(options["init"], raw, options["mask"], white)
        hole = (images.from_picture(options["mask"], white, (1, *shape[1:])) + 1) / 2
    for key, digest in digests.items():
        check_digest(options, key, digest)
    if not latent:
        return Start(picture, hole), digests
    init = model.encode(picture[None].to(model.device))[0].cpu()
    return Start(init, None if hole is None else model.cells(hole), picture, hole), digests


def check_pictures(job: Job) -> None:
    """Find out whether the sheet and the animation can be made.

    Raises:
        UsageError: too many pixels, an animation of an adaptive sampler, or a Brownian path without noise.
    """
    from pfode.cli import images

    plan, animated = job.plan, job.options["trajectory"] is not None
    if animated and not isinstance(plan, pfode.Plan):
        problem = f"--trajectory: {plan.name} chooses its own steps for every picture: they share no frames"
        raise UsageError(problem, "leave it out, or a sampler of fixed steps")
    if job.options["brownian"] and not plan.stochastic:
        raise UsageError(f"--brownian: {plan.name} draws no noise", "leave it out, or see the samplers that do")
    _, height, width = job.shape
    height, width = images.sheet_size(len(job.sheet.seeds), height, width, job.scale, job.columns)
    frames = plan.steps + 1 if animated and isinstance(plan, pfode.Plan) else 0
    if height * width * frames > 4 * images.MAX_PIXELS:
        problem = f"--trajectory: {frames} frames of twice {width} x {height} pixels are too many"
        raise UsageError(problem, "a smaller --n or --scale")


def _label(options: dict[str, Any]) -> str | None:
    """The label as Python has it: None for no class."""
    return None if options["label"] == "none" else options["label"]


def decoded(model: Any, x: "Tensor") -> "Tensor":
    """Samples (n, ...) of a model as pictures."""
    decode = getattr(model, "decode", None)
    return x if decode is None else decode(x)


def picture_shape(net: Any) -> tuple[int, ...]:
    """The shape of one picture of a model."""
    return tuple(getattr(net, "picture_shape", None) or getattr(net, "shape", None) or ())


def labels(net: Any) -> Sequence[str]:
    """The names of a model's classes; none without classes."""
    return getattr(net, "labels", None) or ()


def drawn_classes(net: Any, options: dict[str, Any]) -> int:
    """How many classes are drawn in turn; 0 for a single one, or none."""
    return len(labels(net)) if options["label"] == "all" else 0


def settings(job: Job, cost: Cost, index: int | None = None) -> dict[str, Any]:
    """The settings that a PNG keeps: of the sheet, or of the picture of this index.

    Its "options" are what to type to make it again.
    """
    plan = job.plan
    given = ("model", "sampler", "init", "mask", "guidance", *OF_THE_GUIDANCE, "dtype")
    options = {key: job.options[key] for key in given if job.options[key] is not None}
    if job.options["prompt"]:
        options |= _of_the_prompt(job, index)
    if job.options["brownian"]:
        options["brownian"] = True
    fitted = job.options["sampler"] == "auto" and job.digests["sampler"] is not None
    if fitted and isinstance(plan, pfode.Plan):
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
        options |= {"strength": job.options["strength"]} if job.start.init is not None else {}
    if index is None:
        options["scale"] = job.scale
        if job.options["text"] is not None:
            options["text"] = job.options["text"]
        elif job.options["label"] and not job.options["prompt"]:
            options["label"] = job.options["label"]
        if job.seeds == list(range(job.seeds[0], job.seeds[0] + len(job.seeds))):
            options |= {"seed": job.seeds[0], "n": len(job.seeds)}
        else:
            options["seeds"] = format_seeds(job.seeds)
    else:
        options |= {"seed": job.seeds[index], "n": 1}
        if job.options["label"] and not job.options["prompt"]:
            options["label"] = labels(job.net)[job.classes[index]] if job.classes else "none"
    return {
        "version": pfode.__version__,
        "options": options,
        "model": {"name": job.options["model"], "digest": job.digests["model"]},
        "plan": job.digests["sampler"],
        "init": job.digests["init"],
        **({"mask": job.digests["mask"]} if "mask" in job.digests else {}),
        "sampler": plan.name,
        "grid": plan.meta.get("grid"),
        **cost.figures,
        "shape": list(job.shape),
        "process": job.net.process.config(),
    }


def _of_the_prompt(job: Job, index: int | None) -> dict[str, Any]:
    """The options of the prompts, of the sheet or of the picture of an index."""
    prompts = job.options["prompt"]
    found: dict[str, Any] = {"prompt": [*prompts] if index is None else [prompts[job.classes[index]]]}
    return found | {key: job.options[key] for key in OF_THE_PROMPT if job.options[key]}


def find_plan(options: dict[str, Any], net: Any) -> "tuple[Plan | Adaptive, str | None]":
    """The plan or the adaptive sampler of --sampler, and the digest of its file if it comes from one."""
    from pfode.samplers.settle import data_std, settled, start_time

    name = options["sampler"]
    if not name.endswith(".safetensors"):
        if is_adaptive(name):
            chosen = {key: options[key] for key in ("chart", "rtol", "atol")}
        else:
            chosen = {key: options[key] for key in ("steps", "nfe", "grid", "chart", "eta", "lower_order_final")}
            afs = True if options["afs"] == OF_THE_MODEL else options["afs"]
            chosen |= {"afs": data_std(net, afs), **parse_set(options["set"])}
        if options["init"] is not None:
            chosen["start"] = start_time(net.process, options["strength"])
        plan = settled(net, name, fitted=options["fitted"], **chosen)
        if isinstance(plan, pfode.Plan) and "fitted" in plan.meta:
            files = getattr(net.plans, "files", {})
            return plan, checked_digest(options, files[plan.nfe]) if plan.nfe in files else None
        return plan, None
    plan = pfode.Plan.load(name)
    if plan.process != net.process:
        message = f"{name}: the plan was made for {plan.process}, the model has {net.process}"
        raise UsageError(message, "take a plan that was made for this model, or a name of `pfode samplers`")
    return plan, checked_digest(options, name)


def checked_digest(options: dict[str, Any], plan: str | Path) -> str:
    """The digest of a plan's file.

    Raises:
        FileError: --like was made with another plan.
    """
    digest = read_header(plan).metadata.get("pfode.digest", "")
    check_digest(options, "sampler", digest)
    return digest


def guided_prompts(options: dict[str, Any], net: Any) -> Any:
    """The model under its prompts, guided as it is by itself, or by --guidance-interval and --guidance-rescale.

    Raises:
        UsageError: there is no classifier-free guidance that these could change.
    """
    from pfode.scores import guide

    given = [key for key in OF_THE_GUIDANCE if options[key] is not None]
    if not given:
        return net
    if not net.net.guided:
        hint = "--guidance above 1; of Flux --true-cfg 4 --negative-prompt TEXT"
        raise UsageError(f"{flag(given[0])}: there is no classifier-free guidance here", hint)
    interval = None if options["guidance_interval"] is None else parse_interval(options["guidance_interval"])
    return guide(net.guided(1.0), net.net.scale, interval=interval, rescale=options["guidance_rescale"] or 0.0)


def guided(options: dict[str, Any], net: Any) -> Any:
    """The model under --guidance, --negative, --guidance-interval and --guidance-rescale.

    Raises:
        UsageError: no class to guide to, or guidance that cannot be.
    """
    from pfode.scores import guide

    if options["prompt"]:
        return guided_prompts(options, net)
    scale = options["guidance"]
    if scale is None:
        return net
    if scale not in (0, 1) and labels(net) and options["label"] == "none":
        raise UsageError(f"--guidance {scale:g} needs a class to guide to", "--label all")
    interval = None if options["guidance_interval"] is None else parse_interval(options["guidance_interval"])
    rescale = options["guidance_rescale"] or 0.0
    return guide(net, scale, negative=options["negative"], interval=interval, rescale=rescale)
