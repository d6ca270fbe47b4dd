"""What a sampler costs beside the network: time from a network's output to its next input, and to build a plan.

    python benchmarks/step_overhead.py [--json FILE] [--device cpu] [--repeats 30]

pfode, diffusers' schedulers and k-diffusion's samplers drive the same stand-in network in one process, turn by turn.
The network notes when it is entered and left; of every gap the median over all repeats, and of those the mean, is
reported, with the tensor (ATen) operations and the values read back to the host per call, counted in a run of their
own. First the default sampler at three sizes, then its whole run with everything that comes before the first call, then
one recipe per family beside the peer's own implementation. Nobody draws noise meanwhile: all are handed the same
tensor; what drawing costs is reported apart. Last the time to build a plan, for every recipe, in seconds of this
process's CPU.
"""

import contextlib
import functools
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import harness
import torch

import pfode
from pfode.samplers import CATALOGUE
from tests.peers import Scheduler, k_diffusion_sampling

SIZES = [(1, 3, 8, 8), (4, 3, 32, 32), (16, 4, 64, 64)]
STEPS = 20
TARGETS = {(1, 3, 8, 8): 0.10, (4, 3, 32, 32): 0.10, (16, 4, 64, 64): 0.30}
FAMILY_SIZE, FAMILY_TARGET, WHOLE_TARGET = (4, 3, 32, 32), 0.15, 0.12
BUILD_TARGETS = {20: 0.020, 1000: 1.0}
Run = Callable[[], object]


class Clock:
    """A network that returns a fixed output and notes the gaps between its calls."""

    def __init__(self, output: torch.Tensor):
        self.output, self.gaps, self.left = output, [], None
        self.synchronise = harness.waiter(output.device)

    def __call__(self, x, t, **_):
        self.synchronise()
        if self.left is not None:
            self.gaps.append(time.perf_counter() - self.left)
        if harness.Count.active is not None:
            harness.Count.active.called()
        self.left = time.perf_counter()
        return self.output

    def take(self) -> list[float]:
        gaps, self.gaps, self.left = self.gaps, [], None
        return gaps


class Bare:
    """A denoiser with nothing to precondition, as k-diffusion's samplers see one."""

    def __init__(self, function, process):
        self.function, self.process = function, process

    def __call__(self, x, t, **cond):
        return self.function(x, t)


def diffusers_process() -> pfode.VPDiscrete:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return pfode.VPDiscrete(torch.cumprod(1 - betas, 0))


def pfode_run(name: str, prediction: str, clock: Clock, x: torch.Tensor, **options: Any) -> Run:
    """`prediction`: "x0" for k-diffusion's denoisers, "edm" for EDM schedulers' networks, "eps" for the others'."""
    process = diffusers_process() if prediction == "eps" else pfode.EDM()
    denoiser = Bare(clock, process) if prediction == "x0" else pfode.scores.Denoiser(clock, process, prediction)
    plan = pfode.make_plan(name, process, STEPS, grid="karras", **options)
    seeds = list(range(len(x)))
    return lambda: pfode.run(plan, denoiser, x, seeds)


def diffusers_run(name: str, clock: Clock, x: torch.Tensor, step: dict[str, Any], **config: Any) -> Run:
    """As a pipeline runs it: scale_model_input, network, step."""
    scheduler = Scheduler(name, STEPS, **config)
    made, steady = scheduler.inner, lambda *_, **__: x
    scaled = getattr(made, "scale_model_input", lambda y, t: y)

    def go():
        made.set_timesteps(STEPS, device=x.device)
        if hasattr(made, "noise_sampler"):
            made.noise_sampler = steady
        y = x * made.init_noise_sigma
        clock.take()
        for t in made.timesteps:
            y = made.step(clock(scaled(y, t), t), t, y, **step).prev_sample

    def without_noise():
        with mock.patch.object(scheduler.module, "randn_tensor", steady, create=True):
            go()

    return without_noise


def k_diffusion_run(name: str, clock: Clock, x: torch.Tensor, **options: Any) -> Run:
    times = pfode.grids.times(pfode.EDM(), "karras", STEPS)
    sigmas = torch.tensor(times, dtype=torch.float32, device=x.device)
    sampler = getattr(k_diffusion_sampling(), f"sample_{name}")
    if "noise_sampler" in sampler.__wrapped__.__code__.co_varnames:
        options["noise_sampler"] = lambda *_: x
    return lambda: sampler(clock, x, sigmas, disable=True, **options)


@contextlib.contextmanager
def no_drawing(x: torch.Tensor) -> Iterator[None]:
    """pfode and k-diffusion are handed x as their noise."""
    steady = lambda *_, **__: x  # noqa: E731
    with mock.patch.object(pfode.noise, "normal", steady), mock.patch.object(torch, "randn_like", steady):
        yield


def contestants(clock: Clock, x: torch.Tensor) -> dict[str, Run]:
    """The samplers most used, and the default."""
    karras = {"use_karras_sigmas": True}
    return {
        "pfode dpm++2m (eps network)": pfode_run("dpm++2m", "eps", clock, x),
        "pfode ipndm4 (eps network)": pfode_run("ipndm4", "eps", clock, x),
        "diffusers DPMSolverMultistep": diffusers_run("dpmsolver_multistep", clock, x, {}, **karras),
        "diffusers UniPC": diffusers_run("unipc_multistep", clock, x, {}, **karras),
        "pfode dpm++2m (denoiser)": pfode_run("dpm++2m", "x0", clock, x),
        "k-diffusion sample_dpmpp_2m": k_diffusion_run("dpmpp_2m", clock, x),
    }


@dataclass(frozen=True)
class Peer:
    """A recipe, and who has it too: `library` and its name there, with the options of each."""

    family: str
    ours: str
    library: str
    theirs: str
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)

    def runs(self, clock: Clock, x: torch.Tensor) -> tuple[Run, Run]:
        """Ours and theirs, for the same kind of network."""
        if self.library == "k-diffusion":
            theirs = k_diffusion_run(self.theirs, clock, x, **self.config)
        else:
            theirs = diffusers_run(self.theirs, clock, x, self.step, **self.config)
        prediction = "x0" if self.library == "k-diffusion" else "edm" if "edm" in self.theirs else "eps"
        return pfode_run(self.ours, prediction, clock, x, **self.options), theirs


DIFFUSERS, K_DIFFUSION = "diffusers", "k-diffusion"
THIRD, SDE = {"solver_order": 3}, {"algorithm_type": "sde-dpmsolver++"}
SA = {"predictor_order": 3, "corrector_order": 4}
PEERS = [
    Peer("DDIM", "ddim", DIFFUSERS, "ddim", {"clip_sample": False}),
    Peer("Euler", "euler", DIFFUSERS, "euler_discrete"),
    Peer("Euler", "euler", K_DIFFUSION, "euler"),
    Peer("Heun", "heun", DIFFUSERS, "heun_discrete"),
    Peer("Heun", "heun", K_DIFFUSION, "heun"),
    Peer("DPM-Solver++ multistep", "dpm++2m", DIFFUSERS, "dpmsolver_multistep"),
    Peer("DPM-Solver++ multistep", "dpm++2m", K_DIFFUSION, "dpmpp_2m"),
    Peer("DPM-Solver++ multistep", "dpm++3m", DIFFUSERS, "dpmsolver_multistep", THIRD),
    Peer("DPM-Solver++ singlestep", "dpm++2s", DIFFUSERS, "dpmsolver_singlestep"),
    Peer("DPM-Solver++ singlestep", "dpm++3s", DIFFUSERS, "dpmsolver_singlestep", THIRD),
    Peer("DEIS", "exp-ab3", DIFFUSERS, "deis_multistep", THIRD, {"chart": "dpm"}),
    Peer("iPNDM", "ipndm4", DIFFUSERS, "ipndm"),
    Peer("LMS", "lms", DIFFUSERS, "lms_discrete"),
    Peer("LMS", "lms", K_DIFFUSION, "lms"),
    Peer("UniPC", "unipc2", DIFFUSERS, "unipc_multistep"),
    Peer("UniPC", "unipc3", DIFFUSERS, "unipc_multistep", THIRD),
    Peer("PNDM", "pndm", DIFFUSERS, "pndm"),
    Peer("ancestral", "euler-a", DIFFUSERS, "euler_ancestral_discrete"),
    Peer("ancestral", "euler-a", K_DIFFUSION, "euler_ancestral"),
    Peer("ancestral", "dpm2-a", DIFFUSERS, "k_dpm_2_ancestral_discrete"),
    Peer("ancestral", "dpm2-a", K_DIFFUSION, "dpm_2_ancestral"),
    Peer("ancestral", "dpm++2s-a", K_DIFFUSION, "dpmpp_2s_ancestral"),
    Peer("DPM-Solver++ SDE", "dpm++sde", DIFFUSERS, "dpmsolver_sde"),
    Peer("DPM-Solver++ SDE", "dpm++sde", K_DIFFUSION, "dpmpp_sde"),
    Peer("DPM-Solver++ SDE", "dpm++2m-sde", DIFFUSERS, "dpmsolver_multistep", SDE),
    Peer("DPM-Solver++ SDE", "dpm++2m-sde", K_DIFFUSION, "dpmpp_2m_sde"),
    Peer("DPM-Solver++ SDE", "dpm++3m-sde", K_DIFFUSION, "dpmpp_3m_sde"),
    Peer("SA-Solver", "sa-solver", DIFFUSERS, "sasolver", SA),
    Peer("churn", "euler", DIFFUSERS, "edm_euler", {}, {"churn": 5.0}, {"s_churn": 5.0}),
    Peer("churn", "edm", K_DIFFUSION, "heun", {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0}),
]


def timed(runs: dict[str, Run], clock: Clock, repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds, operations and reads per network call of each, turn by turn."""
    rows = {}

    def gaps_of(go: Run) -> list[float]:
        clock.take()
        go()
        return clock.take()

    with torch.no_grad(), no_drawing(clock.output), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gaps = harness.turns({name: functools.partial(gaps_of, go) for name, go in runs.items()}, repeats, warm=3)
        for name, go in runs.items():
            clock.take()
            with harness.Count() as count:
                go()
            medians = [statistics.median(gap) for gap in zip(*gaps[name], strict=True)]
            rows[name] = {"microseconds": 1e6 * statistics.mean(medians), **count.per_call()}
    return rows


def noise_time(x: torch.Tensor, repeats: int) -> float:
    """Median seconds to draw one step's keyed noise."""
    draws = itertools.count()
    run = harness.seconds(lambda: pfode.noise.normal(range(len(x)), next(draws), x.shape[1:], x.dtype, x.device))
    return statistics.median(harness.turns({"noise": run}, repeats)["noise"])


def by_size(size: tuple[int, int, int, int], device: str, repeats: int) -> dict[str, dict[str, float]]:
    x = torch.randn(size, device=device)
    clock = Clock(torch.randn(size, device=device))
    rows = timed(contestants(clock, x), clock, repeats)
    rows["noise of one step, apart"] = {"microseconds": 1e6 * noise_time(x, repeats)}
    base = rows["diffusers DPMSolverMultistep"]["microseconds"]
    print(f"\n{size}: us per call, {STEPS} steps, target for pfode dpm++2m {TARGETS[size]:.2f}x of diffusers' DPM++2M")
    for name, row in rows.items():
        counts = f"{row['operations']:6.1f} ops {row['reads']:5.1f} reads" if "operations" in row else ""
        print(f"  {name:32s}{row['microseconds']:10.1f}{row['microseconds'] / base:8.2f}x  {counts}")
    return rows


def whole_runs(device: str, repeats: int) -> dict[str, Any]:
    """Seconds of a run of the default sampler, everything counted: of diffusers with its set_timesteps."""
    x = torch.randn(FAMILY_SIZE, device=device)
    clock = Clock(torch.randn(FAMILY_SIZE, device=device))
    runs = {
        "pfode dpm++2m (eps network)": pfode_run("dpm++2m", "eps", clock, x),
        "diffusers DPMSolverMultistep": diffusers_run("dpmsolver_multistep", clock, x, {}, use_karras_sigmas=True),
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spent = harness.turns({name: harness.seconds(go, wait=clock.synchronise) for name, go in runs.items()}, repeats)
    rows = {name: statistics.median(times) for name, times in spent.items()}
    ours, theirs = rows.values()
    print(f"\n{FAMILY_SIZE}: ms per whole run of {STEPS} steps, target {WHOLE_TARGET:.2f}x of diffusers'")
    for name, row in rows.items():
        print(f"  {name:32s}{1e3 * row:10.2f}{row / theirs:8.3f}x")
    return {"seconds": rows, "ratio": ours / theirs}


def by_family(device: str, repeats: int) -> list[dict[str, Any]]:
    x = torch.randn(FAMILY_SIZE, device=device)
    clock = Clock(torch.randn(FAMILY_SIZE, device=device))
    print(
        f"\n{FAMILY_SIZE}: us per call, ours and the peer's, target {FAMILY_TARGET:.2f}x; operations per call of each"
    )
    table = []
    for peer in PEERS:
        ours, theirs = peer.runs(clock, x)
        rows = timed({"ours": ours, "theirs": theirs}, clock, repeats)
        ratio = rows["ours"]["microseconds"] / rows["theirs"]["microseconds"]
        label = f"{peer.library} {peer.theirs}"
        spent = "".join(f"{row['microseconds']:9.1f}" for row in rows.values())
        counts = "".join(f"{row['operations']:7.1f}" for row in rows.values())
        print(f"  {peer.family:24s}{peer.ours:13s}{label:38s}{spent}{ratio:7.3f}x{counts}", flush=True)
        table.append({"family": peer.family, "recipe": peer.ours, "peer": label, "ratio": ratio, **rows})
    return table


def by_recipe() -> dict[str, dict[str, float]]:
    """Seconds of CPU to build a plan on each of three processes, the longest; the best of some tries."""
    processes = [pfode.EDM(), pfode.VP(), pfode.Flow()]
    table: dict[str, dict[str, float]] = {}
    for name in CATALOGUE:
        table[name] = {}
        for steps, tries in ((20, 5), (1000, 2)):
            spent = []
            for process in processes:
                build = functools.partial(pfode.make_plan, name, process, steps, grid="time")
                run = harness.seconds(build, time.process_time)
                spent.append(min(harness.turns({name: run}, tries, warm=0)[name]))
            table[name][str(steps)] = max(spent)
    for steps, target in BUILD_TARGETS.items():
        print(
            f"\nbuilding a plan of {steps} steps, target {1e3 * target:g} ms, the five slowest of {len(table)} recipes:"
        )
        for name in sorted(table, key=lambda name: -table[name][str(steps)])[:5]:
            print(f"  {name:15s}{1e3 * table[name][str(steps)]:9.1f} ms")
    return table


def main() -> None:
    parser = harness.parser(__doc__, repeats=30, device=True)
    options = parser.parse_args()
    report: dict[str, Any] = {"steps": STEPS}
    report["sizes"] = {"x".join(map(str, size)): by_size(size, options.device, options.repeats) for size in SIZES}
    report["whole run"] = whole_runs(options.device, options.repeats)
    report["families"] = by_family(options.device, options.repeats)
    report["plans"] = by_recipe()
    harness.record(options, report)


if __name__ == "__main__":
    main()
