"""pfode convert: a model of another library as one self-contained file of pfode."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import pfode
from pfode.cli.model_option import choose
from pfode.cli.options import Command, FileName
from pfode.cli.settings import DTYPES
from pfode.cli.streams import output, printable
from pfode.cli.trust import names_code
from pfode.errors import UsageError
from pfode.header import read_header
from pfode.scores.io.find import guided_name, model_path

if TYPE_CHECKING:
    import torch

    from pfode.scores import Denoiser

__all__ = ["command"]


@click.command(cls=Command, name="convert")
@click.argument("source", type=FileName(), metavar="FOLDER|ID|FILE|MODULE:NAME")
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
    EDM2, the name of a folder on the Hugging Face hub, or a file of pfode: nothing in it is executed, every tensor and
    field is checked. Or it is a denoiser of your own, MODULE:NAME, around a network of pfode or diffusers.
    Then `pfode sample --model FILE.safetensors` needs the file alone.
    """
    import torch

    from pfode.scores import Denoiser, save

    if Path(target).suffix != ".safetensors":
        raise UsageError(f"{target}: the file is a safetensors file", f"{Path(target).stem}.safetensors")
    name, guidance = guided_name(source)
    if guidance is not None:
        raise UsageError(f"{source}: guidance is no part of a model", f"convert {name}, then use {target}@{guidance:g}")
    dtype = getattr(torch, DTYPES[options["dtype"]]) if options["dtype"] else None
    if names_code(source):
        path, net = None, find_own(source, dtype)
    else:
        path = model_path(source)
        net = pfode.load(path, dtype=dtype)
    card = ({} if path is None else own_card(path)) | {
        "name": printable(options["name"] or Path(target).stem),
        "source": printable(os.path.basename(os.path.normpath(source))),
    }
    if options["licence"]:
        card["licence"] = printable(options["licence"])
    assert isinstance(net, Denoiser)
    file = save(net, target, card=card, dtype=net.dtype or torch.float32)
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


def find_own(source: str, dtype: "torch.dtype | None") -> "Denoiser":
    """The denoiser of MODULE:NAME, in a dtype.

    Raises:
        UsageError: none, or not one that a file can be made of.
    """
    from pfode.scores import Denoiser

    found = choose(source, "convert").denoiser
    if not isinstance(found, Denoiser):
        problem = f"convert {source}: {type(found).__name__} is no pfode.Denoiser around a network"
        raise UsageError(problem, "net = pfode.Denoiser(network, process, prediction)")
    return found.to(dtype=dtype)


def own_card(path: Path) -> dict[str, Any]:
    """The entries of a model file beside the configuration: its licence, what it was trained on."""
    from pfode.scores.io.save import FIELDS

    if path.suffix != ".safetensors":
        return {}
    config = read_header(path).config("pfode.config")
    return {key: value for key, value in config.items() if key not in FIELDS}
