"""Files: atomic writing, and the header of a safetensors file read with the standard library alone.

Format: https://github.com/huggingface/safetensors (8-byte little-endian header length, JSON header, data).
Nothing here imports torch, so that `pfode info FILE` answers at once.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pfode.errors import FileError, UsageError, WriteError

MAX_HEADER = 100_000_000  # bytes; the limit of the format
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8,
    "F16": 2, "BF16": 2, "F32": 4, "F64": 8,
}  # fmt: skip


def write_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path` whole or not at all; the mode follows the umask.

    Raises:
        WriteError: the folder is missing or read-only, or the disk is full. An older file is kept.
    """
    target = Path(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise WriteError(f"{target}: cannot be written: {reason}", "choose another path, or make room") from error
        raise
    return target


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


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: dtype, shape and its bytes [start, stop) in the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself."""

    path: Path
    data_offset: int
    metadata: dict[str, str] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of numbers in all tensors."""
        return sum((e.stop - e.start) // SIZES[e.dtype] for e in self.entries.values())

    def config(self, key: str) -> dict[str, Any]:
        """The JSON object under `key` of the metadata.

        Raises:
            FileError: no such key, or no JSON object.
        """
        if key not in self.metadata:
            raise FileError(
                f"{self.path}: metadata: no {key!r}: not a file written by pfode", "pfode info shows what it holds"
            )
        try:
            value = json.loads(self.metadata[key])
        except (ValueError, RecursionError) as error:
            raise FileError(f"{self.path}: metadata {key!r}: broken JSON ({error})") from error
        if not isinstance(value, dict):
            raise FileError(f"{self.path}: metadata {key!r}: expected a JSON object, got {type(value).__name__}")
        return value

    def digest(self) -> str:
        """sha256 over metadata (without the digest itself) and the bytes of every tensor."""
        data = self.path.read_bytes()[self.data_offset :]
        tensors = {n: (e.dtype, e.shape, data[e.start : e.stop]) for n, e in self.entries.items()}
        return content_digest(self.metadata, tensors)

    def verify(self) -> None:
        """Compare the recorded digest with the content.

        Raises:
            FileError: no digest was recorded, or the file was changed after it was written.
        """
        recorded = self.metadata.get("pfode.digest")
        if recorded is None:
            raise FileError(f"{self.path}: pfode.digest: missing: not a file written by pfode, or damaged")
        if recorded != self.digest():
            problem = f"{self.path}: pfode.digest: the content does not match the recorded sha256 {recorded[:12]}..."
            raise FileError(problem, "the file is damaged: fetch or write it again")


def content_digest(metadata: dict[str, str], tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> str:
    """sha256 of what a file says: metadata and tensors in the order of their names."""
    digest = hashlib.sha256()
    kept = {k: v for k, v in metadata.items() if k != "pfode.digest"}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for name in sorted(tensors):
        dtype, shape, data = tensors[name]
        digest.update(json.dumps([name, dtype, list(shape)]).encode())
        digest.update(data)
    return digest.hexdigest()


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        FileError: missing, truncated, of another kind, or a header that contradicts the file.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise FileError(f"{file}: header: truncated or not a safetensors file ({size} bytes)")
            raw = stream.read(length)
    except OSError as error:
        raise FileError(f"{file}: cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{file}: header: not a safetensors file (broken JSON)") from error
    if not isinstance(header, dict):
        raise FileError(f"{file}: header: not a safetensors file (no JSON object)")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError(f"{file}: header: __metadata__ must map strings to strings")
    data_size = size - 8 - length
    entries = {name: _entry(file, name, value, data_size) for name, value in header.items()}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != position:
            raise FileError(f"{file}: tensor {name!r}: overlaps or leaves a hole at byte {position}")
        position = entry.stop
    if position != data_size:
        raise FileError(f"{file}: data: {data_size} bytes, but the header describes {position}: truncated")
    return Header(file, 8 + length, metadata, entries)


def _entry(file: Path, name: str, value: Any, data_size: int) -> Entry:
    try:
        dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = 1
        for length in shape:
            numbers *= length
        sound = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
        if sound and stop <= data_size and stop - start == numbers * SIZES[dtype]:
            return Entry(dtype, shape, start, stop)
    except (KeyError, TypeError, ValueError):
        pass
    raise FileError(f"{file}: tensor {name!r}: its header entry is broken or points outside the file")
