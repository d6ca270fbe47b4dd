"""The face of torchdiffeq: shapes, options, callbacks, norms, events, gradients, errors and warnings of its contract.

Its own tests are run by `python -m tests.upstream.torchdiffeq CHECKOUT`.
"""

import math
import warnings
from typing import Any

import pytest
import torch

from pfode.compat import torchdiffeq
from pfode.compat.torchdiffeq import METHODS, odeint, odeint_adjoint, odeint_dense, odeint_event
from pfode.errors import PfodeError

f64 = torch.float64
GROUPS = {name: method.group for name, method in METHODS.items()}
FIXED = [name for name, group in GROUPS.items() if group in ("fixed", "adams", "implicit")]


class Net(torch.nn.Module):
    """dy/dt = A tanh(y) cos t, counting its calls; `unused` gets gradients of zero."""

    def __init__(self, dtype=f64):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.a = torch.nn.Parameter(torch.randn(3, 3, generator=generator, dtype=dtype))
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=dtype))
        self.nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        assert t.shape == ()
        return torch.tanh(y) @ self.a * torch.cos(t)


def decay(t, y):
    return -y


@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_both_directions(name):
    for end in (1.0, -1.0):
        t = torch.linspace(0, end, 33)
        ys = odeint(decay, torch.ones(2, dtype=f64), t, method=name)
        assert ys.shape == (33, 2)
        assert ys.dtype == f64
        exact = torch.exp(-t)[:, None].expand(33, 2)
        assert (ys / exact - 1).abs().max() < (2e-2 if name.endswith("euler") else 1e-3)
        assert torch.equal(odeint(decay, torch.ones(2), t[:1], method=name), torch.ones(1, 2))


@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
def test_tuples_scalars_complex_and_half_states(interface):
    t = torch.tensor([0.0, 0.5, 1.0])
    kwargs = {"adjoint_params": ()} if interface is odeint_adjoint else {}
    a, b = interface(lambda t, y: (-y[0], -2 * y[1]), (torch.tensor(1.0), torch.ones(2, 2)), t, **kwargs)
    assert a.shape == (3,)
    assert b.shape == (3, 2, 2)
    assert torch.allclose(b[-1], torch.full((2, 2), math.exp(-2)), rtol=1e-4)
    z = interface(lambda t, y: 1j * y, torch.ones(2, dtype=torch.complex128), t, **kwargs)
    assert torch.allclose(z[-1], torch.exp(torch.tensor(1j, dtype=torch.complex128)).expand(2))
    h = interface(decay, torch.ones(2, dtype=torch.bfloat16), t, rtol=1e-2, atol=1e-2, **kwargs)
    assert h.dtype == torch.bfloat16


def test_tolerances_of_tuples_and_tensors():
    y0, t = (torch.ones(2, dtype=f64), torch.ones(3, dtype=f64)), torch.tensor([0.0, 1.0])
    field = lambda t, y: (-y[0], -50 * y[1])  # noqa: E731
    tight = odeint(field, y0, t, rtol=1e-10, atol=1e-12)
    loose = odeint(field, y0, t, rtol=(1e-3, 1e-10), atol=(torch.tensor(1e-3), 1e-12))
    assert torch.allclose(tight[1], loose[1], atol=1e-10)
    assert (odeint(decay, y0[0], t, rtol=torch.tensor([1e-9, 1e-3], dtype=f64)) - math.exp(-1))[-1, 0].abs() < 1e-8


def test_fixed_steps_interpolate_as_asked():
    field = lambda t, y: torch.cos(t) * torch.ones_like(y)  # noqa: E731
    y0, t = torch.zeros(1, dtype=f64), torch.tensor([0.0, 0.15, 0.4], dtype=f64)
    ends = odeint(field, y0, torch.linspace(0, 0.4, 5, dtype=f64), method="rk4")
    linear = odeint(field, y0, t, method="rk4", options={"step_size": 0.1})
    cubic = odeint(field, y0, t, method="rk4", options={"step_size": 0.1, "interp": "cubic"})
    assert torch.allclose(linear[1], (ends[1] + ends[2]) / 2)
    assert (cubic[1] - math.sin(0.15)).abs() < 1e-7 < (linear[1] - math.sin(0.15)).abs()
    seen = []

    def construct(func, y0, t):
        seen.append((func(t[0], y0), t))
        return torch.tensor([0.0, 0.3, 0.4], dtype=f64)

    odeint(field, y0, t, method="rk4", options={"grid_constructor": construct})
    assert torch.equal(seen[0][1], t)
    assert torch.equal(seen[0][0], torch.ones(1, dtype=f64))


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_perturbed_times_lie_inside_the_steps(dtype):
    for end in (1.0, -1.0):
        times = []
        field = lambda t, y: (times.append(t.clone()), -y)[1]  # noqa: B023, E731
        odeint(
            field,
            torch.ones(1, dtype=dtype),
            torch.tensor([0.0, end]),
            method="rk4",
            options={"step_size": 0.5, "perturb": True},
        )
        seen = torch.stack(times).abs().double()
        assert seen.min() > 0
        assert seen.max() < 1
        assert not (seen == 0.5).any()
        ulp = torch.finfo(dtype).eps
        assert ((seen - 0.5).abs() < ulp).sum() == 2


@pytest.mark.parametrize("name", ["dopri5", "rk4", "bosh3"])
@pytest.mark.parametrize("end", [1.0, -1.0])
def test_callbacks(name, end):
    calls = []

    class Watched(Net):
        def callback_step(self, t0, y0, dt):
            calls.append(("step", t0, y0, dt))

        def callback_accept_step(self, t0, y0, dt):
            calls.append(("accept", t0, y0, dt))

        def callback_reject_step(self, t0, y0, dt):
            calls.append(("reject", t0, y0, dt))

        def callback_step_adjoint(self, t0, y0, dt):
            calls.append(("adjoint", t0, y0, dt))

    options = {"step_size": 0.1} if name == "rk4" else {"first_step": 1.0}
    net, y0 = Watched(), torch.ones(3, dtype=f64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ys = odeint_adjoint(net, y0, torch.tensor([0.0, end], dtype=f64), method=name, options=options)
    kinds = [call[0] for call in calls]
    steps = [call for call in calls if call[0] == "step"]
    if name == "rk4":
        assert kinds == ["step"] * 10
        assert "Solver 'rk4' does not support callbacks" in str(caught[0].message)
    else:
        assert kinds[::2] == ["step"] * (len(kinds) // 2)
        assert set(kinds[1::2]) == {"accept", "reject"}
        steps = [calls[k] for k in range(0, len(calls), 2) if kinds[k + 1] == "accept"]
    assert torch.equal(steps[0][2], y0)
    assert sum(float(step[3]) for step in steps) == pytest.approx(1.0)
    assert float(steps[-1][1] + steps[-1][3] * end) == pytest.approx(end)
    calls.clear()
    ys.sum().backward()
    assert {call[0] for call in calls} == {"adjoint"}
    assert len(calls[0][2]) == 5  # t, y, adj_y, the parameters


def test_norms_see_what_the_user_sees():
    seen = []

    def norm(state):
        seen.append(state)
        return (state[0] if isinstance(state, tuple) else state).abs().max()

    t = torch.tensor([0.0, 1.0])
    odeint(decay, torch.ones(2, 3), t, options={"norm": norm})
    assert seen[-1].shape == (2, 3)
    odeint(lambda t, y: (-y[0], -y[1]), (torch.ones(()), torch.ones(4)), t, options={"norm": norm})
    assert [part.shape for part in seen[-1]] == [(), (4,)]


@pytest.mark.parametrize("name", ["dopri5", "rk4", "scipy_solver"])
def test_adjoint_gradients_match_those_of_the_solver(name):
    t = torch.tensor([0.0, 0.4, 1.1, 1.5], dtype=f64, requires_grad=True)
    y0 = torch.randn(4, 3, dtype=f64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.linspace(-1, 1, 48, dtype=f64).view(4, 4, 3)
    found = []
    fine = {"step_size": 0.01} if name == "rk4" else {}
    for interface, method, options in ((odeint, "dopri8", {}), (odeint_adjoint, name, fine)):
        net = Net()
        ys = interface(net, y0, t, rtol=1e-9, atol=1e-10, method=method, options=options)
        found.append(torch.autograd.grad((ys * weight).sum(), (y0, t, net.a, net.unused), materialize_grads=True))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert found[1][3].abs().max() == 0


def test_the_adjoint_refuses_second_derivatives_and_needs_known_parameters():
    y0 = torch.ones(3, dtype=f64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=f64)
    ys = odeint_adjoint(Net(), y0, t)
    (grad,) = torch.autograd.grad((ys**2).sum(), y0, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def ball(t, y):
    _, v = y
    return v, torch.full_like(v, -9.81)


@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
@pytest.mark.parametrize("options", [{}, {"method": "rk4", "options": {"step_size": 0.05, "interp": "cubic"}}])
def test_event_times_have_gradients_to_everything(interface, options):
    """Also to parameters of the event function, which torchdiffeq leaves without."""
    h, level, t0 = (torch.tensor(x, dtype=f64, requires_grad=True) for x in (10.0, 1.0, 0.5))
    extra: dict[str, Any] = {"adjoint_params": ()} if interface is odeint_adjoint else {}
    time, (hs, vs) = odeint_event(
        ball,
        (h, torch.zeros((), dtype=f64)),
        t0,
        event_fn=lambda t, y: y[0] - level,
        odeint_interface=interface,
        **options,
        **extra,
    )
    drop = math.sqrt(2 * 9 / 9.81)
    assert time.item() == pytest.approx(0.5 + drop, abs=1e-9)
    assert hs.shape == (2,)
    assert hs[1].item() == pytest.approx(1.0, abs=1e-8)
    grads = torch.autograd.grad(time, (h, level, t0), retain_graph=True)
    assert [g.item() for g in grads] == pytest.approx([1 / (9.81 * drop), -1 / (9.81 * drop), 1.0], rel=1e-5)
    grads = torch.autograd.grad(hs[1], (h, level), retain_graph=True)
    assert [g.item() for g in grads] == pytest.approx([0.0, 1.0], abs=1e-6)
    (by_height,) = torch.autograd.grad(vs[1], h)
    assert by_height.item() == pytest.approx(-1 / drop, rel=1e-5)


def test_events_backwards_in_time_and_of_several_components():
    y0 = (torch.tensor(10.0, dtype=f64), torch.zeros((), dtype=f64))
    time, _ = odeint_event(ball, y0, torch.tensor(0.0, dtype=f64), event_fn=lambda t, y: y[0], reverse_time=True)
    assert float(time) == pytest.approx(-math.sqrt(20 / 9.81))
    both = lambda t, y: torch.stack([y[0], y[1] + 3.0])  # noqa: E731
    time, (_, v) = odeint(ball, y0, torch.tensor([0.0, 1.0], dtype=f64), event_fn=both)
    assert float(time) == pytest.approx(3 / 9.81)
    assert v.tolist() == pytest.approx([0.0, -3.0])


def test_dense_output():
    t0, t1 = torch.tensor(0.0, dtype=f64), torch.tensor(2.0, dtype=f64)
    for end in (t1, -t1):
        for y0 in (torch.ones(2, dtype=f64), (torch.ones(2, dtype=f64), torch.ones((), dtype=f64))):
            field = decay if isinstance(y0, torch.Tensor) else lambda t, y: (-y[0], -y[1])
            dense = odeint_dense(field, y0, t0, end)
            times = torch.linspace(0, float(end), 7, dtype=f64)
            many, one = dense(times), dense(times[3])
            many, one = (many, one) if isinstance(y0, torch.Tensor) else (many[0], one[0])
            assert torch.allclose(many, torch.exp(-times)[:, None].expand(7, 2), atol=1e-7)
            assert torch.equal(one, many[3])
            with pytest.raises(AssertionError, match="invalid interpolation"):
                dense(end * 1.01)


def call(**change):
    arguments = {"func": decay, "y0": torch.ones(2), "t": torch.tensor([0.0, 1.0]), **change}
    interface = odeint_adjoint if any(name.startswith("adjoint") for name in change) else odeint
    return interface(arguments.pop("func"), arguments.pop("y0"), arguments.pop("t"), **arguments)


def explode(t, y):
    return y * y * (1 if t < 0.5 else math.nan)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"method": "dopri6"}, ValueError, r'Invalid method "dopri6". Must be one of \{"dopri8", '),
        (
            {"method": "rk4", "options": {"step_size": 0.1, "grid_constructor": decay}},
            ValueError,
            "step_size and grid_constructor are mutually exclusive arguments.",
        ),
        ({"method": "rk4", "options": {"interp": "spline"}}, ValueError, "Unknown interpolation method spline"),
        ({"adjoint_rtol": 1e-3}, ValueError, "func must be an instance of nn.Module to specify the adjoint parameters"),
        (
            {"adjoint_params": (), "adjoint_method": "rk4", "options": {"max_step": 1.0}},
            ValueError,
            "If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`",
        ),
        (
            {"event_fn": lambda t, y: y[0], "t": torch.tensor([0.0, 1.0, 2.0])},
            ValueError,
            r"We require len\(t\) == 2 when in event handling mode, but got len\(t\)=3.",
        ),
        (
            {"options": {"step_t": torch.tensor([0.5]), "jump_t": torch.tensor([0.5])}},
            ValueError,
            "`step_t` and `jump_t` must not have any repeated elements between them.",
        ),
        ({"t": torch.tensor([0, 1])}, TypeError, "`t` must be a floating point Tensor but is a torch.LongTensor"),
        ({"y0": [torch.ones(2)]}, AssertionError, "y0 must be either a torch.Tensor or a tuple"),
        ({"t": [0.0, 1.0]}, AssertionError, "t must be a torch.Tensor"),
        ({"t": torch.zeros(2, 2)}, AssertionError, "t must be one dimensional"),
        ({"t": torch.tensor([0.0, 1.0, 0.5])}, AssertionError, "t must be strictly increasing or decreasing"),
        ({"t": torch.tensor([0.0, 0.0])}, AssertionError, "t must be strictly increasing or decreasing"),
        ({"rtol": torch.tensor(1e-3, requires_grad=True)}, AssertionError, "rtol cannot require gradient"),
        ({"atol": torch.tensor(1e-3, requires_grad=True)}, AssertionError, "atol cannot require gradient"),
        (
            {"y0": (torch.ones(2),), "rtol": (1e-3, 1e-3), "func": lambda t, y: y},
            AssertionError,
            "If using tupled rtol it must have the same length as the tuple y0",
        ),
        ({"options": {"max_num_steps": 2}}, AssertionError, r"max_num_steps exceeded \(2>=2\)"),
        ({"func": explode}, AssertionError, "non-finite values in state `y`"),
        ({"func": lambda t, y: y * y, "t": torch.tensor([0.0, 2.0])}, AssertionError, "underflow in dt"),
        (
            {"method": "rk4", "event_fn": lambda t, y: y[0] - 0.5},
            AssertionError,
            "Event handling for fixed step solvers currently requires `step_size`",
        ),
    ],
)
def test_errors_have_torchdiffeqs_types_and_words(change, kind, message):
    with pytest.raises(kind, match=message) as caught:
        call(**change)
    assert isinstance(caught.value, PfodeError)


def test_a_fixed_step_event_that_never_comes(monkeypatch):
    monkeypatch.setattr("pfode.compat.torchdiffeq.forward.MAX_EVENT_STEPS", 20)
    with pytest.raises(RuntimeError, match=r"Reached maximum number of iterations 20\."):
        call(method="euler", options={"step_size": 0.1}, event_fn=lambda t, y: y[0] + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"step_size": 0.1}}, r"Dopri5Solver: Unexpected arguments \{'step_size': 0.1\}"),
        ({"method": "rk4", "options": {"first_step": 0.1}}, r"RK4: Unexpected arguments"),
    ],
)
def test_warnings_have_torchdiffeqs_words(change, message):
    with pytest.warns(UserWarning, match=message):
        call(**change)


def test_a_failure_of_scipy_is_a_warning():
    with pytest.warns(UserWarning, match="scipy_solver .* did not reach the end"):
        ys = call(func=explode, method="scipy_solver", options={"solver": "RK45"})
    assert ys.isnan().tolist() == [[False, False], [True, True]]


def test_excluded_parameters_are_warned_about():
    norm = lambda state: state[1].abs().max()  # noqa: E731
    with pytest.warns(UserWarning, match="An adjoint parameter was passed without requiring gradient"):
        call(adjoint_params=(torch.ones(2),), adjoint_options={"norm": norm})


def test_the_module_has_torchdiffeqs_names():
    assert sorted(torchdiffeq.__all__) == ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
    for name in torchdiffeq.__all__:
        assert callable(getattr(torchdiffeq, name))
