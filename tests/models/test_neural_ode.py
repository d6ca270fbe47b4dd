"""NeuralODE layers: what they equal, their regularisers, spectral norm, and what they can and cannot represent."""

import math

import pytest
import torch
from torch import Tensor, nn

from pfode.errors import UsageError
from pfode.models import AugmentedNeuralODE, NeuralODE, VectorField, bound_spectral_norm

f64 = torch.float64


def mlp(inputs: int, outputs: int, width: int = 16, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def points(n: int = 5, d: int = 2) -> Tensor:
    return torch.randn(n, d, dtype=f64, generator=torch.Generator().manual_seed(3))


class Blocks(nn.Module):
    """The field that is block l from t = l/L to (l + 1)/L."""

    def __init__(self, blocks: list[nn.Sequential]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.blocks[round(float(t) * len(self.blocks))](y)


@pytest.mark.parametrize("adjoint", ["direct", "checkpoint"])
@pytest.mark.parametrize("count", [1, 3, 10])
def test_euler_with_steps_of_1_over_l_is_the_scaled_resnet(count, adjoint):
    """y_{l+1} = y_l + f_l(y_l) / L: the same states, and the same gradients in every block."""
    blocks = [mlp(2, 2, seed=k) for k in range(count)]
    layer = NeuralODE(Blocks(blocks), method="euler", step_size=1 / count, adjoint=adjoint)
    x = points()
    y = x
    for block in blocks:
        y = y + block(y) / count
    assert torch.allclose(layer(x), y, rtol=1e-13, atol=1e-14)
    parameters = list(layer.parameters())
    ours, resnets = (torch.autograd.grad(out.square().sum(), parameters) for out in (layer(x), y))
    for a, b in zip(ours, resnets, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)
    assert layer.run(x).nfe == count


A = torch.tensor([[0.3, -1.2], [0.8, -0.5]], dtype=f64)


def linear(t: Tensor, y: Tensor) -> Tensor:
    return y @ A.T


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
def test_regularisers_of_a_linear_field(batch):
    x = points()
    layer = NeuralODE(linear, (0.0, 0.7), kinetic=True, jacobian="exact", rtol=1e-9, atol=1e-11, batch=batch)
    run = layer.run(x)
    assert torch.allclose(run.y, x @ torch.matrix_exp(0.7 * A).T, rtol=1e-8)
    times, weights = _simpson(0.7)
    speeds = torch.stack([(x @ torch.matrix_exp(t * A).T @ A.T).square().sum(1) for t in times])
    assert torch.allclose(run.kinetic, weights @ speeds, rtol=1e-6)
    assert torch.allclose(run.jacobian, torch.full((5,), 0.7 * A.square().sum().item(), dtype=f64), rtol=1e-8)
    assert torch.equal(layer(x), NeuralODE(linear, (0.0, 0.7), rtol=1e-9, atol=1e-11, batch=batch)(x))


def _simpson(end: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Simpson's rule on 200 intervals."""
    times = torch.linspace(0, end, 201, dtype=f64)
    weights = torch.ones(201, dtype=f64)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return times, weights * end / 600


def test_hutchinson_is_right_on_average():
    net = mlp(3, 2)
    x = points(1).expand(4000, 2)
    exact, estimate = (
        NeuralODE(VectorField(net, timed=True), jacobian=how, rtol=1e-3).run(x) for how in ("exact", "hutchinson")
    )
    spread = estimate.jacobian.std() / math.sqrt(4000)
    assert 0 < spread < 0.02 * exact.jacobian[0]
    assert (estimate.jacobian.mean() - exact.jacobian[0]).abs() < 4 * spread
    assert torch.equal(estimate.kinetic, torch.zeros(4000, dtype=f64))


@pytest.mark.parametrize("batch", ["joint", "per-sample"])
def test_regularisers_choose_no_steps(batch):
    net = VectorField(mlp(3, 2), timed=True)
    plain = NeuralODE(net, batch=batch).run(points())
    both = NeuralODE(net, batch=batch, kinetic=True, jacobian="hutchinson").run(points())
    assert torch.allclose(plain.y, both.y, rtol=1e-12)
    assert both.nfe == plain.nfe


def test_gradients_of_regularised_losses():
    """Of one seed, against differences; by either adjoint."""
    net = mlp(3, 2, 4)
    weights = next(net.parameters())

    def loss(adjoint: str, shift: float = 0.0) -> Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            weights[0, 1] += shift
        layer = NeuralODE(
            VectorField(net, timed=True), kinetic=True, jacobian="hutchinson", adjoint=adjoint, rtol=1e-9, atol=1e-11
        )
        run = layer.run(points())
        return run.y.square().sum() + run.kinetic.sum() + run.jacobian.sum()

    gradients = [torch.autograd.grad(loss(adjoint), list(net.parameters())) for adjoint in ("direct", "checkpoint")]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        slope = (loss("direct", 1e-4) - loss("direct", -2e-4)) / 2e-4
    assert gradients[0][0][0, 1] == pytest.approx(slope.item(), rel=1e-4)


def test_further_dimensions_begin_at_zero():
    layer = AugmentedNeuralODE(lambda t, y: torch.zeros_like(y), 3)
    x = points()
    assert torch.equal(layer(x), torch.cat([x, torch.zeros(5, 3, dtype=f64)], 1))
    pictures = torch.randn(2, 3, 4, 4)
    conv = VectorField(nn.Conv2d(6, 5, 3, padding=1), timed=True)
    assert AugmentedNeuralODE(conv, 2, rtol=1e-2)(pictures).shape == (2, 5, 4, 4)
    between = NeuralODE(linear, (0.0, 0.5, 1.0)).trajectory(x)
    assert between.shape == (3, 5, 2)
    assert torch.equal(between[0], x)


def test_per_sample_steps_give_every_sample_its_time():
    seen = []

    def field(t, y):
        seen.append(t.shape)
        return torch.cos(t)[:, None] * y

    NeuralODE(field, batch="per-sample")(points())
    assert set(seen) == {(5,)}
    timed = VectorField(mlp(3, 2), timed=True)
    joint, each = (NeuralODE(timed, batch=batch, rtol=1e-8)(points()) for batch in ("joint", "per-sample"))
    assert torch.allclose(joint, each, rtol=1e-6)


def test_spectral_norm():
    net = mlp(2, 2)
    before = [p.detach().clone() for p in net.parameters() if p.ndim > 1]
    field = VectorField(net)
    layer = NeuralODE(field, spectral_norm=0.5)
    for module, old in zip((net[0], net[2]), before, strict=True):
        size = torch.linalg.matrix_norm(old, 2)
        assert size > 0.5
        assert torch.allclose(torch.as_tensor(module.weight), old * 0.5 / size)
    assert torch.linalg.matrix_norm(bound_spectral_norm(nn.Linear(3, 3), 100.0).weight, 2) < 2
    a, b = points(), points() + 0.01
    zero = torch.tensor(0.0)
    assert (field(zero, a) - field(zero, b)).norm() <= 0.25 * (a - b).norm()
    layer(a).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters() if p.ndim > 1)
    conv = bound_spectral_norm(nn.Conv2d(3, 8, 3), 0.1)
    assert torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2) == pytest.approx(0.1)
    other = NeuralODE(VectorField(mlp(2, 2, seed=5)), spectral_norm=0.5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(a), layer(a))


def test_a_line_cannot_be_turned_over_without_another_dimension():
    """x -> -x: ways on a line never cross, in the plane they pass each other."""
    x = torch.linspace(-1, 1, 41, dtype=f64)[:, None]
    losses = {}
    for extra in (0, 1):
        field = VectorField(mlp(1 + extra, 1 + extra, seed=4))
        layer = AugmentedNeuralODE(field, extra, rtol=1e-3) if extra else NeuralODE(field, rtol=1e-3)
        optimiser = torch.optim.Adam(layer.parameters(), 0.03)
        for _ in range(60):
            optimiser.zero_grad()
            loss = (layer(x)[:, :1] + x).square().mean()
            loss.backward()
            optimiser.step()
            losses[extra] = loss.item()
        if not extra:
            assert (layer(x).diff(dim=0) > 0).all()
    assert losses[0] > 0.3  # that of 0 is 0.35
    assert losses[1] < 0.01


def test_what_cannot_be_made():
    with pytest.raises(UsageError, match="unknown jacobian 'hutchison'\nhint: did you mean 'hutchinson'"):
        NeuralODE(linear, jacobian="hutchison")
    with pytest.raises(UsageError, match="spectral_norm: needs a module, got function"):
        NeuralODE(linear, spectral_norm=1.0)
    with pytest.raises(UsageError, match="Tanh has no weight matrices"):
        bound_spectral_norm(nn.Tanh())
    with pytest.raises(UsageError, match="bound: need a number above 0, got 0"):
        bound_spectral_norm(nn.Linear(2, 2), 0)
    with pytest.raises(UsageError, match="extra: need an integer of at least 1, got 0"):
        AugmentedNeuralODE(linear, 0)
    with pytest.raises(UsageError, match="unknown option 'steps'"):
        NeuralODE(linear, steps=10)(points())
