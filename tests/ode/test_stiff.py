"""Stiff problems beside SciPy's Radau at the same tolerances; per sample; where explicit methods stop."""

import functools

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from pfode.ode import PI, Status, solve

f64 = torch.float64


def van_der_pol(t, y, mu=1000.0):
    a, b = y.unbind(-1)
    return torch.stack([b, mu * (1 - a * a) * b - a], -1)


def robertson(t, y):
    a, b, c = y.unbind(-1)
    return torch.stack([-0.04 * a + 1e4 * b * c, 0.04 * a - 1e4 * b * c - 3e7 * b * b, 3e7 * b * b], -1)


def hires(t, y):
    """Hairer & Wanner 1996, IV.10.4."""
    a, b, c, d, e, f, g, h = y.unbind(-1)
    turn = 280 * f * h
    return torch.stack(
        [
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * f + 0.43 * g,
            -turn + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            turn - 1.81 * g,
            -turn + 1.81 * g,
        ],
        -1,
    )


def linear(t, y):
    return -1000 * y + 3000 - 2000 * torch.exp(-t)[..., None]


PROBLEMS = {  # field, y0, times, atol / rtol
    "van der pol": (van_der_pol, [2.0, 0.0], [0.0, 400.0, 800.0, 1200.0, 2000.0], 1e-2),
    "robertson": (robertson, [1.0, 0.0, 0.0], [0.0, 1.0, 100.0, 1e4, 1e5], 1e-4),
    "hires": (hires, [1.0, 0, 0, 0, 0, 0, 0, 0.0057], [0.0, 1.0, 20.0, 150.0, 321.8122], 1e-2),
    "linear": (linear, [0.0], [0.0, 0.1, 1.0, 2.5, 4.0], 1e-2),
}


@functools.cache
def by_scipy(name, rtol):
    """SciPy's Radau with exact Jacobians: its states and how many steps it took."""
    field, y0, times, ratio = PROBLEMS[name]

    def f(t, y):
        return field(torch.tensor(t), torch.from_numpy(np.ascontiguousarray(y))).numpy()

    def jac(t, y):
        return torch.func.jacrev(lambda y: field(torch.tensor(t), y))(torch.from_numpy(np.ascontiguousarray(y))).numpy()

    options = {"method": "Radau", "rtol": rtol, "atol": rtol * ratio, "jac": jac}
    out = solve_ivp(f, (times[0], times[-1]), y0, dense_output=True, **options)
    return torch.from_numpy(out.sol(times).T.copy()), len(out.t) - 1


def ours(name, method, rtol, **options):
    field, y0, times, ratio = PROBLEMS[name]
    with torch.no_grad():
        y0 = torch.tensor(y0, dtype=f64)
        return solve(field, y0, times, method=method, rtol=rtol, atol=rtol * ratio, **options)


def units(ys, exact, name, rtol):
    """The error at every time, in units of the tolerance."""
    error = (ys - exact) / (rtol * (PROBLEMS[name][3] + exact.abs()))
    return error.square().mean(-1).sqrt()


@pytest.mark.parametrize("rtol", [1e-4, 1e-6])
@pytest.mark.parametrize("name", PROBLEMS)
def test_radau_beside_scipy(name, rtol):
    exact, _ = by_scipy(name, 1e-9)
    theirs, steps = by_scipy(name, rtol)
    out = ours(name, "radauIIA5", rtol)
    assert out.stats.accepted <= 1.5 * steps
    # errors of a tenth of the tolerance are chance: the last step's alone, on the linear problem
    assert units(out.ys, exact, name, rtol)[-1] <= max(3 * units(theirs, exact, name, rtol)[-1], 0.1)
    assert units(out.ys, exact, name, rtol).max() < 20  # dense output: nothing controls its error
    assert out.stats.jacobians < 0.6 * out.stats.steps


@pytest.mark.parametrize("method", ["kvaerno3", "kvaerno4", "kvaerno5", "radauIIA3", "trbdf2", "sdirk2"])
@pytest.mark.parametrize("name", ["robertson", "linear"])
def test_others_keep_the_tolerance(name, method):
    exact, _ = by_scipy(name, 1e-9)
    out = ours(name, method, 1e-4)
    found = units(out.ys, exact, name, 1e-4)
    assert found[-1] < 10
    assert found.max() < 100
    assert out.stats.steps < 700


def test_stages_one_by_one_are_solved_so_exactly_that_errors_do_not_add_up():
    """With Newton's usual tolerance this was 12,000 tolerances off, at the end of two relaxations."""
    exact, _ = by_scipy("van der pol", 1e-9)
    out = ours("van der pol", "kvaerno4", 1e-4)
    assert units(out.ys, exact, "van der pol", 1e-4)[-1] < 3


def test_explicit_methods_need_many_more_steps():
    assert ours("linear", "dopri5", 1e-6).stats.steps > 8 * ours("linear", "radauIIA5", 1e-6).stats.steps


def test_samples_of_any_stiffness_keep_their_own_steps():
    mu = torch.tensor([1.0, 100.0, 1000.0], dtype=f64)

    def field(t, y, mu):
        return van_der_pol(t, y, mu)

    y0 = torch.tensor([[2.0, 0.0]], dtype=f64).expand(3, 2)
    options = {"method": "radauIIA5", "rtol": 1e-5, "atol": 1e-7}
    with torch.no_grad():
        out = solve(field, y0, [0.0, 5.0, 20.0], batch="per-sample", args=(mu,), **options)
        for i in range(3):
            alone = solve(field, y0[i], [0.0, 5.0, 20.0], args=(mu[i],), **options)
            assert torch.allclose(out.ys[:, i], alone.ys, rtol=1e-4, atol=1e-6)
            assert int(out.stats.steps[i]) == pytest.approx(alone.stats.steps, rel=0.05, abs=2)
    assert out.stats.steps[0] > 2 * out.stats.steps[2]


def test_a_smoother_controller_has_fewer_rejections():
    plain, smooth = (ours("van der pol", "radauIIA5", 1e-4, controller=c) for c in (None, PI(p=0.25, i=0.5)))
    assert smooth.stats.rejected < plain.stats.rejected
    assert smooth.status == plain.status == Status.SUCCESS
