"""What a fitted plan gains on the best hand-made sampler at the same number of calls, bed by bed.

    python benchmarks/fitting.py [--beds digits ...] [--nfe 4 6 10] [--json FILE]

A bed's hand-made samplers are those of diffusers and k-diffusion as the catalogue has them (`tests/samplers` holds them
equal), each on every grid of a fixed list; the best in root mean square is chosen on noise of its own, as is the best
in the median. The fitted plan comes from `pfode.fit_plan`, which starts from what `sampler="auto"` takes by hand; for
`emoji` from the plans that ship with it. Then all are run on the same test noise, which neither saw. Distances are from
the converged end points. "all" counts the catalogue's own samplers among the hand-made. Energy distances are against
true samples, where the bed can draw them, beside that of the fine solution. Figures of beds that are not run again
stay in the file; plans and teachers are kept in --cache.
"""

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pfode
from pfode import noise
from pfode.denoiser import Denoiser
from pfode.errors import OtherModelWarning
from pfode.plan import Plan
from pfode.scores.data import digits
from pfode.scores.exact import Empirical, GaussianMixture

BUDGETS = [4, 5, 6, 8, 10]
PEERS = ["dpm++2m@dpm++", "dpm++3m@dpm++", "unipc2@dpm++", "unipc3@dpm++", "exp-ab3@dpm", "ipndm3@ddim", "ipndm4@ddim"]
OURS = ["unipc2@flow", "ipndm3@trig", "exp-ab2@trig"]
GRIDS = {
    "EDM": ["karras", "log-snr", "beta-sigma", "ays-svd", "cosine(0.5)"],
    "VP": ["karras", "log-snr", "time", "time-quadratic"],
    "Flow": ["time", "beta", "ays-svd", "karras"],
}
CHOICE, TEST = 3 * 2**60, 10**9  # first seeds


def mixture(d: int, k: int, seed: int, process: pfode.Process) -> GaussianMixture:
    """k clusters of random means in d dimensions, variances falling as 1/i, a fifth of them within the clusters."""
    draw = torch.Generator().manual_seed(seed)
    spectrum = 1 / torch.arange(1, d + 1, dtype=torch.float64)
    spectrum *= 0.25 / spectrum.mean()
    means = torch.randn(k, d, generator=draw, dtype=torch.float64) * (0.8 * spectrum).sqrt()
    return GaussianMixture(means, std=(0.2 * spectrum).sqrt().expand(k, d), process=process)


def ideal() -> Empirical:
    pictures = digits().images.double() / 127.5 - 1
    return Empirical(pictures, std=0.1)


BEDS: dict[str, Any] = {
    "mixture-2": lambda: GaussianMixture([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87], [0.0, 0.0]], std=0.2),
    "mixture-16": lambda: mixture(16, 8, 1, pfode.EDM()),
    "mixture-64": lambda: mixture(64, 48, 0, pfode.EDM()),
    "mixture-16-vp": lambda: mixture(16, 8, 1, pfode.VP()),
    "mixture-16-flow": lambda: mixture(16, 8, 1, pfode.Flow()),
    "digits-ideal": ideal,
    "digits": lambda: pfode.load("digits"),
    "digits-vp": lambda: pfode.load("digits-vp"),
    "digits-flow": lambda: pfode.load("digits-flow"),
    "emoji": lambda: pfode.load("emoji"),
}


class Noise:
    """Noise, classes and converged end points."""

    def __init__(self, denoiser: Denoiser, first: int, n: int, fine: int):
        shape, labels = getattr(denoiser, "shape"), getattr(denoiser, "labels", None)  # noqa: B009
        self.denoiser = denoiser
        process = denoiser.process
        self.x = process.sigma(process.t_max) * noise.normal(range(first, first + n), noise.INITIAL, shape)
        self.cond = {"label": torch.arange(n) % len(labels)} if labels else {}
        self.end = self.run(pfode.make_plan("exp-ab3", process, fine, grid="karras"))

    def run(self, plan: Plan) -> Tensor:
        with torch.no_grad():
            parts = [slice(i, i + 128) for i in range(0, len(self.x), 128)]
            cond: list[dict[str, Any]] = [{key: v[part] for key, v in self.cond.items()} for part in parts]
            runs = [pfode.run(plan, self.denoiser, self.x[p], **c) for p, c in zip(parts, cond, strict=True)]
            return torch.cat(runs)

    def errors(self, plan: Plan) -> tuple[float, float]:
        """Root mean square, and median over samples of their own."""
        return distances(self.run(plan), self.end)


def distances(a: Tensor, b: Tensor) -> tuple[float, float]:
    each = (a - b).double().flatten(1).pow(2).mean(1)
    return float(f"{each.mean().sqrt():.4g}"), float(f"{each.sqrt().median():.4g}")


def energy(a: Tensor, b: Tensor) -> float:
    """Energy distance: 2 E|a - b| - E|a - a'| - E|b - b'|, unbiased; its root, with the sign."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    n, m = len(a), len(b)
    square = 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).sum() / (n * (n - 1)) - torch.cdist(b, b).sum() / (
        m * (m - 1)
    )  # fmt: skip
    return float(f"{math.copysign(math.sqrt(abs(square.item())), square.item()):.3g}")


def make(denoiser: Denoiser, candidate: str, grid: str, nfe: int) -> Plan:
    sampler, chart = candidate.split("@")
    return pfode.make_plan(sampler, denoiser.process, nfe=nfe, grid=grid, chart=chart)


def measured(
    name: str, denoiser: Denoiser, nfe: int, choice: Noise, test: Noise, cache: Path, iterations: int
) -> dict[str, Any]:
    """One bed at one number of calls."""
    grids = GRIDS[type(denoiser.process).__name__]
    found = {(c, g): choice.errors(make(denoiser, c, g, nfe)) for c in PEERS + OURS for g in grids}
    result: dict[str, Any] = {}
    for title, names in (("peers", PEERS), ("all", PEERS + OURS)):
        some = {key: value for key, value in found.items() if key[0] in names}
        best = [min(some, key=lambda key, i=i: some[key][i]) for i in (0, 1)]
        tested = [test.errors(make(denoiser, *key, nfe)) for key in best]
        result[title] = {"samplers": best, "rms": tested[0][0], "median": tested[1][1]}
        result[title] |= {"samplers": ["@".join(key) for key in best]}
    plans = getattr(denoiser, "plans", {})
    began = time.process_time()
    if name == "emoji":
        plan = plans[nfe]
    else:
        many = 1024 if name.startswith("mixture") else 512
        options = {"n": many, "check": many // 4, "iterations": iterations, "cache": cache / name}
        plan = pfode.fit_plan(denoiser, nfe, **options)
    seconds = time.process_time() - began
    rms, median = test.errors(plan)
    hand = test.errors(pfode.make_plan("auto", denoiser.process, nfe=nfe))
    result |= {"rms": rms, "median": median, "start": hand, "seconds": round(seconds, 1)}
    result["iterations"] = plan.meta["fitted"]["iterations"]
    for title in ("peers", "all"):
        result[title]["ratios"] = [round(a / b, 3) for a, b in zip((rms, median), (result[title]["rms"], result[title]["median"]), strict=True)]  # fmt: skip  # noqa: E501
    if isinstance(denoiser, GaussianMixture):
        true = denoiser.sample(len(test.x), seed=5 * 10**6)
        hand_made = make(denoiser, *found_best(found), nfe)
        result["energy"] = {
            "fitted": energy(test.run(plan), true),
            "hand-made": energy(test.run(hand_made), true),
            "fine": energy(test.end, true),
        }
    return result


def found_best(found: dict[tuple[str, str], tuple[float, float]]) -> tuple[str, str]:
    """The peers' best in root mean square."""
    return min((key for key in found if key[0] in PEERS), key=lambda key: found[key][0])


def summary(beds: dict[str, Any], title: str) -> dict[str, Any]:
    """Geometric means over the beds of the ratios, each at least 0.1."""
    means = {}
    for budgets in ((4, 5, 6), (8, 10)):
        rows = [bed[str(k)][title]["ratios"] for bed in beds.values() for k in budgets if str(k) in bed]
        if rows:
            logs = torch.tensor(rows, dtype=torch.float64).clamp_min(0.1).log().mean(0).exp()
            means["-".join(map(str, budgets))] = [round(value, 3) for value in logs.tolist()]
    return means


def transfer(budgets: list[int], few: int = 8) -> dict[str, Any]:
    """The plans of `emoji` elsewhere: on the `digits` network, and on `emoji` guided by a range of scales.

    Root mean square and median error of the plan, of what auto takes by hand there, and of the plan fitted there.
    """
    emoji, small = pfode.load("emoji"), pfode.load("digits")
    beds: dict[str, tuple[Denoiser, int, int]] = {"digits": (small, 128, 60), "emoji": (emoji, few, 30)}
    beds |= {f"emoji guided {scale:g}": (emoji.guided(scale), few, 30) for scale in (1.5, 3.0)}
    found: dict[str, Any] = {}
    warnings.simplefilter("ignore", OtherModelWarning)
    for name, (denoiser, n, fine) in beds.items():
        test = Noise(denoiser, TEST, n, fine)
        guided = getattr(denoiser, "evals", 1) > 1
        found[name] = {}
        for nfe in budgets:
            rows = {"emoji's plan": emoji.plans.get(nfe), "own plan": getattr(denoiser, "plans", {}).get(nfe)}
            rows["auto"] = pfode.make_plan("auto", denoiser.process, nfe=nfe, guided=guided)
            found[name][str(nfe)] = {title: test.errors(plan) for title, plan in rows.items() if plan is not None}
            print(f"{name:18s}{nfe:3d}", found[name][str(nfe)], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--beds", nargs="+", default=list(BEDS), choices=list(BEDS))
    parser.add_argument("--nfe", nargs="+", type=int, default=BUDGETS)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/pfode-fitting"))
    parser.add_argument("--iterations", type=int, default=12, help="of a fit, at most")
    parser.add_argument("--transfer", action="store_true", help="instead: the plans of emoji on other models")
    options = parser.parse_args()
    report: dict[str, Any] = {"beds": {}}
    if options.json and options.json.exists():
        report = json.loads(options.json.read_text())
    report["torch"] = torch.__version__
    if options.transfer:
        report["transfer"] = transfer(options.nfe)
        if options.json:
            options.json.write_text(json.dumps(report) + "\n")
        return
    print("bed, calls: ratios of root mean square and median to the best of the peers' samplers, of all hand-made ones")
    for name in options.beds:
        denoiser = BEDS[name]()
        few = 24 if name == "emoji" else 128
        choice = Noise(denoiser, CHOICE, few, 40 if name == "emoji" else 100)
        test = Noise(denoiser, TEST, 2 * few if name in ("emoji", "digits", "digits-vp", "digits-flow") else 8 * few,
                     40 if name == "emoji" else 100)  # fmt: skip
        bed = report["beds"].setdefault(name, {})
        for nfe in options.nfe:
            bed[str(nfe)] = found = measured(name, denoiser, nfe, choice, test, options.cache, options.iterations)
            print(f"{name:18s}{nfe:3d}", *(f"{title} {found[title]['ratios']}" for title in ("peers", "all")),
                  f"rms {found['rms']} median {found['median']}, {found['seconds']} s", flush=True)  # fmt: skip
            report["summary"] = {title: summary(report["beds"], title) for title in ("peers", "all")}
            if options.json:
                options.json.write_text(json.dumps(report) + "\n")
    print("geometric means over the beds:", report["summary"])


if __name__ == "__main__":
    main()
