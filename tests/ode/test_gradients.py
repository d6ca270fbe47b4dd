"""Gradients as strangers ask for them: fields with derivatives inside, transforms around, tensors in several places."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn

from pfode.errors import NumericalError, UsageError
from pfode.ode import Checkpoint, Status, solve

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # by torch.func.jvp
f64 = torch.float64
WAYS: dict[str, dict[str, Any]] = {
    "checkpoint": {"adjoint": "checkpoint"},
    "checkpoint-fixed": {"adjoint": "checkpoint", "method": "rk4", "step_size": 0.1},
    "checkpoint-implicit": {"adjoint": "checkpoint", "method": "kvaerno5", "rtol": 1e-5, "atol": 1e-5},
    "per-sample": {"adjoint": "checkpoint", "batch": "per-sample"},
    "reversible": {"adjoint": "reversible", "method": "reversible-heun", "step_size": 0.05},
    "coupled": {"adjoint": "reversible", "method": "reversible-rk4", "step_size": 0.1},
    "backsolve": {"adjoint": "backsolve"},
    "interpolated": {"adjoint": "interpolated"},
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def run(f: Any, y: Tensor, **options: Any) -> Any:
    return solve(f, y, [0.0, 0.3, 1.0], **{"rtol": 1e-8, "atol": 1e-8, "max_steps": 5000, **options})


def leaf(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=rng, dtype=f64) - 0.3).requires_grad_()


# --------------------------------------------------------------------------------------------- derivatives inside


def pushed(net: nn.Module, y: Tensor) -> Tensor:
    return torch.func.jvp(net, (y,), (y,))[1]


def tangent_of(value: Tensor) -> Tensor:
    tangent = fwad.unpack_dual(value).tangent
    assert tangent is not None
    return tangent


def grad_of(value: Tensor) -> Tensor:
    assert value.grad is not None
    return value.grad


def dual(net: nn.Module, y: Tensor) -> Tensor:
    with fwad.dual_level():
        return tangent_of(net(fwad.make_dual(y, torch.ones_like(y))))


def jacobians(net: nn.Module, y: Tensor) -> Tensor:
    return torch.einsum("bij,bj->bi", torch.func.vmap(torch.func.jacfwd(net))(y), y)


def gradient(net: nn.Module, y: Tensor) -> Tensor:
    return torch.func.grad(lambda y: net(y).square().sum())(y)


def mapped(net: nn.Module, y: Tensor) -> Tensor:
    return torch.func.vmap(net)(y)


@ways
@pytest.mark.parametrize("inside", [pushed, dual, jacobians, gradient, mapped])
def test_fields_may_differentiate_and_map_inside(inside, way):
    torch.manual_seed(0)
    linear = nn.Linear(3, 3, dtype=f64)
    net = nn.Sequential(linear, nn.Tanh())
    y, found = leaf(2, 3), []
    for adjoint in (way["adjoint"], "direct"):
        made = run(lambda t, y: inside(net, y), y, **{"rtol": 1e-7, "atol": 1e-7, **way, "adjoint": adjoint})
        found.append(torch.autograd.grad(made.ys[-1].square().sum(), [y, linear.weight]))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
        assert b.abs().max() > 0


# --------------------------------------------------------------------------------------------- transforms around


TRANSFORMED: list[dict[str, Any]] = [
    {},
    {"method": "rk4", "step_size": 0.02},
    {"method": "kvaerno5", "rtol": 1e-6, "atol": 1e-6},
    {"method": "trapezoid", "step_size": 0.02},
    {"method": "reversible-heun", "step_size": 0.02},
    {"batch": "per-sample"},
]


@pytest.mark.parametrize("options", TRANSFORMED)
def test_torch_func_differentiates_solves(options):
    """y' = -a y^2 has y(1) = y / (1 + a y)."""
    y, a = torch.tensor([[0.5, 1.5]], dtype=f64), torch.tensor(1.0, dtype=f64)

    def end(y: Tensor, a: Tensor = a) -> Tensor:
        return run(lambda t, y, a: -a * y * y, y, args=(a,), **options).ys[-1].sum()

    slope, curve = (1 + y) ** -2, -2 * (1 + y) ** -3
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 0.0}
    assert torch.allclose(torch.func.grad(end)(y), slope, **close)
    assert torch.allclose(torch.func.vjp(end, y)[1](torch.ones((), dtype=f64))[0], slope, **close)
    assert torch.allclose(torch.func.jvp(end, (y,), (y,))[1], (slope * y).sum(), **close)
    assert torch.allclose(torch.func.grad(end, argnums=1)(y, a), -(slope * y * y).sum(), **close)
    assert torch.allclose(torch.func.jvp(lambda a: end(y, a), (a,), (a,))[1], -(slope * y * y).sum(), **close)
    twice = torch.func.jvp(torch.func.grad(end), (y,), (torch.ones_like(y),))[1]
    assert torch.allclose(twice, curve, **close)
    with fwad.dual_level():
        tangent = tangent_of(end(fwad.make_dual(y, torch.ones_like(y))))
    assert torch.allclose(tangent, slope.sum(), **close)


@pytest.mark.parametrize("options", [{"method": "rk4", "step_size": 0.02}, {"method": "abm4", "step_size": 0.02}])
def test_vmap_and_hessian_of_fixed_steps(options):
    y = torch.tensor([0.5, 1.5], dtype=f64)
    end = lambda y: run(lambda t, y: -y * y, y, **options).ys[-1]  # noqa: E731
    assert torch.allclose(torch.func.vmap(end)(y), y / (1 + y), rtol=1e-5)
    curve = torch.func.hessian(lambda y: end(y).sum())(y)
    assert torch.allclose(curve, torch.diag(-2 * (1 + y) ** -3), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "torch.func.vmap: adaptive steps cannot be chosen inside it\nhint: batch"),
        ({"batch": "per-sample"}, "torch.func.vmap: adaptive steps cannot be chosen inside it\nhint: batch"),
        ({"method": "trapezoid", "step_size": 0.1}, "torch.func.vmap: trapezoid cannot see inside it .*\nhint: batch"),
        ({"method": "scipy:RK45"}, 'scipy:RK45: cannot be used inside torch.func transforms\nhint: method="dopri5"'),
    ],
)
def test_what_vmap_cannot_follow_is_one_error(options, message):
    with pytest.raises(UsageError, match=message):
        torch.func.vmap(lambda y: run(lambda t, y: -y, y, **options).ys[-1])(torch.ones(2, 3, dtype=f64))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd, torch.func.jacrev, torch.func.hessian])
def test_scipy_inside_transforms_is_one_error(transform):
    y = torch.ones(3, dtype=f64)
    with pytest.raises(UsageError, match=r"scipy:RK45: cannot be used inside torch.func transforms"):
        transform(lambda a: run(lambda t, y: -a * y, y, method="scipy:RK45").ys[-1].sum())(torch.tensor(1.0))


@pytest.mark.parametrize("adjoint", ["checkpoint", "backsolve", "interpolated", "reversible"])
def test_a_gradient_that_cannot_be_differentiated_says_so(adjoint):
    method = "reversible-heun" if adjoint == "reversible" else "dopri5"
    end = lambda y: run(lambda t, y: -y * y, y, method=method, rtol=1e-4, adjoint=adjoint).ys[-1].sum()  # noqa: E731
    with pytest.raises(UsageError, match='cannot be differentiated again\nhint: adjoint="direct"'):
        torch.autograd.functional.hessian(end, torch.ones(2, dtype=f64))


# ---------------------------------------------------------------------------------------------------------- SciPy


@pytest.mark.parametrize("adjoint", ["backsolve", "interpolated"])
@pytest.mark.parametrize("method", ["scipy:RK45", "scipy:LSODA", "scipy:BDF"])
@pytest.mark.parametrize("of", ["state", "parameter", "both"])
def test_scipy_has_gradients_by_the_adjoint_equation(method, adjoint, of):
    """y' = a y: y(1) = y0 exp(a)."""
    y, a = torch.tensor([1.0, 2.0], dtype=f64), torch.tensor(-0.5, dtype=f64)
    y.requires_grad_(of != "parameter")
    a.requires_grad_(of != "state")
    end = run(lambda t, y: a * y, y, method=method, adjoint=adjoint).ys[-1].sum()
    end.backward()
    if of != "parameter":
        assert torch.allclose(grad_of(y), torch.exp(a).expand(2), rtol=1e-4)
    if of != "state":
        assert torch.allclose(grad_of(a), 3 * torch.exp(a), rtol=1e-4)


def test_scipy_cannot_take_its_steps_again():
    with pytest.raises(UsageError, match=r"gradients cannot go through SciPy\nhint: adjoint="):
        run(lambda t, y: -y, leaf(3), method="scipy:RK45")
    with torch.no_grad():
        assert run(lambda t, y: -y, leaf(3), method="scipy:RK45").status is Status.SUCCESS


# ------------------------------------------------------------------------------------------------- what is kept


class Keeper(nn.Module):
    """A field that keeps its own solution."""

    def __init__(self, **options: Any):
        super().__init__()
        self.net, self.options = nn.Linear(3, 3, dtype=f64), options

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y).tanh()

    def keep(self, y: Tensor, what: str) -> Tensor:
        found = run(self, y, **{"rtol": 1e-4, "atol": 1e-4, **self.options})
        self.kept = {"solution": found, "states": found.ys, "loss": found.ys[-1].sum()}[what]
        return found.ys[-1].sum()


KEPT = {**WAYS, "direct": {"adjoint": "direct"}, "fixed point": {"adjoint": "implicit"}}


@pytest.mark.parametrize("what", ["solution", "states", "loss"])
@pytest.mark.parametrize("way", KEPT.values(), ids=KEPT)
def test_a_module_that_keeps_its_solution_is_freed(way, what):
    """A loss, from further operations, after its backward pass: no collector looks through the nodes of a graph."""
    module, y = Keeper(**way), leaf(2, 3)
    loss = module.keep(y, what)
    if what == "loss" and way["adjoint"] != "implicit":
        loss.backward()
        assert y.grad is not None
    elif what == "loss":
        module.kept = None
    gone = weakref.ref(module)
    del module, loss
    gc.collect()
    assert gone() is None


@ways
def test_a_graph_outlives_the_field_and_the_solution(way):
    y = leaf(2, 3)
    net = nn.Linear(3, 3, dtype=f64)
    end = (lambda: run(lambda t, y: net(y).tanh(), y, **way).ys[-1].sum() * 2)()
    gc.collect()
    end.backward(retain_graph=True)
    first = grad_of(y).clone()
    end.backward()
    assert torch.allclose(grad_of(y), 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        end.backward()


@pytest.mark.parametrize("options", [{}, {"method": "rk4"}, {"max_steps": 1}, {"events": lambda t, y: y.sum() - 1}])
def test_a_status_is_a_status(options):
    assert type(run(lambda t, y: -y, torch.ones(3), **{"throw": False, **options}).status) is Status
    assert type(solve(lambda t, y: -y, torch.ones(3), [0.0]).status) is Status


# ------------------------------------------------------------------------------------ tensors in several places


class OneBuffer(nn.Module):
    """A field that writes all its results into one tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 3, dtype=f64)
        self.buffer = torch.empty(2, 3, dtype=f64)
        self.alone = False

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        slope = self.net(y).tanh()
        if self.alone:
            return slope
        self.buffer = self.buffer.detach()
        return self.buffer.copy_(slope)


@pytest.mark.parametrize("way", [*WAYS.values(), {"adjoint": "direct"}], ids=[*WAYS, "direct"])
def test_one_buffer_for_all_results_gives_the_same_gradients(way):
    module, y, found = OneBuffer(), leaf(2, 3), []
    for module.alone in (True, False):
        states = run(module, y, **way).ys
        found.append((states, *torch.autograd.grad(states.square().sum(), [y, module.net.weight])))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


PLACES: dict[str, Any] = {
    "an argument twice": lambda y, w: (lambda t, y, a, b: (y @ a).tanh() @ b, {"args": (w, w)}),
    "argument and closure": lambda y, w: (lambda t, y, a: (y @ a).tanh() @ w, {"args": (w,)}),
    "argument and parameter": lambda y, w: (lambda t, y, a: (y @ a).tanh() @ w, {"args": (w,), "params": [w]}),
    "parameter twice": lambda y, w: (lambda t, y: (y @ w).tanh(), {"params": [w, w]}),
    "a view of itself": lambda y, w: (lambda v: (lambda t, y: (y @ w).tanh() @ v.view(3, 3), {}))(w.view(9)),
    "no leaf": lambda y, w: (lambda u: (lambda t, y: (y @ u).tanh() @ w, {}))(w * 2),
    "no leaf, named": lambda y, w: (lambda u: (lambda t, y: (y @ u).tanh(), {"params": [u]}))(w * 2),
    "the state as argument": lambda y, w: (lambda t, y, c: ((c - y) @ w).tanh(), {"args": (y,)}),
    "the state in a closure": lambda y, w: (lambda c: (lambda t, y: ((c - y) @ w).tanh() + c, {}))(y),
    "a part of the state": lambda y, w: (lambda t, y, c: ((c - y) @ w).tanh(), {"args": (y[:1],)}),
    "in a tree": lambda y, w: (lambda t, y, d: (y @ d["w"][0]).tanh() * d["k"], {"args": ({"w": [w], "k": 2},)}),
    "from outside": lambda y, w: (lambda c: (lambda t, y: y.tanh() * c, {}))((y.detach() @ w).sin()),
}


@ways
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_gradients_are_right_wherever_tensors_come_from(place, way):
    """As of the same steps recorded; the continuous adjoints to their tolerances."""
    y, w, found = leaf(2, 3), leaf(3, 3, seed=1), []
    for adjoint in (way["adjoint"], "direct"):
        f, options = place(y, w)
        made = run(f, y, **{**way, **options, "adjoint": adjoint})
        found.append(torch.autograd.grad(made.ys.square().sum() + made.y.sum(), [y, w]))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_tied_weights_get_the_sum():
    y, first = leaf(2, 3), nn.Linear(3, 3, bias=False, dtype=f64)
    second = nn.Linear(3, 3, bias=False, dtype=f64)
    second.weight = first.weight
    net, found = nn.Sequential(first, nn.Tanh(), second), []
    for adjoint in ("checkpoint", "backsolve", "direct"):
        end = run(lambda t, y: net(y), y, adjoint=adjoint).ys[-1].sum()
        found.append(torch.autograd.grad(end, [first.weight])[0])
    assert torch.allclose(found[0], found[2], rtol=1e-9)
    assert torch.allclose(found[1], found[2], rtol=1e-5)


def test_parameters_made_from_one_another_would_count_twice():
    w = leaf(3, 3)
    u = w * 2
    for params in ([u, w], [w, u], [u, u.view(9)]):
        with pytest.raises(UsageError, match=r"params: a tensor of shape .* is computed from another"):
            run(lambda t, y: (y @ u).tanh() @ w, leaf(2, 3), params=params)


def noisy(t: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.dropout(y, 0.5)


@pytest.mark.parametrize("way", ["checkpoint", "checkpoint-fixed", "per-sample", "reversible", "coupled"])
@pytest.mark.parametrize("change", ["in place", "another tensor", "an attribute", "random"])
def test_a_field_that_changed_since_the_solve_is_one_error(way, change):
    """Steps that are taken again must come out as they did."""
    y, k = leaf(2, 3), torch.full((3,), 0.5, dtype=f64)
    holder: Any = nn.Module()
    holder.k = k.clone()
    fields = {"an attribute": lambda t, y: -holder.k * y, "random": noisy}
    options: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4} if "step_size" not in WAYS[way] else {}
    if WAYS[way]["adjoint"] == "checkpoint":
        options["adjoint"] = Checkpoint(graphs=0)
    if change == "random" and "step_size" not in WAYS[way]:
        options |= {"method": "rk4", "step_size": 0.1}
    made = run(fields.get(change, lambda t, y: -k * y), y, **{**WAYS[way], **options})
    if change == "in place":
        k.mul_(1.5)
    elif change == "another tensor":
        k = torch.ones(3, dtype=f64)
    elif change == "an attribute":
        holder.k = torch.ones(3, dtype=f64)
    with pytest.raises(
        (UsageError, NumericalError), match=r"came out (with other numbers|wrong by)[^\n]*\nhint: .*direct"
    ):
        made.ys.square().sum().backward()
