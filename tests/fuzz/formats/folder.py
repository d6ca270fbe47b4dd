"""Folders of diffusers: a pipeline, one of shards, a component with an autoencoder."""

import tempfile
from pathlib import Path

import pfode
from tests.fuzz.engine import Files, Target
from tests.scores import tiny


def read(folder: Path) -> object:
    """The whole model: configuration and weights."""
    net = pfode.load(folder)
    weights = tuple(value.double().sum().item() for value in net.net.state_dict().values())
    return repr(net), net.labels, weights


def files_of(folder: Path) -> Files:
    """All files below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def target() -> Target:
    """See `Target`."""
    samples = []
    pipe = tiny.diffusers.DDPMPipeline(tiny.unet(), tiny.scheduler("DDPMScheduler"))
    for options in ({}, {"max_shard_size": "20kB"}):
        with tempfile.TemporaryDirectory() as folder:
            pipe.save_pretrained(folder, **options)
            samples.append(files_of(Path(folder)))
    return Target("folder", tuple(samples), read)
