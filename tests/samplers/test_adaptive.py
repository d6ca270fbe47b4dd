"""Adaptive samplers: tolerances, independence of the batch, counted calls, the ends, parity with k-diffusion."""

import functools
import math

import pytest
import torch
from torch import Tensor

import pfode
from pfode.errors import UsageError
from pfode.ode import Status
from pfode.samplers.adaptive import ADAPTIVE, AdaptiveRecipe, make_adaptive
from tests import peers, problems

f64 = torch.float64
CHARTED = [(name, chart) for name, row in ADAPTIVE.items() for chart in row.charts]


def noise(denoiser, n: int = 6, t: float | None = None, dtype: torch.dtype = f64) -> Tensor:
    t = denoiser.process.t_max if t is None else t
    return denoiser.process.sigma(t) * pfode.noise.normal(range(n), 0, denoiser.shape, dtype)


@functools.cache
def bed(name: str, process: str):
    """A test bed, states at t_max, and where they go: to t_min exactly, then x = alpha D."""
    denoiser = {"gaussian": problems.gaussian, "mixture": problems.mixture}[name](problems.ALL_PROCESSES[process])
    p, x = denoiser.process, noise(denoiser)
    if name == "gaussian":
        end = denoiser.flow(x, p.t_max, p.t_min)
        return denoiser, x, p.alpha(p.t_data) * denoiser(end, torch.tensor(p.t_min, dtype=f64))
    return denoiser, x, make_adaptive("dopri8", p, rtol=1e-12, atol=1e-13).run(denoiser, x).x


class Watched:
    """A denoiser that keeps the times it was asked at."""

    def __init__(self, denoiser):
        self.denoiser, self.process, self.shape, self.times = denoiser, denoiser.process, denoiser.shape, []

    def __call__(self, x, t, **cond):
        self.times.append(t.double().expand(len(x)))
        return self.denoiser(x, t, **cond)


@pytest.mark.parametrize("process", problems.PROCESSES)
@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_error_falls_with_the_tolerance(name, process):
    tolerances = (1e-2, 1e-3, 1e-4) if ADAPTIVE[name].order == 2 else (1e-2, 1e-4, 1e-6)
    for which in ("gaussian", "mixture"):
        denoiser, x, exact = bed(which, process)
        runs = [make_adaptive(name, denoiser.process, rtol=tol).run(denoiser, x) for tol in tolerances]
        errors = [problems.rms(run.x, exact) for run in runs]
        assert not any(run.failed for run in runs)
        for error, tolerance, times in zip(errors, tolerances, (5, 15, 3), strict=True):
            assert error < times * tolerance
        calls = [run.nfe.double().mean() for run in runs]
        assert calls[0] < calls[1] < calls[2]


@pytest.mark.parametrize(("name", "chart"), CHARTED)
def test_every_chart_leads_to_the_same_place(name, chart):
    for process in ("VPCosine", "SubVP", "VE", "Flow"):
        denoiser, x, exact = bed("gaussian", process)
        run = make_adaptive(name, denoiser.process, rtol=1e-4, chart=chart).run(denoiser, x[:2])
        assert problems.rms(run.x, exact[:2]) < 1e-2
        assert not run.failed


def test_charts_that_are_regular_at_both_ends_are_the_default_for_a_reason():
    """The same error for a third of the calls that the clock sigma/alpha takes."""
    for process in problems.PROCESSES:
        denoiser, x, exact = bed("mixture", process)
        flow, sigma = (make_adaptive("rk45", denoiser.process, rtol=1e-6, chart=c).run(denoiser, x)
                       for c in ("flow", "ddim"))  # fmt: skip
        assert problems.rms(flow.x, exact) < 2e-6
        assert problems.rms(sigma.x, exact) < 4e-6
        assert 3 * flow.nfe.sum() < sigma.nfe.sum()


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("process", problems.PROCESSES)
@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_sample_does_not_depend_on_its_batch_mates(name, process, dtype):
    denoiser = problems.mixture(problems.PROCESSES[process])
    x = noise(denoiser, 6, dtype=dtype)
    sampler = make_adaptive(name, denoiser.process, rtol=1e-3)
    together = sampler.run(denoiser, x)
    far = torch.cat([x[:1], 30 * x[1:]])
    alone = [sampler.run(denoiser, x[i : i + 1]) for i in range(6)]
    assert torch.equal(together.nfe, torch.cat([run.nfe for run in alone]))
    assert len(set(together.nfe.tolist())) > 1
    for one in (torch.cat([run.x for run in alone])[:1], sampler.run(denoiser, far).x[:1]):
        assert (one - together.x[:1]).abs().max() < (1e-12 if dtype == f64 else 1e-5)


@pytest.mark.parametrize("process", problems.ALL_PROCESSES)
@pytest.mark.parametrize("name", ADAPTIVE)
def test_calls_are_counted_and_lie_within_the_times_of_the_process(name, process):
    denoiser = Watched(problems.mixture(problems.ALL_PROCESSES[process]))
    p = denoiser.process
    for final in ("denoise", "stop"):
        sampler = make_adaptive(name, p, final=final, rtol=0.01)
        denoiser.times.clear()
        run = sampler.run(denoiser, noise(denoiser, 1))
        assert run.nfe.item() == run.evals.item() == len(denoiser.times)
        attempts = int(run.steps + run.rejected)
        assert 0 <= len(denoiser.times) - sampler.recipe.nfe_per_step * attempts <= 3
        denoiser.times.clear()
        run = sampler.run(denoiser, noise(denoiser, 4))
        assert run.nfe.max() <= len(denoiser.times)
        times = torch.cat(denoiser.times)
        assert times.min() >= p.t_min
        assert final == "stop" or times.min() == p.t_min
        assert times.max() == pytest.approx(p.t_max, rel=1e-12)
        assert times.max() <= p.t_max
        assert sampler.times.tolist() == [p.t_max, p.t_data if final == "denoise" else p.t_min]


def test_the_ends():
    denoiser, x, _ = bed("gaussian", "Flow")
    p = denoiser.process
    there = make_adaptive("rk45", p, rtol=1e-8, final="stop").run(denoiser, x).x
    assert torch.allclose(there, denoiser.flow(x, 1.0, p.t_min), atol=1e-7)
    part = make_adaptive("rk45", p, rtol=1e-8, start=0.8, stop=0.3)
    assert torch.allclose(part.run(denoiser, x).x, denoiser.flow(x, 0.8, 0.3), atol=1e-7)
    back = make_adaptive("rk45", p, rtol=1e-8, start=p.t_min, stop=1.0)
    assert torch.allclose(back.run(denoiser, there).x, x, atol=1e-6)
    assert back.meta == {"sampler": "rk45", "chart": "flow", "rtol": 1e-8, "atol": 1e-8, "final": "stop"}
    clean = make_adaptive("rk45", p, stop=0.0)
    assert clean.times.tolist() == [1.0, 0.0]
    assert clean.first.tolist() == [1.0, 0.0, 1.0]
    assert make_adaptive("rk45", p) == clean


def test_zero_terminal_snr():
    """alpha is 0 at the first time: the chart flow holds there, the others begin with a row on x0."""
    denoiser = problems.gaussian(problems.zero_terminal_snr())
    x = noise(denoiser)
    p = denoiser.process
    exact = denoiser(denoiser.flow(x, p.t_max, p.t_min), torch.tensor(p.t_min, dtype=f64))
    for name, chart in (("rk45", "flow"), ("rk45", "trig"), ("rk45", "ddim"), ("dpm-adaptive", "dpm++")):
        run = make_adaptive(name, p, rtol=1e-5, chart=chart).run(denoiser, x)
        assert problems.rms(run.x, exact) < 2e-4


K_DIFFUSION = [(name, rtol) for name in ("dpm-adaptive", "dpm-adaptive2") for rtol in (None, 0.01, 1e-3)]


@pytest.mark.parametrize(("name", "rtol"), K_DIFFUSION)
def test_dpm_adaptive_is_k_diffusions(name, rtol, monkeypatch):
    """One sample at a time, as its norm is over the batch; in float64 throughout."""
    peer = peers.k_diffusion_sampling().sample_dpm_adaptive
    denoiser = problems.mixture(pfode.EDM())
    sampler = make_adaptive(name, denoiser.process, rtol=rtol, final="stop")
    order, tolerances = sampler.recipe.order, {"rtol": sampler.rtol, "atol": sampler.atol}
    kept = torch.get_default_dtype()
    for x in noise(denoiser, 4).split(1):
        torch.set_default_dtype(f64)  # of its times
        try:
            theirs, info = peer(denoiser, x, 0.002, 80.0, order=order, **tolerances, return_info=True, disable=True)
        finally:
            torch.set_default_dtype(kept)
        ours = sampler.run(denoiser, x)
        assert (ours.x - theirs).abs().max() < 1e-10
        counts = (int(ours.nfe), int(ours.steps), int(ours.rejected))
        assert counts == (info["nfe"], info["n_accept"], info["n_reject"])


def test_the_default_tolerances_are_k_diffusions():
    sampler = make_adaptive("dpm-adaptive", pfode.EDM())
    assert (sampler.rtol, sampler.atol) == (0.05, 0.0078)
    assert make_adaptive("dpm-adaptive", pfode.EDM(), rtol=0.005).atol == pytest.approx(0.00078)


class Sick(Watched):
    """Sample 1 is not finite from some time on."""

    def __call__(self, x, t, **cond):
        late = (t < 0.5 * self.process.t_max).expand(len(x)) & (torch.arange(len(x)) == 1)
        return torch.where(late[:, None], math.nan, self.denoiser(x, t))


@pytest.mark.parametrize("name", ["rk45", "dpm-adaptive"])
def test_a_failing_sample_fails_alone(name):
    denoiser = problems.mixture(pfode.Flow())
    x, sampler = noise(denoiser), make_adaptive(name, denoiser.process)
    run, sound = sampler.run(Sick(denoiser), x), sampler.run(denoiser, x)
    assert list(run.failed) == [1]
    status, t = run.failed[1]
    assert status == Status.NON_FINITE
    assert 0.49 < t <= 0.55
    assert run.x[1].isnan().all()
    others = [0, 2, 3, 4, 5]
    assert torch.equal(run.x[others], sound.x[others])
    error = run.error(1, offset=64)
    assert f"sample 65 stopped at t = {t:.6g} after {run.steps[1]} steps: the denoiser gave NaN" in str(error)


def test_attempts_are_limited():
    denoiser = problems.mixture(pfode.EDM())
    run = make_adaptive("rk45", denoiser.process, max_steps=3).run(denoiser, noise(denoiser))
    assert {status for status, _ in run.failed.values()} == {Status.MAX_STEPS}
    assert run.x.isnan().all()
    assert "max_steps were not enough" in str(run.error(0))


def test_pictures_and_conditions():
    net = pfode.load("digits")
    x = noise(net, 3, dtype=torch.float32)
    with torch.no_grad():
        a, b = (make_adaptive("rk45", net.process, rtol=rtol).run(net, x, label=torch.tensor([1, 2, 3])).x
                for rtol in (1e-3, 1e-5))  # fmt: skip
        c = make_adaptive("rk45", net.process, rtol=1e-3).run(net, x, label=torch.tensor([4, 2, 3])).x
        half = make_adaptive("rk45", net.process).run(net, x.bfloat16(), label=torch.tensor([1, 2, 3])).x
    assert a.shape == x.shape
    assert problems.rms(a, b) < 0.05
    assert (a - c).abs().amax((1, 2, 3))[0] > 0.1
    assert torch.equal(a[1:], c[1:])
    assert half.dtype == torch.float32


def test_gradients_flow():
    denoiser = problems.gaussian(pfode.EDM())
    x = noise(denoiser, 2).requires_grad_()
    for name in ("rk45", "dpm-adaptive"):
        run = make_adaptive(name, denoiser.process, rtol=1e-6, final="stop").run(denoiser, x)
        (gradient,) = torch.autograd.grad(run.x.sum(), x)
        p = denoiser.process
        (exact,) = torch.autograd.grad(denoiser.flow(x, p.t_max, p.t_min).sum(), x)
        assert torch.allclose(gradient, exact, rtol=1e-4)


MALFORMED = [
    ({"sampler": "dop853"}, r"unknown adaptive sampler 'dop853'"),
    ({"chart": "flows"}, r"unknown chart for rk45 'flows'\nhint: did you mean 'flow'"),
    ({"sampler": "dpm-adaptive", "chart": "ddim"}, "unknown chart for dpm-adaptive 'ddim'"),
    ({"rtol": 0}, "rtol: need a positive number, got 0"),
    ({"rtol": -1e-3}, "rtol: need a number of at least 0"),
    ({"rtol": "tight"}, "rtol: need a number"),
    ({"atol": 0.0}, "atol: need a positive number, got 0"),
    ({"final": "clean"}, "unknown final 'clean'"),
    ({"start": 1.5}, r"would integrate from 1.5 to 0.001, not between two times within \[0.001, 1\]"),
    ({"start": 0.5, "stop": 0.5}, "would integrate from 0.5 to 0.5"),
    ({"max_steps": 0}, "max_steps: need an integer of at least 1, got 0"),
    ({"chart": "ddim", "start": 0.001, "stop": 1.0}, "chart ddim does not hold at t = 1, where alpha = 0"),
    ({"steps": 20}, r"rk45 chooses its own steps, it takes no steps \(got 20\)\nhint: rtol=1e-3"),
    ({"process": "flow"}, "process: need a noise process, got 'flow'"),
]


@pytest.mark.parametrize(("options", "message"), MALFORMED)
def test_what_cannot_be_made(options, message):
    options = {"sampler": "rk45", "process": pfode.Flow()} | options
    with pytest.raises(UsageError, match=message):
        make_adaptive(**options)


def test_what_cannot_be_run():
    denoiser = problems.mixture(pfode.EDM())
    sampler, x = make_adaptive("rk45", denoiser.process), noise(denoiser)
    with pytest.raises(UsageError, match="rk45 was made for Flow"):
        make_adaptive("rk45", pfode.Flow()).run(denoiser, x)
    with pytest.raises(UsageError, match=r"x: need a floating-point tensor of shape \(batch, ...\)"):
        sampler.run(denoiser, torch.zeros(3))
    with pytest.raises(UsageError, match=r"rtol: 1e-08 is beyond the rounding of torch.float32"):
        make_adaptive("rk45", denoiser.process, rtol=1e-8).run(denoiser, x.float())

    class Wide(Watched):
        def __call__(self, x, t, **cond):
            return torch.zeros(len(x), 1)

    with pytest.raises(UsageError, match=r"the denoiser returned shape \(6, 1\) for x of shape \(6, 2\)"):
        sampler.run(Wide(denoiser), x)


def test_a_row_of_ones_own():
    row = AdaptiveRecipe("mine", pfode.ode.SOLVERS["adaptive_heun"], ("trig",), 2, 1e-3, 1e-3, "here", "Heun")
    denoiser, x, exact = bed("gaussian", "VP")
    assert problems.rms(make_adaptive(row, denoiser.process).run(denoiser, x).x, exact) < 1e-2
