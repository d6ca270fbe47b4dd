"""Network pickles of EDM and EDM2, of several protocols."""

import tempfile
from pathlib import Path

import pfode
from tests.fuzz.engine import Target
from tests.scores import pickled


def read(folder: Path) -> object:
    """The whole model: configuration and weights."""
    net = pfode.load(folder / "net.pkl")
    weights = tuple(value.double().sum().item() for value in net.net.state_dict().values())
    return repr(net), net.labels, weights


def target() -> Target:
    """See `Target`."""
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for name, precond, protocol in (
            ("ddpm++", "EDMPrecond", 4),
            ("edm2", "Precond", 4),
            ("ddpm++", "VPPrecond", 2),
        ):
            file = pickled.snapshot(Path(folder) / "x.pkl", pickled.network(name), precond, protocol)
            samples.append({"net.pkl": file.read_bytes()})
    return Target("pickle", tuple(samples), read)
