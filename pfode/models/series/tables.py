"""Long tables: one row for each value that was observed, with columns id, time, channel, value and perhaps label."""

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pfode.errors import FileError, UsageError
from pfode.files import read_file, shown
from pfode.models.series.data import Series, padded

__all__ = ["read"]

MAX_TABLE = 2**31  # bytes
_NEEDED = ("id", "time", "channel", "value")


def read(
    table: Any,
    *,
    id: str = "id",
    time: str = "time",
    channel: str = "channel",
    value: str = "value",
    label: str | None = "label",
    dtype: torch.dtype = torch.float32,
) -> Series:
    """Series of a long table, in the order in which their ids come first; times are sorted.

    Args:
        table: a CSV file with a header, or columns by their names: a data frame (pandas, Polars), a PyArrow table, a
            dict of lists.
        id, time, channel, value, label: the names of its columns. Without a column `channel` there is one channel;
            without `label` there are no labels. Labels that are all numbers with a fraction are real numbers, else the
            names of classes. An empty value, or NaN, is missing.
        dtype: of times and values.

    Raises:
        FileError: a file that cannot be read or is no such table; UsageError: columns that are none. Both name row and
            column, rows counted from 1 without the header.
    """
    names = {"id": id, "time": time, "channel": channel, "value": value, "label": label}
    if isinstance(table, str | os.PathLike):
        columns, error, where = _csv(Path(table)), FileError, f"{shown(table)}: "
    else:
        columns, error, where = _columns(table), UsageError, ""
    try:
        return _series(columns, names, dtype)
    except _Problem as problem:
        raise error(f"{where}{problem.args[0]}", problem.args[1]) from None


class _Problem(Exception):
    """What is wrong with a table, and what to write instead."""


def _csv(path: Path) -> dict[str, list[Any]]:
    raw = read_file(path, MAX_TABLE, "a table")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{shown(path)}: byte {error.start} is no UTF-8 text", "a CSV file") from error
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        if len(set(header)) != len(header):
            raise FileError(f"{shown(path)}: a column's name comes twice in {header!r:.100}", "each name once")
        columns: dict[str, list[Any]] = {name: [] for name in header}
        for number, row in enumerate(rows, 1):
            if not row:
                continue
            if len(row) != len(header):
                raise FileError(f"{shown(path)}: row {number}: {len(row)} entries for {len(header)} columns")
            for name, entry in zip(header, row, strict=True):
                columns[name].append(entry.strip())
    except csv.Error as error:
        raise FileError(f"{shown(path)}: line {rows.line_num}: {error}", "a CSV file with commas") from error
    return columns


def _columns(table: Any) -> Mapping[str, list[Any]]:
    """The columns of something like a data frame."""
    found = getattr(table, "column_names", None) or getattr(table, "columns", None)
    found = list(table) if found is None and isinstance(table, Mapping) else found
    if found is None or callable(found):
        raise UsageError(
            f"table: need a CSV file or columns by name, got {type(table).__name__}",
            "{'id': [...], 'time': [...], ...}",
        )
    columns = {}
    for name in found:
        column = table[name]
        for way in ("to_list", "to_pylist", "tolist"):
            if hasattr(column, way):
                column = getattr(column, way)()
                break
        columns[str(name)] = list(column)
    return columns


def _series(columns: Mapping[str, list[Any]], names: Mapping[str, str | None], dtype: torch.dtype) -> Series:
    for word in ("id", "time", "value"):
        if names[word] not in columns:
            raise _Problem(
                f"no column {names[word]!r}; there are {list(columns)!r:.100}", f"{word}=, the column's name"
            )
    lengths = {name: len(columns[name]) for name in filter(None, names.values()) if name in columns}
    if len(set(lengths.values())) > 1:
        raise _Problem(f"columns of different lengths: {lengths}", "one entry for each row")
    if not next(iter(lengths.values())):
        raise _Problem("no rows", "one row for each value")
    ids = [str(entry) for entry in columns[str(names["id"])]]
    for row, entry in enumerate(ids, 1):
        if not entry or entry == "None":
            raise _Problem(f"row {row}, column {names['id']!r}: no id", "the name of a series")
    times = _numbers(columns, str(names["time"]), missing=False)
    values = _numbers(columns, str(names["value"]), missing=True)
    wide = names["channel"] in columns
    where = [str(entry) for entry in columns[str(names["channel"])]] if wide else [str(names["value"])] * len(ids)
    series, channels = (list(dict.fromkeys(entries)) for entries in (ids, where))
    place, lane = ({name: i for i, name in enumerate(listed)} for listed in (series, channels))
    cells: list[dict[float, list[float]]] = [{} for _ in series]
    rows: dict[tuple[str, float, str], int] = {}
    for row, (name, t, channel, value) in enumerate(zip(ids, times, where, values, strict=True), 1):
        if (name, t, channel) in rows:
            raise _Problem(
                f"row {row}: series {name!r} has a value of {channel!r} at {t:g}, in row {rows[name, t, channel]}",
                "one value for each series, time and channel",
            )
        rows[name, t, channel] = row
        cells[place[name]].setdefault(t, [math.nan] * len(channels))[lane[channel]] = value
    made = []
    for name, cell in zip(series, cells, strict=True):
        order = sorted(cell)
        t = torch.tensor(order, dtype=dtype, device="cpu")
        if bool((t.diff() <= 0).any()):
            at = int((t.diff() <= 0).nonzero()[0])
            raise _Problem(
                f"series {name!r}: the times {order[at]!r} and {order[at + 1]!r} are one in {dtype}",
                "dtype=torch.float64, or times from a nearer origin",
            )
        made.append((t, torch.tensor([cell[one] for one in order], dtype=dtype, device="cpu")))
    t, x = padded(made, len(channels), dtype)
    label, classes = _labels(columns, names["label"], ids, series, dtype)
    return Series(t, x, label, tuple(series), tuple(channels), classes)


def _numbers(columns: Mapping[str, list[Any]], name: str, missing: bool) -> list[float]:
    found = []
    entry: Any
    for row, entry in enumerate(columns[name], 1):
        try:
            value = math.nan if missing and (entry is None or entry == "") else float(entry)
        except (TypeError, ValueError, OverflowError):
            value = math.inf
        if math.isinf(value) or isinstance(entry, bool) or (math.isnan(value) and not missing):
            raise _Problem(f"row {row}, column {name!r}: {entry!r:.40} is no finite number", "a number")
        found.append(value)
    return found


def _labels(
    columns: Mapping[str, list[Any]], name: str | None, ids: list[str], series: list[str], dtype: torch.dtype
) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    if name is None or name not in columns:
        return None, ()
    found: dict[str, Any] = {}
    for row, (one, label) in enumerate(zip(ids, columns[name], strict=True), 1):
        if label is None or label == "" or label != label:
            raise _Problem(f"row {row}, column {name!r}: series {one!r} has no label", "the same label in all its rows")
        if found.setdefault(one, label) != label:
            raise _Problem(
                f"row {row}, column {name!r}: {label!r:.40}, and {found[one]!r:.40} before, of series {one!r}",
                "one label for each series",
            )
    return as_labels([found[one] for one in series], dtype)


def as_labels(found: Iterable[Any], dtype: torch.dtype) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Labels as real numbers, if they are such with fractions, else as the places of their names among the classes."""
    listed = list(found)
    try:
        numbers = [float(label) for label in listed]
    except (TypeError, ValueError):
        numbers = []
    if numbers and all(map(math.isfinite, numbers)) and any(n != int(n) for n in numbers):
        return torch.tensor(numbers, dtype=dtype, device="cpu"), ()
    texts = [str(label) for label in listed]
    whole = {text for text in texts if text.lstrip("-").isdecimal()} == set(texts)
    classes = tuple(sorted(set(texts), key=(lambda text: (int(text), text)) if whole else None))
    place = {name: i for i, name in enumerate(classes)}
    return torch.tensor([place[text] for text in texts], dtype=torch.int64, device="cpu"), classes
