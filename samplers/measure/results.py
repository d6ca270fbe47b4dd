"""What a benchmark keeps on disk, so that it can be gone on with, and what its results say.

    results.jsonl    a line per cell as it ends, see `pfode.journal`
    results.json     all of them, when all are there
    cache/           reference solutions, and the first samples of every cell

Everything that is read again carries a digest: what is not as it was written is an error that names the file.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

import pfode
from pfode.errors import FileError, UsageError
from pfode.files import make_folder, read_file, write_atomic
from pfode.journal import Journal, opened, sealed
from pfode.tensors import read_sealed, write_tensors

if TYPE_CHECKING:
    from pfode.samplers.measure.problem import Problem

__all__ = ["Cache", "Cell", "Folder", "Ranking", "figure", "geometric_mean", "rank", "table"]

RESULTS, LINES, CACHE = "results.json", "results.jsonl", "cache"
SHOWN = 6  # samples of a cell that are kept, to be shown
LIMIT = 2**30  # bytes of results.json that are read
ANEW = "another --out, or --overwrite to start anew"
WHOSE, KIND = "a benchmark's", "benchmark cache"
Cell = dict[str, Any]


class Cache:
    """Tensors of a benchmark on disk; each file says what it was made for. The folder tells git to leave it out.

    Args:
        path: the folder; made with the first file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def reference(self, problem: "Problem", validation: bool) -> tuple[Tensor, dict[str, Any]] | None:
        """The reference solution and how it was made; None where it is not there.

        Raises:
            FileError: damaged, or of another problem.
        """
        file, made_for = self._reference_file(problem, validation), _purpose(problem, validation=validation)
        if not os.path.lexists(file):
            return None
        n = problem.validation if validation else problem.n
        x, metadata = self._read(file, made_for)
        try:
            how = json.loads(metadata["teacher"])
        except (KeyError, ValueError, RecursionError):
            how = None
        sound = isinstance(how, dict) and all(type(value) in (int, float) for value in how.values())
        if not isinstance(how, dict) or not sound or x.shape != (n, *problem.shape) or not x.is_floating_point():
            raise FileError(f"{file}: not the reference solution of {problem.name}", "delete it: it is made again")
        return x, how

    def save_reference(self, problem: "Problem", validation: bool, x: Tensor, how: dict[str, Any]) -> None:
        """Keep the reference solution."""
        made_for = _purpose(problem, validation=validation)
        self._write(self._reference_file(problem, validation), x, made_for, teacher=json.dumps(how))

    def samples(self, name: str, sampler: str, evals: int) -> Tensor | None:
        """The first samples of a cell, or with sampler "" the first of the reference; None where they were not kept.

        Raises:
            FileError: damaged, or no samples.
        """
        file = self._samples_file(name, sampler, evals) if sampler else self.path / slug(name) / "test.safetensors"
        if not os.path.lexists(file):
            return None
        x, _ = self._read(file, None)
        if not x.is_floating_point():
            raise FileError(f"{file}: no samples", "delete it: the report then leaves them out")
        return x[:SHOWN].float()

    def save_samples(self, problem: "Problem", sampler: str, evals: int, x: Tensor) -> None:
        """Keep the first samples of a cell."""
        made_for = _purpose(problem, sampler=sampler, evals=evals)
        self._write(self._samples_file(problem.name, sampler, evals), x[:SHOWN].half(), made_for)

    def clear(self) -> None:
        """Delete every file of the cache."""
        for file in self.path.rglob("*.safetensors"):
            file.unlink()

    def _reference_file(self, problem: "Problem", validation: bool) -> Path:
        """Where a reference solution is kept."""
        return self.path / slug(problem.name) / f"{'validation' if validation else 'test'}.safetensors"

    def _samples_file(self, name: str, sampler: str, evals: int) -> Path:
        """Where the first samples of a cell are kept."""
        return self.path / slug(name) / f"{slug(sampler)}-{evals}.safetensors"

    def _read(self, file: Path, made_for: str | None) -> tuple[Tensor, dict[str, str]]:
        """The tensor of a file and its metadata, once its digest, and what it was made for, are the right ones."""
        hint = "delete it: it is made again" if made_for else "delete it: the report then leaves it out"
        tensors, metadata = read_sealed(file, KIND, hint)
        if tensors.keys() != {"x"} or made_for not in (None, metadata.get("pfode.for")):
            raise FileError(f"{file}: was made for another problem or other settings", hint)
        return tensors["x"], metadata

    def _write(self, file: Path, x: Tensor, made_for: str, **metadata: str) -> None:
        """Keep a tensor, with what it was made for."""
        make_folder(file.parent)
        if not os.path.lexists(self.path / ".gitignore"):
            write_atomic(self.path / ".gitignore", b"*\n")
        write_tensors(file, {"x": x.contiguous()}, {"pfode.kind": KIND, "pfode.for": made_for, **metadata})


class Folder:
    """A benchmark's folder, locked for as long as it is in use.

    Args:
        path: of the folder, which is there.
        problems: what is about to be measured.
        overwrite: delete what the folder holds.

    Raises:
        FileError: a file in it is damaged.
    """

    def __init__(self, path: str | Path, problems: Sequence["Problem"], overwrite: bool = False):
        self.path, self.problems = Path(path), problems
        self.cache = Cache(self.path / CACHE)
        self.journal = Journal(self.path / LINES, WHOSE, ANEW)
        self.settings = {problem.name: problem.settings for problem in problems}
        self.known: dict[str, dict[str, Any]] = {}
        self.cells: dict[tuple[str, str, int], Cell] = {}
        self.floors: dict[str, dict[str, Any]] = {}
        if overwrite:
            self.journal.remove()
            (self.path / RESULTS).unlink(missing_ok=True)
            self.cache.clear()
        for line in [*self._of_results(), *self.journal.read()]:
            self._take(line)

    def add(self, line: dict[str, Any]) -> None:
        """Keep a line, on disk when this returns."""
        self.journal.add(line)
        self._take(line)

    def adopt(self, other: str | Path) -> None:
        """Take over what another folder has and this one has not, its cache, too.

        Raises:
            UsageError: it measured the same problem with other settings. FileError: it is damaged.
        """
        found = Folder(other, [])
        for name, settings in found.known.items():
            if self.known.get(name, settings) != settings:
                raise UsageError(f"{other}: measured {name} with other settings than {self.path}", ANEW)
            if name not in self.known:
                self.add({"settings": settings, "bed": name})
        for name, floor in found.floors.items():
            if name not in self.floors:
                self.add({"floor": floor, "bed": name})
        for where, cell in found.cells.items():
            if where not in self.cells:
                self.add(cell)
        if found.cache.path.is_dir():
            shutil.copytree(found.cache.path, self.cache.path, dirs_exist_ok=True)

    def start(self) -> None:
        """Say what the lines to come were made with; nothing where that was said.

        Raises:
            UsageError: cells that are there were measured otherwise; with the setting that differs.
        """
        for name, settings in self.settings.items():
            for key, value in self.known.get(name, settings).items():
                if settings.get(key) != value:
                    was = f"{key} is {value} there, {settings.get(key)} here"
                    raise UsageError(f"{self.path} was made with other settings: {name}: {was}", ANEW)
        for name, settings in self.settings.items():
            if name not in self.known:
                self.add({"settings": settings, "bed": name})

    def result(self) -> dict[str, Any]:
        """What results.json says of all lines, without its digest."""
        beds = {name: settings | {"floor": self.floors.get(name, {})} for name, settings in self.known.items()}
        order = {name: i for i, name in enumerate(beds)}
        cells = sorted(self.cells.values(), key=lambda c: (order[c["bed"]], c["sampler"], c["evals"]))
        return {"pfode": pfode.__version__, "versions": versions(), "beds": beds, "cells": cells}

    def finish(self) -> dict[str, Any]:
        """Write results.json; what it says."""
        found = self.result()
        write_atomic(self.path / RESULTS, dumped(found))
        return found

    def _take(self, line: dict[str, Any]) -> None:
        """Note what a line says.

        Raises:
            FileError: it is none that a benchmark writes.
        """
        name, rest = line.get("bed"), {key: value for key, value in line.items() if key != "bed"}
        settings, floor = rest.get("settings"), rest.get("floor")
        if not isinstance(name, str):
            sound = False
        elif settings is not None:
            self.known[name] = settings
            sound = rest.keys() == {"settings"} and _sound_settings(settings)
        elif floor is not None:
            self.floors[name] = floor
            parts = floor.values() if isinstance(floor, dict) else [None]
            sound = rest.keys() == {"floor"} and all(isinstance(part, dict) and _sound_figures(part) for part in parts)
        else:
            sampler, evals = rest.pop("sampler", None), rest.pop("evals", None)
            sound = isinstance(sampler, str) and type(evals) is int and evals > 0 and name in self.known
            sound = sound and _sound_figures(rest)
            if sound:
                self.cells[name, sampler, evals] = line
        if not sound:
            raise FileError(f"{self.path}: its results are not a benchmark's: {line!r:.100}", ANEW)

    def _of_results(self) -> list[dict[str, Any]]:
        """The lines that results.json stands for."""
        file = self.path / RESULTS
        if not os.path.lexists(file):
            return []
        found = opened(read_file(file, LIMIT, "results.json"), os.fspath(file), WHOSE, ANEW)
        try:
            lines: list[dict[str, Any]] = []
            for name, settings in found["beds"].items():
                kept = {key: value for key, value in settings.items() if key != "floor"}
                lines += [{"settings": kept, "bed": name}]
                lines += [{"floor": settings["floor"], "bed": name}] if settings["floor"] else []
            return lines + list(found["cells"])
        except (KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{file}: not a benchmark's", ANEW) from error


WORDS = {"chosen", "skipped"}  # entries of a cell that are texts
TRIPLES = {"rms", "median", "flipped", "energy", "sliced"}  # entries with the ends of their intervals


def _sound_settings(settings: object) -> bool:
    """Whether these are the settings of a problem, as far as reports read them."""
    if not isinstance(settings, dict) or "floor" in settings:
        return False
    counts = (settings.get(key) for key in ("n", "seed", "validation"))
    return isinstance(settings.get("process"), str) and all(type(count) is int for count in counts)


def _sound_figures(figures: dict[str, Any]) -> bool:
    """Whether these are the figures of a cell or of a floor: finite numbers, triples and texts."""

    def number(value: object) -> bool:
        return type(value) in (int, float) and abs(value) < 1e300  # type: ignore[operator]

    for key, value in figures.items():
        if key in WORDS:
            sound = isinstance(value, str)
        elif key == "tried":
            sound = isinstance(value, dict) and all(map(number, value.values()))
        elif key in TRIPLES:
            sound = isinstance(value, list) and len(value) == 3 and all(map(number, value))
        else:
            sound = number(value)
        if not sound:
            return False
    return True


def dumped(result: dict[str, Any]) -> bytes:
    """The bytes of results.json: sealed, one cell a line."""
    whole = sealed(result)
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in whole.items() if key != "cells"]
    rows = ",\n".join(json.dumps(cell, allow_nan=False) for cell in result["cells"])
    return ("{\n" + ",\n".join(parts) + f',\n"cells": [\n{rows}\n]\n}}\n').encode()


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on, those that are there."""
    found = {}
    for name in ("torch", "numpy", "diffusers", "k-diffusion"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def slug(text: str) -> str:
    """A file name for any text."""
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "_", text)[:80]
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _purpose(problem: "Problem", **what: Any) -> str:
    """What a file of the cache is made for: the problem, its settings, and `what` of it."""
    settings = {"problem": problem.name, "shape": list(problem.shape), "dtype": str(problem.dtype)}
    return json.dumps({**settings, **problem.settings, **what}, sort_keys=True)


# ---- what results say


class Ranking(NamedTuple):
    """Samplers at a number of evaluations, the best first: text, and the geometric mean of error / best."""

    evals: int
    order: list[tuple[str, float]]


def figure(cell: Cell, key: str) -> float | None:
    """The value of a metric in a cell; None where it has none."""
    found = cell.get(key)
    return found[0] if isinstance(found, list) else found


def table(result: dict[str, Any], key: str) -> dict[tuple[str, str, int], float]:
    """A metric by (problem, sampler, evals), where it was measured."""
    values = (((c["bed"], c["sampler"], c["evals"]), figure(c, key)) for c in result["cells"])
    return {where: value for where, value in values if value is not None}


def rank(result: dict[str, Any], key: str = "rms") -> list[Ranking]:
    """By number of evaluations, those samplers that have a figure on more than half of the problems that have any.

    Where no sampler has, those on the most problems.
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
