"""Full grids: from the very first time to clean data, on every process (docs/design.md, section 3)."""

import pytest
import torch

import pfode
from pfode import run
from pfode.chart import CHARTS
from pfode.errors import UsageError
from pfode.samplers import CATALOGUE, make_plan
from tests import problems

BEDS = {
    "EDM karras to 0": (pfode.EDM(), "karras"),
    "VE karras to 0": (pfode.VE(), "karras"),
    "Flow time from 1": (pfode.Flow(), "time"),
    "Flow karras from 1": (pfode.Flow(), "karras"),
    "Flow shift 3 from 1": (pfode.Flow(shift=3.0), "time"),
    "zero-SNR VP time": (problems.zero_terminal_snr(), "time"),
    "zero-SNR VP karras": (problems.zero_terminal_snr(), "karras"),
    "cosine VP from alpha 0": (pfode.VPCosine(t_max=1.0), "log-snr"),
    "VP time-quadratic": (pfode.VP(), "time-quadratic"),
}


@pytest.mark.parametrize("bed", BEDS)
@pytest.mark.parametrize("name", CATALOGUE)
def test_full_grid_converges(name, bed):
    """Finite at any number of steps, and closer to the exact flow (in law, if stochastic) with more of them."""
    process, grid = BEDS[bed]
    denoiser = problems.gaussian(process)
    seeds = range(256)
    x = process.sigma(process.t_max) * pfode.noise.normal(seeds, 0, (3,), torch.float64)
    exact = denoiser.flow(x, process.t_max, process.t_data)
    errors = []
    for steps in (1, 2, 3, 5, 12, 24, 48):
        end = run(make_plan(name, process, steps, grid=grid), denoiser, x, seeds=seeds)
        assert torch.isfinite(end).all()
        if CATALOGUE[name].stochastic:
            errors.append((end.std(0) - exact.std(0)).abs().max().item())
        else:
            errors.append(problems.rms(end, exact))
    if CATALOGUE[name].stochastic:
        assert errors[-1] < 0.7 * errors[1]
    else:
        floor = 2e-4  # of grids that put a finite log-SNR where alpha = 0: the first interval never shrinks
        if name == "bdia":  # of two parts with opposite signs, which cancel near 12 steps
            assert (errors[3] > 4 * errors[6] and errors[5] > errors[6]) or errors[-1] < floor
        else:
            assert errors[4] > errors[5] > errors[6] or errors[-1] < floor
        assert errors[-1] < 0.06


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("bed", BEDS)
def test_every_chart_survives_the_ends(bed, chart):
    process, grid = BEDS[bed]
    denoiser = problems.gaussian(process)
    x = process.sigma(process.t_max) * pfode.noise.normal(range(16), 0, (3,), torch.float64)
    exact = denoiser.flow(x, process.t_max, process.t_data)
    for name in ("exp-ab3", "heun", "ipndm2"):
        coarse, fine = (
            problems.rms(run(make_plan(name, process, n, grid=grid, chart=chart), denoiser, x), exact)
            for n in (16, 128)
        )
        assert fine < 0.02
        assert fine < 0.5 * coarse


def test_nothing_is_evaluated_outside_the_process():
    for process, grid in BEDS.values():
        for name in CATALOGUE:
            plan = make_plan(name, process, 9, grid=grid)
            assert plan.t.min() >= process.t_min * (1 - 1e-12)
            assert plan.t.max() <= process.t_max
            assert plan.sigma[-1] == 0
            assert plan.alpha[-1] == 1


def test_stop_ends_at_t_min():
    for process, grid in BEDS.values():
        plan = make_plan("exp-ab2", process, 9, grid=grid, final="stop")
        assert plan.time[-1].item() == process.t_min
        assert plan.sigma[-1] > 0
        assert plan.steps == 9


def test_a_given_grid_is_used_exactly():
    times = torch.tensor([70.0, 11.0, 3.0, 0.5, 0.01], dtype=torch.float64)
    plan = make_plan("dpm++2m", pfode.EDM(), grid=times)
    assert torch.equal(plan.times, times)
    plan = make_plan("heun", pfode.Flow(), grid=[1.0, 0.4, 0.0])
    assert plan.times.tolist() == [1.0, 0.4, 0.0]
    assert plan.nfe == 2  # from alpha = 0 one x0 row; the step onto sigma = 0 is one row


def test_a_noise_network_refuses_alpha_zero():
    network = pfode.scores.Denoiser(lambda x, t: x, pfode.Flow(), "eps", shape=(3,))
    with pytest.raises(UsageError, match="alpha = 0"):
        pfode.sample(network, 2)
    assert torch.isfinite(pfode.sample(network, 2, start=0.99, x=torch.randn(2, 3)).x).all()
