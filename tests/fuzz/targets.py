"""The formats that are fuzzed: modules of tests/fuzz/formats whose function `target` makes the honest files."""

import functools
import importlib

from tests.fuzz.engine import Target

FORMATS = ("model", "plan", "folder", "pickle", "npz", "zip", "png", "picture", "checkpoint", "toml")


@functools.cache
def target(name: str) -> Target:
    """The target of a format."""
    return importlib.import_module(f"tests.fuzz.formats.{name}").target()
