"""Adams, symplectic and SciPy's methods; steps that can be undone; compiled steps; what fixed grids report."""

import math

import pytest
import torch

from pfode.errors import NumericalError, UsageError
from pfode.ode import SOLVERS, Status, solve, steps
from pfode.ode.batching import Joint, PerSample
from pfode.ode.compiled import Compiled
from pfode.ode.control import CONTROLLERS
from pfode.ode.methods import tables
from pfode.ode.methods.explicit import RungeKutta
from pfode.ode.methods.multistep import Adams
from pfode.ode.methods.reversible import Coupled, ReversibleHeun
from pfode.ode.methods.scipy import NAMES
from pfode.ode.registry import PAIRED
from pfode.ode.state import Context, Field, Layout
from tests.ode import problems

f64 = torch.float64
SPANS = pytest.mark.parametrize("span", [(0.3, 2.3), (2.3, 0.3)], ids=["forwards", "backwards"])


def grid_of(span, n, stretch=0.0):
    """n steps, neighbours not equal with `stretch`."""
    start, end = span
    shares = [k / n + stretch / n * math.sin(9.0 * k / n) * (0 < k < n) for k in range(n + 1)]
    return [start + (end - start) * share for share in shares[:-1]] + [end]


def order_of(method, span, counts, stretch=0.0, dense=False):
    found = []
    for n in counts:
        grid = grid_of(span, n, stretch)
        between = torch.tensor(grid, dtype=f64)
        between = torch.cat([between, (between[1:] + 2 * between[:-1]) / 3]).sort(descending=span[0] > span[1])[0]
        ts = between if dense else torch.tensor(span, dtype=f64)
        out = solve(problems.swing, problems.swung(ts[0]), ts, method=method, grid=grid)
        found.append(float((out.ys - problems.swung(ts)).abs().max()))
    return problems.falls(found)[-1]


# ------------------------------------------------------------------------------------------------------------- Adams


@SPANS
@pytest.mark.parametrize("dense", [False, True], ids=["end", "dense"])
@pytest.mark.parametrize("corrector", [False, True], ids=["ab", "abm"])
@pytest.mark.parametrize("order", [2, 3, 4, 6])
def test_adams_keeps_its_order_on_unequal_steps(order, corrector, dense, span):
    counts = (80, 160) if order < 6 else (60, 90)
    fall = order_of(Adams(order, corrector), span, counts, 0.4, dense)
    fall = fall / math.log2(counts[1] / counts[0])
    assert fall > order - 0.5


def test_adams_costs_one_evaluation_a_step_or_two():
    for corrector, each in ((False, 1), (True, 2)):
        nfe = [
            solve(
                problems.swing, problems.swung(torch.tensor(0.3)), [0.3, 1.3], method=Adams(4, corrector), step_size=h
            )
            for h in (0.05, 0.01)
        ]
        assert nfe[1].stats.nfe - nfe[0].stats.nfe == 80 * each


@pytest.mark.parametrize("corrector", [False, True])
def test_high_orders_do_not_diverge(corrector):
    """torchdiffeq's explicit_adams has errors of 0.17, 5.6 and 126 at 20, 40 and 80 steps."""

    def field(t, y):
        return -y * torch.cos(2 * t) + torch.sin(3 * t) + 0.2 * y * y - 3 * y

    y0, ts = torch.tensor([1.0], dtype=f64), [0.0, 2.0]
    exact = solve(field, y0, ts, method="dopri8", rtol=1e-13, atol=1e-13).ys[-1]
    errors = []
    for n in (20, 40, 80):
        out = solve(field, y0, ts, method=Adams(9, corrector, select=True), step_size=2 / n)
        errors.append(float((out.ys[-1] - exact).abs()))
    assert errors[0] < 1e-2
    assert errors[2] < errors[1] < errors[0]


def test_selection_keeps_the_order_where_it_is_stable():
    plain, chosen = (order_of(Adams(6, True, select=s), (0.3, 2.3), (40, 80)) for s in (False, True))
    assert min(plain, chosen) > 5.4


# -------------------------------------------------------------------------------------------------------- symplectic


def driven(t, state):
    """A pendulum with a driven spring: separable, not autonomous, and time tells on q's speed too."""
    q, p = state
    return p * (1 + 0.3 * torch.sin(t)), -torch.sin(q) - 0.2 * torch.cos(2 * t) * q


PAIR = (torch.tensor([0.7, -0.4], dtype=f64), torch.tensor([0.1, 0.5], dtype=f64))


@pytest.mark.parametrize("dense", [False, True], ids=["end", "dense"])
@pytest.mark.parametrize("ends", [(0.2, 2.2), (2.2, 0.2)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("name", PAIRED)
def test_symplectic_orders(name, ends, dense):
    start, end = ends
    ts = torch.linspace(start, end, 7 if dense else 2, dtype=f64)
    exact = solve(driven, PAIR, ts, method="dopri8", rtol=1e-13, atol=1e-13).ys
    errors = []
    for n in (100, 200):
        ys = solve(driven, PAIR, ts, method=name, grid=grid_of(ends, n)).ys
        errors.append(max(float((a - b).abs().max()) for a, b in zip(ys, exact, strict=True)))
    fall = problems.falls(errors)[0]
    assert abs(fall - PAIRED[name].order) < 0.4


@pytest.mark.parametrize("form", ["joint", "per-sample", "dict"])
@pytest.mark.parametrize("name", PAIRED)
def test_symplectic_methods_keep_the_energy_for_long(name, form):
    def energy(q, p):
        return p * p / 2 - torch.cos(q)

    def swinging(t, state):
        q, p = state.values() if isinstance(state, dict) else state
        return {"q": p, "p": -torch.sin(q)} if isinstance(state, dict) else (p, -torch.sin(q))

    y0 = {"q": PAIR[0], "p": PAIR[1]} if form == "dict" else PAIR
    ts = torch.linspace(0, 300, 31, dtype=f64)
    out = solve(swinging, y0, ts, method=name, step_size=0.1, batch="per-sample" if form == "per-sample" else "joint")
    q, p = out.ys.values() if form == "dict" else out.ys
    drift = (energy(q, p) - energy(*PAIR)).abs()
    assert drift.max() < {1: 0.05, 2: 2e-3, 4: 2e-5}[PAIRED[name].order]
    assert drift[-10:].max() < 3 * drift[1:11].max()


def test_leapfrog_uses_the_last_kick_again():
    out = solve(driven, PAIR, [0.0, 1.0], method="leapfrog", step_size=0.01)
    assert out.stats.nfe == 201


def test_symplectic_methods_want_a_pair():
    with pytest.raises(UsageError, match=r"needs a pair \(q, p\), got a Tensor"):
        solve(problems.swing, PAIR[0], [0.0, 1.0], method="leapfrog", step_size=0.1)


# -------------------------------------------------------------------------------------------- steps that can be undone


@pytest.mark.parametrize("pure", [True, False])
@pytest.mark.parametrize("t1", [0.55, 0.05])
@pytest.mark.parametrize(
    "solver",
    [
        ReversibleHeun(),
        *(Coupled(RungeKutta(t)) for t in (tables.MIDPOINT, tables.RK4, tables.DOPRI5)),
        PAIRED["leapfrog"],
        PAIRED["yoshida4"],
    ],  # type: ignore[arg-type]
    ids=lambda s: s.name,
)
def test_back_undoes_a_step(solver, t1, pure):
    with torch.no_grad():
        field, t0 = Field(driven, Layout(PAIR), (), Context(pure)), 0.3
        y0 = field.layout.flat(PAIR)
        carry = solver.init(field, t0, y0)
        first = solver.step(field, t0, t1, y0, carry)
        again = solver.step(field, t1, 2 * t1 - t0, first.y1, first.carry)
        y1, carry1 = solver.back(field, t1, 2 * t1 - t0, again.y1, again.carry)
        y, _ = solver.back(field, t0, t1, y1, carry1)
    assert torch.allclose(y1, first.y1, rtol=0, atol=1e-13)
    assert torch.allclose(y, y0, rtol=0, atol=1e-13)


def test_what_is_not_symmetric_cannot_be_undone():
    field = Field(driven, Layout(PAIR))
    with pytest.raises(UsageError, match="semi-implicit-euler cannot be run backwards"):
        PAIRED["semi-implicit-euler"].back(field, 0.0, 0.1, field.layout.flat(PAIR), None)  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------------- SciPy


@SPANS
@pytest.mark.parametrize("name", NAMES)
def test_scipy_methods(name, span):
    ts = torch.linspace(span[0], span[1], 6, dtype=f64)
    with torch.no_grad():
        out = solve(problems.swing, problems.swung(ts[0]), ts, method=f"scipy:{name}", rtol=1e-7, atol=1e-9)
    assert torch.allclose(out.ys, problems.swung(ts), atol=2e-5)
    assert out.stats.steps == 1
    assert out.stats.nfe > 20


def test_scipy_takes_trees_complex_numbers_and_samples():
    with torch.no_grad():
        y0 = torch.tensor([1.0 + 1j, 2.0])
        out = solve(lambda t, y: 1j * y, y0, [0.0, 1.0], method="scipy:LSODA", rtol=1e-6)
        assert torch.allclose(out.ys[-1], y0 * torch.exp(torch.tensor(1j)), atol=1e-4)
        pair = solve(lambda t, y: (y[1], -y[0]), PAIR, [0.0, 1.0], method="scipy:DOP853")
        assert torch.allclose(pair.ys[0][-1], PAIR[0] * math.cos(1) + PAIR[1] * math.sin(1), atol=1e-5)
        each = solve(lambda t, y: -y, torch.ones(3, 2), [0.0, 1.0], method="scipy:RK45", batch="per-sample")
        assert torch.allclose(each.ys[-1], torch.full((3, 2), math.exp(-1)), atol=1e-5)


def test_scipy_errors():
    with pytest.raises(UsageError, match=r"(?s)unknown SciPy solver 'LSDOA'.*did you mean 'LSODA'"):
        solve(problems.swing, PAIR[0], [0.0, 1.0], method="scipy:LSDOA")
    with pytest.raises(UsageError, match="gradients cannot go through SciPy"):
        solve(problems.swing, PAIR[0].requires_grad_(), [0.0, 1.0], method="scipy:RK45", adjoint="direct")
    PAIR[0].requires_grad_(False)
    for name in NAMES:
        with torch.no_grad(), pytest.raises(NumericalError, match="not finite"):
            solve(lambda t, y: y * math.nan, PAIR[0], [0.0, 1.0], method=f"scipy:{name}")


# --------------------------------------------------------------------------------------------------- gradients, grids


@SPANS
@pytest.mark.parametrize(
    "method",
    [Adams(3, False), Adams(4), Adams(5, select=True), "reversible-heun", "reversible-rk4", *PAIRED],
    ids=lambda m: m if isinstance(m, str) else m.name,
)
def test_direct_gradients(method, span):
    start, end = span

    def ends(q, p, ts):
        out = solve(driven, (q, p), ts, method=method, step_size=0.23, adjoint="direct")
        return torch.cat(out.ys)

    ts = torch.tensor([start, (start + end) / 2 + 0.11, end], dtype=f64, requires_grad=True)
    inputs = (PAIR[0].clone().requires_grad_(), PAIR[1].clone().requires_grad_(), ts)
    assert torch.autograd.gradcheck(ends, inputs, atol=1e-6)


@pytest.mark.parametrize("method", ["rk4", "ab3", "abm4", "reversible-rk4"])
def test_fixed_grids_report_what_is_not_finite(method):
    def field(t, y):
        return torch.where((torch.arange(3) == 1)[:, None] & (t > 0.5).reshape(-1, 1), math.nan, -y)

    call = {"method": method, "step_size": 0.1, "throw": False}
    joint = solve(field, torch.ones(3, 2), [0.0, 0.4, 1.0], **call)
    each = solve(field, torch.ones(3, 2), [0.0, 0.4, 1.0], batch="per-sample", **call)
    assert joint.status == Status.NON_FINITE
    assert each.status.tolist() == [Status.SUCCESS, Status.NON_FINITE, Status.SUCCESS]
    assert torch.allclose(each.ys[-1, ::2], torch.full((2, 2), math.exp(-1)), atol=1e-3)
    assert each.ys[1].isfinite().all()
    with pytest.raises(NumericalError, match="sample 1: the field or the state is not finite"):
        solve(field, torch.ones(3, 2), [0.0, 1.0], batch="per-sample", method=method, step_size=0.1)


# ----------------------------------------------------------------------------------------------- memory lent, compiled


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if isinstance(solver, RungeKutta)])
def test_lent_memory_changes_nothing(name, batch):
    """Without gradients stages lie in memory that is written over; with them nothing is."""
    ts, y0 = torch.linspace(0.3, 1.3, 5, dtype=f64), problems.swung(torch.tensor([0.3, 0.3], dtype=f64))

    def field(t, y):
        return problems.swing(t[0] if t.ndim else t, y)

    kept = solve(field, y0, ts, method=name, batch=batch, adjoint="direct", rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        lent = solve(field, y0, ts, method=name, batch=batch, rtol=1e-5, atol=1e-5)
    assert torch.allclose(kept.ys, lent.ys, rtol=0, atol=1e-12)
    assert torch.equal(torch.as_tensor(kept.stats.nfe), torch.as_tensor(lent.stats.nfe))


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
def test_compiled_steps_are_the_same_steps(batch, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)  # what is compiled, run as it is: compiling takes a minute
    ts, y0 = torch.linspace(0.3, 1.3, 5, dtype=f64), problems.swung(torch.tensor([0.3, 0.3], dtype=f64))

    def field(t, y):
        return problems.swing(t[0] if t.ndim else t, y)

    for name in ("dopri5", "bosh3", "rk4", "dopri8"):
        plain = solve(field, y0, ts, method=name, batch=batch, rtol=1e-5, atol=1e-5)
        whole = solve(field, y0, ts, method=Compiled(SOLVERS[name]), batch=batch, rtol=1e-5, atol=1e-5)
        assert torch.allclose(plain.ys, whole.ys, rtol=0, atol=1e-10)
        assert torch.equal(torch.as_tensor(plain.stats.nfe), torch.as_tensor(whole.stats.nfe))
    with pytest.raises(UsageError, match="no explicit Runge-Kutta method"):
        Compiled(Adams(4))


# -------------------------------------------------------------------------------------------- controllers, and driving


def test_controllers_have_names():
    ts = torch.linspace(5, 9, 5, dtype=f64)
    steps_of = {}
    for name in ("I", "PI", "PID"):
        out = solve(problems.rational, problems.rational_solution(ts[0]), ts, rtol=1e-8, atol=1e-10, controller=name)
        assert torch.allclose(out.ys, problems.rational_solution(ts), rtol=1e-6)
        steps_of[name] = out.stats.steps
    assert len(set(steps_of.values())) > 1
    with pytest.raises(UsageError, match=r"(?s)unknown controller 'pi'.*PI"):
        solve(problems.rational, problems.rational_solution(ts[0]), ts, controller="pi")


@pytest.mark.parametrize(
    ("name", "last", "before", "earlier"), [("I", 1.0, 0, 0), ("PI", 0.7, 0.4, 0), ("PID", 0.49, 0.34, 0.1)]
)
@pytest.mark.parametrize("per_sample", [False, True])
def test_controllers_are_those_of_the_literature(name, last, before, earlier, per_sample):
    """Factors for a known sequence of errors, by the exponents in the papers (see control.py)."""
    k, control, batching = 5, CONTROLLERS[name], PerSample() if per_sample else Joint()

    def sample(value):
        return torch.tensor([value, value]) if per_sample else value

    def by_hand(e, e1, e2):
        return 0.9 * e ** (-last / k) * e1 ** (before / k) * e2 ** (-earlier / k)

    wanted = [
        (0.5, by_hand(0.5, 1, 1)),
        (0.2, by_hand(0.2, 0.5, 1)),
        (0.8, by_hand(0.8, 0.2, 0.5)),
        (3.0, 0.9 * 3.0 ** (-1 / k)),  # rejected: the integral factor
        (0.1, min(1.0, by_hand(0.1, 0.8, 0.2))),  # after it, no growth; 3.0 is forgotten
        (0.9, by_hand(0.9, 0.1, 0.8)),
        (1e-9, min(10.0, by_hand(1e-9, 0.9, 0.1))),
        (math.inf, 0.2),  # a step that failed
    ]
    memory = (sample(1.0), sample(1.0), sample(False))
    for e, factor in wanted:
        error = sample(e)
        found, memory = control.factor(batching, error, error <= 1, memory, k)
        assert torch.allclose(torch.as_tensor(found, dtype=f64), torch.tensor(factor, dtype=f64), rtol=1e-5), e


def test_steps_are_yielded_per_sample():
    rates = torch.tensor([1.0, 20.0], dtype=f64)
    points = list(steps(lambda t, y: -rates[:, None] * y, torch.ones(2, 1, dtype=f64), [0.0, 1.0], batch="per-sample"))
    reached = torch.zeros(2, dtype=f64)
    for point in points:
        moved = point.t1 > point.t0
        assert torch.equal(torch.where(moved, point.t0, reached), reached)
        reached = torch.where(moved, point.t1, reached)
        middle = (point.t0 + point.t1) / 2
        assert torch.allclose(point.y[:, 0], torch.exp(-rates * reached), atol=1e-5)
        assert torch.allclose(point.at(middle)[moved, 0], torch.exp(-rates * middle)[moved], atol=1e-5)
    assert reached.tolist() == [1.0, 1.0]
    done = [int(sum(p.t1[i] > p.t0[i] for p in points)) for i in (0, 1)]
    assert done[1] > done[0] > 3
