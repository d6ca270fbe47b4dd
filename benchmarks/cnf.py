"""Continuous normalising flows in the plane, against entropies that are known, and the cost of a training step.

    python benchmarks/cnf.py [LAW ...] [--seconds 290] [--json FILE]    5 CPU minutes a law; by default six and twonorm
    python benchmarks/cnf.py --step [--json FILE]                       half a minute, with torchdiffeq and zuko

LAW is one of pfode.scores.toys. A velocity field (an MLP of 4 x 96) is trained by flow matching for three quarters of
the seconds and then by its own likelihood; the gap is the negative log-likelihood of 20,000 fresh points, by its
own solve at rtol 1e-5, minus the law's exact entropy: a Kullback-Leibler divergence. Seconds are of the processor.

--step: one gradient of the negative log-likelihood at rtol 1e-5 and atol 1e-6, turn by turn in one process; the error
is the largest of any parameter's gradient against a solve at rtol 1e-11 in float64.
"""

import math
import time
from typing import Any

import harness
import torch
from torch import Tensor

from pfode.flow import CNF
from pfode.models import VectorField
from pfode.scores.networks.mlp import MLP, MLPConfig
from pfode.scores.toys import LAWS, Law, law

PLANE = ("8gaussians", "moons", "swissroll", "rings", "spirals", "checkerboard", "twonorm")
BATCH, TEST, AVERAGED = 1024, 20_000, 0.999
TRAIN_SEED, TEST_SEED = 0, 2**40


class Velocity(torch.nn.Module):
    """An MLP as a field f(t, y)."""

    def __init__(self, d: int, width: int = 96, depth: int = 4):
        super().__init__()
        self.net = MLP(MLPConfig(dims=d, width=width, depth=depth))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y, t.reshape(-1).expand(len(y)))


class Average:
    """An exponential average of a module's weights."""

    def __init__(self, module: torch.nn.Module):
        self.module, self.count = module, 0
        self.kept = [p.detach().clone() for p in module.parameters()]

    def add(self) -> None:
        self.count += 1
        share = max(1 - AVERAGED, 1 / self.count)
        for kept, p in zip(self.kept, self.module.parameters(), strict=True):
            kept.lerp_(p.detach(), share)

    def put(self) -> None:
        for kept, p in zip(self.kept, self.module.parameters(), strict=True):
            p.data.copy_(kept)


def train(made: Law, seconds: float) -> tuple[Velocity, dict[str, float]]:
    """Flow matching, then likelihood, for so many seconds of the processor."""
    torch.manual_seed(0)
    field = Velocity(made.shape[0])
    began, drawn, steps = time.process_time(), 0, {"matching": 0, "likelihood": 0}
    for phase, share, rate in (("matching", 0.75, 3e-3), ("likelihood", 1.0, 3e-4)):
        optimiser = torch.optim.Adam(field.parameters(), rate, betas=(0.9, 0.99))
        flow, average = CNF(field, made.shape[0], rtol=1e-4, atol=1e-5), Average(field)
        start, end = time.process_time() - began, share * seconds
        while (now := time.process_time() - began) < end:
            done = (now - start) / (end - start)
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, (steps[phase] + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done))
            x0 = made.sample(BATCH, TRAIN_SEED + drawn).float()
            drawn += BATCH
            if phase == "matching":
                t = (torch.rand(()) + torch.arange(BATCH) / BATCH) % 1
                x1 = torch.randn_like(x0)
                loss = (field(t, x0 + t[:, None] * (x1 - x0)) - (x1 - x0)).square().mean()
            else:
                loss = -flow.log_prob(x0).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(field.parameters(), 1.0)
            optimiser.step()
            steps[phase] += 1
            if done > 0.5:
                average.add()
        average.put()
    return field, {**steps, "seconds": time.process_time() - began}


def gap(made: Law, field: Velocity) -> dict[str, float]:
    """Negative log-likelihood of fresh points, and its distance from the entropy."""
    x = made.sample(TEST, TEST_SEED).float()
    flow = CNF(field, made.shape[0], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        found = torch.cat([flow.log_prob(part) for part in x.split(2000)]).double()
    excess = made.log_prob(x).double() - found  # the same points: the error of a mean of differences is small
    return {
        "entropy": made.entropy,
        "nll": made.entropy + float(excess.mean()),
        "gap": float(excess.mean()),
        "error": float(excess.std()) / math.sqrt(TEST),
    }


def laws(names: list[str], seconds: float) -> list[dict[str, Any]]:
    """A line per law."""
    rows = []
    for name in names:
        made = law(name)
        field, cost = train(made, seconds)
        rows.append({"law": name, **gap(made, field), **cost})
        row = rows[-1]
        print(f"{name:14s} entropy {row['entropy']:.4f}  gap {row['gap']:+.4f} +- {row['error']:.4f} nats  "
              f"{row['seconds']:.0f} s: {row['matching']} steps of matching, {row['likelihood']} of likelihood",
              flush=True)  # fmt: skip
    return rows


# ---- the cost of a training step


def step(d: int, batch: int, width: int, exact: bool, repeats: int) -> list[dict[str, Any]]:
    """Seconds and gradient errors of pfode, torchdiffeq's adjoint (FFJORD's method) and zuko."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(d + 1, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Tanh()
    field = VectorField(torch.nn.Sequential(*layers, torch.nn.Linear(width, d)), timed=True)
    x = torch.randn(batch, d)
    how = "exact" if exact else "hutchinson"
    runs: dict[str, Any] = {"pfode": _ours(field, x, how)}
    runs["pfode, adjoint=checkpoint"] = _ours(field, x, how, "checkpoint")
    runs["torchdiffeq adjoint"] = _torchdiffeq(field, x, exact)
    runs["zuko"] = _zuko(field, x, exact)
    found = {}
    for name, run in runs.items():
        found[name] = _gradient(field, run)
    field.double()
    truth = _gradient(field, _ours(field, x.double(), "exact", rtol=1e-11, atol=1e-12, method="dopri8"))
    field.float()
    times = harness.turns({name: harness.seconds(run, time.process_time) for name, run in runs.items()}, repeats)
    rows = []
    for name in runs:
        error = float((found[name] - truth).abs().max()) if exact else math.nan
        ratio = min(times["pfode"]) / min(times[name])
        rows.append({"d": d, "batch": batch, "width": width, "trace": how, "what": name, "seconds": min(times[name]),
                     "error": error, "ratio": ratio})  # fmt: skip
        cost = f"{min(times[name]) * 1e3:7.1f} ms   pfode takes {ratio:.2f} of it   gradient error {error:.1e}"
        print(f"d={d:<3d} batch={batch} width={width} {how:10s} {name:26s} {cost}", flush=True)
    return rows


def _gradient(field: torch.nn.Module, run: Any) -> Tensor:
    field.zero_grad()
    run()
    return torch.cat([p.grad.flatten() for p in field.parameters() if p.grad is not None]).double()


def _ours(field: Any, x: Tensor, trace: str, adjoint: str = "direct", **options: Any) -> Any:
    flow = CNF(field, x.shape[1], trace=trace, adjoint=adjoint, **{"rtol": 1e-5, "atol": 1e-6, **options})

    def run() -> None:
        field.zero_grad()
        (-flow.log_prob(x).mean()).backward()

    return run


def _normal(z: Tensor) -> Tensor:
    return (-0.5 * (z**2 + math.log(2 * math.pi))).sum(1)


def _torchdiffeq(field: Any, x: Tensor, exact: bool) -> Any:
    import torchdiffeq  # type: ignore[import-not-found]

    d = x.shape[1]

    class Augmented(torch.nn.Module):
        """FFJORD's field: brute-force trace, or one Gaussian probe kept for the whole solve."""

        def __init__(self):
            super().__init__()
            self.field, self.probe = field, torch.randn_like(x)

        def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                y = state[0].requires_grad_(True)
                slope = self.field(t, y)
                if exact:
                    rows = [torch.autograd.grad(slope[:, i].sum(), y, create_graph=True)[0][:, i] for i in range(d)]
                    return slope, torch.stack(rows).sum(0)
                (pulled,) = torch.autograd.grad(slope, y, self.probe, create_graph=True)
                return slope, (pulled * self.probe).sum(1)

    augmented = Augmented()

    def run() -> None:
        field.zero_grad()
        start, ts = (x, x.new_zeros(len(x))), torch.tensor([0.0, 1.0])
        z, trace = torchdiffeq.odeint_adjoint(augmented, start, ts, rtol=1e-5, atol=1e-6, method="dopri5")
        (-(_normal(z[-1]) + trace[-1]).mean()).backward()

    return run


def _zuko(field: Any, x: Tensor, exact: bool) -> Any:
    from zuko.transforms import FreeFormJacobianTransform  # type: ignore[import-not-found]

    def run() -> None:
        field.zero_grad()
        ends: dict[str, Any] = {"t0": x.new_tensor(0.0), "t1": x.new_tensor(1.0), "phi": tuple(field.parameters())}
        made: Any = FreeFormJacobianTransform(field, **ends, atol=1e-6, rtol=1e-5, exact=exact)
        z, trace = made.call_and_ladj(x)
        (-(_normal(z) + trace).mean()).backward()

    return run


def main() -> None:
    parser = harness.parser(__doc__, repeats=7)
    parser.add_argument("laws", nargs="*", metavar="LAW", help="of pfode.scores.toys")
    parser.add_argument("--seconds", type=float, default=290, help="of the processor, per law (290)")
    parser.add_argument("--step", action="store_true", help="the cost of a training step instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.step:
        rows = []
        for exact in (True, False):
            for d, batch, width in ((2, 512, 64), (16, 256, 128)):
                rows += step(d, batch, width, exact, options.repeats)
    else:
        unknown = [name for name in options.laws if name not in LAWS]
        if unknown:
            parser.error(f"no law {unknown[0]!r}; known: {', '.join(LAWS)}")
        rows = laws(options.laws or list(PLANE), options.seconds)
    harness.record(options, {"rows": rows})


if __name__ == "__main__":
    main()
