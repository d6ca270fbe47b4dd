"""Pictures in npz files: stored and compressed, with and without labels."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from pfode.scores.training.data import load_data
from tests.fuzz.engine import Target


def read(folder: Path) -> object:
    """All pictures, labels and names."""
    data = load_data(folder / "data.npz")
    return hashlib.sha256(data.images.numpy().data).hexdigest(), data.shape, data.names, data.labels is None


def target() -> Target:
    """See `Target`."""
    rng, samples = np.random.default_rng(0), []
    options: Any
    for shape, options in (
        ((5, 8, 8), {"labels": np.array([0, 1, 0, 2, 1])}),
        ((4, 8, 8, 3), {"labels": np.array([0, 1, 1, 0], dtype=np.uint8), "names": np.array(["ant", "bée"])}),
        ((3, 3, 8, 8), {}),
    ):
        for write in (np.savez, np.savez_compressed):
            stream = io.BytesIO()
            write(stream, images=rng.integers(0, 256, shape, dtype=np.uint8), **options)
            samples.append({"data.npz": stream.getvalue()})
    return Target("npz", tuple(samples), read)
