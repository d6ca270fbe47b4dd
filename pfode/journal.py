"""A journal: a file of JSON lines that a long run adds to as it goes, so that a later run can go on from there.

Every line, and every JSON file of `sealed`, carries the sha256 of what it says: a bit that flipped is found when the
line is read again.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pfode.errors import FileError, WriteError
from pfode.files import read_file, write_atomic

__all__ = ["Journal", "opened", "sealed"]

DIGEST = "sha256"
LIMIT = 2**30  # bytes of a journal that are read
Line = dict[str, Any]


def sealed(value: Line, name: str = DIGEST) -> Line:
    """The JSON object with the digest of all else that it says, as its last entry, under `name`."""
    rest = {key: item for key, item in value.items() if key != name}
    text = json.dumps(rest, sort_keys=True, allow_nan=False)
    return {**rest, name: hashlib.sha256(text.encode()).hexdigest()}


def opened(raw: bytes, where: str, what: str, hint: str, name: str = DIGEST) -> Line:
    """The JSON object that was sealed, without its digest.

    Args:
        where: the file, and what in it; what: whose it should be; hint: what to do; all for the error's message.
        name: of the digest.

    Raises:
        FileError: no JSON object, no digest, or another one than the object's.
    """
    found, sound = None, False
    try:
        found = json.loads(raw)
        sound = isinstance(found, dict) and sealed(found, name) == found
    except (ValueError, RecursionError):
        pass
    if found is None or not sound:
        raise FileError(f"{where}: damaged, or not {what}: its {name} is missing or differs", hint)
    return {key: value for key, value in found.items() if key != name}


class Journal:
    """Lines on disk, each there as soon as `add` returns. One process at a time: lock the folder first.

    Args:
        path: of the file, made by the first line.
        what: whose it is, as "a benchmark's". hint: what to do where it is damaged or cannot be written.
        digest: the entry that holds the digest of a line, if lines say something else under "sha256".
    """

    def __init__(self, path: str | os.PathLike[str], what: str, hint: str, digest: str = DIGEST):
        self.path, self.what, self.hint, self.digest = Path(path), what, hint, digest

    def read(self, skip: bool = False) -> list[Line]:
        """The lines, oldest first. A last line that a kill left unfinished is cut off, so that nothing is added to it.

        Args:
            skip: leave damaged lines out, where what they stand for can be made again, and change nothing: another
                process may be writing.

        Raises:
            FileError: it cannot be read, or a line is not as it was written; the message names file and line.
            WriteError: the unfinished line cannot be cut off.
        """
        if not os.path.lexists(self.path):
            return []
        lines = read_file(self.path, LIMIT, "a journal").splitlines(keepends=True)
        if lines and not _finished(lines[-1]):
            lines.pop()
            if not skip:
                self._cut(sum(map(len, lines)))
        found = []
        for i, raw in enumerate(lines, 1):
            try:
                found.append(opened(raw, f"{self.path}: line {i}", self.what, self.hint, self.digest))
            except FileError:
                if not skip:
                    raise
        return found

    def add(self, line: Line, sync: bool = True) -> None:
        """Write a line; it is on the disk when this returns.

        Args:
            sync: False leaves it to the system when the disk gets it: for lines that come many times a second.

        Raises:
            WriteError: it cannot be written.
        """
        try:
            with open(self.path, "ab", buffering=0) as file:
                text = self._text(line)
                if file.write(text) != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def rewrite(self, lines: Iterable[Line]) -> None:
        """Have these lines and no others, all at once.

        Raises:
            WriteError: the file cannot be written; what it had is kept.
        """
        write_atomic(self.path, b"".join(map(self._text, lines)))

    def remove(self) -> None:
        """Delete the file, where there is one."""
        self.path.unlink(missing_ok=True)

    def _text(self, line: Line) -> bytes:
        return json.dumps(sealed(line, self.digest), allow_nan=False).encode() + b"\n"

    def _cut(self, length: int) -> None:
        try:
            os.truncate(self.path, length)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> WriteError:
        return WriteError(f"{self.path}: cannot be written: {error.strerror or error}", self.hint)


def _finished(raw: bytes) -> bool:
    """Whether a line was written to its end: JSON, then a newline."""
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return raw.endswith(b"\n")
