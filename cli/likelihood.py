"""pfode likelihood: how likely pictures are under a model."""

import contextlib
from pathlib import Path
from typing import Any

import click

from pfode import defaults
from pfode.cli.densities import Densities, Line, auroc, cells, heads, summary
from pfode.cli.options import Command, FileName, Finite
from pfode.cli.processes import Share
from pfode.cli.progress import PictureBar
from pfode.cli.streams import Output, output, table
from pfode.errors import NumericalError, UsageError

__all__ = ["command"]

REMARK = "smooth pictures are likely whatever they show: likelihood ranks plainness, not quality"


@click.command(cls=Command, name="likelihood")
@click.argument("model", type=FileName())
@click.argument("pictures", nargs=-1, type=FileName())
@click.option(
    "--data", type=FileName(), metavar="DATA", help="Pictures: digits, digits-test, emoji, a folder, a zip or an npz."
)
@click.option("--n", type=click.IntRange(1), metavar="N", help="The first N pictures only.")
@click.option(
    "--against",
    type=FileName(),
    metavar="MODEL|DATA",
    help="Compare: the same pictures under another model, or other pictures (digits-train, a folder, a zip, an npz) "
    "under the same one.",
)
@click.option("--label", metavar="NAME|all", help="Class of all pictures; all: the class of each one, by Bayes' rule.")
@click.option(
    "--guidance",
    type=Finite(-defaults.MAX_GUIDANCE, defaults.MAX_GUIDANCE),
    metavar="W",
    help="Scale of classifier-free guidance.",
)
@click.option("--probes", default="4", metavar="N|exact", help="Random probes of each trace, or all of its products.")
@click.option("--rtol", type=Finite(1e-12, 1), default=1e-3, metavar="X", help="Error of the solver, in nats, about.")
@click.option(
    "--end",
    type=click.Choice(["auto", "truncated", "uniform", "none"]),
    default="auto",
    help="How values become a probability: by which dequantisation; none: a density.",
)
@click.option(
    "--bins", type=click.IntRange(2, 2**16), metavar="N", help="Values that a pixel can have.  [default: the model's]"
)
@click.option("--draws", type=click.IntRange(1), default=1, metavar="N", help="Draws of the dequantisation.")
@click.option(
    "--elbo",
    type=click.IntRange(2),
    metavar="N",
    help="A lower bound by N noise levels instead: quicker, rougher for a single picture.",
)
@click.option("--seed", type=click.IntRange(0), metavar="N", help="Seed of the first picture.  [default: its content]")
@click.option("--device", default=defaults.DEVICE, metavar="auto|cpu|cuda|mps", help="Device to compute on.")
@click.option("--batch", type=click.IntRange(1), default=defaults.BATCH, metavar="N", help="Pictures at a time.")
@click.option(
    "--out",
    type=FileName(),
    metavar="DIR",
    help="Folder for results.jsonl, a sheet by likelihood and a histogram; a run that was stopped is continued there.",
)
@click.option("--overwrite", is_flag=True, help="Start --out anew instead of continuing.")
@click.pass_context
def command(ctx: click.Context, **options: Any) -> None:
    """How likely pictures are under MODEL, in bits per dimension and nats.

    MODEL is a name of `pfode info models`, a file, a folder, or MODULE:NAME. A line per picture, least likely first,
    then the mean with its standard error.
    """
    out = output(ctx)
    if options["overwrite"] and options["out"] is None:
        raise UsageError("--overwrite: nothing is continued without --out", "--out DIR")
    if bool(options["pictures"]) == (options["data"] is not None):
        raise UsageError("need pictures: either files, or --data", f"pfode likelihood {options['model']} --data digits")
    from pfode.samplers.settle import find_device

    device = find_device(options["device"])
    share = Share.find(device)
    out.quiet = out.quiet or not share.first
    with contextlib.closing(share):
        runs = _runs(options, share.device or device)
        with contextlib.ExitStack() as open_folders:
            found = []
            for run in runs:
                open_folders.enter_context(contextlib.closing(run))
                share.agree(lambda run=run: run.open(options["overwrite"]) if share.first else None)
                found.append(_lines(run, share, out))
        if share.first:
            _say(runs, found, options, out)


def _runs(options: dict[str, Any], device: Any) -> list[Densities]:
    """The run, and with --against the one to compare it with."""
    out = None if options["out"] is None else Path(options["out"])
    first = Densities.of(options, options["model"], device, out)
    if options["against"] is None:
        return [first]
    folder = None if out is None else out / "against"
    if _is_data(options["against"]):
        other = {**options, "data": options["against"], "pictures": ()}
        return [first, Densities.of(other, options["model"], device, folder)]
    return [first, Densities.of(options, options["against"], device, folder)]


def _is_data(name: str) -> bool:
    """Whether --against names pictures: a data set whose name no model has, an archive, or a folder of no model."""
    path = Path(name)
    if path.is_dir():
        return not any((path / part).exists() for part in ("model_index.json", "config.json", "model.safetensors"))
    return name in ("digits-train", "digits-test") or path.suffix.lower() in (".npz", ".zip")


def _lines(run: Densities, share: Share, out: Output) -> list[Line]:
    """The lines of all pictures, those of this process made where they are not kept."""
    todo = run.todo()
    if run.folder is not None and len(todo) < len(run.names):
        out.note(f"{run.folder} has {len(run.names) - len(todo)} of {len(run.names)} pictures, the others follow")
    size = run.options["batch"]
    spans = [todo[i : i + size] for i in range(0, len(todo), size)][share.rank :: share.count]
    made: list[Line] = []

    def work() -> None:
        with PictureBar(sum(map(len, spans)), out) as progress:
            for span in spans:
                made.extend(run.add(span, share.rank))
                progress.bar.update(len(span))

    share.agree(work)
    if share.count > 1 and run.folder is None:
        from accelerate.utils import gather_object

        made = gather_object(made)
    return run.finish(made) if share.first else []


def _say(runs: list[Densities], found: list[list[Line]], options: dict[str, Any], out: Output) -> None:
    """Print the lines and the means, write the figures, and fail where a picture has no value."""
    from pfode.cli import density_figures as figures

    sound = [[line for line in lines if "nats" in line] for lines in found]
    if not all(sound):
        lost = next(line for lines in found for line in lines)
        raise NumericalError(f"no picture has a value: {lost['picture']}: {lost['failed']}", "check the model")
    said: dict[str, Any] = {**summary(runs[0], sound[0]), "pictures": found[0]}
    if len(runs) > 1:
        said["against"] = {**summary(runs[1], sound[1]), "pictures": found[1]}
        said["auroc"] = auroc([line["nats"] for line in sound[0]], [line["nats"] for line in sound[1]])
    if runs[0].folder is not None:
        files = [str(runs[0].folder / name) for name in ("results.jsonl", figures.SHEET, figures.HISTOGRAM)]
        if runs[0].pictures.shape[1] in (1, 3):
            figures.write_sheet(runs[0], found[0])
        else:
            files.pop(1)
        figures.write_histogram(runs[0].folder, [(run.title, lines) for run, lines in zip(runs, sound, strict=True)])
        said["files"] = files
    ranked = sorted(sound[0], key=lambda line: -line["bits_per_dim"])
    text = [table(heads(ranked[0]), [cells(line) for line in ranked]), ""]
    text += [_mean(run, lines) for run, lines in zip(runs, sound, strict=True)]
    if "auroc" in said:
        text.append(f"AUROC {said['auroc']:.4f}: chance that a picture of the first is likelier than one of the second")
    if "accuracy" in said:
        text.append(f"accuracy {100 * said['accuracy']:.2f} % of {len(sound[0])} classes")
    out.note(REMARK)
    out.emit(said, "\n".join(text))
    failed = [line for line in found[0] if "failed" in line]
    if failed:
        raise NumericalError(f"{len(failed)} pictures have no value: {failed[0]['picture']}: {failed[0]['failed']}")


def _mean(run: Densities, lines: list[Line]) -> str:
    of = summary(run, lines)
    kind = f"{of['end']} dequantisation of {of['bins']} values" if of["bins"] else "density with the noise of t_min"
    mean = f"{of['bits_per_dim']:.4f} +- {of['standard_error']:.4f} bits/dim in the mean of {of['n']}"
    cost = f"NFE {of['nfe']:.0f} and {of['products']:.0f} products a picture"
    return f"{run.title}: {mean} ({kind}; prior {of['prior']}); {cost}"
