"""Pictures to train on: `digits` or a part of it, `emoji`, a folder, a zip or an npz, all as one `Data`.

Everything is held as 8-bit tensors in memory; nothing is cached on disk.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from pfode.errors import FileError, UsageError, did_you_mean, unknown
from pfode.files import shown
from pfode.scores.training.arrays import arrays, read_arrays
from pfode.scores.training.dataset import MAX_BYTES, Data
from pfode.scores.training.emoji import EMOJI_FONT, EMOJI_LIST, emoji
from pfode.scores.training.image_files import archive, decode, folder

__all__ = [
    "EMOJI_FONT", "EMOJI_LIST", "Data", "archive", "arrays", "decode", "digits", "emoji", "folder", "load_data",
    "resized",
]  # fmt: skip

SIDE = 32  # that pictures of files are brought to
DIGITS = Path(__file__).with_name("digits.npz")
PARTS = {"digits": "all", "digits-train": "train", "digits-test": "test"}


def load_data(
    source: str | Path, *, size: int | None = None, font: Path = EMOJI_FONT, listing: Path = EMOJI_LIST
) -> Data:
    """`digits`, `digits-train`, `digits-test`, `emoji`, a folder, FILE.zip or FILE.npz.

    Args:
        source: the name or the path.
        size: side that pictures are brought to; None: 32 for `emoji`, a folder or a zip, and as they are in arrays.
        font: of the emoji. listing: Unicode's emoji-test.txt.

    Raises:
        MissingError: a system file is not there; the hint installs it.
        FileError: a broken picture or file.
        UsageError: neither a known name nor a path.
    """
    side = SIDE if size is None else size
    if str(source) in PARTS:
        return resized(digits(PARTS[str(source)]), size)
    if str(source) == "emoji":
        return emoji(font, listing, size=side)
    path = Path(source)
    if str(source) and os.path.isdir(path):
        return folder(path, size=side)
    if not str(source) or not os.path.exists(path):
        raise UsageError(
            f"data {str(source)!r:.200}: no such file or data set", did_you_mean(source, [*PARTS, "emoji"])
        )
    if path.suffix.lower() == ".npz":
        return resized(arrays(path), size)
    if path.suffix.lower() == ".zip":
        return archive(path, size=side)
    raise FileError(f"{shown(path)}: not a folder, a .zip or an .npz", "--data digits|emoji|DIR|FILE.npz|FILE.zip")


def resized(data: Data, size: int | None) -> Data:
    """Pictures brought to another side by a Lanczos filter; those that have it, or for None, as they are.

    Raises:
        UsageError: more bytes of pictures than are taken.
    """
    n, channels, side, _ = data.images.shape
    if size is None or size == side:
        return data
    if n * channels * size * size > MAX_BYTES:
        raise UsageError(f"data: {n} pictures of side {size} are more than {MAX_BYTES:,} bytes", "a smaller --size")
    from PIL import Image

    images = torch.empty((n, channels, size, size), dtype=torch.uint8, device="cpu")
    for old, new in zip(data.images.flatten(0, 1), images.flatten(0, 1), strict=True):
        grey = Image.fromarray(old.numpy()).resize((size, size), Image.Resampling.LANCZOS)
        new.copy_(torch.from_numpy(np.asarray(grey).copy()))
    digest = hashlib.sha256(images.numpy().data).hexdigest()
    source = f"{data.card.get('source')}, resized from {side} to {size}"
    card = {**data.card, "source": source, "sha256": digest}
    card.pop("levels", None)  # there are more of them now
    return Data(images, data.labels, data.names, card, data.left_out, data.styles)


def digits(part: str = "all") -> Data:
    """The 1,797 handwritten digits of 8x8 that come with pfode, see digits.md beside them; 0 to 16 become 0 to 255.

    Args:
        part: "all"; "test", every fifth picture in an order that a fixed seed shuffled (360); or "train", the others.

    Raises:
        UsageError: another part.
    """
    if part not in PARTS.values():
        raise unknown("part of digits", part, PARTS.values())
    found = read_arrays(DIGITS)
    raw, labels = found["images"], found["labels"].astype(np.int64)
    if part != "all":
        order = np.random.Generator(np.random.Philox(key=0)).permutation(len(raw))
        held = np.zeros(len(raw), dtype=bool)
        held[order[::5]] = True
        chosen = held if part == "test" else ~held
        raw, labels = raw[chosen], labels[chosen]
    images = torch.from_numpy(np.rint(raw * (255 / 16)).astype(np.uint8))[:, None]
    card = {
        "name": "digits" if part == "all" else f"digits-{part}",
        "source": "UCI: Optical Recognition of Handwritten Digits, test part, 8x8",
        "licence": "CC BY 4.0 (UCI)",
        "count": len(images),
        "levels": 17,
        "sha256": hashlib.sha256(images.numpy().data).hexdigest(),
        "flip": [],
    }
    return Data(images, torch.from_numpy(labels), tuple("0123456789"), card)
