"""What a step costs beside the field: read-backs, memory lent to the field, and steps that are compiled with it."""

import shutil
from typing import Any

import pytest
import torch

from pfode.errors import MissingError, UsageError
from pfode.ode import PID, Event, Status, solve
from pfode.ode.adjoints.checkpoint import Checkpoint
from tests.ode import problems

f64 = torch.float64
READS = ("item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "__bool__", "__float__", "__int__", "__index__")


def decay(t, y):
    return -y * (1 + (t[:, None] if t.ndim else t))


# --------------------------------------------------------------------------------------------------------- read-backs


@pytest.fixture
def reads(monkeypatch):
    """The names of the methods by which values are asked for on the host, as they are called."""
    seen = []

    def noting(name, method):
        def read(*args, **kwargs):
            seen.append(name)
            return method(*args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
    return seen


def counted(reads, y0, ends, **options):
    """(attempted steps, read-backs) of a short and a long solve."""
    found = []
    for end in ends:
        reads.clear()
        with torch.no_grad():
            out = solve(decay, y0, [0.0, end], **options)
        many = len(reads)
        found.append((int(torch.as_tensor(out.stats.steps).max()), many))
    return found


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun", "dopri8"])
def test_an_attempted_step_reads_at_most_once(reads, method, batch):
    (few, before), (many, after) = counted(
        reads, torch.ones(3, 2, dtype=f64), (0.5, 2.5), method=method, batch=batch, rtol=1e-5
    )
    assert many >= few + 4
    assert after - before <= many - few


def test_output_times_and_events_are_read_in_the_same_transfer(reads):
    y0, events = torch.ones(3, dtype=f64), Event(lambda t, y: y[0] - 2.0)
    options: dict[str, Any]
    for options in ({}, {"events": events}):
        counts = []
        for rtol in (1e-4, 1e-9):
            reads.clear()
            with torch.no_grad():
                out = solve(decay, y0, torch.linspace(0, 1, 30), rtol=rtol, atol=rtol, **options)
            counts.append((out.stats.steps, len(reads)))
        (few, before), (many, after) = counts
        assert many >= few + 5
        assert after - before <= many - few


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5", "leapfrog"])
def test_fixed_grids_read_nothing(reads, method, batch):
    y0 = (torch.ones(3, 2), torch.ones(3, 2)) if method == "leapfrog" else torch.ones(3, 2)
    field = (lambda t, y: (y[1], -y[0])) if method == "leapfrog" else decay
    counts = []
    for n in (4, 40):
        reads.clear()
        with torch.no_grad():
            out = solve(field, y0, [0.0, 1.0], method=method, batch=batch, step_size=1 / n)
        counts.append(len(reads))
        assert int(torch.as_tensor(out.stats.steps).max()) == n
    assert counts[0] == counts[1]


# -------------------------------------------------------------------------------------------------------- memory lent


@pytest.mark.parametrize("keep", ["the tensor", "a view", "an array"])
def test_a_field_may_keep_what_it_is_given(keep):
    """Times and states of the stages lie in memory that is used again, but not while the field has any of it."""
    keeping = {"the tensor": lambda v: v, "a view": lambda v: v[..., None].detach(), "an array": lambda v: v.numpy()}

    def run(y0, pure):
        kept, copies = [], []

        def field(t, y):
            kept.append((keeping[keep](t.detach()), keeping[keep](y.detach())))
            copies.append((t.detach().clone(), y.detach().clone()))
            return -y * t

        with torch.set_grad_enabled(pure):
            solve(field, y0, [0.0, 2.0], adjoint="direct")
        return kept, copies

    y0 = torch.rand(4, 2, dtype=f64)
    kept, copies = run(y0, pure=False)
    assert len(kept) > 50
    for pair, right in zip(kept, copies, strict=True):
        for value, other in zip(pair, right, strict=True):
            assert torch.equal(torch.as_tensor(value).reshape(-1), other.reshape(-1))
    pure, _ = run(y0.clone().requires_grad_(), pure=True)
    assert len(pure) == len(kept)


@pytest.mark.parametrize("y0", [torch.tensor(2.0), torch.tensor(1 + 1j), torch.full((1,), 2.0), torch.ones(2, 3, 2)])
def test_states_of_any_shape_lie_in_lent_memory(y0):
    with torch.no_grad():
        out = solve(decay, y0, [0.0, 0.5, 1.0])
    assert torch.allclose(out.ys[-1], y0 * torch.exp(torch.tensor(-1.5)), atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- compiled


@pytest.fixture
def as_it_is(monkeypatch):
    """What would be compiled, run as it is: compiling takes a minute."""

    def loop(cond, body, carried):
        while cond(*carried):
            carried = body(*carried)
        return carried

    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr("torch._higher_order_ops.while_loop", loop)


def pendulum():
    """A field of its own: kernels are kept by field."""
    return lambda t, y: problems.swing(t, y)


LIMITS = {
    "plain": {},
    "PID": {"controller": "PID"},
    "max_step": {"controller": PID(max_step=0.07)},
    "min_step": {"controller": PID(min_step=0.05), "throw": False},
    "force": {"controller": PID(min_step=0.05, force=True)},
    "first_step": {"controller": PID(first_step=0.6)},
    "stops": {"step_t": [0.77, 1.1], "jump_t": [0.6]},
    "max_steps": {"max_steps": 9, "throw": False},
    "norm": {"norm": lambda e: e.abs().max()},
    "rtol": {"rtol": torch.tensor(1e-6)},
}


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun"])
@pytest.mark.parametrize("ts", [(0.3, 1.3), (1.3, 0.3), (0.3, 0.4, 0.7, 0.9, 1.3)], ids=len)
@pytest.mark.parametrize("limits", LIMITS)
def test_compiled_attempts_are_the_same_attempts(method, ts, limits, as_it_is):
    """Those between two looks are made and judged in the kernel, the others by the loop."""
    y0 = problems.swung(torch.full((2,), ts[0], dtype=f64))
    options = {"method": method, "rtol": 1e-5, "atol": 1e-7, **LIMITS[limits]}
    with torch.no_grad():
        plain = solve(pendulum(), y0, ts, **options)
        whole = solve(pendulum(), y0, ts, compile=True, **options)
    assert torch.allclose(plain.ys, whole.ys, rtol=0, atol=1e-8, equal_nan=True)
    assert torch.allclose(plain.y, whole.y, rtol=0, atol=1e-8)
    assert plain.status == whole.status
    assert whole.t == pytest.approx(plain.t, rel=1e-8)
    assert plain.stats[:4] == whole.stats[:4]
    if limits == "plain":
        assert plain.status == Status.SUCCESS
        assert plain.t == whole.t == ts[-1]


def test_compiled_attempts_that_fail_are_left_to_the_loop(as_it_is):
    with torch.no_grad():
        plain, whole = (
            solve(
                lambda t, y: y * y, torch.ones(2, dtype=f64), [0.0, 2.0], rtol=1e-3, atol=1e-3, throw=False, compile=c
            )
            for c in (False, True)
        )
    assert plain.status == whole.status in (Status.MIN_STEP, Status.NON_FINITE)
    assert whole.t == pytest.approx(plain.t, rel=1e-6)
    assert torch.isnan(whole.ys[-1]).all()
    assert whole.stats.steps == pytest.approx(plain.stats.steps, rel=0.1)


def test_compiled_gradients_are_the_same(as_it_is):
    y0, ts = problems.swung(torch.tensor([0.3, 0.3], dtype=f64)), torch.tensor([0.3, 0.8, 1.3], dtype=f64)
    for adjoint in ("checkpoint", "direct"):
        gradients = []
        for compile in (False, True):
            start, a = y0.clone().requires_grad_(), torch.tensor(0.7, dtype=f64, requires_grad=True)
            out = solve(lambda t, y, a: a * y.cos(), start, ts, args=(a,), adjoint=adjoint, compile=compile)
            gradients.append(torch.autograd.grad(out.ys.square().sum(), (start, a)))
        for g, other in zip(*gradients, strict=True):
            assert torch.allclose(g, other, rtol=1e-9)


def test_many_steps_take_one_call_of_a_kernel(as_it_is, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *a: calls.append(f.__name__) or f(*a))
    with torch.no_grad():
        out = solve(pendulum(), torch.ones(2, dtype=f64), [0.0, 3.0], compile=True)
    assert out.stats.steps > 10
    assert calls == ["ahead"]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_gradients_pass_through_what_torch_compiled():
    """Graphs that lend their buffers can be gone through once: a field compiled by itself, and steps compiled whole."""
    a, y0 = torch.tensor(0.7, requires_grad=True), torch.tensor([0.3, 1.0])

    def field(t, y):
        return torch.tanh(a * y.cos())

    def gradient(f, adjoint, compile=False):
        out = solve(f, y0, [0.0, 1.0, 2.0], method="bosh3", rtol=1e-4, adjoint=adjoint, compile=compile, params=[a])
        (found,) = torch.autograd.grad(out.ys.square().sum(), a)
        return found.item()

    wanted = gradient(field, "direct")
    for adjoint in ("checkpoint", Checkpoint(graphs=0), "interpolated", "backsolve"):
        assert gradient(torch.compile(field), adjoint) == pytest.approx(wanted, rel=1e-2)
    for adjoint in ("checkpoint", Checkpoint(graphs=0)):
        assert gradient(field, adjoint, compile=True) == pytest.approx(wanted, rel=1e-2)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit, by torch.compile itself
def test_it_compiles():
    """No stand-in; one field, and one kernel for every step and tolerance."""
    y0, field = torch.tensor([1.0, 2.0, 0.5]), lambda t, y: -y * (1 + t)
    with torch.no_grad():
        for end, rtol in ((2.0, 1e-4), (-0.5, 1e-5)):
            plain, whole = (solve(field, y0, [0.0, end], method="bosh3", rtol=rtol, compile=c) for c in (False, True))
            assert torch.allclose(plain.ys, whole.ys, rtol=2 * rtol, atol=1e-6)
            assert abs(plain.stats.steps - whole.stats.steps) <= 2  # single precision rounds otherwise


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_compiled_says_so(monkeypatch):
    y0 = torch.ones(2)
    for method in ("radauIIA5", "reversible-heun", "scipy:LSODA"):
        with pytest.raises(UsageError, match=r"(?s)compile: .* is no explicit Runge-Kutta method.*dopri5"):
            solve(decay, y0, [0.0, 1.0], method=method, compile=True)
    with pytest.raises(UsageError, match=r"(?s)compile=True: not inside torch.func.*compile=False"):
        torch.func.jvp(lambda y: solve(decay, y, [0.0, 1.0], compile=True).ys, (y0,), (y0,))

    class Counting(torch.nn.Module):
        calls = 0

        def forward(self, t, y):
            self.calls += 1
            return -y

    with torch.no_grad(), pytest.raises(UsageError, match=r"(?s)cannot take the field: .*calls.*compile=False"):
        solve(Counting(), y0, [0.0, 1.0], compile=True)

    from torch._inductor import cpp_builder, exc

    def missing(*_):
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with torch.no_grad(), pytest.raises(MissingError, match=r"(?s)C\+\+ compiler.*compile=False"):
        solve(lambda t, y: -y, y0, [0.0, 1.0], compile=True)
