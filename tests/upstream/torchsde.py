"""Run torchsde's own tests on pfode: python -m tests.upstream.torchsde CHECKOUT [names] [--on torchsde].

CHECKOUT is a checkout of google-research/torchsde; its files are used as they lie there. `import torchsde` in them
gives pfode.compat.torchsde, or with --on another module (torchsde itself: the installed one). Names are as pytest's -k
takes them. Of its 1698 tests 73 are for GPUs and are skipped where there is none.
"""

import argparse
import importlib
import os
import sys
import time
import warnings
from pathlib import Path

import pytest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("names", nargs="?", default="")
    parser.add_argument("--on", default="pfode.compat.torchsde")
    options = parser.parse_args()
    folder = options.checkout.resolve()
    if not (folder / "tests" / "test_sdeint.py").is_file():
        raise SystemExit(f"{options.checkout}: no checkout of torchsde (tests/test_sdeint.py is missing)")
    if options.on != "torchsde":
        sys.modules["torchsde"] = importlib.import_module(options.on)
        for name in ("settings", "types"):
            sys.modules[f"torchsde.{name}"] = importlib.import_module(f"{options.on}.{name}")
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        del sys.modules[name]  # theirs is called so, too
    os.chdir(folder)
    sys.dont_write_bytecode = True
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", options.names, "tests"])
    print(f"{time.process_time() - began:.0f} CPU seconds")
    return code


if __name__ == "__main__":
    sys.exit(main())
