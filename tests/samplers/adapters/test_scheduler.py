"""PFODEScheduler: the same numbers as `pfode.run` and as diffusers' schedulers, and none of their pains."""

import copy
import importlib
import inspect
import json
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pfode
from pfode.errors import UsageError
from pfode.plans.table import Plan
from pfode.process import Process
from pfode.samplers import CATALOGUE, PFODEScheduler, make_plan
from pfode.samplers.adapters import scheduler as module
from pfode.samplers.adapters.classes import KNOWN
from pfode.scores.exact import Gaussian
from tests import peers, problems
from tests.scores.tiny import NEWER

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # diffusers under numpy 2
    pytest.mark.filterwarnings("ignore:`?algorithm_type:FutureWarning"),
]

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
EDM = {"sigma_data": 0.5}
KINDS: dict[str, dict[str, Any]] = {"VP": {}, "Flow": FLOW, "EDM": EDM}
SEEDS = [5, 6, 7, 8]
f64 = torch.float64
diffusers = importlib.import_module("diffusers")
only_newer = pytest.mark.skipif(not NEWER, reason="this version of diffusers has no such sigmas, or fails to make them")


def process(scheduler: PFODEScheduler) -> Process:
    if scheduler.config["sigma_data"] is not None:
        return pfode.EDM()
    if scheduler.config["use_flow_sigmas"]:
        return pfode.Flow(t_min=1e-6)
    return pfode.VPDiscrete(scheduler.alphas_cumprod.double())


def network(scheduler: PFODEScheduler, denoiser: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """What an exact network of the scheduler's kind says, from the formulas."""
    config, kind = scheduler.config, scheduler.config["prediction_type"]

    def call(y: Tensor, timestep: Tensor) -> Tensor:
        x, told = y.double(), timestep.double()
        if config["sigma_data"] is not None:
            sigma, data = torch.exp(4 * told), config["sigma_data"]
            x = x * (sigma**2 + data**2).sqrt()
            out = (denoiser(x, sigma) - data**2 / (sigma**2 + data**2) * x) / (sigma * data)
            out = out * (sigma**2 + data**2).sqrt()
            return out if kind == "epsilon" else -out
        t = told / 1000 if config["use_flow_sigmas"] else told
        t = 1 - t if config["invert_sigmas"] else t
        alpha, sigma = denoiser.process.alpha(t), denoiser.process.sigma(t)
        x0 = denoiser(x, t)
        eps = (x - alpha * x0) / sigma
        made = {"sample": x0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "flow_prediction": eps - x0}
        return -made[kind] if config["invert_sigmas"] else made[kind]

    return call


def drive(scheduler: Any, call: Any, x: Tensor, way: str = "SD", first: int = 0, **step: Any) -> Tensor:
    """The loop of a pipeline from unit noise: Stable Diffusion's way, DiT's, or that of DDPM and the flows."""
    y = x if way == "DDPM" else x * scheduler.init_noise_sigma
    for t in scheduler.timesteps[first:]:
        scaled = y if way == "DDPM" else scheduler.scale_model_input(y, t)
        output = call(scaled, t).to(x.dtype)
        y = scheduler.step(output, t, scaled if way == "DiT" else y, **step, return_dict=False)[0]
    return y


def unit(dtype: torch.dtype = f64, n: int = 4) -> Tensor:
    return pfode.noise.normal(range(n), 0, (2,), dtype)


def bed(scheduler: PFODEScheduler) -> problems.GaussianMixture:
    return problems.mixture(process(scheduler))


def planned(scheduler: PFODEScheduler) -> Plan:
    assert scheduler.plan is not None
    return scheduler.plan


def state(scheduler: PFODEScheduler, x: Tensor) -> Tensor:
    """Unit noise as a state of the process at the plan's first time."""
    plan = planned(scheduler)
    return x * (plan.sigma[0].item() if scheduler.config["sigma_data"] else 1.0)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- the same as pfode's own loop


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_recipe_gives_what_run_gives(name):
    """On a VP network that predicts the noise, from timesteps that the network is told in float32."""
    scheduler = PFODEScheduler(sampler=name, seed=5)
    scheduler.set_timesteps(7)
    plan, denoiser = planned(scheduler), bed(scheduler)
    assert plan.name == name
    assert len(scheduler.timesteps) == plan.nfe
    assert len(scheduler.sigmas) == plan.nfe + 1
    ours = drive(scheduler, network(scheduler, denoiser), unit())
    first = problems.rms(plan.init, torch.tensor([1.0, 0.0], dtype=f64)) < 1e-12
    assert first
    assert relative(ours, pfode.run(plan, denoiser, unit(), SEEDS)) < 2e-6


@pytest.mark.parametrize("name", ["unipc2", "dpm++2m-sde", "edm", "sa-solver", "heun", "o-belm", "dpm++sde", "pndm"])
@pytest.mark.parametrize("kind", ["Flow", "EDM"])
def test_on_flows_and_edm_networks_too(kind, name):
    scheduler = PFODEScheduler(sampler=name, seed=5, **KINDS[kind])
    scheduler.set_timesteps(12)
    denoiser = bed(scheduler)
    ours = drive(scheduler, network(scheduler, denoiser), unit())
    assert relative(ours, pfode.run(planned(scheduler), denoiser, state(scheduler, unit()), SEEDS)) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_sample_makes_the_same_pictures(kind):
    """The whole of `pfode.sample`: its grid by name, its noise by the seed."""
    scheduler = PFODEScheduler(sampler="euler-a", grid="karras", seed=5, **KINDS[kind])
    scheduler.set_timesteps(9)
    denoiser = problems.mixture(pfode.Flow() if kind == "Flow" else process(scheduler))
    ours = drive(scheduler, network(scheduler, denoiser), unit())
    out = pfode.sample(denoiser, x=state(scheduler, unit()), steps=9, sampler="euler-a", grid="karras", seeds=SEEDS)
    assert relative(ours, out.x) < 2e-6


@pytest.mark.parametrize(
    ("kind", "prediction"),
    [("VP", "sample"), ("VP", "v_prediction"), ("Flow", "sample"), ("EDM", "v_prediction")],
)
def test_every_prediction_type_gives_the_same(kind, prediction):
    made = []
    for config in (KINDS[kind], {**KINDS[kind], "prediction_type": prediction}):
        scheduler = PFODEScheduler(sampler="unipc2", grid="log-snr", **config)
        scheduler.set_timesteps(8)
        made.append(drive(scheduler, network(scheduler, bed(scheduler)), unit()))
    assert relative(*made) < 1e-6


@pytest.mark.parametrize("way", ["SD", "DiT", "DDPM"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["euler", "unipc2", "heun", "ddpm"])
def test_all_three_ways_of_pipelines_are_right(name, kind, way):
    """diffusers' Euler, Heun and LMS give deviations of 0 in DiT's way and 1e3 and more in DDPM's."""
    scheduler = PFODEScheduler(sampler=name, seed=0, grid="log-snr", **KINDS[kind])
    scheduler.set_timesteps(60)
    denoiser = Gaussian([0.7], torch.tensor([0.25], dtype=f64), process=process(scheduler))
    x = torch.special.ndtri((torch.arange(400, dtype=f64)[:, None] + 0.5) / 400)
    out = drive(scheduler, network(scheduler, denoiser), x, way)
    assert out.mean() == pytest.approx(0.7, abs=0.05)
    assert out.std() == pytest.approx(0.5, abs=0.1 if name == "ddpm" else 0.03)


# ---- the same as diffusers' own


def loaded(name: str, **config: Any) -> dict[str, Any]:
    """The config of one of diffusers' schedulers as a pipeline that was loaded has it."""
    kind = getattr(diffusers, name)
    return {**json.loads(kind(**config).to_json_string())}


KARRAS = {"use_karras_sigmas": True}
MULTI, UNIPC, EULER = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"
PARITY: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [  # ours, its config, theirs, its config
    ("ddim", {}, "DDIMScheduler", {"clip_sample": False}),
    ("ddim", {}, "DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    ("ddim", {}, "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("ddim", {}, "DDIMScheduler", {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2"}),
    ("ddim", {}, "DDIMScheduler", {"clip_sample": False, "beta_schedule": "scaled_linear", "beta_end": 0.012}),
    (
        "ddim",
        {},
        "DDIMScheduler",
        {
            "clip_sample": False,
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        },
    ),
    ("ddpm", {}, "DDPMScheduler", {"clip_sample": False}),
    ("ddpm", {}, "DDPMScheduler", {"timestep_spacing": "trailing"}),
    ("dpm++2m", {}, MULTI, {}),
    ("dpm++2m", {}, MULTI, {"timestep_spacing": "leading", "steps_offset": 1}),
    ("dpm++2m", {}, MULTI, {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    ("dpm++2m", {}, MULTI, KARRAS),
    ("dpm++2m", {}, MULTI, {"use_exponential_sigmas": True}),
    ("dpm++2m", {}, MULTI, {"use_beta_sigmas": True}),
    ("dpm++2m", {}, MULTI, {"use_lu_lambdas": True}),
    ("dpm++3m", {}, MULTI, {"solver_order": 3, **KARRAS}),
    ("dpm++2m-sde", {}, MULTI, {"algorithm_type": "sde-dpmsolver++", **KARRAS}),
    ("unipc", {}, UNIPC, {}),
    ("unipc3", {}, UNIPC, {"solver_order": 3, **KARRAS}),
    ("exp-ab2", {"chart": "dpm", "final_sigmas_type": "sigma_min"}, "DEISMultistepScheduler", {}),
    ("euler", {}, EULER, KARRAS),
    ("euler", {}, EULER, {"timestep_spacing": "trailing"}),
    ("euler", {}, EULER, {**KARRAS, "sigma_min": 0.05, "sigma_max": 12.0}),
    ("euler-a", {}, "EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("heun", {}, "HeunDiscreteScheduler", KARRAS),
    ("euler", {}, "EDMEulerScheduler", {}),
    ("euler", {}, "EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_schedule": "exponential"}),
    ("dpm++2m", {}, "EDMDPMSolverMultistepScheduler", {"sigma_max": 60.0, "rho": 5.0}),
]


OLD_ERRORS = ("use_exponential_sigmas", "use_beta_sigmas")


@pytest.mark.parametrize("row", PARITY, ids=lambda row: "-".join([row[0], row[2], *row[3]]))
def test_from_config_gives_what_the_scheduler_gave(row):
    """From its saved config alone, on the same exact network: its nodes, its options, its result."""
    name, own, theirs, config = row
    if not NEWER and any(key in config for key in OLD_ERRORS):
        pytest.skip("this version of diffusers fails to make them")
    ours = PFODEScheduler.from_config(loaded(theirs, **config), sampler=name, seed=5, **own)
    for steps in (10, 20):
        module_name = {MULTI: "dpmsolver_multistep", UNIPC: "unipc_multistep"}.get(theirs) or "_".join(snake(theirs))
        peer = peers.Scheduler(module_name, steps, **config)
        ours.set_timesteps(steps)
        if hasattr(peer.inner, "sigmas"):
            peer.inner.sigmas = peer.inner.sigmas.double()  # or its coefficients are rounded
        mixture, x = problems.mixture(peer.process), unit()
        expected = peer.sample(mixture, state(ours, x), peers.keyed(SEEDS, (2,)))
        assert relative(drive(ours, network(ours, bed(ours)), x), expected) < 1e-5


def snake(name: str) -> list[str]:
    """The words of a class's name."""
    words = {"DDIMScheduler": "ddim", "DDPMScheduler": "ddpm", "DEISMultistepScheduler": "deis_multistep"}
    words |= {"EulerDiscreteScheduler": "euler_discrete", "HeunDiscreteScheduler": "heun_discrete"}
    words |= {"EulerAncestralDiscreteScheduler": "euler_ancestral_discrete", "EDMEulerScheduler": "edm_euler"}
    words |= {"EDMDPMSolverMultistepScheduler": "edm_dpmsolver_multistep"}
    return [words[name]]


@only_newer
@pytest.mark.parametrize("how", ["shift", "mu", "linear mu", "terminal", "karras", "exponential", "beta", "inverted"])
def test_flow_sigmas_are_those_of_flow_match_euler(how):
    """Static and dynamic shifts, shift_terminal and its sigma schedules, from the sigmas that Flux passes."""
    config: dict[str, Any] = {"shift": {"shift": 3.0}, "mu": {"use_dynamic_shifting": True}}.get(how, {})
    config |= {"terminal": {"shift": 2.0, "shift_terminal": 0.1}, "inverted": {"invert_sigmas": True}}.get(how, {})
    if how == "linear mu":
        config = {"use_dynamic_shifting": True, "time_shift_type": "linear"}
    if how in ("karras", "exponential", "beta"):
        config = {f"use_{how}_sigmas": True, "shift": 2.0}
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    ours = PFODEScheduler.from_config(theirs.config, sampler="euler")
    mu = {"mu": 0.8} if "mu" in how else {}
    sigmas = np.linspace(1.0, 1 / 12, 12)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=sigmas.tolist(), device="cpu", **mu)
    assert torch.allclose(ours.sigmas, theirs.sigmas, atol=1e-6)
    assert torch.allclose(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=1e-3)
    call = network(ours, bed(ours))
    assert relative(*(drive(s, call, unit(torch.float32), "DDPM") for s in (ours, theirs))) < 1e-5


def test_the_pipelines_generator_gives_ddpms_own_pictures():
    """Noise is drawn from it as diffusers draws it."""
    made = []
    theirs = diffusers.DDPMScheduler(clip_sample=False)
    ours = PFODEScheduler.from_config(loaded("DDPMScheduler", clip_sample=False), sampler="ddpm")
    call = network(ours, bed(ours))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(20)
        generator = torch.Generator().manual_seed(3)
        made.append(drive(scheduler, call, unit(torch.float32), generator=generator))
    assert relative(*made) < 1e-5


# ---- the pains of the peers


@pytest.mark.parametrize("name", ["exp-ab2", "deis", "sa-solver", "unipc3", "dpm++2m", "heun"])
@pytest.mark.parametrize("steps", [5, 10, 20])
def test_flow_grids_reach_zero(name, steps):
    """DEIS and SASolver of diffusers end at .1998 twice: means of .555, .625, .659 where .7 is right."""
    scheduler = PFODEScheduler(sampler=name, seed=0, options={"tau": 0.0} if name == "sa-solver" else None, **FLOW)
    scheduler.set_timesteps(steps)
    assert scheduler.sigmas[-1] == 0
    assert (scheduler.sigmas[:-1] > 0).all()
    denoiser = Gaussian([0.7], torch.tensor([0.25], dtype=f64), process=process(scheduler))
    x = torch.special.ndtri((torch.arange(200, dtype=f64)[:, None] + 0.5) / 200)
    assert drive(scheduler, network(scheduler, denoiser), x).mean() == pytest.approx(0.7, abs=0.02)


def test_the_shift_is_applied_once():
    """FlowMatchEuler's set_timesteps(1000) with shift=3 ends at .0149, .0119, .0089 (#13243)."""
    scheduler = PFODEScheduler(sampler="euler", shift=3.0, **FLOW)
    scheduler.set_timesteps(1000)
    u = torch.linspace(1, 1e-3, 1000, dtype=f64)
    assert torch.allclose(scheduler.sigmas[:-1].double(), 3 * u / (1 + 2 * u), atol=1e-6)
    assert scheduler.sigmas[-4:-1].tolist() == pytest.approx([0.0089, 0.0060, 0.0030], abs=5e-5)


def test_mu_is_of_one_call():
    """diffusers' DPM-Solver writes it into its config, where the next call finds it."""
    scheduler = PFODEScheduler(sampler="euler", use_dynamic_shifting=True, **FLOW)
    before, grids = dict(scheduler.config), []
    for mu in (1.0, 0.2, 1.0):
        scheduler.set_timesteps(8, mu=mu)
        grids.append(scheduler.sigmas)
    assert torch.equal(grids[0], grids[2])
    assert not torch.equal(grids[0], grids[1])
    assert dict(scheduler.config) == before
    with pytest.raises(UsageError, match="mu is missing"):
        scheduler.set_timesteps(8)
    still = PFODEScheduler(sampler="euler", shift=3.0, **FLOW)  # Flux passes mu always
    still.set_timesteps(8, mu=5.0)
    assert still.sigmas[1] == pytest.approx(3 * 0.875 / (1 + 2 * 0.875))


@pytest.mark.parametrize("kind", KINDS)
def test_the_zero_of_given_sigmas_may_be_there_or_not(kind):
    """Euler of diffusers wants it, FlowMatchEuler makes a step from 0 to 0 of it."""
    scheduler, made = PFODEScheduler(sampler="dpm++2m", **KINDS[kind]), []
    for tail in ([], [0.0]):
        scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.2, *tail])
        made.append((scheduler.timesteps, scheduler.sigmas))
        assert len(scheduler.timesteps) == 3
    assert torch.equal(made[0][0], made[1][0])
    assert made[0][1].tolist() == pytest.approx([0.9, 0.5, 0.2, 0.0])


@pytest.mark.parametrize("grid", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", None])
@pytest.mark.parametrize("kind", KINDS)
def test_ending_at_sigma_min_wastes_no_step(kind, grid):
    """Euler, DPM-Solver and UniPC of diffusers have the last sigma twice."""
    scheduler = PFODEScheduler(final_sigmas_type="sigma_min", **({grid: True} if grid else {}), **KINDS[kind])
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 10
    assert (scheduler.sigmas.diff() < 0).all()
    least = {"VP": 0.0100005, "Flow": 0.001, "EDM": 0.002}[kind]
    assert scheduler.sigmas[-1] == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize(
    "nodes", [{"timesteps": [999, 500, 500, 20]}, {"timesteps": [20, 500]}, {"sigmas": [5.0, 1.0, 2.0]}]
)
def test_nodes_that_do_not_fall_are_refused(nodes):
    """#12771: duplicates end in an IndexError; #13411: rising ones are accepted."""
    with pytest.raises(UsageError, match="must fall strictly"):
        PFODEScheduler().set_timesteps(**nodes)


@pytest.mark.parametrize("kind", KINDS)
def test_timesteps_are_where_the_sigmas_are(kind):
    """diffusers rounds those of flows down: 799.2 to 799."""
    scheduler = PFODEScheduler(grid="karras", **KINDS[kind])
    scheduler.set_timesteps(9)
    told, sigma = scheduler.timesteps.double(), scheduler.sigmas[:-1].double()
    exact = {"Flow": 1000 * sigma, "EDM": 0.25 * torch.log(sigma)}.get(kind)
    if exact is None:
        exact = process(scheduler).time(-2 * torch.log(sigma))
    assert torch.allclose(told, exact, rtol=1e-5, atol=1e-4)
    assert scheduler.timesteps.dtype == torch.float32


@pytest.mark.parametrize("source", ["seed", "seeds", "generators"])
@pytest.mark.parametrize("name", ["ddpm", "dpm++2m-sde", "sa-solver", "dpm++sde"])
def test_a_sample_does_not_depend_on_its_batch(name, source):
    made = []
    for n in (1, 4):
        seed = {"seed": 3, "seeds": [3, 9, 1, 7][:n]}.get(source)
        scheduler = PFODEScheduler(sampler=name, seed=seed)
        scheduler.set_timesteps(6)
        step: dict[str, Any] = (
            {"generator": [torch.Generator().manual_seed(i) for i in range(n)]} if source == "generators" else {}
        )
        made.append(drive(scheduler, network(scheduler, bed(scheduler)), unit(n=n), **step))
    assert relative(made[0], made[1][:1]) < 1e-12


def test_generators_and_seeds_are_heeded():
    """SD3 with FlowMatchEuler(stochastic_sampling=True) gives other pictures from the same generator twice."""
    scheduler = PFODEScheduler(sampler="euler-a", **FLOW)
    call, made = network(scheduler, bed(scheduler)), {}
    for name, seed, manual in (("a", 0, None), ("b", 0, None), ("c", 1, None), ("d", None, 0), ("e", None, 0)):
        scheduler.seed = seed
        scheduler.set_timesteps(6)
        step: dict[str, Any] = {} if manual is None else {"generator": torch.Generator().manual_seed(manual)}
        made[name] = drive(scheduler, call, unit(), **step)
    assert torch.equal(made["a"], made["b"])
    assert torch.equal(made["d"], made["e"])
    assert (made["a"] - made["c"]).abs().max() > 1e-2
    scheduler.seed = None
    for manual in (0, 0, 1):  # neither: torch's own generator
        torch.manual_seed(manual)
        scheduler.set_timesteps(6)
        made[len(made)] = drive(scheduler, call, unit())
    assert torch.equal(made[5], made[6])
    assert (made[5] - made[7]).abs().max() > 1e-2
    scheduler.seed = [1, 2]
    scheduler.set_timesteps(6)
    with pytest.raises(UsageError, match="2 of them for 4 samples"):
        drive(scheduler, call, unit())


def test_threads_have_runs_of_their_own():
    """#9833: one scheduler in two threads steps over the end."""
    scheduler = PFODEScheduler(sampler="unipc3")
    call = network(scheduler, bed(scheduler))
    alone = {}
    for steps in (5, 9, 14):
        scheduler.set_timesteps(steps)
        alone[steps] = drive(scheduler, call, unit())
    found, barrier = {}, threading.Barrier(3)

    def work(steps: int) -> None:
        scheduler.set_timesteps(steps)
        turns = iter(range(100))

        def slowly(x: Tensor, t: Tensor) -> Tensor:
            if next(turns) < 5:
                barrier.wait()  # all three are between their steps now
            return call(x, t)

        found[steps] = drive(scheduler, slowly, unit())

    threads = [threading.Thread(target=work, args=(steps,)) for steps in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[steps], alone[steps]) for steps in alone)


def test_a_thread_without_timesteps_takes_the_last_ones_set():
    scheduler = PFODEScheduler(sampler="ddim")
    scheduler.set_timesteps(5)
    seen = []
    thread = threading.Thread(target=lambda: seen.append((scheduler.timesteps, scheduler.step_index)))
    thread.start()
    thread.join()
    assert torch.equal(seen[0][0], scheduler.timesteps)


@pytest.mark.parametrize("again", ["set", "loop", "jump"])
def test_history_does_not_leak(again):
    """#8711. A second loop over the same timesteps, or from the middle, begins anew without being told."""
    scheduler = PFODEScheduler(sampler="unipc3")
    scheduler.set_timesteps(8)
    call = network(scheduler, bed(scheduler))
    first = drive(scheduler, call, unit())
    if again == "jump":
        for t in scheduler.timesteps[:3]:
            scheduler.step(torch.ones(4, 2, dtype=f64), t, unit())
    if again == "set":
        scheduler.set_timesteps(8)
    assert torch.equal(drive(scheduler, call, unit()), first)


class Reads(TorchDispatchMode):
    """Values read back to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["unipc2", "heun", "dpm++2m-sde", "edict"])
def test_a_step_reads_nothing_back(name):
    scheduler = PFODEScheduler(sampler=name, seed=0)
    scheduler.set_timesteps(6)
    with Reads() as reads:
        drive(scheduler, lambda x, t: 0.1 * x, unit())
    assert reads.count == 0


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.4 does not see through thread-locals")
@pytest.mark.parametrize("name", ["unipc3", "heun"])
def test_compiled_steps_are_two_graphs_whatever_their_number(name):
    """DPM++, UniPC and FlowMatchEuler of diffusers make one per step, DDIM and Euler fail."""
    graphs, scheduler = [], PFODEScheduler(sampler=name)
    torch._dynamo.reset()
    step = torch.compile(scheduler.step, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    made = []
    for call in (step, scheduler.step):
        scheduler.set_timesteps(12)
        x = unit(torch.float32)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = call(0.1 * x, t, x, return_dict=False)[0]
        made.append(x)
    assert len(graphs) <= 2
    assert torch.allclose(*made, rtol=1e-5)


# ---- img2img, inpainting, training


@pytest.mark.parametrize("name", ["unipc3", "dpm++2m", "heun", "ddim", "euler-a", "sa-solver", "res-3s", "edm"])
@pytest.mark.parametrize("told", ["begin_index", "timestep"])
def test_a_run_can_begin_at_any_node(name, told):
    """The plan of the nodes that are left: what set_begin_index says, or the first timestep."""
    scheduler = PFODEScheduler(sampler=name, seed=5)
    scheduler.set_timesteps(10)
    assert scheduler.order == CATALOGUE[name].nfe_per_step
    first, denoiser = 4 * scheduler.order, bed(scheduler)
    t = scheduler.timesteps[first]
    if told == "begin_index":
        scheduler.set_begin_index(first)
        assert scheduler.begin_index == first
    noised = scheduler.add_noise(denoiser.sample(4, seed=2), unit(), t.repeat(4))
    got = drive(scheduler, network(scheduler, denoiser), noised, first=first)
    if name in ("euler-a", "edm"):  # rows of one step are those of the whole run, and so is their noise
        assert (got - denoiser.sample(4, seed=2)).abs().max() < 3
        return
    plan = make_plan(name, denoiser.process, grid=planned(scheduler).times[4:])
    assert relative(got, pfode.run(plan, denoiser, noised, SEEDS)) < 2e-6


def test_where_a_run_cannot_begin_it_says_so():
    scheduler = PFODEScheduler(sampler="dpm++2s")
    scheduler.set_timesteps(5)
    with pytest.raises(UsageError, match="call 3 is an inner stage of step 1"):
        scheduler.set_begin_index(3)
    scheduler = PFODEScheduler(sampler="pndm")
    scheduler.set_timesteps(8)
    with pytest.raises(UsageError, match="cannot begin with call 12"):
        scheduler.set_begin_index(12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [None, 7])
def test_noise_is_added_by_the_timestep(kind, steps):
    """With timesteps set or without, for whole batches of training and for images of any size."""
    scheduler = PFODEScheduler(grid="time" if kind != "EDM" else None, **KINDS[kind])
    told = {"VP": [999.0, 20.0, 500.0], "Flow": [1000.0, 20.0, 500.0], "EDM": [1.0, -1.0, 0.0]}[kind]
    if steps:
        scheduler.set_timesteps(steps)
        told = scheduler.timesteps[[0, 3, 6]].tolist()
    timesteps = torch.tensor(told)
    data, noise = torch.randn(3, 2, 4, 4, dtype=f64), torch.randn(3, 2, 4, 4, dtype=f64)
    t = {"VP": timesteps, "Flow": timesteps / 1000, "EDM": torch.exp(4 * timesteps)}[kind].double()
    alpha, sigma = (level(t).view(3, 1, 1, 1) for level in (process(scheduler).alpha, process(scheduler).sigma))
    scale = 1 / torch.sqrt(sigma**2 + 0.25) if kind == "EDM" else 1.0
    expected = scale * (alpha * data + sigma * noise)
    assert torch.allclose(scheduler.add_noise(data, noise, timesteps), expected, atol=1e-5)
    assert torch.allclose(scheduler.scale_noise(data, timesteps[:1], noise)[0], expected[0], atol=1e-5)
    assert scheduler.add_noise(data.half(), noise.half(), timesteps).dtype == torch.float16
    if kind == "VP":
        whole = timesteps.long()
        velocity = scheduler.get_velocity(data, noise, whole)
        theirs = diffusers.DDPMScheduler()
        assert torch.allclose(velocity, theirs.get_velocity(data, noise, whole), atol=1e-5)
        assert torch.allclose(scheduler.add_noise(data, noise, whole), theirs.add_noise(data, noise, whole), atol=1e-5)


def test_inpainting_keeps_to_the_levels():
    """What is known, noised to the next timestep, and the state have the same level after every step."""
    scheduler = PFODEScheduler(sampler="dpm++2m")
    scheduler.set_timesteps(10)
    denoiser = Gaussian([0.7], torch.tensor([0.0], dtype=f64) + 1e-8, process=process(scheduler))
    call, x, data = network(scheduler, denoiser), unit()[:, :1], torch.full((4, 1), 0.7, dtype=f64)
    noise = x.clone()
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(call(x, t), t, x).prev_sample
        if i + 1 < len(scheduler.timesteps):
            level = scheduler.add_noise(data, noise, scheduler.timesteps[i + 1][None])
            assert torch.allclose(x, level, atol=2e-2)
            x = level


# ---- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_state_is_float32_between_steps_of_a_half_network(dtype):
    """A hundred steps of halves: as near as one rounding at the end, and the pipeline sees the network's dtype."""
    errors = []
    for broken in (False, True):
        scheduler = PFODEScheduler(sampler="ddim", **FLOW)
        scheduler.set_timesteps(100)
        call, y, exact = network(scheduler, bed(scheduler)), unit().to(dtype), unit().to(dtype).double()
        for t in scheduler.timesteps:
            y = y.clone() if broken else y  # a pipeline that makes another tensor of it: then it was rounded
            output = call(y.float(), t)
            y = scheduler.step(output.to(dtype), t, y, return_dict=False)[0]
            assert y.dtype == dtype
        for t in scheduler.timesteps:
            exact = scheduler.step(call(exact, t), t, exact, return_dict=False)[0]
        errors.append((y.double() - exact).abs().mean().item())
    assert errors[0] < 0.5 * errors[1]
    changed = scheduler.step(torch.ones(4, 2, dtype=dtype), scheduler.timesteps[0], y).prev_sample
    before = changed.clone()
    changed += 1  # in place: no longer what was returned
    after = scheduler.step(torch.zeros(4, 2, dtype=dtype), scheduler.timesteps[1], changed).prev_sample
    again = scheduler.step(torch.zeros(4, 2, dtype=dtype), scheduler.timesteps[1], before).prev_sample
    assert (after - again).abs().max() > 0.5


# ---- configs


def test_every_scheduler_of_diffusers_is_taken_or_refused_by_name():
    taken = set()
    for name in sorted(dir(diffusers)):
        kind = getattr(diffusers, name) if name.endswith("Scheduler") else None
        if not isinstance(kind, type) or not hasattr(kind, "from_config") or hasattr(kind, "_backends"):
            continue
        parameters = inspect.signature(kind.__init__).parameters.values()
        if any(p.default is p.empty and p.name not in ("self", "kwargs") for p in parameters):
            config = {"_class_name": name}
        else:
            config = loaded(name)
        if name in KNOWN:
            scheduler = PFODEScheduler.from_config(config, sampler="unipc")
            scheduler.set_timesteps(4, **({"mu": 1.0} if scheduler.config["use_dynamic_shifting"] else {}))
            assert len(scheduler.timesteps) == 4
            taken.add(name)
        else:
            with pytest.raises(UsageError, match=f"{name}: its models"):
                PFODEScheduler.from_config(config)
    assert taken | {"DPMSolverSDEScheduler"} == KNOWN & {*dir(diffusers), "DPMSolverSDEScheduler"}


def test_what_another_scheduler_stood_for_is_kept():
    """Heun's betas are others than ours, whether its file names them, or diffusers filled them in, or nobody did."""
    filled = {"_use_default_values": ["beta_start"], "beta_start": 0.00085}
    for config in (loaded("HeunDiscreteScheduler"), {"_class_name": "HeunDiscreteScheduler"}, diffusers_heun(), filled):
        config = {"_class_name": "HeunDiscreteScheduler", **config}
        assert PFODEScheduler.from_config(config).config["beta_start"] == 0.00085
    assert PFODEScheduler.from_config(diffusers.HeunDiscreteScheduler().config).config["beta_start"] == 0.00085


def diffusers_heun() -> dict[str, Any]:
    return {k: v for k, v in loaded("HeunDiscreteScheduler").items() if not k.startswith("beta")}


LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "trained_betas": None}
SHIPPED: dict[str, tuple[dict[str, Any], float, float]] = {  # file, first sigma, last one above 0
    "Stable Diffusion 1.5": (
        {
            "_class_name": "PNDMScheduler",
            "_diffusers_version": "0.6.0",
            **LATENT,
            "num_train_timesteps": 1000,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "clip_sample": False,
        },
        8.39,
        0.0413,
    ),
    "Stable Diffusion XL": (
        {
            "_class_name": "EulerDiscreteScheduler",
            "_diffusers_version": "0.19.0",
            **LATENT,
            "clip_sample": False,
            "interpolation_type": "linear",
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "set_alpha_to_one": False,  # left by PNDM: Euler goes on to 0
            "skip_prk_steps": True,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "use_karras_sigmas": False,
        },
        8.39,
        0.0413,
    ),
    "Stable Diffusion 3": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, 1.0, 0.25),
    "Wan": (
        {
            "_class_name": "UniPCMultistepScheduler",
            **LATENT,
            "disable_corrector": [],
            "flow_shift": 3.0,
            "prediction_type": "flow_prediction",
            "solver_order": 2,
            "solver_type": "bh2",
            "use_flow_sigmas": True,
        },
        1.0,
        0.25,
    ),
    "Mochi": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, 0.0, 0.9),
    "Playground 2.5": (
        {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 0.5},
        80.0,
        0.002,
    ),
    "DeepFloyd IF": (
        {
            "_class_name": "DDPMScheduler",
            "beta_schedule": "squaredcos_cap_v2",
            "variance_type": "learned_range",
            "thresholding": True,
            "sample_max_value": 1.5,
            "dynamic_thresholding_ratio": 0.95,
        },
        6.43,
        0.0,
    ),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_files_that_models_come_with(name):
    config, first, last = SHIPPED[name]
    scheduler = PFODEScheduler.from_config(config, sampler="unipc")
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas
    assert sigmas[0] == pytest.approx(first, rel=0.03, abs=1e-3)
    assert sigmas[-2] == pytest.approx(last, rel=0.2, abs=0.03)
    end = {"Mochi": 1.0, "Stable Diffusion 1.5": 0.0292}.get(name, 0.0)  # the latter's file says so
    assert sigmas[-1] == pytest.approx(end, abs=1e-4)
    shape = (1, 3, 4, 4) if name == "DeepFloyd IF" else (1, 4, 4, 4)
    out = drive(scheduler, lambda x, t: torch.cat([x, x], 1) if shape[1] == 3 else 0.1 * x, torch.randn(shape))
    assert torch.isfinite(out).all()
    assert out.shape == shape
    if name != "Mochi":
        scheduler = PFODEScheduler.from_config(config, grid="karras")
        scheduler.set_timesteps(10)
        assert scheduler.sigmas[-1] == 0


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(1e-4, 0.02, 50), "num_train_timesteps": 50},
        {"rescale_betas_zero_snr": True},
    ],
    ids=str,
)
def test_betas_are_those_of_diffusers(config):
    theirs, ours = diffusers.DDIMScheduler(**config), PFODEScheduler(prediction_type="v_prediction", **config)
    assert torch.allclose(ours.betas, theirs.betas, rtol=1e-5, atol=1e-7)
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-9)


def test_betas_of_another_number_are_kept_but_not_run(tmp_path):
    """As diffusers' own SchedulerCommonTest wants it."""
    two: Any = np.array([0.1, 0.3])
    scheduler = PFODEScheduler(trained_betas=two)
    scheduler.save_pretrained(tmp_path)
    again: Any = PFODEScheduler.from_pretrained(tmp_path)
    assert again.betas.tolist() == scheduler.betas.tolist()
    with pytest.raises(UsageError, match="2 values for num_train_timesteps = 1000"):
        scheduler.set_timesteps(2)


def test_learned_variances_are_left_aside():
    scheduler = PFODEScheduler(sampler="ddim", variance_type="learned_range")
    scheduler.set_timesteps(3)
    x, out = torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
    both = scheduler.step(out, scheduler.timesteps[0], x).prev_sample
    assert torch.equal(both, scheduler.step(out[:, :3], scheduler.timesteps[0], x).prev_sample)


@pytest.mark.parametrize(
    ("name", "theirs", "config"),
    [
        ("dpm++2m", MULTI, {"thresholding": True, "sample_max_value": 1.2, "dynamic_thresholding_ratio": 0.9}),
        ("ddpm", "DDPMScheduler", {"thresholding": True, "sample_max_value": 1.5, "clip_sample": False}),
        ("ddpm", "DDPMScheduler", {"clip_sample_range": 0.3}),
    ],
)
def test_clipping_is_that_of_diffusers(name, theirs, config):
    """On pictures of a network that goes far beyond the range."""
    ours, peer = (
        PFODEScheduler.from_config(loaded(theirs, **config), sampler=name),
        getattr(diffusers, theirs)(**config),
    )
    made = []
    for scheduler in (ours, peer):
        scheduler.set_timesteps(10)
        step: dict[str, Any] = {"generator": torch.Generator().manual_seed(0)} if name == "ddpm" else {}
        made.append(
            drive(scheduler, lambda x, t: torch.sin(3 * x), torch.randn(2, 3, 8, 8, generator=seeded()), **step)
        )
    assert relative(*made) < 1e-5
    free = PFODEScheduler.from_config(
        loaded(theirs, clip_sample=False) if name == "ddpm" else loaded(theirs), sampler=name
    )
    free.set_timesteps(10)
    step: dict[str, Any] = {"generator": torch.Generator().manual_seed(0)} if name == "ddpm" else {}
    out = drive(free, lambda x, t: torch.sin(3 * x), torch.randn(2, 3, 8, 8, generator=seeded()), **step)
    assert relative(out, made[0]) > 0.1


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def test_continuous_timesteps_are_edm_with_unit_data():
    """Stable Video Diffusion's config: EulerDiscrete told log(sigma)/4, with v_prediction."""
    config = loaded(
        EULER,
        timestep_type="continuous",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    ours, theirs = PFODEScheduler.from_config(config, sampler="euler"), diffusers.EulerDiscreteScheduler(**config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(12)
    assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-4)
    assert torch.allclose(ours.timesteps, theirs.timesteps, atol=1e-4)
    model, x = torch.nn.Tanh(), unit(torch.float32)
    made = [drive(s, lambda y, t: model(y * t), x) for s in (ours, theirs)]
    assert relative(*made) < 1e-4


def test_saving_and_loading(tmp_path):
    scheduler = PFODEScheduler.from_config(
        loaded("DDIMScheduler", beta_schedule="scaled_linear"), sampler="unipc", grid="karras(5)", options=None, seed=4
    )
    scheduler.save_pretrained(tmp_path)
    again: Any = PFODEScheduler.from_pretrained(tmp_path)
    for one in (scheduler, again):
        one.set_timesteps(6)
    assert again.plan == scheduler.plan
    assert again.seed == 4
    ours = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    assert ours == {k: v for k, v in again.config.items() if not k.startswith("_")}
    back = diffusers.DDIMScheduler.from_config(again.config)
    assert back.config.beta_schedule == "scaled_linear"


def test_copies_go_their_own_way():
    scheduler = PFODEScheduler(sampler="unipc")
    scheduler.set_timesteps(6)
    scheduler.step(unit(), scheduler.timesteps[0], unit())
    twin = copy.deepcopy(scheduler)
    assert twin.step_index == 1
    assert twin.index_for_timestep(twin.timesteps[4]) == 4
    rest = [drive(one, lambda x, t: 0.1 * x, unit(), first=1) for one in (scheduler, twin)]
    assert torch.equal(*rest)
    scheduler.set_timesteps(6)
    scheduler.step(unit(), scheduler.timesteps[0], unit())
    twin.set_timesteps(3)
    assert (len(twin.timesteps), len(scheduler.timesteps), scheduler.step_index) == (3, 6, 1)
    other = pickle.loads(pickle.dumps(scheduler))
    other.set_timesteps(6)
    assert torch.equal(other.timesteps, scheduler.timesteps)


def test_pipelines_grids_give_way_to_the_users():
    """Flows get the even sigmas from every pipeline; a grid of ours that was asked for wins, other sigmas do not."""
    scheduler = PFODEScheduler(sampler="euler", grid="karras", **FLOW)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))
    by_grid = scheduler.sigmas
    scheduler.set_timesteps(8)
    assert torch.equal(scheduler.sigmas, by_grid)
    scheduler.set_timesteps(sigmas=[1.0, 0.3, 0.1])
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.3, 0.1, 0.0])


# ---- plan files


def test_a_saved_plan_is_a_sampler(tmp_path):
    process = pfode.VPDiscrete(PFODEScheduler().alphas_cumprod.double())
    plan = make_plan("dpm++2m", process, 5, grid="karras")
    path = str(plan.save(tmp_path / "five.safetensors"))
    scheduler = PFODEScheduler(sampler=path)
    scheduler.set_timesteps(5)
    assert scheduler.plan == plan
    denoiser = bed(scheduler)
    ours = drive(scheduler, network(scheduler, denoiser), unit())
    assert relative(ours, pfode.run(plan, denoiser, unit())) < 2e-6
    with pytest.raises(UsageError, match="its own nodes"):
        scheduler.set_timesteps(timesteps=[900, 500, 300, 200, 100])
    with pytest.raises(UsageError, match="has 5 steps, not 20"):
        scheduler.set_timesteps(20)
    with pytest.raises(UsageError, match="cannot begin with call 2"):
        scheduler.set_begin_index(2)
    with pytest.raises(UsageError, match="was made for VPDiscrete"):
        PFODEScheduler(sampler=path, beta_end=0.012)
    single = str(make_plan("ddim", process, 4, grid="karras").save(tmp_path / "single.safetensors"))
    scheduler = PFODEScheduler(sampler=single)
    scheduler.set_timesteps()
    scheduler.set_begin_index(2)  # its rows look back on nothing
    assert scheduler.step_index is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_may_ask_at_other_times_than_its_nodes(kind, tmp_path):
    """As fitted ones do: the network's output means what it means at the time that the network is told."""
    first = PFODEScheduler(sampler="unipc2", **KINDS[kind])
    first.set_timesteps(5)
    plan = planned(first)
    times = torch.cat([0.97 * plan.t[:1], 0.9 * plan.t[1:-1], plan.t[-1:]])
    path = str(replace(plan, t=times).save(tmp_path / "moved.safetensors"))
    scheduler = PFODEScheduler(sampler=path, **KINDS[kind])
    scheduler.set_timesteps()
    denoiser, x = bed(scheduler), unit()
    wanted = pfode.run(pfode.Plan.load(path), denoiser, x * plan.sigma[0] if kind == "EDM" else x)
    assert relative(drive(scheduler, network(scheduler, denoiser), x), wanted) < 2e-6


# ---- what a pipeline passes on: eta


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++2m-sde", "dpm++3m-sde"])
def test_eta_of_a_call_is_that_of_the_options(name):
    """Pipelines pass it to every step where the signature has it, and 0 where they were not told."""
    assert "eta" in inspect.signature(PFODEScheduler.step).parameters
    made: dict[str, Tensor] = {}
    cases: list[tuple[str, Any, float]] = [
        ("set", {"eta": 0.7}, 0.0),
        ("passed", None, 0.7),
        ("other", {"eta": 0.2}, 0.7),
    ]
    for key, options, eta in cases:
        scheduler = PFODEScheduler(sampler=name, options=options, seed=5)
        scheduler.set_timesteps(7)
        made[key] = drive(scheduler, network(scheduler, bed(scheduler)), unit(), eta=eta)
    assert torch.equal(made["set"], made["passed"])
    assert torch.equal(made["set"], made["other"])


def test_an_eta_that_changes_begins_anew_with_it():
    """What earlier rows left for later ones was meant for another eta."""
    made = []
    for first in (0.7, 0.3):
        scheduler = PFODEScheduler(sampler="dpm++3m-sde", seed=5)
        scheduler.set_timesteps(7)
        call, y = network(scheduler, bed(scheduler)), unit()
        for t in scheduler.timesteps[:3] if first == 0.7 else ():
            scheduler.step(call(y, t), t, y, eta=first)
        for t in scheduler.timesteps[3:]:
            y = scheduler.step(call(y, t), t, y, eta=0.3).prev_sample
        made.append(y)
    assert torch.equal(*made)


def test_an_eta_of_0_is_that_of_the_recipe():
    scheduler = PFODEScheduler(sampler="ddpm", seed=5)
    scheduler.set_timesteps(7)
    call = network(scheduler, bed(scheduler))
    assert torch.equal(drive(scheduler, call, unit()), drive(scheduler, call, unit(), eta=0.0))


@pytest.mark.parametrize("name", ["unipc", "auto", "dpm++2m", "heun"])
def test_an_eta_that_a_recipe_has_not_is_refused(name):
    scheduler = PFODEScheduler(sampler=name)
    scheduler.set_timesteps(7)
    with pytest.raises(UsageError, match="takes no eta"):
        scheduler.step(unit(), scheduler.timesteps[0], unit(), eta=1.0)


def test_an_eta_that_moves_the_timesteps_is_refused():
    scheduler = PFODEScheduler(sampler="dpm++2s-a")
    scheduler.set_timesteps(7)
    with pytest.raises(UsageError, match="the timesteps of dpm\\+\\+2s-a depend on eta"):
        scheduler.step(unit(), scheduler.timesteps[0], unit(), eta=0.5)


@pytest.mark.parametrize("eta", [-1.0, float("nan"), "1"])
def test_an_eta_that_is_none_is_refused(eta):
    scheduler = PFODEScheduler(sampler="ddim")
    scheduler.set_timesteps(7)
    with pytest.raises(UsageError, match="eta"):
        scheduler.step(unit(), scheduler.timesteps[0], unit(), eta=eta)


# ---- networks and pipelines that use their memory again


@pytest.mark.parametrize("kind", ["VP", "Flow", "x0"])
@pytest.mark.parametrize("name", [name for name, found in CATALOGUE.items() if found.order > 1])
def test_a_network_may_write_over_its_last_output(name, kind):
    """As replayed CUDA graphs and engines with bound outputs do; a pipeline may as well keep its latents in place."""
    config: dict[str, Any] = {"prediction_type": "sample"} if kind == "x0" else KINDS[kind]
    scheduler = PFODEScheduler(sampler=name, seed=5, **config)
    scheduler.set_timesteps(7)
    call = network(scheduler, bed(scheduler))
    wanted = drive(scheduler, call, unit())
    buffer, latents = unit(), unit()
    for t in scheduler.timesteps:
        buffer.copy_(call(latents, t))
        latents.copy_(scheduler.step(buffer, t, latents, return_dict=False)[0])
    assert torch.equal(latents, wanted)


# ---- what cannot be done


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"grid": "karas"}, "unknown grid 'karas'"),
        ({"grid": "karras(1,2,3)"}, "grid karras: got 3 parameters"),
        ({"grid": "nonsense", **FLOW}, "unknown grid"),
        ({"grid": "ays-sd15", **EDM}, "unknown grid"),
        ({"grid": [3.0, 1.0]}, "grid: need a name as text"),
        ({"chart": "dmp"}, "unknown chart"),
        ({"sampler": "ddim", "chart": "dpm++"}, "unknown chart for ddim"),
        ({"sampler": "ddim", "options": {"tau": 1.0}}, "ddim takes no tau"),
        ({"sampler": "ddim", "options": {"eta": "much"}}, "eta"),
        ({"sampler": "ddim", "options": {"etta": 1.0}}, "unknown option 'etta'"),
        ({"options": [1.0]}, "options: need a dict"),
        ({"timestep_spacing": "even"}, "unknown timestep_spacing"),
        ({"final_sigmas_type": "none"}, "unknown final_sigmas_type"),
        ({"sigma_schedule": "line", **EDM}, "unknown sigma_schedule"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "more than one"),
        ({"shift": 2.0, "flow_shift": 3.0, **FLOW}, "shift and flow_shift differ"),
        ({"seed": -1}, "seed"),
        ({"seed": [1, "two"]}, "seed"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_a_wrong_config_is_refused_when_it_is_made(config: dict[str, Any], words: str):
    """Not when the pipeline runs, after the text encoders and with the network in memory."""
    with pytest.raises(UsageError, match=words):
        PFODEScheduler(**config)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=words):
        PFODEScheduler.from_config(diffusers.DDIMScheduler().config, **config)


@pytest.mark.parametrize(
    ("config", "call", "words"),
    [
        ({"sampler": "unipcc"}, {}, "unknown sampler"),
        ({"sampler": "rk45"}, {}, "rk45 is adaptive"),
        ({"sampler": Path("six.safetensors")}, {}, "as text, got "),
        ({"grid": "karas"}, {}, "unknown grid"),
        ({"prediction_type": "noise"}, {}, "unknown prediction_type"),
        ({"prediction_type": "flow_prediction"}, {}, "needs a flow"),
        ({"beta_schedule": "cosine"}, {}, "beta_schedule: expected one of linear, "),
        ({"trained_betas": [1e-4, 0.02]}, {}, "2 values for num_train_timesteps = 1000"),
        ({"timestep_spacing": "even"}, {}, "unknown timestep_spacing"),
        ({"final_sigmas_type": "none"}, {}, "unknown final_sigmas_type"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, {}, "more than one"),
        ({"rescale_betas_zero_snr": True}, {}, "says nothing about the data"),
        ({"sampler": "ddim", "options": {"tau": 1.0}}, {}, "ddim takes no tau"),
        ({"shift": 2.0, "flow_shift": 3.0, **FLOW}, {}, "shift and flow_shift differ"),
        ({"sigma_data": 0.5, "prediction_type": "sample"}, {}, "have epsilon or v_prediction"),
        ({"use_dynamic_shifting": True, "time_shift_type": "cubic", **FLOW}, {"mu": 1.0}, "unknown time_shift_type"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps"),
        ({}, {"num_inference_steps": None}, "neither a number of steps nor nodes"),
        ({}, {"num_inference_steps": 5, "timesteps": [900, 500]}, "2 nodes are given"),
        ({}, {"num_inference_steps": None, "timesteps": [900], "sigmas": [2.0]}, "exclude each other"),
        ({}, {"num_inference_steps": None, "sigmas": [1.0, 0.0, 0.5]}, "only the last may be 0"),
        ({}, {"num_inference_steps": None, "timesteps": [1200, 500]}, "leave the range"),
    ],
)
def test_errors_say_what_is_wrong(config, call, words):
    with pytest.raises(UsageError, match=words):
        PFODEScheduler(**config).set_timesteps(**{"num_inference_steps": 4, **call})


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({"_class_name": "CogVideoXDDIMScheduler"}, {}, "CogVideoXDDIMScheduler: its models"),
        ({"_class_name": "DDIMScheduler", "magic": 3}, {}, "magic = 3 has no meaning here"),
        ({"_class_name": "FlowMatchLCMScheduler", "scale_factors": [1, 2]}, {}, "scale_factors = "),
        ({"_class_name": "DDIMScheduler"}, {"smapler": "ddim"}, "unknown key .* 'smapler'"),
    ],
)
def test_what_a_config_asks_for_and_is_not_there(config, options, words):
    with pytest.raises(UsageError, match=words):
        PFODEScheduler.from_config(config, **options)


def test_before_timesteps_are_set():
    scheduler = PFODEScheduler()
    assert scheduler.timesteps.tolist() == [*range(999, -1, -1)]
    assert scheduler.step_index is scheduler.begin_index is scheduler.num_inference_steps is scheduler.plan is None
    assert len(scheduler) == len(scheduler.sigmas) - 1 == 1000
    with pytest.raises(UsageError, match="no timesteps"):
        scheduler.step(unit(), 0, unit())


def test_the_module_is_what_the_package_names():
    assert pfode.samplers.PFODEScheduler is module.PFODEScheduler
