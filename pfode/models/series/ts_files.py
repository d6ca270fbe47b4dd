"""The .ts files of the UEA & UCR archive: a header of @ lines, then a series a line: channels between colons, values
between commas, the class last."""

import math
import os
from typing import Any

import torch

from pfode.errors import FileError
from pfode.files import read_file, shown
from pfode.models.series.data import Series, padded
from pfode.models.series.tables import as_labels

__all__ = ["read_ts"]

MAX_FILE = 2**31  # bytes


def read_ts(path: str | os.PathLike[str] | bytes, *, dtype: torch.dtype = torch.float32) -> Series:
    """The series of a .ts file; times are 0, 1, 2, ..., as such files say, "?" and "NaN" are missing values.

    Args:
        path: of the file, or its content as bytes.
        dtype: of times and values.

    Raises:
        FileError: it cannot be read, is no such file, or has times of its own; row and channel are named, the rows
            counted from 1 after @data.
    """
    where = "the bytes given" if isinstance(path, bytes) else shown(path)
    raw = path if isinstance(path, bytes) else read_file(path, MAX_FILE, "a .ts file")
    lines = raw.decode("utf-8", "replace").splitlines()
    header: dict[str, list[str]] = {}
    start = None
    for i, line in enumerate(lines):
        words = line.strip().split()
        if words and words[0].lower() == "@data":
            start = i + 1
            break
        if words and words[0].startswith("@"):
            header[words[0].lower()] = words[1:]
    if start is None:
        raise FileError(f"{where}: no line @data: it is no .ts file")
    if (header.get("@timestamps") or ["false"])[0].lower() == "true":
        raise FileError(f"{where}: it has time stamps, which this reader does not know", "a table: read(...)")
    labelled = (header.get("@classlabel") or header.get("@targetlabel") or ["false"])[0].lower() == "true"
    rows, labels, channels = list[Any](), list[str](), 0
    for number, line in enumerate((line for line in lines[start:] if line.strip()), 1):
        parts = line.strip().split(":")
        if labelled:
            labels.append(parts.pop().strip())
        if not parts or (channels and len(parts) != channels):
            raise FileError(f"{where}: row {number}: {len(parts)} channels, not {channels or 'one or more'}")
        channels = len(parts)
        values = [_values(part, f"{where}: row {number}, channel {c}") for c, part in enumerate(parts)]
        most = max(map(len, values))
        x = torch.tensor([v + [math.nan] * (most - len(v)) for v in values], dtype=dtype, device="cpu").T
        rows.append((torch.arange(most, dtype=dtype, device="cpu"), x))
    if not rows:
        raise FileError(f"{where}: no series after @data")
    t, x = padded(rows, channels, dtype)
    label, classes = as_labels(labels, dtype) if labelled else (None, ())
    return Series(t, x, label, classes=classes)


def _values(text: str, where: str) -> list[float]:
    found = []
    for entry in text.split(","):
        try:
            value = math.nan if entry.strip() in ("?", "") else float(entry)
        except ValueError:
            value = math.inf
        if math.isinf(value):
            raise FileError(f"{where}: {entry.strip()!r:.40} is no finite number", "a number, or ?")
        found.append(value)
    return found
