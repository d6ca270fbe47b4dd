"""Gradients by taking steps again, with the noise made again from its keys, beside those through every operation."""

import pytest
import torch

from pfode import ode
from pfode.errors import UsageError
from pfode.sde import SDE, methods_for, sdesolve
from tests.sde import problems

KINDS = [(c, n) for c in ("ito", "stratonovich") for n in problems.NOISES]
CASES = [(c, n, m) for c, n in KINDS for m in methods_for(n, c)]
WAYS = [{"step_size": 0.13}, {"rtol": 1e-2, "atol": 1e-2}, {"rtol": 1e-2, "atol": 1e-2, "batch": "per-sample"}]


def gradients(sde: SDE, adjoint, scale: float = 1.0, **options) -> torch.Tensor:
    """Of a loss of states at several times, with respect to the start, a scale of it, an argument and parameters."""
    params = [p for net in (sde.f, sde.g) if isinstance(net, torch.nn.Module) for p in net.parameters()]
    noise = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3).requires_grad_()
    width = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    out = sdesolve(sde, width * noise, [0.0, 0.3, 0.31, 1.0], seed=7, adjoint=adjoint, **options)
    return torch.cat([g.flatten() for g in torch.autograd.grad(out.ys.square().sum(), [noise, width, *params])])


@pytest.mark.parametrize(("calculus", "noise", "method"), CASES)
def test_replay_is_exact(calculus, noise, method):
    sde = problems.network(noise, calculus)
    for way in WAYS if method in ("srid2", "spark", "euler", "shark") else WAYS[:1]:
        exact = gradients(sde, "direct", method=method, **way)
        others = ["checkpoint", ode.Checkpoint(memory=4 * 4 * 3 * 8 * 3)]
        others += ["reversible"] if method == "reversible-heun" and way is WAYS[0] else []
        for adjoint in others:
            found = gradients(sde, adjoint, method=method, **way)
            assert (found - exact).norm() <= 1e-12 * exact.norm()


def test_gradients_to_arguments_and_twice():
    def loss(rate, size, y0, adjoint="checkpoint"):
        sde = SDE(lambda t, y, a, b: -a * y, lambda t, y, a, b: b * torch.cos(y))
        out = sdesolve(sde, y0, [0.0, 0.5], args=(rate, size), seed=3, step_size=0.125, adjoint=adjoint)
        return out.ys[-1].pow(3).sum()

    values = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.5, 0.8)]
    y0 = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (*values, y0))
    assert torch.autograd.gradgradcheck(lambda a, b, y: loss(a, b, y, "direct"), (*values, y0))
    (slope,) = torch.autograd.grad(loss(values[0], values[1], y0), values[:1], create_graph=True)
    with pytest.raises(UsageError, match="direct"):
        slope.backward()


def test_a_tensor_in_the_diffusion_alone_is_found():
    """Per sample no graph of a first step is kept: f and g are looked at."""
    hidden = {"w": torch.tensor(0.7, dtype=torch.float64, requires_grad=True)}
    sde = SDE(lambda t, y: -y, lambda t, y: (hidden["w"] * 1.0) * y)
    y0 = torch.ones(2, 1, dtype=torch.float64)
    for batch in ("joint", "per-sample"):
        sdesolve(sde, y0, [0.0, 1.0], batch=batch).ys.sum().backward()
        assert hidden["w"].grad is not None
        hidden["w"].grad = None


def test_memory_is_capped():
    """The states kept for the backward pass stay under the cap, and the gradient the same."""
    sde = problems.network("diagonal", "ito")
    exact = gradients(sde, "direct", method="euler", step_size=1 / 300)
    assert torch.allclose(gradients(sde, ode.Checkpoint(memory=8 * 96), method="euler", step_size=1 / 300), exact)


def test_adjoints_that_do_not_fit_are_refused():
    sde = problems.network("diagonal", "ito")
    y0 = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(UsageError, match="checkpoint"):
        sdesolve(sde, y0, [0.0, 1.0], adjoint="interpolated")
    with pytest.raises(UsageError, match="backwards"):
        sdesolve(sde, y0, [0.0, 1.0], adjoint="reversible", step_size=0.1)
