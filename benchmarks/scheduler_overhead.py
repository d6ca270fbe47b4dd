"""What a step costs inside a diffusers pipeline, beside its own schedulers: time of scale_model_input and step.

    python benchmarks/scheduler_overhead.py [--json FILE] [--device cpu] [--repeats 30]

Each runs 20 steps as a pipeline does, with the even sigmas of a VP model (eps) or a flow, on ready tensors in place of
a network, turn by turn; of every step the median over all repeats, and of those the mean, is reported, with the tensor
(ATen) operations and the values read back to the host per step, counted in a run of their own.
"""

import functools
import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import harness
import torch

from pfode.samplers import PFODEScheduler

SIZES = [(4, 3, 32, 32), (2, 4, 64, 64)]
STEPS = 20
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
DPM, UNIPC = "diffusers DPMSolverMultistep", "diffusers UniPCMultistep"
TARGETS = [("pfode dpm++2m", DPM, 0.25), ("pfode unipc2", UNIPC, 0.10), ("pfode unipc2", DPM, 0.25)]


def contestants() -> dict[str, Any]:
    schedulers = importlib.import_module("diffusers.schedulers")
    ours: dict[str, dict[str, Any]] = {
        "pfode dpm++2m": {"sampler": "dpm++2m"},
        "pfode unipc2": {"sampler": "unipc2"},
        "pfode unipc3": {"sampler": "unipc3"},
        "pfode auto": {"sampler": "auto"},
        "pfode heun": {"sampler": "heun"},
        "pfode euler, flow": {"sampler": "euler", **FLOW},
        "pfode unipc2, flow": {"sampler": "unipc2", **FLOW},
    }
    return {
        **{name: PFODEScheduler(**config) for name, config in ours.items()},
        DPM: schedulers.DPMSolverMultistepScheduler(),
        UNIPC: schedulers.UniPCMultistepScheduler(),
        "diffusers UniPC, order 3": schedulers.UniPCMultistepScheduler(solver_order=3),
        "diffusers DDIM": schedulers.DDIMScheduler(clip_sample=False),
        "diffusers EulerDiscrete": schedulers.EulerDiscreteScheduler(),
        "diffusers HeunDiscrete": schedulers.HeunDiscreteScheduler(),
        "diffusers FlowMatchEuler": schedulers.FlowMatchEulerDiscreteScheduler(),
    }


def run(scheduler: Any, x: torch.Tensor, outputs: list[torch.Tensor], called: Callable[[], None] | None = None) -> list:
    """Seconds of every step."""
    scheduler.set_timesteps(STEPS, device=x.device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    scaled = getattr(scheduler, "scale_model_input", lambda y, t: y)
    synchronise = harness.waiter(x.device)
    y, spent = x * getattr(scheduler, "init_noise_sigma", 1), []
    for t, out in zip(scheduler.timesteps, outputs * 2, strict=False):
        synchronise()
        if called is not None:
            called()
        began = time.perf_counter()
        scaled(y, t)
        y = scheduler.step(out, t, y, return_dict=False)[0]
        synchronise()
        spent.append(time.perf_counter() - began)
    return spent


def measured(size: tuple[int, ...], device: str, repeats: int) -> dict[str, dict[str, float]]:
    x, outputs = torch.randn(size, device=device), [torch.randn(size, device=device) for _ in range(STEPS)]
    all_of_them = contestants()
    rows: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        runs = {name: functools.partial(run, scheduler, x, outputs) for name, scheduler in all_of_them.items()}
        spent = harness.turns(runs, repeats, warm=3)
        for name, scheduler in all_of_them.items():
            with harness.Count() as count:
                run(scheduler, x, outputs, count.called)
            medians = [statistics.median(step) for step in zip(*spent[name], strict=True)]
            rows[name] = {"microseconds": 1e6 * statistics.mean(medians), **count.per_call()}
    print(f"\n{size}: us per step")
    for name, row in rows.items():
        ratios = "".join(f"{row['microseconds'] / rows[peer]['microseconds']:8.3f}x" for peer in (DPM, UNIPC))
        counts = f"{row['operations']:6.1f} ops {row['reads']:5.1f} reads"
        print(f"  {name:30s}{row['microseconds']:10.1f}{ratios}  {counts}")
    for ours, theirs, target in TARGETS:
        ratio = rows[ours]["microseconds"] / rows[theirs]["microseconds"]
        print(f"  {ours} / {theirs}: {ratio:.3f}, target {target:.2f}")
    return rows


def main() -> None:
    parser = harness.parser(__doc__, repeats=30, device=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    sizes = {"x".join(map(str, s)): measured(s, options.device, options.repeats) for s in SIZES}
    harness.record(options, {"steps": STEPS, "sizes": sizes})


if __name__ == "__main__":
    main()
