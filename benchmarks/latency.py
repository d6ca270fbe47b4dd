"""What must not take long: the command line's first answers, the nodes of a grid, implicit steps of a wide state.

    python benchmarks/latency.py [--json FILE] [--repeats 5]

Seconds of processor time, the least of all repeats: of fresh interpreters for the command line, beside importing click;
of this process for the rest, each called once before. dm-nonuniform optimises a range once and keeps it; the figure is
that of the first time.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable

import harness
import torch

import pfode
from pfode import grids
from pfode.grids import optimised
from pfode.ode import solve

Work = Callable[[], object]
COMMANDS = {"pfode --help": ["--help"], "pfode --version": ["--version"], "pfode info digits": ["info", "digits"]}


def of_children() -> float:
    """Processor seconds of the processes that this one has waited for."""
    used = os.times()
    return used.children_user + used.children_system


def of_interpreter(code: str, repeats: int) -> float:
    """Processor seconds of a fresh interpreter that runs this code."""
    run = lambda: subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)  # noqa: E731
    return min(harness.turns({"run": harness.seconds(run, of_children)}, repeats, warm=0)["run"])


def of_process(work: Work, repeats: int) -> float:
    """Processor seconds of a call in this process."""
    return min(harness.turns({"work": harness.seconds(work, time.process_time)}, repeats, warm=0)["work"])


def wide(batch: str) -> Work:
    """Four implicit steps of 512 rows of four numbers: torchdiffeq takes 49 s."""
    y0 = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    ts = [0.0, 1.0]
    return lambda: solve(lambda t, y: net(y), y0, ts, method="implicit_euler", step_size=0.25, batch=batch)


def works() -> dict[str, tuple[Work, float]]:
    """What is measured, and the seconds that it may take."""
    process = pfode.VP()
    found: dict[str, tuple[Work, float]] = {
        f"grid {name}, 20 steps": (lambda name=name: grids.times(process, name, 20), 0.01)
        for name in grids.GRIDS
        if name not in ("dm-nonuniform", "shifted")
    }

    def searched() -> object:
        optimised._optimised.cache_clear()
        return grids.times(process, "dm-nonuniform", 6, final="stop")

    found["grid dm-nonuniform, 6 steps"] = (searched, 15.0)
    for batch in ("joint", "per-sample"):
        found[f"implicit Euler, 4 steps of (512, 4), {batch}"] = (wide(batch), 1.0)
    return found


def main() -> None:
    parser = harness.parser(__doc__, repeats=5)
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    click = of_interpreter("import click", options.repeats)
    for name, words in COMMANDS.items():
        code = f"from pfode.cli.__main__ import main\ntry: main({words})\nexcept SystemExit: pass"
        rows[name] = {"seconds": of_interpreter(code, options.repeats), "target": 4 * click}
    for name, (work, target) in works().items():
        work()
        rows[name] = {"seconds": of_process(work, options.repeats), "target": target}
    for name, row in rows.items():
        late = "" if row["seconds"] <= row["target"] else "  missed"
        print(f"{name:60s}{1e3 * row['seconds']:10.2f} ms, target {1e3 * row['target']:8.1f} ms{late}")
    harness.record(options, {"import click": click, "rows": rows})


if __name__ == "__main__":
    main()
