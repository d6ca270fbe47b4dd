"""How near a recipe comes to the converged end point, by number of denoiser calls: the table behind sampler="auto".

    python benchmarks/recipes.py [--json FILE] [--beds digits ...] [--guidance 1 3]

On the shipped networks, unguided and guided: the distance of the drawn pictures from the converged ones, same noise,
same labels; the root of the mean square over all pictures, and the median over pictures of their own (a few that land
in another mode dominate the first). `avatars-small` serves in all three processes: D depends on x/alpha and sigma/alpha
alone. Then the same on exact test beds, other ones than those of benchmarks/quality.py, and on `avatars`, from which no
choice was made; and what lower_order_final makes of the chosen ones. `--choices` only tells what the file says of every
choice: how much more it errs than the best of the table, bed by bed, and what loses least on all of them. A recipe is
written sampler@chart. Figures of beds that are not run again stay in the file.
"""

import json
from typing import Any

import harness
import torch
from torch import Tensor

import pfode
from pfode.denoiser import Denoiser
from pfode.plans.table import Plan
from pfode.process import Process
from pfode.samplers import auto
from pfode.samplers.catalogue import recipe
from pfode.samplers.measure.peers import Moved
from pfode.samplers.measure.results import geometric_mean
from pfode.scores.beds import bed as find

BUDGETS = [3, 4, 5, 6, 8, 10, 15, 20]
CANDIDATES = [
    *["ddim@ddim", "dpm++2m@dpm++", "dpm++3m@dpm++", "dpm++2s@dpm++", "deis-tab2@deis"],
    *["exp-ab2@dpm++", "exp-ab2@trig", "exp-ab3@trig", "exp-ab3@dpm"],
    *["ipndm2@ddim", "ipndm3@ddim", "ipndm4@ddim", "ipndm2@trig", "ipndm3@trig", "ipndm4@trig", "ipndm-v3@ddim"],
    *["unipc2@dpm++", "unipc3@dpm++", "unipc3-bh1@dpm++", "unipc2@flow", "unipc2@dpm3", "unipc3@flow"],
]
FEWER = [  # where a call takes its time: what is near the best on the small networks, and the best known
    *["ddim@ddim", "dpm++2m@dpm++", "ipndm3@ddim", "ipndm2@trig", "ipndm3@trig"],
    *["unipc2@dpm++", "unipc2@flow", "unipc2@dpm3", "unipc3@flow"],
]
GRIDS = {
    "EDM": ["karras", "polyexponential(0.8)", "ays-svd", "cosine", "cosine(0.5)"],
    "VP": ["log-snr", "time", "time(1.5)", "time-quadratic", "ays-svd"],
    "Flow": ["time", "time(1.5)", "beta", "cosine(0.7)", "ays-svd"],
}
NETWORKS: dict[str, tuple[str, Process | None, int]] = {  # the network, another process than its own, pictures
    "digits": ("digits", None, 32),
    "digits-vp": ("digits-vp", None, 32),
    "digits-flow": ("digits-flow", None, 32),
    "avatars-small": ("avatars-small", None, 9),
    "avatars-small VP": ("avatars-small", pfode.VP(), 9),
    "avatars-small Flow": ("avatars-small", pfode.Flow(), 9),
    "avatars": ("avatars", None, 4),
}
EXACT = [  # names of test beds
    *["mixture-16", "mixture-16-vp", "mixture-16-flow", "mixture-256", "mixture-256-vp", "mixture-256-flow"],
]
FAMILIES = {"": (pfode.EDM(), ("digits", "avatars-small")), "-vp": (pfode.VP(), ("digits-vp",)),
            "-flow": (pfode.Flow(), ("digits-flow",))}  # fmt: skip
GUIDED = 3.0
Errors = tuple[float, float]


def errors(a: Tensor, b: Tensor) -> Errors:
    """Root mean square, and median over samples of their own."""
    each = (a - b).double().flatten(1).pow(2).mean(1)
    return float(f"{each.mean().sqrt():.4g}"), float(f"{each.sqrt().median():.4g}")


def measured(
    denoiser: Denoiser, x: Tensor, candidates: list[str], guided: bool, label: Tensor | None = None
) -> dict[str, Any]:
    """A bed: "floor", of two converged solutions; "table", by grid and candidate; "chosen", "lowered", by budget."""
    process, fine = denoiser.process, 120 if x[0].numel() > 1000 else 500
    cond: dict[str, Any] = {} if label is None else {"label": label}

    def run(plan: Plan) -> Tensor:
        with torch.no_grad():
            return pfode.run(plan, denoiser, x, **cond)

    converged = run(pfode.make_plan("exp-ab3", process, fine, grid="karras"))
    floor = errors(run(pfode.make_plan("heun", process, fine // 2, grid="log-snr")), converged)
    table: dict[str, dict[str, list[Errors]]] = {}
    for grid in GRIDS[type(process).__name__]:
        table[grid] = {}
        for candidate in candidates:
            name, chart = candidate.split("@")
            plans = [pfode.make_plan(name, process, nfe=k, grid=grid, chart=chart) for k in BUDGETS]
            table[grid][candidate] = [errors(run(plan), converged) for plan in plans]
            print(f"  {grid:21s}{candidate:17s}", *(f"{e:8.4f}" for e, _ in table[grid][candidate]), flush=True)
    bed: dict[str, Any] = {"n": len(x), "floor": floor, "table": table}
    for title, low in (("chosen", False), ("lowered", True)):
        bed[title] = []
        for k in BUDGETS:
            sampler, grid, chart = auto.choose(process, k, guided)
            lower = low and recipe(sampler).method.memory > 1
            plan = pfode.make_plan(sampler, process, nfe=k, grid=grid, chart=chart, lower_order_final=lower)
            bed[title].append(errors(run(plan), converged))
        print(f"  {title:38s}", *(f"{e:8.4f}" for e, _ in bed[title]))
    return bed


def network(bed: str, guidance: float) -> dict[str, Any]:
    name, process, n = NETWORKS[bed]
    net = pfode.load(name)
    assert net.shape is not None
    assert net.labels is not None
    denoiser: Denoiser = net if guidance == 1 else net.guided(guidance)
    denoiser = denoiser if process is None else Moved(denoiser, process)
    process = denoiser.process
    x = process.sigma(process.t_max) * pfode.noise.normal(range(n), pfode.noise.INITIAL, net.shape)
    label = torch.arange(n) % len(net.labels)
    print(f"\n{bed}, guidance {guidance:g}, {n} pictures: root mean square by NFE", *BUDGETS)
    return measured(denoiser, x, CANDIDATES if name.startswith("digits") else FEWER, guidance != 1, label)


def exact(name: str, n: int = 256) -> dict[str, Any]:
    """A test bed in closed form, float64."""
    denoiser = find(name)
    process = denoiser.process
    x = process.sigma(process.t_max) * pfode.noise.normal(range(n), pfode.noise.INITIAL, denoiser.shape, torch.float64)
    print(f"\n{name}, {n} samples: root mean square by NFE", *BUDGETS)
    return measured(denoiser, x, CANDIDATES, False)


def choices(report: dict[str, Any]) -> str:
    """By family and budget: what auto takes and what loses least, each with its loss in the geometric mean and by bed.

    A loss is the ratio of root mean square errors to the best of the bed's table; networks count half, exact beds half.
    """
    lines = []
    tables = {name: bed["1"]["table"] for name, bed in report["beds"].items()}
    for family, (process, networks) in FAMILIES.items():
        exact = [f"mixture-{d}{family}" for d in (16, 256)]
        beds = [name for name in (*networks, *exact) if name in tables]
        common = set.intersection(*({(g, c) for g, rows in tables[name].items() for c in rows} for name in beds))
        lines.append(f"{process}: {', '.join(beds)}")
        for i, k in enumerate(BUDGETS):
            best = {bed: min(row[i][0] for rows in tables[bed].values() for row in rows.values()) for bed in beds}
            losses = {
                (grid, name): {bed: tables[bed][grid][name][i][0] / best[bed] for bed in beds} for grid, name in common
            }
            means = {
                way: geometric_mean(
                    geometric_mean(loss[bed] for bed in half if bed in loss) for half in (networks, exact)
                )
                for way, loss in losses.items()
            }
            sampler, grid, chart = auto.choose(process, k)
            for title, way in (("auto", (grid, f"{sampler}@{chart}")), ("least", min(means, key=means.__getitem__))):
                each = " ".join(f"{value:.2f}" for value in losses[way].values())
                lines.append(f"  {k:3d} {title:6s}{means[way]:6.2f}  {' '.join(reversed(way)):28s}{each}")
    return "\n".join(lines)


def main() -> None:
    parser = harness.parser(__doc__)
    every = [*NETWORKS, *EXACT]
    parser.add_argument("--beds", nargs="+", default=every, choices=every)
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, GUIDED])
    parser.add_argument("--choices", action="store_true", help="measure nothing; read the file")
    options = parser.parse_args()
    report: dict[str, Any] = {"beds": {}}
    if options.json and options.json.exists():
        report = json.loads(options.json.read_text())
    if options.choices:
        print(choices(report))
        return
    report = {key: value for key, value in report.items() if key == "beds"} | {"nfe": BUDGETS}
    for name in options.beds:
        for guidance in [1.0] if name in EXACT else options.guidance:
            bed = exact(name) if name in EXACT else network(name, guidance)
            report["beds"].setdefault(name, {})[f"{guidance:g}"] = bed
            harness.record(options, report)


if __name__ == "__main__":
    main()
