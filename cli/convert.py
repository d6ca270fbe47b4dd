"""pfode convert: a model of another library as one self-contained file of pfode."""

import os
from pathlib import Path
from typing import Any

import click

import pfode
from pfode.cli.options import Command, FileName
from pfode.cli.settings import DTYPES
from pfode.cli.streams import output, printable
from pfode.errors import UsageError
from pfode.header import read_header
from pfode.scores.io.find import model_path

__all__ = ["command"]


@click.command(cls=Command, name="convert")
@click.argument("source", type=FileName(), metavar="FOLDER|ID|FILE")
@click.argument("target", type=FileName(), metavar="FILE.safetensors")
@click.option(
    "--dtype", type=click.Choice(list(DTYPES)), help="Precision of the weights in the file; else the source's."
)
@click.option("--name", metavar="TEXT", help="What the model is called; by default the name of the file.")
@click.option("--licence", metavar="TEXT", help="The licence of the weights; by default the source's.")
@click.pass_context
def command(ctx: click.Context, source: str, target: str, **options: str | None) -> None:
    """Write a model as one self-contained file.

    The source is a folder of diffusers (a DDPM, DDIM, PNDM or DiT pipeline, or its network), a network pickle of EDM or
    EDM2, the name of a folder on the Hugging Face hub, or a file of pfode. Nothing in it is executed; every tensor and
    field is checked. Then `pfode sample --model FILE.safetensors` needs the file alone.
    """
    import torch

    from pfode.scores import save

    if Path(target).suffix != ".safetensors":
        raise UsageError(f"{target}: the file is a safetensors file", f"{Path(target).stem}.safetensors")
    path = model_path(source)
    dtype = options["dtype"]
    net: Any = pfode.load(path, dtype=getattr(torch, DTYPES[dtype]) if dtype else None)
    card = own_card(path) | {
        "name": printable(options["name"] or Path(target).stem),
        "source": printable(os.path.basename(os.path.normpath(source))),
    }
    if options["licence"]:
        card["licence"] = printable(options["licence"])
    file = save(net, target, card=card, dtype=net.dtype)
    if getattr(net, "autoencoder", None) is not None:
        output(ctx).note("its samples are latents; the autoencoder that makes pictures of them is not in the file")
    header = read_header(file)
    config = header.config("pfode.config")
    found = {
        "out": target,
        "architecture": config["architecture"]["name"],
        "process": config["process"]["name"],
        "prediction": config["prediction"],
        "shape": config["shape"],
        "parameters": header.parameters,
        "dtypes": sorted({entry.dtype for entry in header.entries.values()}),
        "bytes": file.stat().st_size,
        "digest": header.metadata["pfode.digest"],
    }
    output(ctx).emit(found, target)


def own_card(path: Path) -> dict[str, Any]:
    """The entries of a model file beside the configuration: its licence, what it was trained on."""
    from pfode.scores.io.save import FIELDS

    if path.suffix != ".safetensors":
        return {}
    config = read_header(path).config("pfode.config")
    return {key: value for key, value in config.items() if key not in FIELDS}
