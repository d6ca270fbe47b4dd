"""The options of pipelines under prompts, shared by the commands, and the arguments of `pfode.load` that they are."""

import re
from collections.abc import Callable
from typing import Any

import click

from pfode import defaults
from pfode.cli.options import FileName, Finite
from pfode.errors import UsageError

__all__ = ["OF_THE_PROMPT", "format_size", "load_words", "prompt_options"]

OF_THE_PROMPT = ("negative_prompt", "size", "true_cfg", "variant", "base", "tiling")
MOST = 16384  # pixels along one side of a picture


def prompt_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a pipeline under prompts to a command."""
    options = (
        click.option(
            "--prompt",
            multiple=True,
            metavar="TEXT",
            help="What to draw, for a text-to-image pipeline (Stable Diffusion, SDXL, SD3, Flux: a folder of "
            "diffusers, one .safetensors file, owner/name on the hub); of several each in turn.",
        ),
        click.option("--negative-prompt", metavar="TEXT", help="What to guide away from, instead of no words."),
        click.option(
            "--size", metavar="WxH", help="Pixels of the pictures of --prompt.  [default: those of the pipeline]"
        ),
        click.option(
            "--true-cfg",
            type=Finite(-defaults.MAX_GUIDANCE, defaults.MAX_GUIDANCE),
            metavar="W",
            help="Scale of classifier-free guidance of Flux, whose --guidance is an input of its network.",
        ),
        click.option(
            "--variant", metavar="NAME", help="Weights to take of the pipeline, such as fp16, where it has several."
        ),
        click.option(
            "--base",
            type=FileName(),
            metavar="FOLDER|ID",
            help="Pipeline that one .safetensors file belongs to: its configurations, and parts that the file lacks.",
        ),
        click.option(
            "--tiling/--no-tiling", default=False, help="Decode large pictures in overlapping tiles, in less memory."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def load_words(options: dict[str, Any], guidance: float | None) -> dict[str, Any]:
    """The arguments of `pfode.load` for the options of `prompt_options`; none without a prompt.

    Args:
        guidance: of --guidance.

    Raises:
        UsageError: an option of a prompt without one, or one that cannot be read.
    """
    if not options["prompt"]:
        for name in OF_THE_PROMPT:
            if options[name]:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is of a text-to-image pipeline", "--prompt 'a red bicycle'")
        return {}
    for key in ("prompt", "negative_prompt"):
        for text in options[key] if key == "prompt" else [options[key] or ""]:
            if not text.isprintable():
                flag = f"--{key.replace('_', '-')}"
                raise UsageError(f"{flag} {text!r:.60}: such a text cannot be kept in a picture", "one line of text")
    words: dict[str, Any] = {"prompts": list(options["prompt"]), "guidance": guidance}
    words |= {key: options[key] for key in ("negative_prompt", "variant", "base") if options[key] is not None}
    words |= {"true_cfg": options["true_cfg"]} if options["true_cfg"] is not None else {}
    words |= {"tiling": True} if options["tiling"] else {}
    return words | parse_size(options["size"])


def parse_size(text: str | None) -> dict[str, int]:
    """The width and the height of a size such as 512x768, or 512 for both; nothing for none.

    Raises:
        UsageError: neither, or sides of more than 16,384 pixels.
    """
    if text is None:
        return {}
    found = re.fullmatch(r"\s*(\d{1,6})(?:\s*[xX*\u00d7]\s*(\d{1,6}))?\s*", text, re.ASCII)
    width, height = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < width <= MOST or not 0 < height <= MOST:
        raise UsageError(f"--size: need width x height in pixels, at most {MOST}, got {text!r:.60}", "--size 768x512")
    return {"width": width, "height": height}


def format_size(shape: tuple[int, ...]) -> str:
    """The size of pictures of a shape (channels, height, width): the inverse of `parse_size`."""
    return f"{shape[2]}x{shape[1]}"
