"""Options of plans that concern every recipe: the analytical first step, Brownian noise, a recipe's own numbers."""

import pytest
import torch

import pfode
from pfode import run
from pfode.errors import UsageError
from pfode.samplers import CATALOGUE, make_plan
from tests import problems

ONE_CALL = [n for n, r in CATALOGUE.items() if r.nfe_per_step == 1 and not r.stochastic and n not in ("pndm",)]


class FirstAnalytical:
    """A denoiser whose first call is that of Gaussian data of mean 0."""

    def __init__(self, denoiser, std):
        self.denoiser, self.std, self.process, self.calls = denoiser, std, denoiser.process, 0

    def __call__(self, x, t, **cond):
        self.calls += 1
        if self.calls > 1:
            return self.denoiser(x, t)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * x


@pytest.mark.parametrize("process", problems.PROCESSES)
@pytest.mark.parametrize("name", ONE_CALL)
def test_the_analytical_first_step_is_a_call_less(name, process):
    denoiser = problems.mixture(problems.PROCESSES[process])
    full, free = (make_plan(name, denoiser.process, 7, afs=afs) for afs in (None, 0.8))
    assert free.nfe == full.nfe - 1
    assert torch.equal(free.first, full.first)
    x = full.first[2] * pfode.noise.normal(range(8), 0, (2,), torch.float64)
    expected = run(full, FirstAnalytical(denoiser, 0.8), x)
    assert torch.allclose(run(free, denoiser, x), expected, rtol=1e-9, atol=1e-11)


def test_the_first_step_of_a_model_that_declares_its_data():
    net = pfode.load("digits")
    out = pfode.sample(net, 2, steps=6, afs=True)
    assert out.nfe == 5
    assert torch.equal(out.x, pfode.sample(net, 2, steps=6, afs=net.sigma_data).x)
    with pytest.raises(UsageError, match="afs"):
        pfode.sample(problems.mixture(pfode.EDM()), 2, steps=6, afs=True)
    with pytest.raises(UsageError, match="afs"):
        pfode.sample(net, 2, steps=6, sampler="heun", afs=0.5)


def test_a_free_step_helps():
    """On nearly Gaussian data, at the same number of calls."""
    denoiser = problems.mixture(pfode.EDM())
    x = 80 * pfode.noise.normal(range(64), 0, (2,), torch.float64)
    exact = problems.solution(denoiser, x, [80.0, 2e-3])[-1]
    errors = [
        problems.rms(run(make_plan("ipndm3", denoiser.process, n, final="stop", afs=afs), denoiser, x), exact)
        for n, afs in ((5, None), (6, 0.9))
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", ["euler-a", "dpm++2m-sde", "sa-solver", "er-sde-2", "dpm++sde", "edm"])
def test_brownian_noise_follows_one_path(name):
    """Twice the steps come nearer to the limit of the same path; with fresh noise there is none."""
    denoiser = problems.gaussian(pfode.EDM())
    times = problems.interior_grid(denoiser.process, 512)
    x = problems.start(denoiser, times[0], 64)

    def end(n: int, brownian: bool) -> torch.Tensor:
        return run(
            make_plan(name, denoiser.process, grid=times[:: 512 // n]), denoiser, x, range(64), brownian=brownian
        )

    apart = [problems.rms(end(n, True), end(2 * n, True)) for n in (32, 64, 128)]
    assert apart[0] > apart[1] > apart[2]
    assert apart[2] < 0.15 * problems.rms(end(128, False), end(256, False))


def test_options_belong_to_recipes():
    assert make_plan("heun", pfode.EDM(), 5, churn=10.0, s_tmax=50.0).stochastic
    assert not make_plan("heun", pfode.EDM(), 5).stochastic
    assert make_plan("ddim", pfode.VP(), 5, eta=1.0) == make_plan("ddpm", pfode.VP(), 5)
    plan = make_plan("sa-solver", pfode.VP(), 5, tau=0.5)
    assert plan.meta["tau"] == 0.5
    with pytest.raises(UsageError, match="dpm\\+\\+2m takes no tau"):
        make_plan("dpm++2m", pfode.EDM(), 5, tau=1.0)
    with pytest.raises(UsageError, match="unknown option"):
        make_plan("dpm++2m", pfode.EDM(), 5, chrun=1.0)
    with pytest.raises(UsageError, match="times must fall"):
        make_plan("euler-a", pfode.EDM(), grid=[0.1, 1.0, 10.0])


def test_churn_never_passes_the_noisiest_level():
    for process in problems.PROCESSES.values():
        plan = make_plan("edm", process, 8, churn=100.0)
        assert plan.t.max() <= process.t_max
