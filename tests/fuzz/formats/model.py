"""Models in pfode's own files."""

import tempfile
from pathlib import Path

import torch

import pfode
from pfode.header import read_header
from pfode.scores import save
from tests.fuzz.engine import Files, Target
from tests.scores.small import denoiser


def seal(files: Files) -> Files:
    """Write the digest that fits the damaged content, where the header can still be read."""
    with tempfile.TemporaryDirectory() as folder:
        sealed = {}
        for name, raw in files.items():
            path = Path(folder) / Path(name).name
            path.write_bytes(raw)
            header = read_header(path)
            old, new = header.metadata.get("pfode.digest", ""), header.digest()
            sealed[name] = raw.replace(old.encode(), new.encode(), 1) if len(old) == len(new) else raw
        return sealed


def read(folder: Path) -> object:
    """The whole model: configuration and weights."""
    net = pfode.load(folder / "model.safetensors")
    weights = tuple(value.double().sum().item() for value in net.net.state_dict().values())
    return repr(net), net.labels, net.sigma_data, net.time_scale, weights


def target() -> Target:
    """See `Target`."""
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (torch.float16, torch.float32):
            file = save(denoiser(), Path(folder) / "x.safetensors", card={"name": "x", "licence": "CC0"}, dtype=dtype)
            samples.append({"model.safetensors": file.read_bytes()})
    return Target("model", tuple(samples), read, digest=True, reseal=seal)
