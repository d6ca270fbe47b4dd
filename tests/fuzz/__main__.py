"""python -m tests.fuzz [FORMAT ...] --mutants N: damaged files of every format; fails where one is handled badly."""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat

from tests.fuzz.targets import FORMATS, report


def main() -> int:
    """0 where nothing was bad."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("formats", nargs="*", help=f"of {', '.join(FORMATS)}; all by default")
    parser.add_argument("--mutants", type=int, default=2000, help="of each format")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    chosen = parser.parse_args()
    unknown = set(chosen.formats) - set(FORMATS)
    if unknown:
        parser.error(f"unknown formats: {', '.join(sorted(unknown))}")
    bad = []
    began = time.perf_counter()
    with ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("spawn")) as pool:
        names = chosen.formats or FORMATS
        for found in pool.map(report, names, repeat(chosen.mutants), repeat(chosen.first)):
            print(found, flush=True)
            bad += found.bad
    print(f"{time.perf_counter() - began:.1f} s")
    print(*bad, sep="\n", end="\n" if bad else "")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
