"""pfode sample: draw pictures, write the sheet, say what was done."""

import os
import sys
import time
import warnings
from typing import Any

import click

import pfode
from pfode import defaults
from pfode.cli.calibration import calibrate_model
from pfode.cli.job import OF_THE_MODEL, Cost, Job, prepare, settings
from pfode.cli.model_option import model_option
from pfode.cli.options import Command, FileName, Finite
from pfode.cli.outputs import check_outputs, flaws, non_finite, write
from pfode.cli.places import PREVIEWS, STDOUT, open_picture
from pfode.cli.processes import launched
from pfode.cli.progress import PictureBar
from pfode.cli.prompts import prompt_options
from pfode.cli.settings import DTYPES, format_seeds, settle
from pfode.cli.streams import Output, output
from pfode.cli.trust import trust_option
from pfode.errors import OtherModelWarning, UsageError

__all__ = ["command", "one_sheet"]


@click.command(cls=Command, name="sample")
@model_option(
    "Model to draw from: a name of `pfode info models`, a file, a folder of diffusers, owner/name on the hub, or a "
    "denoiser of your own, or a function that makes one; avatars@2 is --guidance 2."
)
@trust_option
@prompt_options
@click.option("--steps", type=click.IntRange(1), default=defaults.STEPS, metavar="N", help="Number of steps.")
@click.option("--nfe", type=click.IntRange(1), metavar="N", help="Take as many steps as fit in N denoiser calls.")
@click.option(
    "--sampler",
    type=FileName(),
    default="auto",
    metavar="NAME|PLAN",
    help="Sampler: a name of `pfode samplers`, or a plan file.",
)
@click.option("--fitted/--no-fitted", default=True, help="Let auto take a plan fitted to the model, if there is one.")
@click.option("--calibrate", is_flag=True, help="Try eight plans on this model first, and keep the best beside it.")
@click.option("--grid", metavar="NAME", help="Rule for the times of the steps: karras, time, 'beta(0.5,0.7)' ...")
@click.option("--chart", metavar="NAME", help="Coordinates in which the sampler steps, see `pfode samplers`.")
@click.option("--rtol", type=Finite(0, 1), metavar="X", help="Relative tolerance of the adaptive samplers.")
@click.option("--atol", type=Finite(0), metavar="X", help="Absolute tolerance. [default: in proportion to --rtol]")
@click.option("--eta", type=Finite(0), metavar="X", help="Amount of noise of the samplers that take it.")
@click.option(
    "--set", multiple=True, metavar="NAME=VALUE", help="Another option of the sampler, see `pfode samplers NAME`."
)
@click.option(
    "--lower-order-final/--no-lower-order-final",
    default=False,
    help="Lower the order of a multistep sampler in its last steps.",
)
@click.option(
    "--afs",
    type=Finite(0, word=OF_THE_MODEL),
    is_flag=False,
    flag_value=OF_THE_MODEL,
    metavar="[STD]",
    help="Analytical first step: without a call, as if the data were Gaussian of standard deviation STD. Without STD "
    "that of the model's data.",
)
@click.option(
    "--brownian/--no-brownian",
    default=False,
    help="Take the noise from one Brownian path per seed, the same for any number of steps.",
)
@click.option("--init", type=FileName(), metavar="PICTURE", help="Picture to begin with, to which noise is added.")
@click.option(
    "--mask",
    type=FileName(),
    metavar="PICTURE",
    help="Inpainting: white where --init is drawn anew, black where it is kept; a picture as large as it.",
)
@click.option(
    "--strength",
    type=Finite(0, 1),
    default=defaults.STRENGTH,
    metavar="X",
    help="Share of noise added to --init; all steps are made from there. With --mask 1 unless given.",
)
@click.option(
    "--n",
    type=click.IntRange(1),
    metavar="N",
    help="Number of pictures.  [default: 4 rows of 10, or of as many of every class; "
    f"{defaults.SAMPLES} of large pictures, one of each --prompt]",
)
@click.option("--seed", type=click.IntRange(0), default=defaults.SEED, metavar="N", help="Seed of the first picture.")
@click.option("--seeds", metavar="LIST", help="Seeds of the pictures, such as 0-63,80, instead of --seed and --n.")
@click.option(
    "--label",
    metavar="NAME|all|none",
    help="Class of the pictures. all: every class in turn; none: no class.  [default: all, if the model has classes]",
)
@click.option(
    "--text",
    metavar="WORD",
    help=f"Set a word in typefaces that do not exist, one for each seed. [model: {defaults.TEXT_MODEL}]",
)
@click.option(
    "--guidance",
    type=Finite(-defaults.MAX_GUIDANCE, defaults.MAX_GUIDANCE),
    metavar="W",
    help="Scale of classifier-free guidance, which calls the network twice as often.",
)
@click.option("--negative", metavar="NAME", help="Class to guide away from, instead of no class.")
@click.option("--guidance-interval", metavar="LO,HI", help="Guide only where LO < sigma/alpha <= HI.")
@click.option(
    "--guidance-rescale",
    type=Finite(0, 1),
    metavar="X",
    help="Share of the contrast that guidance adds which is taken back.",
)
@click.option(
    "--dtype", type=click.Choice(list(DTYPES)), help="Precision of the network; the state has float32 or more."
)
@click.option("--device", default=defaults.DEVICE, metavar="auto|cpu|cuda|mps", help="Device to compute on.")
@click.option(
    "--batch",
    type=click.IntRange(1),
    metavar="N",
    help=f"Pictures at a time; changes no picture.  [default: {defaults.BATCH}]",
)
@click.option(
    "--out",
    type=FileName(),
    metavar="FILE|DIR/|-",
    help="Contact sheet of all pictures: .png, .jpg or .webp; in a folder, or without --out, sheet.png, or sheet-2.png "
    "... where that is there; - for stdout.",
)
@click.option("--open", is_flag=True, help="Open the sheet in the program that the system has for pictures.")
@click.option(
    "--preview",
    type=click.Choice(PREVIEWS),
    default="auto",
    help="Show the sheet on the terminal: by graphics of kitty, iTerm2 or sixel, or half blocks; auto: as it can.",
)
@click.option("--scale", type=click.IntRange(1, 64), metavar="N", help="Enlarge the pictures on the sheet N times.")
@click.option(
    "--separate",
    type=FileName(),
    metavar="DIR",
    help="Folder for every picture as a file of its own; a run that was stopped is continued there.",
)
@click.option("--overwrite", is_flag=True, help="Start --separate anew instead of continuing.")
@click.option(
    "--nan",
    type=click.Choice(["raise", "flag"]),
    default="raise",
    help="At a picture that is not finite: stop, or leave it out and exit with 5 at the end.",
)
@click.option("--trajectory", type=FileName(), metavar="FILE", help="Animation of the steps: .gif, .png or .webp.")
@click.option(
    "--like",
    type=FileName(),
    metavar="PICTURE",
    help="Repeat a picture's settings; flags are stronger.",
)
@click.pass_context
def command(ctx: click.Context, **options: Any) -> None:
    """Draw pictures from a score network.

    Writes a contact sheet and prints its path. The text of the PNG holds the settings: --like SHEET.png repeats them,
    `pfode info SHEET.png` shows them.
    """
    out = output(ctx)
    options = settle(ctx, options)
    check_outputs(options["out"], options["trajectory"], options["separate"])
    if options["out"] == STDOUT:
        check_stdout(out, options["open"])
    if options["overwrite"] and options["separate"] is None:
        raise UsageError("--overwrite: nothing is continued without --separate", "--separate DIR")
    from pfode.cli import many, text
    from pfode.plans.table import foreign
    from pfode.samplers.sampling import unsound

    if options["separate"] is None and launched():
        raise UsageError("several processes share the pictures of a folder", "--separate DIR")
    if options["calibrate"]:
        calibrate_model(options, out)
    job = prepare(options)
    plan, n = job.plan, len(job.seeds)
    if isinstance(plan, pfode.Plan) and foreign(plan, job.net):
        out.note(f"{options['sampler']} was fitted to another model: a hand-made sampler may serve better")
        warnings.simplefilter("ignore", OtherModelWarning)
    if (remark := unsound(plan)) is not None:
        out.note(remark)
    how = f"grid {plan.meta.get('grid', 'of the plan')}" if job.fixed else f"rtol {plan.meta['rtol']:g}"
    names = f"model {options['model']}, sampler {plan.name}, {how}"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        out.note(f"{names}, n {n}, seeds {format_seeds(job.seeds)}, device {job.device}")
    if options["text"] is not None:
        done = text.draw(job, out)
    else:
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
    if options["out"] != STDOUT:
        out.emit(summary, done["files"][0])
    if options["open"] and (remark := open_picture(done["files"][0])):
        out.note(remark)


def check_stdout(out: Output, opened: bool) -> None:
    """Find out whether a picture may go to stdout.

    Raises:
        UsageError: stdout is a terminal, or has the JSON; or a picture that is to be opened has no file.
    """
    if opened:
        raise UsageError("--open: a picture on stdout has no file to open", "--out sheet.png")
    if out.json:
        raise UsageError("--json and --out - both go to stdout", "--out sheet.png")
    if sys.stdout is not None and sys.stdout.isatty():
        raise UsageError("--out -: stdout is a terminal, which is no place for a PNG", "--out - > sheet.png")


def one_sheet(job: Job, out: Output) -> dict[str, Any]:
    """Draw all pictures, then write the sheet and the animation.

    Raises:
        NumericalError: pictures that are not finite; with --nan flag the others have been written.
    """
    from pfode.samplers.request import Keep

    began = time.perf_counter()
    with PictureBar(len(job.seeds), out) as progress:
        callback = progress if progress.visible and job.fixed else None
        result = job.draw(Keep(callback, job.options["trajectory"] is not None, job.options["nan"]))
    seconds = time.perf_counter() - began
    files = write(job, result)
    if result.bad:
        raise non_finite(flaws(job, result), job, f"crossed out in {files[0]}; the other pictures are sound")
    return {"files": files, "cost": Cost.of(result), "seconds": seconds}
