"""What a step of an ODE solve costs beside the field, and in all, with dopri5 at one tolerance.

    python benchmarks/ode_step.py [--json FILE] [--repeats 40]

pfode, torchdiffeq, torchode and diffrax (jit) solve the same problems in one process on one CPU thread, turn by turn.
Times are this process's CPU time and the least of all repeats, as a shared machine only adds; whatever a solve does
beside its steps is divided among them. Totals are those of the bare field. In solves of their own the field notes when
it is entered and left; that, less what the noting itself takes (measured on a field that does nothing), is the field's
own time, and the rest of the total is the solver's. A compiled solve of pfode holds the field, so only its total can be
seen, as with diffrax; where no time in between is asked for, one call makes its attempts; what it returns is held
against the uncompiled solve. Values read back to the host are counted where they are asked for, in a run of their own.
"""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import harness
import torch
from torch import Tensor

import pfode

BATCH, TOLERANCE, END = 256, 1e-5, 10.0
OUTSIDE = {"tiny": 0.15, "MLP 64": 0.2, "MLP 256": 0.25}  # of torchdiffeq's time outside the field
TOTAL = {"tiny": 0.1, "MLP 64": 0.2, "MLP 256": 0.45}  # of torchdiffeq's total, compiled
PEER = 2.0  # times diffrax, for the same
READS = ("item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "__bool__", "__float__", "__int__", "__index__")
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

    @classmethod
    def cost(cls) -> float:
        """Seconds per call that are noted as inside, but spent on the noting."""
        least, y = float("inf"), torch.zeros(1)
        for _ in range(20):
            field = cls(lambda t, y: y)
            for _ in range(1000):
                field(0, y)
            least = min(least, field.inside / 1000)
        return least

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
    from torchdiffeq import odeint  # pyright: ignore[reportMissingImports]

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
        "pfode, compiled": (ours(problem.y0, compile=True), False),
    }
    cost = Clocked.cost()

    def once(run: Solve, clocked: bool) -> dict[str, float]:
        row: dict[str, float] = {}
        if clocked:
            field = Clocked(problem.field)
            row["steps"], _ = timed(run, field)
            row["inside"] = (field.inside - field.calls * cost) / row["steps"] * 1e6
        steps, spent = timed(run, problem.field)
        row.setdefault("steps", steps)
        return row | {"total": spent / row["steps"] * 1e6}

    runs = {name: functools.partial(once, *solver) for name, solver in solvers.items()}
    found = {name: harness.least(rows) for name, rows in harness.turns(runs, repeats).items()}
    for row in found.values():
        if "inside" in row:
            row["outside"] = row["total"] - row["inside"]
    return found


def timed(run: Solve, field: Callable[..., Any]) -> tuple[float, float]:
    """Steps and seconds of a solve."""
    start = time.process_time()
    steps = run(field)
    return steps, time.process_time() - start


def difference(problem: Problem) -> float:
    """Between compiled and uncompiled states at the end, as a share of the initial ones."""
    with torch.no_grad():
        plain, compiled = (
            pfode.solve(problem.field, problem.y0, [0.0, END], rtol=TOLERANCE, atol=TOLERANCE, compile=compile).ys[-1]
            for compile in (False, True)
        )
    return float((plain - compiled).abs().max() / problem.y0.abs().max())


def shares(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """What the targets are for: ours as shares of torchdiffeq's, and compiled as a multiple of diffrax's."""
    base, compiled = found["torchdiffeq"], found["pfode, compiled"]["total"]
    return {
        "outside": found["pfode"]["outside"] / base["outside"],
        "total": compiled / base["total"],
        "diffrax": compiled / found["diffrax, jit"]["total"],
    }


def table(problem: str, found: dict[str, dict[str, float]], share: dict[str, float]) -> bool:
    """Print it; whether the targets are met."""
    base = found["torchdiffeq"]
    print(f"\n{problem}, batch {BATCH}: microseconds per step, and torchdiffeq's share")
    print(f"{'':20}{'steps':>6}{'outside':>10}{'':>7}{'total':>10}{'':>7}")
    for name, row in found.items():
        outside = f"{row['outside']:10.0f}{row['outside'] / base['outside']:6.2f}x" if "outside" in row else " " * 17
        print(f"{name:20}{row['steps']:6.0f}{outside}{row['total']:10.0f}{row['total'] / base['total']:6.2f}x")
    targets = {"outside": OUTSIDE[problem], "total": TOTAL[problem], "diffrax": PEER}
    print(f"outside the field {share['outside']:.3f}x of torchdiffeq, target {targets['outside']}x; ", end="")
    print(f"compiled total {share['total']:.3f}x, target {targets['total']}x; ", end="")
    print(f"{share['diffrax']:.2f}x diffrax, target {PEER}x")
    return all(share[name] <= target for name, target in targets.items())


def main() -> int:
    parser = harness.parser(__doc__, repeats=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    met, results, ratios, apart = True, {}, {}, {}
    for problem in problems():
        results[problem.name] = measure(problem, options.repeats)
        ratios[problem.name] = shares(results[problem.name])
        met &= table(problem.name, results[problem.name], ratios[problem.name])
        apart[problem.name] = difference(problem)
        print(f"compiled and uncompiled states differ by {apart[problem.name]:.1e} of the initial ones")
        met &= apart[problem.name] < 1e-5
    tiny = problems()[0]
    counted = {
        "adaptive": reads_per_step(tiny),
        "adaptive, per sample": reads_per_step(tiny, batch="per-sample"),
        "adaptive, compiled": reads_per_step(tiny, compile=True),
        "fixed grid": reads_per_step(tiny, method="rk4", step_size=0.1),
    }
    print("\nread-backs per attempted step: " + ", ".join(f"{name} {count:.2f}" for name, count in counted.items()))
    met &= max(counted.values()) <= 1 and counted["fixed grid"] == 0
    sections = {
        "targets": {"outside": OUTSIDE, "total": TOTAL, "diffrax": PEER},
        "problems": results,
        "ratios": ratios,
        "compiled from uncompiled": apart,
        "read-backs per attempted step": counted,
    }
    harness.record(options, sections)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
