"""Configuration files of the command line."""

from pathlib import Path

import click

from pfode.cli.options import find_command
from pfode.errors import FileError
from tests.fuzz.engine import Target

SHARED = b"""# what all commands take
[tool.pfode]
model = "digits"
steps = 12
n = 4
set = ["tau=0.5", "between=1,2"]
afs = "model"
quiet = true
device = 'cpu'

[tool.pfode.bench]
model = ["digits@2", "mixture-4"]
features = "mine:features"

[tool.pfode.train]
sigma-data = 0.7
lr = 1e-3
ema = "0.05,0.1"

[tool.other]
date = 2026-01-31T12:00:00Z
"""
PLAIN = b'steps = 0x0f\neta = 0.5\nout = """\nsheet.png"""\nlower-order-final = false\nseeds = "0-63,80"\n'


def read(folder: Path) -> object:
    """The values that the commands with options to set take from the file."""
    found = []
    for name in ("sample", "train", "fit", "bench"):
        try:
            with find_command(name).make_context(name, ["--config", str(folder / "given.toml")]) as ctx:
                found.append(ctx.params)
        except click.BadParameter as error:  # what the command line says with the code of a file
            raise FileError(f"{folder / 'given.toml'}: {error.format_message()}") from error
    return found


def target() -> Target:
    """See `Target`."""
    return Target("toml", ({"given.toml": SHARED}, {"given.toml": PLAIN}), read)
