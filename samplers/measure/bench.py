"""The benchmark: beds x samplers x evaluations -> cells, in a folder that can be gone on with.

A *bed* is a denoiser with its noise. Every sampler draws from the same noise as a fine solution of the same ODE, the
teacher, and is measured by how far from it it ends; where the truth can be sampled, also by how far its samples are
from held-out true ones. A *sampler* is written

    unipc2?chart=flow&grid=karras                  a recipe of the catalogue, or auto, and its options
    ipndm3?chart=ddim/trig&grid=best               alternatives between strokes: the best on the validation noise
    ipndm3?grid=gits                               a grid searched for this denoiser
    six.safetensors, plans/                        a plan; those of a folder that fit the denoiser and the evaluations
    fitted                                         the plans that come with the denoiser
    diffusers:UniPCMultistepScheduler?grid=best    a peer's own code
    k-diffusion:sample_dpmpp_2m

What is chosen or searched for is chosen on the validation noise, never on the noise that is measured on.
"""

import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

import pfode
from pfode import grids, noise
from pfode.chart import CHARTS
from pfode.denoiser import Denoiser
from pfode.errors import FileError, NumericalError, UsageError, WriteError, integer, unknown
from pfode.files import make_folder, read_header, write_atomic
from pfode.plan import Plan
from pfode.process import Process
from pfode.samplers import auto
from pfode.samplers.catalogue import CATALOGUE, make_plan, recipe
from pfode.samplers.fit.search import Jumps, measure_jumps
from pfode.samplers.measure import metrics, peers
from pfode.samplers.sampling import batches

EVALS = (3, 4, 5, 6, 8, 10, 15, 20)
SEED = 1_000_000_000  # of the first measured sample
VALIDATION = 1_000_000_000  # further on: the noise on which alternatives are chosen and grids searched
TRUTH = 4_000_000_000  # seeds of true samples; the second set lies as far again
TOLERANCE = 2e-4  # of the teacher: between two resolutions, as a share of the root mean square of its end points
FIRST, MOST = 64, 512  # denoiser calls of the teacher
PAIRS = 2048  # samples that metrics of all pairs look at
SHOWN = 6  # end points of a cell that are kept for strips
JUMPS = 32  # trajectories of the grid search
RESULTS, LINES, CACHE = "results.json", "results.jsonl", "cache"
NOT_OPTIONS = {"sampler", "process", "steps", "nfe", "guided", "options"}  # of make_plan: they are no part of a text
OTHERWISE = "another --out, or --overwrite to start anew"
Cell = dict[str, Any]


# ---- what is measured, and how


@dataclass(frozen=True)
class Bed:
    """A denoiser and how it is measured.

    Args:
        n: samples, of seeds `seed`, `seed + 1`, ...; a class-conditional denoiser draws its classes in turn.
        validation: samples on which alternatives are chosen.
        teacher: most calls of the teacher; 0 for none, and then no end points are compared.
        truth: true samples (n, *shape), where the denoiser cannot draw them itself (`sample(n, seed)`).
        features: of the distribution distances; the samples themselves when None.
        digest: of what the denoiser was made from, for the record.
    """

    name: str
    denoiser: Denoiser
    n: int = 256
    seed: int = SEED
    validation: int = 64
    teacher: int = MOST
    truth: Tensor | None = None
    features: metrics.Features | None = None
    digest: str | None = None
    device: str = "cpu"
    batch: int = 256

    @property
    def exact(self) -> bool:
        """Whether the denoiser is in closed form: then the states are float64."""
        return hasattr(self.denoiser, "log_prob")

    @property
    def dtype(self) -> torch.dtype:
        """Of the states."""
        return torch.float64 if self.exact else torch.float32

    @property
    def pictures(self) -> bool:
        """Whether its samples can be shown."""
        shape = self.denoiser.shape  # type: ignore[attr-defined]
        return len(shape) == 3 and shape[0] in (1, 3)

    @property
    def settings(self) -> dict[str, Any]:
        """What a cell's figures depend on."""
        keys = ("n", "seed", "validation", "teacher", "digest")
        found = {key: getattr(self, key) for key in keys}
        found |= {"process": repr(self.denoiser.process), "evals per call": getattr(self.denoiser, "evals", 1)}
        return found | {"truth": None if self.truth is None else len(self.truth), "features": self.features is not None}

    def seeds(self, validation: bool = False) -> list[int]:
        first = self.seed + (VALIDATION if validation else 0)
        return [first + i for i in range(self.validation if validation else self.n)]

    def labels(self, n: int) -> list[int] | None:
        """The classes in turn."""
        classes = getattr(self.denoiser, "labels", None)
        return [i % len(classes) for i in range(n)] if classes else None

    def run(self, plan: Plan, seeds: Sequence[int]) -> Tensor:
        """End points of a plan, NaN where it failed."""
        labels = self.labels(len(seeds))
        how: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "batch": self.batch, "nan": "flag"}
        return torch.cat([part.x.cpu() for part in batches(self.denoiser, plan, seeds, label=labels, **how)])

    def true(self) -> Tensor | None:
        """Held-out true samples: those given, or as many as are drawn."""
        if self.truth is not None:
            return self.truth
        draw = getattr(self.denoiser, "sample", None)
        return None if draw is None else draw(self.n, seed=TRUTH)

    def two_true(self) -> tuple[Tensor, Tensor] | None:
        """Two sets of true samples, for the floor: the halves of those given."""
        truth = self.true()
        if truth is None or self.truth is not None:
            return None if truth is None or len(truth) < 8 else (truth[::2], truth[1::2])
        return truth, self.denoiser.sample(self.n, seed=2 * TRUTH)  # type: ignore[attr-defined]


GRIDS = {  # alternatives of grid=best
    "alpha = 1": ("karras", "polyexponential(0.8)", "ays-svd", "cosine", "cosine(0.5)"),
    "VP": ("log-snr", "time", "time(1.5)", "time-quadratic", "ays-svd"),
    "Flow": ("time", "time(1.5)", "beta", "cosine(0.7)", "ays-svd"),
}
TEACHER = {"alpha = 1": "karras", "VP": "time-quadratic", "Flow": "time"}


@dataclass(frozen=True)
class Sampler:
    """What a sampler's text says: a name, and alternatives of its options."""

    text: str
    name: str
    options: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Sampler":
        """Read NAME?KEY=VALUE&KEY=VALUE/VALUE.

        Raises:
            UsageError: another form, or an unknown recipe.
        """
        name, query, rest = text.partition("?")
        options: dict[str, tuple[Any, ...]] = {}
        for pair in rest.split("&") if query else []:
            key, equals, value = pair.partition("=")
            if not key or not equals or not value or key in options:
                raise UsageError(
                    f"sampler {text!r:.200}: cannot read {pair!r:.60}", "unipc2?chart=flow&grid=karras/time"
                )
            options[key] = tuple(_value(part) for part in value.split("/"))
        found = cls(text, name, options)
        if found.kind == "catalogue" and name != "auto":
            recipe(name)
        if found.kind in ("plan", "plans", "fitted") and options:
            raise UsageError(f"sampler {text!r:.200}: a plan has no options", name)
        return found

    def check(self) -> None:
        """Look its names up, before anything is measured: what is only misspelt is not left out.

        Raises:
            UsageError: an unknown option, chart, grid or peer, or a folder without plans. FileError: a plan that
                cannot be read. MissingError: a peer's package is not installed.
        """
        if self.kind in ("plan", "plans"):
            _load_plans(self.name)
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
        """The options, one choice after the other."""
        given = {**self.options}
        if "grid" in given:
            best = GRIDS[auto.family(process)]
            given["grid"] = tuple(itertools.chain(*(best if one == "best" else (one,) for one in given["grid"])))
        return [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text, text)


class Way(NamedTuple):
    """One way to draw: how it was chosen, in words, and what gives the end points and the calls made."""

    words: str
    draw: Callable[[list[int]], tuple[Tensor, int]]


class Measurer:
    """Measures samplers on one bed; the teacher and the searched grids are made when they are first needed."""

    def __init__(self, bed: Bed, cache: Path | None = None):
        self.bed, self.cache = bed, cache
        self._jumps: Jumps | None = None
        self._ends: dict[bool, tuple[Tensor, dict[str, Any]]] = {}

    def cell(self, sampler: Sampler, evals: int) -> Cell:
        """The figures of a sampler at a number of evaluations, or why there are none, under "skipped"."""
        cell: Cell = {"bed": self.bed.name, "sampler": sampler.text, "evals": evals}
        try:
            return cell | self._measured(sampler, evals)
        except (UsageError, NumericalError) as error:
            return cell | {"skipped": error.message}

    def _measured(self, sampler: Sampler, evals: int) -> dict[str, Any]:
        per_call = getattr(self.bed.denoiser, "evals", 1)
        if evals % per_call:
            raise UsageError(f"{evals} evaluations are no whole number of calls of {per_call}")
        ways = self.ways(sampler, evals // per_call)
        tried: dict[str, float] = {}
        way = ways[0]
        if len(ways) > 1:
            tried = self._tried(ways)
            way = min(ways, key=lambda way: tried[way.words])
        x, nfe = way.draw(self.bed.seeds())
        lost = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        if lost:
            raise NumericalError(f"{lost} of {len(x)} samples are not finite")
        figures: dict[str, Any] = {"nfe": nfe, "chosen": way.words}
        if tried:
            figures["tried"] = {words: _round(error) for words, error in tried.items() if math.isfinite(error)}
        if self.bed.teacher:
            figures |= ends(x, self.converged()[0], 2.0 if self.bed.pictures else None)
        figures |= self.distribution(x)
        self._keep(sampler, evals, x)
        return figures

    def _tried(self, ways: list[Way]) -> dict[str, float]:
        """The error of each on the validation noise; infinite where it failed."""
        if not self.bed.teacher:
            raise UsageError("alternatives are chosen by their end points, and there is no teacher", "one alternative")
        seeds, errors, failure = self.bed.seeds(True), {}, None
        target = self.converged(True)[0].double()
        for way in ways:
            try:
                error = float((way.draw(seeds)[0].double() - target).pow(2).mean().sqrt())
            except UsageError as found:
                failure, error = found, math.inf
            errors[way.words] = error if math.isfinite(error) else math.inf
        if failure is not None and not any(map(math.isfinite, errors.values())):
            raise failure
        return errors

    # ---- ways

    def ways(self, sampler: Sampler, nfe: int) -> list[Way]:
        """All that the text allows.

        Raises:
            UsageError: none at this number of calls.
        """
        if sampler.kind in ("plan", "plans", "fitted"):
            return [Way(words, self._runner(plan)) for words, plan in self._plans(sampler, nfe)]
        make = self._peer if sampler.kind == "peer" else self._recipe
        alternatives = sampler.alternatives(self.bed.denoiser.process)
        if len(alternatives) == 1:
            return [make(sampler, nfe, alternatives[0])]
        found, failure = [], None
        for options in alternatives:
            try:
                found.append(make(sampler, nfe, options))
            except UsageError as error:
                failure = error
        if not found and failure is not None:
            raise failure
        return found

    def _recipe(self, sampler: Sampler, nfe: int, options: dict[str, Any]) -> Way:
        denoiser, given = self.bed.denoiser, dict(options)
        guided = getattr(denoiser, "evals", 1) > 1
        if given.get("grid") == "gits":
            rest = {key: value for key, value in given.items() if key not in ("grid", "coefficient")}
            steps = make_plan(sampler.name, denoiser.process, nfe=nfe, guided=guided, **rest).steps
            grid = self.jumps().grid(steps, given.get("coefficient", 1.15))
            plan = make_plan(sampler.name, denoiser.process, grid=grid, guided=guided, **rest)
        else:
            plan = make_plan(sampler.name, denoiser.process, nfe=nfe, guided=guided, **given)
        words = _words(options)
        if sampler.name == "auto":
            words = f"{plan.name} {plan.meta['chart']} {plan.meta['grid']}"
        return Way(words, self._runner(plan))

    def _peer(self, sampler: Sampler, nfe: int, options: dict[str, Any]) -> Way:
        bed, given = self.bed, dict(options)
        grid, process = given.pop("grid", None), bed.denoiser.process
        lay: peers.Lay | None = None
        if grid == "gits":
            lay = lambda steps: self.jumps().grid(steps).tolist()  # noqa: E731
        elif grid is not None:
            lay = lambda steps: grids.times(process, grid, steps)  # noqa: E731

        def draw(seeds: list[int]) -> tuple[Tensor, int]:
            shape, labels, parts, calls = bed.denoiser.shape, bed.labels(len(seeds)), [], 0  # type: ignore[attr-defined]
            for done in range(0, len(seeds), bed.batch):
                some = seeds[done : done + bed.batch]
                cond = {} if labels is None else {"label": torch.tensor(labels[done : done + bed.batch]).to(bed.device)}
                x = process.sigma(process.t_max) * noise.normal(some, noise.INITIAL, shape, bed.dtype, bed.device)
                with torch.no_grad():
                    end, calls = peers.draw(sampler.name, bed.denoiser, x, some, nfe, lay, cond, **given)
                parts.append(end.cpu())
            return torch.cat(parts), calls

        return Way(_words(options), draw)

    def _plans(self, sampler: Sampler, nfe: int) -> list[tuple[str, Plan]]:
        """Those that fit, with their names."""
        process = self.bed.denoiser.process
        if sampler.kind == "fitted":
            own = getattr(self.bed.denoiser, "plans", None) or {}
            known = [(f"{name}", plan) for name, plan in own.items()]
            where = f"the denoiser of {self.bed.name}"
        else:
            own, where = getattr(self.bed.denoiser, "fingerprint", None), sampler.name
            known = [(path.name, plan) for path, plan in _load_plans(where)]
            if sampler.kind == "plans" and own is not None:  # a single file is measured wherever it fits
                known = [(name, plan) for name, plan in known if plan.fitted_to in (None, own)]
        found = [(name, plan) for name, plan in known if plan.nfe == nfe and plan.process == process]
        if not found:
            raise UsageError(f"{where} has no plan of {nfe} calls for {process}")
        return found

    def _runner(self, plan: Plan) -> Callable[[list[int]], tuple[Tensor, int]]:
        return lambda seeds: (self.bed.run(plan, seeds), plan.nfe)

    def jumps(self) -> Jumps:
        """Of the grid search, measured once per bed on the validation noise."""
        if self._jumps is None:
            bed, n = self.bed, min(JUMPS, self.bed.validation)
            how: dict[str, Any] = {"dtype": bed.dtype, "device": bed.device, "label": bed.labels(n), "batch": n}
            self._jumps = measure_jumps(bed.denoiser, n, seed=bed.seeds(True)[0], **how)
        return self._jumps

    # ---- what is compared with

    def converged(self, validation: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """The teacher's end points, and how near they are to the exact ones: "calls", "error" (RMS)."""
        if validation not in self._ends:
            self._ends[validation] = self._cached("validation" if validation else "test", validation)
        return self._ends[validation]

    def _cached(self, name: str, validation: bool) -> tuple[Tensor, dict[str, Any]]:
        file = None if self.cache is None else self.cache / slug(self.bed.name) / f"{name}.safetensors"
        if file is not None and file.is_file():
            try:
                ends = safetensors.torch.load(file.read_bytes())["x"]
                return ends, json.loads(read_header(file).metadata["teacher"])
            except (safetensors.SafetensorError, KeyError, ValueError) as error:
                raise FileError(f"{file}: damaged", "delete it: it is made again") from error
        ends, how = teacher(self.bed, validation)
        if file is not None:
            _folder(file.parent)
            write_atomic(file, safetensors.torch.save({"x": ends}, {"teacher": json.dumps(how)}))
        return ends, how

    def distribution(self, x: Tensor) -> dict[str, Any]:
        """Distances from held-out true samples; empty where there are none."""
        return {} if self.truth is None else distances(self.bed, x, *self.truth)

    @functools.cached_property
    def truth(self) -> tuple[Tensor, Tensor] | None:
        """Held-out true samples, and their features."""
        found = self.bed.true()
        return None if found is None else (found, featured(self.bed, found))

    def floor(self) -> dict[str, Any]:
        """What no sampler can pass: the teacher's own error, its distances, those between two sets of true samples."""
        found: dict[str, Any] = {}
        if self.bed.teacher:
            x, how = self.converged()
            found["teacher"] = how | self.distribution(x)
        pair = self.bed.two_true()
        if pair is not None:
            found["truth"] = distances(self.bed, pair[1], pair[0], featured(self.bed, pair[0]))
        return found

    def _keep(self, sampler: Sampler, evals: int, x: Tensor) -> None:
        if self.cache is not None and self.bed.pictures:
            file = strip(self.cache, self.bed.name, sampler.text, evals)
            _folder(file.parent)
            write_atomic(file, safetensors.torch.save({"x": x[:SHOWN].half().contiguous()}))


def teacher(bed: Bed, validation: bool = False) -> tuple[Tensor, dict[str, Any]]:
    """End points of the PF-ODE: exact on a Gaussian, else of `unipc3` in the chart flow, its steps doubled.

    Until two resolutions differ by less than a share TOLERANCE of the end points' root mean square, or by `bed.teacher`
    calls; "error" is the difference of the last two, which overestimates that of the finer one.
    """
    denoiser, process, seeds = bed.denoiser, bed.denoiser.process, bed.seeds(validation)
    flow = getattr(denoiser, "flow", None)
    if flow is not None:
        shape = denoiser.shape  # type: ignore[attr-defined]
        x = process.sigma(process.t_max) * noise.normal(seeds, noise.INITIAL, shape, bed.dtype)
        return flow(x, process.t_max, process.t_data), {"calls": 0, "error": 0.0}
    grid, calls = TEACHER[auto.family(process)], min(FIRST, bed.teacher)

    def solved(nfe: int) -> Tensor:
        return bed.run(make_plan("unipc3", process, nfe=nfe, grid=grid, chart="flow"), seeds)

    before = solved(max(2, calls // 2))
    while True:
        x = solved(calls)
        if not torch.isfinite(x).all():
            raise NumericalError(f"{bed.name}: the fine solution of {calls} calls is not finite")
        error, size = (z.double().pow(2).mean().sqrt().item() for z in (x - before, x))
        if error < TOLERANCE * size or 2 * calls > bed.teacher:
            return x, {"calls": calls, "error": _round(error), "size": _round(size)}
        before, calls = x, 2 * calls


def ends(x: Tensor, converged: Tensor, peak: float | None) -> dict[str, Any]:
    """`metrics.end_point` as JSON."""
    found = metrics.end_point(x, converged, peak)
    psnr = {} if math.isinf(found.psnr) else {"psnr": _round(found.psnr)}
    return {"rms": _three(found.rms), "median": _three(found.median), **psnr, "flipped": _three(found.flipped)}


def featured(bed: Bed, x: Tensor) -> Tensor:
    """Samples in the bed's features."""
    return x if bed.features is None else bed.features(x)


def distances(bed: Bed, x: Tensor, truth: Tensor, seen: Tensor) -> dict[str, Any]:
    """Every distribution metric that the bed has, as JSON; `seen` are the features of the truth."""
    a, b, features = x[:PAIRS], truth[:PAIRS], featured(bed, x)
    found: dict[str, Any] = {
        "energy": _three(metrics.energy_distance(a, b)),
        "sliced": _three(metrics.sliced_wasserstein(a, b)),
        "frechet": _round(metrics.frechet_distance(features, seen)),
        "kid": _round(metrics.kernel_distance(features[:PAIRS], seen[:PAIRS])),
    }
    precision, recall = metrics.precision_recall(features[:PAIRS], seen[:PAIRS])
    found |= {"precision": _round(precision), "recall": _round(recall)}
    modes = getattr(bed.denoiser, "modes", None)
    weights = getattr(bed.denoiser, "weights", None)
    if modes is not None and weights is not None and 1 < len(weights) <= len(x) / 10:
        found["modes"] = _round(metrics.mode_distance(modes(x), weights))
    log_prob = getattr(bed.denoiser, "log_prob", None)
    if log_prob is not None:
        found["log_prob"] = _round(log_prob(x).mean().item())
    return found


# ---- the folder


class Folder:
    """A benchmark on disk: results.jsonl, a line per cell as it ends; results.json, when all are there; cache/.

    Several processes may fill one folder, each with beds of its own.
    """

    def __init__(self, path: str | Path, beds: Sequence[Bed], overwrite: bool = False):
        self.path, self.beds = Path(path), beds
        self.settings = {bed.name: bed.settings for bed in beds}
        self.known: dict[str, dict[str, Any]] = {}
        found = self._found()
        if found is not None and overwrite:
            for name in (LINES, RESULTS):
                (self.path / name).unlink(missing_ok=True)
            for file in (self.path / CACHE).rglob("*.safetensors"):
                file.unlink()
            found = None
        self.cells: dict[tuple[str, str, int], Cell] = {}
        self.floors: dict[str, dict[str, Any]] = {}
        for line in found or []:
            self._take(line)
        _folder(self.path / CACHE)

    @property
    def cache(self) -> Path:
        return self.path / CACHE

    def add(self, line: dict[str, Any]) -> None:
        """Keep a line, on disk when this returns."""
        try:
            with (self.path / LINES).open("ab", buffering=0) as file:
                file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
                os.fsync(file.fileno())
        except OSError as error:
            raise WriteError(f"{self.path / LINES}: cannot be written: {error.strerror}", "another --out") from error
        self._take(line)

    def start(self) -> None:
        """Say what the lines to come were made with; nothing where that was said."""
        for name, settings in self.settings.items():
            if name not in self.known:
                self.add({"settings": settings, "bed": name})

    def finish(self) -> dict[str, Any]:
        """Write results.json of all lines there, those of other processes, too; and return it."""
        for line in self._found() or []:
            self._take(line)
        beds = {name: settings | {"floor": self.floors.get(name, {})} for name, settings in self.known.items()}
        order = {name: i for i, name in enumerate(beds)}
        cells = sorted(self.cells.values(), key=lambda c: (order[c["bed"]], c["sampler"], c["evals"]))
        result = {"pfode": pfode.__version__, "versions": versions(), "beds": beds, "cells": cells}
        parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items() if key != "cells"]
        rows = ",\n".join(json.dumps(cell, allow_nan=False) for cell in cells)
        write_atomic(self.path / RESULTS, ("{\n" + ",\n".join(parts) + f',\n"cells": [\n{rows}\n]\n}}\n').encode())
        return result

    def _take(self, line: dict[str, Any]) -> None:
        if "settings" in line:
            self.known[line["bed"]] = line["settings"]
        elif "floor" in line:
            self.floors[line["bed"]] = line["floor"]
        else:
            self.cells[line["bed"], line["sampler"], line["evals"]] = line

    def _found(self) -> list[dict[str, Any]] | None:
        """The lines of results.json, then the later ones; None in a new folder."""
        lines = self._of_results()
        try:
            raw = (self.path / LINES).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return lines
        except OSError as error:
            raise FileError(f"{self.path / LINES}: cannot be read: {error.strerror}", OTHERWISE) from error
        return [*(lines or []), *(line for line in map(_parsed, raw.splitlines()) if line is not None)]

    def _of_results(self) -> list[dict[str, Any]] | None:
        """The lines that results.json stands for."""
        file = self.path / RESULTS
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_bytes())
            lines: list[dict[str, Any]] = []
            for name, settings in found["beds"].items():
                kept = {key: value for key, value in settings.items() if key != "floor"}
                lines += [{"settings": kept, "bed": name}]
                lines += [{"floor": settings["floor"], "bed": name}] if settings["floor"] else []
            return lines + found["cells"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{file}: not a benchmark's", OTHERWISE) from error

    def compare(self) -> None:
        """Refuse to go on where cells were measured otherwise.

        Raises:
            UsageError: with the setting that differs.
        """
        for name, settings in self.settings.items():
            for key, value in self.known.get(name, settings).items():
                if settings.get(key) != value:
                    was = f"{key} is {value} there, {settings.get(key)} here"
                    raise UsageError(f"{self.path} was made with other settings: {name}: {was}", OTHERWISE)


def bench(
    beds: Iterable[tuple[Bed, Sequence[str]]],
    out: str | Path,
    evals: Sequence[int] = EVALS,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure every bed's samplers, as far as the folder does not have them, and write results.json.

    Args:
        beds: each with the texts of its samplers.
        evals: network forwards per sample.
        progress: told the cells done, those to do in all, and what comes next.

    Returns:
        what results.json holds.

    Raises:
        UsageError: a text that says nothing or has an unknown name, or a folder with cells of other settings.
        WriteError: the folder cannot be written.
    """
    listed = [(bed, [Sampler.parse(text) for text in texts]) for bed, texts in beds]
    for sampler in itertools.chain(*(samplers for _, samplers in listed)):
        sampler.check()
    counts = [integer("evals", k, 1, grids.MAX_STEPS) for k in evals]
    folder = Folder(out, [bed for bed, _ in listed], overwrite)
    folder.compare()
    folder.start()
    todo = [
        (bed, sampler, k)
        for bed, samplers in listed
        for sampler in samplers
        for k in counts
        if (bed.name, sampler.text, k) not in folder.cells
    ]
    done = 0
    for bed, _ in listed:
        measurer = Measurer(bed, folder.cache)
        if bed.name not in folder.floors:
            if progress is not None:
                progress(done, len(todo), f"{bed.name}: converged solution")
            folder.add({"bed": bed.name, "floor": measurer.floor()})
        for _, sampler, k in (one for one in todo if one[0] is bed):
            if progress is not None:
                progress(done, len(todo), f"{bed.name}: {sampler.text} {k}")
            folder.add(measurer.cell(sampler, k))
            done += 1
    if progress is not None:
        progress(done, len(todo), "")
    return folder.finish()


def strip(cache: Path, bed: str, sampler: str, evals: int) -> Path:
    """Where the first end points of a cell are kept."""
    return cache / slug(bed) / f"{slug(sampler)}-{evals}.safetensors"


def slug(text: str) -> str:
    """A file name for any text."""
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "_", text)[:80]
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on, those that are there."""
    found = {}
    for name in ("torch", "numpy", "diffusers", "k-diffusion"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _load_plans(name: str) -> list[tuple[Path, Plan]]:
    path = Path(name)
    if not path.is_dir():
        return [(path, Plan.load(path))]
    files = sorted(path.rglob("*.safetensors"))
    kinds = [read_header(file).metadata.get("pfode.kind") for file in files]
    plans = [(file, Plan.load(file)) for file, kind in zip(files, kinds, strict=True) if kind == "plan"]
    if not plans:
        raise UsageError(f"{name}: no plan files in it", "pfode fit --out DIR writes some")
    return plans


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):  # torn by a kill
        return None
    return line if isinstance(line, dict) and "bed" in line else None


def _folder(path: Path) -> None:
    """Make a folder; that of the cache tells git to leave it out."""
    make_folder(path)
    if path.name == CACHE and not os.path.exists(path / ".gitignore"):
        write_atomic(path / ".gitignore", b"*\n")


def _words(options: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items())


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _three(estimate: metrics.Estimate) -> list[float]:
    return [_round(value) for value in estimate]


# ---- what it says


class Ranking(NamedTuple):
    """Samplers at a number of evaluations, the best first: text, and the geometric mean over beds of error / best."""

    evals: int
    order: list[tuple[str, float]]


def figure(cell: Cell, key: str) -> float | None:
    """The value of a metric in a cell; None where it has none."""
    found = cell.get(key)
    return found[0] if isinstance(found, list) else found


def table(result: dict[str, Any], key: str) -> dict[tuple[str, str, int], float]:
    """A metric by (bed, sampler, evals), where it was measured."""
    values = (((c["bed"], c["sampler"], c["evals"]), figure(c, key)) for c in result["cells"])
    return {where: value for where, value in values if value is not None}


def rank(result: dict[str, Any], key: str = "rms") -> list[Ranking]:
    """By number of evaluations, those samplers that have a figure on more than half of the beds that have any there.

    Where none has, those on most beds.
    """
    values, rankings = table(result, key), []
    for k in sorted({k for _, _, k in values}):
        here = {(bed, sampler): max(value, 1e-12) for (bed, sampler, at), value in values.items() if at == k}
        beds = {bed for bed, _ in here}
        best = {bed: min(value for (b, _), value in here.items() if b == bed) for bed in beds}
        ratios: dict[str, list[float]] = {}
        for (bed, sampler), value in here.items():
            ratios.setdefault(sampler, []).append(value / best[bed])
        least = min(max(map(len, ratios.values())), len(beds) // 2 + 1)
        means = {sampler: geometric_mean(found) for sampler, found in ratios.items() if len(found) >= least}
        rankings.append(Ranking(k, sorted(means.items(), key=lambda item: item[1])))
    return rankings


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers, at least one."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
