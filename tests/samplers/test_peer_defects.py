"""Where a peer is wrong, or has no pair in test_parity.py: its error measured, and ours beside it.

On a Gaussian every sampler is an affine map of the initial state and the noises drawn, so mean and deviation at the end
are known without sampling.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

import pfode
from pfode import iterate, run
from pfode.errors import UsageError
from pfode.grids import times as lay
from pfode.plans.table import Plan
from pfode.process import Process
from pfode.samplers import make_plan
from pfode.scores.exact import Gaussian
from tests import peers, problems

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # diffusers under numpy 2
    pytest.mark.filterwarnings("ignore:`algorithm_type:FutureWarning"),  # what it deprecates is looked at, too
]

MEAN, STD = 0.7, 0.4
MULTI, SINGLE, EDM_MULTI = "dpmsolver_multistep", "dpmsolver_singlestep", "edm_dpmsolver_multistep"
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SDE = {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min", "lower_order_final": False}


def gaussian(process: Process) -> Gaussian:
    return Gaussian([MEAN], torch.tensor([STD**2], dtype=torch.float64), process=process)


Sampler = Callable[[Tensor, peers.Draw], Tensor]


class Ends(NamedTuple):
    """Errors of mean and standard deviation at the end, begun with the exact ones."""

    mean: float
    std: float


def ends(sampler: Sampler, process: Process, first: float, last: float, draws: int) -> Ends:
    """Of a sampler: the states, shape (batch, 1), at the last time, from those at the first and the numbered noises."""
    x = torch.zeros(draws + 2, 1, dtype=torch.float64)
    x[1] = 1
    unit = torch.eye(draws + 2, dtype=torch.float64)
    offset, moved, *noise = sampler(x, lambda draw: unit[draw + 1, :, None]).flatten().tolist()
    gain, start = moved - offset, process.alpha(first)
    variance = (gain * math.hypot(start * STD, process.sigma(first))) ** 2 + sum((c - offset) ** 2 for c in noise)
    mean, std = process.alpha(last) * MEAN, math.hypot(process.alpha(last) * STD, process.sigma(last))
    return Ends(offset + gain * start * MEAN - mean, math.sqrt(variance) - std)


def ours(plan: Plan) -> Ends:
    """Of a plan."""
    denoiser = gaussian(plan.process)

    def sampler(x: Tensor, draw: peers.Draw) -> Tensor:
        with mock.patch.object(pfode.noise, "normal", lambda seeds, number, *_: draw(number)):
            return run(plan, denoiser, x, seeds=range(len(x)))

    return ends(sampler, plan.process, plan.first[0].item(), plan.time[-1].item(), plan.nfe + 1)


def theirs(scheduler: peers.Scheduler, **options: Any) -> Ends:
    """Of a scheduler of diffusers, with options of its step."""
    denoiser, times = gaussian(scheduler.process), scheduler.times()

    def sampler(x: Tensor, draw: peers.Draw) -> Tensor:
        return scheduler.sample(denoiser, x, draw, **options)

    return ends(sampler, scheduler.process, times[0], times[-1], len(scheduler.inner.timesteps))


def on_grid(scheduler: peers.Scheduler, levels: Sequence[float]) -> peers.Scheduler:
    """The scheduler on these sigma/alpha, in float64."""
    scheduler.inner.sigmas = torch.tensor(levels, dtype=torch.float64)
    scheduler.inner.timesteps = torch.zeros(len(levels) - 1, dtype=torch.int64)
    return scheduler


def levels(n: int) -> list[float]:
    """n + 1 of them between two interior ones, smoothly uneven."""
    return problems.interior_grid(pfode.EDM(), n)


def slope(errors: Sequence[float]) -> float:
    """log2 of the mean fall per doubling."""
    return math.log2(abs(errors[0] / errors[-1])) / (len(errors) - 1)


# ---- k-diffusion


@pytest.mark.parametrize("order", ["2m", "3m"])
def test_k_diffusion_sde_multistep_crashes_at_one_step(order):
    denoiser, x = gaussian(pfode.EDM()), torch.full((1, 1), 80.0, dtype=torch.float64)
    sampler = getattr(peers.k_diffusion_sampling(), f"sample_dpmpp_{order}_sde")
    with pytest.raises(UnboundLocalError):
        sampler(denoiser, x, torch.tensor([80.0, 0.0]), disable=True, noise_sampler=lambda *_: x)
    plan = make_plan(f"dpm++{order}-sde", denoiser.process, grid=[80.0, 0.0])
    assert torch.allclose(run(plan, denoiser, x, seeds=[0]), denoiser(x, torch.tensor(80.0, dtype=torch.float64)))


@pytest.mark.parametrize(("name", "peer"), [("euler", "euler"), ("heun", "heun"), ("dpm2", "dpm_2")])
def test_k_diffusion_draws_noise_where_none_is_used(name, peer):
    """With churn = 0: the caller's random numbers afterwards are others."""
    denoiser, x = gaussian(pfode.EDM()), torch.ones(1, 1, dtype=torch.float64)
    before = torch.get_rng_state()
    run(make_plan(name, denoiser.process, 4), denoiser, x)
    assert torch.equal(torch.get_rng_state(), before)
    getattr(peers.k_diffusion_sampling(), f"sample_{peer}")(denoiser, x, torch.tensor([80.0, 1.0, 0.0]), disable=True)
    assert not torch.equal(torch.get_rng_state(), before)


def test_k_diffusion_adaptive_samples_depend_on_their_batch():
    """One error norm for all; a plan's samples are those of any batch."""
    denoiser = problems.mixture(pfode.EDM())
    x = 80 * pfode.noise.normal(range(4), 0, (2,), torch.float64)
    adaptive = peers.k_diffusion_sampling().sample_dpm_adaptive
    alone, among = (adaptive(denoiser, part, 0.02, 80.0, disable=True)[:1] for part in (x[:1], x))
    assert (alone - among).abs().max() > 1e-6
    plan = make_plan("dpm-3s", denoiser.process, 10)
    assert torch.equal(run(plan, denoiser, x[:1]), run(plan, denoiser, x)[:1])


def test_k_diffusion_3m_sde_without_noise_has_order_2():
    """It halves the curvature (and so does dpm++3m-sde, its pair); the exact interpolant has order 3."""
    peer, counts = peers.k_diffusion_sampling().sample_dpmpp_3m_sde, (32, 64, 128)
    denoiser, grid, states = problems.finest("mixture", "EDM", 128)
    their_errors, our_errors = [], []
    for n in counts:
        times, exact = grid[:: 128 // n], states[:: 128 // n]
        out = peer(denoiser, exact[0], torch.tensor(times), eta=0.0, disable=True, noise_sampler=lambda *_: 0)
        their_errors.append(problems.rms(out, exact[-1]))
        points = iterate(make_plan("dpm++3m-exact", denoiser.process, grid=times), denoiser, exact[0])
        point = next(points)
        point = points.send(exact[1])
        point = points.send(exact[2])
        for later in points:
            point = later
        our_errors.append(problems.rms(point.x, exact[-1]))
    assert slope(their_errors) == pytest.approx(2, abs=0.25)
    assert slope(our_errors) == pytest.approx(3, abs=0.25)


# ---- diffusers: formulas


@pytest.mark.parametrize(("name", "config", "every"), [(MULTI, {}, 1), (SINGLE, {"solver_type": "heun"}, 3)])
def test_diffusers_third_order_sde_has_order_1(name, config, every):
    """sde-dpmsolver++ of order 3: 0.5 is subtracted from the weight of D'' where it should be added.

    With H = 2h that weight is (1 - e^-H - H)/H^2 + 1/2 = H/6 + ..., theirs is H/6 - 1 + ... Here D is sin(lambda)
    whatever x is and the noise is 0, so what is left is the quadrature of 2 e^(2 lambda) D.
    """
    their_errors, our_errors = [], []
    for n in (24, 48, 96):
        scheduler = on_grid(peers.Scheduler(name, n, solver_order=3, **SDE, **config), levels(n))
        denoiser, times = Wave(scheduler.process), scheduler.times(every)
        a, b = (0.5 * denoiser.process.log_snr(t) for t in (times[0], times[-1]))
        integral = 0.4 * (
            math.exp(2 * b) * (2 * math.sin(b) - math.cos(b)) - math.exp(2 * a) * (2 * math.sin(a) - math.cos(a))
        )
        exact = denoiser.process.alpha(times[-1]) * math.exp(-2 * b) * integral
        start = torch.zeros(1, 1, dtype=torch.float64)
        their_errors.append(scheduler.sample(denoiser, start).item() - exact)
        plan = make_plan("dpm++3m-sde", denoiser.process, grid=scheduler.times())
        with mock.patch.object(pfode.noise, "normal", return_value=start):
            our_errors.append(run(plan, denoiser, start, seeds=[0]).item() - exact)
    assert slope(their_errors) == pytest.approx(1, abs=0.25)
    assert slope(our_errors) > 1.75


class Wave:
    """A denoiser that says sin(log(alpha/sigma))."""

    def __init__(self, process: Process):
        self.process = process

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return torch.sin(0.5 * self.process.log_snr(t)).expand_as(x)


def test_diffusers_edm_third_order_sde_crashes():
    scheduler = peers.Scheduler(EDM_MULTI, 50, solver_order=3, algorithm_type="sde-dpmsolver++")
    with pytest.raises(UnboundLocalError):
        theirs(scheduler)
    end = ours(make_plan("dpm++3m-sde", scheduler.process, grid=scheduler.times()))
    assert abs(end.mean) < 1e-3
    assert abs(end.std) < 0.1


def test_diffusers_unipc_bh1_ends_in_nan():
    """With its default last sigma, 0: B = -infinity times no correction."""
    scheduler = peers.Scheduler("unipc_multistep", 10, solver_type="bh1")
    assert math.isnan(theirs(scheduler).mean)
    end = ours(make_plan("unipc2-bh1", scheduler.process, grid=scheduler.times(), lower_order_final=True))
    assert abs(end.mean) < 0.01
    assert abs(end.std) < 0.1


@pytest.mark.parametrize(("name", "algorithm"), [("dpm-3s", "dpmsolver"), ("dpm++3s", "dpmsolver++")])
def test_diffusers_singlestep_third_order_is_another_one(name, algorithm):
    """DPM-Solver-3 has the inner state of solver_type heun and the end of midpoint. All have order 3."""
    errors: dict[str, list[float]] = {"ours": [], "midpoint": [], "heun": []}
    for n in (12, 24, 48):
        for solver_type in ("midpoint", "heun"):
            config = {"algorithm_type": algorithm, "solver_type": solver_type, "final_sigmas_type": "sigma_min"}
            scheduler = on_grid(peers.Scheduler(SINGLE, n, solver_order=3, **config), levels(n))
            errors[solver_type].append(theirs(scheduler).std)
        errors["ours"].append(ours(make_plan(name, scheduler.process, grid=scheduler.times(3))).std)
    for kind in errors.values():
        assert slope(kind) > 2.7


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize(
    ("name", "recipe", "config"),
    [("deis_multistep", "exp-ab2", {}), ("sasolver", "sa-solver2", {"tau_func": lambda t: 0})],
)
def test_diffusers_flow_grids_that_never_reach_0(name, recipe, config, steps):
    """The last sigma is there twice: an evaluation for nothing, and noise and a shrunken mean are left."""
    scheduler = peers.Scheduler(name, steps, **FLOW, **config)
    left = scheduler.inner.sigmas[-1].item()
    assert scheduler.inner.sigmas[-2] == left > 0.9 / steps
    end = scheduler.sample(gaussian(scheduler.process), torch.zeros(1, 1, dtype=torch.float64)).item()
    assert end == pytest.approx((1 - left) * MEAN, abs=2e-3)
    options: dict[str, Any] = {"tau": 0.0} if recipe == "sa-solver2" else {"chart": "dpm"}
    plan = make_plan(recipe, scheduler.process, grid=[*scheduler.times(), 0.0], **options)
    assert abs(ours(plan).mean) < 1e-3


@pytest.mark.parametrize("steps", [10, 30, 100])
def test_diffusers_ddim_moves_to_other_times_than_it_evaluates_at(steps):
    """Spacing linspace: steps of 1000 // N indices between evaluations 999 / (N - 1) apart."""
    scheduler = peers.Scheduler("ddim", steps, clip_sample=False, timestep_spacing="linspace")
    plan = make_plan("ddim", scheduler.process, grid=scheduler.times())
    assert abs(theirs(scheduler).mean) > 30 * abs(ours(plan).mean)


def test_diffusers_ddim_leaves_noise():
    """Spacing trailing where N does not divide 1000: the last step ends at index 0 or more, not at clean data."""
    scheduler = peers.Scheduler("ddim", 15, clip_sample=False, timestep_spacing="trailing")
    assert scheduler.inner.timesteps[-1] - 1000 // 15 >= 0
    plan = make_plan("ddim", scheduler.process, grid=scheduler.times())
    assert abs(theirs(scheduler).mean) > 5 * abs(ours(plan).mean)


def test_diffusers_ipndm_ignores_its_first_output():
    """It begins at alpha = 0, where x0 is taken as (x - eps)/1e-8 = 0."""
    scheduler = peers.Scheduler("ipndm", 10)
    x = torch.ones(1, 1, dtype=torch.float64)
    first, second = scheduler.times()[:2]
    ends = [
        peers.Scheduler("ipndm", 10).inner.step(output, scheduler.inner.timesteps[0], x, return_dict=False)[0]
        for output in (-0.7 * x, 0.7 * x)
    ]
    assert torch.equal(*ends)
    denoiser = gaussian(scheduler.process)
    exact = denoiser.flow(x, first, second)
    end = run(make_plan("ipndm4", scheduler.process, grid=[first, second]), denoiser, x)
    assert (end - exact).abs() < 0.1 * (ends[0] - exact).abs()


def test_diffusers_euler_churn_is_evaluated_before_the_noise():
    """Algorithm 2 of Karras et al. evaluates at the noised state, a pipeline before `step` adds the noise.

    Given what it should have seen, it is right.
    """
    scheduler = peers.Scheduler("euler_discrete", 20, use_karras_sigmas=True)
    process, inner, times = scheduler.process, scheduler.inner, scheduler.times()
    plan = make_plan("euler", process, grid=times, churn=16.0, s_tmax=100.0)
    assert abs(theirs(scheduler, s_churn=16.0, s_tmax=100.0).std - ours(plan).std) > 0.1 * STD

    inner.set_timesteps(20)
    denoiser, seeds = problems.mixture(process), range(4)
    x = pfode.noise.normal(seeds, 0, (2,), torch.float64)
    y = x * (inner.sigmas[0].double() ** 2 + 1).sqrt()
    for i, t in enumerate(inner.timesteps):
        noise = pfode.noise.normal(seeds, i or plan.nfe + 1, (2,), torch.float64)
        level = inner.sigmas[i].double()
        noised = level * (1 + (min(16 / 20, math.sqrt(2) - 1) if level <= 100 else 0))
        y_noised = y + (noised**2 - level**2).sqrt() * noise
        at = process.time(-2 * noised.log()).clamp(process.t_min, process.t_max)
        eps = (y_noised - denoiser(y_noised * process.alpha(at), at)) / noised
        with mock.patch.object(scheduler.module, "randn_tensor", return_value=noise):
            inner.scale_model_input(y, t)
            y = inner.step(eps, t, y, s_churn=16.0, s_tmax=100.0, return_dict=False)[0].double()
    assert torch.allclose(run(plan, denoiser, x, seeds), y, rtol=1e-5, atol=1e-5)


def test_diffusers_flow_churn():
    """FlowMatchHeun adds noise and leaves the data unshrunken, on no level of the process. FlowMatchEuler adds none."""
    plain, churned = ((peers.Scheduler("flow_match_euler_discrete", 10), {"s_churn": c}) for c in (0.0, 5.0))
    assert theirs(plain[0], **plain[1]) == theirs(churned[0], **churned[1])
    for steps in (20, 40, 80):
        scheduler = peers.Scheduler("flow_match_heun_discrete", steps)
        assert theirs(scheduler, s_churn=5.0, s_tmax=0.9).mean > 0.2  # at any number of steps
        end = ours(make_plan("heun", scheduler.process, grid=scheduler.times(), chart="flow", churn=5.0, s_tmax=9.0))
        assert abs(end.mean) < 1e-9
        assert abs(end.std) < 0.1 / steps


def test_diffusers_sde_dpmsolver_is_euler_maruyama():
    """It adds sqrt(s_0^2 - s_1^2) of noise to y = x/alpha, more than belongs to s_1: no use at few steps.

    So it has no pair; ddpm, of the same order, takes as much of the old noise away as it adds.
    """
    errors, own = {}, {}
    for n in (4, 25, 100):
        config = {"solver_order": 1, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}
        scheduler = peers.Scheduler(MULTI, n, **config)
        errors[n] = abs(theirs(scheduler).std)
        own[n] = abs(ours(make_plan("ddpm", scheduler.process, grid=scheduler.times())).std)
    assert errors[4] > 10
    assert own[4] < STD
    assert slope([errors[25], 0, errors[100]]) == pytest.approx(1, abs=0.3)
    assert slope([own[25], 0, own[100]]) == pytest.approx(1, abs=0.3)


# ---- diffusers: grids, times, seeds


def test_diffusers_shift_is_applied_twice():
    """FlowMatchEuler's set_timesteps begins with sigmas that the constructor has shifted already."""
    scheduler = peers.Scheduler("flow_match_euler_discrete", 1000, shift=3.0)
    constructed = type(scheduler.inner)(shift=3.0).sigmas
    assert scheduler.inner.sigmas[-2] > 2.9 * constructed[-1]
    assert lay(pfode.Flow(shift=3.0), "time", 1000)[-2] == pytest.approx(constructed[-1].item(), rel=1e-5)


def test_diffusers_keeps_the_shift_of_an_earlier_call():
    config = {"use_dynamic_shifting": True, **FLOW}
    inner = peers.Scheduler(MULTI, 5, **config).inner
    fresh = inner.sigmas
    inner.set_timesteps(5, mu=1.0)
    inner.set_timesteps(5)
    assert not torch.equal(inner.sigmas, fresh)
    once = make_plan("dpm++2m", pfode.Flow(), 5)
    make_plan("dpm++2m", pfode.Flow(shift=math.e), 5)
    assert make_plan("dpm++2m", pfode.Flow(), 5) == once


@pytest.mark.parametrize("name", ["euler_discrete", MULTI, SINGLE, "unipc_multistep", "deis_multistep"])
def test_diffusers_evaluates_twice_at_sigma_min(name):
    """Karras sigmas that end at sigma_min: the last step goes nowhere."""
    config: dict[str, Any] = {} if name == "deis_multistep" else {"final_sigmas_type": "sigma_min"}
    scheduler = peers.Scheduler(name, 10, use_karras_sigmas=True, **config)
    assert torch.allclose(scheduler.inner.sigmas[-1], scheduler.inner.sigmas[-2], rtol=1e-6)
    plan = make_plan("euler", scheduler.process, 10, grid="karras", final="stop")
    assert plan.time[-1] == scheduler.process.t_min
    assert (plan.sigma / plan.alpha).log().diff().max() < -0.1


def test_diffusers_accepts_sigmas_that_rise():
    inner = peers.Scheduler("flow_match_euler_discrete", 3).inner
    inner.set_timesteps(sigmas=[1.0, 0.2, 0.6])
    assert inner.sigmas.diff().max() > 0
    with pytest.raises(UsageError, match="must fall"):
        make_plan("euler", pfode.Flow(), grid=[1.0, 0.2, 0.6, 0.0])


@pytest.mark.parametrize("name", [MULTI, "unipc_multistep", "deis_multistep", "sasolver"])
def test_diffusers_truncates_flow_times(name):
    """The network is told an integer below 1000 sigma."""
    scheduler = peers.Scheduler(name, 7, **FLOW)
    told = scheduler.inner.timesteps / 1000
    assert (scheduler.inner.sigmas[:-1] - told).max() > 5e-4
    plan = make_plan("dpm++2m", scheduler.process, grid=scheduler.times())
    assert torch.equal(plan.t, plan.sigma[:-1])


def test_diffusers_loses_count_where_a_timestep_is_there_twice():
    """A loop that begins there steps beyond the end, unless the pipeline says set_begin_index."""
    scheduler = peers.Scheduler(MULTI, 100, use_karras_sigmas=True, beta_schedule="scaled_linear", beta_end=0.012)
    inner = scheduler.inner
    first = int((inner.timesteps.diff() == 0).nonzero()[0])
    inner._begin_index = None
    x = torch.zeros(1, 1)
    for t in inner.timesteps[first:-1]:
        x = inner.step(x, t, x, return_dict=False)[0]
    with pytest.raises(IndexError):
        inner.step(x, inner.timesteps[-1], x)
    times = scheduler.times()[first:]
    assert make_plan("dpm++2m", scheduler.process, grid=times).steps == 100 - first


def test_diffusers_samples_depend_on_their_batch():
    """With one generator; here every sample has its seed."""
    scheduler = peers.Scheduler("ddpm", 10, clip_sample=False)
    x = torch.zeros(2, 1)
    alone, among = (
        scheduler.inner.step(part, scheduler.inner.timesteps[0], part, torch.Generator().manual_seed(1)).prev_sample[-1]
        for part in (x[1:], x)
    )
    assert not torch.equal(alone, among)
    plan = make_plan("ddpm", scheduler.process, grid=scheduler.times())
    denoiser = gaussian(scheduler.process)
    assert torch.equal(run(plan, denoiser, x, seeds=[1, 2])[1:], run(plan, denoiser, x[1:], seeds=[2]))


@pytest.mark.filterwarnings("ignore")  # deprecated
def test_edms_ramp_is_nan_at_one_step():
    """i / (N - 1): NVlabs' sampler and diffusers' KarrasVe."""
    module = importlib.import_module("diffusers.schedulers.deprecated.scheduling_karras_ve")
    inner = module.KarrasVeScheduler()
    inner.set_timesteps(1)
    assert inner.schedule.isnan().all()
    assert torch.isfinite(run(make_plan("heun", pfode.EDM(), 1), gaussian(pfode.EDM()), torch.ones(1, 1))).all()
