"""Memory: a field that writes into its state is refused, y0 is not handed out, one buffer for all results is right."""

import contextlib

import pytest
import torch

from pfode.errors import UsageError
from pfode.ode import SOLVERS, Event, solve, steps
from pfode.ode.methods.implicit import implicit_solvers
from pfode.ode.registry import PAIRED
from pfode.ode.state import Loan

f64 = torch.float64


def whole(t, y):
    y *= -1
    return y


def part(t, y):
    y[..., 0].neg_()
    return -y


def past_autograd(t, y):
    y.detach().mul_(-1)
    return y.clone()


def past_the_count(t, y):
    y.data.mul_(-1)
    return y.clone()


def by_numpy(t, y):
    y.detach().numpy()[...] *= -1
    return y.clone()


def the_time(t, y):
    t += 1
    return -y


def late(t, y):
    if float(t.max()) > 0.3:
        y.mul_(-1)
    return -y.clone()


MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("field", [whole, part, past_autograd, past_the_count, by_numpy, the_time, late])
def test_a_field_that_writes_into_its_arguments_is_refused(field, batch, mode):
    if field is late and mode == "inference":
        pytest.skip("torch counts no changes there: only the first call is compared")
    for method in ("dopri5", "rk4", "kvaerno5", "abm4", "reversible-heun", "scipy:RK45"):
        y0 = torch.ones(3, 2, dtype=f64, requires_grad=mode == "grad" and "scipy" not in method)
        with MODES[mode](), pytest.raises(UsageError, match=r"changes its state in place[\s\S]*y = -y instead of"):
            solve(field, y0, [0.0, 0.5, 1.0], method=method, batch=batch)
        assert torch.equal(y0, torch.ones(3, 2, dtype=f64))


def test_a_tree_and_a_condition_that_are_written_into():
    def field(t, y):
        y["v"].mul_(2.0)
        return {"q": y["v"], "v": -y["q"]}

    y0 = {"q": torch.ones(2), "v": torch.ones(2, dtype=torch.bfloat16)}
    with pytest.raises(UsageError, match="the field changes its state in place"):
        solve(field, y0, [0.0, 1.0])
    assert torch.equal(y0["v"], torch.ones(2, dtype=torch.bfloat16))
    for condition in (lambda t, y: y.sub_(0.5)[0], lambda t, y: y.data.sub_(0.5)[0]):
        with pytest.raises(UsageError, match="a condition of events changes its state in place"):
            solve(lambda t, y: -y, torch.ones(2), [0.0, 1.0], events=Event(condition))


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("ts", [[0.5], [0.0, 1.0], [0.0, 0.4, 1.0]])
def test_no_memory_of_y0_or_of_the_field_is_handed_out(ts, batch):
    y0, buffer = torch.ones(2, 3, dtype=f64), torch.zeros(2, 3, dtype=f64)
    ends = torch.tensor(ts, dtype=f64)

    def at(x):
        return x.untyped_storage().data_ptr()

    for method in ("dopri5", "rk4", "kvaerno5", "abm4"):
        with torch.no_grad():
            out = solve(lambda t, y: torch.neg(y, out=buffer), y0, ends, method=method, batch=batch)
        assert len({at(x) for x in (y0, buffer, out.ys, out.y)}) == 4
        out.ys.zero_()
        assert torch.equal(y0, torch.ones(2, 3, dtype=f64))
    last = y0
    for point in steps(lambda t, y: -y, y0, [0.0, 1.0], batch=batch):
        last = point.y.clone()
        point.y.zero_()  # ours
    assert torch.allclose(last, y0 * torch.exp(torch.tensor(-1.0)), atol=1e-5)


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("method", [*SOLVERS, *PAIRED, "scipy:RK45", "scipy:BDF"])
def test_one_buffer_or_the_state_itself_as_result(method, batch):
    """As CUDA graphs and engines with bound outputs return it; also a view of a larger one, and y itself for y' = y."""
    large = torch.zeros(2, 3, 2, dtype=f64)
    pair = method in PAIRED
    options = {"method": method, "batch": batch, "rtol": 1e-4, "atol": 1e-6, "step_size": None}
    if pair or (method in SOLVERS and not SOLVERS[method].error_order):
        options["step_size"] = 0.25

    def clean(t, y):
        return (y[1] * 1, -torch.sin(y[0])) if pair else y * (-1 - t.reshape(-1, 1))

    def bound(t, y):
        if pair:
            return large[0].copy_(y[1]), torch.sin(y[0], out=large[1]).neg_()
        return torch.mul(y, -1 - t.reshape(-1, 1), out=large[1])

    y0 = torch.linspace(0.5, 1, 6, dtype=f64).view(3, 2)
    y0 = (y0, y0 + 1) if pair else y0
    with torch.no_grad():
        for first, second in ((clean, bound), *(() if pair else ((lambda t, y: y * 1, lambda t, y: y),))):
            a, b = (solve(f, y0, [0.0, 0.5, 1.0], **options).ys for f in (first, second))
            for one, other in zip(a, b, strict=True) if pair else [(a, b)]:
                if method in implicit_solvers():  # `out=` has no derivative: the Jacobian is made by differences
                    assert torch.allclose(one, other, rtol=1e-4)
                else:
                    assert torch.equal(one, other)


def test_lent_memory_is_the_same_until_somebody_keeps_it(monkeypatch):
    loan = Loan(lambda: torch.zeros(2, 3))
    first = loan.take().stack.data_ptr()
    assert loan.take().stack.data_ptr() == first
    kept = loan.take().tensors[0]
    assert loan.take().stack.data_ptr() != first
    assert kept.data_ptr() == first
    held = loan.stack
    monkeypatch.setattr(Loan, "reuse", False)
    assert loan.take().stack.data_ptr() != held.data_ptr()


def test_solves_are_the_same_without_reuse(monkeypatch):
    def ends():
        with torch.no_grad():
            return solve(lambda t, y: -y, torch.ones(2, 3), [0.0, 0.3, 1.0], method="dopri5").ys

    expected = ends()
    monkeypatch.setattr(Loan, "reuse", False)
    assert torch.equal(ends(), expected)
