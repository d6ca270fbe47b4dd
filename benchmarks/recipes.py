"""How near a recipe comes to the converged end point, by number of denoiser calls: the table behind sampler="auto".

    python benchmarks/recipes.py [--json FILE] [--beds digits ...] [--guidance 1 3] [--n 64]

On the shipped networks, unguided and guided: the distance of the drawn pictures from the converged ones, same noise,
same labels; the root of the mean square over all pictures, and the median over pictures of their own (a few that land
in another mode dominate the first). Then the same on exact mixtures, which no choice was made from, and what
lower_order_final makes of the chosen ones. A recipe is written sampler@chart. Figures of beds that are not run again
stay in the file.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pfode
from pfode.denoiser import Denoiser
from pfode.plan import Plan
from pfode.samplers import auto
from pfode.samplers.catalogue import recipe

BUDGETS = [3, 4, 5, 6, 8, 10, 15, 20]
CANDIDATES = [
    *["ddim@ddim", "dpm++2m@dpm++", "dpm++3m@dpm++", "dpm++2s@dpm++", "deis-tab2@deis"],
    *["exp-ab2@dpm++", "exp-ab2@trig", "exp-ab3@trig", "exp-ab3@dpm"],
    *["ipndm2@ddim", "ipndm3@ddim", "ipndm4@ddim", "ipndm2@trig", "ipndm3@trig", "ipndm-v3@ddim"],
    *["unipc2@dpm++", "unipc3@dpm++", "unipc3-bh1@dpm++", "unipc2@flow", "unipc2@dpm3", "unipc3@flow"],
]
GRIDS = {
    "EDM": ["karras", "polyexponential(0.8)", "ays-svd", "cosine", "cosine(0.5)"],
    "VP": ["log-snr", "time", "time(1.5)", "time-quadratic", "cosine"],
    "Flow": ["time", "time(1.5)", "beta", "cosine(0.7)", "cosine(0.5)"],
}
BEDS = ["digits", "digits-vp", "digits-flow", "emoji"]
SHORT = {  # for networks that take their time: what is near the best on the small ones, and the best known
    "emoji": (
        ["ddim@ddim", "dpm++2m@dpm++", "exp-ab3@trig", "ipndm3@ddim", "ipndm2@trig", "ipndm3@trig", "unipc2@flow"],
        ["karras", "polyexponential(0.8)", "ays-svd", "cosine(0.5)"],
    )
}
GUIDED = 3.0
Errors = tuple[float, float]


def errors(a: Tensor, b: Tensor) -> Errors:
    """Root mean square, and median over samples of their own."""
    each = (a - b).double().flatten(1).pow(2).mean(1)
    return float(f"{each.mean().sqrt():.4g}"), float(f"{each.sqrt().median():.4g}")


def planned(candidate: str, process: pfode.process.Process, nfe: int, grid: str, **options: Any) -> Plan:
    name, chart = candidate.split("@")
    return pfode.make_plan(name, process, nfe=nfe, grid=grid, chart=chart, **options)


def measured(bed: dict[str, Any], denoiser: Denoiser, x: Tensor, guided: bool, label: Tensor | None = None) -> None:
    """Fill in a bed: "floor" of two converged solutions, "table" by grid and candidate, "chosen" and "lowered"."""
    process = denoiser.process
    cond: dict[str, Any] = {} if label is None else {"label": label}

    def run(plan: Plan) -> Tensor:
        with torch.no_grad():
            return pfode.run(plan, denoiser, x, **cond)

    fine = 120 if x[0].numel() > 1000 else 500
    converged = run(pfode.make_plan("exp-ab3", process, fine, grid="karras"))
    bed["floor"] = errors(run(pfode.make_plan("heun", process, fine // 2, grid="log-snr")), converged)
    bed["table"] = {}
    for grid in bed["grids"]:
        bed["table"][grid] = {}
        for candidate in bed["candidates"]:
            row = [errors(run(planned(candidate, process, k, grid)), converged) for k in BUDGETS]
            bed["table"][grid][candidate] = row
            print(f"  {grid:21s}{candidate:17s}", *(f"{e:8.4f}" for e, _ in row), flush=True)
    best = [auto.choose(process, k, guided) for k in BUDGETS]
    for title, low in (("chosen", False), ("lowered", True)):
        bed[title] = []
        for k, (sampler, grid, chart) in zip(BUDGETS, best, strict=True):
            lower = low and recipe(sampler).method.memory > 1
            plan = pfode.make_plan(sampler, process, nfe=k, grid=grid, chart=chart, lower_order_final=lower)
            bed[title].append(errors(run(plan), converged))
        print(f"  {title:38s}", *(f"{e:8.4f}" for e, _ in bed[title]))


def network(name: str, guidance: float, n: int) -> dict[str, Any]:
    net = pfode.load(name)
    assert net.shape is not None
    assert net.labels is not None
    process = net.process
    candidates, grids = SHORT.get(name, (CANDIDATES, GRIDS[type(process).__name__]))
    bed: dict[str, Any] = {"n": n, "candidates": candidates, "grids": grids}
    x = process.sigma(process.t_max) * pfode.noise.normal(range(n), pfode.noise.INITIAL, net.shape)
    label = torch.arange(n) % len(net.labels)
    denoiser = net if guidance == 1 else net.guided(guidance)
    print(f"\n{name}, guidance {guidance:g}, {n} pictures: root mean square by NFE", *BUDGETS)
    measured(bed, denoiser, x, guidance != 1, label)
    return bed


def mixture(process: pfode.process.Process, n: int = 256) -> dict[str, Any]:
    """Eight clusters in 16 dimensions, of deviations falling from 0.5 to 0.05, float64."""
    draw = torch.Generator().manual_seed(0)
    means = 0.7 * torch.randn(8, 16, generator=draw, dtype=torch.float64)
    std = torch.logspace(0, -1, 16, dtype=torch.float64).mul(0.5).expand(8, -1)
    denoiser = pfode.scores.GaussianMixture(means, std=std, process=process)
    x = process.sigma(process.t_max) * pfode.noise.normal(range(n), pfode.noise.INITIAL, (16,), torch.float64)
    bed: dict[str, Any] = {"n": n, "candidates": CANDIDATES, "grids": GRIDS[type(process).__name__]}
    print(f"\nmixture on {process}, {n} samples: root mean square by NFE", *BUDGETS)
    measured(bed, denoiser, x, False)
    return bed


MIXTURES: dict[str, Callable[[], pfode.process.Process]] = {
    "mixture EDM": pfode.EDM,
    "mixture VP": pfode.VP,
    "mixture Flow": pfode.Flow,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--beds", nargs="+", default=[*BEDS, *MIXTURES], choices=[*BEDS, *MIXTURES])
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, GUIDED])
    parser.add_argument("--n", type=int, default=64, help="pictures per network")
    options = parser.parse_args()
    report: dict[str, Any] = {"beds": {}}
    if options.json and options.json.exists():
        report = json.loads(options.json.read_text())
    report |= {"nfe": BUDGETS, "torch": torch.__version__}
    for name in options.beds:
        for guidance in [1.0] if name in MIXTURES else options.guidance:
            bed = mixture(MIXTURES[name]()) if name in MIXTURES else network(name, guidance, options.n)
            report["beds"].setdefault(name, {})[f"{guidance:g}"] = bed
            if options.json:
                options.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
