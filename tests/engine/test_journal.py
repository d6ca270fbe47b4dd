"""Journals: what was added is read again; what is not as it was written is said by its line; a torn end is cut off."""

import json
import os

import pytest

from pfode.errors import FileError, WriteError
from pfode.journal import Journal, opened, sealed

LINES = [{"a": 1, "b": [0.1, None, "ü"]}, {"a": 2, "c": {"d": True}}, {"a": 3}]


@pytest.fixture
def journal(tmp_path) -> Journal:
    made = Journal(tmp_path / "lines.jsonl", "ours", "start anew")
    for line in LINES:
        made.add(line)
    return made


def test_lines_come_back(journal):
    assert journal.read() == LINES
    journal.remove()
    assert journal.read() == []
    journal.remove()


@pytest.mark.parametrize("torn", [b'{"a": 4, "sha', b'{"a": 4, "sha\n', b"\xff\n", b"\n"])
def test_a_torn_end_is_cut_off_and_nothing_is_added_to_it(journal, torn):
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + torn)
    assert journal.read() == LINES
    assert journal.path.read_bytes() == whole
    journal.add({"a": 4})
    assert journal.read() == [*LINES, {"a": 4}]


def test_a_line_without_its_newline_is_torn(journal):
    journal.path.write_bytes(journal.path.read_bytes()[:-1])
    assert journal.read() == LINES[:2]


def test_no_flipped_bit_is_silent(journal):
    """A bit of every byte: an error that names the file and a line, or the end gone, which is made again."""
    whole = journal.path.read_bytes()
    last = len(whole) - len(whole.splitlines(keepends=True)[-1])
    for i in range(len(whole)):
        journal.path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
        found = lines_or_error(journal)
        if isinstance(found, FileError):
            assert f"{journal.path}: line " in found.message
            continue
        assert found in (LINES, LINES[:2], LINES[:1]), i
        assert found == LINES or i >= last - 1


def lines_or_error(journal: Journal) -> list | FileError:
    try:
        return journal.read()
    except FileError as error:
        return error


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"1", b"{}", b'{"a": 1}', b"[" * 100_000, b"9" * 5000, b'{"a": NaN}', b"\xff"]
)
def test_what_was_not_sealed(raw):
    with pytest.raises(FileError, match=r"here: damaged, or not ours.*\n.*hint: anew"):
        opened(raw, "here", "ours", "anew")


def test_sealing_twice_changes_nothing():
    once = sealed(LINES[0])
    assert sealed(once) == once
    assert opened(json.dumps(once, indent=3).encode(), "", "", "") == LINES[0]
    assert opened(json.dumps(once | {"sha256": once["sha256"]}).encode(), "", "", "") == LINES[0]
    with pytest.raises(FileError):
        opened(json.dumps(once | {"a": 2}).encode(), "", "", "")


def test_pipes_and_folders(journal, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(FileError, match=name):
            Journal(tmp_path / name, "ours", "").read()
    with pytest.raises(WriteError, match="folder"):
        Journal(tmp_path / "folder", "ours", "").add({})


def test_a_digest_under_another_name_leaves_sha256_to_the_lines(tmp_path):
    made = Journal(tmp_path / "lines.jsonl", "ours", "start anew", digest="line_sha256")
    line = {"file": "a.png", "sha256": "of the picture"}
    made.add(line)
    assert made.read() == [line]
    assert set(json.loads(made.path.read_bytes())) == {"file", "sha256", "line_sha256"}
    made.path.write_bytes(made.path.read_bytes().replace(b"a.png", b"b.png"))
    with pytest.raises(FileError, match="line 1: damaged"):
        made.read()


def test_damaged_lines_may_be_left_out_and_nothing_is_changed(journal):
    """What they stand for is made again; the end is not cut off, as another process may be writing it."""
    whole = journal.path.read_bytes()
    spoilt = b"[]\n\xff\x00\n" + whole.replace(b'"a": 2', b'"a": 7') + b'{"a": 4, "sh'
    journal.path.write_bytes(spoilt)
    assert journal.read(skip=True) == [LINES[0], LINES[2]]
    assert journal.path.read_bytes() == spoilt


def test_a_line_of_which_the_disk_took_a_part_is_an_error(journal, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            return self.file.write(data[:5])

    real = open
    monkeypatch.setattr("builtins.open", lambda *a, **k: Full(real(*a, **k)))
    with pytest.raises(WriteError, match="No space left"):
        journal.add({"a": 4}, sync=False)
    monkeypatch.undo()
    assert journal.read() == LINES
