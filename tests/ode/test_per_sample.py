"""batch="per-sample": a sample in a batch is that sample alone, to rounding, counts included, whoever is with it."""

import math
from typing import Any

import pytest
import torch

from pfode.ode import SOLVERS, Event, Status, solve
from pfode.ode.methods.implicit import implicit_solvers
from pfode.ode.registry import PAIRED

f64 = torch.float64
SCIPY = ["scipy:RK45", "scipy:Radau", "scipy:LSODA"]
TS = torch.tensor([0.0, 0.15, 0.7], dtype=f64)


def oscillator(t, y, mu, doom):
    """Van der Pol's, so that samples are easy or stiff; beyond its time `doom` a sample is NaN."""
    x, v = y.unbind(-1)
    slope = torch.stack([v, mu * (1 - x * x) * v - x], -1)
    return torch.where((t >= doom)[..., None], math.nan, slope)


def pair(t, y, mu, doom):
    return y[1], torch.where((t >= doom)[..., None], math.nan, -torch.sin(y[0]) * mu[..., None])


def call(method, y, mu, doom, dtype=f64, ts=TS, **changed):
    """A batch of states (x, v) solved, per sample."""
    paired = method in PAIRED
    y, mu, doom = y.to(dtype), mu.to(dtype), doom.to(dtype)
    fixed = paired or (method in SOLVERS and not SOLVERS[method].error_order)
    options: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-7} | ({"step_size": 0.1} if fixed else {}) | changed
    if method == "implicit_euler":  # of order 1
        options["rtol"] = 1e-2
    if fixed or "step_size" in options or "reversible" in method:
        mu = mu / 16
    start = (y[:, :1], y[:, 1:]) if paired else y
    out = solve(
        pair if paired else oscillator,
        start,
        ts,
        method=method,
        batch="per-sample",
        args=(mu, doom),
        throw=False,
        **options,
    )
    ys, end = (torch.cat(part, -1) if paired else part for part in (out.ys, out.y))
    return out, ys, end


Y = torch.tensor([[2.0, 0.0], [2.0, 0.1], [0.5, 0.5], [-1.0, 1.0]], dtype=f64)
MU = torch.tensor([1.0, 40.0, 3.0, 5.0], dtype=f64)  # the second is hard
DOOM = torch.tensor([9.0, 9.0, 0.33, 9.0], dtype=f64)  # the third fails


def agree(whole, alone, i, j, rtol, same_counts=True):
    (out, ys, end), (own, own_ys, own_end) = whole, alone
    assert torch.allclose(ys[:, i], own_ys[:, j], rtol=rtol, atol=rtol, equal_nan=True)
    assert torch.allclose(end[i], own_end[j], rtol=rtol, atol=rtol, equal_nan=True)
    assert int(out.status[i]) == int(own.status[j])
    assert float(out.t[i]) == pytest.approx(float(own.t[j]), rel=rtol)
    if same_counts:
        for count, single in zip(out.stats[:6], own.stats[:6], strict=True):
            assert count.shape == out.status.shape
            assert int(count[i]) == int(single[j])


@pytest.mark.parametrize("dtype", [f64, torch.float32])
@pytest.mark.parametrize("method", [*SOLVERS, *PAIRED, *SCIPY])
def test_alone_and_in_a_batch(method, dtype):
    rtol = 1e-11 if dtype == f64 else 1e-5
    whole = call(method, Y, MU, DOOM, dtype)
    fails = Status.NON_FINITE
    assert int(whole[0].status[2]) in (fails, Status.MIN_STEP, Status.NEWTON_FAILED)
    assert torch.tensor([int(s) for s in whole[0].status])[[0, 1, 3]].eq(Status.SUCCESS).all()
    for i in range(4):
        y, mu, doom = (x[i : i + 1] for x in (Y, MU, DOOM))
        agree(whole, call(method, y, mu, doom, dtype), i, 0, rtol)


@pytest.mark.parametrize("method", ["dopri5", "vern7", "kvaerno5", "radauIIA5", "trbdf2", "reversible-heun"])
def test_the_order_of_a_batch_and_times_of_each_sample(method):
    rows = torch.tensor([[0.0, 0.2, 0.5], [0.1, 0.3, 0.3], [0.6, 0.4, 0.0], [0.0, 0.0, 0.01]], dtype=f64)
    order = [2, 0, 3, 1]
    doom = torch.full((4,), 9.0, dtype=f64)
    whole = call(method, Y, MU, doom, ts=rows)
    turned = call(method, Y[order], MU[order], doom, ts=rows[order])
    for place, i in enumerate(order):
        agree(turned, whole, place, i, 1e-11)
        alone = call(method, Y[i : i + 1], MU[i : i + 1], doom[:1], ts=rows[i : i + 1])
        agree(whole, alone, i, 0, 1e-11)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4", "kvaerno3", "radauIIA5", "gl4", "abm4", "scipy:RK45"])
@pytest.mark.parametrize("step_size", [None, 0.05])
def test_an_event_in_one_sample(method, step_size):
    """It ends there, also on a fixed grid, where it is neither counted nor waited for any more."""
    if step_size and "scipy" in method:
        pytest.skip("it chooses its own steps")
    options = {"events": Event(lambda t, y, *args: y[..., 0] - 0.8), "step_size": step_size}
    if step_size is None and method in ("rk4", "gl4", "abm4"):
        options["step_size"] = 0.1
    y0 = torch.tensor([[2.0, 0.0], [0.5, 0.9], [2.0, 0.1]], dtype=f64)
    mu, doom = MU[:3] / 4, torch.full((3,), 9.0, dtype=f64)
    whole = call(method, y0, mu, doom, **options)
    assert whole[0].status.tolist() == [Status.SUCCESS, Status.EVENT, Status.SUCCESS]
    for i in range(3):
        agree(whole, call(method, y0[i : i + 1], mu[i : i + 1], doom[:1], **options), i, 0, 1e-11)


def test_tolerances_of_each_sample():
    rtol = torch.tensor([[1e-3], [1e-8], [1e-5], [1e-4]], dtype=f64).expand(4, 2)
    doom = torch.full((4,), 9.0, dtype=f64)
    for method in ("dopri5", "kvaerno5", "radauIIA5", "scipy:Radau"):
        whole = call(method, Y, MU, doom, rtol=rtol)
        for i in range(4):
            alone = call(method, Y[i : i + 1], MU[i : i + 1], doom[:1], rtol=rtol[i : i + 1])
            agree(whole, alone, i, 0, 1e-11)


@pytest.mark.parametrize("method", list(implicit_solvers()))
def test_steps_whose_equations_cannot_be_solved_with_an_old_jacobian(method):
    """Fixed steps, a field so crooked that Newton's method begins anew in one sample: not in the others."""

    def crooked(t, y, k):
        return -torch.sin(k * y) * k

    y0, k = torch.tensor([[1.0], [0.4]], dtype=f64), torch.tensor([[5.0], [1.0]], dtype=f64)
    options = {"method": method, "batch": "per-sample", "step_size": 0.25, "throw": False}
    whole = solve(crooked, y0, [0.0, 1.0], args=(k,), **options)
    for i in (0, 1):
        alone = solve(crooked, y0[i : i + 1], [0.0, 1.0], args=(k[i : i + 1],), **options)
        assert torch.allclose(whole.ys[:, i], alone.ys[:, 0], rtol=1e-11)
        assert [int(x[i]) for x in whole.stats[:6]] == [int(x[0]) for x in alone.stats[:6]]
    assert int(whole.stats.nfe[1]) < int(whole.stats.nfe[0])
