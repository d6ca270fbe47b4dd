"""The folder of `pfode sample --separate`: its settings, its results and its pictures, checked before it is continued.

run.json holds the settings and stands there before the first picture; results.jsonl is a journal with one line per
picture, added when the picture is on the disk, and results.RANK.jsonl is that of another process while it draws.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pfode
from pfode.cli.job import Cost, Job, settings
from pfode.cli.settings import parse_seeds
from pfode.denoiser import forwards
from pfode.errors import FileError, UsageError, WriteError
from pfode.files import FolderLock, lock_folder, read_file, write_atomic
from pfode.journal import Journal

__all__ = ["DONE", "NON_FINITE", "RESULTS", "RUN", "Folder", "Line", "picture", "same_run"]

RUN, RESULTS = "run.json", "results.jsonl"
DONE, NON_FINITE = "done", "non_finite"
LINE_DIGEST = "line_sha256"  # of a line; its "sha256" is that of the picture
MAX_SETTINGS = 10_000_000  # bytes of run.json
ANEW = "another --separate, or --overwrite to start anew"

Line = dict[str, Any]  # of results.jsonl


def picture(seed: int) -> str:
    """The name of a seed's picture in the folder."""
    return f"{seed:06d}.png"


class Folder:
    """The folder of a job: run.json, results.jsonl, pictures, and results.RANK.jsonl while other processes draw."""

    def __init__(self, job: Job):
        self.path = Path(job.options["separate"])
        self.seeds = job.seeds
        self.job = job
        self.lock: FolderLock | None = None
        self.settings = settings(job, self.cost(())) | {"n": len(job.seeds), "device": job.device.type}

    def open(self, overwrite: bool) -> None:
        """Make the folder, or clear up what a killed run left in it. For the first process; it then owns the folder.

        Raises:
            UsageError: another run's folder. FileError: a damaged one. WriteError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.path, "run", "wait for it, or another --separate")
            found = self._settings()
            if found is not None and overwrite:
                self._clear()
            elif found is not None:
                self._compare(found)
            elif not overwrite:
                self._refuse_strangers()
            write_atomic(self.path / RUN, (json.dumps(self.settings, indent=2) + "\n").encode())
            for stale in self.path.glob(".*.tmp"):
                if re.fullmatch(r"\.(\d{6,}\.png|run\.json|results\.jsonl)\.\w+\.tmp", stale.name):
                    stale.unlink()
            lines = self.lines()
            self._rewrite({seed: line for seed, line in lines.items() if self._sound(line)})
        except OSError as error:
            if isinstance(error, WriteError):
                raise
            raise _unwritable(self.path, error) from error

    def cost(self, seeds: Sequence[int]) -> Cost:
        """The steps, calls and evaluations of the pictures of these seeds; those of a plan are known before the run."""
        plan, lines = self.job.plan, self.lines() if seeds and not self.job.fixed else {}
        if isinstance(plan, pfode.Plan):
            return Cost(plan.steps, plan.nfe, forwards(self.job.net, plan.t))
        return Cost.over([lines[seed] for seed in seeds if seed in lines])

    def finish(self) -> None:
        """Put the lines of all processes into results.jsonl, in the order of the seeds."""
        self._rewrite(self.lines(DONE, NON_FINITE))

    def close(self) -> None:
        """Release the lock, so that other runs may use the folder."""
        if self.lock is not None:
            self.lock.close()

    def lines(self, *statuses: str) -> dict[int, Line]:
        """The lines of results.jsonl and of its parts by their seed, the latest of each, in the order of the seeds.

        Args:
            statuses: which to take; "done" by default.
        """
        latest: dict[int, Line] = {}
        for part in self._parts():
            latest |= {line["seed"]: line for line in part.read(skip=True) if type(line.get("seed")) is int}
        wanted = statuses or (DONE,)
        found = ((seed, latest.get(seed)) for seed in self.seeds)
        return {seed: line for seed, line in found if line is not None and line.get("status", DONE) in wanted}

    def journal(self, rank: int = 0) -> Journal:
        """The journal to which the process of this rank adds its lines."""
        name = f"results.{rank}.jsonl" if rank else RESULTS
        return Journal(self.path / name, "a results.jsonl", "another --separate", digest=LINE_DIGEST)

    def _parts(self) -> list[Journal]:
        """The journals of all processes, the first one's first."""
        names = (
            re.fullmatch(r"results\.([1-9]\d{0,8})\.jsonl", path.name) for path in self.path.glob("results.*.jsonl")
        )
        return [self.journal(rank) for rank in (0, *sorted(int(name[1]) for name in names if name))]

    def _rewrite(self, lines: dict[int, Line]) -> None:
        whole, *others = self._parts()
        whole.rewrite(lines.values())
        for part in others:
            part.remove()

    def _sound(self, line: Line) -> bool:
        """Whether the picture of a line is there as it was written."""
        try:
            data = (self.path / picture(line["seed"])).read_bytes()
        except OSError:
            return False
        return hashlib.sha256(data).hexdigest() == line.get("sha256")

    def _settings(self) -> dict[str, Any] | None:
        file = self.path / RUN
        if not os.path.lexists(file):
            return None
        try:
            found = json.loads(read_file(file, MAX_SETTINGS, "the settings of a run"))
        except (ValueError, RecursionError) as error:
            if isinstance(error, FileError):
                raise
            found = None
        return found if isinstance(found, dict) else {}

    def _compare(self, found: dict[str, Any]) -> None:
        """Refuse to continue a run whose settings would make other pictures; more pictures of the same are welcome."""
        try:
            there, here = _flat(found), _flat(self.settings)
            seeds = _seeds(found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FileError(f"{self.path / RUN}: damaged", ANEW) from error
        for key in dict.fromkeys((*here, *there)):
            if there.get(key) != here.get(key):
                was, now = (_shown(value.get(key)) for value in (there, here))
                raise UsageError(
                    f"{self.path} holds pictures of other settings: {key} is {was} there, {now} here", ANEW
                )
        if self.seeds[: len(seeds)] != seeds:
            fewer = seeds[: len(self.seeds)] == self.seeds
            name = "--n" if fewer else "--seed"
            was, now = (len(seeds), len(self.seeds)) if fewer else (seeds[0], self.seeds[0])
            if not fewer and was == now:
                name, was, now = "--seeds", f"{len(seeds)} seeds", f"{len(self.seeds)} others"
            raise UsageError(f"{self.path} holds pictures of other settings: {name} is {was} there, {now} here", ANEW)

    def _refuse_strangers(self) -> None:
        names = {RESULTS, *map(picture, self.seeds)}
        strange = next((name for name in os.listdir(self.path) if name in names), None)
        if strange is not None:
            raise UsageError(f"{self.path / strange} is there, but no {RUN} that says how it was made", ANEW)

    def _clear(self) -> None:
        """Remove the pictures, the results and, last, the settings of the run before."""
        for name in os.listdir(self.path):
            if re.fullmatch(r"\d{6,}\.png|results(\.\d+)?\.jsonl", name):
                (self.path / name).unlink()
        (self.path / RUN).unlink()


def same_run(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two `settings` make the same pictures, of whichever seeds and at whatever cost."""
    cost = ("steps", "nfe", "evals", "nfe_mean")
    there, here = (_flat({key: value for key, value in said.items() if key not in cost}) for said in (one, other))
    return there == here


def _unwritable(path: Path, error: OSError) -> WriteError:
    return WriteError(f"{path}: cannot be written: {error.strerror or error}", "another --separate")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings on which a picture depends, under the names that messages show."""
    apart = ("n", "seed", "seeds", "scale")
    options = {f"--{key}": value for key, value in settings["options"].items() if key not in apart}
    others = {key: value for key, value in settings.items() if key not in ("options", *apart)}
    device = {"--device": others.pop("device", None)}
    return options | device | {"the digest of the model": others.pop("model")["digest"]} | others


def _seeds(settings: dict[str, Any]) -> list[int]:
    options = settings["options"]
    if "seeds" in options:
        return parse_seeds(options["seeds"])
    return list(range(options["seed"], options["seed"] + options["n"]))


def _shown(value: Any) -> str:
    return (
        "not given"
        if value is None
        else f"{value:.12}..."
        if isinstance(value, str) and len(value) > 40
        else f"{value}"
    )
