"""Adjoints: their gradients, for every kind of state, what they find, what they cost, and what they refuse."""

import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor

from pfode.errors import NumericalError, UsageError
from pfode.ode import PID, SOLVERS, Status, solve, steps
from pfode.ode.adjoints.checkpoint import Checkpoint
from pfode.ode.adjoints.continuous import Backsolve, Interpolated
from pfode.ode.adjoints.reversible import Reversible
from pfode.ode.methods.implicit import ImplicitRungeKutta
from tests.ode.memory import peak

f64 = torch.float64


@dataclasses.dataclass
class Pair:
    q: Tensor
    p: Tensor


def _pull(t: Tensor, q: Tensor, p: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """A nonlinear pendulum with damping that depends on time; rows do not see each other."""
    t = t.reshape(-1, 1) if t.ndim else t
    return p, -k * torch.sin(q) - 0.3 * t * p


STATES = {
    "tensor": (lambda q: q, lambda t, y, k: torch.cat(_pull(t, y[:, :1], y[:, 1:], k), 1), lambda y: y),
    "tuple": (
        lambda q: (q[:, :1], (q[:, 1:],)),
        lambda t, y, k: (lambda d: (d[0], (d[1],)))(_pull(t, y[0], y[1][0], k)),
        lambda y: torch.cat([y[0], y[1][0]], -1),
    ),
    "dict": (
        lambda q: {"q": q[:, :1], "p": q[:, 1:]},
        lambda t, y, k: dict(zip("qp", _pull(t, y["q"], y["p"], k), strict=True)),
        lambda y: torch.cat([y["q"], y["p"]], -1),
    ),
    "dataclass": (
        lambda q: Pair(q[:, :1], q[:, 1:]),
        lambda t, y, k: Pair(*_pull(t, y.q, y.p, k)),
        lambda y: torch.cat([y.q, y.p], -1),
    ),
    "complex": (
        lambda q: torch.complex(q[:, :1], q[:, 1:]),
        lambda t, y, k: torch.complex(*_pull(t, y.real, y.imag, k)),
        lambda y: torch.view_as_real(y).flatten(-2),
    ),
}
ADJOINTS = {
    "direct": {"adjoint": "direct"},
    "checkpoint": {"adjoint": "checkpoint"},
    "first graphs": {"adjoint": Checkpoint(graphs=3000)},
    "no graphs": {"adjoint": Checkpoint(graphs=0)},
    "capped": {"adjoint": Checkpoint(memory=300)},
    "reversible": {"adjoint": Reversible(every=7), "method": "reversible-heun", "step_size": 0.06},
    "reversible-dopri5": {"adjoint": "reversible", "method": "reversible-dopri5"},
    "backsolve": {"adjoint": "backsolve"},
    "backsolve, full norm": {"adjoint": Backsolve(seminorm=False)},
    "interpolated": {"adjoint": "interpolated"},
}
BATCHED = [name for name in ADJOINTS if name != "interpolated"]


@pytest.mark.parametrize(
    ("adjoint", "state", "batch"),
    [(a, s, "joint") for a in ADJOINTS for s in STATES] + [(a, s, "per-sample") for a in BATCHED for s in STATES],
)
def test_gradients_match_differences_for_every_state(adjoint, state, batch):
    pack, field, unpack = STATES[state]

    def ends(q, ts, k):
        options = {"rtol": 1e-9, "atol": 1e-9, **ADJOINTS[adjoint]}
        out = solve(field, pack(q), ts, args=(k,), batch=batch, **options)
        return unpack(out.ys), unpack(out.y)

    q = torch.tensor([[0.4, -0.2], [1.1, 0.3]], dtype=f64, requires_grad=True)
    ts = torch.tensor([0.2, 0.5, 0.8], dtype=f64, requires_grad=True)
    k = torch.tensor([[1.0], [2.0]], dtype=f64, requires_grad=True)
    assert torch.autograd.gradcheck(ends, (q, ts, k), atol=1e-5, fast_mode=True)


def test_times_of_every_sample_have_gradients():
    ts = torch.tensor([[0.1, 0.4, 0.7], [0.9, 0.5, 0.2]], dtype=f64, requires_grad=True)
    y0 = torch.tensor([[0.3], [0.7]], dtype=f64)

    for adjoint in ("direct", "checkpoint"):

        def ends(ts, adjoint=adjoint):
            field = lambda t, y: torch.sin(3 * t)[:, None] - y  # noqa: E731
            return solve(field, y0, ts, batch="per-sample", rtol=1e-9, atol=1e-9, adjoint=adjoint).ys

        assert torch.autograd.gradcheck(ends, (ts,), atol=1e-5)
    with pytest.raises(UsageError, match="cannot be solved backwards"):
        solve(lambda t, y: -y, y0, ts, batch="per-sample", adjoint="backsolve")


def _network(seed: int = 0, width: int = 8) -> torch.nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 3)).double()


def _gradients(net: torch.nn.Module, field, **options) -> list:
    net.zero_grad()
    y0 = torch.linspace(-1, 1, 6, dtype=f64).view(2, 3).requires_grad_()
    out = solve(field, y0, torch.linspace(0, 2, 7, dtype=f64), **options)
    (out.ys.square().sum() + out.y.sum()).backward()
    return [y0.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
@pytest.mark.parametrize("name", SOLVERS)
def test_replayed_steps_have_the_gradient_of_recorded_ones(name, batch):
    net = _network()
    options = {"method": name, "batch": batch, "rtol": 1e-4, "atol": 1e-6, "jump_t": [0.7]}
    if not SOLVERS[name].error_order:
        options["step_size"] = 0.1
    wanted = _gradients(net, lambda t, y: net(y) * torch.cos(t).reshape(-1, 1), adjoint="direct", **options)
    for adjoint in ("checkpoint", Checkpoint(graphs=0), Checkpoint(graphs=20_000), Checkpoint(memory=2000)):
        made = _gradients(net, lambda t, y: net(y) * torch.cos(t).reshape(-1, 1), adjoint=adjoint, **options)
        for a, b in zip(made, wanted, strict=True):
            # a step after a rejection may begin with a newer Jacobian than the same step taken again
            exact = not isinstance(SOLVERS[name], ImplicitRungeKutta)
            assert torch.allclose(a, b, rtol=1e-7 if exact else 1e-3, atol=1e-8 if exact else 1e-3)


class _Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = _network()

    def forward(self, t, y):
        return self.net(y)

    def slope(self, t, y, scale=1.0):
        return self.net(y)


class _Hidden:
    """Holds a tensor where nobody looks."""

    __slots__ = ("late", "net")

    def __call__(self, t, y):
        return self.net(y) if not self.late or t > 0.5 else -y


@pytest.mark.parametrize("adjoint", ["checkpoint", "backsolve"])
def test_parameters_are_found_wherever_they_are(adjoint):
    model = _Model()
    hidden = _Hidden()
    hidden.net, hidden.late = model.net, False
    held = [model.net]
    fields = {
        "module": model,
        "bound method": model.slope,
        "closure": lambda t, y: model.net(y),
        "container": lambda t, y: held[0](y),
        "functools.partial": functools.partial(model.slope, scale=2.0),
        "graph": hidden,
    }
    wanted = _gradients(model, model, adjoint="direct")
    for name, field in fields.items():
        for a, b in zip(_gradients(model, field, adjoint=adjoint), wanted, strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4), name
    only = list(model.parameters())[:1]
    made = _gradients(model, model, adjoint=adjoint, params=only)
    assert torch.allclose(made[1], wanted[1], rtol=1e-3, atol=1e-4)
    assert made[2] is None
    hidden.late = True
    with pytest.raises(UsageError, match="was not found"):
        _gradients(model, hidden, adjoint=adjoint)


def test_tensors_made_from_parameters_pass_gradients_on():
    for adjoint in ("direct", "checkpoint", "backsolve"):
        k = torch.tensor(0.7, dtype=f64, requires_grad=True)
        rate = torch.exp(k)
        out = solve(lambda t, y: -rate * y, torch.ones(1, dtype=f64), [0.0, 1.0], adjoint=adjoint)  # noqa: B023
        out.ys[-1].backward()
        assert k.grad is not None
        assert float(k.grad) == pytest.approx(-math.exp(0.7 - math.exp(0.7)), rel=1e-5)


def test_without_anything_to_differentiate_steps_are_made_in_place():
    seen = []
    buffer = torch.zeros(3)

    def field(t, y):
        seen.append(torch.is_grad_enabled())
        return torch.mul(y, -1.0, out=buffer)  # refused by autograd if y had a gradient

    out = solve(field, torch.ones(3), [0.0, 1.0])
    assert not out.ys.requires_grad
    assert seen.count(True) == 1  # the one that is searched for parameters
    net = _network().requires_grad_(False)
    assert not solve(lambda t, y: net(y), torch.ones(1, 3, dtype=f64), [0.0, 1.0]).ys.requires_grad


@pytest.mark.parametrize("adjoint", ["direct", "checkpoint"])
@pytest.mark.parametrize("batch", ["joint", "per-sample"])
def test_rejected_attempts_leave_no_trace_in_gradients(adjoint, batch):
    """Steps that overshoot to sqrt(-) are rejected; their derivatives are not finite."""
    y0 = torch.tensor([[1.0], [4.0]], dtype=f64, requires_grad=True)
    met = []

    def field(t, y):
        slope = -3 * y.sqrt()
        met.append(bool(slope.isnan().any()))
        return slope

    options = {"controller": PID(first_step=0.6), "rtol": 1e-8, "atol": 1e-8}
    out = solve(field, y0, [0.0, 0.6], batch=batch, adjoint=adjoint, **options)
    assert any(met)
    (slope,) = torch.autograd.grad(out.ys[-1].sum(), y0)
    h = 1e-6
    with torch.no_grad():
        up, down = (solve(field, y0 + s * h, [0.0, 0.6], batch=batch, **options).ys[-1] for s in (1, -1))
    assert torch.allclose(slope, (up - down) / (2 * h), rtol=1e-5)


def test_a_failing_sample_leaves_the_gradients_of_the_others():
    k = torch.tensor(1.0, dtype=f64, requires_grad=True)

    def field(t, y):
        return torch.where(((t > 0.55) & (torch.arange(2) == 1))[:, None], math.nan, -k * y)

    y0 = torch.ones(2, 1, dtype=f64)
    for adjoint in ("direct", "checkpoint"):
        out = solve(field, y0, [0.0, 1.0], batch="per-sample", throw=False, adjoint=adjoint)
        assert out.status.tolist() == [Status.SUCCESS, Status.NON_FINITE]
        (made,) = torch.autograd.grad(out.ys[-1, 0].sum(), k)
        assert float(made) == pytest.approx(-math.exp(-1), rel=1e-5)


def test_memory_grows_as_the_root_of_the_steps_or_not_at_all():
    net = torch.nn.Linear(16, 16)
    y0 = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    one = y0.numel() * 4

    def held(steps: int, adjoint, method="midpoint") -> int:
        def run():
            net.zero_grad()
            out = solve(
                lambda t, y: torch.tanh(net(y)), y0, [0, 1], method=method, adjoint=adjoint, step_size=1 / steps
            )
            out.ys[-1].sum().backward()

        return peak(run)

    for graphs in (0, 2**24):
        assert held(320, Checkpoint(graphs=graphs)) <= 2.2 * held(80, Checkpoint(graphs=graphs))
    least = held(4, Checkpoint(memory=one))
    for states in (4, 16):
        assert held(150, Checkpoint(memory=states * one)) <= least + states * one
    assert held(150, "reversible", "reversible-heun") <= 1.1 * held(30, "reversible", "reversible-heun")
    assert held(150, "direct") > 5 * held(150, Checkpoint(graphs=0))


def test_work_going_back_is_counted():
    net = _network()
    seen = []

    def field(t, y):
        seen.append(1)
        return net(y)

    y0 = torch.ones(1, 3, dtype=f64)
    again = Checkpoint(graphs=0)
    for adjoint, most in (
        ("checkpoint", 0.0),
        (again, 1.0),
        (Checkpoint(memory=800), 4.0),
        ("backsolve", 3.0),
        ("direct", 0.0),
    ):
        seen.clear()
        out = solve(field, y0, [0.0, 3.0], rtol=1e-8, atol=1e-8, adjoint=adjoint)
        assert out.stats.nfe == len(seen)
        assert out.stats.backward.nfe == 0
        seen.clear()
        out.ys[-1].sum().backward()
        assert out.stats.backward.nfe == len(seen)
        assert len(seen) <= most * out.stats.nfe
        assert (out.stats.backward.steps > 0) == (adjoint != "direct")


def test_the_seminorm_saves_evaluations():
    net = _network(width=64)
    spent = {}
    for semi in (True, False):
        out = solve(lambda t, y: net(y), torch.ones(1, 3, dtype=f64), [0.0, 3.0], adjoint=Backsolve(seminorm=semi))
        (1e3 * out.ys[-1]).sum().backward()
        spent[semi] = out.stats.backward.nfe
    assert spent[True] <= spent[False]


def test_reversible_says_when_it_fails():
    """A dissipative field forgets its start: going back, rounding grows by e^20."""
    y0 = torch.linspace(0.5, 2, 4).requires_grad_()

    def gradient(adjoint):
        options = {"method": "reversible-rk4", "step_size": 0.1, "adjoint": adjoint}
        out = solve(lambda t, y: -y + torch.sin(y) / 8, y0, [0.0, 20.0], **options)
        return torch.autograd.grad(out.ys[-1].sum(), y0)[0]

    with pytest.raises(NumericalError, match="came out wrong by"):
        gradient("reversible")
    assert torch.allclose(gradient(Reversible(every=20)), gradient("direct"), rtol=1e-3, atol=0)
    with pytest.raises(UsageError, match="cannot be stepped backwards"):
        solve(lambda t, y: -y, y0, [0.0, 1.0], adjoint="reversible")


def test_the_adjoint_equation_that_cannot_be_solved_back_says_so():
    y0 = torch.tensor([1.0, 0.3], dtype=f64, requires_grad=True)
    out = solve(lambda t, y: -1e3 * (y - torch.cos(t)), y0, [0.0, 1.0], adjoint="backsolve", max_steps=1000)
    with pytest.raises(NumericalError, match="could not be solved back"):
        out.ys[-1].sum().backward()


def test_fixed_points_have_the_gradient_of_the_implicit_function():
    a = torch.tensor([[2.0, 0.5], [0.0, 1.5]], dtype=f64, requires_grad=True)
    b = torch.tensor([0.3, 0.6], dtype=f64, requires_grad=True)

    def field(t, y, a, b):
        return b - y @ a.T - 0.1 * y**3

    def ends(a, b, adjoint="implicit"):
        y0 = torch.zeros(3, 2, dtype=f64)
        return solve(field, y0, [0.0, 40.0], args=(a, b), adjoint=adjoint, rtol=1e-10, atol=1e-12).ys[-1]

    assert torch.autograd.gradcheck(ends, (a, b), atol=1e-5)
    found = torch.autograd.grad(ends(a, b).square().sum(), (a, b))
    wanted = torch.autograd.grad(ends(a, b, "direct").square().sum(), (a, b))
    assert all(torch.allclose(x, y, rtol=1e-6) for x, y in zip(found, wanted, strict=True))
    y0 = torch.zeros(3, 2, dtype=f64)
    with pytest.raises(NumericalError, match="no fixed point"):
        solve(field, y0, [0.0, 0.5], args=(a, b), adjoint="implicit").ys[-1].sum().backward()
    with pytest.raises(UsageError, match="only the last state"):
        solve(field, y0, [0.0, 20.0, 40.0], args=(a, b), adjoint="implicit").ys.sum().backward()


@pytest.mark.parametrize("state", STATES)
def test_fixed_points_of_every_state(state, monkeypatch):
    def settling(t, q, p, k):
        return torch.tanh(k * p) - q + 0.3, 0.5 * torch.sin(q) - p

    monkeypatch.setitem(globals(), "_pull", settling)
    pack, field, unpack = STATES[state]

    def ends(k):
        q = torch.zeros(2, 2, dtype=f64)
        out = solve(field, pack(q), [0.0, 50.0], args=(k,), adjoint="implicit", method="rk4", step_size=0.5)
        return unpack(out.ys)[-1]

    k = torch.tensor([[0.7], [-1.0]], dtype=f64, requires_grad=True)
    assert torch.autograd.gradcheck(ends, k, atol=1e-6, fast_mode=True)


def test_twice_differentiable_is_what_direct_is_for():
    y0 = torch.tensor([0.4, 0.9], dtype=f64, requires_grad=True)

    def end(y0, adjoint="direct"):
        return solve(lambda t, y: torch.sin(y) * t, y0, [0.0, 1.0], adjoint=adjoint).ys[-1]

    assert torch.autograd.gradgradcheck(end, (y0,), atol=1e-4)
    (g,) = torch.autograd.grad(end(y0, "checkpoint").sum(), y0, create_graph=True)
    with pytest.raises(UsageError, match='adjoint="direct"'):
        g.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_transforms_of_a_solve():
    net = _network()
    y0 = torch.tensor([0.4, 0.9, -0.2], dtype=f64)

    def loss(y, weights=None, **options):
        call = (lambda y: net(y)) if weights is None else lambda y: torch.func.functional_call(net, weights, (y,))
        return solve(lambda t, y: call(y), y, [0.0, 1.0], **options).ys[-1].square().sum()

    x = y0.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(x), x)
    assert torch.allclose(torch.func.grad(loss)(y0), wanted)
    tangent = torch.tensor([1.0, 2.0, 3.0], dtype=f64)
    assert torch.allclose(torch.func.jvp(loss, (y0,), (tangent,))[1], wanted @ tangent)
    weights = dict(net.named_parameters())
    made: dict = torch.func.grad(lambda w: loss(y0, w))(weights)
    net.zero_grad()
    loss(y0).backward()
    assert all(torch.allclose(made[name], p.grad) for name, p in net.named_parameters() if p.grad is not None)
    ts = torch.tensor([0.0, 1.0], dtype=f64)
    moved = torch.func.jvp(lambda ts: solve(lambda t, y: net(y), y0, ts).ys[-1], (ts,), (torch.ones_like(ts),))[1]
    assert torch.allclose(moved, torch.zeros_like(moved), atol=1e-9)  # the field does not depend on time
    fixed = {"method": "rk4", "step_size": 0.1}
    many = torch.stack([y0, y0 + 1])
    each = torch.stack([loss(y, **fixed) for y in many])
    assert torch.allclose(torch.func.vmap(lambda y: loss(y, **fixed))(many), each)
    with pytest.raises(UsageError, match='batch="per-sample"'):
        torch.func.vmap(loss)(many)


def test_parameters_that_changed_meanwhile_are_refused():
    net = _network()
    out = solve(lambda t, y: net(y), torch.ones(1, 3, dtype=f64), [0.0, 1.0])
    with torch.no_grad():
        next(net.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.ys.sum().backward()


def test_autocast_is_what_it_was():
    net = torch.nn.Linear(4, 4)
    seen = []

    def field(t, y):
        out = net(y)
        seen.append(out.dtype)
        return out.float()

    with torch.autocast("cpu", torch.bfloat16):
        out = solve(field, torch.ones(2, 4), [0.0, 1.0], method="rk4", step_size=0.5)
    out.ys.sum().backward()
    assert set(seen) == {torch.bfloat16}


def test_distributed_data_parallel_hears_every_parameter_once(tmp_path):
    class Solved(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = _Model()

        def forward(self, y):
            return solve(self.model, y, [0.0, 1.0]).ys[-1]

    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        inner = Solved()
        wrapped = torch.nn.parallel.DistributedDataParallel(inner)
        y0 = torch.ones(2, 3, dtype=f64)
        heard = []
        for p in inner.parameters():
            p.register_post_accumulate_grad_hook(lambda p: heard.append(p))
        for _ in range(2):
            inner.zero_grad()
            wrapped(y0).square().sum().backward()
        made = [p.grad.clone() for p in inner.parameters() if p.grad is not None]
        assert len(heard) == 2 * len(made)
    finally:
        dist.destroy_process_group()
    inner.zero_grad()
    inner(y0).square().sum().backward()
    again = [p.grad for p in inner.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))


def test_fixed_steps_meet_a_jump_once():
    """7 * 0.1 is not 0.7: no step is made between them."""
    ends = [p.t1 for p in steps(lambda t, y: -y, torch.ones(1), [0.0, 1.0], method="rk4", step_size=0.1, jump_t=[0.7])]
    assert len(ends) == 10
    assert 0.7 in ends


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Checkpoint(memory=0), "memory"),
        (lambda: Reversible(every=0), "every"),
        (lambda: Backsolve(solver="dopri5"), "need a solver"),  # type: ignore[arg-type]
        (lambda: _try(adjoint="checkpoints"), "did you mean"),
        (lambda: _try(adjoint=Checkpoint(memory=3)), "less than one state"),
        (lambda: _try(adjoint=Interpolated(), batch="per-sample"), 'needs batch="joint"'),
        (lambda: _try(params=[1.0]), "params: need tensors"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def _try(**options):
    return solve(lambda t, y: -y, torch.ones(2, 2, requires_grad=True), [0.0, 1.0], **options)
