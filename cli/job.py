"""What `pfode sample` is to draw: its options as a model, a plan, seeds and pictures, checked before any work."""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pfode
from pfode import defaults
from pfode.cli.models import model_digest
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
from pfode.errors import UsageError, number
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

__all__ = ["OF_THE_MODEL", "Cost", "Job", "prepare", "settings"]

SHEET = 100  # pictures of --separate that the contact sheet shows
OF_THE_MODEL = "model"  # --afs without a value


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
    from pfode.samplers.settle import find_device

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
    n = options["n"] or (len(net.labels) if options["label"] == "all" and net.labels else defaults.SAMPLES)
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
    from pfode.samplers.settle import settled

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
    from pfode.samplers.settle import MAX_GUIDANCE
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
