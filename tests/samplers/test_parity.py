"""Equality with the published algorithm and with the peers' own code, on the same denoiser, grid and noise."""

import itertools

import numpy as np
import pytest
import torch

import pfode
from pfode import run
from pfode.samplers import CATALOGUE, make_plan
from tests import peers, problems

SEEDS = list(range(4))


def bed() -> tuple[problems.GaussianMixture, torch.Tensor]:
    denoiser = problems.mixture(pfode.EDM())
    return denoiser, 80 * pfode.noise.normal(SEEDS, 0, (2,), torch.float64)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def karras(steps: int) -> torch.Tensor:
    """Equation 5 of Karras et al. 2022, with the 0 appended."""
    i = torch.arange(steps, dtype=torch.float64)
    sigmas = (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


def edm_heun(denoiser, x, sigmas):
    """Algorithm 1 of Karras et al. 2022, from the formulas."""
    for t0, t1 in itertools.pairwise(sigmas):
        d = (x - denoiser(x, t0)) / t0
        euler = x + (t1 - t0) * d
        if t1 == 0:
            x = euler
        else:
            x = x + (t1 - t0) * 0.5 * (d + (euler - denoiser(euler, t1)) / t1)
    return x


@pytest.mark.parametrize("steps", [2, 5, 18])
def test_heun_is_edms_algorithm(steps):
    denoiser, x = bed()
    ours = run(make_plan("heun", denoiser.process, steps, grid="karras"), denoiser, x)
    assert relative(ours, edm_heun(denoiser, x, karras(steps))) < 1e-12


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("euler", "sample_euler"),
        ("heun", "sample_heun"),
        ("dpm++2m", "sample_dpmpp_2m"),
        ("euler-a", "sample_euler_ancestral"),
    ],
)
def test_k_diffusion(name, peer, steps):
    denoiser, x = bed()
    sigmas = karras(steps)
    options = {}
    if CATALOGUE[name].stochastic:
        row = iter(range(steps))
        options["noise_sampler"] = lambda *_: pfode.noise.normal(SEEDS, next(row) + 1, (2,), torch.float64)
    theirs = getattr(peers.k_diffusion_sampling(), peer)(denoiser, x, sigmas, disable=True, **options)
    ours = run(make_plan(name, denoiser.process, grid=sigmas), denoiser, x, seeds=SEEDS)
    assert relative(ours, theirs) < 1e-10


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers under numpy 2
@pytest.mark.parametrize("steps", [4, 10, 25])
def test_diffusers_dpm_plus_plus_2m(steps):
    """On diffusers' own sigmas (kept in float32): an epsilon model, VP state."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000, use_karras_sigmas=True, lower_order_final=False, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    process = pfode.VPDiscrete(scheduler.alphas_cumprod.double())
    denoiser = problems.mixture(process)
    sigmas = scheduler.sigmas.double()
    times = process.time(-2 * torch.log(sigmas[:-1])).clamp(0, 999)
    x = pfode.noise.normal(SEEDS, 0, (2,), torch.float64)
    ours = run(make_plan("dpm++2m", process, grid=[*times.tolist(), process.t_data]), denoiser, x)
    y = x
    for t, now in zip(scheduler.timesteps, times, strict=True):
        eps = (y - process.alpha(now) * denoiser(y, now)) / process.sigma(now)
        (y,) = scheduler.step(eps, t, y, return_dict=False)
    assert relative(ours, y.double()) < 1e-5


def test_ipndm_constant_weights_by_hand():
    """Four rows of iPNDM on a given grid, from the formula x += (s' - s) sum_j w_j d_j."""
    denoiser, x = bed()
    sigmas = [80.0, 30.0, 9.0, 2.0, 0.3]
    weights = [[1.0], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    y, past = x, []
    for s0, s1, w in zip(sigmas, sigmas[1:], weights, strict=False):
        past.insert(0, (y - denoiser(y, torch.tensor(s0, dtype=torch.float64))) / s0)
        y = y + (s1 - s0) * sum(a * d for a, d in zip(w, past, strict=False))
    ours = run(make_plan("ipndm4", denoiser.process, grid=sigmas), denoiser, x)
    assert relative(ours, y) < 1e-13


def test_ddpm_is_the_posterior():
    """One row of ddpm against q(x_s | x_t, x_0) of a VP process (Ho et al. 2020, eq. 6-7)."""
    process = pfode.VP()
    t, s = 0.7, 0.5
    a_t, a_s = process.alpha(t) ** 2, process.alpha(s) ** 2
    plan = make_plan("ddpm", process, grid=[t, s])
    beta = 1 - a_t / a_s
    mean_x0, mean_x = np.sqrt(a_s) * beta / (1 - a_t), np.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t)
    x = torch.tensor([[1.7]], dtype=torch.float64)

    class Constant:
        def __init__(self):
            self.process = process

        def __call__(self, x, t, **cond):
            return torch.full_like(x, 0.4)

    noise = pfode.noise.normal([5], 1, (1,), torch.float64)
    expected = mean_x0 * 0.4 + mean_x * x + np.sqrt(beta * (1 - a_s) / (1 - a_t)) * noise
    assert torch.allclose(run(plan, Constant(), x, seeds=[5]), expected, rtol=1e-13)
