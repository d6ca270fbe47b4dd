"""What a step of an ODE solve costs beside the field, and in all, with dopri5 at one tolerance.

    python benchmarks/ode_step.py [--json FILE] [--repeats 40]

pfode, torchdiffeq, torchode and diffrax (jit) solve the same problems in one process on one CPU thread, turn by turn.
Times are this process's CPU time and the least of all repeats, as a shared machine only adds; whatever a solve does
beside its steps is divided among them. The field notes when it is entered and left: what is left of a solve's time is
the solver's. pfode's compiled step holds the field, so only its total can be seen, as with diffrax. Values read back to
the host are counted where they are asked for, in a run of their own.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import torch
from torch import Tensor

import pfode
from pfode.ode import SOLVERS
from pfode.ode.compiled import Compiled

BATCH, TOLERANCE, END = 256, 1e-5, 10.0
OUTSIDE = {"tiny": 0.15, "MLP 64": 0.2, "MLP 256": 0.25}  # of torchdiffeq's time outside the field
TOTAL = {"tiny": 0.1, "MLP 64": 0.2, "MLP 256": 0.45}  # of torchdiffeq's total, for the compiled step
READS = ("item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "__bool__", "__float__", "__int__", "__index__")
COMPILED = Compiled(SOLVERS["dopri5"])
Solve = Callable[[Callable[..., Any]], float]


@contextlib.contextmanager
def counted_reads() -> Iterator[list[str]]:
    """The names of the methods by which values are asked for on the host, as they are called."""
    seen: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def read(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return method(*args, **kwargs)

        return read

    with contextlib.ExitStack() as stack:
        for name in READS:
            stack.enter_context(mock.patch.object(Tensor, name, noting(name)))
        yield seen


class Clocked:
    """A field that adds up the time spent in it, and its calls."""

    def __init__(self, field: Callable[[Any, Tensor], Tensor]):
        self.field, self.inside, self.calls = field, 0.0, 0

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        start = time.process_time()
        slope = self.field(t, y)
        self.inside += time.process_time() - start
        self.calls += 1
        return slope


@dataclass(frozen=True)
class Problem:
    """A field in torch, the arrays of its layers for jax, and the initial state."""

    name: str
    field: Callable[[Any, Tensor], Tensor]
    layers: list[tuple[Any, Any]]
    y0: Tensor


def problems() -> list[Problem]:
    torch.manual_seed(0)
    made = [Problem("tiny", lambda t, y: -y, [], torch.randn(BATCH, 2))]
    for width, hidden in ((16, 64), (64, 256)):
        net = torch.nn.Sequential(torch.nn.Linear(width, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, width))
        net.requires_grad_(False)
        layers = [(net[i].weight.T.numpy(), net[i].bias.numpy()) for i in (0, 2)]  # type: ignore[union-attr]
        made.append(Problem(f"MLP {hidden}", lambda t, y, net=net: net(y), layers, torch.randn(BATCH, width)))
    return made


def ours(y0: Tensor, **options: Any) -> Solve:
    def run(field: Any) -> float:
        with torch.no_grad():
            out = pfode.solve(field, y0, [0.0, END], rtol=TOLERANCE, atol=TOLERANCE, **options)
        return float(torch.as_tensor(out.stats.steps).max())

    return run


def torchdiffeq(y0: Tensor) -> Solve:
    from torchdiffeq import odeint

    ts = torch.tensor([0.0, END])

    def run(field: Any) -> float:
        calls = field.calls if isinstance(field, Clocked) else 0
        with torch.no_grad():
            odeint(field, y0, ts, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")
        return (field.calls - calls - 2) / 6 if isinstance(field, Clocked) else 0.0  # two for the first step size

    return run


def torchode(y0: Tensor) -> Solve:
    import torchode as to  # type: ignore[import-not-found]

    ts = torch.tensor([[0.0, END]]).expand(len(y0), 2)

    def run(field: Any) -> float:
        term = to.ODETerm(field)
        control = to.IntegralController(atol=TOLERANCE, rtol=TOLERANCE, term=term)
        solver = to.AutoDiffAdjoint(to.Dopri5(term=term), control)
        with torch.no_grad():
            out = solver.solve(to.InitialValueProblem(y0=y0, t_eval=ts))
        return float(out.stats["n_steps"].max())

    return run


def diffrax(problem: Problem) -> Solve:
    import diffrax  # type: ignore[import-not-found]
    import jax  # type: ignore[import-not-found]
    import jax.numpy as jnp  # type: ignore[import-not-found]

    layers = [(jnp.asarray(w), jnp.asarray(b)) for w, b in problem.layers]

    def field(t: Any, y: Any, args: Any) -> Any:
        if not layers:
            return -y
        (w1, b1), (w2, b2) = layers
        return jnp.tanh(y @ w1 + b1) @ w2 + b2

    control = diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE)

    @jax.jit
    def solve(y0: Any) -> Any:
        term, span = diffrax.ODETerm(field), (0.0, END, None)
        return diffrax.diffeqsolve(term, diffrax.Dopri5(), *span, y0, stepsize_controller=control)

    y0 = jnp.asarray(problem.y0.numpy())

    def run(_: Any) -> float:
        out = solve(y0)
        out.ys.block_until_ready()
        return float(out.stats["num_steps"])

    return run


def reads_per_step(problem: Problem, **options: Any) -> float:
    """Between a short and a long solve: what each further step reads."""
    counts = []
    for end in (END, 10 * END):
        with counted_reads() as seen, torch.no_grad():
            out = pfode.solve(problem.field, problem.y0, [0.0, end], **options)
        counts.append((float(torch.as_tensor(out.stats.steps).max()), len(seen)))
    (few, before), (many, after) = counts
    return (after - before) / (many - few)


def measure(problem: Problem, repeats: int) -> dict[str, dict[str, float]]:
    """Per solver: microseconds per step outside the field and in all, and steps."""
    solvers: dict[str, tuple[Solve, bool]] = {
        "torchdiffeq": (torchdiffeq(problem.y0), True),
        "torchode": (torchode(problem.y0), True),
        "diffrax, jit": (diffrax(problem), False),
        "pfode": (ours(problem.y0), True),
        "pfode, per sample": (ours(problem.y0, batch="per-sample"), True),
        "pfode, compiled": (ours(problem.y0, method=COMPILED), False),
    }
    found: dict[str, dict[str, float]] = {}
    for repeat in range(-2, repeats):  # the first ones compile
        for name, (run, clocked) in solvers.items():
            field = Clocked(problem.field)
            start = time.process_time()
            steps = run(field if clocked or name == "torchdiffeq" else problem.field)
            spent = time.process_time() - start
            if repeat < 0:
                continue
            row = found.setdefault(name, {"steps": steps})
            row["total"] = min(row.get("total", float("inf")), spent / steps * 1e6)
            if clocked:
                row["outside"] = min(row.get("outside", float("inf")), (spent - field.inside) / steps * 1e6)
    return found


def table(problem: str, found: dict[str, dict[str, float]]) -> bool:
    """Print it; whether the targets are met."""
    base = found["torchdiffeq"]
    print(f"\n{problem}, batch {BATCH}: microseconds per step, and torchdiffeq's share")
    print(f"{'':20}{'steps':>6}{'outside':>10}{'':>7}{'total':>10}{'':>7}")
    for name, row in found.items():
        outside = f"{row['outside']:10.0f}{row['outside'] / base['outside']:6.2f}x" if "outside" in row else " " * 17
        print(f"{name:20}{row['steps']:6.0f}{outside}{row['total']:10.0f}{row['total'] / base['total']:6.2f}x")
    outside = found["pfode"]["outside"] / base["outside"]
    total = found["pfode, compiled"]["total"] / base["total"]
    peer = found["pfode, compiled"]["total"] / found["diffrax, jit"]["total"]
    print(f"outside the field {outside:.2f}x, target {OUTSIDE[problem]}x; ", end="")
    print(f"compiled {total:.2f}x, target {TOTAL[problem]}x; {peer:.1f}x diffrax, target 2x")
    return outside <= OUTSIDE[problem] and total <= TOTAL[problem] and peer <= 2


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    met, results = True, {}
    for problem in problems():
        results[problem.name] = measure(problem, options.repeats)
        met &= table(problem.name, results[problem.name])
    tiny = problems()[0]
    counted = {
        "adaptive": reads_per_step(tiny),
        "adaptive, per sample": reads_per_step(tiny, batch="per-sample"),
        "adaptive, compiled": reads_per_step(tiny, method=COMPILED),
        "fixed grid": reads_per_step(tiny, method="rk4", step_size=0.1),
    }
    print("\nread-backs per step: " + ", ".join(f"{name} {count:.2f}" for name, count in counted.items()))
    met &= max(counted.values()) <= 1 and counted["fixed grid"] == 0
    if options.json:
        facts = {"machine": platform.processor(), "torch": torch.__version__, "repeats": options.repeats}
        options.json.write_text(json.dumps({**facts, "problems": results, "reads": counted}, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
