"""Throughput of `pfode.sample` against the bare network evaluated as often, in the same batches.

    python benchmarks/throughput.py [--json FILE] [--device cpu] [--repeats 15] [--batches 1 16 64]

The bare network gets states, times and classes that lie ready on the device; sampling makes the seeds' noise, the plan
and its updates and looks for NaN. Both run turn by turn in one process, the order changing. Reported are the median of
the ratios of neighbours, and the ratio of the quickest runs, which a busy machine disturbs less. Target: 97 %.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pfode
from pfode.errors import PfodeError

MODELS = ("digits", "emoji")
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
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def sample() -> None:
        pfode.sample(net, n, plan=plan, label=label, batch=batch)

    runs = {"bare": bare(net, plan, n, batch, label, device), "sample": sample}
    spent: dict[str, list[float]] = {key: [] for key in runs}
    for repeat in range(repeats + 2):
        for key in sorted(runs, reverse=bool(repeat % 2)):
            wait()
            began = time.perf_counter()
            runs[key]()
            wait()
            if repeat >= 2:
                spent[key].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(spent["bare"], spent["sample"], strict=True)]
    rates = {key: n / statistics.median(seconds) for key, seconds in spent.items()}
    best = min(spent["bare"]) / min(spent["sample"])
    where = {"model": name, "sampler": plan.name, "batch": batch, "evaluations": plan.nfe}
    ratio = statistics.median(ratios)
    return where | {"images/s": rates["sample"], "bare images/s": rates["bare"], "ratio": ratio, "best": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--samplers", nargs="+", default=["auto", "heun", "euler-a"])
    options = parser.parse_args()
    report: dict[str, Any] = {"steps": STEPS, "torch": torch.__version__, "machine": platform.machine()}
    report |= {"device": options.device, "threads": torch.get_num_threads(), "target": TARGET, "rows": []}
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
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
