"""A training step of a neural CDE, and the coefficients of paths with missing values, beside torchcde.

    python benchmarks/cde_step.py --repeats 3 --json benchmarks/cde_step.json     # about 2 CPU minutes

The step: batch 128, 50 observations of 3 channels (the time is one), hidden size 16, a network of 64 units, along a
Hermite path: the states at the end, and the gradient of a loss of them to all weights. The error is the largest of the
last states beside a solve at tolerances of 1e-9 in float64; rtol = 1e-4 and atol = 1e-6, torchcde's defaults, for all.
Processor time of one thread, the least of the repeats, which take turns; its default takes long, and is made once.

torchcde (0.2.5) is its own: pip install torchcde (it wants torchdiffeq and torchsde).
"""

import importlib
import math
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor

from pfode import cde

BATCH, LENGTH, HIDDEN = 128, 50, 16


class Field(torch.nn.Module):
    """f(z): a network of 64 units that ends in tanh."""

    def __init__(self) -> None:
        super().__init__()
        layers = torch.nn.Linear(HIDDEN, 64), torch.nn.ReLU(), torch.nn.Linear(64, HIDDEN * 3), torch.nn.Tanh()
        self.network = torch.nn.Sequential(*layers)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.network(z).view(*z.shape, 3)


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Times, series (a random walk of two channels beside the time), initial states."""
    torch.manual_seed(0)
    t = torch.arange(LENGTH, dtype=torch.float32)
    walk = torch.randn(BATCH, LENGTH, 2).cumsum(1) * 0.2
    x = torch.cat([(t / LENGTH)[None, :, None].expand(BATCH, -1, 1), walk], -1)
    return t, x, torch.randn(BATCH, HIDDEN)


def steps(field: Field, t: Tensor, x: Tensor, z0: Tensor, torchcde: Any) -> dict[str, Callable[[], Tensor]]:
    """Each makes a training step and returns the last states."""
    path = cde.hermite(x, t)
    ends = t[[0, -1]]
    spline = torchcde.CubicSpline(torchcde.hermite_cubic_coefficients_with_backward_differences(x, t), t)

    def made(solve: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def step() -> Tensor:
            field.zero_grad()
            z = solve()
            z.square().sum().backward()
            return z.detach()

        return step

    knots = {"options": {"jump_t": t}}
    return {
        "pfode cdesolve": made(lambda: cde.cdesolve(field, path, z0, ends).ys[-1]),
        "torchcde, knots given": made(lambda: torchcde.cdeint(spline, field, z0, ends, adjoint=False, **knots)[:, -1]),
        "torchcde, knots given, adjoint": made(lambda: torchcde.cdeint(spline, field, z0, ends, **knots)[:, -1]),
        "torchcde, adjoint=False": made(lambda: torchcde.cdeint(spline, field, z0, ends, adjoint=False)[:, -1]),
        "torchcde, its default": made(lambda: torchcde.cdeint(spline, field, z0, ends)[:, -1]),
    }


def coefficients(x: Tensor, t: Tensor, torchcde: Any) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Ours and theirs, by the kind of path."""
    return {
        "linear": (lambda: cde.linear(x, t), lambda: torchcde.linear_interpolation_coeffs(x, t)),
        "Hermite": (
            lambda: cde.hermite(x, t),
            lambda: torchcde.hermite_cubic_coefficients_with_backward_differences(x, t),
        ),
        "natural": (lambda: cde.natural(x, t), lambda: torchcde.natural_cubic_coeffs(x, t)),
    }


def main() -> None:
    torchcde: Any = importlib.import_module("torchcde")
    options = harness.parser(__doc__, 3).parse_args()
    torch.set_num_threads(1)
    t, x, z0 = data()
    field = Field()
    with torch.no_grad():
        fine = cde.hermite(x.double(), t.double())
        exact = cde.cdesolve(field.double(), fine, z0.double(), t[[0, -1]], rtol=1e-9, atol=1e-9).ys[-1]
    runs = steps(field.float(), t, x, z0, torchcde)
    slow = ("torchcde, its default", "torchcde, knots given, adjoint")
    quick = {name: harness.seconds(run, time.process_time) for name, run in runs.items() if name not in slow}
    best = {name: min(values) for name, values in harness.turns(quick, options.repeats, 1).items()}
    best |= {name: harness.seconds(runs[name], time.process_time)() for name in slow}
    errors = {name: float((run().double() - exact).abs().max()) for name, run in runs.items() if name not in slow[:1]}
    errors["torchcde, its default"] = errors["torchcde, adjoint=False"]  # the same forward solve
    ours = best["pfode cdesolve"]
    print(f"{'training step':34s} {'seconds':>8s} {'ours over it':>13s} {'error':>9s}")
    for name in runs:
        print(f"{name:34s} {best[name]:8.3f} {ours / best[name]:12.3f}x {errors[name]:9.1e}")
    missing = torch.where(torch.rand(x.shape) < 0.3, math.nan, x)
    found = {}
    print(f"\n{'coefficients, 30 % missing':34s} {'pfode ms':>8s} {'torchcde ms':>13s}")
    for name, (mine, theirs) in coefficients(missing, t, torchcde).items():
        times = harness.turns({"ours": harness.seconds(mine, time.process_time)}, 10 * options.repeats)["ours"]
        found[name] = {"pfode": 1e3 * min(times), "torchcde": 1e3 * harness.seconds(theirs, time.process_time)()}
        print(f"{name:34s} {found[name]['pfode']:8.2f} {found[name]['torchcde']:13.1f}")
    table = {name: {"seconds": best[name], "error": errors[name]} for name in runs}
    harness.record(options, {"step": table, "coefficients_ms": found})


if __name__ == "__main__":
    main()
