"""A few hundred damaged files of every format; `python -m tests.fuzz --mutants 2000` tries more."""

import os
import random
import time
from pathlib import Path

import pytest

from pfode.errors import FileError, PfodeError
from tests.fuzz.engine import CHANGES, Target, mutant, run
from tests.fuzz.targets import FORMATS, target


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_end_in_a_result_or_an_error_of_pfode(name):
    report = run(target(name), 200)
    assert not report.bad, report
    assert report.counts["refused"] > 20, report


def made(read, **options) -> Target:
    return Target("made", ({"a": bytes(range(100)) * 3 + b'{"n": 12}'},), read, **options)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("crashed", lambda: [][1]),
        ("hung", lambda: time.sleep(60)),
        ("bloated", lambda: bytes([1]) * 300_000_000),
        ("crashed", lambda: (_ for _ in ()).throw(PfodeError("without a code"))),
        ("silent", lambda: "something else"),
    ],
)
def test_the_harness_sees(kind, wrong):
    """What it is there for, in a reader that does it on every damaged file."""
    honest = made(None).samples[0]["a"]

    def read(folder: Path) -> object:
        raw = (folder / "a").read_bytes()
        return raw if raw == honest else wrong()

    report = run(made(read, digest=True), 5, seconds=0.05)
    if kind == "bloated" and not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("this system does not tell how much memory a process had")
    assert report.counts[kind] >= 1, report
    assert len(report.bad) >= 1


def test_a_reader_that_refuses_everything_is_fine():
    def read(folder: Path) -> object:
        if (folder / "a").read_bytes() != made(None).samples[0]["a"]:
            raise FileError("a: damaged")
        return None

    report = run(made(read, digest=True), 200)
    assert not report.bad
    assert report.counts["refused"] + report.counts["unchanged"] == 200


def test_mutants_are_the_same_for_the_same_seed_and_all_changes_change():
    sample = made(None)
    assert [mutant(sample, i) for i in range(50)] == [mutant(sample, i) for i in range(50)]
    assert len({mutant(sample, i)[0].get("a") for i in range(50)}) > 40
    for change in set(CHANGES):
        raw = sample.samples[0]["a"]
        assert any(change(random.Random(i), raw, raw) != raw for i in range(5)), change
        assert isinstance(change(random.Random(1), b"", b""), bytes), change
