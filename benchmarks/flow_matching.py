"""Flow matching from eight Gaussians to two moons, beside torchcfm in the same run, and what a coupling costs.

    python benchmarks/flow_matching.py [--steps 4000] [--json FILE]    4 CPU minutes
    python benchmarks/flow_matching.py --coupling                      15 seconds

torchcfm and POT are on PYTHONPATH. The settings are those of torchcfm's tutorial: an MLP of 3 x 64, SELU, Adam at 1e-3,
batches of 256, 4,000 steps; the paths are 100 steps of Euler from 1,024 points. W2^2 is the squared Wasserstein
distance of the ends to as many fresh points of the moons, beside its floor, that of two independent sets of moons;
every set has as many points of either moon, and of each Gaussian. The normalised path energy is
|int E|v|^2 dt - W2^2(source, data)| / W2^2(source, data).

--coupling: processor time of the optimal pairs of two batches of 256 and 512, all of pfode's work in it, and of
torchcfm's plan and draw by POT; and how many points of a batch each uses.
"""

import math
import time
from typing import Any

import harness
import torch
from torch import Tensor

from pfode.scores.toys import Smoothed, eight_gaussians, keyed_uniforms, moons
from pfode.scores.training.coupling import Assignment, Independent, assignment, costs

SOURCE, DATA = eight_gaussians(5.0, math.sqrt(0.1)), moons(0.2, 3.0, (-1.0, -1.0))
BATCH, POINTS, EULER = 256, 1024, 100
FRESH = 2**40


def network() -> torch.nn.Module:
    """The tutorial's: 3 x 64, SELU; the time is the last input."""
    sides = [3, 64, 64, 64, 2]
    layers: list[torch.nn.Module] = []
    for i in range(4):
        layers += [torch.nn.Linear(sides[i], sides[i + 1]), torch.nn.SELU()]
    return torch.nn.Sequential(*layers[:-1])


def balanced(law: Smoothed, n: int, first: int) -> Tensor:
    """n points, as many from each curve of the law."""
    uniforms = keyed_uniforms(first, 3 * n, 4)
    which = (uniforms[:, 0] * len(law.curves)).floor()
    each = n // len(law.curves)
    return torch.cat([law.place(uniforms[which == k][:each]) for k in range(len(law.curves))])


def squared_distance(a: Tensor, b: Tensor) -> float:
    """W2^2 of two sets of as many points, exact."""
    cost = costs(a, b)
    return float(cost[torch.arange(len(a)), assignment(cost)].mean())


def train(what: str, steps: int) -> tuple[torch.nn.Module, float]:
    """A velocity field v(x, t), t from the data (0) to the source (1), and its seconds of the processor."""
    torch.manual_seed(0)
    field = network()
    optimiser = torch.optim.Adam(field.parameters(), 1e-3)
    began, matcher = time.process_time(), None
    if what.startswith("torchcfm"):
        from torchcfm import conditional_flow_matching as theirs  # type: ignore[import-not-found]

        kind = "ExactOptimalTransportConditionalFlowMatcher" if "OT" in what else "ConditionalFlowMatcher"
        matcher = getattr(theirs, kind)(sigma=0.0)
    pairs = Assignment() if "OT" in what else Independent()
    for step in range(steps):
        x0, x1 = (law.sample(BATCH, step * BATCH).float() for law in (DATA, SOURCE))
        if matcher is not None:
            s, x, u = matcher.sample_location_and_conditional_flow(x1, x0)  # theirs runs from the source to the data
            t, velocity = 1 - s, -u
        else:
            x1 = x1[pairs.order(x0, x1, None, step)]
            t = torch.rand(BATCH)
            x, velocity = x0 + t[:, None] * (x1 - x0), x1 - x0
        loss = (field(torch.cat([x, t[:, None]], 1)) - velocity).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return field, time.process_time() - began


@torch.no_grad()
def euler(field: torch.nn.Module, x: Tensor, steps: int) -> tuple[Tensor, float]:
    """The ends of Euler's steps from t = 1 to 0, and int E|v|^2 dt."""
    energy = 0.0
    for k in range(steps):
        t = torch.full((len(x), 1), 1 - k / steps)
        v = field(torch.cat([x, t], 1))
        energy += float(v.square().sum(1).mean()) / steps
        x = x - v / steps
    return x, energy


def flows(steps: int) -> list[dict[str, Any]]:
    """A line per way."""
    source, data = balanced(SOURCE, POINTS, FRESH).float(), balanced(DATA, POINTS, FRESH)
    other = balanced(DATA, POINTS, 2 * FRESH)
    floor = squared_distance(data, other)
    whole = squared_distance(balanced(SOURCE, 4096, FRESH), balanced(DATA, 4096, FRESH))
    print(f"floor: W2^2 of two sets of moons {floor:.3f}; W2^2(source, data) {whole:.2f}")
    rows = []
    for what in ("pfode OT-CFM", "torchcfm OT-CFM", "pfode I-CFM", "torchcfm I-CFM"):
        field, seconds = train(what, steps)
        ends, energy = euler(field, source, EULER)
        once, _ = euler(field, source, 1)
        w2, one = squared_distance(ends.double(), data), squared_distance(once.double(), data)
        relative = abs(energy - whole) / whole
        rows.append({"what": what, "w2": w2, "one_step": one, "energy": relative, "seconds": seconds, "floor": floor})
        figures = f"W2^2 {w2:.3f}  path energy {relative:.3f}  one Euler step W2^2 {one:.3f}  {seconds:.0f} s"
        print(f"{what:16s} {figures}", flush=True)
    return rows


def coupling(repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of a coupling, and the share of the points it uses."""
    from torchcfm.optimal_transport import OTPlanSampler  # type: ignore[import-not-found]

    rows, sampler = [], OTPlanSampler("exact")
    for n in (256, 512):
        x0, x1 = DATA.sample(n), SOURCE.sample(n)
        runs: dict[str, Any] = {
            "pfode": lambda x0=x0, x1=x1: Assignment().order(x0, x1, None, 0),
            "torchcfm (POT)": lambda x0=x0, x1=x1: sampler.sample_plan(x1, x0),
        }
        times = harness.turns({name: harness.seconds(run, time.process_time) for name, run in runs.items()}, repeats)
        used = {"pfode": len(set(runs["pfode"]().tolist())) / n,
                "torchcfm (POT)": len(sampler.sample_plan(x1, x0)[0].unique(dim=0)) / n}  # fmt: skip
        for name in runs:
            rows.append({"points": n, "what": name, "seconds": min(times[name]), "used": used[name]})
            print(f"{n} points  {name:16s} {min(times[name]) * 1e3:6.2f} ms   {used[name]:.0%} of the points used")
    return rows


def main() -> None:
    parser = harness.parser(__doc__, repeats=30)
    parser.add_argument("--steps", type=int, default=4000, help="of training (4000)")
    parser.add_argument("--coupling", action="store_true", help="the cost of a coupling instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = coupling(options.repeats) if options.coupling else flows(options.steps)
    harness.record(options, {"rows": rows})


if __name__ == "__main__":
    main()
