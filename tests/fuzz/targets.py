"""The formats that are fuzzed: modules of tests/fuzz/formats whose function `target` makes the honest files."""

import functools
import importlib

from tests.fuzz.engine import Report, Target, run

FORMATS = ("model", "plan", "folder", "pickle", "npz", "zip", "png", "picture", "checkpoint", "toml", "bench")


@functools.cache
def target(name: str) -> Target:
    """The target of a format."""
    return importlib.import_module(f"tests.fuzz.formats.{name}").target()


def report(name: str, mutants: int, first: int = 0) -> Report:
    """What comes of the mutants of a format."""
    return run(target(name), mutants, first)
