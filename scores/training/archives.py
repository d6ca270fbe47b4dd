"""Zip archives of others, npz files among them: checked before anything of them is unpacked.

Format: PKWARE's APPNOTE.TXT. Sizes that an archive states are limits that reading never exceeds, and names never become
paths on the disk.
"""

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pfode.errors import FileError
from pfode.files import open_regular, shown

__all__ = ["Archive", "open_archive"]

MAX_RATIO = 100  # of unpacked to packed bytes, beyond FREE: pictures and arrays of them are far below
FREE = 256 << 20  # bytes that an archive may unpack to whatever its own size
PIECE = 1 << 18  # bytes read at once
SMALL_PIECE = 4096  # the same of bz2, lzma and zstd, where nothing else bounds what these packed bytes become
WRITE_ANEW = "write the archive anew"


class Archive:
    """The entries of an open zip file by their names, folders left out.

    Args:
        path: of the file, for messages.
        file: the open archive.
        packed: bytes of the file.

    Raises:
        FileError: an entry without a name, one that leads out of the archive, or two of the same name.
    """

    def __init__(self, path: Path, file: zipfile.ZipFile, packed: int):
        self.path, self.file, self.packed = path, file, packed
        self.entries: dict[str, zipfile.ZipInfo] = {}
        for info in file.infolist():
            name = info.filename.replace("\\", "/")
            parts = PurePosixPath(name).parts
            if not parts or name.endswith(("/.", "/..")):
                raise FileError(f"{self._said(info)}: an entry without a name", WRITE_ANEW)
            if name.startswith("/") or ".." in parts or ":" in parts[0]:
                raise FileError(f"{self._said(info)}: a path that leads out of the archive", WRITE_ANEW)
            if name.endswith("/"):
                continue
            name = "/".join(parts)
            if name in self.entries:
                raise FileError(f"{self._said(info)}: is there twice", WRITE_ANEW)
            self.entries[name] = info

    def allow(self, names: list[str], most: int) -> None:
        """Refuse to unpack these entries if they are too long, one by one or together.

        Args:
            names: of the entries.
            most: bytes that one may unpack to.

        Raises:
            FileError: one is too long, or together they unpack to far more than the archive's own size.
        """
        total = 0
        for name in names:
            info = self.entries[name]
            if info.file_size > most:
                problem = f"{self._said(info)}: {info.file_size:,} bytes when unpacked; at most {most:,}"
                raise FileError(problem, "make it smaller")
            total += info.file_size
        allowed = FREE + MAX_RATIO * self.packed
        if total > allowed:
            problem = f"{shown(self.path)}: {self.packed:,} bytes that unpack to {total:,}; at most {allowed:,}"
            raise FileError(problem, "unpack it, or write it with less compression")

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator["Entry"]:
        """An entry, opened for reading in order.

        Raises:
            FileError: it is damaged, encrypted or packed in a way that is not read, here or inside the `with`.
        """
        info = self.entries[name]
        try:
            with self.file.open(info) as stream:
                bounded = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                assert isinstance(stream, zipfile.ZipExtFile)
                yield Entry(stream, PIECE if bounded else SMALL_PIECE)
        except FileError:
            raise
        except Exception as error:  # zlib, bz2 and lzma each raise their own errors, and zipfile many others
            reason = f"{type(error).__name__}: {error}"
            raise FileError(f"{self._said(info)}: damaged ({reason:.200})", WRITE_ANEW) from error

    def read(self, name: str) -> bytes:
        """The whole of an entry; see `stream`, and `allow` for bounds."""
        with self.stream(name) as entry:
            raw = entry.read(self.entries[name].file_size)
            if len(raw) < self.entries[name].file_size:
                raise EOFError("it ends before its time")
        return raw

    def _said(self, info: zipfile.ZipInfo) -> str:
        return f"{shown(self.path)}: {info.filename!r:.120}"


class Entry:
    """The bytes of an entry in order, read piece by piece: what is in memory is what was asked for and one piece."""

    def __init__(self, stream: zipfile.ZipExtFile, size: int):
        self._stream, self._size = stream, size
        self._left = b""

    def read(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end."""
        whole = bytearray(count)
        return bytes(whole[: self.fill(memoryview(whole))])

    def fill(self, into: memoryview) -> int:
        """Read into a buffer of bytes; how many came, fewer than asked for only at the end."""
        done = 0
        while done < len(into):
            piece = self._left or self._stream.read1(self._size)
            if not piece:
                break
            part = piece[: len(into) - done]
            into[done : done + len(part)] = part
            self._left = piece[len(part) :]
            done += len(part)
        return done


@contextlib.contextmanager
def open_archive(path: Path, kind: str = "zip") -> Iterator[Archive]:
    """Open a zip file and check its list of entries.

    Args:
        path: of a regular file.
        kind: what messages call it.

    Raises:
        FileError: no regular file, no zip file, or one whose list of entries is damaged.
    """
    with open_regular(path) as stream:
        packed = stream.seek(0, 2)
        try:
            file = zipfile.ZipFile(stream)
        except Exception as error:  # names that are not UTF-8 and broken fields end in errors of many kinds
            reason = f"{type(error).__name__}: {error}"
            raise FileError(f"{shown(path)}: not a readable {kind} file ({reason:.200})", WRITE_ANEW) from error
        with file:
            yield Archive(path, file, packed)
