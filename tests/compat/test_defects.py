"""Defects measured in torchdiffeq (0.2.5 and its newest commit), each with a test that it is absent here."""

import itertools
import math
from typing import Any

import pytest
import torch

from pfode.compat.torchdiffeq import METHODS, odeint, odeint_adjoint, odeint_event
from pfode.errors import UsageError
from pfode.ode import Status, solve
from tests.ode import problems
from tests.ode.memory import peak

f64 = torch.float64
ADAPTIVE = [name for name, method in METHODS.items() if method.group == "adaptive"]


class Benign:
    """y' = -y cos 2t + sin 3t + 0.2 y^2, counting its calls."""

    def __init__(self):
        self.nfe = 0

    def __call__(self, t, y):
        self.nfe += 1
        return -y * torch.cos(2 * t) + torch.sin(3 * t) + 0.2 * y * y


Y0 = torch.tensor([1.0], dtype=f64)


@pytest.fixture(scope="module")
def exact():
    return odeint(Benign(), Y0, torch.tensor([0.0, 2.0], dtype=f64), method="dopri8", rtol=1e-13, atol=1e-13)[-1]


@pytest.mark.parametrize(
    ("name", "tol", "error", "nfe"),
    [
        ("dopri8", 1e-6, 2e-6, 80),
        ("dopri8", 1e-8, 1e-8, 119),
        ("dopri8", 1e-12, 1e-11, 353),
        ("bosh3", 1e-8, 1e-6, None),
    ],
)
def test_the_end_is_met_not_interpolated(name, tol, error, nfe, exact):
    """torchdiffeq: errors of 2.2e-4, 9.7e-6, 1.2e-8 and 9.9e-6, with this many evaluations."""
    field = Benign()
    out = odeint(field, Y0, torch.tensor([0.0, 2.0], dtype=f64), method=name, rtol=tol, atol=tol)
    assert (out[-1] - exact).abs() < error
    assert nfe is None or field.nfe <= nfe


@pytest.mark.parametrize("span", [(0.0, 1.7), (0.0, -1.7)])
@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_evaluated_outside_the_range(name, span):
    """torchdiffeq was reported at t >= 6 for [0, 1] (#78)."""
    times = []
    field = lambda t, y: (times.append(float(t)), -y * torch.cos(t))[1]  # noqa: E731
    with torch.no_grad():
        odeint(field, Y0.float(), torch.linspace(span[0], span[1], 5), method=name, rtol=1e-4, atol=1e-4)
    low, high = torch.tensor(sorted(span)).tolist()
    assert low <= min(times)
    assert max(times) <= high


def test_tsit5_has_order_five(exact):
    """torchdiffeq propagates the embedded solution: 10 to 60 times the error of dopri5."""
    t = torch.tensor([0.0, 2.0], dtype=f64)
    for tol in (1e-8, 1e-10):
        errors = [
            float((odeint(Benign(), Y0, t, method=name, rtol=tol, atol=tol)[-1] - exact).abs())
            for name in ("tsit5", "dopri5")
        ]
        assert errors[0] < 3 * errors[1]


ORDERS = {
    "euler": 1,
    "midpoint": 2,
    "heun2": 2,
    "heun3": 3,
    "rk4": 4,
    "implicit_euler": 1,
    "implicit_midpoint": 2,
    "trapezoid": 2,
    "sdirk2": 2,
    "trbdf2": 2,
    "radauIIA3": 3,
    "gl4": 4,
    "radauIIA5": 5,
    "gl6": 6,
}


@pytest.mark.parametrize("name", ORDERS)
def test_fixed_methods_have_their_orders_on_a_field_that_depends_on_time(name):
    """torchdiffeq's gl4 has order 1: both its nodes are the first; its own tests do not see it."""
    order, errors = ORDERS[name], []
    counts = (6, 12, 24) if order > 4 else (16, 32, 64)
    for n in counts:
        t = torch.linspace(0.3, 2.3, n + 1, dtype=f64)
        with torch.no_grad():
            out = odeint(problems.swing, problems.swung(t[0]), t, method=name, rtol=1e-13, atol=1e-13)
        errors.append(float((out[-1] - problems.swung(t[-1])).abs().max()))
    assert problems.falls(errors)[-1] > order - 0.5, errors


@pytest.mark.parametrize("name", ["explicit_adams", "implicit_adams"])
def test_adams_methods_converge(name, exact):
    """torchdiffeq's explicit_adams: errors of 0.17, 5.6, 126 with 20, 40, 80 steps: order 12 is not stable here."""
    errors = []
    for n in (20, 40, 80):
        t = torch.linspace(0, 2, n + 1, dtype=f64)
        errors.append(float((odeint(Benign(), Y0, t, method=name)[-1] - exact).abs()))
    assert errors[0] < 1e-2
    assert all(b < a / 8 for a, b in itertools.pairwise(errors)), errors


def test_implicit_steps_solve_for_every_sample_by_itself():
    """torchdiffeq keeps a Broyden matrix of the whole batch: 49 s for this."""
    a = torch.tensor([[-2.0, 1.0, 0.0, 0.0], [1.0, -3.0, 1.0, 0.0], [0.0, 1.0, -2.0, 1.0], [0.0, 0.0, 1.0, -1.0]])
    y0 = torch.linspace(0, 1, 2048).view(512, 4)
    options = {"method": "implicit_euler", "step_size": 0.25, "batch": "per-sample"}

    def run() -> Any:
        return solve(lambda t, y: torch.tanh(y @ a), y0, [0, 1], **options)

    assert (run().stats.nfe < 100).all()
    assert peak(run) < 0.25 * 4 * y0.numel() ** 2  # a matrix of every sample, none of the whole batch


@pytest.mark.parametrize("name", ["gl6", "radauIIA5"])
def test_implicit_steps_are_solved_as_exactly_as_asked(name):
    """torchdiffeq's stop at residuals of 1e-8 whatever the tolerance, and at errors of 2e-9."""
    t = torch.linspace(0.3, 2.3, 129, dtype=f64)
    out = odeint(problems.swing, problems.swung(t[0]), t, method=name, rtol=1e-13, atol=1e-13)
    assert (out[-1] - problems.swung(t[-1])).abs().max() < 1e-11


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_field_that_is_not_finite_ends_the_solve_at_once(name):
    """torchdiffeq: `underflow in dt 0.0` after thousands of evaluations."""
    calls = []

    def field(t, y):
        calls.append(t)
        return -y * (math.nan if t > 0.4 else 1.0)

    with pytest.raises(AssertionError, match="non-finite values in state `y`"):
        odeint(field, torch.ones(2, dtype=f64), torch.tensor([0.0, 1.0]), method=name, rtol=1e-3, atol=1e-3)
    assert len(calls) < 1000


def test_one_sample_neither_slows_nor_stops_the_others():
    """torchdiffeq: 6506 evaluations for both of two samples that need 560 and 6518; one failure stops all."""
    mu = torch.tensor([1.0, 30.0, 1.0], dtype=f64)
    bad = torch.tensor([False, False, True])

    def field(t, y):
        slope = torch.stack([y[:, 1], mu * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], -1)
        return torch.where((bad & (t > 2.0))[:, None], math.nan, slope)

    y0 = torch.tensor([[2.0, 0.0]], dtype=f64).expand(3, 2)
    out = solve(field, y0, [0.0, 10.0], batch="per-sample", throw=False)
    alone = solve(lambda t, y: torch.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]]), y0[0], [0.0, 10.0])
    assert out.status.tolist() == [Status.SUCCESS, Status.SUCCESS, Status.NON_FINITE]
    assert out.stats.nfe[0] <= 1.05 * alone.stats.nfe < 0.7 * out.stats.nfe[1]
    assert torch.allclose(out.ys[-1, 0], alone.ys[-1], rtol=1e-5)


@pytest.mark.parametrize("name", ["dopri5", "rk4"])
def test_an_event_function_that_is_zero_at_the_start_does_not_end_the_solve(name):
    """torchdiffeq (#285) returns the start."""
    options = {"step_size": 0.01} if name == "rk4" else {}
    y0, t0 = torch.tensor([0.0, 1.0], dtype=f64), torch.tensor(0.0, dtype=f64)
    field = lambda t, y: torch.stack([y[1], -y[0]])  # noqa: E731
    met, _ = odeint_event(field, y0, t0, event_fn=lambda t, y: y[0], method=name, options=options)
    assert float(met) == pytest.approx(math.pi, abs=1e-4)


@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
def test_parameters_of_event_functions_get_gradients(interface):
    """torchdiffeq (#208): None."""
    level = torch.tensor(0.5, dtype=f64, requires_grad=True)
    extra: dict[str, Any] = {"adjoint_params": ()} if interface is odeint_adjoint else {}
    met, _ = odeint_event(
        lambda t, y: -y,
        torch.ones(1, dtype=f64),
        torch.tensor(0.0, dtype=f64),
        event_fn=lambda t, y: y[0] - level,
        odeint_interface=interface,
        **extra,
    )
    (grad,) = torch.autograd.grad(met, level)
    assert float(grad) == pytest.approx(-2.0, rel=1e-6)


SHAPES = {
    "a row": lambda t, y: -y[0],
    "a number": lambda t, y: -y.sum(),
    "one row of three": lambda t, y: -y[:1],
    "one column of two": lambda t, y: -y[:, :1],
    "one dimension more": lambda t, y: -y[None],
    "transposed": lambda t, y: -y.T,
    "a float": lambda t, y: 1.0,
    "a list": lambda t, y: [-y],
    "nothing": lambda t, y: None,
    "an array": lambda t, y: -y.detach().numpy(),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams", "trapezoid", "scipy_solver"])
def test_a_field_of_another_shape_is_an_error_and_nothing_is_broadcast(method, name):
    y0, t = torch.ones(3, 2), torch.tensor([0.0, 1.0])
    message = r"func must return tensors of the shapes of y0, \(3, 2\); got "
    with pytest.raises(RuntimeError, match=message) as caught:
        odeint(SHAPES[name], y0, t, method=method)
    assert isinstance(caught.value, UsageError)
    with pytest.raises(RuntimeError, match=message):
        odeint_adjoint(SHAPES[name], y0, t, method=method, adjoint_params=())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda t, s: (-s[0].T, -s[1]),
        lambda t, s: (-s[1], -s[0]),
        lambda t, s: (-s[0],),
        lambda t, s: (-s[0][:1], -s[1]),
        lambda t, s: -s[0],
    ],
)
def test_a_field_of_tuples_of_other_shapes_is_an_error(wrong):
    """Also where the flat states happen to be of the same length."""
    with pytest.raises(RuntimeError, match=r"shapes of y0, \(3, 2\), \(4,\); got "):
        odeint(wrong, (torch.ones(3, 2), torch.ones(4)), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    "condition",
    [
        lambda t, y: (y < 0.5)[0],
        lambda t, y: (y > 0.5)[0],
        lambda t, y: torch.stack([y[0] < 0.2, y[0] < 0.5]),
        lambda t, y: bool(y.detach() < 0.5),
    ],
    ids=["becomes true", "becomes false", "two", "Python's"],
)
@pytest.mark.parametrize("options", [{}, {"method": "rk4", "options": {"step_size": 0.05, "interp": "cubic"}}])
def test_events_that_are_true_or_false_are_met(condition, options):
    """exp(-t) falls to 1/2 at log 2; such a time is a constant for gradients."""
    y0 = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    t0 = torch.tensor(0.0, dtype=torch.float64)
    met, ys = odeint_event(lambda t, y: -y, y0, t0, event_fn=condition, **options)
    assert abs(float(met) - math.log(2)) < 1e-5
    ys[-1].sum().backward()
    assert y0.grad is not None
    assert abs(float(y0.grad) - 0.5) < 1e-5
