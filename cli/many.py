"""Pictures by the thousand: batch by batch into a folder, where a later run continues.

run.json holds the settings and stands there before the first picture; results.jsonl has one line per picture, added
when the picture is on the disk. What was killed leaves at most half a line and a temporary file: the next run clears
them up, and draws again what has no line or another digest than its line says. A batch always holds the same seeds, in
however many runs and processes it is drawn: a network may round differently in another batch.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import pfode
from pfode.cli.sample import Cost, Job, Progress, flaw, flaws, non_finite, settings, write_film, write_sheet
from pfode.cli.settings import parse_seeds
from pfode.cli.streams import Output
from pfode.denoiser import forwards
from pfode.errors import FileError, PfodeError, UsageError, WriteError
from pfode.files import write_atomic

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pfode.samplers import Samples

RUN, RESULTS = "run.json", "results.jsonl"
DONE, NON_FINITE = "done", "non_finite"
ANEW = "another --separate, or --overwrite to start anew"

Line = dict[str, Any]  # of results.jsonl


def draw(job: Job, out: Output) -> dict[str, Any] | None:
    """Draw what the folder lacks, then write the sheet; what was done, None in all processes but the first.

    Raises:
        PfodeError: as `pfode.sample`, or a folder that cannot be used; what is finished stays.
    """
    from pfode.samplers.sampling import prepared

    share = Share.find(job.device)
    if share.device is not None and job.device.type == "cuda" and job.device.index is None:
        job = replace(job, device=share.device)
    out = out if share.first else replace(out, quiet=True)
    job = replace(job, net=prepared(job.net, None, job.device))
    with contextlib.closing(share), contextlib.closing(Folder(job)) as folder:
        return _draw(job, folder, share, out)


def _draw(job: Job, folder: "Folder", share: "Share", out: Output) -> dict[str, Any] | None:
    from pfode.samplers.sampling import DEFAULT_BATCH

    share.agree(lambda: folder.open(bool(job.options["overwrite"])) if share.first else None)
    kept = folder.lines()
    batch = job.options["batch"] or DEFAULT_BATCH
    spans = [range(i, min(i + batch, len(job.seeds))) for i in range(0, len(job.seeds), batch)]
    todo = [span for span in spans if any(job.seeds[i] not in kept for i in span)]
    if kept:
        out.note(f"{folder.path} has {len(kept)} of {len(job.seeds)} pictures, the others follow")
    began = time.perf_counter()
    mine = [i for span in todo[share.rank :: share.count] for i in span]
    share.agree(lambda: _fill(job, folder, mine, batch, set(kept), share.rank, out))
    seconds = time.perf_counter() - began
    if not share.first:
        return None
    folder.finish()
    lines = folder.lines(DONE, NON_FINITE)
    spoilt = [line for line in lines.values() if line.get("status") == NON_FINITE]
    cost = folder.cost(job.seeds)
    drawn = len(lines) - len(spoilt) - len(kept)
    shown = job.sheet
    sheet = write_sheet(shown, _read(shown, folder), folder.cost(shown.seeds))
    files = [sheet, str(folder.path / RESULTS), str(folder.path / RUN)]
    if job.options["trajectory"] is not None:
        files.insert(1, _film(shown))
    out.note(f"{drawn} drawn, {len(kept)} kept, {len(spoilt)} not finite ({seconds:.2f} s)")
    if spoilt:
        raise non_finite(
            [flaw(job, line["seed"], line["step"], line["time"], line.get("why")) for line in spoilt],
            job,
            f"{folder.path / RESULTS} lists them, the other pictures stand beside it",
        )
    return {"files": files, "drawn": drawn, "kept": len(kept), "cost": cost, "seconds": seconds}


def _fill(job: Job, folder: "Folder", mine: list[int], batch: int, kept: set[int], rank: int, out: Output) -> None:
    """Draw and write the pictures of these indices, batch by batch."""
    from pfode.samplers.sampling import batches

    if not mine:
        return
    how = job.how | {"label": [job.classes[i] for i in mine] if job.classes else None, "batch": batch}
    size, done = batch, 0
    with Progress(len(mine), out) as progress, folder.adding(rank) as add:
        for part in batches(
            job.net,
            seeds=[job.seeds[i] for i in mine],
            **how,
            callback=progress if progress.visible and job.fixed else None,
            nan="flag",
        ):
            if not job.fixed:
                progress.bar.update(len(part.x))
            if part.stats["batch"] < size:
                size = int(part.stats["batch"])
                out.note(f"out of memory: going on with --batch {size}")
            indices = mine[done : done + len(part.x)]
            done += len(part.x)
            _write(job, part, indices, folder, kept, add)
            if part.bad and job.options["nan"] == "raise":
                raise non_finite(flaws(job, part), job, "--nan flag leaves such pictures out and draws the others")


def _write(
    job: Job, part: "Samples", indices: list[int], folder: "Folder", kept: set[int], add: Callable[[Line], None]
) -> None:
    from pfode.cli import images

    pixels = job.pixels(part.x)
    spoilt = {bad.index: bad for bad in part.bad}
    for k, i in enumerate(indices):
        seed = job.seeds[i]
        if seed in kept:
            continue
        if k in spoilt:
            bad = spoilt[k]
            line = {"seed": seed, "status": NON_FINITE, "sample": i, "step": bad.step, "time": bad.time}
            add(line | ({"why": bad.why} if bad.why else {}))
            continue
        own = {key: int(part.stats[key][k]) for key in ("steps", "nfe", "evals") if key in part.stats}
        cost = Cost.over([own]) if own else Cost.of(part)
        data = images.encode_png(pixels[k], settings(job, cost, i))
        write_atomic(folder.path / picture(seed), data)
        digest = hashlib.sha256(data).hexdigest()
        add({"seed": seed, "status": DONE, "file": picture(seed), "sha256": digest, "nfe": part.nfe} | own)


def _read(job: Job, folder: "Folder") -> "np.ndarray":
    """The pictures of the sheet, from the folder; one that is not finite is crossed out."""
    import numpy as np

    from pfode.cli import images
    from pfode.scores.io.pictures import opened

    lines = folder.lines()
    channels, *size = job.shape
    pixels = np.empty((len(job.seeds), *size, *([3] if channels == 3 else [])), np.uint8)
    for place, seed in zip(pixels, job.seeds, strict=True):
        if seed not in lines:
            images.cross_out(place)
            continue
        with opened(picture(seed), folder.path / picture(seed), ("PNG",)) as found:
            place[:] = np.asarray(found)
    return pixels


def _film(job: Job) -> str:
    """The way of the pictures on the sheet; they are drawn once more."""
    return write_film(job, pfode.sample(job.net, seeds=job.seeds, trajectory=True, nan="flag", **job.how))


def picture(seed: int) -> str:
    """The name of a picture."""
    return f"{seed:06d}.png"


class Folder:
    """The folder of a job: run.json, results.jsonl, pictures, and results.RANK.jsonl while other processes draw."""

    def __init__(self, job: Job):
        self.path = Path(job.options["separate"])
        self.seeds = job.seeds
        self.job = job
        self.handle: int | None = None
        self.settings = settings(job, self.cost(())) | {"n": len(job.seeds), "device": job.device.type}

    def open(self, overwrite: bool) -> None:
        """Make the folder, or clear up what a killed run left in it. For the first process; it then owns the folder.

        Raises:
            UsageError: another run's folder. FileError: a damaged one. WriteError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._own()
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
        """What these pictures took; with fixed steps known beforehand."""
        plan, lines = self.job.plan, self.lines() if seeds and not self.job.fixed else {}
        if isinstance(plan, pfode.Plan):
            return Cost(plan.steps, plan.nfe, forwards(self.job.net, plan.t))
        return Cost.over([lines[seed] for seed in seeds if seed in lines])

    def finish(self) -> None:
        """Put the lines of all processes into results.jsonl, in the order of the seeds."""
        self._rewrite(self.lines(DONE, NON_FINITE))

    def close(self) -> None:
        """Let other runs in."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def lines(self, *statuses: str) -> dict[int, Line]:
        """The lines of results.jsonl and of its parts by their seed, the latest of each, in the order of the seeds.

        Args:
            statuses: which to take; "done" by default.
        """
        latest: dict[int, Line] = {}
        for file in self._parts():
            for raw in file.read_bytes().splitlines():
                with contextlib.suppress(ValueError, RecursionError):  # torn by a kill
                    line = json.loads(raw)
                    if isinstance(line, dict) and type(line.get("seed")) is int:
                        latest[line["seed"]] = line
        wanted = statuses or (DONE,)
        found = ((seed, latest.get(seed)) for seed in self.seeds)
        return {seed: line for seed, line in found if line is not None and line.get("status", DONE) in wanted}

    @contextlib.contextmanager
    def adding(self, rank: int) -> Iterator[Callable[[Line], None]]:
        """A function that adds a line to this process's part of the results."""
        path = self.path / (f"results.{rank}.jsonl" if rank else RESULTS)
        try:
            with path.open("ab", buffering=0) as file:
                yield lambda line: _add(file, line)
                os.fsync(file.fileno())
        except OSError as error:
            if isinstance(error, PfodeError):
                raise
            raise _unwritable(path, error) from error

    def _parts(self) -> list[Path]:
        parts = (p for p in sorted(self.path.glob("results.*.jsonl")) if re.fullmatch(r"results\.\d+\.jsonl", p.name))
        return [p for p in (self.path / RESULTS, *parts) if p.is_file()]

    def _rewrite(self, lines: dict[int, Line]) -> None:
        parts = self._parts()
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines.values())
        write_atomic(self.path / RESULTS, text.encode())
        for part in parts:
            if part.name != RESULTS:
                part.unlink(missing_ok=True)

    def _sound(self, line: Line) -> bool:
        """Whether the picture of a line is there as it was written."""
        try:
            data = (self.path / picture(line["seed"])).read_bytes()
        except OSError:
            return False
        return hashlib.sha256(data).hexdigest() == line.get("sha256")

    def _own(self) -> None:
        """Keep other runs away from the folder for as long as this process lives."""
        try:
            import fcntl
        except ImportError:  # not on this system
            return
        self.handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise UsageError(
                f"{self.path}: another run is drawing into it", "wait for it, or another --separate"
            ) from error
        except OSError:  # a file system without locks
            pass

    def _settings(self) -> dict[str, Any] | None:
        file = self.path / RUN
        try:
            found = json.loads(file.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FileError(f"{file}: cannot be read: {error.strerror}", ANEW) from error
        except (ValueError, RecursionError):
            found = None
        return found if isinstance(found, dict) else {}

    def _compare(self, found: dict[str, Any]) -> None:
        """Refuse to go on where another setting would make other pictures; more of them are welcome."""
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
        """Remove the pictures and the results of the run before, its settings at last."""
        for name in os.listdir(self.path):
            if re.fullmatch(r"\d{6,}\.png|results(\.\d+)?\.jsonl", name):
                (self.path / name).unlink()
        (self.path / RUN).unlink()


def _add(file: Any, line: Line) -> None:
    raw = json.dumps(line, allow_nan=False).encode() + b"\n"
    if file.write(raw) != len(raw):
        raise OSError(28, "No space left on device")


def _unwritable(path: Path, error: OSError) -> WriteError:
    return WriteError(f"{path}: cannot be written: {error.strerror or error}", "another --separate")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that make a picture what it is, by the names to show."""
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


@dataclass(frozen=True)
class Share:
    """This process's part of the work: one of those of `accelerate launch`, or all of it."""

    rank: int = 0
    count: int = 1
    device: "torch.device | None" = None

    @classmethod
    def find(cls, device: "torch.device") -> "Share":
        """The part by the environment, which `accelerate launch` sets."""
        if not launched():
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu")
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        """Leave the group of processes: its threads must not outlive the interpreter."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()

    def agree(self, act: Callable[[], None]) -> None:
        """Do something in every process, and wait for all; the first one raises the error of any, the others end."""
        mine: PfodeError | None = None
        try:
            act()
        except PfodeError as error:
            if self.count == 1:
                raise
            mine = error
        if self.count == 1:
            return
        from accelerate.utils import gather_object

        errors: Sequence[PfodeError] = [error for error in gather_object([mine]) if error is not None]
        if errors:
            raise errors[0] if self.first else click.exceptions.Exit(errors[0].code)


def launched() -> bool:
    """Whether this is one of several processes that `accelerate launch` started."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1") and "LOCAL_RANK" in os.environ
