"""What a step of an SDE solve costs beside f and g, and a Brownian query, with torchsde in the same run.

    python benchmarks/sde_step.py [--json FILE] [--repeats 5]

Batch 256 x 16, float32, an MLP of 64 units as f and elementwise g, without gradients; one thread, this process's CPU
time, the least of all repeats, turn by turn. "Outside" is the time of a step less that of its evaluations of f and g.
pfode is driven by one key per sample (as `sdesolve` does) and by one key for the tensor (`Brownian.single`). Then
Brownian queries forth and back over 4096 steps, the resident memory over a million queries, and, in float64, the error
and the time of the gradients: those of the default adjoints beside backpropagation through all operations, where the
time is that of solve and backward pass. Without torchsde installed its columns are left out. About 3 minutes.
"""

import importlib
import importlib.util
import itertools
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor, nn

import pfode
from pfode.brownian import Brownian
from pfode.sde import SDE

BATCH, WIDTH, STEPS = 256, 16, 128
THEIRS = {"euler": "euler", "srid2": "srk", "milstein": "milstein", "midpoint": "midpoint", "heun": "heun"}
PEER = importlib.util.find_spec("torchsde") is not None
torchsde: Any = importlib.import_module("torchsde") if PEER else None


class Equation(nn.Module):
    """An MLP drift and elementwise diffusion, for both libraries."""

    noise_type = "diagonal"

    def __init__(self, calculus: str, width: int = WIDTH):
        super().__init__()
        self.sde_type = calculus
        self.net = nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, width))
        self.scale = nn.Parameter(torch.randn(width))

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(self.scale * y)


def cpu(run: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    run()
    return time.process_time() - began


def solves(method: str, end: float, step: float) -> dict[str, Callable[[], float]]:
    """Solves of both libraries, and f and g alone as often as pfode calls them."""
    calculus = "stratonovich" if method in ("midpoint", "heun") else "ito"
    made, y0 = Equation(calculus), torch.randn(BATCH, WIDTH)
    sde = SDE(made.f, made.g, "diagonal", calculus)
    ts, area = torch.tensor([0.0, end]), method == "srid2"
    times = {"srid2": (3, 4), "midpoint": (2, 2), "heun": (2, 2)}.get(method, (1, 1))
    steps = round(end / step)

    def ours(brownian: Any = None) -> Any:
        return pfode.sdesolve(sde, y0, ts, method=method, step_size=step, brownian=brownian)

    def field() -> None:
        t = torch.zeros(())
        for _ in range(steps):
            for _ in range(times[0]):
                made.f(t, y0)
            for _ in range(times[1]):
                made.g(t, y0)

    def single() -> Any:
        return ours(Brownian.single(0, (BATCH, WIDTH), 0.0, end, area, step=step))

    runs = {"field": lambda: cpu(field), "keys per sample": lambda: cpu(ours), "one key": lambda: cpu(single)}
    if PEER:
        options = {"method": THEIRS[method], "dt": step}
        runs["torchsde"] = lambda: cpu(lambda: torchsde.sdeint(made, y0, ts, **options))
    return runs


def per_step(method: str, step: float, repeats: int) -> dict[str, float]:
    """Microseconds a step: f and g, and each library in all."""
    with torch.no_grad():
        found = harness.turns(solves(method, 1.0, step), repeats)
    return {name: min(values) * step * 1e6 for name, values in found.items()}


def queries(n: int, repeats: int) -> dict[str, float]:
    """Microseconds a query, forth and back over n intervals."""
    grid = [k / n for k in range(n + 1)]
    pairs = [*itertools.pairwise(grid), *((a, b) for b, a in itertools.pairwise(grid[::-1]))]

    def walk(make: Callable[[], Callable[[float, float], Any]], part: int = 1) -> Callable[[], float]:
        def run() -> float:
            ask = make()
            chosen = pairs[: len(pairs) // part]
            return cpu(lambda: [ask(a, b) for a, b in chosen]) / len(chosen) * 1e6

        return run

    runs = {
        "keys per sample": walk(lambda: Brownian(range(BATCH), (WIDTH,)).increment),
        "one key": walk(lambda: Brownian.single(0, (BATCH, WIDTH)).increment),
    }
    if PEER:
        runs["BrownianInterval"] = walk(lambda: torchsde.BrownianInterval(size=(BATCH, WIDTH)))
        zeros = torch.zeros(BATCH, WIDTH)
        runs["BrownianTree"] = walk(lambda: torchsde.BrownianTree(t0=0.0, w0=zeros), 64)
    return {name: min(values) for name, values in harness.turns(runs, repeats, 1).items()}


def resident() -> float:
    """Resident memory at its largest, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def growth() -> float:
    """MB that resident memory grew from the 1000th to the 1,000,000th query."""
    bm, n = Brownian.single(0, (16, 4)), 1_000_000
    for k in range(1000):
        bm.increment(k / n, (k + 1) / n)
    before = resident()
    for k in range(1000, n):
        bm.increment(k / n, (k + 1) / n)
    return resident() - before


def gradients(repeats: int) -> dict[str, dict[str, float]]:
    """Relative errors of default adjoints (float64), and CPU time in units of backpropagation through everything."""
    table = {}
    for method, calculus in (("euler", "ito"), ("milstein", "ito"), ("srid2", "ito"), ("midpoint", "stratonovich")):
        made, y0 = Equation(calculus, 8).double(), torch.randn(64, 8, dtype=torch.float64)
        sde, params = SDE(made.f, made.g, "diagonal", calculus), list(made.parameters())

        def ours(adjoint: str, sde: SDE = sde, y0: Tensor = y0, method: str = method, params: Any = params) -> Tensor:
            out = pfode.sdesolve(sde, y0, [0.0, 1.0], method=method, step_size=1 / 256, adjoint=adjoint)
            return torch.cat([g.flatten() for g in torch.autograd.grad(out.ys[-1].square().sum(), params)])

        runs: dict[str, Callable[[], float]] = {
            name: lambda name=name, ours=ours: cpu(lambda: ours(name)) for name in ("direct", "checkpoint")
        }
        exact = ours("direct")
        errors = {"checkpoint": float((ours("checkpoint") - exact).norm() / exact.norm())}
        if PEER:
            area = "space-time" if method == "srid2" else "none"
            bm = torchsde.BrownianInterval(
                size=(64, 8), dtype=torch.float64, entropy=1, dt=1 / 256, levy_area_approximation=area
            )

            def theirs(
                call: Any, made: Any = made, y0: Tensor = y0, bm: Any = bm, method: str = method, params: Any = params
            ) -> Tensor:
                ys = call(made, y0, [0.0, 1.0], bm=bm, method=THEIRS[method], dt=1 / 256)
                return torch.cat([g.flatten() for g in torch.autograd.grad(ys[-1].square().sum(), params)])

            plain = theirs(torchsde.sdeint)
            wrong = theirs(torchsde.sdeint_adjoint) - plain
            errors["torchsde"] = float(wrong.norm() / plain.norm())
            runs["torchsde direct"] = lambda theirs=theirs: cpu(lambda: theirs(torchsde.sdeint))
            runs["torchsde"] = lambda theirs=theirs: cpu(lambda: theirs(torchsde.sdeint_adjoint))
        times = {name: min(values) for name, values in harness.turns(runs, repeats, 1).items()}
        table[method] = {"error": errors["checkpoint"], "time": times["checkpoint"] / times["direct"]}
        if PEER:
            table[method] |= {
                "torchsde error": errors["torchsde"],
                "torchsde time": times["torchsde"] / times["torchsde direct"],
            }
    return table


def main() -> None:
    parser = harness.parser(__doc__, repeats=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"memory growth, MB": growth()}
    print(f"memory from 1e3 to 1e6 queries: {figures['memory growth, MB']:+.1f} MB")
    print("\nus per step, of which outside of f and g (the share of torchsde's)")
    for method, step in [("euler", 1 / STEPS), ("euler", 0.01), *((m, 1 / STEPS) for m in list(THEIRS)[1:])]:
        found = per_step(method, step, options.repeats)
        outside = {name: value - found["field"] for name, value in found.items() if name != "field"}
        row = [f"f and g {found['field']:6.0f}"]
        for name, value in outside.items():
            share = f" ({value / outside['torchsde']:.3f})" if PEER and name != "torchsde" else ""
            row.append(f"{name} {found[name]:7.0f}, {value:6.0f}{share}")
        print(f"{method:9} dt {step:7.4f}: " + "; ".join(row), flush=True)
        figures[f"{method}, dt {step:g}"] = found
    figures["queries"] = queries(4096, options.repeats)
    print("\nus per Brownian query, forth and back over 4096 steps")
    print("; ".join(f"{name} {value:.0f}" for name, value in figures["queries"].items()), flush=True)
    figures["gradients"] = gradients(options.repeats)
    print("\nrelative error of the default adjoint's gradient (float64), time in units of backpropagation")
    for method, row in figures["gradients"].items():
        print(f"{method:9}: " + "; ".join(f"{name} {value:.2g}" for name, value in row.items()))
    harness.record(options, figures)


if __name__ == "__main__":
    sys.exit(main())
