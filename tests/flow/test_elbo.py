"""The evidence lower bound: exact for exact denoisers, below for others, by a sample's seed alone."""

import math

import pytest
import torch

import pfode
from pfode.errors import UsageError
from pfode.scores import Empirical, GaussianMixture
from tests.flow.test_likelihood import eight, exact, labelled

f64 = torch.float64


@pytest.mark.parametrize("process", [pfode.Flow(), pfode.EDM(), pfode.VP()], ids=lambda p: type(p).__name__)
def test_of_an_exact_denoiser_nothing_is_lost(process):
    """E log p of data with the noise of t_min twice over differs from log p by less than 1e-3 here."""
    net = eight(process)
    x = net.sample(60, seed=2)
    found = pfode.elbo(net, x, levels=200, seeds=range(60))
    gap = exact(net, x) - found.nats
    assert abs(gap.mean()) < 3 * gap.std() / math.sqrt(60) + 1e-3
    z = gap / found.stderr
    assert 0.8 < z.std() < 1.3
    assert torch.equal(sum(found.parts.values(), torch.zeros(60, dtype=f64)), found.nats)
    assert list(found.parts) == ["prior", "diffusion", "end"]
    assert found.nfe.tolist() == [200] * 60


def test_below_the_likelihood_of_another_denoiser():
    """A denoiser that is too wide: its bound is on the likelihood of the SDE, and below that of the data's law."""
    net = eight()
    wrong = GaussianMixture(net.means, 0.35, process=net.process)
    x = net.sample(80, seed=2)
    found = pfode.elbo(wrong, x, levels=100, seeds=range(80))
    right = exact(net, x)
    assert found.nats.mean() < right.mean() - 0.1
    gap = found.nats - exact(wrong, x)
    assert gap.mean().abs() < 3 * gap.std() / math.sqrt(80) + 1e-3


def test_of_data_in_bins():
    points = torch.tensor([[-1.0, -0.5], [0.5, 1.0], [0.5, 1.0], [0.0, 0.0]], dtype=f64)
    net = Empirical(points, 1e-5, pfode.EDM(sigma_min=0.05))
    found = pfode.elbo(net, points.repeat(40, 1), levels=100, bins=5, seeds=range(160))
    assert found.end == "truncated"
    mean = found.nats.reshape(40, 4).mean(0)
    want = torch.tensor([0.25, 0.5, 0.5, 0.25], dtype=f64).log()
    error = found.stderr.reshape(40, 4).square().mean(0).sqrt() / math.sqrt(40)
    assert ((mean - want).abs() < 3.5 * error + 1e-3).all()
    assert (found.parts["end"].abs() < 1e-6).all()  # the noise of t_min hides no value
    coarse = Empirical(points, 1e-5, pfode.EDM(sigma_min=0.3))
    assert (pfode.elbo(coarse, points, levels=10, bins=5, seeds=range(4)).parts["end"] < -0.1).all()


def test_uniform_dequantisation_is_the_density_within_the_bin():
    net = eight()
    x = net.sample(40, seed=3)
    uniform, plain = (
        pfode.elbo(net, x, levels=200, seeds=range(40), **how) for how in ({"end": "uniform", "bins": 201}, {})
    )
    gap = uniform.nats - plain.nats - 2 * math.log(0.01)
    assert gap.abs().mean() < 0.5
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(40) + 1e-3
    assert (uniform.end, uniform.width) == ("uniform", 0.01)


def test_by_the_seed_alone_and_the_same_noise_under_every_label():
    net, x = eight(), eight().sample(10, seed=1)
    whole = pfode.elbo(net, x, levels=20)
    back = pfode.elbo(net, x.flip(0), levels=20, batch=3)
    assert torch.allclose(whole.nats, back.nats.flip(0), rtol=1e-11)
    two = labelled()
    y = torch.tensor([[0.9, 1.1], [-0.8, -1.0]])
    high, low = (pfode.elbo(two, y, levels=40, label=label) for label in ("high", "low"))
    apart = high.nats - low.nats
    law = [torch.distributions.Normal(centre, 0.5).log_prob(y).sum(1) for centre in (1.0, -1.0)]
    assert torch.allclose(apart, (law[0] - law[1]).double(), rtol=0.3)
    assert (apart.sign() == torch.tensor([1, -1])).all()


def test_its_gradient_is_that_of_a_loss():
    net, x = eight(), eight().sample(4, seed=1).requires_grad_()
    (slope,) = torch.autograd.grad(pfode.elbo(net, x, levels=400, seeds=range(4)).nats.sum(), x)
    assert slope.isfinite().all()
    with torch.no_grad():
        assert not pfode.elbo(net, x, levels=4).nats.requires_grad


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"levels": 1.5}, "levels: need an integer"),
        ({"levels": 0}, "levels: need an integer of at least|levels: need an integer from"),
        ({"end": "sharp"}, "unknown end 'sharp'"),
        ({"prior": "flat"}, "unknown prior 'flat'"),
        ({"seeds": range(3)}, "need one for each of 2 samples, got 3"),
        ({"bins": -1}, "bins: need an integer"),
    ],
)
def test_malformed_calls(options, says):
    with pytest.raises(UsageError, match=says):
        pfode.elbo(eight(), torch.zeros(2, 2), **options)
