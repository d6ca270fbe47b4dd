"""Adaptive samplers: tolerances, independence of the batch, counted calls, the ends, parity with k-diffusion."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pfode
from pfode.errors import NumericalError, UsageError
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
    alone = [sampler.run(denoiser, x[i : i + 1]) for i in range(3)]
    assert torch.equal(together.nfe[:3], torch.cat([run.nfe for run in alone]))
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
    (lost,) = run.failed
    assert (lost.index, lost.step, lost.status) == (1, run.steps[1], Status.NON_FINITE)
    assert 0.49 < lost.time <= 0.55
    assert run.x[1].isnan().all()
    others = [0, 2, 3, 4, 5]
    assert torch.equal(run.x[others], sound.x[others])
    where = f"sample 1 stopped at t = {lost.time:.6g} after {run.steps[1]} steps"
    assert f"{where}: the denoiser gave NaN" in str(lost.error)


def test_attempts_are_limited():
    denoiser = problems.mixture(pfode.EDM())
    run = make_adaptive("rk45", denoiser.process, max_steps=3).run(denoiser, noise(denoiser))
    assert [lost.index for lost in run.failed] == [*range(6)]
    assert {lost.status for lost in run.failed} == {Status.MAX_STEPS}
    assert run.x.isnan().all()
    assert "max_steps were not enough" in str(run.failed[0].error)


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


# ---- by name in sample, encode and decode


def test_sample_is_a_run_from_the_noise_of_the_seeds():
    """The same pictures in batches and in one, and what every one took."""
    denoiser = problems.mixture(pfode.EDM())
    run = make_adaptive("rk45", denoiser.process, rtol=1e-4, chart="trig").run(denoiser, noise(denoiser))
    options = {"sampler": "rk45", "rtol": 1e-4, "chart": "trig", "dtype": f64}
    for batch in (6, 4, 1):
        out = pfode.sample(denoiser, 6, batch=batch, **options)
        assert (out.x - run.x).abs().max() < 1e-12
        for key in ("nfe", "evals", "steps", "rejected"):
            assert torch.equal(out.stats[key], getattr(run, key))
    assert (out.nfe, out.evals, out.steps) == (run.nfe.max(), run.evals.max(), run.steps.max())
    assert out.nfe > run.nfe.min()
    assert out.times.tolist() == [80.0, 0.0]
    assert out.plan == make_adaptive("rk45", denoiser.process, rtol=1e-4, chart="trig")
    assert torch.equal(pfode.sample(denoiser, 6, plan=out.plan, dtype=f64).x, pfode.sample(denoiser, 6, **options).x)
    assert pfode.sample(denoiser, 1, sampler=ADAPTIVE["rk45"]).x.dtype == torch.float32


@pytest.mark.parametrize("process", problems.PROCESSES)
@pytest.mark.parametrize("name", ADAPTIVE)
def test_sample_arrives_where_the_exact_flow_does(name, process):
    denoiser, _, exact = bed("gaussian", process)
    errors = [problems.rms(pfode.sample(denoiser, 6, sampler=name, rtol=rtol, dtype=f64).x, exact)
              for rtol in (1e-2, 1e-4)]  # fmt: skip
    assert errors[0] < 0.05
    assert errors[1] < min(15e-4, errors[0] / 3)


def test_sample_between_times_of_the_process():
    denoiser = problems.gaussian(pfode.Flow())
    x = noise(denoiser)
    options = {"sampler": "rk45", "rtol": 1e-8, "dtype": f64}
    out = pfode.sample(denoiser, x=x, start=0.8, stop=0.3, **options)
    assert torch.allclose(out.x, denoiser.flow(x, 0.8, 0.3), atol=1e-7)
    stopped = pfode.sample(denoiser, x=x, final="stop", **options)
    assert stopped.times.tolist() == [1.0, denoiser.process.t_min]
    data = torch.tensor([0.4, -0.3, 0.1], dtype=f64)
    noised = 0.5 * data + 0.5 * pfode.noise.normal([0, 1], 0, (3,), f64)
    a = pfode.sample(denoiser, 2, init=data, start=0.5, **options).x
    assert torch.equal(a, pfode.sample(denoiser, x=noised, start=0.5, **options).x)
    with pytest.raises(UsageError, match="give init="):
        pfode.sample(denoiser, 2, start=0.5, **options)


def test_guided_samples_count_two_forwards():
    net = pfode.load("digits")
    out = pfode.sample(net, 2, sampler="rk23", rtol=0.05, label=[3, "7"], guidance=2.0)
    assert torch.equal(out.stats["evals"], 2 * out.stats["nfe"])
    assert out.x.shape == (2, 1, 8, 8)
    plain = pfode.sample(net, 2, sampler="rk23", rtol=0.05, label=[3, "7"])
    assert torch.equal(plain.stats["evals"], plain.stats["nfe"])


@pytest.mark.parametrize("process", problems.PROCESSES)
def test_encode_and_decode_to_a_tolerance(process):
    denoiser, x, _ = bed("gaussian", process)
    p = denoiser.process
    data = denoiser.flow(x, p.t_max, p.t_min)
    options = {"sampler": "rk45", "rtol": 1e-9}
    z: Any = pfode.encode(denoiser, data, **options)
    assert torch.allclose(z, x, rtol=1e-6, atol=1e-6)
    assert (pfode.decode(denoiser, z, **options) - data).abs().max() < 1e-7
    low, high = 0.2 * p.t_max, 0.7 * p.t_max
    part: Any = pfode.encode(denoiser, data, start=high, stop=low, **options)
    assert torch.allclose(part, denoiser.flow(data, low, high), rtol=1e-6, atol=1e-7)
    assert (pfode.decode(denoiser, part, start=high, stop=low, **options) - data).abs().max() < 1e-7
    falling = make_adaptive("rk45", p, final="stop")
    with pytest.raises(UsageError, match=r"rk45 would go from t = .* down to"):
        pfode.encode(denoiser, data, plan=falling)
    rising = make_adaptive("rk45", p, rtol=1e-9, start=p.t_min, stop=p.t_max)
    assert torch.equal(z, pfode.encode(denoiser, data, plan=rising))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="leads from data to noise"):
        pfode.decode(denoiser, z, plan=rising)


def test_samples_that_fail_are_named():
    denoiser = problems.mixture(pfode.Flow())
    out = pfode.sample(Sick(denoiser), 6, sampler="rk45", nan="flag", batch=3)
    assert [bad.index for bad in out.bad] == [1, 4]
    assert out.x[[1, 4]].isnan().all()
    assert out.x[[0, 2, 3, 5]].isfinite().all()
    with pytest.raises(NumericalError, match=r"sample 4 stopped at t = 0\.5\d* after \d+ steps: the denoiser gave NaN"):
        pfode.sample(Late(denoiser), 6, sampler="rk45", batch=3)
    with pytest.raises(NumericalError, match=r"sample 0 stopped at t = .* after 1 steps: max_steps were not enough"):
        pfode.sample(denoiser, 6, sampler="rk45", max_steps=2)


class Late(Sick):
    """The same in the second batch only."""

    batches = 0

    def __call__(self, x, t, **cond):
        self.batches += bool((t == self.process.t_max).all())
        return super().__call__(x, t) if self.batches > 1 else self.denoiser(x, t)


REFUSED = [
    ({"steps": 20}, "rk45 chooses its own steps, it takes no steps"),
    ({"nfe": 20}, "rk45 chooses its own steps, it takes no nfe"),
    ({"grid": "karras"}, "takes no grid"),
    ({"grid": torch.tensor([1.0, 0.5])}, "takes no grid"),
    ({"afs": 0.5}, "takes no afs"),
    ({"eta": 0.5}, "takes no eta"),
    ({"lower_order_final": True}, "takes no lower_order_final"),
    ({"brownian": True}, "brownian: rk45 draws no noise"),
    ({"trajectory": True}, "trajectory: rk45 has no nodes that all samples share"),
    ({"callback": print}, "callback: rk45 has no nodes that all samples share"),
    ({"rtol": -1}, "rtol: need a number of at least 0"),
    ({"sampler": "heun", "rtol": 1e-3}, r"rtol: the steps of heun lie on a grid, whatever their errors\nhint: .*rk45"),
    ({"sampler": "auto", "atol": 1e-3}, "atol: the steps of auto lie on a grid"),
    ({"sampler": "ddim", "max_steps": 9}, "max_steps: the steps of ddim"),
    ({"sampler": "rk54", "rtol": 1e-3}, "unknown sampler 'rk54'\nhint: did you mean 'rk4' or 'rk45'"),
    ({"sampler": "dop853"}, "unknown sampler 'dop853'\nhint: did you mean 'dopri8'"),
    ({"plan": make_adaptive("rk45", pfode.EDM())}, "plan given together with what it settles"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_sample_refuses(options, message):
    with pytest.raises(UsageError, match=message):
        pfode.sample(problems.mixture(pfode.EDM()), 2, **{"sampler": "rk45"} | options)


def test_there_is_no_plan():
    with pytest.raises(UsageError, match=r"rk45 is adaptive: it has no plan.*\nhint: pfode.sample"):
        pfode.make_plan("rk45", pfode.EDM(), 5)
