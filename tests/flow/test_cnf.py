"""Continuous normalising flows: exact solutions, gradients, regularisers, seeds, refusals."""

import math

import pytest
import torch

from pfode.errors import NumericalError, UsageError
from pfode.flow import CNF, Exact, Hutchinson
from pfode.flow.cnf import StandardNormal
from pfode.models import VectorField
from pfode.ode import solve
from pfode.scores import GaussianMixture
from pfode.scores.toys import law

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # by torch.func.jvp
CLOSE = {"rtol": 1e-10, "atol": 1e-12, "method": "dopri8"}


def network(d: int, extra: int = 1, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = torch.nn.Linear(d + extra, 16), torch.nn.Tanh(), torch.nn.Linear(16, d)
    return torch.nn.Sequential(*layers).double()


def field(d: int = 2, seed: int = 0) -> VectorField:
    made = VectorField(network(d, seed=seed), timed=True)
    for p in made.parameters():
        p.data *= 2
    return made


def points(n: int = 7, d: int = 2) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("trace", ["exact", "hutchinson", Exact(block=2), Exact(mode="forward")])
@pytest.mark.parametrize("batch", ["joint", "per-sample"])
def test_a_linear_field_has_a_known_density(trace, batch):
    """dy/dt = A y: z = e^A x and log p(x) = log N(e^A x) + tr A; with A diagonal signs are exact, too."""
    a = torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64)
    flow = CNF(lambda t, y: y * a, 3, trace=trace, batch=batch, rtol=1e-10, atol=1e-12)
    x = points(5, 3).requires_grad_()
    found = flow.run(x)
    expected = StandardNormal((3,)).log_prob(x * a.exp()) + a.sum()
    assert torch.allclose(found.log_prob, expected, atol=1e-9)
    assert torch.allclose(found.z, x * a.exp(), atol=1e-9)
    (slope,) = torch.autograd.grad(found.log_prob.sum(), x)
    assert torch.allclose(slope, -x * (2 * a).exp(), atol=1e-8)
    with torch.no_grad():
        assert torch.allclose(flow.log_prob(x), expected, atol=1e-9)


@pytest.mark.parametrize("base", [2, law("moons"), GaussianMixture([[0.0, 1.0], [1.0, 0.0]], std=0.5)])
def test_the_mass_of_a_flow_is_one(base):
    axis = torch.linspace(-7, 7, 81, dtype=torch.float64)[:-1] + 7 / 80
    with torch.no_grad():
        density = CNF(field(), base, rtol=1e-5, atol=1e-7).log_prob(torch.cartesian_prod(axis, axis)).exp()
    assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=0.01)


def gradients(flow: CNF, x: torch.Tensor) -> torch.Tensor:
    flow.zero_grad()
    flow.log_prob(x).mean().backward()
    return torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch": "per-sample"},
        {"adjoint": "checkpoint"},
        {"adjoint": "backsolve"},
        {"stacked": False, "batch": "joint"},
        {"method": "rk4", "step_size": 0.02},
        {"method": "dopri8"},
        {"method": "tsit5"},
        {"ts": (1.0, 0.0), "batch": "per-sample"},
        {"ts": (1.0, 0.0)},
    ],
    ids=str,
)
def test_gradients_are_those_of_the_exact_flow(options):
    made, x = field(), points()
    ts = options.get("ts", (0.0, 1.0))
    truth = gradients(CNF(made, 2, **{**CLOSE, "ts": ts}), x)
    assert float((gradients(CNF(made, 2, **{"rtol": 1e-7, "atol": 1e-9, **options}), x) - truth).abs().max()) < 1e-6


def test_the_log_density_is_the_jointly_integrated_one():
    """The textbook's augmented ODE, by the solver alone."""
    made, x = field(), points()

    def augmented(t, state):
        with torch.enable_grad():
            y = state[0].requires_grad_()
            slope = made(t, y)
            rows = [torch.autograd.grad(slope[:, i].sum(), y, retain_graph=True)[0][:, i] for i in range(2)]
        return slope.detach(), sum(rows)

    with torch.no_grad():
        found = solve(augmented, (x, x.new_zeros(len(x))), [0.0, 1.0], **CLOSE).ys
    expected = StandardNormal((2,)).log_prob(found[0][-1]) + found[1][-1]
    with torch.no_grad():
        assert torch.allclose(CNF(made, 2, **CLOSE).log_prob(x), expected.detach(), atol=1e-9)


def test_regularisers_are_integrals_along_the_path():
    """Of y'' = -y, as a field of the plane: |f| = |y| is kept, |J|^2 = 2, and every derivative has that size."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    x = points(4)
    size = x.square().sum(1)
    for order in (2, 3):
        flow = CNF(lambda t, y: y @ turn, 2, kinetic=True, jacobian=True, taylor=order, **CLOSE)
        found = flow.run(x)
        assert torch.allclose(found.kinetic, size, atol=1e-8)
        assert torch.allclose(found.jacobian, torch.full_like(size, 2.0))
        assert torch.allclose(found.taylor, size, atol=1e-8)
        assert not flow.log_prob(x).requires_grad
        assert torch.allclose(found.trace, torch.zeros_like(size), atol=1e-12)
    timed = CNF(lambda t, y: t.reshape(-1, 1) ** 2 + 0 * y, 2, taylor=2, **CLOSE).run(x)  # y'' = 2 t
    assert torch.allclose(timed.taylor, torch.full_like(size, 2 * 4 / 3))


def test_regularisers_have_gradients():
    made = field()
    found = CNF(made, 2, kinetic=True, jacobian=True, taylor=2).run(points())
    for value in (found.kinetic, found.jacobian, found.taylor):
        made.zero_grad()
        value.sum().backward(retain_graph=True)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in list(made.parameters())[:1])


def test_a_value_does_not_depend_on_its_batch():
    flow, x = CNF(field(), 2, trace="hutchinson"), points(6)
    with torch.no_grad():
        whole = flow.log_prob(x, seeds=range(6))
        for i in (0, 5):
            alone = flow.log_prob(x[i : i + 1], seeds=[i])
            assert torch.allclose(alone[0], whole[i], atol=1e-12)
        assert torch.allclose(flow.log_prob(x.flip(0), seeds=range(5, -1, -1)), whole.flip(0), atol=1e-12)
        other = flow.log_prob(x, seeds=range(6, 12))
        assert not torch.allclose(other, whole, atol=1e-3)
        many = CNF(flow.field, 2, trace=Hutchinson(500)).log_prob(x, seeds=range(6))
        assert torch.allclose(many, CNF(flow.field, 2).log_prob(x), atol=0.1)


def test_samples_are_keyed_and_come_back():
    flow = CNF(field(), 2, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        x = flow.sample(5, seed=3)
        assert torch.allclose(flow.sample(1, seed=7)[0], x[4], atol=1e-6)
        z = flow.encode(x)
        assert torch.allclose(z, StandardNormal((2,)).sample(5, 3).double(), atol=1e-5)
        assert torch.allclose(flow.decode(z), x, atol=1e-6)
        assert flow.sample(0).shape == (0, 2)


def test_a_context_is_handed_on():
    class Conditional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, t, y, context):
            return self.scale * context * y

    context = torch.tensor([[0.0], [0.5], [-1.0]], dtype=torch.float64, requires_grad=True)
    flow, x = CNF(Conditional(), 2), points(3)
    found = flow.log_prob(x, context)
    expected = StandardNormal((2,)).log_prob(x * context.exp()) + 2 * context[:, 0]
    assert torch.allclose(found, expected, atol=1e-6)
    (slope,) = torch.autograd.grad(found.sum(), context)
    assert torch.allclose(slope, torch.autograd.grad(expected.sum(), context)[0], atol=1e-5)
    assert torch.allclose(flow.sample(3, 0, context) * context.exp(), StandardNormal((2,)).sample(3, 0).double(),
                          atol=1e-5)  # fmt: skip


def test_distributions_of_torch_are_bases():
    base = torch.distributions.MultivariateNormal(torch.ones(2).double(), 2 * torch.eye(2).double())
    flow = CNF(lambda t, y: 0 * y, base)
    x = points(4)
    assert torch.allclose(flow.log_prob(x), base.log_prob(x))
    each = torch.distributions.Normal(torch.zeros(2).double(), torch.ones(2).double())
    assert torch.allclose(CNF(lambda t, y: 0 * y, each).log_prob(x), StandardNormal((2,)).log_prob(x))
    state = torch.random.get_rng_state()
    assert torch.equal(flow.sample(3, 5), flow.sample(3, 5))
    assert torch.equal(state, torch.random.get_rng_state())


def test_training_finds_a_gaussian():
    torch.manual_seed(0)
    flow = CNF(VectorField(network(1), timed=True), 1, rtol=1e-4, atol=1e-5)
    optimiser = torch.optim.Adam(flow.parameters(), 0.05)
    x = 2 + 0.5 * points(256, 1)
    loss = x.sum()
    for _ in range(80):
        optimiser.zero_grad()
        loss = -flow.log_prob(x).mean()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.5 * math.log(2 * math.pi * math.e * 0.25) + 0.06


X = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CNF("field", 2), "field"),  # type: ignore[arg-type]
        (lambda: CNF(field(), "normal"), "base"),  # type: ignore[arg-type]
        (lambda: CNF(field(), 0), "shape"),
        (lambda: CNF(field(), [2, -1]), "shape"),
        (lambda: CNF(field(), object()), "base"),  # type: ignore[arg-type]
        (lambda: CNF(field(), 2, ts=(0.0,)), "two times apart"),
        (lambda: CNF(field(), 2, ts=(0.5, 0.5)), "two times apart"),
        (lambda: CNF(field(), 2, trace="hutch"), "divergence"),
        (lambda: CNF(field(), 2, trace=Hutchinson(0)), "probes"),
        (lambda: CNF(field(), 2, taylor=4), "taylor"),
        (lambda: CNF(field(), 2, nodes=0), "nodes"),
        (lambda: CNF(field(), 2, batch="each"), "batch"),
        (lambda: CNF(field(), 2, method="dopri55"), "dopri5"),
        (lambda: CNF(field(), 2, rtoll=1e-3).log_prob(X.double()), "rtoll"),
        (lambda: CNF(field(), 2).log_prob(torch.zeros(2)), "x: need"),
        (lambda: CNF(field(), 2).log_prob(torch.zeros(2, 2, dtype=torch.int64)), "x: need"),
        (lambda: CNF(field(), 2).log_prob([[0.0, 0.0]]), "x: need"),  # type: ignore[arg-type]
        (lambda: CNF(field(), 2).log_prob(torch.zeros(0, 2)), "x: need"),
        (lambda: CNF(field(), 2).log_prob(X.double(), torch.zeros(3, 1)), "context"),
        (lambda: CNF(field(), 2, trace="hutchinson").log_prob(X.double(), seeds=[1]), "seeds"),
        (lambda: CNF(field(), 2).sample(-1), "n:"),
        (lambda: CNF(field(), 2).sample(2, seed=-3), "seed"),
        (lambda: CNF(lambda t, y: y + t.expand(len(y), 1), 2).log_prob(X.requires_grad_()), "fails for t"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_a_field_that_explodes_is_named():
    with pytest.raises(NumericalError, match="stopped"):
        CNF(lambda t, y: y**3 * 100, 2).log_prob(torch.ones(2, 2))
    with pytest.raises(NumericalError, match="stopped"), torch.no_grad():
        CNF(lambda t, y: y * math.nan, 2).log_prob(torch.ones(2, 2))
