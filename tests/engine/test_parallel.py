"""Plans in sweeps: the states of the plan itself in at most as many sweeps as it has rows, near them in far fewer."""

from typing import Any

import pytest
import torch

import pfode
from pfode.errors import UsageError
from pfode.plans.parallel import Parallel, sweep
from pfode.plans.unrolled import matrix, outputs
from pfode.scores import GaussianMixture, guide

SEEDS = [3, 1, 4, 1 << 40]
MEANS = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mixture(process: pfode.Process) -> GaussianMixture:
    return GaussianMixture(0.8 * MEANS, std=0.3, process=process)


def noise(plan: pfode.Plan, n: int = 4) -> torch.Tensor:
    unit = torch.randn(n, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return plan.first[2].item() * unit


def apart(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).abs().max())


PLANS = [
    "ddim",
    "heun",
    "dpm++2m",
    "unipc3",
    "ipndm3",
    "res-2s",
    "euler-a",
    "ddpm",
    "sa-solver",
    "dpm++2m-sde",
    "o-belm",
]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("process", [pfode.VP(), pfode.EDM(), pfode.Flow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("how", [Parallel(0.0), Parallel(0.0, window=3), Parallel(0.0, memory=0)], ids=str)
def test_exact_in_as_many_sweeps_as_rows(name, process, how):
    plan, den = pfode.make_plan(name, process, 9), mixture(process)
    x = noise(plan)
    seeds = SEEDS if plan.stochastic else None
    wanted = pfode.run(plan, den, x, seeds)
    swept = sweep(plan, den, x, seeds, how)
    assert apart(swept.x, wanted) < 1e-9 * max(1.0, float(wanted.abs().max()))
    assert int(swept.sweeps.max()) <= plan.nfe
    assert (swept.calls >= plan.nfe).all()


@pytest.mark.parametrize("rows", [20, 50, 100])
def test_far_fewer_sweeps_to_a_tolerance(rows):
    """And an error in proportion to it."""
    plan, den = pfode.make_plan("dpm++2m", pfode.VP(), rows, grid="log-snr"), mixture(pfode.VP())
    x = noise(plan, 16)
    wanted, errors = pfode.run(plan, den, x), []
    for tolerance in (1e-2, 1e-4, 1e-6):
        swept = sweep(plan, den, x, how=Parallel(tolerance))
        errors.append(apart(swept.x, wanted))
        assert errors[-1] < 30 * tolerance
    assert errors[0] > errors[1] > errors[2]
    assert float(sweep(plan, den, x, how=Parallel(1e-2)).sweeps.double().mean()) < 16


def test_extrapolation_saves_sweeps_of_a_network():
    net = pfode.load("digits")
    options: dict[str, Any] = {"n": 8, "steps": 100, "sampler": "ddim", "label": 3}
    wanted = pfode.sample(net, **options).x
    plain, faster = (pfode.sample(net, parallel=Parallel(1e-3, memory=m), **options) for m in (0, 2))
    assert faster.stats["sweeps"].double().mean() < 0.9 * plain.stats["sweeps"].double().mean() < 20
    assert apart(faster.x, wanted) < 0.05


def test_every_sample_by_itself():
    """Neither its sweeps nor its states depend on the others, or on their order; an easy one is done sooner."""
    den, plan = mixture(pfode.EDM()), pfode.make_plan("unipc2", pfode.EDM(), 30)
    x = torch.cat([noise(plan, 5), plan.first[2] * MEANS[:1] / 100])
    together = sweep(plan, den, x, how=Parallel(1e-4))
    order = torch.tensor([5, 0, 3])
    some = sweep(plan, den, x[order], how=Parallel(1e-4))
    assert torch.equal(some.sweeps, together.sweeps[order])
    assert torch.equal(some.calls, together.calls[order])
    assert apart(some.x, together.x[order]) < 1e-9
    alone = sweep(plan, den, x[2:3], how=Parallel(1e-4))
    assert apart(alone.x, together.x[2:3]) < 1e-9
    assert len(set(together.sweeps.tolist())) > 1


def test_a_window_bounds_what_is_asked_at_once():
    den, plan = mixture(pfode.VP()), pfode.make_plan("ddim", pfode.VP(), 30)
    sizes: list[int] = []

    class Counted:
        process = den.process

        def __call__(self, x: torch.Tensor, t: torch.Tensor, **cond: Any) -> torch.Tensor:
            sizes.append(len(x))
            assert t.shape == (len(x),)
            return den(x, t)

    swept = sweep(plan, Counted(), noise(plan), how=Parallel(1e-3, window=5))
    assert max(sizes) == 4 * 5
    assert len(sizes) == int(swept.sweeps.max())
    assert sum(sizes) == int(swept.calls.sum())
    wide = sweep(plan, den, noise(plan), how=Parallel(1e-3))
    assert wide.sweeps.double().mean() < swept.sweeps.double().mean() < 30
    assert wide.calls.double().mean() > swept.calls.double().mean()


def test_the_unrolled_factors():
    plan = pfode.make_plan("unipc3", pfode.VP(), 8)
    assert torch.allclose(outputs(plan), matrix(plan)[:, 1:], atol=1e-12)
    assert not outputs(pfode.make_plan("ddpm", pfode.VP(), 8)).triu().any()


def test_sampling_in_sweeps():
    """Classes, guidance, batches and inpainting, as row by row."""
    net = pfode.load("digits")
    options: dict[str, Any] = {"seeds": [5, 6, 7, 8], "sampler": "dpm++2m", "steps": 12, "label": [0, 1, 2, 3]}
    plain = pfode.sample(net, guidance=2.0, **options)
    swept = pfode.sample(net, guidance=2.0, parallel=0.0, **options)
    assert apart(swept.x, plain.x) < 2e-5
    assert swept.stats["sweeps"].shape == (4,)
    assert int(swept.stats["sweeps"].max()) <= 12
    assert torch.equal(swept.stats["evals"], 2 * swept.stats["nfe"])
    assert swept.evals == int(swept.stats["evals"].max())
    parts = pfode.sample(net, guidance=2.0, parallel=True, batch=3, **options)
    whole = pfode.sample(net, guidance=2.0, parallel=Parallel(1e-3), **options)
    assert apart(parts.x, whole.x) < 1e-3
    assert torch.equal(parts.stats["sweeps"], whole.stats["sweeps"])
    assert apart(whole.x, plain.x) < 0.1
    mask = torch.ones(8, 8)
    mask[:, :3] = 0
    init = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    kept = [pfode.sample(net, init=init, mask=mask, parallel=p, **options).x for p in (None, 0.0)]
    assert torch.equal(kept[1][..., :3], init[..., :3])
    assert apart(*kept) < 2e-5
    drawn = [pfode.sample(net, parallel=p, **{**options, "sampler": "euler-a"}).x for p in (None, 0.0)]
    assert apart(*drawn) < 2e-5
    interval = guide(net, 2.0, interval=(0.3, 3.0))
    assert apart(*(pfode.sample(interval, parallel=p, **options).x for p in (None, 0.0))) < 2e-5


def test_what_is_not_finite_is_found():
    class Broken:
        process = pfode.VP()
        shape = (3,)

        def __call__(self, x: torch.Tensor, t: torch.Tensor, **cond: Any) -> torch.Tensor:
            bad = (x[:, :1] > 0) & (torch.as_tensor(t).reshape(-1, 1) < 0.5)
            return torch.where(bad, torch.nan, 0.5 * x.tanh())

    options: dict[str, Any] = {"n": 6, "steps": 8, "sampler": "ddim", "nan": "flag"}
    plain, swept = (pfode.sample(Broken(), parallel=p, **options) for p in (None, 0.0))
    assert {bad.index for bad in swept.bad} == {bad.index for bad in plain.bad} != set()
    assert [(bad.step, bad.time) for bad in swept.bad] == [(bad.step, bad.time) for bad in plain.bad]
    sound = [i for i in range(6) if i not in {bad.index for bad in plain.bad}]
    assert apart(swept.x[sound], plain.x[sound]) < 1e-5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parallel": -1.0}, "parallel"),
        ({"parallel": "fast"}, "parallel"),
        ({"parallel": True, "trajectory": True}, "trajectory: parallel makes all nodes at once"),
        ({"parallel": True, "callback": print}, "callback: parallel makes all nodes at once"),
        ({"parallel": True, "sampler": "rk45"}, "parallel: rk45 has no nodes"),
    ],
)
def test_what_cannot_be(given, message):
    with pytest.raises(UsageError, match=message):
        pfode.sample(mixture(pfode.VP()), n=2, **given)
    with pytest.raises(UsageError, match="window"):
        Parallel(window=0)
    with pytest.raises(UsageError, match="memory"):
        Parallel(memory=-1)
    with pytest.raises(UsageError, match="was made for"):
        sweep(pfode.make_plan("ddim", pfode.EDM(), 3), mixture(pfode.VP()), torch.zeros(1, 12))
