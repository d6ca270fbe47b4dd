"""The loop: step sizes, both directions, per-sample freezing, stops, status, statistics, and trees of any kind."""

import dataclasses
import math

import pytest
import torch

from pfode import ode
from pfode.errors import NumericalError, UsageError
from pfode.ode import PI, PID, Status, solve, steps
from pfode.ode.methods.implicit import implicit_solvers
from tests.ode import problems

SOLVERS = {name: s for name, s in ode.SOLVERS.items() if name not in implicit_solvers()}  # those: test_implicit.py

ADAPTIVE = [name for name, solver in SOLVERS.items() if solver.error_order]
f64 = torch.float64


def decay(t, y):
    return -y


def wave(t, y):
    return torch.cos(t) * torch.ones_like(y)


@pytest.mark.parametrize("span", [(5.0, 9.0), (5.0, 1.0)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_error_follows_the_tolerance_at_all_times(name, span):
    ts = torch.linspace(span[0], span[1], 9, dtype=f64)
    for tol in (1e-3, 1e-6):
        out = solve(problems.rational, problems.rational_solution(ts[0]), ts, method=name, rtol=tol, atol=tol * 1e-3)
        exact = problems.rational_solution(ts)
        units = (out.ys - exact).abs() / (tol * (1e-3 + exact.abs()))
        assert units.max() < (250 if name == "fehlberg2" else 10)  # its weights underrate the error: 1/512
    assert out.status == Status.SUCCESS


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("span", [(0.0, 1.7), (0.0, -1.7)])
def test_nothing_is_evaluated_outside_and_nfe_is_what_was_called(name, span, batch):
    seen = []

    def field(t, y):
        seen.append(t)
        return -y * (1 + t.reshape(-1, 1) ** 2)

    ts = [span[0] + (span[1] - span[0]) * k / 7 for k in range(8)]
    out = solve(field, torch.ones(3, 2), ts, method=name, batch=batch, rtol=1e-4, atol=1e-4)
    times = torch.stack([t.expand(3) for t in seen])
    assert times.dtype == torch.float32
    assert times.min() >= torch.tensor(min(span))
    assert times.max() <= torch.tensor(max(span))
    if batch == "joint":
        assert out.stats.nfe == len(seen)
        assert out.stats.accepted + out.stats.rejected == out.stats.steps
    else:
        assert (torch.as_tensor(out.stats.nfe) <= len(seen)).all()
    assert float(torch.as_tensor(out.t).sub(span[1]).abs().max()) == 0


def test_a_step_at_the_end_is_not_interpolated():
    """torchdiffeq's dopri8 has an error of 9.7e-6 here, as it steps over the end and interpolates back."""

    def field(t, y):
        return -y * torch.cos(2 * t) + torch.sin(3 * t) + 0.2 * y * y

    y0, ts = torch.tensor([1.0], dtype=f64), [0.0, 2.0]
    exact = solve(field, y0, ts, method="dopri8", rtol=1e-13, atol=1e-13).ys[-1]
    out = solve(field, y0, ts, method="dopri8", rtol=1e-8, atol=1e-8)
    assert (out.ys[-1] - exact).abs() < 1e-8
    assert out.stats.nfe <= 119


def test_per_sample_steps_are_those_of_each_sample_alone():
    mu = torch.tensor([1.0, 30.0], dtype=f64)

    def field(t, y, mu):
        return torch.stack([y[..., 1], mu * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)

    y0 = torch.tensor([[2.0, 0.0]], dtype=f64).expand(2, 2)
    ts = torch.linspace(0, 10, 13, dtype=f64)
    both = solve(field, y0, ts, batch="per-sample", args=(mu,))
    for i in (0, 1):
        alone = solve(field, y0[i], ts, args=(mu[i],))
        assert torch.allclose(both.ys[:, i], alone.ys, rtol=1e-6, atol=1e-7)
        assert int(both.stats.steps[i]) == pytest.approx(
            alone.stats.steps, rel=0.03
        )  # sums are rounded in other orders
        assert int(both.stats.nfe[i]) == pytest.approx(alone.stats.nfe, rel=0.03)
    assert both.stats.steps[1] > 2 * both.stats.steps[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_failing_sample_stops_only_itself(bad):
    def field(t, y):
        late = (t > 0.55) & (torch.arange(3) == 1)
        return torch.where(late[:, None], bad, -y)

    y0, ts = torch.ones(3, 2, dtype=f64), torch.linspace(0, 1, 5, dtype=f64)
    out = solve(field, y0, ts, batch="per-sample", throw=False)
    assert out.status.tolist() == [Status.SUCCESS, Status.NON_FINITE, Status.SUCCESS]
    exact = torch.exp(-ts)[:, None].expand(5, 2)
    assert torch.allclose(out.ys[:, 0], exact, atol=1e-6)
    assert torch.allclose(out.ys[:3, 1], exact[:3], atol=1e-6)
    assert out.ys[3:, 1].isnan().all()
    assert 0.54 < out.t[1] <= 0.55
    with pytest.raises(NumericalError, match=r"stopped at t = 0.5\d*, sample 1: the field or the state is not finite"):
        solve(field, y0, ts, batch="per-sample")


def test_directions_and_times_may_differ_between_samples():
    ts = torch.tensor([[0.0, 0.3, 1.0], [1.0, 0.2, -1.0], [2.0, 2.1, 2.2]], dtype=f64)
    y0 = torch.exp(-ts[:, :1]).expand(3, 2)
    out = solve(decay, y0, ts, batch="per-sample")
    assert torch.allclose(out.ys, torch.exp(-ts.T)[..., None].expand(3, 3, 2), rtol=1e-5)


def test_a_field_that_is_not_finite_is_reported_quickly():
    calls = []

    def field(t, y):
        calls.append(t)
        return y * math.nan

    out = solve(field, torch.ones(2), [0.0, 1.0], throw=False)
    assert out.status == Status.NON_FINITE
    assert len(calls) < 5
    out = solve(field, torch.ones(2), [0.0, 1.0], controller=PID(first_step=0.1), throw=False)
    assert out.status == Status.NON_FINITE
    assert len(calls) < 100


def test_too_few_steps_return_what_there_is():
    ts = torch.linspace(0, 10, 11, dtype=f64)
    full = solve(wave, torch.zeros(1, dtype=f64), ts)
    part = solve(wave, torch.zeros(1, dtype=f64), ts, max_steps=8, throw=False)
    reached = int((ts <= part.t).sum())
    assert part.status == Status.MAX_STEPS
    assert part.stats.steps == 8
    assert 1 < reached < 11
    assert torch.equal(part.ys[:reached], full.ys[:reached])
    assert part.ys[reached:].isnan().all()
    with pytest.raises(NumericalError, match="max_steps = 8 attempts were not enough"):
        solve(wave, torch.zeros(1, dtype=f64), ts, max_steps=8)


def test_limits_of_the_step_size():
    y0 = torch.zeros(1, dtype=f64)
    sizes = [p.t1 - p.t0 for p in steps(wave, y0, [0.0, 10.0], controller=PID(max_step=0.25))]
    assert max(sizes) <= 0.25 + 1e-12
    assert sum(sizes) == pytest.approx(10)

    def kink(t, y):
        return torch.where(t > 0.5, 1e9, 0.0) * torch.ones_like(y)

    out = solve(kink, y0, [0.0, 1.0], rtol=1e-12, atol=1e-12, controller=PID(min_step=1e-3), throw=False)
    assert out.status == Status.MIN_STEP
    out = solve(kink, y0, [0.0, 1.0], rtol=1e-12, atol=1e-12, controller=PID(min_step=1e-3, force=True))
    assert out.status == Status.SUCCESS


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("span", [(0.0, 2.0), (2.0, 0.0)])
def test_jumps_cost_nothing_and_are_seen_from_either_side(batch, span):
    seen = []

    def field(t, y):
        seen.append(t.flatten())
        return torch.where(t < 1, 1.0, -3.0).reshape(-1, 1).expand(2, 1) + 0 * y

    y0 = torch.zeros(2, 1, dtype=f64)
    blind = solve(field, y0, span, batch=batch)
    seen.clear()
    told = solve(field, y0, span, batch=batch, jump_t=[1.0])
    assert not (torch.cat(seen) == 1).any()
    sign = 1 if span[1] > span[0] else -1
    assert torch.allclose(told.ys[-1], torch.full((2, 1), -2.0 * sign, dtype=f64), atol=1e-12)
    assert int(torch.as_tensor(told.stats.nfe).max()) * 2 < int(torch.as_tensor(blind.stats.nfe).max())


def test_stops_are_met_exactly():
    ends = [p.t1 for p in steps(decay, torch.ones(1), [0.0, 3.0], step_t=[0.7, 2.1])]
    assert {0.7, 2.1, 3.0} <= set(ends)
    ends = [p.t1 for p in steps(decay, torch.ones(1), [0.0, 1.0], method="rk4", step_size=0.3)]
    assert ends == pytest.approx([0.3, 0.6, 0.9, 1.0])
    assert ends[-1] == 1.0


def test_steps_yield_states_and_what_lies_between():
    points = list(steps(wave, torch.zeros(2, dtype=f64), [0.0, 4.0]))
    for point in points:
        middle = 0.3 * point.t0 + 0.7 * point.t1
        assert torch.allclose(point.at(middle), torch.full((2,), math.sin(middle), dtype=f64), atol=1e-5)
    assert points[-1].t1 == 4.0


@pytest.mark.parametrize("control", [PID(), PI(), PID(p=0.2, i=0.4, d=0.05)], ids=["I", "PI", "PID"])
def test_controllers_reach_the_end_with_few_rejections(control):
    ts = torch.linspace(5, 9, 5, dtype=f64)
    out = solve(problems.rational, problems.rational_solution(ts[0]), ts, rtol=1e-8, atol=1e-10, controller=control)
    assert torch.allclose(out.ys, problems.rational_solution(ts), rtol=1e-6)
    assert out.stats.rejected <= 0.2 * out.stats.steps + 1


@dataclasses.dataclass
class Pair:
    q: torch.Tensor
    p: torch.Tensor


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("method", ["dopri5", "rk4", "dopri8"])
def test_any_tree_is_a_state(batch, method):
    q = torch.randn(3, 2, dtype=f64, generator=torch.Generator().manual_seed(0))

    def turn(q, p):
        return p, -q

    forms = [
        ((q, torch.zeros_like(q)), lambda t, y: turn(*y), lambda y: y[0]),
        (
            {"q": q, "p": torch.zeros_like(q)},
            lambda t, y: dict(zip("qp", turn(y["q"], y["p"]), strict=True)),
            lambda y: y["q"],
        ),
        (Pair(q, torch.zeros_like(q)), lambda t, y: Pair(*turn(y.q, y.p)), lambda y: y.q),
        ([q, (torch.zeros_like(q),)], lambda t, y: [y[1][0], (-y[0],)], lambda y: y[0]),
        (q.to(torch.complex128), lambda t, y: 1j * y, lambda y: y.real),
    ]
    ts = torch.linspace(0, 2, 41, dtype=f64)
    for y0, field, read in forms:
        out = solve(field, y0, ts, method=method, batch=batch)
        assert type(out.ys) is type(y0)
        assert torch.allclose(read(out.ys), q * torch.cos(ts)[:, None, None], atol=2e-5)


def test_half_precision_networks_have_a_float32_state():
    seen = []

    def field(t, y):
        seen.append((t.dtype, y.dtype))
        return -y

    out = solve(field, torch.ones(4, dtype=torch.bfloat16), [0.0, 1.0], rtol=1e-3, atol=1e-3)
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    assert out.ys.dtype == torch.float32
    assert torch.allclose(out.ys[-1], torch.full((4,), math.exp(-1)), rtol=2e-2)


def test_fields_may_use_one_buffer_for_their_results():
    buffer = torch.zeros(3, dtype=f64)

    def field(t, y):
        return torch.mul(y, -1 - t, out=buffer)

    def clean(t, y):
        return y * (-1 - t)

    for name in SOLVERS:
        with torch.no_grad():
            ts, y0 = torch.linspace(0, 1, 4, dtype=f64), torch.ones(3, dtype=f64)
            options = {
                "method": name,
                "rtol": 1e-5,
                "controller": PID(first_step=0.9) if SOLVERS[name].error_order else None,
            }
            assert torch.equal(solve(field, y0, ts, **options).ys, solve(clean, y0, ts, **options).ys)


def test_one_time_returns_the_state():
    for name in SOLVERS:
        assert torch.equal(solve(decay, torch.arange(3.0), [0.7], method=name).ys, torch.arange(3.0)[None])


def test_direct_gradients_match_differences_for_state_and_every_time():
    for name, options in (("dopri5", {}), ("rk4", {}), ("dopri8", {}), ("heun3", {"step_size": 0.21})):

        def ends(y0, ts, name=name, options=options):
            return solve(problems.swing, y0, ts, method=name, rtol=1e-9, atol=1e-9, **options).ys

        ts = torch.tensor([0.3, 0.5, 0.9, 1.1], dtype=f64, requires_grad=True)
        y0 = problems.swung(ts.detach()[0]).requires_grad_()
        assert torch.autograd.gradcheck(ends, (y0, ts), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ts": [0.0, 2.0, 1.0]}, "times that rise or fall"),
        ({"ts": torch.tensor([0.0, 1.0, 1.0], requires_grad=True)}, "have no gradients of their own"),
        ({"ts": [0.0, math.nan]}, "finite times"),
        ({"ts": []}, "shape"),
        ({"ts": torch.zeros(2, 2)}, "shape"),
        ({"y0": torch.arange(3)}, "floating-point or complex"),
        ({"y0": "state"}, "floating-point or complex"),
        ({"y0": torch.zeros(0)}, "empty state"),
        ({"method": "dopri6"}, "did you mean .*'dopri5'"),
        ({"batch": "each"}, "unknown batch"),
        ({"adjoint": "magic"}, "unknown adjoint"),
        ({"rtol": -1.0}, "rtol: need a number of at least 0"),
        ({"rtol": (1e-3, 1e-3)}, "2 leaves for 1"),
        ({"atol": torch.tensor(1e-3, requires_grad=True)}, "cannot have a gradient"),
        ({"max_steps": 0}, "max_steps"),
        ({"step_size": 0.0}, "positive number"),
        ({"step_size": 0.1, "grid": [0.0, 1.0]}, "give one of them"),
        ({"grid": [0.0, 0.5]}, r"to ts\[-1\] = 1"),
        ({"f": lambda t, y: y[:1]}, "the field's result: need a tensor of shape"),
        ({"f": lambda t, y: None}, "the field's result"),
        ({"f": 3}, "need a function"),
        ({"y0": torch.ones(()), "batch": "per-sample"}, "batch first"),
    ],
)
def test_wrong_calls_get_one_clear_error(change, message):
    call = {"f": decay, "y0": torch.ones(3), "ts": [0.0, 1.0], **change}
    with pytest.raises(UsageError, match=message):
        solve(call.pop("f"), call.pop("y0"), call.pop("ts"), **call)
