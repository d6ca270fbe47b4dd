"""Files: regular ones read up to a limit, new ones written whole or not at all, folders locked, JSON read strictly.

Nothing here imports torch, so that `pfode info FILE` answers at once.
"""

import contextlib
import io
import json
import os
import secrets
import stat
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pfode.errors import FileError, UsageError, WriteError

__all__ = [
    "FolderLock", "lock_folder", "make_folder", "open_regular", "parse_json", "read_file", "shown", "sync_folder",
    "write_atomic",
]  # fmt: skip

_NO_WAITING = sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY"))  # those of this system


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular file for reading; pipes, devices and folders are refused without waiting for them.

    Raises:
        FileError: missing, not allowed, or no regular file.
    """
    try:
        named = os.fspath(path)
        kind = _kind(os.stat(named).st_mode)
        if not kind:
            handle = os.open(named, os.O_RDONLY | _NO_WAITING)
            kind = _kind(os.fstat(handle).st_mode)  # of what was opened, should another have taken its place
            if not kind:
                return os.fdopen(handle, "rb")
            os.close(handle)
    except OSError as error:
        raise FileError(f"{shown(path)}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL, or a character that the file system cannot have
        raise FileError(f"{shown(path)}: no name of a file ({error})") from error
    raise FileError(f"{shown(path)}: cannot be read: is {kind}, not a regular file", "give a file")


def read_file(path: str | os.PathLike[str], most: int, what: str = "such a file") -> bytes:
    """The bytes of a regular file of at most `most` bytes.

    Args:
        path: the file.
        most: bytes that it may have; a longer one is refused before it is read.
        what: what the message calls a file of this kind.

    Raises:
        FileError: missing, not allowed, no regular file, too long, or growing while it is read.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            message = f"{shown(path)}: {size:,} bytes; {what} may have {most:,}"
            raise FileError(message, "a file that is not larger than that")
        try:
            raw = stream.read(size + 1)
        except (OSError, MemoryError) as error:
            raise FileError(f"{shown(path)}: cannot be read: {error}") from error
    if len(raw) > size:
        raise FileError(f"{shown(path)}: has more than its {size:,} bytes: it is no ordinary file, or still growing")
    return raw


def shown(path: str | os.PathLike[str]) -> str:
    """The name of a file as a message may show it: in one line, without controls or broken characters."""
    name = os.fsdecode(path)
    return name if name.isprintable() else repr(name)


def _kind(mode: int) -> str:
    """What a file is that is not regular; empty for one that is."""
    if stat.S_ISREG(mode):
        return ""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def write_atomic(path: str | os.PathLike[str], data: bytes | Iterable[bytes]) -> Path:
    """Write `data` to `path` whole or not at all.

    A new file has the mode that the umask says; one that is replaced keeps its own. Of a symbolic link the file behind
    it is written, and the link stays; a pipe, a device or a folder is never replaced. File and folder are synchronised
    with the disk, so that the file is there after a crash of the machine.

    Raises:
        WriteError: the folder is missing or read-only, the disk is full, or `path` is no regular file. An older file
            is kept.
    """
    target = Path(path)
    temporary = None
    try:
        place = Path(os.path.realpath(target))
        mode = _mode(place)
        temporary = place.with_name(f".{_short(place.name)}.{secrets.token_hex(6)}.tmp")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(handle, "wb") as file:
            file.writelines((data,) if isinstance(data, bytes) else data)
            file.flush()
            if mode is not None:
                os.chmod(temporary, mode)
            os.fsync(file.fileno())
        os.replace(temporary, place)
        sync_folder(place.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError | ValueError) and not isinstance(error, WriteError):
            reason = getattr(error, "strerror", None) or str(error)
            message = f"{shown(target)}: cannot be written: {reason}"
            raise WriteError(message, "choose another path, or make room") from error
        raise
    return target


def _mode(place: Path) -> int | None:
    """The mode of the file that is to be replaced; None where there is none.

    Raises:
        WriteError: it is no regular file.
    """
    try:
        mode = os.lstat(place).st_mode
    except FileNotFoundError:
        return None
    kind = "a symbolic link that leads in a circle" if stat.S_ISLNK(mode) else _kind(mode)
    if kind:
        message = f"{shown(place)}: cannot be written: is {kind}, which is not replaced"
        raise WriteError(message, "choose another path")
    return stat.S_IMODE(mode) & 0o777


def _short(name: str) -> str:
    """The beginning of a name, so that what is added to it still fits in a file system's 255 bytes."""
    return os.fsdecode(os.fsencode(name)[:200])


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        WriteError: it cannot be made.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        problem = f"{os.fspath(path)}: cannot be made: {error.strerror or error}"
        raise WriteError(problem, "choose another folder") from error


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Bring the names in a folder to the disk: a rename survives a power failure only after this.

    Does nothing where a system or a file system cannot do it (Windows).
    """
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _Held:
    """An open folder with a lock on it, which goes when the last `FolderLock` of this process lets go."""

    def __init__(self, handle: int):
        self.handle = handle
        weakref.finalize(self, os.close, handle)


_held: weakref.WeakValueDictionary[tuple[int, int], _Held] = weakref.WeakValueDictionary()  # by device and inode
_guard = threading.Lock()


class FolderLock:
    """A folder kept for this process; `close` it, or leave its `with` block, to let others in. See `lock_folder`."""

    def __init__(self, held: _Held | None):
        self._held = held

    def close(self) -> None:
        """Let go; a second call does nothing."""
        self._held = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock_folder(
    path: str | os.PathLike[str], what: str = "run", hint: str = "wait for it, or another --out"
) -> FolderLock:
    """Keep the other processes of this computer out of an existing folder until the lock is closed or dropped.

    The lock belongs to the process: one that has it already gets it again, and whatever ends the process, a kill
    included, lets go of it; no file is left behind. Where the system or the file system knows no locks (Windows, some
    network folders) nothing is locked.

    Args:
        path: the folder, which must be there.
        what: is said to be working there: "another `what` is working in it".
        hint: what to do then.

    Raises:
        UsageError: another process has it. WriteError: it cannot be opened, or is no folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return FolderLock(None)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        problem = f"{os.fspath(path)}: cannot be used: {error.strerror or error}"
        raise WriteError(problem, "choose another folder") from error
    status = os.fstat(handle)
    with _guard:
        held = _held.get((status.st_dev, status.st_ino))
        if held is not None:
            os.close(handle)
            return FolderLock(held)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise UsageError(f"{os.fspath(path)}: another {what} is working in it", hint) from error
        except OSError:  # a file system without locks
            os.close(handle)
            return FolderLock(None)
        held = _held[status.st_dev, status.st_ino] = _Held(handle)
    return FolderLock(held)


def parse_json(where: str, raw: bytes, what: str = "JSON") -> Any:
    """The value of a JSON text of a file: UTF-8, no name twice in an object, integers of at most 40 digits.

    Args:
        where: the file and the place in it, for messages.
        raw: the text; the caller bounds its length.
        what: what it should have been, for messages.

    Raises:
        FileError: it is broken.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f"{twice!r:.60} appears twice")
        return found

    def integer(digits: str) -> int:
        if len(digits) > 40:
            raise ValueError(f"a number of {len(digits)} digits")
        return int(digits)

    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=once, parse_int=integer)
        if "\\ud" in text.lower():  # half a surrogate pair is no text that could be shown or written
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError, MemoryError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FileError(f"{where}: broken {what} ({reason:.100})") from error
    return value
