"""`sample`: seeds, batches, results, bad input."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import pfode
from pfode.errors import NumericalError, UnsoundWarning, UsageError
from pfode.samplers import CATALOGUE
from pfode.samplers.settle import find_device
from tests import problems

MIX = problems.mixture(pfode.EDM())


@pytest.mark.parametrize("name", ["dpm++2m", "heun", "euler-a"])
@pytest.mark.parametrize(
    ("denoiser", "dtype", "tolerance"), [(pfode.load("digits"), torch.float32, 1e-5), (MIX, torch.float64, 1e-12)]
)
def test_a_sample_is_its_seed(name, denoiser, dtype, tolerance):
    """64 samples as 1 x 64, 4 x 16, 64 x 1 and in reversed order."""
    options = {"steps": 8, "sampler": name, "dtype": dtype, "trajectory": True}
    whole = pfode.sample(denoiser, 64, seed=5, **options)
    for out in (
        pfode.sample(denoiser, 64, seed=5, batch=16, **options),
        pfode.sample(denoiser, 64, seed=5, batch=1, **options),
        pfode.sample(denoiser, seeds=list(range(68, 4, -1)), **options),
    ):
        order = [out.seeds.index(s) for s in whole.seeds]
        assert torch.equal(out.trajectory[0][order], whole.trajectory[0])
        assert (out.x[order] - whole.x).abs().max() < tolerance * whole.x.abs().max()
        if dtype == torch.float32:
            pixels = [((x.clamp(-1, 1) + 1) * 127.5).round() for x in (out.x[order], whole.x)]
            assert torch.equal(*pixels)


def test_the_result():
    out = pfode.sample(MIX, 5, steps=7, sampler="heun", trajectory=True, dtype=torch.float64)
    assert out.x.shape == (5, 2)
    assert out.seeds == [0, 1, 2, 3, 4]
    assert (out.steps, out.nfe, out.evals) == (7, 13, 13)
    assert len(out.times) == len(out.trajectory) == 8
    assert len(out.preview) == 7
    assert torch.equal(out.trajectory[-1], out.x)
    assert torch.allclose(out.preview[-1], out.x, atol=1e-2)
    assert out.bad == []
    plain = pfode.sample(MIX, 5, steps=7, sampler="heun", dtype=torch.float64)
    assert plain.trajectory == []
    assert torch.allclose(plain.x, out.x, rtol=1e-12)


def test_budgets_and_defaults():
    assert pfode.sample(MIX, 1).nfe == 20
    assert pfode.sample(MIX, 1, nfe=9, sampler="heun").nfe == 9
    assert pfode.sample(MIX, 1, nfe=10, sampler="heun").nfe == 9
    assert pfode.sample(MIX, 1, nfe=1, sampler="heun").nfe == 1
    assert pfode.sample(MIX, 1, nfe=6).nfe == 6
    assert pfode.sample(MIX, 1, grid=[80.0, 1.0, 0.0]).nfe == 2


def test_a_plan_or_states_of_ones_own():
    plan = pfode.make_plan("exp-ab3", MIX.process, 6)
    a, b = pfode.sample(MIX, 3, plan=plan), pfode.sample(MIX, 3, steps=6, sampler="exp-ab3")
    assert torch.equal(a.x, b.x)
    assert isinstance(a.plan, pfode.Plan)
    x = a.plan.sigma[0] * pfode.noise.normal([0, 1, 2], 0, (2,))
    assert torch.allclose(pfode.sample(MIX, x=x.float(), plan=plan).x, a.x)
    again = pfode.sample(MIX, x=a.x + 2.0 * pfode.noise.normal([0, 1, 2], 1, (2,)), start=2.0, steps=5)
    assert again.times[0] == 2.0


def test_callback_sees_and_may_replace_every_node():
    seen = []
    pfode.sample(MIX, 4, steps=5, batch=2, callback=lambda p: seen.append((p.step, p.nfe, len(p.x))))
    assert seen == [(i, i, 2) for i in (1, 2, 3, 4, 5)] * 2
    out = pfode.sample(MIX, 2, steps=5, callback=lambda p: torch.zeros_like(p.x) if p.step == 5 else None)
    assert torch.equal(out.x, torch.zeros(2, 2))


def test_it_draws_the_distribution():
    for name in ("dpm++2m", "euler-a"):
        steps = 250 if name == "euler-a" else 40  # its bias falls as 1/steps
        out = pfode.sample(MIX, 4000, steps=steps, sampler=name, batch=4000, dtype=torch.float64)
        true = MIX.sample(4000, seed=9)
        assert torch.allclose(out.x.mean(0), true.mean(0), atol=0.06)
        assert torch.allclose(torch.cov(out.x.T), torch.cov(true.T), atol=0.08)


class Sick:
    process, shape = MIX.process, (2,)

    def __call__(self, x, t, **cond):
        d = MIX(x, t)
        d[-1] = torch.nan if t < 1 else d[-1]
        return d


def test_nan_is_never_silent():
    with pytest.raises(NumericalError, match=r"sample 5 is not finite after step \d+ of 8, t = "):
        pfode.sample(Sick(), 6, steps=8, batch=6)
    with pytest.raises(NumericalError, match="sample 2 is not finite"):
        pfode.sample(Sick(), 6, steps=8, batch=3)
    out = pfode.sample(Sick(), 6, steps=8, nan="flag")
    assert [bad.index for bad in out.bad] == [5]
    assert torch.equal(out.x[:5], pfode.sample(MIX, 6, steps=8).x[:5])


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"n": -1},
        {"n": 2.5},
        {"steps": 0},
        {"steps": -5},
        {"steps": 2, "nfe": 3},
        {"nfe": 0},
        {"sampler": "dpm+2m"},
        {"grid": "kerras"},
        {"grid": [1.0, 2.0]},
        {"grid": [80.0, 1.0], "steps": 5},
        {"eta": 0.5},
        {"sampler": "euler-a", "eta": -1.0},
        {"seed": -1},
        {"seeds": [1, 2], "n": 3},
        {"batch": 0},
        {"dtype": torch.float16},
        {"nan": "ignore"},
        {"brownian": True},
        {"guidance": 3.0},
        {"start": 5.0, "stop": 6.0},
        {"x": torch.zeros(3, 7)},
        {"plan": pfode.make_plan("ddim", pfode.VP(), 3)},
        {"plan": pfode.make_plan("ddim", pfode.EDM(), 3), "steps": 4},
        {"label": [1, 2, 3], "n": 2},
        {"label": 1.5},
        {"start": 0.5},
        {"start": 5.0},
        {"start": "a"},
        {"label": True},
        {"label": "cat"},
        {"label": [0, "b"]},
        {"seed": 1.5},
        {"seed": "a"},
        {"seed": 2**64 - 1},
        {"seeds": ["a", "b"]},
        {"seeds": [float("nan"), 1]},
        {"seeds": []},
        {"seeds": 5},
        {"grid": pfode.grids.karras},
        {"grid": 5},
        {"grid": ["a", "b"]},
        {"grid": [80.0, 1.0], "stop": 1.0},
        {"device": "gpu"},
        {"device": "meta"},
        {"init": torch.zeros(3)},
        {"init": "x"},
        {"init": torch.zeros(2), "x": torch.zeros(2, 2)},
        {"sampler": "sa-solver", "between": 1.0},
        {"sampler": "sa-solver", "between": (1.0, 2.0, 3.0)},
        {"shape": 8},
        {"shape": (3,)},
        {"shape": (0,)},
        {"x": torch.zeros(3)},
        {"x": torch.zeros(2, 2, dtype=torch.long)},
        {"x": [[0.0, 1.0]]},
        {"eta": "1"},
        {"guidance": "a"},
        {"guidance": 1e39},
        {"plan": "heun"},
        {"plan": pfode.make_plan("ddim", pfode.EDM(), 3), "sampler": "heun"},
        {"plan": pfode.make_plan("ddim", pfode.EDM(), 3), "final": "stop"},
        {"plan": pfode.make_plan("ddim", pfode.EDM(0.1, 500.0), 3)},
        {"steps": 10**8},
        {"callback": lambda p: p.x[:1]},
        {"callback": lambda p: 3},
    ],
)
def test_bad_calls_are_one_typed_error(options):
    with pytest.raises(UsageError):
        pfode.sample(MIX, **{"n": 2, **options} if "x" not in options else options)


@pytest.mark.parametrize("denoiser", [None, torch.nn.Linear(2, 2), lambda x, t: x])
def test_what_is_no_denoiser_is_refused(denoiser):
    with pytest.raises(UsageError, match="denoiser"):
        pfode.sample(denoiser, 2)


def test_a_device_that_is_not_there():
    if not torch.cuda.is_available():
        with pytest.raises(pfode.errors.MissingError, match="CUDA"):
            pfode.sample(MIX, 2, device="cuda")
    assert torch.equal(pfode.sample(MIX, 2, device="cpu").x, pfode.sample(MIX, 2).x)
    there = "cuda" if torch.cuda.is_available() else "cpu"
    assert find_device("auto") == torch.device(there)


def test_data_to_begin_from():
    """It is noised to the plan's first time by the seeds, one for all samples or one each."""
    data = torch.tensor([[0.9, -0.4], [-0.6, 0.8]])
    for process in problems.PROCESSES.values():
        denoiser = problems.mixture(process)
        start = process.time(0.0)  # alpha = sigma
        noised = process.alpha(start) * data + process.sigma(start) * pfode.noise.normal([0, 1], 0, (2,))
        wanted = pfode.sample(denoiser, x=noised, start=start).x
        assert torch.equal(pfode.sample(denoiser, 2, init=data, start=start, batch=1).x, wanted)
        assert torch.equal(pfode.sample(denoiser, 1, init=data[0], start=start).x, wanted[:1])
    with pytest.raises(UsageError, match="init="):
        pfode.sample(MIX, 2, start=1.0)


def test_a_recipe_of_ones_own():
    mine = replace(CATALOGUE["heun"], name="mine", charts=("flow",))
    out = pfode.sample(MIX, 2, sampler=mine, steps=4)
    assert (out.plan.name, out.plan.meta["chart"], out.nfe) == ("mine", "flow", 7)


def test_afs_knows_the_data_under_guidance():
    net = pfode.load("digits")
    assert pfode.sample(net, 2, steps=4, afs=True, label=3, guidance=2.0).nfe == 3


def test_numpy_numbers_and_arrays_are_welcome():
    given: dict[str, Any] = {"n": np.int64(2), "steps": np.int64(5), "seed": np.int64(3), "guidance": np.float32(1)}
    a = pfode.sample(MIX, **given)
    assert torch.equal(a.x, pfode.sample(MIX, 2, steps=5, seed=3).x)
    assert pfode.sample(MIX, 2, grid=np.array([80.0, 3.0, 0.5, 0.0])).nfe == 3


def test_classes_by_name():
    net = pfode.load("digits")
    a, b = pfode.sample(net, 2, steps=3, label="7"), pfode.sample(net, 2, steps=3, label=[7, "7"])
    assert torch.equal(a.x, b.x)
    with pytest.raises(UsageError, match="unknown label"):
        pfode.sample(net, 2, label="seven")


def test_guidance_given_twice_replaces():
    net = pfode.load("digits")
    once = pfode.scores.guide(net, 2.0)
    assert pfode.sample(once, 2, steps=2, label=3, guidance=1.0).evals == 2
    assert pfode.sample(once, 2, steps=2, label=3).evals == 4
    assert pfode.sample(net, 2, steps=2, guidance=0.0).evals == 2


def test_names_are_suggested():
    with pytest.raises(UsageError, match=r"did you mean 'dpm\+\+2m'"):
        pfode.make_plan("dpm++2mm", pfode.EDM(), 5)
    with pytest.raises(UsageError, match="did you mean 'karras'"):
        pfode.make_plan("ddim", pfode.EDM(), 5, grid="karas")
    with pytest.raises(UsageError, match="did you mean 'dpm"):
        pfode.make_plan("exp-ab2", pfode.EDM(), 5, chart="dpm+")
    with pytest.raises(UsageError, match="chart for ddim"):
        pfode.make_plan("ddim", pfode.EDM(), 5, chart="flow")


def test_charts_and_options_are_recorded():
    plan = pfode.make_plan("exp-ab2", pfode.EDM(), 5, chart="trig", grid="log-snr")
    assert plan.meta == {"sampler": "exp-ab2", "chart": "trig", "grid": "log-snr", "final": "denoise"}
    assert plan.prediction == "v"
    assert pfode.make_plan("euler-a", pfode.EDM(), 5, eta=0.3).meta["eta"] == 0.3
    for name, recipe in CATALOGUE.items():
        plan = pfode.make_plan(name, pfode.EDM(), 2, chart=recipe.charts[-1])
        again = {key: value for key, value in plan.meta.items() if key != "sampler"}
        assert pfode.make_plan(plan.meta["sampler"], pfode.EDM(), 2, **again) == plan


@pytest.mark.parametrize("name", ["euler-a", "ddpm"])
def test_eta_zero_is_ddim(name):
    a = pfode.make_plan(name, pfode.VP(), 6, eta=0.0)
    b = pfode.make_plan("ddim", pfode.VP(), 6)
    assert not a.stochastic
    assert torch.allclose(a.b, b.b, rtol=1e-14)
    assert torch.allclose(a.r, b.r, rtol=1e-14)


def test_plans_are_printable():
    text = str(pfode.make_plan("heun", pfode.EDM(), 3))
    assert "3 steps, 5 NFE" in text
    assert len(text.splitlines()) == 2 + 5 + 1


def test_every_recipe_says_what_it_is():
    for name, recipe in CATALOGUE.items():
        assert recipe.name == name
        assert recipe.source
        assert recipe.summary
        assert (0 if name == "langevin" else 1) <= recipe.order_as_shipped <= recipe.order  # it converges to no path


def test_a_plan_of_too_few_steps_says_so():
    net = pfode.load("digits")
    with pytest.warns(UnsoundWarning, match=r'80 times too wide; more steps, chart "flow", another grid'):
        wide = pfode.sample(net, 2, sampler="heun", steps=2, grid="karras").x
    assert wide.std() > 10
    better: dict[str, Any]
    for better in ({"grid": "karras", "chart": "flow"}, {"grid": "ays-svd"}):  # without a warning
        assert pfode.sample(net, 2, sampler="heun", steps=2, **better).x.std() < 1
