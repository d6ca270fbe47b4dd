"""Files are read when they are regular and short enough, and written whole or not at all."""

import os
import stat
import threading

import pytest

from pfode.errors import FileError, WriteError
from pfode.files import open_regular, read_file, shown, write_atomic


def mode(path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_reading(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a", 5) == b"12345"
    with open_regular(tmp_path / "a") as stream:
        assert stream.read() == b"12345"
    with pytest.raises(FileError, match=r"5 bytes; a plan may have 4"):
        read_file(tmp_path / "a", 4, "a plan")


@pytest.mark.parametrize(
    "name", ["missing", "folder", "pipe", "/dev/zero", "zero", "a\0b", "\ud800x", "loop", "/proc/self/maps"]
)
def test_what_cannot_be_read(name, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileError) as caught:
        read_file(tmp_path / name, 100)
    assert caught.value.message.isprintable()


def test_names_are_shown_in_one_line(tmp_path):
    assert shown("plain file") == "plain file"
    assert shown("two\nlines") == "'two\\nlines'"
    with pytest.raises(FileError, match=r"two\\nlines"):
        open_regular(tmp_path / "two\nlines")


def test_a_new_file_has_the_mode_of_the_umask_and_an_old_one_its_own(tmp_path, umask):
    path = write_atomic(tmp_path / "new", b"1")
    assert mode(path) == 0o666 & ~umask
    os.chmod(path, 0o604)
    write_atomic(path, [b"2", b"3"])
    assert mode(path) == 0o604
    assert path.read_bytes() == b"23"
    assert os.listdir(tmp_path) == ["new"]


def test_writing_leaves_the_umask_alone(tmp_path, monkeypatch, umask):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask of all threads was changed"))
    write_atomic(tmp_path / "a", b"1")
    monkeypatch.undo()


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "deep").mkdir()
    target, link = tmp_path / "deep" / "file", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to("deep/file")
    assert write_atomic(link, b"new") == link
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path / "deep") == ["file"]
    ahead = tmp_path / "ahead"
    ahead.symlink_to("deep/later")
    write_atomic(ahead, b"made")
    assert (tmp_path / "deep" / "later").read_bytes() == b"made"


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "null").symlink_to("/dev/null")
    for name, what in (("pipe", "a pipe"), ("folder", "a folder"), ("loop", "a symbolic link"), ("null", "a device")):
        before = os.lstat(tmp_path / name)
        with pytest.raises(WriteError, match=f"is {what}") as caught:
            write_atomic(tmp_path / name, b"x")
        assert caught.value.code == 7
        assert os.lstat(tmp_path / name) == before
    with pytest.raises(WriteError, match="a device"):
        write_atomic("/dev/null", b"x")


@pytest.mark.parametrize("name", ["a\0b", "missing/a", "n" * 300])
def test_what_cannot_be_written(name, tmp_path):
    with pytest.raises(WriteError) as caught:
        write_atomic(tmp_path / name, b"x")
    assert caught.value.message.isprintable()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["n" * 255, "two\nlines", os.fsdecode(b"\xff\xfe"), "-", "é" * 127])
def test_names_that_a_file_system_takes(name, tmp_path):
    write_atomic(tmp_path / name, b"x")
    assert (tmp_path / name).read_bytes() == b"x"


def test_a_failure_half_way_keeps_the_old_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def parts():
        yield b"half"
        raise OSError(28, "No space left on device")

    with pytest.raises(WriteError, match="No space left"):
        write_atomic(tmp_path / "a", parts())
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_the_folder_is_synchronised_after_the_file_has_its_name(tmp_path, monkeypatch):
    done = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda a, b: (replace(a, b), done.append("replace")))
    monkeypatch.setattr(
        os, "fsync", lambda handle: (fsync(handle), done.append(stat.S_ISDIR(os.fstat(handle).st_mode)))
    )
    write_atomic(tmp_path / "a", b"1")
    assert done == [False, "replace", True]


def test_two_threads_write_one_name(tmp_path):
    contents = [bytes([i]) * 10_000 for i in range(8)]
    threads = [threading.Thread(target=write_atomic, args=(tmp_path / "a", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_bytes() in contents
    assert os.listdir(tmp_path) == ["a"]
