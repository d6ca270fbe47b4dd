"""The header of a safetensors file, read and written with the standard library alone.

Format: https://github.com/huggingface/safetensors (8-byte little-endian header length, JSON header, data). Nothing here
imports torch, so that `pfode info FILE` answers at once; `pfode.tensors` makes tensors of the data.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from pfode.errors import FileError
from pfode.files import open_regular, parse_json, shown

__all__ = [
    "MAX_HEADER", "SIZES", "Contents", "Digest", "Entry", "Header", "content_digest", "kind_of", "pack", "read_header"
]  # fmt: skip

MAX_HEADER = 8 << 20  # bytes, of the 100 MB that the format allows: room for 50,000 tensors
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8,
    "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


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
        value = parse_json(f"{self.path}: metadata {key!r}", self.metadata[key].encode())
        if not isinstance(value, dict):
            raise FileError(f"{self.path}: metadata {key!r}: expected a JSON object, got {type(value).__name__}")
        return value

    def tensors(self) -> Iterator[tuple[str, Entry, bytearray]]:
        """Name, entry and bytes of every tensor in the order of their names, one at a time.

        Raises:
            FileError: the file cannot be read any more, or was cut since its header was read.
        """
        with open_regular(self.path) as stream:
            for name, entry in sorted(self.entries.items()):
                data = bytearray(entry.stop - entry.start)
                try:
                    stream.seek(self.data_offset + entry.start)
                    found = stream.readinto(data)
                except OSError as error:
                    raise FileError(f"{self.path}: cannot be read: {error.strerror or error}") from error
                if found != len(data):
                    raise FileError(f"{self.path}: tensor {name!r:.80}: truncated while it was read")
                yield name, entry, data

    def digest(self) -> str:
        """sha256 over metadata (without the digest itself) and the bytes of every tensor."""
        found = Digest(self.metadata)
        for name, entry, data in self.tensors():
            found.add(name, entry.dtype, entry.shape, data)
        return found.hexdigest()

    def verify(self) -> None:
        """Compare the recorded digest with the content.

        Raises:
            FileError: no digest was recorded, or the file was changed after it was written.
        """
        self.compare(self.digest)

    def compare(self, content: Callable[[], str]) -> None:
        """Compare the recorded digest with that of the content, which is asked for when there is one.

        Raises:
            FileError: as `verify`.
        """
        recorded = self.metadata.get("pfode.digest")
        if recorded is None:
            raise FileError(f"{self.path}: pfode.digest: missing: not a file written by pfode, or damaged")
        if recorded != content():
            problem = f"{self.path}: pfode.digest: the content does not match the recorded sha256 {recorded[:12]!r}..."
            raise FileError(problem, "the file is damaged: fetch or write it again")


class Digest:
    """sha256 of what a file says: its metadata, then its tensors, which are added in the order of their names."""

    def __init__(self, metadata: Mapping[str, str]):
        self._sha = hashlib.sha256()
        kept = {k: v for k, v in metadata.items() if k != "pfode.digest"}
        self._sha.update(json.dumps(kept, sort_keys=True).encode())

    def add(self, name: str, dtype: str, shape: Sequence[int], data: bytes | bytearray) -> None:
        """One tensor: its name, its dtype as safetensors names it, its shape, its bytes."""
        self._sha.update(json.dumps([name, dtype, list(shape)]).encode())
        self._sha.update(data)

    def hexdigest(self) -> str:
        """The digest of what was added so far, as 64 hexadecimal digits."""
        return self._sha.hexdigest()


Contents = Mapping[str, tuple[str, tuple[int, ...], bytes]]  # dtype, shape and bytes of tensors by their names


def content_digest(metadata: Mapping[str, str], tensors: Contents) -> str:
    """sha256 of what a file says: metadata and tensors in the order of their names."""
    digest = Digest(metadata)
    for name in sorted(tensors):
        digest.add(name, *tensors[name])
    return digest.hexdigest()


def pack(metadata: Mapping[str, str], tensors: Contents) -> Iterator[bytes]:
    """A safetensors file in parts; the same content is the same bytes, whatever the order of the names given.

    The widest numbers come first, so that each tensor begins at a multiple of the size of its numbers.
    """
    order = sorted(tensors, key=lambda name: (-SIZES[tensors[name][0]], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name in order:
        dtype, shape, data = tensors[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    yield len(raw).to_bytes(8, "little") + raw
    for name in order:
        yield tensors[name][2]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file; nothing is allocated that the file does not have.

    Raises:
        FileError: missing, no regular file, truncated, of another kind (the message says which, where it is known), or
            a header that contradicts the file.
    """
    file = Path(path)
    name = shown(path)
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            start = stream.read(64)
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > size - 8 or start[8:9] not in (b"{", b""):
                what = kind_of(start)
                raise FileError(f"{name}: header: " + (what or f"truncated or not a safetensors file ({size} bytes)"))
            if length > MAX_HEADER:
                raise FileError(f"{name}: header: {length:,} bytes; at most {MAX_HEADER:,} are read")
            stream.seek(8)
            raw = stream.read(length)
        except OSError as error:
            raise FileError(f"{name}: cannot be read: {error.strerror or error}") from error
    header = parse_json(f"{name}: header: not a safetensors file", raw)
    if not isinstance(header, dict):
        raise FileError(f"{name}: header: not a safetensors file (no JSON object)")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError(f"{name}: header: __metadata__ must map strings to strings")
    data_size = size - 8 - length
    entries = {key: _entry(name, key, value, data_size) for key, value in header.items()}
    position = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise FileError(f"{name}: tensor {key!r:.80}: overlaps or leaves a hole at byte {position}")
        position = entry.stop
    if position != data_size:
        what = "truncated" if position > data_size else "something follows its end"
        raise FileError(f"{name}: data: {data_size} bytes, but the header describes {position}: {what}")
    return Header(file, 8 + length, metadata, entries)


def _entry(file: str, name: str, value: Any, data_size: int) -> Entry:
    """The entry of a tensor: types first, then sizes, so that nothing is multiplied that is not a small number."""
    broken = FileError(f"{file}: tensor {name!r:.80}: its header entry is broken or points outside the file")
    if not isinstance(value, dict):
        raise broken
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or not _whole(shape, 64) or not _whole(offsets, 2) or len(offsets) != 2:
        raise broken
    if dtype not in SIZES:
        known = ", ".join(SIZES)
        raise FileError(f"{file}: tensor {name!r:.80}: unknown dtype {dtype!r:.20}", f"known: {known}")
    start, stop = offsets
    numbers = 1
    for length in shape:
        numbers *= length or 1  # an empty tensor has sides that a tensor can have
        if numbers > 1 << 62:
            raise broken
    numbers = 0 if 0 in shape else numbers
    if not start <= stop <= data_size or stop - start != numbers * SIZES[dtype]:
        raise broken
    return Entry(dtype, tuple(shape), start, stop)


def _whole(values: object, most: int) -> TypeGuard[list[int]]:
    """Whether this is a list of at most that many integers, none negative."""
    return isinstance(values, list) and len(values) <= most and all(type(n) is int and n >= 0 for n in values)


def kind_of(start: bytes) -> str:
    """What a file is, by its first bytes, where it is not the safetensors file it should be; empty where unknown."""
    if start.startswith(b"version https://git-lfs.github.com/spec"):
        return "a pointer of Git LFS, not the file itself: `git lfs pull` fetches it"
    for magic, what in _KINDS:
        if start.startswith(magic) and (magic != b"RIFF" or start[8:12] == b"WEBP"):
            return f"this is {what}, not a safetensors file"
    if not start.strip(b"\0"):
        return "empty, or nothing but zeros: the download was not finished"
    return ""


_KINDS = (
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"RIFF", "a WebP picture"),
    (b"%!PS", "a PostScript file"),
    (b"%PDF", "a PDF file"),
    (b"PK\x03\x04", "a zip archive (as torch.save writes, or an npz)"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"<!DOCTYPE", "a web page"),
    (b"<html", "a web page"),
)
