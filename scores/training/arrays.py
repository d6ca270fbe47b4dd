"""Pictures in an npz file: arrays of numpy in a zip, their headers checked before anything is allocated.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html (NPY 1.0 to 3.0).
"""

import ast
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pfode.errors import FileError, did_you_mean
from pfode.files import shown
from pfode.scores.training.archives import Archive, Entry, open_archive
from pfode.scores.training.dataset import MAX_BYTES, MAX_CLASSES, Data, checked_names

__all__ = ["arrays", "read_arrays"]

KNOWN = ("images", "labels", "names", "styles", "source", "licence")
HOW = "np.savez(FILE, images=..., labels=...)"
MAX_STYLES = 1024  # numbers of a style
MAX_TEXT = 10_000  # characters
PREFIX = 6, 2  # bytes of the magic string and of the version
MAX_HEADER = 10_000  # numpy's own limit


@dataclass(frozen=True)
class Header:
    """What an array in the file says about itself, and the bytes before its data."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    length: int


def arrays(path: Path) -> Data:
    """FILE.npz with `images` (n, height, width[, channels]) or (n, channels, height, width) of uint8 and, if known,
    `labels` (n,), integers with the `names` of the classes, or the names themselves; `styles` (n, numbers), a vector
    per picture; and the texts `source` and `licence`.

    Raises:
        FileError: other arrays, a damaged file, or one that unpacks to too much.
    """
    where, found = shown(path), read_arrays(path)
    images = found["images"]
    shape, n = images.shape, len(images)
    if len(shape) == 3:
        images = images[:, None]
    elif shape[3] in (1, 3) and shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    images = np.ascontiguousarray(images)
    sha256 = hashlib.sha256(images.data).hexdigest()
    card = {"name": path.name, "source": path.name, "count": n, "sha256": sha256, "flip": []}
    card |= {key: _text(where, key, found[key]) for key in ("source", "licence") if key in found}
    styles = _styles(where, found["styles"]) if "styles" in found else None
    if "labels" not in found:
        return Data(torch.from_numpy(images), None, (), card, styles=styles)
    labels, names = _classes(where, found["labels"], found.get("names"))
    return Data(torch.from_numpy(images), torch.from_numpy(labels), names, card, styles=styles)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file of pictures, of the types and shapes that `arrays` takes.

    Raises:
        FileError: as `arrays`.
    """
    with open_archive(path, "npz") as archive:
        headers = _headers(archive)
        where = shown(path)
        n = _image_shape(where, headers["images"])[0]
        if "labels" in headers:
            _require(where, "labels", headers["labels"], "iuU", n, f"{n} integers >= 0 or names")
        for key in ("source", "licence"):
            if key in headers and (headers[key].dtype.kind != "U" or headers[key].shape not in ((), (1,))):
                raise FileError(f"{where}: {key}: expected one text, got {headers[key].dtype!s:.80}", HOW)
        if "styles" in headers:
            _style_shape(where, headers["styles"], n)
        if "names" in headers:
            if "labels" not in headers:
                raise FileError(f"{where}: names: there are no labels", HOW)
            if headers["labels"].dtype.kind == "U":
                raise FileError(f"{where}: names: the labels are names already", "leave names= out")
            _require(where, "names", headers["names"], "Uiu", None, f"1 to {MAX_CLASSES:,} texts")
        return {key: _read(archive, key, header) for key, header in headers.items()}


def _headers(archive: Archive) -> dict[str, Header]:
    """The header of each array; every entry must be a known one."""
    where = shown(archive.path)
    names = {name.removesuffix(".npy"): name for name in archive.entries}
    listed = ", ".join(f"{name:.40}" if name.isprintable() else f"{name!r:.40}" for name in list(names)[:10])
    if "images" not in names:
        raise FileError(f"{where}: no array 'images' (it has: {listed or 'nothing'})", HOW)
    archive.allow(list(archive.entries), MAX_BYTES)
    for key, name in names.items():
        if key not in KNOWN or not name.endswith(".npy"):
            raise FileError(f"{where}: {name!r:.120}: not an array that is known here", did_you_mean(key, KNOWN))
    headers = {}
    for key in KNOWN:
        if key in names:
            with archive.stream(names[key]) as entry:
                headers[key] = _header(f"{where}: {key}", entry)
            size = math.prod(headers[key].shape) * headers[key].dtype.itemsize
            held = archive.entries[names[key]].file_size - headers[key].length
            if size != held:
                raise FileError(f"{where}: {key}: its header tells of {size:,} bytes, {held:,} are there", HOW)
    return headers


def _header(where: str, entry: Entry) -> Header:
    """Read the header of an NPY array."""
    start = entry.read(sum(PREFIX))
    version = tuple(start[PREFIX[0] :])
    if start[: PREFIX[0]] != b"\x93NUMPY" or version not in ((1, 0), (2, 0), (3, 0)):
        raise FileError(f"{where}: not a readable npz file (no array of numpy)", HOW)
    width = 2 if version == (1, 0) else 4
    length = int.from_bytes(entry.read(width), "little")
    if length > MAX_HEADER:
        raise FileError(f"{where}: not a readable npz file (a header of {length:,} bytes)", HOW)
    text = entry.read(length).decode("utf-8" if version == (3, 0) else "latin1")
    dtype, shape, fortran = _parsed(where, text)
    if dtype.hasobject:
        raise FileError(f"{where}: not a readable npz file (Python objects, which are not read)", HOW)
    return Header(dtype, shape, fortran, sum(PREFIX) + width + length)


def _parsed(where: str, text: str) -> tuple[np.dtype, tuple[int, ...], bool]:
    """The dictionary of literals that a header is."""
    try:
        value = ast.literal_eval(text.strip())
        dtype, shape, fortran = np.lib.format.descr_to_dtype(value["descr"]), value["shape"], value["fortran_order"]
        sound = type(shape) is tuple and all(type(n) is int and 0 <= n < 2**63 for n in shape) and type(fortran) is bool
        if sound and len(value) == 3 and len(shape) <= 32:
            return dtype, shape, fortran
        reason = "shape or order"
    except Exception as error:  # of the parser and of numpy, RecursionError and MemoryError among them
        reason = type(error).__name__
    raise FileError(f"{where}: not a readable npz file (a broken header: {reason})", HOW)


def _image_shape(where: str, header: Header) -> tuple[int, ...]:
    """The shape of `images`, checked."""
    shape = header.shape
    if header.dtype != np.uint8 or len(shape) not in (3, 4) or 0 in shape:
        expected = "expected uint8 (n, height, width, channels)"
        raise FileError(f"{where}: images: {expected}, got {header.dtype!s:.80} {shape}", HOW)
    sides = shape[1:] if len(shape) == 3 else shape[2:] if shape[1] in (1, 3) else shape[1:3]
    channels = 1 if len(shape) == 3 or 1 in (shape[1], shape[3]) else 3 if 3 in (shape[1], shape[3]) else 0
    if not channels or sides[0] != sides[1]:
        raise FileError(f"{where}: images: expected square pictures of 1 or 3 channels, got {shape}", HOW)
    return shape


def _require(where: str, key: str, header: Header, kinds: str, length: int | None, expected: str) -> None:
    """Refuse an array that is no row of the right kind: of this length, or of that of a list of names."""
    fits = len(header.shape) == 1 and (
        0 < header.shape[0] <= MAX_CLASSES if length is None else header.shape[0] == length
    )
    if not fits or header.dtype.kind not in kinds:
        raise FileError(f"{where}: {key}: expected {expected}, got {header.dtype!s:.80} {header.shape}", HOW)


def _read(archive: Archive, key: str, header: Header) -> np.ndarray:
    """The data of an array whose header was found to fit the entry."""
    flat = np.empty(math.prod(header.shape), header.dtype)
    with archive.stream(f"{key}.npy") as entry:
        entry.read(header.length)
        if entry.fill(flat.view(np.uint8).data) != flat.nbytes:
            raise EOFError("it ends before its time")
    return flat.reshape(header.shape, order="F" if header.fortran else "C")


def _style_shape(where: str, header: Header, n: int) -> None:
    """Refuse styles that are no vector of numbers for every picture."""
    sound = len(header.shape) == 2 and header.shape[0] == n and 0 < header.shape[1] <= MAX_STYLES
    if header.dtype.kind not in "fiu" or not sound:
        expected = f"expected numbers of shape ({n}, 1 to {MAX_STYLES})"
        raise FileError(f"{where}: styles: {expected}, got {header.dtype!s:.80} {header.shape}", HOW)


def _styles(where: str, found: np.ndarray) -> torch.Tensor:
    """Styles as float32."""
    styles = torch.from_numpy(found.astype(np.float32))
    if not styles.isfinite().all():
        raise FileError(f"{where}: styles: not all of them are finite", HOW)
    return styles


def _text(where: str, key: str, found: np.ndarray) -> str:
    """A text of one line."""
    text = str(found.reshape(()).item())
    if not text.strip() or not text.isprintable() or len(text) > MAX_TEXT:
        raise FileError(f"{where}: {key}: expected one line of text, got {text!r:.80}", HOW)
    return text


def _classes(where: str, labels: np.ndarray, given: np.ndarray | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as int64 and the names of their classes; texts are classes in alphabetical order."""
    if labels.dtype.kind == "U":
        known, numbers = np.unique(labels, return_inverse=True)
        if len(known) > MAX_CLASSES:
            raise FileError(f"{where}: labels: {len(known):,} names; at most {MAX_CLASSES:,}", HOW)
        return numbers.astype(np.int64), checked_names(where, known.tolist())
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MAX_CLASSES:
        raise FileError(f"{where}: labels: expected {len(labels)} integers >= 0, got values from {low} to {high}", HOW)
    try:
        names = tuple(map(str, range(high + 1) if given is None else given.tolist()))
    except ValueError as error:
        raise FileError(f"{where}: names: no text ({error})", HOW) from error
    if high >= len(names):
        raise FileError(f"{where}: names: {len(names)} names for labels up to {high}", HOW)
    return labels.astype(np.int64), checked_names(where, names)
