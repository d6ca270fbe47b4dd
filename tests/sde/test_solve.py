"""What a solve promises: its law at any output times, samples of their own, trees, counts, directions, statuses."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import pfode
from pfode.brownian import Brownian
from pfode.errors import NumericalError
from pfode.sde import SDE, methods_for, sdesolve
from tests.sde import problems

F64: dict = {"dtype": torch.float64}


def test_increments_at_irregular_times_have_the_law_of_brownian_motion():
    """dy = dW at times that are no steps: variances within 2 %, neighbours uncorrelated."""
    sde = SDE(lambda t, y: torch.zeros_like(y), lambda t, y: torch.ones_like(y))
    ts = [0.0, *np.cumsum([0.05] * 8 + [0.013, 0.11, 0.07, 0.03])]
    ys = sdesolve(sde, torch.zeros(400, 100, **F64), ts, method="euler", step_size=0.08).ys
    rises = (ys[1:] - ys[:-1]).flatten(1)
    widths = torch.tensor(ts, **F64).diff()
    assert (rises.var(1) / widths - 1).abs().max() < 0.02
    assert torch.corrcoef(rises).fill_diagonal_(0).abs().max() < 0.02


@pytest.mark.parametrize("way", [{"step_size": 0.1}, {"batch": "per-sample"}])
def test_a_sample_is_the_same_alone_and_in_a_batch(way):
    sde = problems.equation("diagonal", "ito")
    y0 = torch.randn(6, 2, **F64)
    ts = [0.0, 0.25, 1.0]
    whole = sdesolve(sde, y0, ts, seed=11, **way)
    for i in (0, 3, 5):
        alone = sdesolve(sde, y0[i : i + 1], ts, seed=11 + i, **way)
        assert torch.allclose(whole.ys[:, i : i + 1], alone.ys, rtol=1e-12, atol=1e-14)
    turned = sdesolve(sde, y0.flip(0), ts, seed=[16, 15, 14, 13, 12, 11], **way)
    assert torch.allclose(turned.ys.flip(1), whole.ys, rtol=1e-12, atol=1e-14)


def test_steps_are_counted():
    """100 steps of 0.01 are 100, also with times in float32; output times on the grid cost none."""
    sde = SDE(lambda t, y: -y, lambda t, y: y)
    for ts in (torch.tensor([0.0, 1.0]), [0.0, 1.0], torch.tensor([0.0, 0.5, 1.0]), torch.linspace(0, 1, 11)):
        stats = sdesolve(sde, torch.ones(2, 2), ts, method="srid2", step_size=0.01).stats
        assert (stats.steps, stats.drifts, stats.diffusions, stats.products) == (100, 300, 400, 0)
    stats = sdesolve(sde, torch.ones(2, 2), [0.0, 0.305, 1.0], method="milstein", step_size=0.01).stats
    assert (stats.steps, stats.drifts, stats.diffusions, stats.products) == (101, 101, 101, 101)


def test_calls_are_as_many_as_the_tableau_has():
    """Evaluations that no row uses are not made: srid2 calls f 3 times and g 4 times a step."""
    calls = {"f": 0, "g": 0}

    def f(t, y):
        calls["f"] += 1
        return -y

    def g(t, y):
        calls["g"] += 1
        return y

    with torch.no_grad():
        sde = SDE(f, g)
        sdesolve(sde, torch.ones(2, 2), [0.0, 1.0], method="srid2", step_size=0.5)  # looks at g once
        calls.update(f=0, g=0)
        sdesolve(sde, torch.ones(2, 2), [0.0, 1.0], method="srid2", step_size=0.1)
    assert calls == {"f": 30, "g": 40}


@dataclass
class Pair:
    a: torch.Tensor
    b: dict


@pytest.mark.parametrize("noise", ["diagonal", "scalar", "general", "additive"])
def test_trees_are_their_leaves_side_by_side(noise):
    """A tree of states is solved as one state of all components."""
    flat = torch.randn(3, 5, **F64)
    channels = {"diagonal": 5, "scalar": 1}.get(noise, 2)
    mix = 0.3 * torch.randn(5, channels, **F64)

    def f(t, y):
        return -torch.tanh(y * y.sum(-1, keepdim=True))

    def g(t, y):
        if noise == "diagonal":
            return torch.sin(y)
        part = torch.cos(y)[..., None] if noise != "additive" else torch.ones_like(y)[..., None]
        return part * mix

    def split(y):
        return Pair(y[:, :1], {"x": y[:, 1:].unflatten(1, (2, 2))})

    def joined(pair):
        return torch.cat([pair.a, pair.b["x"].flatten(1, 2)], 1)

    way = {"seed": 4, "step_size": 0.125}
    plain = sdesolve(SDE(f, g, noise), flat, [0.0, 1.0], **way).ys
    tree = sdesolve(
        SDE(lambda t, y: split(f(t, joined(y))), lambda t, y: split(g(t, joined(y))), noise), split(flat), [0.0, 1.0],
        **way,
    ).ys  # fmt: skip
    assert torch.allclose(torch.cat([tree.a, tree.b["x"].flatten(2)], 2), plain, atol=1e-14)


def test_products_are_enough():
    """With product= the matrix is never formed, and the states are the same."""
    mix = torch.randn(4, 3, **F64)

    def product(t, y, v):
        return torch.cos(y) * (v @ mix.T)

    def refused(t, y):
        raise AssertionError("g was evaluated")

    y0 = torch.randn(2, 4, **F64)
    for method, calculus in (("euler", "ito"), ("heun", "stratonovich"), ("spark", "stratonovich")):
        whole = SDE(lambda t, y: -y, lambda t, y: torch.cos(y)[..., None] * mix, "general", calculus)
        parts = SDE(lambda t, y: -y, refused, "general", calculus, product=product, channels=3)
        way = {"method": method, "step_size": 0.2}
        assert torch.allclose(
            sdesolve(whole, y0, [0.0, 1.0], **way).ys, sdesolve(parts, y0, [0.0, 1.0], **way).ys, atol=1e-13
        )


def test_noise_of_a_diagonal_shape_may_be_general_or_additive():
    mix = torch.tensor([[0.0, 1.0], [1.0, 0.0]], **F64)
    y0 = torch.ones(2, 2, **F64)
    diagonal = SDE(lambda t, y: -y, lambda t, y: y @ mix, "general")
    matrix = SDE(lambda t, y: -y, lambda t, y: torch.diag_embed(y @ mix), "general")
    found = [sdesolve(s, y0, [0.0, 1.0], step_size=0.1).ys for s in (diagonal, matrix)]
    assert torch.allclose(*found, atol=1e-14)


@pytest.mark.parametrize(("calculus", "noise"), [(c, n) for c in ("ito", "stratonovich") for n in problems.NOISES])
def test_adaptive_steps_meet_tolerances(calculus, noise):
    """The tighter the tolerance the nearer to fine steps on the same path; all methods can be adaptive."""
    bm = Brownian(range(32), (problems.CHANNELS[noise],), 0, 1, area=True, **F64)
    y0 = torch.full((32, 2), 0.5, **F64)
    sde = problems.equation(noise, calculus)
    best = methods_for(noise, calculus)[0] if noise != "general" else "auto"
    exact = sdesolve(sde, y0, [0, 1], brownian=bm, method=best, step_size=1 / 512).ys[-1]
    wrong = []
    for tol in (1e-1, 3e-3):
        out = sdesolve(sde, y0, [0, 1], brownian=bm, rtol=tol, atol=tol, batch="per-sample", max_steps=100_000)
        wrong.append(float((out.ys[-1] - exact).square().mean().sqrt()))
        assert (out.stats.accepted >= 2).all()
    assert wrong[1] < 0.5 * wrong[0]


def test_the_law_under_adaptive_steps_for_noise_that_does_not_commute():
    """A = int W1 dW2 - int W2 dW1 has E A^2 = 1 (of t = 1): not so if points that were tried are left out."""
    sde = SDE(
        lambda t, y: torch.zeros_like(y),
        lambda t, y: torch.stack(
            [torch.ones_like(y[:, 0]), 0 * y[:, 0], 0 * y[:, 0], torch.ones_like(y[:, 0]), -y[:, 1], y[:, 0]], -1
        ).view(-1, 3, 2),
        "general",
        "stratonovich",
    )
    way = {"method": "spark", "rtol": 0.0, "atol": 0.01, "batch": "per-sample", "max_steps": 100_000}
    with torch.no_grad():
        out = sdesolve(sde, torch.zeros(2500, 3), [0.0, 1.0], **way)
    area = out.ys[-1][:, 2].double()
    assert abs(area.square().mean() - 1) < 3 * area.square().std() / 2500**0.5
    assert int(out.stats.rejected.sum()) > 2500


def test_a_mixed_batch_per_sample_costs_little():
    """One stiff sample among easy ones does not make the others pay."""
    rates = torch.tensor([[100.0]] + [[0.5]] * 15, **F64)
    sde = SDE(
        lambda t, y: -rates[: len(y)] * (y - torch.sin(t).reshape(-1, 1)),
        lambda t, y: 0.1 * torch.ones_like(y),
        "additive",
    )
    y0, ts = torch.zeros(16, 1, **F64), [0.0, 1.0]
    joint = sdesolve(sde, y0, ts, rtol=1e-3, atol=1e-3, norm=lambda e: e.abs().max())
    each = sdesolve(sde, y0, ts, rtol=1e-3, atol=1e-3, batch="per-sample")
    assert int(each.stats.drifts.sum()) <= 16 * joint.stats.drifts / 4


def test_back_and_forth_on_one_path():
    """Backwards in time on the same path a Stratonovich solution comes back."""
    bm = Brownian(range(3), (2,), 0, 1, area=True, **F64)
    sde, y0 = problems.equation("diagonal", "stratonovich"), torch.full((3, 2), 0.5, **F64)
    there = sdesolve(sde, y0, [0.0, 1.0], brownian=bm, method="slow-rk", step_size=1 / 128).ys[-1]
    back = sdesolve(sde, there, [1.0, 0.0], brownian=bm, method="slow-rk", step_size=1 / 128).ys[-1]
    assert torch.allclose(back, y0, atol=1e-3)
    each = sdesolve(sde, there, [1.0, 0.0], brownian=bm, batch="per-sample", rtol=1e-2, atol=1e-3).ys[-1]
    assert torch.allclose(each, y0, atol=3e-2)


def test_the_same_path_for_every_dtype_and_method():
    """out.brownian drives again; one with areas serves methods that use none."""
    sde, y0 = problems.equation("diagonal", "ito"), torch.full((3, 2), 0.5)
    out = sdesolve(sde, y0, [0.0, 1.0], step_size=0.01, seed=9)
    same = sdesolve(sde, y0.double(), [0.0, 1.0], step_size=0.01, seed=9)
    assert torch.allclose(out.ys.double(), same.ys, atol=1e-5)
    milstein = sdesolve(sde, y0.double(), [0.0, 1.0], step_size=0.01, brownian=out.brownian, method="milstein")
    assert torch.allclose(milstein.ys, same.ys, atol=0.05)


def test_threads_do_not_change_the_noise():
    found = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        try:
            bm = Brownian(range(64), (16,), 0, 1)
            found.append(torch.stack([bm.increment(k / 7, (k + 1) / 7) for k in range(7)]))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(*found)


def test_failures_are_named_or_returned():
    explosive = SDE(lambda t, y: y**3, lambda t, y: y)
    y0 = torch.tensor([[0.1], [5.0]], **F64)
    with pytest.raises(NumericalError, match="sample 1"):
        sdesolve(explosive, y0, [0.0, 3.0], step_size=0.1, batch="per-sample")
    out = sdesolve(explosive, y0, [0.0, 3.0], rtol=1e-2, batch="per-sample", throw=False)
    assert out.status[0] == 0 and out.status[1] != 0  # noqa: PT018
    assert torch.isfinite(out.ys[:, 0]).all()
    few = sdesolve(explosive, y0[:1], [0.0, 3.0], max_steps=3, throw=False)
    assert few.status == pfode.ode.Status.MAX_STEPS


def test_times_may_repeat_or_stand_still():
    sde, y0 = problems.equation("diagonal", "ito"), torch.full((2, 2), 0.5, **F64)
    out = sdesolve(sde, y0, [0.0, 0.5, 0.5, 1.0], step_size=0.1)
    assert torch.equal(out.ys[1], out.ys[2])
    still = sdesolve(sde, y0, [0.3, 0.3], step_size=0.1)
    assert torch.equal(still.ys, y0.expand(2, 2, 2))


def test_output_times_do_not_change_the_path():
    """Fixed steps: the states at given times do not depend on which others are asked for, where those are steps."""
    sde, y0 = problems.equation("diagonal", "ito"), torch.full((2, 2), 0.5, **F64)
    ends = [sdesolve(sde, y0, ts, step_size=1 / 16).ys[-1] for ts in ([0.0, 1.0], [0.0, 0.25, 0.5, 1.0])]
    assert torch.equal(*ends)


def test_autocast_and_half_precision():
    sde = SDE(lambda t, y: -y, lambda t, y: 0.5 * y)
    y0 = torch.ones(2, 3, dtype=torch.bfloat16)
    assert sdesolve(sde, y0, [0.0, 1.0], step_size=0.1).ys.dtype == torch.float32
    net = torch.nn.Linear(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = sdesolve(SDE(lambda t, y: net(y), lambda t, y: y), torch.ones(2, 3), [0.0, 1.0], step_size=0.1)
    assert out.ys.dtype == torch.float32
    out.ys.sum().backward()
    assert net.weight.grad is not None


def test_dyadic_steps_visit_every_point_that_was_tried():
    """Whatever is accepted, rejected or cut by stops."""
    from pfode.ode.batching import Joint
    from pfode.sde import Dyadic

    rng = np.random.default_rng(0)
    for towards in (1, -1):
        control = Dyadic(unit=1.0, origin=0.0, towards=towards)
        t, goal, h, tried, met = (0.0, 1.0, 0.7, set(), set())
        if towards < 0:
            t, goal = 1.0, 0.0
        stop = 0.3
        while t != goal:
            size = control.fit(Joint(), t, h)
            new = t + towards * size
            if (stop - t) * towards > 0 and (new - stop) * towards >= 0:
                new = stop
            tried.add(round(new, 9))
            if rng.random() < 0.5 and h > 2**-9:
                h = abs(new - t) * rng.uniform(0.2, 0.99)
            else:
                t = new
                met.add(round(t, 9))
                h = abs(size) * rng.uniform(0.5, 10)
        assert tried == met


def test_a_walk_of_chained_solves_is_one_solve():
    """Stop half-way and go on, on the same path."""
    sde, y0 = problems.equation("general", "stratonovich"), torch.full((2, 2), 0.5, **F64)
    bm = Brownian([5, 6], (2,), 0, 1, area=True, **F64)
    whole = sdesolve(sde, y0, [0.0, 0.5, 1.0], brownian=bm, step_size=1 / 8).ys
    parts = [y0]
    for a, b in itertools.pairwise([0.0, 0.5, 1.0]):
        parts.append(sdesolve(sde, parts[-1], [a, b], brownian=bm, step_size=1 / 8).ys[-1])
    assert torch.equal(whole, torch.stack(parts))
