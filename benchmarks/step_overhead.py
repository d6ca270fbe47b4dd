"""What a sampler costs beside the network: time from a network's output to its next input.

    python benchmarks/step_overhead.py [--json FILE] [--device cpu] [--repeats 30]

pfode, diffusers' schedulers and k-diffusion's sampler drive the same stand-in network in one process, turn by turn.
The network notes when it is entered and left; the median over all steps of all repeats is reported, with the tensor
(ATen) operations and the values read back to the host per step, counted in a run of their own. Drawing noise is
reported apart.
"""

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pfode

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.peers import k_diffusion_sampling

SIZES = [(1, 3, 8, 8), (4, 3, 32, 32), (16, 4, 64, 64)]
STEPS = 20
TARGETS = {(1, 3, 8, 8): 0.10, (4, 3, 32, 32): 0.10, (16, 4, 64, 64): 0.30}
READS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"}


class Clock:
    """A network that returns a fixed output and notes the gaps between its calls."""

    def __init__(self, output: torch.Tensor):
        self.output, self.gaps, self.left = output, [], None
        self.synchronise = torch.cuda.synchronize if output.is_cuda else lambda: None

    def __call__(self, x, t, **_):
        self.synchronise()
        if self.left is not None:
            self.gaps.append(time.perf_counter() - self.left)
        if Count.active is not None:
            Count.active.calls += 1
        self.left = time.perf_counter()
        return self.output

    def take(self) -> list[float]:
        gaps, self.gaps, self.left = self.gaps, [], None
        return gaps


class Count(TorchDispatchMode):
    """Tensor operations and host reads between a first and a last network call."""

    active = None

    def __enter__(self):
        self.calls, self.operations, self.reads = 0, 0, 0
        Count.active = self
        return super().__enter__()

    def __exit__(self, *exception):
        Count.active = None
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if 0 < self.calls < STEPS:
            self.operations += 1
            self.reads += func.overloadpacket.__name__ in READS
        return func(*args, **(kwargs or {}))


def pfode_run(name: str, prediction: str, clock: Clock, x: torch.Tensor) -> Callable[[], object]:
    process = pfode.EDM() if prediction == "x0" else diffusers_process()
    denoiser = pfode.scores.Denoiser(clock, process, prediction)
    if prediction == "x0":  # what k-diffusion's samplers see: a denoiser, nothing to precondition
        denoiser = Bare(clock, process)
    plan = pfode.make_plan(name, process, STEPS, grid="karras")
    seeds = list(range(len(x)))
    return lambda: pfode.run(plan, denoiser, x, seeds)


class Bare:
    def __init__(self, function, process):
        self.function, self.process = function, process

    def __call__(self, x, t, **cond):
        return self.function(x, t)


def diffusers_process() -> pfode.VPDiscrete:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return pfode.VPDiscrete(torch.cumprod(1 - betas, 0))


def diffusers_run(scheduler: str, clock: Clock, x: torch.Tensor) -> Callable[[], object]:
    import diffusers

    made = getattr(diffusers, scheduler)(use_karras_sigmas=True)

    def go():
        made.set_timesteps(STEPS, device=x.device)
        y = x * made.init_noise_sigma
        clock.take()
        for t in made.timesteps:
            y = made.step(clock(made.scale_model_input(y, t), t), t, y).prev_sample

    return go


def k_diffusion_run(name: str, clock: Clock, x: torch.Tensor) -> Callable[[], object]:
    times = pfode.grids.times(pfode.EDM(), "karras", STEPS)
    sigmas = torch.tensor(times, dtype=torch.float32, device=x.device)
    sampler = getattr(k_diffusion_sampling(), name)
    return lambda: sampler(clock, x, sigmas, disable=True)


def contestants(clock: Clock, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    return {
        "pfode dpm++2m (eps network)": pfode_run("dpm++2m", "eps", clock, x),
        "pfode ipndm4 (eps network)": pfode_run("ipndm4", "eps", clock, x),
        "diffusers DPMSolverMultistep": diffusers_run("DPMSolverMultistepScheduler", clock, x),
        "diffusers UniPC": diffusers_run("UniPCMultistepScheduler", clock, x),
        "pfode dpm++2m (denoiser)": pfode_run("dpm++2m", "x0", clock, x),
        "k-diffusion sample_dpmpp_2m": k_diffusion_run("sample_dpmpp_2m", clock, x),
    }


def noise_time(x: torch.Tensor, repeats: int) -> float:
    """Median seconds to draw one step's keyed noise."""
    spent = []
    for draw in range(repeats):
        began = time.perf_counter()
        pfode.noise.normal(range(len(x)), draw, x.shape[1:], x.dtype, x.device)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def measure(size: tuple[int, ...], device: str, repeats: int) -> dict[str, dict[str, float]]:
    x = torch.randn(size, device=device)
    clock = Clock(torch.randn(size, device=device))
    runs = contestants(clock, x)
    gaps: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for repeat in range(repeats + 3):
            for name, go in runs.items():
                clock.take()
                go()
                if repeat >= 3:
                    gaps[name] += clock.take()
        rows = {}
        for name, go in runs.items():
            clock.take()
            with Count() as count:
                go()
            per_step = {"operations": count.operations / (STEPS - 1), "reads": count.reads / (STEPS - 1)}
            rows[name] = {"microseconds": 1e6 * statistics.median(gaps[name]), **per_step}
    rows["noise of one step, apart"] = {"microseconds": 1e6 * noise_time(x, repeats)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    report = {"steps": STEPS, "torch": torch.__version__, "machine": platform.machine(), "device": options.device}
    report["threads"] = torch.get_num_threads()
    report["sizes"] = {}
    for size in SIZES:
        rows = measure(size, options.device, options.repeats)
        base = rows["diffusers DPMSolverMultistep"]["microseconds"]
        print(
            f"\n{size}: us per step, {STEPS} steps, target for pfode dpm++2m {TARGETS[size]:.2f}x of diffusers' DPM++2M"
        )
        for name, row in rows.items():
            counts = f"{row['operations']:6.1f} ops {row['reads']:5.1f} reads" if "operations" in row else ""
            print(f"  {name:32s}{row['microseconds']:10.1f}{row['microseconds'] / base:8.2f}x  {counts}")
        report["sizes"]["x".join(map(str, size))] = rows
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
