"""The option --model: what may stand there, and the denoiser that it names."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pfode import defaults
from pfode.cli.models import model_digest
from pfode.cli.options import FileName
from pfode.cli.trust import CodeOption, calling, import_name, names_code
from pfode.errors import UsageError
from pfode.scores.io.find import guided_name, model_path

if TYPE_CHECKING:
    from pfode.denoiser import Denoiser

__all__ = ["Chosen", "choose", "model_option"]

WRAP = "in the module: net = pfode.Denoiser(network, process, prediction, shape=(3, 32, 32))"


@dataclass(frozen=True)
class Chosen:
    """What --model names.

    Args:
        name: as it was typed, without the scale of guidance. guidance: that scale, from NAME@2; None without one.
        denoiser: not guided. path: its file or folder; None for a denoiser of the user's own code.
    """

    name: str
    guidance: float | None
    denoiser: "Denoiser"
    path: Path | None

    @property
    def stem(self) -> str:
        """What files that belong to the model are called."""
        return re.sub(r"[^\w-]+", "-", self.name) if self.path is None else self.path.stem

    @property
    def digest(self) -> str | None:
        """sha256 of the model; None for a denoiser of the user's own that does not say."""
        from pfode.denoiser import fingerprint

        return fingerprint(self.denoiser) if self.path is None else model_digest(self.path)

    @property
    def guided(self) -> "Denoiser":
        """The denoiser under its guidance.

        Raises:
            UsageError: it has no classes.
        """
        from pfode.scores import guide

        return self.denoiser if self.guidance is None else guide(self.denoiser, self.guidance)


def model_option(text: str, metavar: str = "NAME|FILE|FOLDER|ID|MODULE:NAME", **more: Any) -> Callable[..., Any]:
    """The option --model of a command, which also needs `trust_option`.

    Args:
        text: its help. more: of `click.option`.
    """
    default = (defaults.MODEL,) if more.get("multiple") else defaults.MODEL
    how = {"cls": CodeOption, "runs": names_code, "type": FileName(), "default": default, **more}
    return click.option("--model", metavar=metavar, help=text, **how)


def choose(
    text: str, option: str = "--model", words: Mapping[str, Any] | None = None, device: Any = "cpu", dtype: Any = None
) -> Chosen:
    """The denoiser that a text names, as pfode.load does or as MODULE:NAME, with or without @SCALE.

    Args:
        option: where the text stands, for messages.
        words: of a pipeline under prompts, see `prompts.load_words`; its guidance is in the denoiser, not beside it.
        device, dtype: of one, float32 if none is given.

    Raises:
        PfodeError: as `pfode.load`, or as `own`.
    """
    import pfode

    name, guidance = guided_name(text)
    if words:
        if names_code(name):
            raise UsageError(f"{option} {name}: a denoiser of your own takes no prompt", "leave --prompt out")
        import torch

        path = model_path(name, True, words.get("variant"))
        try:
            return Chosen(name, None, pfode.load(text, device, dtype or torch.float32, **words), path)
        except UsageError as error:
            raise _of_the_size(error, words) from error
    if names_code(name):
        return Chosen(name, guidance, own(option, name), None)
    path = model_path(name)
    return Chosen(name, guidance, pfode.load(path), path)


def _of_the_size(error: UsageError, words: Mapping[str, Any]) -> UsageError:
    """The error of a width or a height as one of --size; any other as it is."""
    found = re.match(r"(width|height): need a multiple of (\d+)", error.message)
    if found is None:
        return error
    factor = int(found[2])
    sides = [max(factor, round(words.get(key, factor) / factor) * factor) for key in ("width", "height")]
    return UsageError(f"--size: {error.message}", f"--size {sides[0]}x{sides[1]}")


def own(option: str, name: str) -> "Denoiser":
    """The denoiser that MODULE:NAME is, or that the function or the class of this name makes when it is called.

    Raises:
        UsageError: no such name, code that raises something, or no denoiser.
    """
    from pfode.denoiser import Denoiser

    found = import_name(option, name)
    if isinstance(found, type) or (not isinstance(found, Denoiser) and callable(found) and not _is_module(found)):
        needed = _needed(found)
        if needed:
            what = (
                f"{name.partition(':')[2]} takes {needed}: no denoiser, which has a process, and nothing that makes one"
            )
            raise UsageError(f"{option} {name}: {what}", WRAP)
        with calling(option, name):
            found = found()
    if not isinstance(found, Denoiser):
        what = f"{type(found).__name__} is no denoiser: a callable (x, t) -> x0 with a process"
        raise UsageError(f"{option} {name}: {what}", WRAP)
    return found


def _is_module(found: Any) -> bool:
    from torch import nn

    return isinstance(found, nn.Module)


def _needed(function: Callable[..., Any]) -> str:
    """The arguments that a function cannot do without, in words; none for one that does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ""
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return ", ".join(p.name for p in parameters if p.default is p.empty and p.kind not in open_ended)
