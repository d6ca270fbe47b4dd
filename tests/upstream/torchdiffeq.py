"""Run torchdiffeq's own tests on pfode: python -m tests.upstream.torchdiffeq CHECKOUT [names] [--on torchdiffeq].

CHECKOUT is a checkout of rtqichen/torchdiffeq; its files are used as they lie there. `import torchdiffeq` in them gives
pfode.compat.torchdiffeq, or with --on another module (torchdiffeq itself: the checkout's own). Names are as unittest
takes them: odeint_tests, event_tests.TestEventHandling.test_odeint, ...

Of its 22 tests TestMinMaxStep fails on either with SciPy 1.17, whose LSODA ignores min_step (SciPy's issue 25827).
"""

import argparse
import importlib
import sys
import time
import unittest
import warnings
from pathlib import Path

FILES = ("api_tests", "event_tests", "gradient_tests", "norm_tests", "odeint_tests")


class _Timed(unittest.TextTestResult):
    """Prints how long every test took, and every part of one that failed."""

    def startTest(self, test: unittest.TestCase) -> None:
        self._began = time.process_time()
        super().startTest(test)

    def stopTest(self, test: unittest.TestCase) -> None:
        self.stream.writeln(f"    {time.process_time() - self._began:.1f} s")
        super().stopTest(test)

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: object) -> None:
        if err is not None:
            self.stream.writeln(f"\n  fails: {subtest}: {str(err[1])[:200]}")  # type: ignore[index]
        super().addSubTest(test, subtest, err)  # type: ignore[arg-type]


def run(checkout: Path, names: list[str], on: str = "pfode.compat.torchdiffeq") -> unittest.TestResult:
    """The result of these tests (all if empty) with `torchdiffeq` meaning another module."""
    folder = checkout / "tests"
    if not (folder / "odeint_tests.py").is_file():
        raise SystemExit(f"{checkout}: no checkout of torchdiffeq (tests/odeint_tests.py is missing)")
    sys.path[:0] = [str(folder), str(checkout)]
    if on != "torchdiffeq":
        sys.modules["torchdiffeq"] = importlib.import_module(on)
    suite = unittest.defaultTestLoader.loadTestsFromNames(names or list(FILES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return unittest.TextTestRunner(sys.stdout, verbosity=2, resultclass=_Timed, warnings="ignore").run(suite)  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--on", default="pfode.compat.torchdiffeq")
    options = parser.parse_args()
    result = run(options.checkout, options.names, options.on)
    broken = {str(getattr(test, "test_case", test)) for test, _ in result.failures + result.errors}
    print(f"{result.testsRun - len(broken)} of {result.testsRun} tests pass")
    return min(len(broken), 1)


if __name__ == "__main__":
    sys.exit(main())
