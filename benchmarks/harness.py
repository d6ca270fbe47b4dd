"""What the benchmarks share: arguments, timing turn by turn in one process, counting, and the JSON record.

Run as `python benchmarks/NAME.py`, which puts this folder on the path; `sys.path` gets the checkout too, for `tests`.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

__all__ = ["Count", "facts", "least", "parser", "record", "seconds", "turns", "waiter"]

PEERS = ("diffusers", "k-diffusion", "torchdiffeq", "torchcde", "torchode", "diffrax", "jaxlib")
PACKAGES = ("pfode", "torch", "numpy", "scipy", *PEERS)
READS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"}
Result = TypeVar("Result")


def parser(doc: str | None, repeats: int | None = None, device: bool = False) -> argparse.ArgumentParser:
    """The arguments of a benchmark: --json FILE, and --repeats and --device where it has them.

    Args:
        doc: the module's docstring, its help.
        repeats: the default; None: none are made.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    if repeats is not None:
        made.add_argument("--repeats", type=int, default=repeats, metavar="N", help=f"of every measurement ({repeats})")
    if device:
        made.add_argument("--device", default="cpu", help="where to compute (cpu)")
    return made


# ---- timing


def turns(runs: Mapping[str, Callable[[], Result]], repeats: int, warm: int = 2) -> dict[str, list[Result]]:
    """What each run returns, `repeats` times, turn by turn in an order that changes; the first `warm` are left out.

    A machine that slows down slows all of them.
    """
    found: dict[str, list[Result]] = {name: [] for name in runs}
    for repeat in range(repeats + warm):
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            value = runs[name]()
            if repeat >= warm:
                found[name].append(value)
    return found


def seconds(
    work: Callable[[], object], clock: Callable[[], float] = time.perf_counter, wait: Callable[[], object] | None = None
) -> Callable[[], float]:
    """A run that returns how long `work` took.

    Args:
        clock: `time.process_time` where others use the machine, too.
        wait: called before each reading of the clock, see `waiter`.
    """

    def run() -> float:
        if wait is not None:
            wait()
        began = clock()
        work()
        if wait is not None:
            wait()
        return clock() - began

    return run


def waiter(device: str | torch.device) -> Callable[[], object]:
    """What waits until a device has done all work that was queued."""
    return torch.cuda.synchronize if str(device).startswith("cuda") else lambda: None


def least(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The least of every figure: what others on the machine do only adds."""
    return {key: min(row[key] for row in rows) for key in rows[0]}


# ---- counting


class Count(TorchDispatchMode):
    """Tensor (ATen) operations and values read back to the host between the first and the last call of `called`."""

    active: "Count | None" = None

    def __enter__(self) -> "Count":
        self.operations, self.reads = 0, 0
        self.calls: list[tuple[int, int]] = []
        Count.active = self
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        Count.active = None
        super().__exit__(*exception)

    def called(self) -> None:
        """Note that a call begins."""
        self.calls.append((self.operations, self.reads))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.reads += func.overloadpacket.__name__ in READS
        return func(*args, **(kwargs or {}))

    def per_call(self) -> dict[str, float]:
        """ "operations" and "reads" from one call to the next."""
        (first, read), (last, read_last) = self.calls[0], self.calls[-1]
        gaps = len(self.calls) - 1
        return {"operations": (last - first) / gaps, "reads": (read_last - read) / gaps}


# ---- what is kept


def facts(options: argparse.Namespace | None = None) -> dict[str, Any]:
    """Where and how figures were made: command, machine, its load, threads, versions."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    given = {} if options is None else {key: value for key, value in vars(options).items() if key != "json"}
    return {
        "benchmark": Path(sys.argv[0]).name,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in given.items()},
        "machine": platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def record(options: argparse.Namespace, sections: dict[str, Any]) -> None:
    """Write the figures, by section, beside how they were made, where --json says."""
    if options.json:
        options.json.write_text(json.dumps({"made": facts(options), **sections}, indent=1) + "\n")
