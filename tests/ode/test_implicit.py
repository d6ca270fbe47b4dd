"""Implicit methods: Jacobians by rows, Newton's method, gradients by the implicit-function theorem, failures."""

import numpy as np
import pytest
import torch

from pfode.errors import NumericalError
from pfode.ode import PID, SOLVERS, Status, solve
from pfode.ode.methods import implicit_tables
from pfode.ode.methods.newton import jacobian
from pfode.ode.state import Field, Layout
from pfode.tableau import order_of
from tests.ode import problems
from tests.ode.memory import peak

f64 = torch.float64
NAMES = [tableau.name for tableau in implicit_tables.IMPLICIT]
MIX = torch.tensor([[0.3, -1.1, 0.4], [0.9, 0.2, -0.5], [-0.2, 0.7, 0.1]], dtype=f64)


def rows(t, y, mix=MIX):
    """Acts on the last dimension."""
    return torch.tanh(y @ mix.to(y.dtype)) * torch.cos(t).reshape(-1, 1) - y * y


@pytest.mark.parametrize("tableau", implicit_tables.IMPLICIT, ids=lambda t: t.name)
def test_order_is_exactly_as_claimed(tableau):
    b = np.array(tableau.b)
    assert order_of(tableau.matrix, b, tableau.order + 1) == tableau.order
    assert tableau.extension.order >= max(tableau.order - 1, 1)
    if len(tableau.error):
        assert order_of(tableau.matrix, b - np.array(tableau.error), tableau.embedded + 1) == tableau.embedded


@pytest.mark.parametrize("span", [(0.3, 2.3), (2.3, 0.3)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", NAMES)
def test_order_at_the_end_and_between_steps(name, span):
    """torchdiffeq's gl4 has one node twice and is of order 1."""
    order = SOLVERS[name].order
    counts = {1: (64, 128), 2: (64, 128), 3: (48, 96), 4: (32, 64), 5: (48, 96), 6: (12, 24)}[order]
    ends, between = [], []
    for n in counts:
        grid = torch.linspace(span[0], span[1], n + 1, dtype=f64)
        ts = torch.cat([(grid[:-1, None] + grid.diff()[:, None] * torch.arange(5) / 5).flatten(), grid[-1:]])
        with torch.no_grad():
            ys = solve(problems.swing, problems.swung(ts[0]), ts, method=name, grid=grid).ys
        errors = (ys - problems.swung(ts)).abs().amax(1)
        ends.append(float(errors[-1]))
        between.append(float(errors.max()))
    assert problems.falls(ends)[-1] == pytest.approx(order, abs=0.5), ends
    assert order - 0.5 < problems.falls(between)[-1] < order + 0.5, between


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("span", [(5.0, 9.0), (5.0, 1.0)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", [name for name in NAMES if SOLVERS[name].error_order])
def test_adaptive_errors_follow_the_tolerance(name, span, batch):
    ts = torch.linspace(span[0], span[1], 9, dtype=f64)
    exact = problems.rational_solution(ts)[:, None]
    with torch.no_grad():
        out = solve(problems.rational, exact[0], ts, method=name, rtol=1e-4, atol=1e-7, batch=batch)
    units = ((out.ys - exact).abs() / (1e-7 + 1e-4 * exact.abs())).max()
    # errors of steps that are not extrapolated add up
    assert units < (10 if SOLVERS[name].error_order <= SOLVERS[name].order else 2 * int(out.stats.steps))
    assert int(out.stats.steps) < 150


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("span", [(0.0, 1.7), (0.0, -1.7)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_evaluated_outside_and_nfe_is_what_was_called(name, span, batch):
    seen = []

    def field(t, y):
        seen.append(t)
        return -y * (1 + t.reshape(-1, 1) ** 2)

    ts = [span[0] + (span[1] - span[0]) * k / 7 for k in range(8)]
    out = solve(field, torch.ones(3, 2), ts, method=name, batch=batch, rtol=1e-3, atol=1e-3)
    times = torch.stack([t.expand(3) for t in seen])
    assert times.min() >= torch.tensor(min(span))
    assert times.max() <= torch.tensor(max(span))
    if batch == "joint":
        assert out.stats.nfe == len(seen)


def test_fields_may_use_one_buffer_for_their_results():
    buffer = torch.zeros(3, dtype=f64)

    def field(t, y):
        return torch.mul(y, -1 - t, out=buffer)

    for name in NAMES:
        with torch.no_grad():
            options = {"method": name, "rtol": 1e-4, "atol": 1e-6}
            y0, ts = torch.ones(3, dtype=f64), [0.0, 0.4, 1.0]
            exact = solve(lambda t, y: y * (-1 - t), y0, ts, **options).ys
            assert torch.allclose(solve(field, y0, ts, **options).ys, exact, rtol=1e-6)


class Cubed(torch.autograd.Function):
    """Without forward mode."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y**3

    @staticmethod
    def backward(ctx, *grads):
        return 3 * ctx.saved_tensors[0] ** 2 * grads[0]


def by_numpy(t, y):
    a = y.numpy()
    return torch.from_numpy(a**2 + a.sum(-1, keepdims=True))


@pytest.mark.parametrize(
    ("field", "number", "way"),
    [
        (lambda t, y: -(y**3), 15, 0),
        (rows, 5, 0),
        (lambda t, y: rows(t, y) + 1e-3 * y.mean(), 1, 0),
        (lambda t, y: rows(t, y) + 1e-6 * y.roll(1, 0), 1, 0),
        (lambda t, y: Cubed.apply(y) @ MIX, 5, 1),
        (lambda t, y: Cubed.apply(y) @ MIX + y.sum(0), 1, 1),
        (by_numpy, 5, 2),
    ],
    ids=["elements", "rows", "coupled", "neighbours", "reverse", "reverse coupled", "differences"],
)
def test_jacobians_are_exact_and_as_narrow_as_the_field_allows(field, number, way):
    y = torch.randn(5, 3, dtype=f64, generator=torch.Generator().manual_seed(0))
    wrapped = Field(field, Layout(y))
    made = jacobian(wrapped, torch.tensor(0.3, dtype=f64), y.flatten())
    assert (made.rows.number, wrapped.jacobian_mode) == (number, way)
    whole = torch.block_diag(*made.blocks)
    if way < 2:
        exact = torch.autograd.functional.jacobian(lambda y: wrapped(torch.tensor(0.3), y), y.flatten())
        assert torch.allclose(whole, exact, atol=1e-12)
    else:
        exact = torch.block_diag(*(torch.diag(2 * row) + 1 for row in y))
        assert torch.allclose(whole, exact, atol=1e-6)


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
def test_a_wide_state_costs_what_its_rows_cost(batch):
    """torchdiffeq takes 49 s for these 4 steps."""
    y0 = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    options = {"method": "implicit_euler", "step_size": 0.25, "batch": batch}
    out = solve(lambda t, y: net(y), y0, [0.0, 1.0], **options)
    held = peak(lambda: solve(lambda t, y: net(y), y0, [0.0, 1.0], **options))
    assert held < 0.25 * 4 * y0.numel() ** 2  # a matrix of every row, none of the whole state
    exact = y0
    for _ in range(4):
        start_y = exact
        for _ in range(60):
            exact = start_y + 0.25 * net(exact)
    assert torch.allclose(out.ys[-1], exact, atol=1e-5)


def test_a_kept_jacobian_serves_all_steps_of_a_linear_field():
    matrix = torch.diag(torch.tensor([-1.0, -50.0, -2000.0], dtype=f64)) + 0.1
    for name in ("kvaerno5", "radauIIA5", "trbdf2"):
        out = solve(lambda t, y: matrix @ y, torch.ones(3, dtype=f64), [0.0, 2.0], method=name, rtol=1e-5)
        assert out.stats.jacobians == 1
        assert torch.allclose(out.ys[-1], torch.linalg.matrix_exp(2 * matrix) @ torch.ones(3, dtype=f64), rtol=1e-3)


def test_complex_states_need_no_holomorphic_field():
    def field(t, y):
        return 1j * y + 0.3 * y.conj() - y * y.abs() ** 2

    y0 = torch.tensor([[1 + 0.5j, -0.3j], [0.2 + 0j, 1 - 1j]], dtype=torch.complex128)
    exact = solve(field, y0, [0.0, 2.0], method="dopri8", rtol=1e-12, atol=1e-13).ys[-1]
    for batch in ("joint", "per-sample"):
        for name in ("radauIIA5", "kvaerno5"):
            out = solve(field, y0, [0.0, 2.0], method=name, rtol=1e-8, atol=1e-10, batch=batch)
            assert torch.allclose(out.ys[-1], exact, atol=1e-7)


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("name", ["radauIIA5", "kvaerno4"])
def test_an_unsolved_step_is_rejected_and_made_smaller(name, batch):
    def field(t, y):
        return 40 * torch.sin(9 * y) - y

    y0 = torch.tensor([[0.3], [0.9]], dtype=f64)
    exact = solve(field, y0, [0.0, 1.0], method="dopri8", rtol=1e-11, atol=1e-12).ys[-1]
    options = {"method": name, "batch": batch, "controller": PID(first_step=0.8), "rtol": 1e-6, "atol": 1e-8}
    out = solve(field, y0, [0.0, 1.0], **options)
    assert (torch.as_tensor(out.stats.rejected) > 0).all()
    assert torch.allclose(out.ys[-1], exact, atol=1e-5)


def test_equations_without_a_solution_are_reported():
    def field(t, y):
        return 1 + y * y  # one implicit Euler step of size 1 asks for z = 1 + z^2

    with pytest.raises(NumericalError, match="a nonlinear solve did not converge"):
        solve(field, torch.zeros(1, dtype=f64), [0.0, 1.0], method="implicit_euler", step_size=1.0)
    out = solve(field, torch.zeros(1, dtype=f64), [0.0, 2.0], method="radauIIA5", throw=False)  # tan
    assert out.status != Status.SUCCESS
    assert 1.5 < out.t < 1.5708


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("trapezoid", "implicit_midpoint", "gl4", "gl6")])
def test_far_guesses_are_solved_on_fixed_steps(name):
    """Newton's plain iteration leaves the basin of the solution."""
    out = solve(
        lambda t, y: -200 * torch.tanh(8 * y), torch.tensor([0.9], dtype=f64), [0.0, 1.0], method=name, step_size=0.5
    )
    assert out.ys[-1].abs() < 0.2


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_exact(name, batch):
    def ends(y0, ts, mix):
        return solve(rows, y0, ts, method=name, batch=batch, step_size=0.3, args=(mix,), adjoint="direct").ys[1:]

    y0 = torch.tensor([[0.5, -0.2, 0.7], [0.1, 0.9, -0.3]], dtype=f64, requires_grad=True)
    ts = torch.tensor([0.3, 0.7], dtype=f64, requires_grad=True)
    assert torch.autograd.gradcheck(ends, (y0, ts, MIX.clone().requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("name", ["trbdf2", "gl4"])
def test_second_derivatives_are_exact(name):
    def ends(y0, mix):
        return solve(rows, y0, [0.3, 0.7], method=name, step_size=0.3, args=(mix,), adjoint="direct").ys[-1]

    y0 = torch.tensor([[0.5, -0.2, 0.7]], dtype=f64, requires_grad=True)
    assert torch.autograd.gradgradcheck(ends, (y0, MIX.clone().requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("name", ["radauIIA5", "kvaerno3"])
def test_gradients_of_adaptive_solves(name):
    y0 = torch.tensor([[0.5, -0.2, 0.7], [0.1, 0.9, -0.3]], dtype=f64, requires_grad=True)
    mix = MIX.clone().requires_grad_()

    def gradients(method, tol, **options):
        out = solve(rows, y0, [0.3, 0.9, 2.0], method=method, rtol=tol, atol=tol, args=(mix,), **options)
        return torch.autograd.grad(out.ys.square().sum(), (y0, mix))

    exact = gradients("dopri8", 1e-12)
    for batch in ("joint", "per-sample"):
        for adjoint in ("direct", "checkpoint"):
            for a, b in zip(gradients(name, 1e-6, batch=batch, adjoint=adjoint), exact, strict=True):
                assert torch.allclose(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["radauIIA5", "trbdf2"])
def test_forward_mode(name):
    def end(y0):
        return solve(rows, y0, [0.3, 0.7], method=name, step_size=0.2, adjoint="direct").ys[-1]

    y0, v = torch.tensor([[0.5, -0.2, 0.7]], dtype=f64), torch.tensor([[1.0, 2.0, -1.0]], dtype=f64)
    tangent = torch.func.jvp(end, (y0,), (v,))[1]
    slope = (end(y0 + 1e-6 * v) - end(y0 - 1e-6 * v)) / 2e-6
    assert torch.allclose(tangent, slope, atol=1e-8)
    gradient = torch.func.grad(lambda y: end(y).square().sum())(y0)
    y = y0.clone().requires_grad_()
    assert torch.allclose(gradient, torch.autograd.grad(end(y).square().sum(), y)[0], atol=1e-10)


def test_nodes_beyond_the_step_stay_before_ends_and_jumps():
    """Kvaerno's method of order 5 has a node at 1.23."""
    assert max(implicit_tables.KVAERNO5.c) > 1.2
    seen = []

    def field(t, y):
        seen.append(t.flatten())
        return torch.where(t < 1, -1.0, -3.0).reshape(-1, 1) * y

    y0 = torch.ones(2, 1, dtype=f64)
    for batch in ("joint", "per-sample"):
        seen.clear()
        out = solve(field, y0, [0.0, 2.0], method="kvaerno5", batch=batch, jump_t=[1.0], rtol=1e-7)
        assert torch.cat(seen).max() <= 2
        assert torch.allclose(out.ys[-1], torch.exp(torch.tensor(-4.0, dtype=f64)).expand(2, 1), rtol=1e-5)
        steps = torch.as_tensor(out.stats.steps)
        assert (steps < 60).all()
