"""Pictures to train on: `digits`, `emoji`, a folder, a zip or an npz, all as one `Data`.

Everything is held as 8-bit tensors in memory; nothing is cached on disk.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from pfode.errors import FileError, UsageError, did_you_mean
from pfode.files import shown
from pfode.scores.training.arrays import arrays, read_arrays
from pfode.scores.training.dataset import Data
from pfode.scores.training.emoji import EMOJI_FONT, EMOJI_LIST, emoji
from pfode.scores.training.image_files import archive, decode, folder

__all__ = ["EMOJI_FONT", "EMOJI_LIST", "Data", "archive", "arrays", "decode", "digits", "emoji", "folder", "load_data"]

DIGITS = Path(__file__).with_name("digits.npz")


def load_data(source: str | Path, *, size: int = 32, font: Path = EMOJI_FONT, listing: Path = EMOJI_LIST) -> Data:
    """`digits`, `emoji`, a folder, FILE.zip or FILE.npz.

    Args:
        source: the name or the path.
        size: side that the pictures of `emoji`, a folder or a zip are brought to.
        font: of the emoji. listing: Unicode's emoji-test.txt.

    Raises:
        MissingError: a system file is not there; the hint installs it.
        FileError: a broken picture or file.
        UsageError: neither a known name nor a path.
    """
    if str(source) == "digits":
        return digits()
    if str(source) == "emoji":
        return emoji(font, listing, size=size)
    path = Path(source)
    if str(source) and os.path.isdir(path):
        return folder(path, size=size)
    if not str(source) or not os.path.exists(path):
        raise UsageError(
            f"data {str(source)!r:.200}: no such file or data set", did_you_mean(source, ["digits", "emoji"])
        )
    if path.suffix.lower() == ".npz":
        return arrays(path)
    if path.suffix.lower() == ".zip":
        return archive(path, size=size)
    raise FileError(f"{shown(path)}: not a folder, a .zip or an .npz", "--data digits|emoji|DIR|FILE.npz|FILE.zip")


def digits() -> Data:
    """The 1,797 handwritten digits of 8x8 that come with pfode, see digits.md beside them; 0 to 16 become 0 to 255."""
    found = read_arrays(DIGITS)
    images = torch.from_numpy(np.rint(found["images"] * (255 / 16)).astype(np.uint8))[:, None]
    card = {
        "name": "digits",
        "source": "UCI: Optical Recognition of Handwritten Digits, test part, 8x8",
        "licence": "CC BY 4.0 (UCI)",
        "count": len(images),
        "sha256": hashlib.sha256(images.numpy().data).hexdigest(),
        "flip": [],
    }
    return Data(images, torch.from_numpy(found["labels"].astype(np.int64)), tuple("0123456789"), card)
