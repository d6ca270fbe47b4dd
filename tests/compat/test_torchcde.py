"""pfode.compat.torchcde; torchcde's own suite runs on it by tests/upstream/torchcde.py."""

import copy
import pickle
from typing import Any

import pytest
import torch

from pfode import cde
from pfode.compat import torchcde

T = torch.linspace(0, 4, 9, dtype=torch.float64)
X = torch.randn(2, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Func(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3))

    def forward(self, t, z):
        return (z[..., None] * self.weight).sin()


Z0 = torch.ones(2, 4, dtype=torch.float64)
CUBIC = torchcde.CubicSpline(torchcde.natural_cubic_coeffs(X, T), T)
LINEAR = torchcde.LinearInterpolation(torchcde.linear_interpolation_coeffs(X, T), T)


def test_cdeint_is_cdesolve_with_times_before_channels():
    for control, path in ((CUBIC, cde.natural(X, T)), (LINEAR, cde.linear(X, T))):
        for adjoint in (True, False):
            func = Func()
            out = torchcde.cdeint(control, func, Z0, T[[0, 3, 8]], adjoint=adjoint, rtol=1e-8, atol=1e-10)
            expected = cde.cdesolve(func, path, Z0, T[[0, 3, 8]], rtol=1e-8, atol=1e-10).ys
            torch.testing.assert_close(out, expected.movedim(0, 1), rtol=1e-6, atol=1e-7)
            found = torch.autograd.grad(out.sum(), func.weight)[0]
            torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), func.weight)[0], rtol=1e-5, atol=1e-6)


def test_adaptive_steps_end_at_the_knots_unless_options_say_otherwise():
    calls = []

    class Counted(Func):
        def forward(self, t, z):
            calls.append(float(t))
            return super().forward(t, z)

    for options in (None, {"jump_t": torch.tensor([2.0], dtype=torch.float64)}):
        calls.append(0)
        torchcde.cdeint(LINEAR, Counted(), Z0, T[[0, -1]], adjoint=False, options=options)
    with_knots, without = calls[1:].index(0), len(calls) - calls[1:].index(0) - 2
    assert with_knots < 0.7 * without


@pytest.mark.parametrize(
    "method", ["euler", "milstein", "srk", "euler_heun", "heun", "midpoint", "log_ode", "reversible_heun"]
)
def test_torchsdes_methods_without_noise_converge(method):
    exact = torchcde.cdeint(CUBIC, Func(), Z0, T[[0, -1]], rtol=1e-10, atol=1e-12).detach()
    errors = []
    for dt in (0.02, 0.01):
        out = torchcde.cdeint(CUBIC, Func(), Z0, T[[0, -1]], backend="torchsde", method=method, dt=dt)
        errors.append(float((out - exact).detach().abs().max()))
    order = 1 if method in ("euler", "milstein", "euler_heun") else 2
    assert 0.7 * 2**order < errors[0] / errors[1] < 2.5 * 2**order


def test_controls_are_modules_that_follow_their_buffers():
    at = torch.tensor([0.0, 0.3, 3.9, 5.0, -1.0], dtype=torch.float64)
    for control in (CUBIC, LINEAR):
        expected = control.evaluate(at), control.derivative(at)
        assert expected[0].shape == (2, 5, 3)
        for other in (copy.deepcopy(control), pickle.loads(pickle.dumps(control))):
            assert torch.equal(other.evaluate(at), expected[0])
            assert torch.equal(other.derivative(at), expected[1])
        half = copy.deepcopy(control).float()
        assert half.derivative(torch.tensor(0.3)).dtype == torch.float32
        torch.testing.assert_close(half.derivative(torch.tensor(0.3)), control.derivative(at[1]).float())
        zero = copy.deepcopy(control)
        zero.derivative(at[1])
        zero.load_state_dict(
            {name: torch.zeros_like(value) for name, value in control.state_dict().items()} | {"_t": T}
        )
        assert bool((zero.derivative(at[1]) == 0).all())
        assert [float(v) for v in control.interval] == [0.0, 4.0]


def test_rectilinear_coefficients_warn_where_they_look_ahead():
    x = X.clone()
    x[..., 0] = T
    x[0, 0, 1] = torch.nan
    with pytest.warns(UserWarning, match="begins with missing values"):
        found = torchcde.linear_interpolation_coeffs(x, rectilinear=0)
    assert found.shape == (2, 17, 3)
    assert bool(torch.isfinite(found).all())
    late = X.clone()
    late[0, 3, 0] = torch.nan
    for values, index, words in ((X, 3, "Time index must be"), (X, -1, "Time index"), (late, 0, "in the time column")):
        with pytest.raises(AssertionError, match=words):
            torchcde.linear_interpolation_coeffs(values, rectilinear=index)


def test_a_control_with_a_gradient_needs_to_be_named():
    coeffs = torchcde.natural_cubic_coeffs(X, T).requires_grad_()
    with pytest.warns(UserWarning, match="requires gradients but"):
        torchcde.cdeint(torchcde.CubicSpline(coeffs, T), Func(), Z0, T[[0, -1]])
    func = Func()
    tight: Any = {"rtol": 1e-7, "atol": 1e-9}
    named: Any = {**tight, "adjoint_params": (*func.parameters(), coeffs)}
    spline = torchcde.CubicSpline(coeffs, T)
    adjoint = torchcde.cdeint(spline, func, Z0, T[[0, -1]], **named).sum()
    direct = torchcde.cdeint(spline, func, Z0, T[[0, -1]], False, **tight).sum()
    found, expected = (torch.autograd.grad(loss, coeffs) for loss in (adjoint, direct))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_tuple_controls():
    pair = torchcde.TupleControl(CUBIC, LINEAR)
    assert torch.equal(pair.grid_points, T)
    func = lambda t, z: (Func()(t, z[0]), Func()(t, z[1]))  # noqa: E731
    out = torchcde.cdeint(pair, func, (Z0, Z0), T[[0, -1]], adjoint=False)
    torch.testing.assert_close(out[0], torchcde.cdeint(CUBIC, Func(), Z0, T[[0, -1]]), rtol=1e-4, atol=1e-4)
    other = torchcde.LinearInterpolation(X[:, [0, 8]], T[[0, 8]])
    mixed = torchcde.TupleControl(CUBIC, other)
    with pytest.raises(RuntimeError, match="different grid points"):
        mixed.grid_points  # noqa: B018
    assert torchcde.cdeint(mixed, func, (Z0, Z0), T[[0, -1]], adjoint=False)[1].shape == (2, 2, 4)
    for controls, words in (((), "one or more controls"), ((CUBIC, torchcde.LinearInterpolation(X)), "same interval")):
        with pytest.raises(ValueError, match=words):
            torchcde.TupleControl(*controls)


def product(shape):
    class Product:
        def prod(self, t, z, dx):
            return torch.zeros(shape, dtype=torch.float64)

    return Product()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"X": object()}, "X must have a 'derivative' method"),
        ({"z0": Z0[0]}, r"X.derivative did not return a tensor with the same number of batch dimensions as z0"),
        ({"z0": 1.0, "func": lambda t, z: z}, "z0 must either a tensor or a tuple/list"),
        ({"z0": (Z0, Z0), "func": lambda t, z: z}, "z0 is a tuple/list and so X.derivative must return a tuple/list"),
        ({"func": lambda t, z: z}, "func did not return a tensor with the same number of batch dimensions as z0"),
        ({"func": lambda t, z: z[..., None][:, :2]}, "the same number of hidden channels as z0"),
        ({"func": lambda t, z: z[..., None]}, "the same number of input channels as X.derivative"),
        ({"func": lambda t, z: 3}, "z0 is a tensor and so func must return a tensor as well"),
        ({"func": product((2, 3))}, r"func.prod did not return a tensor with the same shape as z0"),
        ({"backend": "numpy"}, "Unrecognised backend=numpy"),
        ({"backend": "torchsde", "method": "rk4"}, "Expected method in"),
        ({"backend": "torchsde", "adaptive": True}, "adaptive: not with backend='torchsde'"),
        ({"method": "rk45"}, 'Invalid method "rk45"'),
    ],
)
def test_malformed_calls(change, words):
    call = {"X": CUBIC, "func": Func(), "z0": Z0, "t": T[[0, -1]], **change}
    with pytest.raises(ValueError, match=words):
        torchcde.cdeint(**call)


@pytest.mark.parametrize(
    ("x", "t", "words"),
    [
        (X.long(), None, "X must both be floating point"),
        (T, None, "X must have at least two dimensions"),
        (X, T.long(), "t must both be floating point"),
        (X, T[None], "t must be one dimensional"),
        (X, T.flip(0), "t must be monotonically increasing"),
        (X, T[:5], "The time dimension of X must equal the length of t"),
        (X[:, :1], None, "Must have a time dimension of size at least 2"),
    ],
)
def test_malformed_paths(x, t, words):
    for make in (
        torchcde.natural_cubic_coeffs,
        torchcde.natural_cubic_spline_coeffs,
        torchcde.linear_interpolation_coeffs,
        torchcde.hermite_cubic_coefficients_with_backward_differences,
        lambda x, t: torchcde.logsig_windows(x, 2, 1.0, t),
    ):
        with pytest.raises(ValueError, match=words):
            make(x, t)


def test_the_deprecated_windows_scale_by_their_lengths():
    values, times = torchcde.logsignature_windows(X, 2, 1.5, T)
    assert times.tolist() == [0.0, 1.5, 3.0, 4.0]
    plain = torchcde.logsig_windows(X, 2, 1.5, T)
    torch.testing.assert_close(values.diff(dim=1), plain.diff(dim=1) * times.diff()[:, None])
    with pytest.raises(ValueError, match="Passed invalid coeffs"):
        torchcde.CubicSpline(X)
