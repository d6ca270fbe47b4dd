"""A folder belongs to one process at a time, for as long as that process lives."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pfode import files
from pfode.errors import UsageError, WriteError
from pfode.files import lock_folder, write_atomic

pytest.importorskip("fcntl")

HOLD = """
import sys, time
from pfode.files import lock_folder
lock = lock_folder(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_told_and_a_killed_one_does_not_block(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(UsageError, match="another run is working in it") as caught:
                lock_folder(tmp_path, hint="wait")
            assert (caught.value.code, caught.value.hint) == (2, "wait")
            assert list(tmp_path.iterdir()) == []
        finally:
            other.send_signal(signal.SIGKILL)
    lock_folder(tmp_path).close()


def locked(path: Path) -> bool:
    import fcntl

    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def test_the_lock_goes_with_its_last_holder(tmp_path):
    with lock_folder(tmp_path) as first:
        again = lock_folder(tmp_path / ".." / tmp_path.name)  # this process has it already
        first.close()
        first.close()
        assert locked(tmp_path)
    again.close()
    assert not locked(tmp_path)
    dropped = lock_folder(tmp_path)
    assert locked(tmp_path)
    del dropped
    assert not locked(tmp_path)


def test_only_folders_are_locked(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for name in ("nowhere", "file", "pipe"):
        with pytest.raises(WriteError, match=name):
            lock_folder(tmp_path / name)


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path, monkeypatch):
    import fcntl

    def refused(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    lock_folder(tmp_path).close()
    assert (len(os.listdir("/proc/self/fd")) if before else 0) == before


def test_a_rename_is_brought_to_the_disk(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(files, "sync_folder", lambda path: seen.append((path, (tmp_path / "a").read_bytes())))
    write_atomic(tmp_path / "a", b"new")
    assert seen == [(tmp_path, b"new")]
    monkeypatch.undo()
    files.sync_folder(tmp_path)
    files.sync_folder(tmp_path / "nowhere")
