"""Where stdout or stderr is closed, full or left by its reader, and where the machine is short of something."""

import errno
import io
import os
import subprocess
import sys

import pytest
import torch

from pfode.cli import exits
from pfode.cli.machine import LEAST_MEMORY
from pfode.cli.streams import Output, printable
from pfode.errors import FileError, UsageError, WriteError

DRAW = ("sample", "--steps", 1, "--n", 1)


def broken(kind: str) -> io.TextIOWrapper | None:
    """A stream that takes nothing."""
    if kind == "closed":
        return None
    if kind == "full":
        return open("/dev/full", "w")
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("words", [(), ("--json",)])
@pytest.mark.parametrize(("kind", "code"), [("full", 7), ("closed", 7), ("gone", 141)])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_the_picture_stays_where_a_stream_takes_nothing(cli, monkeypatch, tmp_path, name, kind, code, words):
    stream = broken(kind)
    monkeypatch.setattr(sys, name, stream)
    run = cli(*DRAW, *words)
    monkeypatch.undo()
    if stream is not None:
        stream.close()
    assert run.code == code
    assert "Traceback" not in run.err
    assert (tmp_path / "sheet.png").stat().st_size > 500
    assert cli("info", tmp_path / "sheet.png").code == 0
    if name == "stdout" and code == 7:
        assert run.err.splitlines()[-1].startswith("pfode: error: stdout: cannot be written: ")


@pytest.mark.parametrize("kind", ["full", "closed", "gone"])
def test_an_error_keeps_its_code_where_it_cannot_be_said(cli, monkeypatch, kind):
    stream = broken(kind)
    monkeypatch.setattr(sys, "stderr", stream)
    run = cli("sample", "--steps", 0, "--json")
    if stream is not None:
        stream.close()
    assert run.code == 2
    assert run.json["error"]["code"] == 2


def test_quiet_loses_nothing_on_a_closed_stderr(cli, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert cli(*DRAW, "--quiet").code == 0


def test_closed_descriptors_are_never_a_picture(tmp_path):
    """The whole process: nothing that libraries write to descriptors 1 and 2 may land in a file of ours."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PFODE_")}
    words = f"{sys.executable} -m pfode.cli sample --model digits --steps 1 --n 1 <&- >&- 2>&-"
    done = subprocess.run(words, shell=True, cwd=tmp_path, env=environment)
    assert done.returncode == 7
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"


def test_a_full_disk_under_a_help_text():
    words = [sys.executable, "-m", "pfode.cli", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.splitlines()[0]) == (7, "pfode: error: No space left on device")


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.EMFILE, "Too many open files"), 6),
        (caused(FileError("x: cannot be read: Too many open files"), OSError(errno.EMFILE, "Too many open files")), 6),
        (caused(WriteError("x: cannot be written"), OSError(errno.ENFILE, "x")), 6),
        (ImportError("libx.so: cannot open shared object file: Too many open files"), 6),
        (ImportError("libtorch.so: failed to map segment from shared object"), 6),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 6),
        (caused(FileError("x: broken picture"), MemoryError()), 6),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 6),
        (RuntimeError("could not create a primitive"), 6),
        (torch.OutOfMemoryError("CUDA out of memory"), 6),
        (ImportError("cannot import name 'x'"), 4),
        (OSError(errno.ENOSPC, "No space left on device"), 7),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141),
        (UsageError("--n: out of memory"), 2),
        (RuntimeError("anything else"), 1),
    ],
)
def test_codes_of_errors_that_nobody_caught(monkeypatch, tmp_path, capsys, error, code):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as done:
        exits.fail(error, Output())
    assert done.value.code == code
    assert len(capsys.readouterr().err.splitlines()) <= 2


def test_a_deleted_working_folder(cli, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for words in (DRAW, ("samplers",), ("info", "env"), ("bench",)):
        run = cli(*words)
        assert (run.code, run.err.splitlines()[0]) == (7, "pfode: error: the working folder was deleted")
    assert cli("info", "digits").code == 0
    assert cli("info", "x.png").code == 3


def test_too_little_memory_for_torch(cli, monkeypatch):
    monkeypatch.setattr("pfode.cli.machine.memory_limit", lambda: LEAST_MEMORY - 1)
    run = cli(*DRAW)
    assert (run.code, "ulimit -v" in run.err) == (6, True)
    assert cli("info", "digits").code == 0


def test_texts_obey_no_file():
    assert printable("a\n b\x1b[2J\udcff") == r"a b\x1b[2J\udcff"
