"""pfode bench: measure samplers on models, write the folder with its report."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from pfode import defaults
from pfode.cli.model_option import choose, model_option
from pfode.cli.options import Command, FileName, Finite
from pfode.cli.progress import CellBar
from pfode.cli.prompts import load_words, prompt_options
from pfode.cli.settings import listed
from pfode.cli.streams import output
from pfode.cli.trust import CodeOption, import_name, names_code, trust_option
from pfode.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from pfode.denoiser import Denoiser
    from pfode.samplers.measure.metrics import Features
    from pfode.samplers.measure.problem import Problem

__all__ = ["command"]

SAMPLERS = ("auto", "ddim", "dpm++2m?grid=best", "ipndm3?grid=best", "unipc2?chart=dpm++/flow&grid=best")
EVALS = ",".join(map(str, defaults.Bench.EVALS))


@click.command(cls=Command, name="bench")
@model_option(
    "Model, guided as in avatars@2; an exact problem: gaussian-16, mixture-64-vp, mixture-64~0.1, digits-ideal; "
    "or a denoiser of your own, or a function that makes one.",
    multiple=True,
)
@prompt_options
@click.option(
    "--guidance",
    type=Finite(-defaults.MAX_GUIDANCE, defaults.MAX_GUIDANCE),
    metavar="W",
    help="Scale of guidance of --prompt; other models take NAME@W.",
)
@click.option(
    "--sampler",
    multiple=True,
    type=FileName(),
    default=SAMPLERS,
    metavar="TEXT",
    help="A sampler with options, alternatives separated by slashes: 'ipndm3?chart=ddim/trig&grid=best'; "
    "'ipndm3?grid=gits'; a plan file or a folder of them; diffusers:CLASS; k-diffusion:sample_NAME.",
)
@click.option("--nfe", default=EVALS, metavar="LIST", help="Numbers of network evaluations per sample.")
@click.option("--n", type=click.IntRange(2), default=defaults.Bench.SAMPLES, metavar="N", help="Number of samples.")
@click.option(
    "--seed",
    type=click.IntRange(0),
    metavar="N",
    help=f"Seed of the first sample.  [default: {defaults.Bench.SEED}]",
)
@click.option(
    "--validation",
    type=click.IntRange(2),
    default=defaults.Bench.VALIDATION,
    metavar="N",
    help="Number of other samples, on which alternatives are chosen.",
)
@click.option(
    "--teacher",
    type=click.IntRange(0),
    default=defaults.Bench.TEACHER,
    metavar="N",
    help="Most evaluations of the converged solution; 0: compare no end points.",
)
@click.option(
    "--truth", type=FileName(), metavar="DATA", help="True pictures: digits, emoji, a folder, a zip or an npz."
)
@click.option(
    "--features",
    cls=CodeOption,
    type=FileName(),
    runs=bool,  # TorchScript is a program, too
    metavar="FILE|MODULE:NAME",
    help="Features that the distribution distances compare: a TorchScript Inception, or a function.",
)
@trust_option
@click.option("--device", default=defaults.DEVICE, metavar="auto|cpu|cuda|mps", help="Device to compute on.")
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=defaults.Bench.BATCH,
    metavar="N",
    help="Samples at a time.",
)
@click.option(
    "--out",
    type=FileName(),
    default="bench",
    metavar="DIR",
    help="Folder of the report; what it has already is kept.",
)
@click.option("--overwrite", is_flag=True, help="Start anew instead of continuing.")
@click.pass_context
def command(ctx: click.Context, **options: Any) -> None:
    """Measure how near samplers come to the converged solution, and to the truth, by network evaluations.

    Writes results.json, table.md, quality.svg, quality.png and report.html, and prints the path of the last.
    """
    out = output(ctx)
    from pfode.cli import report
    from pfode.samplers.measure import bench, results

    evals = sorted(set(listed("--nfe", options["nfe"], int, "whole numbers", f"--nfe {EVALS}")))
    problems = [(find_problem(name, options), options["sampler"]) for name in dict.fromkeys(options["model"])]
    folder = Path(options["out"])
    with CellBar(out) as progress:
        result = bench.bench(problems, folder, evals, overwrite=options["overwrite"], progress=progress)
    files = [*report.write(folder, result), str(folder / results.RESULTS)]
    skipped = [cell for cell in result["cells"] if "skipped" in cell]
    for cell in skipped[:3]:
        out.note(f"left out: {cell['sampler']} at {cell['evals']} on {cell['bed']}: {cell['skipped']}")
    if len(skipped) > 3:
        out.note(f"left out: {len(skipped) - 3} more, see {folder / results.RESULTS}")
    best = {str(ranking.evals): ranking.order[0][0] for ranking in results.rank(result)}
    for count, text in best.items():
        out.note(f"{count} evaluations: {report.label(text)}")
    out.emit({"out": files[0], "files": files, "cells": len(result["cells"]), "best": best}, files[0])


def find_problem(name: str, options: dict[str, Any]) -> "Problem":
    """The benchmark problem of a model and the options; those of prompts may be left out.

    Raises:
        UsageError, FileError: no such model, truth or features, or samples whose shape is not known.
    """
    from pfode.samplers.measure.problem import Problem
    from pfode.samplers.settle import find_device

    device = find_device(options["device"])
    guidance = options.get("guidance")
    words = load_words(options, guidance) if "prompt" in options else {}
    if guidance is not None and not words:
        raise UsageError("--guidance is of a pipeline under prompts", f"--model {name}@{guidance:g}")
    denoiser = choose(name, words=words, device=device).denoiser if words else find_denoiser(name)
    if hasattr(denoiser, "to"):
        denoiser = denoiser.to(device)  # type: ignore[attr-defined]
    features, features_digest = (None, None) if options["features"] is None else find_features(options["features"])
    return Problem(
        name,
        denoiser,
        n=options["n"],
        seed=defaults.Bench.SEED if options["seed"] is None else options["seed"],
        validation=options["validation"],
        teacher=options["teacher"],
        truth=None if options["truth"] is None else find_truth(options["truth"], denoiser),
        features=features,
        features_digest=features_digest,
        digest=digest_under_prompts(denoiser),
        device=str(device),
        batch=options["batch"],
    )


def digest_under_prompts(denoiser: "Denoiser") -> str | None:
    """What tells a denoiser under prompts from others, and from itself under others; None without prompts."""
    from pfode.denoiser import fingerprint

    words = getattr(denoiser, "words", None)
    return None if words is None else f"{fingerprint(denoiser)} {words}"


def find_denoiser(name: str) -> "Denoiser":
    """The denoiser of --model, or the exact one of this name."""
    from pfode.scores.beds import bed

    return choose(name).guided if names_code(name) else bed(name)


def find_truth(source: str, denoiser: "Denoiser") -> "Tensor":
    """The pictures of --truth in [-1, 1], of the shape of the denoiser's samples.

    Raises:
        UsageError: no such data, or pictures of another shape. FileError: damaged ones.
    """
    from pfode.scores.training.data import load_data

    shape = tuple(getattr(denoiser, "shape", None) or ())
    data = load_data(source, size=shape[-1] if shape else 32)
    images, out = data.images, output(click.get_current_context())
    for reason, count in data.left_out.items():
        out.note(f"--truth {source}: left out: {count} {reason}")
    if tuple(images.shape[1:]) != shape:
        raise UsageError(f"--truth {source}: pictures of shape {tuple(images.shape[1:])}, the model has {shape}")
    return images.float() / 127.5 - 1


def find_features(name: str) -> "tuple[Features, str]":
    """The function of --features, and a text that identifies it in the settings."""
    from pfode.samplers.measure.metrics import inception

    if not names_code(name):
        features = inception(name)
        return features, f"{Path(name).name} {hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16]}"
    found = import_name("--features", name)
    if not callable(found):
        raise UsageError(f"--features {name}: {type(found).__name__} cannot be called", "a function (n, ...) -> (n, d)")
    return cast("Features", found), name
