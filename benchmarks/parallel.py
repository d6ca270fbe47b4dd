"""Plans in sweeps: how many calls one after the other are left of 20, 50 and 100, and what they miss.

    python benchmarks/parallel.py [--json FILE] [--device cpu] [--avatars 4]

Every plan is run row by row and by `pfode.sample(parallel=...)`, on the digits network with 32 samples and on avatars
with 4, unguided, classes in turn. Of each tolerance: the mean and the largest number of sweeps over the samples, the
calls of a sample altogether, and the root mean square difference from the row by row run, pixels from -1 to 1. No time
is measured: a sweep is one call of up to (samples x rows) states, which pays where a device has room for them.
"""

import harness
import torch

import pfode
from pfode.plans.parallel import Parallel

ROWS = (20, 50, 100)
SAMPLERS = ("ddim", "dpm++2m", "ddpm")
HOWS = {
    "1e-2": Parallel(1e-2),
    "1e-3": Parallel(1e-3),
    "1e-3, plain": Parallel(1e-3, memory=0),
    "1e-3, window 16": Parallel(1e-3, window=16),
    "0": Parallel(0.0),
}


def figures(net, sampler: str, rows: int, n: int, device: str) -> dict[str, dict[str, float]]:
    """Of each way to run: sweeps, the most sweeps, calls, difference."""
    labels = [i % len(net.labels) for i in range(n)]
    options = {"n": n, "steps": rows, "sampler": sampler, "label": labels, "device": device}
    wanted, found = pfode.sample(net, **options), {}
    for name, how in HOWS.items():
        if how.tolerance == 0 and rows > 20:
            continue
        swept = pfode.sample(net, parallel=how, **options)
        sweeps, calls = (swept.stats[key].double() for key in ("sweeps", "nfe"))
        found[name] = {
            "sweeps": sweeps.mean().item(),
            "most": sweeps.max().item(),
            "calls": calls.mean().item(),
            "difference": (swept.x - wanted.x).square().mean().sqrt().item(),
        }
    return found


def main() -> None:
    parser = harness.parser(__doc__, device=True)
    parser.add_argument(
        "--avatars", type=int, default=4, metavar="N", help="samples of the avatars network; 0: none (4)"
    )
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    print("| model | sampler | steps | tolerance | sweeps | most | calls | difference |")
    print("|---|---|---|---|---|---|---|---|")
    results: dict[str, object] = {}
    for model, n in (("digits", 32), ("avatars", options.avatars)):
        net = pfode.load(model)
        for sampler in SAMPLERS if n and model == "digits" else SAMPLERS[1:2] if n else ():
            for rows in ROWS:
                found = figures(net, sampler, rows, n, options.device)
                results[f"{model} {sampler} {rows}"] = found
                for name, f in found.items():
                    cells = f"{f['sweeps']:.1f} | {f['most']:.0f} | {f['calls']:.0f} | {f['difference']:.1e}"
                    print(f"| {model} | {sampler} | {rows} | {name} | {cells} |", flush=True)
    harness.record(options, results)


if __name__ == "__main__":
    main()
