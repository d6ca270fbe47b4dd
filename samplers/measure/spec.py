"""How a benchmark's samplers are written: NAME?KEY=VALUE&KEY=VALUE/VALUE.

unipc2?chart=flow&grid=karras                  a recipe of the catalogue, or auto, and its options
ipndm3?chart=ddim/trig&grid=best               alternatives between strokes: the best on the validation noise
ipndm3?grid=gits                               a grid searched for this denoiser
six.safetensors, plans/                        a plan; those of a folder that fit the denoiser and the evaluations
fitted                                         the plans that come with the denoiser
diffusers:UniPCMultistepScheduler?grid=best    a peer's own code
k-diffusion:sample_dpmpp_2m
"""

import inspect
import itertools
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pfode import grids
from pfode.chart import CHARTS
from pfode.errors import UsageError, unknown
from pfode.header import read_header
from pfode.plans.table import Plan
from pfode.process import Process
from pfode.samplers import auto
from pfode.samplers.catalogue import CATALOGUE, make_plan, recipe
from pfode.samplers.measure import peers

__all__ = ["Spec", "Value", "load_plans"]

Value = bool | int | float | str  # of an option
MOST = 256  # alternatives of a sampler
MOST_FILES = 10_000  # in a folder of plans
BEST = {  # alternatives of grid=best, by family of process
    "alpha = 1": ("karras", "polyexponential(0.8)", "ays-svd", "cosine", "cosine(0.5)"),
    "VP": ("log-snr", "time", "time(1.5)", "time-quadratic", "ays-svd"),
    "Flow": ("time", "time(1.5)", "beta", "cosine(0.7)", "ays-svd"),
}
NOT_OPTIONS = {"sampler", "process", "steps", "nfe", "guided", "options"}  # of make_plan: the bench settles them


@dataclass(frozen=True)
class Spec:
    """A sampler as it is written: its text, its name, and the alternatives of every option."""

    text: str
    name: str
    options: dict[str, tuple[Value, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """Read NAME?KEY=VALUE&KEY=VALUE/VALUE.

        Raises:
            UsageError: another form, an unknown recipe, or too many alternatives.
        """
        if not isinstance(text, str) or not text.isprintable():
            raise UsageError(f"sampler: need a text in one line, got {text!r:.200}", "unipc2?chart=flow&grid=karras")
        name, query, rest = text.partition("?")
        options: dict[str, tuple[Value, ...]] = {}
        for pair in rest.split("&") if query else []:
            key, equals, value = pair.partition("=")
            if not key or not equals or not value or key in options:
                raise UsageError(
                    f"sampler {text!r:.200}: cannot read {pair!r:.60}", "unipc2?chart=flow&grid=karras/time"
                )
            options[key] = tuple(dict.fromkeys(_value(part) for part in value.split("/")))
        found = cls(text, name, options)
        if found.kind == "catalogue" and name != "auto":
            recipe(name)
        if found.kind in ("plan", "plans", "fitted") and options:
            raise UsageError(f"sampler {text!r:.200}: a plan has no options", name)
        several = math.prod(map(len, options.values()))
        if several > MOST:
            raise UsageError(f"sampler {text!r:.200}: {several} alternatives, at most {MOST}", "fewer of them")
        return found

    def check(self) -> None:
        """Look its names up, before anything is measured: what is only misspelt is not left out.

        Raises:
            UsageError: an unknown option, chart, grid or peer, or a folder without plans. FileError: a plan that
                cannot be read. MissingError: a peer's package is not installed.
        """
        if self.kind in ("plan", "plans"):
            load_plans(self.name)
        for one in self.options.get("grid", ()):
            if one not in ("auto", "best", "gits"):
                grids.grid(str(one))
        if self.kind == "peer":
            peers.find(self.name)
        if self.kind != "catalogue":
            return
        recipes = CATALOGUE.values() if self.name == "auto" else [recipe(self.name)]
        known = {name for one in recipes for name in one.method.options} | {"coefficient"}
        known |= inspect.signature(make_plan).parameters.keys() - NOT_OPTIONS
        for key in self.options:
            if key not in known:
                raise unknown(f"option of {self.name}", key, sorted(known))
        for one in self.options.get("chart", ()):
            if one not in CHARTS:
                raise unknown("chart", one, CHARTS)

    @property
    def kind(self) -> str:
        """What the name stands for: "catalogue" (a recipe or auto), "plan", "plans", "fitted" or "peer"."""
        package, colon, _ = self.name.partition(":")
        if colon and package in peers.DRIVERS:
            return "peer"
        if self.name.endswith(".safetensors"):
            return "plan"
        if self.name == "fitted":
            return "fitted"
        if self.name in CATALOGUE or self.name == "auto":  # whatever folder has that name
            return "catalogue"
        return "plans" if os.sep in self.name or os.path.isdir(self.name) else "catalogue"

    def alternatives(self, process: Process) -> list[dict[str, Any]]:
        """The options of every alternative."""
        given = {**self.options}
        if "grid" in given:
            best = BEST[auto.family(process)]
            chosen = itertools.chain(*(best if one == "best" else (one,) for one in given["grid"]))
            given["grid"] = tuple(dict.fromkeys(chosen))
        return [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]


def load_plans(name: str) -> list[tuple[Path, Plan]]:
    """The plan of a file, or those of a folder, with their files.

    Raises:
        FileError: a file that cannot be read. UsageError: no plan in the folder.
    """
    path = Path(name)
    if not path.is_dir():
        return [(path, Plan.load(path))]
    files = _below(path)
    kinds = [read_header(file).metadata.get("pfode.kind") for file in files]
    plans = [(file, Plan.load(file)) for file, kind in zip(files, kinds, strict=True) if kind == "plan"]
    if not plans:
        raise UsageError(f"{name}: no plan files in it", "pfode fit --out DIR writes some")
    return plans


def _below(folder: Path) -> list[Path]:
    """The safetensors files in a folder and those below it."""
    found: list[Path] = []
    for where, _, names in os.walk(folder):
        found += [Path(where, name) for name in names if name.endswith(".safetensors") and Path(where, name).is_file()]
        if len(found) > MOST_FILES:
            raise UsageError(f"{folder}: more than {MOST_FILES} files in it and below", "the folder of the plans alone")
    return sorted(found)


def _value(text: str) -> Value:
    """An option's value: a whole number, a finite number, true or false, else the text itself."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if kind is int or math.isfinite(value):
            return value
    return text == "true" if text in ("true", "false") else text
