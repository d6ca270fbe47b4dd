"""What `pfode sample` is to draw: its options as a model, a plan, seeds and pictures, checked before any work."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pfode
from pfode.cli.model_option import choose
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
)
from pfode.errors import UsageError
from pfode.header import read_header
from pfode.scores.io.pictures import read_picture

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from pfode.plans.table import Plan
    from pfode.samplers import Adaptive

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
class Job:
    """A run of `pfode sample`: the options, the model, plan and picture that they name, and the seeds."""

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
        """The shape of one picture: (channels, height, width)."""
        return picture_shape(self.model)

    def pixels(self, x: "Tensor") -> "np.ndarray":
        """Samples (n, ...) as pictures, uint8 (n, height, width[, 3]); latents are decoded."""
        from pfode.cli import images

        decode = getattr(self.model, "decode", None)
        return images.to_pixels(x if decode is None else decode(x))

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

        found = classes(self.net, _label(self.options), len(self.seeds))
        return [] if found is None else found.tolist()

    @property
    def how(self) -> dict[str, Any]:
        """The arguments of `pfode.sample`, apart from the seeds."""
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
        """The job of the pictures on the sheet: all of them, or with --separate the first hundred."""
        return self if self.options["separate"] is None else replace(self, seeds=self.seeds[:SHEET])

    @property
    def columns(self) -> int:
        """The number of columns of the sheet."""
        from pfode.cli import images

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
    if options["label"] is None and labels(model):
        options = {**options, "label": "all"}
    classes(model, _label(options), 1)  # raises where there is no such class
    net = guided(options, model)
    plan, plan_digest = find_plan(options, net)
    init, init_digest = read_init(options, model)
    n = options["n"] or images.usual_count(drawn_classes(net, options), *picture_shape(model)[1:])
    n = n or usual_count(net, options["label"])
    seeds = parse_seeds(options["seeds"]) if options["seeds"] is not None else seed_range(options["seed"], n)
    digests = {"model": digest, "sampler": plan_digest, "init": init_digest}
    job = Job(options, net, model, plan, init, digests, device, seeds)
    check_pictures(job)
    return job


def load_model(options: dict[str, Any], device: "torch.device") -> tuple[Any, str | None]:
    """The model in its precision, with its digest; its autoencoder, if it has one, on the device.

    Raises:
        PfodeError: as `choose`. FileError: not the model of --like. UsageError: its samples are no pictures.
    """
    import torch

    chosen = choose(options["model"])
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


def read_init(options: dict[str, Any], model: Any) -> "tuple[Tensor | None, str | None]":
    """The picture of --init as a sample of the model, with its digest; None without it.

    Raises:
        UsageError: a model of latents. FileError: no picture, or not that of --like.
    """
    from pfode.cli import images

    if options["init"] is None:
        return None, None
    shape = picture_shape(model)
    if shape != tuple(model.shape):
        raise UsageError(f"--init: model {options['model']!r} draws latents, not pictures", "leave --init out")
    raw = read_picture(options["init"])
    init = images.from_picture(options["init"], raw, shape)
    digest = hashlib.sha256(raw).hexdigest()
    check_digest(options, "init", digest)
    return init, digest


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
    given = ("model", "sampler", "init", "guidance", *OF_THE_GUIDANCE, "dtype")
    options = {key: job.options[key] for key in given if job.options[key] is not None}
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
            options["label"] = labels(job.net)[job.classes[index]] if job.classes else "none"
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


def guided(options: dict[str, Any], net: Any) -> Any:
    """The model under --guidance, --negative, --guidance-interval and --guidance-rescale.

    Raises:
        UsageError: no class to guide to, or guidance that cannot be.
    """
    from pfode.scores import guide

    scale = options["guidance"]
    if scale is None:
        return net
    if scale not in (0, 1) and labels(net) and options["label"] == "none":
        raise UsageError(f"--guidance {scale:g} needs a class to guide to", "--label all")
    interval = None if options["guidance_interval"] is None else parse_interval(options["guidance_interval"])
    rescale = options["guidance_rescale"] or 0.0
    return guide(net, scale, negative=options["negative"], interval=interval, rescale=rescale)
