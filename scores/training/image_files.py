"""Pictures in a folder or a zip file, with classes by folders or by the dataset.json of EDM and StyleGAN.

Layout of the latter: https://github.com/NVlabs/edm (dataset_tool.py): files in folders of a thousand (00000/ ...), and
{"labels": [["00000/img00000000.png", 6], ...]}, or null instead of the list.
"""

import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pfode.errors import FileError
from pfode.files import read_file, shown
from pfode.scores.io.pictures import MAX_FILE, MAX_PIXELS, SUFFIXES, opened, read_picture
from pfode.scores.training.archives import open_archive
from pfode.scores.training.dataset import MAX_BYTES, MAX_CLASSES, Data, checked_names

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["archive", "decode", "folder"]

LABELS = "dataset.json"
MAX_LABELS = 256 << 20  # bytes of it
FREE_LABELS = 4 << 20  # that it may have in any archive; beyond them 16 times what the archive has
MAX_AGAIN = 1_000  # folders that are entered once more, by links
MAX_DEPTH = 64
FREE_PIXELS = 1 << 24  # that any picture may have; more only in a file that is long enough for them
PIXELS_PER_BYTE = 64
BAND = 1 << 20  # pixels
CHUNK = re.compile(r"\d{5}")  # the name of a folder that only keeps listings short
HIDDEN, OTHER = "hidden files and folders", "files that are no pictures"  # reasons to leave a file out
SPECIAL, CIRCLE = "pipes, devices and broken links", "links to a folder around them"

Readers = dict[str, Callable[[], bytes]]  # of pictures and of dataset.json, by their path below the root

Place = tuple[int, int]  # device and inode of a folder


@dataclass
class Found:
    """What was found below a folder or in an archive.

    Args:
        readers: of the files that are taken.
        left_out: how many files are not, by the reason.
        entered: the folders that were.
        again: how often one was entered once more, by a link.
    """

    readers: Readers = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    entered: set[Place] = field(default_factory=set)
    again: int = 0

    def wanted(self, name: str) -> bool:
        """Whether a file, given by its path below the root, is taken; else it is counted."""
        parts = PurePosixPath(name).parts
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            self.left_out[HIDDEN] += 1
        elif name.lower().endswith(SUFFIXES) or parts[-1] == LABELS:
            return True
        else:
            self.left_out[OTHER] += 1
        return False


def folder(path: Path, *, size: int = 32) -> Data:
    """Pictures below a folder; its sub-folders become the classes, if it has any. Links are followed.

    Args:
        path: of the folder.
        size: side that the pictures are brought to: their centre square, resized.

    Raises:
        FileError: no pictures, a broken one, labels that do not fit, or a folder that cannot be read.
    """
    found = Found()
    _walk(path, "", (), found)
    return _pictures(path, found, size)


def _walk(path: Path, below: str, above: tuple[Place, ...], found: Found) -> None:
    """Collect the files of a folder and of those below it.

    Args:
        below: path of the folder below the root, with a slash at its end.
        above: the folders that it lies in: a link to one of them is not followed.
    """
    try:
        status = path.stat()
        inside = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise FileError(f"{shown(path)}: cannot be read: {error.strerror or error}") from error
    here = status.st_dev, status.st_ino
    if here in above:
        found.left_out[CIRCLE] += 1
        return
    found.again += here in found.entered
    found.entered.add(here)
    if found.again > MAX_AGAIN or len(above) > MAX_DEPTH:
        problem = f"{shown(path)}: links lead to the same folders again and again, or {MAX_DEPTH} folders in each other"
        raise FileError(problem, "remove the links")
    for entry in inside:
        name = below + entry.name
        if entry.is_dir():
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                found.left_out[HIDDEN] += 1
            else:
                _walk(path / entry.name, name + "/", (*above, here), found)
        elif found.wanted(name):
            if not entry.is_file():
                found.left_out[SPECIAL] += 1
            elif entry.name == LABELS:
                found.readers[name] = partial(read_file, entry.path, MAX_LABELS, LABELS)
            else:
                found.readers[name] = partial(read_picture, entry.path)


def archive(path: Path, *, size: int = 32) -> Data:
    """Pictures in a zip file, as in a folder. Nothing is unpacked to disk.

    Raises:
        FileError: as `folder`, or a damaged archive, entries that lead out of it, or more in it than its size allows.
    """
    found = Found()
    with open_archive(path) as opened_archive:
        for name, info in sorted(opened_archive.entries.items()):
            if found.wanted(name):
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind in (0, stat.S_IFREG):
                    found.readers[name] = partial(opened_archive.read, name)
                else:
                    found.left_out[SPECIAL] += 1
        labels = [name for name in found.readers if PurePosixPath(name).name == LABELS]
        opened_archive.allow(labels, min(MAX_LABELS, FREE_LABELS + 16 * opened_archive.packed))
        opened_archive.allow([name for name in found.readers if name not in labels], MAX_FILE)
        return _pictures(path, found, size)


def _pictures(path: Path, found: Found, size: int) -> Data:
    """Decode everything and give it its labels."""
    where = shown(path)
    readers, labels = _labels(where, _inside(found.readers), found.left_out)
    if not readers:
        problem = f"{where}: no pictures ({', '.join(SUFFIXES)})"
        raise FileError(problem, "class sub-folders with pictures become labels")
    if len(readers) * 3 * size * size > MAX_BYTES:
        problem = f"{where}: {len(readers)} pictures of {size}x{size} need more than {MAX_BYTES >> 30} GiB"
        raise FileError(problem, "take a smaller --size")
    images = np.empty((len(readers), 3, size, size), dtype=np.uint8)
    grey = True
    for place, (name, read) in zip(images, readers.items(), strict=True):
        place[:] = decode(f"{where}: {shown(name)}", read(), (size, size)).transpose(2, 0, 1)
        grey = grey and bool((place == place[0]).all())
    images = images[:, :1].copy() if grey else images
    sha256 = hashlib.sha256(images.data).hexdigest()
    name = path.resolve().name
    card = {"name": name, "source": name, "count": len(images), "sha256": sha256, "flip": []}
    left_out = dict(found.left_out)
    if labels is None:
        return Data(torch.from_numpy(images), None, (), card, left_out)
    numbers, names = labels
    return Data(torch.from_numpy(images), torch.tensor(numbers), checked_names(where, names), card, left_out)


def _inside(readers: Readers) -> Readers:
    """The same without a lone folder around everything, if folders of pictures or a dataset.json are in it."""
    while readers:
        paths = [PurePosixPath(name).parts for name in readers]
        outermost = {parts[0] for parts in paths if len(parts) > 1}
        loose = any(len(parts) == 1 for parts in paths)
        deep = all(len(parts) > 2 or parts[1:] == (LABELS,) for parts in paths)
        labelled = any(parts[1:] == (LABELS,) for parts in paths)
        if loose or len(outermost) != 1 or not (deep or labelled):
            return readers
        readers = {name.partition("/")[2]: read for name, read in readers.items()}
    return readers


Labels = tuple[list[int], tuple[str, ...]]  # of the pictures, and the names of the classes


def _labels(where: str, readers: Readers, left_out: Counter[str]) -> tuple[Readers, Labels | None]:
    """The readers of the pictures alone, and their labels: of dataset.json, or else by the first folder of each."""
    listing = readers.get(LABELS)
    pictures = {name: read for name, read in readers.items() if PurePosixPath(name).name != LABELS}
    if stray := len(readers) - len(pictures) - (listing is not None):
        left_out[OTHER] += stray
    if listing is not None and pictures:
        known, value = _listed(f"{where}: {LABELS}", listing())
        if known:
            return pictures, None if value is None else _numbered(f"{where}: {LABELS}", pictures, value)
    classes = [PurePosixPath(name).parts[0] if "/" in name else "" for name in pictures]
    names = tuple(dict.fromkeys(classes))
    if "" in names and len(names) > 1:
        loose = list(pictures)[classes.index("")]
        raise FileError(f"{where}: {loose!r:.120} lies beside class sub-folders", "move it into one of them")
    if all(name == "" or CHUNK.fullmatch(name) for name in names):
        return pictures, None
    numbers = {name: i for i, name in enumerate(names)}
    return pictures, ([numbers[name] for name in classes], names)


def _listed(where: str, raw: bytes) -> tuple[bool, Mapping[str, Any] | None]:
    """Whether a dataset.json speaks of labels, and what it says: by the name of the picture; None for no classes."""
    try:
        content = json.loads(raw)
        if not isinstance(content, dict) or "labels" not in content:
            return False, None
        return True, None if content["labels"] is None else dict(content["labels"])
    except (ValueError, TypeError, RecursionError) as error:
        raise FileError(f"{where}: damaged ({error})", '{"labels": [["00000/img00000000.png", 0], ...]}') from error


def _numbered(where: str, pictures: Readers, labels: Mapping[str, Any]) -> Labels:
    """The labels of the pictures, from those that dataset.json gives by name."""
    numbers = []
    for name in pictures:
        label = labels.get(name)
        if type(label) is not int or not 0 <= label < MAX_CLASSES:
            got = "none" if label is None else f"{label!r:.60}"
            raise FileError(f"{where}: label of {name!r:.120}: expected an integer >= 0, got {got}", "write it anew")
        numbers.append(label)
    return numbers, tuple(map(str, range(max(numbers) + 1)))


def decode(where: str, raw: bytes, size: tuple[int, int]) -> np.ndarray:
    """One picture as 8-bit RGB on white: its first frame, the centre of the wanted shape, resized (Lanczos).

    Args:
        where: what messages call it.
        raw: the bytes of its file.
        size: the wanted (width, height).

    Returns:
        uint8 (height, width, 3).

    Raises:
        FileError: broken, of an unknown kind, of too many pixels, or of 32 bits per value.
    """
    from PIL import Image, ImageOps

    most = min(MAX_PIXELS, FREE_PIXELS + PIXELS_PER_BYTE * len(raw))
    with opened(where, raw, most=most) as source:
        picture = ImageOps.exif_transpose(source)
        flat = Image.new("RGB", picture.size, "white")
        rows = max(1, BAND // picture.width)
        for top in range(0, picture.height, rows):  # in bands: of a large picture there is one copy, not four
            band = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
            band = (_eight_bits(where, source, band) if band.mode[:1] in "IF" else band).convert("RGBA")
            ground = Image.new("RGBA", band.size, "white")
            flat.paste(Image.alpha_composite(ground, band).convert("RGB"), (0, top))
        return np.asarray(ImageOps.fit(flat, size, Image.Resampling.LANCZOS))


def _eight_bits(where: str, source: "Image.Image", picture: "Image.Image") -> "Image.Image":
    """Grey of 9 to 16 bits as 8 bits; Pillow's own conversion cuts everything above 255 off.

    Args:
        where: what messages call it.
        source: as it was opened, with what its file says about it.
        picture: a part of it.
    """
    from PIL import Image

    tags: Any = getattr(source, "tag_v2", {})  # of TIFF
    bits, white_is_zero = tags.get(258, (16,))[0], tags.get(262) == 0
    if not (picture.mode.startswith("I;16") or (picture.mode == "I" and source.format == "PNG")) or bits > 16:
        problem = f"{where}: {picture.mode}: a picture of 32 bits per value, of which nothing says what is white"
        raise FileError(problem, "save it with 8 or 16 bits")
    values = np.asarray(picture).astype(np.uint32)
    top = (1 << bits) - 1
    scaled = (values.clip(0, top) * 255 + top // 2) // top
    grey = (255 - scaled if white_is_zero else scaled).astype(np.uint8)
    transparent = source.info.get("transparency")
    alpha = np.where(values == transparent, 0, 255) if isinstance(transparent, int) else np.full(grey.shape, 255)
    return Image.fromarray(np.stack([grey, alpha.astype(np.uint8)], axis=-1), "LA")
