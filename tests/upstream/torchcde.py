"""Run torchcde's own tests on pfode: python -m tests.upstream.torchcde CHECKOUT [names] [--on torchcde].

CHECKOUT is a checkout of patrick-kidger/torchcde; its files are used as they lie there. `import torchcde` in them gives
pfode.compat.torchcde, or with --on another module (torchcde itself: the checkout's own). Names are as pytest's -k takes
them. One of its 25 tests is skipped by itself.

Two of them use signatory, which no longer builds: where it is missing, pfode's log-signatures stand in for it. They are
held to its definition in tests/cde/test_logsig.py.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

from pfode.cde import logsignature


def signatory() -> Any:
    """What the tests use of signatory."""
    module: Any = types.ModuleType("signatory")
    module.Logsignature = lambda depth: lambda path: logsignature(path, depth)
    return module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("names", nargs="?", default="")
    parser.add_argument("--on", default="pfode.compat.torchcde")
    options = parser.parse_args()
    folder = options.checkout.resolve() / "test"
    if not (folder / "test_cdeint.py").is_file():
        raise SystemExit(f"{options.checkout}: no checkout of torchcde (test/test_cdeint.py is missing)")
    sys.path[:0] = [
        str(folder.parent / "example"),
        str(folder),
        *([str(folder.parent)] if options.on == "torchcde" else []),
    ]
    sys.modules["torchcde"] = importlib.import_module(options.on)
    if importlib.util.find_spec("signatory") is None and options.on != "torchcde":
        sys.modules["signatory"] = signatory()
    os.chdir(folder)
    sys.dont_write_bytecode = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.main(
            ["-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", options.names, "-c", "pytest.ini", "."]
        )


if __name__ == "__main__":
    sys.exit(main())
