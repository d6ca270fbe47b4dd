"""python -m tests.fuzz [FORMAT ...] --mutants N: damaged files of every format; fails where one is handled badly."""

import argparse
import sys
import time

from tests.fuzz.engine import run
from tests.fuzz.targets import FORMATS, target


def main() -> int:
    """0 where nothing was bad."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("formats", nargs="*", help=f"of {', '.join(FORMATS)}; all by default")
    parser.add_argument("--mutants", type=int, default=2000, help="of each format")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    chosen = parser.parse_args()
    bad = []
    for name in chosen.formats or FORMATS:
        began = time.perf_counter()
        report = run(target(name), chosen.mutants, chosen.first)
        print(f"{report}; {time.perf_counter() - began:.1f} s")
        bad += report.bad
    print(*bad, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
