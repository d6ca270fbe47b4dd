"""pfode sample: draw pictures, write the sheet, say what was done."""

import os
import time
import warnings
from typing import Any

import click

import pfode
from pfode import defaults
from pfode.cli.job import OF_THE_MODEL, Cost, Job, prepare, settings
from pfode.cli.options import Command, FileName, Finite
from pfode.cli.outputs import check_outputs, flaws, non_finite, write
from pfode.cli.processes import launched
from pfode.cli.progress import PictureBar
from pfode.cli.settings import DTYPES, format_seeds, settle
from pfode.cli.streams import Output, output
from pfode.errors import OtherModelWarning, UnsoundWarning, UsageError


@click.command(cls=Command, name="sample")
@click.option(
    "--model",
    type=FileName(),
    default=defaults.MODEL,
    show_default=True,
    metavar="NAME|FILE|FOLDER|ID",
    help="`pfode info models`, a file, a folder of diffusers, or owner/name on the hub.",
)
@click.option(
    "--steps", type=click.IntRange(1), default=defaults.STEPS, show_default=True, metavar="N", help="Number of steps."
)
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
    default=defaults.STRENGTH,
    show_default=True,
    metavar="X",
    help="The share of noise that --init is given; all steps are made from there.",
)
@click.option(
    "--n",
    type=click.IntRange(1),
    metavar="N",
    help=f"Number of pictures.  [default: one of every class that is drawn, {defaults.SAMPLES} without classes]",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=defaults.SEED,
    show_default=True,
    metavar="N",
    help="Of picture 0; picture i has seed + i.",
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
@click.option(
    "--device", default=defaults.DEVICE, show_default=True, metavar="auto|cpu|cuda|mps", help="Where to compute."
)
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

    if options["separate"] is None and launched():
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


def one_sheet(job: Job, out: Output) -> dict[str, Any]:
    """Draw all pictures, then write the sheet and the animation.

    Raises:
        NumericalError: pictures that are not finite; with --nan flag the others have been written.
    """
    began = time.perf_counter()
    with PictureBar(len(job.seeds), out) as progress:
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
