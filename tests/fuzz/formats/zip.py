"""Pictures in zip files: every way of packing, classes by folders and by dataset.json."""

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from pfode.scores.training.data import load_data
from tests.fuzz.engine import Target


def read(folder: Path) -> object:
    """All pictures, labels and names."""
    data = load_data(folder / "data.zip", size=8)
    return hashlib.sha256(data.images.numpy().data).hexdigest(), data.shape, data.names, data.labels is None


def picture(value: int) -> bytes:
    """A PNG of 8x8."""
    stream = io.BytesIO()
    Image.fromarray((np.arange(192).reshape(8, 8, 3) * value % 256).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def target() -> Target:
    """See `Target`."""
    samples = []
    listing = json.dumps({"labels": [[f"00000/img{i:08d}.png", i % 2] for i in range(3)]}).encode()
    contents = (
        {"cat/1.png": picture(1), "dog/é.png": picture(2), "notes.txt": b"no picture"},
        {"dataset.json": listing, **{f"00000/img{i:08d}.png": picture(i) for i in range(3)}},
    )
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        for content in contents:
            stream = io.BytesIO()
            with zipfile.ZipFile(stream, "w", method) as file:
                for name, raw in content.items():
                    file.writestr(zipfile.ZipInfo(name), raw, method)
            samples.append({"data.zip": stream.getvalue()})
    return Target("zip", tuple(samples), read)
