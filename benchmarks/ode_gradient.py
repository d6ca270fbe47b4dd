"""What a gradient through an ODE solve costs, and how wrong it is, beside torchdiffeq's adjoint in the same run.

    python benchmarks/ode_gradient.py [--json FILE] [--repeats 9]

1. Time (solve and backward, of the process, the best of some repeats, turn by turn) and relative error of the gradient
   of the parameters (geometric mean over networks), on a state of (64, 16) in float32; the reference is made in float64
   at tolerance 1e-11. What is left of the error is that of the solution itself, wherever the gradient is exact: a
   method of higher order makes it smaller. At tolerance 1e-7 it is the rounding of the float32 state; "float64 state"
   keeps the state in float64 and evaluates the same float32 network.
2. Peak memory of tensors over the number of steps, without and with a cap, and of reversible solves.
3. Gradient errors of every adjoint on three problems: that network; a long dissipative solve in float32, which
   forgets its start; a stiff one. Where an adjoint refuses, its message is the entry. Gradients of an explicit method
   at the limit of its stability are exact and of no use: a rounding error made late is amplified.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor

from pfode.errors import PfodeError
from pfode.ode import solve
from pfode.ode.adjoints.checkpoint import Checkpoint
from pfode.ode.adjoints.reversible import Reversible
from tests.ode.memory import peak

TARGETS = {"time": 0.35, "error": 0.1, "memory over 4x the steps": 2.2, "reversible": 1.1}
SEEDS = 4
Gradient = list[Tensor]


class Network(torch.nn.Module):
    """y' = MLP(y, t), with weights large enough that dopri5 takes 11 steps at tolerance 1e-5."""

    def __init__(self, size: int = 16, width: int = 64):
        super().__init__()
        widths = [(size + 1, width), (width, width), (width, size)]
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*w) for w in widths)
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(2.5)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        y = torch.cat([y, t.expand(len(y), 1)], 1)
        for layer in self.layers[:-1]:
            y = torch.tanh(layer(y))
        return self.layers[-1](y)


class Wide(torch.nn.Module):
    """A network of float32 as a field of a float64 state."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(t.float(), y.float()).double()


def off(made: Gradient, wanted: Gradient) -> float:
    """Relative error over all parameters."""
    wrong = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(made, wanted, strict=True))
    return (wrong / sum(float(b.double().square().sum()) for b in wanted)) ** 0.5


def gradient(net: torch.nn.Module, loss: Callable[[], Tensor]) -> tuple[Gradient, dict[str, float]]:
    """Gradients of the parameters, and milliseconds there and back."""
    net.zero_grad()
    began = time.process_time()
    value = loss()
    there = time.process_time()
    value.backward()
    spent = {"forward ms": 1e3 * (there - began), "backward ms": 1e3 * (time.process_time() - there)}
    return [p.grad.clone() for p in net.parameters() if p.grad is not None], spent


def problem(seed: int = 0) -> tuple[Network, Tensor, Gradient]:
    """A network, its initial states, and the gradient in float64."""
    torch.manual_seed(seed)
    net, y0 = Network(), torch.randn(64, 16)
    exact = Network().double()
    exact.load_state_dict(net.state_dict())
    options: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11, "method": "dopri8"}
    wanted, _ = gradient(exact, lambda: solve(exact, y0.double(), [0.0, 4.0], **options).ys[-1].square().mean())
    return net, y0, wanted


def losses(net: Network, y0: Tensor, tol: float) -> dict[str, Callable[[], Tensor]]:
    """Losses by library, adjoint and method."""
    from torchdiffeq import odeint_adjoint  # pyright: ignore[reportMissingImports]

    def ours(adjoint: Any = "checkpoint", method: str = "dopri5", wide: bool = False) -> Callable[[], Tensor]:
        options: dict[str, Any] = {"rtol": tol, "atol": tol, "adjoint": adjoint, "method": method}
        field, start = (Wide(net), y0.double()) if wide else (net, y0)
        return lambda: solve(field, start, [0.0, 4.0], **options).ys[-1].square().mean()

    def theirs() -> Tensor:
        ys: Any = odeint_adjoint(net, y0, torch.tensor([0.0, 4.0]), rtol=tol, atol=tol)
        return ys[-1].square().mean()

    return {
        "torchdiffeq adjoint": theirs,
        "checkpoint": ours(),
        "checkpoint, tsit5": ours(method="tsit5"),
        "checkpoint, vern7": ours(method="vern7"),
        "checkpoint, dopri8": ours(method="dopri8"),
        "checkpoint, nothing kept": ours(Checkpoint(graphs=0)),
        "checkpoint, float64 state": ours(wide=True),
        "checkpoint, vern7, float64 state": ours(method="vern7", wide=True),
        "direct": ours("direct"),
        "direct, vern7": ours("direct", "vern7"),
        "backsolve": ours("backsolve"),
    }


def against_torchdiffeq(repeats: int) -> list[dict[str, Any]]:
    problems = [problem(seed) for seed in range(SEEDS)]
    rows = []
    print(f"\ntime and error of the gradient, state (64, 16); targets {TARGETS['time']}x and {TARGETS['error']}x")
    for tol in (1e-3, 1e-5, 1e-7):
        net, y0, _ = problems[0]
        runs = {name: lambda net=net, loss=loss: gradient(net, loss)[1] for name, loss in losses(net, y0, tol).items()}
        table = {name: harness.least(spent) for name, spent in harness.turns(runs, repeats, warm=0).items()}
        for name, row in table.items():
            errors = [off(gradient(net, losses(net, y0, tol)[name])[0], wanted) for net, y0, wanted in problems]
            row["error"] = statistics.geometric_mean(errors)
        base = table["torchdiffeq adjoint"]
        for name, row in table.items():
            total = row["forward ms"] + row["backward ms"]
            row["time ratio"] = total / (base["forward ms"] + base["backward ms"])
            row["error ratio"] = row["error"] / base["error"]
            rows.append({"tolerance": tol, "way": name, **row})
            print(
                f"  {tol:7.0e}  {name:34s}{row['forward ms']:7.1f}{row['backward ms']:8.1f} ms{row['time ratio']:8.3f}x"
                f"   error {row['error']:.1e}{row['error ratio']:9.3f}x",
                flush=True,
            )
    return rows


def memory() -> list[dict[str, Any]]:
    """KiB at their peak, over the steps."""
    net, y0, _ = problem()
    state = y0.numel() * y0.element_size()
    counts = (40, 80, 160, 320)

    def held(steps: int, adjoint: Any, method: str) -> int:
        def run() -> None:
            net.zero_grad()
            out = solve(net, y0, [0.0, 4.0], method=method, adjoint=adjoint, step_size=4 / steps)
            out.ys[-1].square().mean().backward()

        run()
        return peak(run)

    print(f"\npeak memory in KiB over {counts} steps of rk4; a state takes {state // 1024} KiB")
    rows = []
    for name, adjoint, method, cap in (
        ("direct", "direct", "rk4", 0),
        ("checkpoint", "checkpoint", "rk4", 0),
        ("checkpoint, no graphs", Checkpoint(graphs=0), "rk4", 0),
        ("capped, 16 states", Checkpoint(16 * state), "rk4", 16 * state),
        ("capped, 4 states", Checkpoint(4 * state), "rk4", 4 * state),
        ("reversible", "reversible", "reversible-rk4", 0),
        ("backsolve", "backsolve", "rk4", 0),
    ):
        one = held(4, Checkpoint(state), method) if cap else 0
        sizes = [held(n, adjoint, method) for n in counts]
        row = {"way": name, "peaks": dict(zip(counts, sizes, strict=True)), "4x the steps": sizes[-1] / sizes[-3]}
        note = ""
        if cap:
            row |= {"cap": cap, "beyond one step": sizes[-1] - one}
            note = f"   beyond one step {(sizes[-1] - one) // 1024}, the cap is {cap // 1024}"
        rows.append(row)
        print(
            f"  {name:20s}" + "".join(f"{size // 1024:8d}" for size in sizes) + f"{row['4x the steps']:8.2f}x{note}",
            flush=True,
        )
    return rows


def by_adjoint() -> list[dict[str, Any]]:
    """Where each adjoint breaks."""
    net, y0, wanted = problem()
    torch.manual_seed(1)
    rate = torch.nn.Linear(4, 4)
    with torch.no_grad():
        rate.weight.copy_(-torch.eye(4) + 0.1 * torch.randn(4, 4))
    stiff = torch.nn.Linear(2, 2).double()
    with torch.no_grad():
        stiff.weight.copy_(torch.tensor([[-1000.0, 1.0], [0.0, -1.0]]))

    def forgetful(t: Tensor, y: Tensor) -> Tensor:
        return rate(y) + 0.1 * torch.sin(y)

    def fast(t: Tensor, y: Tensor) -> Tensor:
        return stiff(y) + torch.cos(t)

    start, point = torch.linspace(-2, 2, 32).view(8, 4), torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    problems = {
        "network": (net, net, y0, 4.0, {"rtol": 1e-5, "atol": 1e-5}, wanted),
        "long, dissipative": (rate, forgetful, start, 20.0, {"rtol": 1e-5, "atol": 1e-7}, None),
        "stiff": (stiff, fast, point, 1.0, {"rtol": 1e-6, "atol": 1e-8, "max_steps": 3000}, None),
    }
    print("\nrelative error of the gradient of the parameters")
    rows = []
    for name, (module, field, y, end, options, known) in problems.items():
        exact = known
        if exact is None:
            double = y.double()
            module.double()
            tight: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-13, "method": "dopri8"}
            exact, _ = gradient(
                module, lambda f=field, y=double, e=end, o=tight: solve(f, y, [0.0, e], **o).ys[-1].sum()
            )
            module.to(y.dtype)
        ways: list[tuple[Any, str]] = [(a, "dopri5") for a in ("direct", "checkpoint", "interpolated", "backsolve")]
        if name == "stiff":
            ways += [("checkpoint", "kvaerno5"), ("backsolve", "kvaerno5")]
        back = "reversible-rk4" if name == "long, dissipative" else "reversible-dopri5"
        ways += [("checkpoint", back), ("reversible", back), (Reversible(every=10), back)]
        for adjoint, method in ways:
            label = adjoint if isinstance(adjoint, str) else "reversible, anchors"
            fixed = {"step_size": 0.1} if method == "reversible-rk4" else {}

            def loss(
                field=field, y=y, end=end, options=options | fixed, adjoint=adjoint, method=method, known=known
            ) -> Tensor:
                out = solve(field, y, [0.0, end], adjoint=adjoint, method=method, **options)
                return out.ys[-1].sum() if known is None else out.ys[-1].square().mean()

            try:
                made, spent = gradient(module, loss)
                row: dict[str, Any] = {"error": off(made, exact), **spent}
                text = f"{row['error']:.1e}"
            except PfodeError as error:
                row = {"refused": error.message}
                text = f"refused: {error.message:.110}"
            rows.append({"problem": name, "adjoint": label, "method": method, **row})
            print(f"  {name:20s}{label:22s}{method:20s}{text}", flush=True)
    return rows


def main() -> None:
    parser = harness.parser(__doc__, repeats=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    report: dict[str, Any] = {"targets": TARGETS}
    report["gradient"] = against_torchdiffeq(options.repeats)
    report["memory"] = memory()
    report["adjoints"] = by_adjoint()
    harness.record(options, report)


if __name__ == "__main__":
    main()
