"""The other kinds of pictures that are read: JPEG, WebP, GIF, BMP, TIFF, AVIF."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, features

from pfode.scores.training.data import decode
from tests.fuzz.engine import Target


def read(folder: Path) -> object:
    """The picture as data."""
    return decode("x", (folder / "x").read_bytes(), (8, 8)).tobytes()


def target() -> Target:
    """See `Target`."""
    colour = Image.fromarray((np.arange(768).reshape(16, 16, 3) % 256).astype(np.uint8))
    grey = Image.fromarray((np.arange(256).reshape(16, 16) * 257).astype(np.uint16))
    samples = []
    for picture, kind, options in (
        (colour, "JPEG", {}), (colour, "JPEG", {"progressive": True}), (colour, "GIF", {"save_all": True}),
        (colour, "BMP", {}), (colour, "TIFF", {}), (colour, "TIFF", {"compression": "tiff_lzw"}), (grey, "TIFF", {}),
        (colour, "WEBP", {}), (colour, "AVIF", {}),
    ):  # fmt: skip
        if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
            continue
        stream = io.BytesIO()
        picture.save(stream, kind, **options)
        samples.append({"x": stream.getvalue()})
    return Target("picture", tuple(samples), read, decoded=8 * 16 * 16)
