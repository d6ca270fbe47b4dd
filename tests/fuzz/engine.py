"""Damaged files, made of honest ones: every one of them ends in a result or in one of pfode's errors.

A `Target` names a format: honest files, and what pfode does with them. `mutant` damages one of the files by one to
four changes that depend on the seed alone: flipped bits, cuts, splices, lengths that lie, chunks that are missing,
doubled or moved, numbers of thousands of digits. `run` reads so many mutants and counts what came of them.

`python -m tests.fuzz --mutants 2000` runs all targets; tests/fuzz/test_fuzz.py runs a few hundred mutants of each.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pfode.errors import PfodeError

Files = dict[str, bytes]  # contents by their names, which may have folders in them
SECONDS = 5.0  # that a mutant may take
SHARED = "/dev/shm"  # files in memory, where a system has that
ROOM = 200_000_000  # bytes that a mutant may take beyond twice its size


@dataclass(frozen=True)
class Target:
    """A format that pfode reads.

    Args:
        name: of the format.
        samples: honest files, each a set that is written into a folder of its own; small, so that mutants are quick.
        read: what pfode does with such a folder. It returns something that says what was read and compares equal where
            the same was read; it raises what pfode raises.
        digest: whether the format has a digest: what was read may then never differ from what the honest file says.
        reseal: changes the files so that their digest fits again, and damage gets past it; used for half of the
            mutants, of which `digest` is not asked.
        decoded: bytes that an honest reader needs beside the files, where these are compressed.
    """

    name: str
    samples: tuple[Files, ...]
    read: Callable[[Path], object]
    digest: bool = False
    reseal: Callable[[Files], Files] | None = None
    decoded: int = 0


@dataclass
class Report:
    """What came of the mutants of a target: how many were read, refused, ..., and the first bad ones."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0

    def add(self, kind: str, seed: int, words: str = "") -> None:
        """Count a mutant; `words`: what was bad about it."""
        self.counts[kind] += 1
        if words and len(self.bad) < 20:
            self.bad.append(f"{self.name} seed {seed}: {kind}: {words}")

    def __str__(self) -> str:
        kinds = ", ".join(f"{self.counts[kind]} {kind}" for kind in sorted(self.counts))
        return f"{self.name:<8} {kinds}; slowest {self.slowest:.2f} s, most memory {self.largest / 1e6:.0f} MB"


# ---- mutations


def mutant(target: Target, seed: int) -> tuple[Files, bool]:
    """The files of one mutant, and whether they were sealed again; the same for the same seed."""
    rng = random.Random(f"{target.name} {seed}")
    files = dict(rng.choice(target.samples))
    others = [raw for sample in target.samples for raw in sample.values()]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name = rng.choice(sorted(files))
        if len(files) > 1 and rng.random() < 0.03:
            del files[name]
        else:
            files[name] = rng.choice(CHANGES)(rng, files[name], rng.choice(others))
    sealed = target.reseal is not None and rng.random() < 0.5
    if sealed and target.reseal is not None:
        with contextlib.suppress(Exception):  # too damaged to be sealed: it is tried as it is
            files = target.reseal(files)
    return files, sealed


def _span(rng: random.Random, raw: bytes) -> tuple[int, int]:
    """A piece of the file, short ones and pieces near the beginning more often."""
    start = int(len(raw) * rng.random() ** rng.choice((1, 1, 3)))
    return start, min(len(raw), start + int(2 ** rng.uniform(0, 12)))


def flip(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """One to eight bits."""
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 8) if raw else 0):
        changed[_span(rng, raw)[0]] ^= 1 << rng.randrange(8)
    return bytes(changed)


def put(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """A piece overwritten with one byte, or with random ones."""
    start, stop = _span(rng, raw)
    some = rng.choice((bytes(stop - start), b"\xff" * (stop - start), rng.randbytes(stop - start)))
    return raw[:start] + some + raw[stop:]


def cut(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """The end is missing."""
    return raw[: _span(rng, raw)[0]]


def extend(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """Something follows the end: zeros, random bytes or a second file."""
    return raw + rng.choice((bytes(rng.randint(1, 100)), rng.randbytes(rng.randint(1, 100)), other))


def delete(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """A piece is missing."""
    start, stop = _span(rng, raw)
    return raw[:start] + raw[stop:]


def double(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """A piece stands there up to eight times."""
    start, stop = _span(rng, raw)
    return raw[:start] + raw[start:stop] * rng.randint(2, 8) + raw[stop:]


def move(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """A piece stands elsewhere."""
    start, stop = _span(rng, raw)
    rest, (place, _) = raw[:start] + raw[stop:], _span(rng, raw)
    return rest[:place] + raw[start:stop] + rest[place:]


def splice(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """The beginning of one file and the end of another, or a piece of another in the middle."""
    place, (start, stop) = _span(rng, raw)[0], _span(rng, other)
    if rng.random() < 0.3:
        return raw[:place] + other[start:]
    return raw[:place] + other[start:stop] + raw[place:]


LENGTHS = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def lie(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """A number of 1 to 8 bytes that may be a length is another."""
    width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
    start = _span(rng, raw)[0]
    known = int.from_bytes(raw[start : start + width], order)  # type: ignore[arg-type]
    value = rng.choice((*LENGTHS, known + 1, known - 1, known * 2, len(raw), len(raw) + 1)) % (1 << 8 * width)
    return raw[:start] + value.to_bytes(width, order) + raw[start + width :]  # type: ignore[arg-type]


WORDS = (
    b"0", b"-1", b"9" * 20, b"9" * 4000, b"1e999", b"-0.5", b"NaN", b"null", b"true", b'""', b'"x"', b"[]", b"{}",
    b"[" * 3000, b"{" * 3000, b"1" + b"0" * 30, b'"\\ud800"', b"0x10", b"\xc3\x28", b"../../x", b"/dev/zero",
)  # fmt: skip


def say(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """A number or a quoted word of a text is another."""
    found = list(re.finditer(rb'-?\d+(?:\.\d+)?(?:e-?\d+)?|"[^"]*"', raw[:100_000]))
    if not found:
        return flip(rng, raw, other)
    start, stop = rng.choice(found).span()
    return raw[:start] + rng.choice(WORDS) + raw[stop:]


CHANGES = (flip, flip, put, cut, extend, delete, double, move, splice, lie, lie, say, say)


# ---- reading


class Hang(BaseException):
    """A mutant took too long."""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """`Hang` is raised after that time, where the system has timers."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def memory(reset: bool = False) -> int:
    """The most memory that this process has had since it was last reset, in bytes; 0 where the system does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else 0
    except OSError:
        return 0


def run(target: Target, mutants: int, first: int = 0, seconds: float = SECONDS) -> Report:
    """Read this many mutants of a target, with seeds from `first` on; honest files must be read first.

    Bad are: "crashed" (an exception that is not pfode's: exit code 1), "hung" (longer than `seconds`), "bloated" (more
    memory than twice the size of the files, what they decode to, and 200 MB), "silent" (read as something else, though
    there is a digest).
    """
    report = Report(target.name)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=SHARED if os.access(SHARED, os.W_OK) else None))
    here: Files = {}
    try:
        honest = [_read(target, folder / f"honest{i}", files, {}) for i, files in enumerate(target.samples)]
        size = max(sum(map(len, files.values())) for files in target.samples)
        for seed in range(first, first + mutants):
            files, sealed = mutant(target, seed)
            if files in target.samples:
                report.add("unchanged", seed)
                continue
            before, began = memory(reset=True), time.perf_counter()
            try:
                with deadline(seconds):
                    found = _read(target, folder / "mutant", files, here)
            except Hang:
                report.add("hung", seed, f"more than {seconds} s")
            except PfodeError as error:
                if error.code == 1 or not 1 <= len(str(error).splitlines()) <= 2:
                    report.add("crashed", seed, f"no message: {error!r:.200}")
                else:
                    report.add("refused", seed)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                report.add(
                    "crashed", seed, f"{type(error).__name__}: {error!s:.200} at {where.filename}:{where.lineno}"
                )
            else:
                silent = target.digest and not sealed and found not in honest
                report.add("silent" if silent else "read", seed, f"read {found!r:.200}" if silent else "")
                del found
            report.slowest = max(report.slowest, time.perf_counter() - began)
            used = memory() - before
            report.largest = max(report.largest, used)
            if used > 2 * max(size, sum(map(len, files.values()))) + target.decoded + ROOM:
                report.add("bloated", seed, f"{used / 1e6:.0f} MB")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _read(target: Target, folder: Path, files: Files, here: Files) -> Any:
    """Read the files of a mutant in a folder where no other file is; `here` is what lies there, and is brought up to
    date."""
    folder.mkdir(exist_ok=True)
    for name in set(here) - set(files):
        (folder / name).unlink(missing_ok=True)
    for name, raw in files.items():
        if here.get(name) is not raw:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(raw)
    here.clear()
    here.update(files)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(sys.stderr):
        return target.read(folder)
