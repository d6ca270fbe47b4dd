"""Events: times and states, per sample, directions, several at once, zeros at the start, gradients."""

import math
from typing import Any

import pytest
import torch

from pfode.errors import NumericalError, UsageError
from pfode.ode import SOLVERS, Status, solve
from pfode.ode.events import Event, chandrupatla

f64 = torch.float64
G = 9.81
MODES: list[dict[str, Any]] = [
    {"method": "dopri5"},
    {"method": "dopri8"},
    {"method": "rk4", "step_size": 0.07},
    {"method": "dopri5", "batch": "per-sample"},
    {"method": "rk4", "step_size": 0.07, "batch": "per-sample"},
]


def fall(t, y):
    """A ball: height and speed."""
    return torch.stack([y[..., 1], torch.full_like(y[..., 1], -G)], -1)


def turn(t, y):
    return torch.stack([y[..., 1], -y[..., 0]], -1)


def height(t, y, *args):
    return y[..., 0]


@pytest.mark.parametrize("name", SOLVERS)
def test_every_method_finds_the_time_and_the_state(name):
    order = SOLVERS[name].order
    step, error = {1: (2**-7, 1e-2), 2: (2**-6, 1e-3)}.get(order, (2**-4, 1e-3))
    for end in (3.0, -3.0):
        y0 = torch.tensor([0.8, math.copysign(0.6, end)], dtype=f64)
        with torch.no_grad():
            out = solve(turn, y0, [0.0, end], method=name, events=height, step_size=step)
        assert out.status == Status.EVENT
        assert out.t == pytest.approx(math.copysign(math.pi / 2 + math.atan2(0.6, 0.8), end), abs=error)
        assert abs(float(out.y[0])) < 1e-10
        assert abs(float(out.y[1])) == pytest.approx(1, abs=error)
        assert float(out.events[0].t[-1]) == out.t


def test_an_event_costs_no_steps_and_is_exact_on_polynomials():
    y0 = torch.tensor([10.0, 0.0], dtype=f64)
    plain = solve(fall, y0, [0.0, 5.0])
    out = solve(fall, y0, [0.0, 1.0, 1.4, 1.5, 5.0], events=height)
    assert out.t == pytest.approx(math.sqrt(20 / G), abs=1e-12)
    assert out.stats.steps <= plain.stats.steps
    assert out.ys[:3].isfinite().all()
    assert out.ys[3:].isnan().all()


@pytest.mark.parametrize("options", MODES)
def test_terminal_and_other_events_with_directions(options):
    lead = (1,) if "batch" in options else ()
    y0 = torch.tensor([0.0, 1.0], dtype=f64).expand(*lead, 2)
    events = [
        Event(height, terminal=False),
        Event(height, terminal=False, direction=1),
        Event(height, terminal=False, direction=-1),
        Event(lambda t, y: torch.stack([y[..., 1] - 0.5, y[..., 1] + 0.5], -1), terminal=False),
        Event(lambda t, y: t - 8.2),
    ]
    out = solve(turn, y0, torch.linspace(0, 20, 21, dtype=f64), events=events, rtol=1e-9, atol=1e-9, **options)
    found = [hits.t.flatten() / math.pi for hits in out.events]
    third = 1 / 3
    expected = [[1.0, 2.0], [2.0], [1.0], [third, 2 * third, 4 * third, 5 * third, 7 * third]]
    for times, values in zip(found, expected, strict=False):
        assert times.tolist() == pytest.approx(values, abs=1e-5)
    assert float(out.t) == pytest.approx(8.2, abs=1e-12)
    assert (torch.as_tensor(out.status) == Status.EVENT).all()
    assert torch.allclose(out.events[1].y.flatten(), torch.tensor([0.0, 1.0], dtype=f64), atol=1e-4)
    assert out.ys[:9].isfinite().all()
    assert out.ys[9:].isnan().all()


@pytest.mark.parametrize("options", MODES[3:])
def test_samples_end_by_themselves(options):
    y0 = torch.tensor([[10.0, 0.0], [5.0, 0.0], [1e6, 0.0]], dtype=f64)
    ts = torch.linspace(0, 3, 7, dtype=f64)
    low = Event(lambda t, y: y[:, 0] - 3, terminal=False)
    out = solve(fall, y0, ts, events=[height, low], **options)
    ends = torch.tensor([math.sqrt(20 / G), math.sqrt(10 / G), 3.0], dtype=f64)
    assert out.status.tolist() == [Status.EVENT, Status.EVENT, Status.SUCCESS]
    assert torch.allclose(out.t, ends, atol=1e-9)
    exact = y0[:, 0] - G / 2 * ts[:, None] ** 2
    assert torch.equal(out.ys[..., 0].isnan(), ts[:, None] > ends)
    assert torch.allclose(out.ys[..., 0].nan_to_num(0), torch.where(ts[:, None] > ends, 0, exact), atol=1e-8)
    assert torch.allclose(out.events[1].t[0, :2], torch.tensor([math.sqrt(14 / G), math.sqrt(4 / G)], dtype=f64))
    assert out.events[1].t[:, 2].isnan().all()
    assert out.events[1].t.shape == (1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("options", MODES)
def test_a_solve_goes_on_from_an_event(options, dtype):
    """A bouncing ball: the ground is a zero at the start of every flight, and met only at its end."""
    lead = (2,) if "batch" in options else ()
    y, t = torch.tensor([2.0, 0.0], dtype=dtype).expand(*lead, 2), 0.0
    tol = 1e-4 if dtype == torch.float32 else 1e-9
    for bounce in range(5):
        out = solve(fall, y, [t, t + 50.0], events=height, rtol=tol, atol=tol, **options)
        flight = math.sqrt(4 / G) * (1 + 2 * sum(0.8**k for k in range(1, bounce + 1)))
        t = float(torch.as_tensor(out.t).reshape(-1)[0])
        assert t == pytest.approx(flight, rel=1e-3 if dtype == torch.float32 else 1e-7)
        y = out.y * torch.tensor([1.0, -0.8], dtype=dtype)


def test_a_zero_at_the_start_that_the_flow_leaves_is_no_event():
    y0 = torch.tensor([0.0, 1.0], dtype=f64)
    out = solve(turn, y0, [0.0, 10.0], events=height)
    assert out.t == pytest.approx(math.pi, abs=1e-5)
    out = solve(turn, y0, [0.0, 10.0], events=lambda t, y: y[0] * 0, throw=False)
    assert out.status == Status.SUCCESS
    out = solve(turn, -y0, [0.0, 10.0], events=Event(height, direction=-1))
    assert out.t == pytest.approx(2 * math.pi, abs=1e-5)


def test_an_event_at_an_output_time_and_at_the_end():
    y0 = torch.tensor([1.0, -2.0], dtype=f64)
    field = lambda t, y: torch.tensor([-1.0, 0.0], dtype=f64)  # noqa: E731
    out = solve(field, y0, [0.0, 1.0, 2.0], events=height)
    assert out.t == pytest.approx(1.0, abs=1e-12)
    out = solve(field, y0, [0.0, 0.5, 1.0], method="euler", events=height)
    assert out.t == 1.0
    assert out.status == Status.EVENT


@pytest.mark.parametrize("options", [{}, {"method": "rk4", "step_size": 0.31}, {"method": "dopri8", "step_size": 1.1}])
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients_through_time_state_and_parameters_to_second_order(options, per_sample):
    mode: dict[str, Any] = {"batch": "per-sample"} if per_sample else {}

    def met(y0, level, ts, gravity):
        field = lambda t, y: torch.stack([y[..., 1], -gravity * (1 + 0.1 * y[..., 0]).expand_as(y[..., 1])], -1)  # noqa: E731
        hit = Event(lambda t, y: y[..., 0] - level * (1 + 0.1 * t), terminal=True)
        out = solve(field, y0, ts, events=hit, rtol=1e-10, atol=1e-10, **options, **mode)
        return out.events[0].t, out.events[0].y

    y0 = torch.tensor([[10.0, 0.3], [4.0, 1.0]], dtype=f64) if per_sample else torch.tensor([10.0, 0.3], dtype=f64)
    inputs = [y0, torch.tensor(2.0, dtype=f64), torch.tensor([0.1, 7.0], dtype=f64), torch.tensor(G, dtype=f64)]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(met, inputs)
    if "step_size" in options:
        assert torch.autograd.gradgradcheck(met, inputs)


def test_the_gradient_of_an_event_time_is_the_exact_one():
    h, g = (torch.tensor(x, dtype=f64, requires_grad=True) for x in (7.0, G))
    field = lambda t, y: torch.stack([y[1], -g])  # noqa: E731
    out = solve(field, torch.stack([h, h * 0]), [0.0, 9.0], events=height)
    first = torch.autograd.grad(out.events[0].t[0], (h, g), create_graph=True)
    assert first[0].item() == pytest.approx(1 / math.sqrt(2 * G * 7))
    assert first[1].item() == pytest.approx(-math.sqrt(2 * 7 / G**3) / 2)
    (second,) = torch.autograd.grad(first[0], h)
    assert float(second) == pytest.approx(-0.5 / math.sqrt(2 * G) * 7**-1.5)
    fixed = solve(field, torch.stack([h, h * 0]), [0.0, 9.0], events=Event(height, gradient=False))
    assert not fixed.events[0].t.requires_grad
    (by_height,) = torch.autograd.grad(fixed.y[0], h)
    assert float(by_height) == pytest.approx(1)


def test_states_of_any_form_and_args():
    y0 = {"h": torch.tensor(10.0, dtype=f64), "v": (torch.zeros((), dtype=f64),)}

    def field(t, y, gravity):
        return {"h": y["v"][0], "v": (-gravity * torch.ones_like(y["h"]),)}

    event = Event(lambda t, y, gravity: y["h"] - gravity, terminal=False)
    out = solve(field, y0, [0.0, 1.0], args=(G,), events=event)
    assert out.events[0].t.tolist() == pytest.approx([math.sqrt(2 * (10 - G) / G)])
    assert out.events[0].y["v"][0].shape == (1,)
    none = solve(field, y0, [0.0, 0.1], args=(G,), events=event)
    assert none.events[0].t.shape == (0,)
    assert none.events[0].y["h"].shape == (0,)


def test_roots_of_steep_flat_and_stepped_functions():
    low, high = torch.zeros(4, dtype=f64), torch.ones(4, dtype=f64)
    zeros = torch.tensor([0.3, 1e-7, 0.77, 0.5], dtype=f64)
    calls = []

    def g(x):
        calls.append(x)
        d = x - zeros
        return torch.stack([torch.expm1(30 * d[0]), d[1], d[2] ** 9, torch.where(d[3] < 0, -1.0, 1.0)])

    found = chandrupatla(g, low, high, g(low), g(high), torch.ones(4, dtype=torch.bool))
    assert torch.allclose(found[[0, 1, 3]], zeros[[0, 1, 3]], rtol=1e-14, atol=1e-15)
    assert abs(found[2] - zeros[2]) < 1e-12
    assert len(calls) < 75


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "need at least one"),
        (3, "need a function"),
        (lambda t, y: 3.0, "must return a real tensor, got float"),
        (lambda t, y: y[0] > 0, "must return a real tensor, got torch.bool"),
        (lambda t, y: y[None, None], r"must have shape \(\) or \(k,\)"),
    ],
)
def test_wrong_events_get_one_clear_error(events, message):
    with pytest.raises(UsageError, match=message):
        solve(turn, torch.ones(2), [0.0, 1.0], events=events)
    with pytest.raises(UsageError, match="direction: need -1, 0 or 1"):
        Event(height, direction=2)


def falling(t, y):
    return torch.full_like(y, -1.0)


@pytest.mark.parametrize("options", MODES)
def test_a_condition_that_turns_nan_is_reported(options):
    lead = (2,) if "batch" in options else ()
    y0 = torch.full((*lead, 1), 0.73, dtype=f64)

    def run(condition, **more):
        return solve(falling, y0, [0.0, 0.2, 2.0], events=condition, throw=False, **options, **more)

    def only(values):
        return float(torch.as_tensor(values, dtype=f64).reshape(-1)[0])

    root = lambda t, y: torch.sqrt(y[..., 0]) + 1  # noqa: E731  NaN from 0.73 on
    out = run(root)
    assert int(only(out.status)) == Status.NON_FINITE
    assert only(out.t) == pytest.approx(0.73, abs=1e-9)
    assert out.ys[1].isfinite().all()
    assert out.ys[2].isnan().all()
    with pytest.raises(NumericalError, match=r"t = 0.73.*: a condition is NaN, component 0 of events\[0\]"):
        solve(falling, y0, [0.0, 2.0], events=[root], **options)
    out = run(lambda t, y: torch.sqrt(y[..., 0]) - 0.3)  # an event before that
    assert int(only(out.status)) == Status.EVENT
    assert only(out.t) == pytest.approx(0.64, abs=1e-6)
    out = run(Event(lambda t, y: torch.sqrt(y[..., 0]) - 0.3, terminal=False))
    assert int(only(out.status)) == Status.NON_FINITE
    assert only(out.events[0].t) == pytest.approx(0.64, abs=1e-6)
    out = run(lambda t, y: y[..., 0] * math.nan)
    assert int(only(out.status)) == Status.NON_FINITE
    assert only(out.t) == 0
    out = run(lambda t, y: torch.where((y[..., 0] - 0.5).abs() < 0.01, math.nan, y[..., 0] - 0.5))  # around its zero
    assert int(only(out.status)) == Status.NON_FINITE


def test_a_nan_condition_of_one_sample_is_only_its_own():
    y0 = torch.tensor([[0.5], [9.0], [0.25]], dtype=f64)
    for options in ({}, {"method": "rk4", "step_size": 0.07}):
        event = lambda t, y: torch.sqrt(y[:, 0]) + (y[:, 0] < 9) - 1.5  # noqa: E731  crosses in the first only
        out = solve(falling, y0, [0.0, 1.0], events=event, batch="per-sample", throw=False, **options)
        assert out.status.tolist() == [Status.EVENT, Status.EVENT, Status.NON_FINITE] or out.status[2] == 3
        assert float(out.t[2]) == pytest.approx(0.25, abs=1e-8)


@pytest.mark.parametrize("options", MODES)
def test_a_state_that_rests_on_its_event_does_not_fall_through(options):
    lead = (1,) if "batch" in options else ()

    def run(y, condition=height, f=fall, **more):
        return solve(f, torch.tensor(y, dtype=f64).expand(*lead, 2), [0.0, 3.0], events=condition, **options, **more)

    out = run([0.0, 0.0])  # a ball at rest on the ground
    assert int(torch.as_tensor(out.status)) == Status.EVENT
    assert float(out.t) == pytest.approx(0, abs=1e-9)
    assert out.y.abs().max() < 1e-7
    assert int(torch.as_tensor(run([0.0, 0.0], Event(height, direction=-1)).status)) == Status.EVENT
    assert int(torch.as_tensor(run([0.0, 0.0], Event(height, direction=1)).status)) == Status.SUCCESS
    out = run([0.0, 1e-17])  # and one that leaves it for less than can be resolved
    assert float(out.t) == pytest.approx(0, abs=1e-9)
    assert out.y.abs().max() < 1e-7

    def support(t, y):  # held until t = 1
        return fall(t, y) * torch.where(t >= 1, 1.0, 0.0).reshape(*t.shape, 1)

    out = run([0.0, 0.0], f=support, jump_t=[1.0])
    assert float(out.t) == pytest.approx(1, abs=1e-6)
    assert int(torch.as_tensor(run([0.0, 0.0], f=lambda t, y: y * 0).status)) == Status.SUCCESS  # it rests for good


def test_a_bouncing_ball_comes_to_rest():
    """Zeno's: infinitely many bounces by t = sqrt(4 / g) (1 + e) / (1 - e); below rounding it does not fall through."""
    t, y = 0.0, torch.tensor([2.0, 0.0], dtype=f64)
    for _ in range(80):
        out = solve(fall, y, [t, t + 10.0], events=height, rtol=1e-9, atol=1e-12)
        assert out.status == Status.EVENT
        t, y = float(out.t), out.y * torch.tensor([0.0, -0.5], dtype=f64)
        assert y[1] >= 0
    assert t == pytest.approx(3 * math.sqrt(4 / G), rel=1e-6)


def test_an_event_that_never_comes_ends():
    with pytest.raises(NumericalError, match="max_steps = 500 attempts were not enough"):
        solve(turn, torch.tensor([0.0, 1.0]), [0.0, 1e9], events=lambda t, y: y[0] - 2, max_steps=500)
