"""Throughput of `pfode.sample` against the bare network evaluated as often, in the same batches.

    python benchmarks/throughput.py [--json FILE] [--device cpu] [--repeats 15] [--batches 1 16 64]

The bare network gets states, times and classes that lie ready on the device; sampling makes the seeds' noise, the plan
and its updates and looks for NaN. Both run turn by turn in one process, the order changing. Reported are the median of
the ratios of neighbours, and the ratio of the quickest runs, which a busy machine disturbs less. Target: 97 %.
"""

import statistics
from collections.abc import Callable
from typing import Any

import harness
import torch

import pfode
from pfode import defaults
from pfode.errors import PfodeError

MODELS = ("digits", defaults.MODEL)
STEPS = 20
TARGET = 0.97


def bare(net: Any, plan: pfode.Plan, n: int, batch: int, label: torch.Tensor | None, device: str) -> Callable[[], Any]:
    """The network's evaluations alone."""
    states = torch.randn(n, *net.shape, device=device)
    times = net.precondition(plan.t).c_noise.to(states)

    def go() -> None:
        with torch.no_grad():
            for i in range(0, n, batch):
                cond = {} if label is None else {"label": label[i : i + batch].to(device)}
                for c_noise in times.unbind():
                    net.network(states[i : i + batch], c_noise, **cond)

    return go


def measure(name: str, sampler: str, batch: int, device: str, repeats: int) -> dict[str, Any]:
    net: Any = pfode.load(name).to(device)
    n = max(4, 2 * batch)
    plan = pfode.make_plan(sampler, net.process, STEPS)
    label = torch.arange(n) % len(net.labels) if net.labels else None
    wait = harness.waiter(device)

    def sample() -> None:
        pfode.sample(net, n, plan=plan, label=label, batch=batch)

    runs = {"bare": bare(net, plan, n, batch, label, device), "sample": sample}
    spent = harness.turns({key: harness.seconds(run, wait=wait) for key, run in runs.items()}, repeats)
    ratios = [a / b for a, b in zip(spent["bare"], spent["sample"], strict=True)]
    rates = {key: n / statistics.median(seconds) for key, seconds in spent.items()}
    best = min(spent["bare"]) / min(spent["sample"])
    where = {"model": name, "sampler": plan.name, "batch": batch, "evaluations": plan.nfe}
    ratio = statistics.median(ratios)
    return where | {"images/s": rates["sample"], "bare images/s": rates["bare"], "ratio": ratio, "best": best}


def main() -> None:
    parser = harness.parser(__doc__, repeats=15, device=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--samplers", nargs="+", default=["auto", "heun", "euler-a"])
    options = parser.parse_args()
    report: dict[str, Any] = {"steps": STEPS, "target": TARGET, "rows": []}
    print(f"{'model':10s}{'sampler':12s}{'batch':>6s}{'images/s':>12s}{'bare':>12s}{'ratio':>9s}{'best':>9s}")
    for model in MODELS:
        try:
            pfode.load(model)
        except PfodeError:
            print(f"{model}: not shipped here")
            continue
        for sampler in options.samplers:
            for batch in options.batches:
                row = measure(model, sampler, batch, options.device, options.repeats)
                report["rows"].append(row)
                rates = f"{row['images/s']:12.2f}{row['bare images/s']:12.2f}{row['ratio']:9.1%}{row['best']:9.1%}"
                print(f"{model:10s}{row['sampler']:12s}{batch:6d}{rates}", flush=True)
    harness.record(options, report)


if __name__ == "__main__":
    main()
