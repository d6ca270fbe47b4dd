"""How near each recipe comes to the converged end point, by number of denoiser calls.

    python benchmarks/recipes.py [--json FILE] [--n 64]

First the shipped digits networks: RMS distance of the drawn pictures from those of 200 steps of exp-ab3, same noise,
same labels, with the distance between two converged solutions as the floor. Then full grids on an exact Gaussian, from
the very first time to clean data, against its exact flow. Stochastic recipes have no converged end point; `euler`,
`exp-ab1` and `ipndm1` are `ddim`: left out.
"""

import argparse
import json
from pathlib import Path

import torch

import pfode
from pfode.samplers import CATALOGUE

BUDGETS = [5, 8, 10, 15, 20]
STEPS = [5, 10, 20, 40, 80, 160]
SAME_AS_DDIM = {"euler", "exp-ab1", "ipndm1"}
RECIPES = [name for name, recipe in CATALOGUE.items() if not recipe.stochastic and name not in SAME_AS_DDIM]


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).double().pow(2).mean().sqrt().item()


def on_network(name: str, n: int) -> dict[str, dict[str, list[float]]]:
    net = pfode.load(name)
    common = {"n": n, "label": torch.arange(n) % 10, "batch": n}
    usual = pfode.samplers.usual(net.process)[1]
    converged = pfode.sample(net, steps=200, sampler="exp-ab3", grid=usual, **common).x
    floor = rms(converged, pfode.sample(net, steps=100, sampler="heun", grid=usual, **common).x)
    print(f"\n{name}: RMS against the converged pictures (floor {floor:.4f}), by NFE", *BUDGETS)
    table = {}
    for grid in pfode.grids.GRIDS:
        table[grid] = {}
        for recipe in RECIPES:
            errors = [rms(pfode.sample(net, nfe=k, sampler=recipe, grid=grid, **common).x, converged) for k in BUDGETS]
            table[grid][recipe] = errors
            print(f"  {grid:15s}{recipe:9s}", *(f"{e:8.4f}" for e in errors))
    return table


def zero_terminal_snr() -> pfode.VPDiscrete:
    """Linear betas rescaled so that the last alpha is exactly 0 (Lin et al. 2024)."""
    root = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return pfode.VPDiscrete(root**2)


def on_gaussian() -> dict[str, dict[str, list[float]]]:
    beds = {
        "EDM, karras to 0": (pfode.EDM(), "karras"),
        "Flow, time from 1": (pfode.Flow(), "time"),
        "zero-SNR VP, karras": (zero_terminal_snr(), "karras"),
    }
    table = {}
    for bed, (process, grid) in beds.items():
        g = pfode.scores.Gaussian([0.3, -0.5, 1.2], [0.25, 0.64, 0.04], process=process)
        x = process.sigma(process.t_max) * pfode.noise.normal(range(256), 0, (3,), torch.float64)
        exact = g.flow(x, process.t_max, process.t_data)
        print(f"\nexact Gaussian on {bed}: RMS against the exact flow, by steps", *STEPS)
        table[bed] = {}
        for recipe in RECIPES:
            plans = [pfode.make_plan(recipe, process, k, grid=grid) for k in STEPS]
            table[bed][recipe] = [rms(pfode.run(plan, g, x), exact) for plan in plans]
            print(f"  {recipe:9s}", *(f"{e:9.2e}" for e in table[bed][recipe]))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--n", type=int, default=64, help="pictures per network")
    options = parser.parse_args()
    report = {"nfe": BUDGETS, "steps": STEPS, "n": options.n, "torch": torch.__version__}
    report["networks"] = {name: on_network(name, options.n) for name in ("digits", "digits-vp", "digits-flow")}
    report["gaussian"] = on_gaussian()
    if options.json:
        options.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
