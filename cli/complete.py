"""What a shell completes behind an option: names of models, samplers, grids and charts, and files; without torch."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from pfode.cli.objective import LAW_NAMES
from pfode.scores.io.shipped import shipped

__all__ = ["ADAPTIVE", "CHARTS", "GRIDS", "completer", "samplers"]

ADAPTIVE = ("rk23", "rk45", "tsit5", "dopri8", "dpm-adaptive", "dpm-adaptive2")
GRIDS = (
    "ays-sd", "ays-sdxl", "ays-svd", "beta", "beta-sigma", "cosine", "dm-nonuniform", "karras", "leading", "linspace",
    "log-snr", "polyexponential", "shifted", "time", "time-quadratic", "trailing",
)  # fmt: skip
CHARTS = ("ddim", "deis", "dpm", "dpm++", "dpm3", "flow", "trig")
DEVICES = ("auto", "cpu", "cuda", "mps")
Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def samplers() -> tuple[str, ...]:
    """The names that --sampler takes."""
    import pfode.samplers

    measured = Path(str(pfode.samplers.__file__)).with_name("measured.json")  # a row for each of the catalogue
    return ("auto", *json.loads(measured.read_text()), *ADAPTIVE)


KNOWN: dict[str, tuple[Callable[[], Iterable[str]], bool]] = {  # by option: its names; whether files stand there, too
    "model": (shipped, True),
    "sampler": (samplers, True),
    "start": (samplers, True),
    "sheet_sampler": (samplers, True),
    "grid": (lambda: GRIDS, False),
    "chart": (lambda: CHARTS, False),
    "device": (lambda: DEVICES, False),
    "data": (lambda: ("digits", "emoji", *LAW_NAMES), True),
    "from_data": (lambda: LAW_NAMES, False),
    "truth": (lambda: ("digits", "emoji"), True),
    "label": (lambda: ("all", "none"), False),
    "what": (lambda: (*shipped(), "models", "config", "env"), True),
    "name": (samplers, False),  # of `pfode samplers`
    "source": (shipped, True),
}
FOLDERS = ("separate",)


def completer(command: str | None, option: str | None) -> Complete | None:
    """What completes the values of an option or an argument of a command; None for one whose values are not known."""
    if option in FOLDERS:
        return lambda ctx, param, begun: [CompletionItem(begun, type="dir")]
    if (
        option not in KNOWN
        or (option == "name" and command != "samplers")
        or (option == "source" and command == "train")
    ):
        return None
    names, files = KNOWN[option]

    def complete(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
        found = [CompletionItem(name) for name in names() if name.startswith(begun)]
        return found + ([CompletionItem(begun, type="file")] if files else [])

    return complete
