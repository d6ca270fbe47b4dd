"""Ends and starts: times that are repeated, no way to go, no samples, huge and endless slopes, slow clocks, bounds."""

import math

import pytest
import torch

from pfode.errors import NumericalError, UsageError
from pfode.ode import Status, solve, steps

f64 = torch.float64
METHODS = ["dopri5", "dopri8", "rk4", "kvaerno5", "radauIIA5", "abm4", "reversible-heun", "scipy:RK45", "scipy:LSODA"]


def decay(t, y):
    return -y


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("method", METHODS)
def test_times_that_are_repeated_have_the_same_state(method, batch):
    y0 = torch.tensor([[1.0], [2.0]], dtype=f64)
    for ts in ([0.0, 0.5, 1.0], [1.0, 0.5, 0.0]):
        once = solve(decay, y0, ts, method=method, batch=batch).ys
        twice = solve(decay, y0, [t for t in ts for _ in range(2)], method=method, batch=batch)
        assert torch.allclose(twice.ys, once.repeat_interleave(2, 0), rtol=1e-12)
        assert torch.equal(twice.ys[:2], torch.stack([y0, y0]))
        nowhere = solve(decay, y0, [0.3, 0.3, 0.3], method=method, batch=batch)
        assert torch.equal(nowhere.ys, torch.stack([y0] * 3))
        assert torch.equal(nowhere.y, y0)
        assert int(torch.as_tensor(nowhere.stats.nfe).max()) == 0
        assert (torch.as_tensor(nowhere.status) == Status.SUCCESS).all()


@pytest.mark.parametrize("adjoint", ["checkpoint", "direct", "backsolve"])
@pytest.mark.parametrize("batch", ["joint", "per-sample"])
def test_gradients_with_repeated_times(batch, adjoint):
    y0 = torch.tensor([[1.0], [2.0]], dtype=f64, requires_grad=True)
    rate = torch.tensor(0.7, dtype=f64, requires_grad=True)
    weights = torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4, 1e5], dtype=f64)[:, None, None]
    ts = [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    out = solve(lambda t, y: -rate * y, y0, ts, rtol=1e-10, atol=1e-12, batch=batch, adjoint=adjoint)
    made = torch.autograd.grad((weights * out.ys).sum(), (y0, rate))
    times = torch.tensor(ts, dtype=f64)[:, None, None]
    exact = (weights * y0 * torch.exp(-rate * times)).sum()
    for one, other in zip(made, torch.autograd.grad(exact, (y0, rate)), strict=True):
        assert torch.allclose(one, other, rtol=1e-7)
    with pytest.raises(UsageError, match="have no gradients of their own"):
        solve(decay, y0, torch.tensor(ts, requires_grad=True), batch=batch)


@pytest.mark.parametrize("adjoint", ["checkpoint", "direct"])
def test_a_sample_with_no_way_to_go(adjoint):
    ts = torch.tensor([[0.0, 0.0, 1.0], [2.0, 2.0, 2.0], [1.0, 0.5, 0.5]], dtype=f64)
    y0 = torch.ones(3, 2, dtype=f64, requires_grad=True)
    out = solve(decay, y0, ts, batch="per-sample", rtol=1e-9, adjoint=adjoint)
    exact = torch.exp(ts[:, :1] - ts).T[..., None].expand(3, 3, 2)
    assert torch.allclose(out.ys, exact, rtol=1e-7)
    assert out.status.tolist() == [0, 0, 0]
    assert out.stats.nfe[1] == out.stats.steps[1] == 0
    (made,) = torch.autograd.grad(out.ys.sum(), y0)
    assert torch.allclose(made, exact.sum(0), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_no_samples(method):
    y0 = torch.ones(0, 3, requires_grad="scipy" not in method)
    for batch in ("joint", "per-sample"):
        out = solve(decay, y0, [0.0, 0.5, 1.0], method=method, batch=batch, rtol=1e-3)
        assert out.ys.shape == (3, 0, 3)
        assert out.y.shape == (0, 3)
        if y0.requires_grad:
            out.ys.sum().backward()
    assert out.status.shape == out.stats.nfe.shape == (0,)
    event = solve(decay, y0, [0.0, 1.0], batch="per-sample", events=lambda t, y: y[:, 0] - 0.5)
    assert event.events[0].t.shape == (0, 0)


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("slope", [math.inf, -math.inf, math.nan])
def test_a_slope_that_is_not_finite_at_the_start(slope, batch):
    for method in ("dopri5", "kvaerno5", "radauIIA5", "reversible-heun"):
        with pytest.raises(NumericalError, match="the field or the state is not finite"):
            solve(lambda t, y: y * 0 + slope, torch.ones(2, 1), [0.0, 1.0], method=method, batch=batch)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8"])
@pytest.mark.parametrize("slope", [1e30, 1e300, 1e307, 1e308, -1e308])
def test_a_huge_constant_slope(method, slope):
    out = solve(lambda t, y: y * 0 + slope, torch.zeros(2, dtype=f64), [0.0, 1.0], method=method, throw=False)
    if out.status == Status.SUCCESS:
        assert torch.allclose(out.y / slope, torch.ones(2, dtype=f64))
    else:
        assert abs(slope) > 1e307  # stages overflow
        assert out.status == Status.NON_FINITE


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "kvaerno5", "radauIIA5"])
def test_a_slow_clock_takes_as_many_steps(method, batch):
    y0 = torch.tensor([[1.0], [2.0]], dtype=f64)
    plain = solve(decay, y0, [0.0, 1.0], method=method, batch=batch)
    for scale in (1e6, 1e15, 1e30):
        slow = solve(lambda t, y, s=scale: -y / s, y0, [0.0, scale], method=method, batch=batch)
        assert torch.allclose(slow.y, plain.y, rtol=1e-5)
        most, base = (int(torch.as_tensor(s.stats.steps).max()) for s in (slow, plain))
        assert most <= base + 2


def test_steps_show_which_samples_moved():
    mu = torch.tensor([1.0, 50.0], dtype=f64)

    def field(t, y):
        return torch.stack([y[:, 1], mu * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], -1)

    rejected = 0
    for point in steps(field, torch.tensor([[2.0, 0.0]] * 2, dtype=f64), [0.0, 2.0], batch="per-sample"):
        assert point.accepted.dtype == torch.bool
        assert torch.equal(point.t1 != point.t0, point.accepted)
        rejected += int((~point.accepted).sum())
    assert rejected
    assert all(point.accepted is True for point in steps(decay, torch.ones(1), [0.0, 1.0]))


def test_the_default_bound_on_work():
    with pytest.raises(NumericalError, match=r"max_steps = 10000 attempts .*\nhint: .*kvaerno5.* a larger max_steps="):
        solve(lambda t, y: -1e7 * (y - torch.cos(t)), torch.ones(1), [0.0, 1e3], method="bosh3")
    out = solve(decay, torch.ones(1), [0.0, 1.0], method="euler", step_size=1 / 10_500)  # steps that were asked for
    assert out.stats.steps == 10_500
    with pytest.raises(UsageError, match="makes 1000000 steps, more than max_steps = 100000"):
        solve(decay, torch.ones(1), [0.0, 1.0], method="euler", step_size=1e-6)
