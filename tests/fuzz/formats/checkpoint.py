"""Checkpoints of a training run."""

import tempfile
from pathlib import Path

import torch

from pfode.checkpoints import read_checkpoint, write_checkpoint
from tests.fuzz.engine import Target
from tests.fuzz.formats.folder import files_of


def read(folder: Path) -> object:
    """The manifest and all tensors."""
    manifest, parts = read_checkpoint(folder)
    return manifest, {file: {k: v.double().sum().item() for k, v in found.items()} for file, found in parts.items()}


def target() -> Target:
    """See `Target`."""
    samples = []
    for step in (1, 2):
        parts = {
            f"{n}.safetensors": {"a": torch.arange(step * 10.0), "b": torch.ones(3)} for n in ("network", "ema-0.05")
        }
        manifest = {"step": step, "seconds": 0.5, "config": {"seed": 0, "flip": ["*"]}, "data": {"sha256": "0" * 64}}
        with tempfile.TemporaryDirectory() as folder:
            samples.append(files_of(write_checkpoint(Path(folder), step, manifest, parts)))
    return Target("checkpoint", tuple(samples), read, digest=True)
