"""PNG pictures as data, as --init and with pfode's settings inside."""

import contextlib
import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from pfode.cli import images
from pfode.errors import FileError
from pfode.scores.io.pictures import read_picture
from pfode.scores.training.data import load_data
from tests.fuzz.engine import Target

SETTINGS = {
    "version": "0", "options": {"seed": 0, "guidance": 2.0}, "model": {"name": "digits", "digest": "0"}, "steps": 3,
    "sampler": "ddim", "grid": "karras", "shape": [3, 8, 8],
}  # fmt: skip


def read(folder: Path) -> object:
    """The picture as data and as a start, and its settings where it has some."""
    settings = None
    with contextlib.suppress(FileError):
        settings = images.read_settings(folder / "x.png")
    start = images.from_picture("x.png", read_picture(folder / "x.png"), (3, 8, 8))
    return settings, start.sum().item(), hashlib.sha256(load_data(folder, size=8).images.numpy().data).hexdigest()


def target() -> Target:
    """See `Target`."""
    ramp = (np.arange(256).reshape(16, 16) * 257).astype(np.uint16)
    colour = (np.arange(768).reshape(16, 16, 3) % 256).astype(np.uint8)
    files = [images.encode_png(colour, SETTINGS)]
    for picture, options in (
        (Image.fromarray(ramp), {"transparency": 514}),
        (Image.fromarray(colour).quantize(16), {}),
        (Image.new("RGBA", (9, 17), (1, 2, 3, 100)), {}),
        (Image.new("1", (9, 17)), {}),
    ):
        stream = io.BytesIO()
        picture.save(stream, "PNG", **options)
        files.append(stream.getvalue())
    return Target("png", tuple({"x.png": raw} for raw in files), read, decoded=8 * 16 * 16)
