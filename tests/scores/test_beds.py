"""Test beds by name, and what the exact ones promise."""

import pytest
import torch

import pfode
from pfode.errors import UsageError
from pfode.scores import GaussianMixture
from pfode.scores.beds import Perturbed, bed


@pytest.mark.parametrize(
    ("name", "shape", "process"),
    [
        ("gaussian-3", (3,), pfode.EDM()),
        ("mixture-2-vp", (2,), pfode.VP()),
        ("mixture-1000-flow", (1000,), pfode.Flow()),
        ("mixture-8x15-vp~0.1", (8,), pfode.VP()),
        ("digits-ideal-flow", (1, 8, 8), pfode.Flow()),
        ("digits-vp", (1, 8, 8), pfode.VP()),
    ],
)
def test_names(name, shape, process):
    found = bed(name)
    assert (tuple(found.shape), found.process) == (shape, process)
    x = torch.zeros(2, *shape)
    assert found(x, torch.tensor(0.5)).shape == x.shape


@pytest.mark.parametrize(
    "name", ["mixture", "mixture-1", "mixture-2000", "gaussian-0", "mixture-4~x", "nothing", "digits@x"]
)
def test_names_that_are_none(name):
    with pytest.raises(UsageError):
        bed(name)


def test_guided_beds_cost_two():
    assert bed("digits@2").evals == 2
    assert bed("digits@2")(torch.zeros(1, 1, 8, 8), torch.tensor(1.0), label=torch.tensor([3])).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("apart", [3.0, 15.0])
def test_modes_lie_as_far_apart_as_said(apart):
    """The median over pairs of modes of their distance in the geometric mean of their deviations, within a third."""
    found = bed(f"mixture-64x{apart:g}")
    away = [
        ((found.means[i] - found.means[j]) / (found.variances[i] * found.variances[j]) ** 0.25).norm()
        for i in range(8)
        for j in range(i)
    ]
    assert torch.stack(away).median().item() == pytest.approx(apart, rel=0.34)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 5.0, 80.0])
def test_the_error_is_that_share_of_an_edm_networks_output(sigma):
    exact, perturbed = bed("mixture-64"), bed("mixture-64~0.1")
    assert isinstance(perturbed, Perturbed)
    noise = pfode.noise.normal(range(200), 0, (64,), torch.float64)
    x, t = exact.sample(200) + sigma * noise, torch.tensor(sigma, dtype=torch.float64)
    c_out = sigma * 0.5 / (sigma**2 + 0.25) ** 0.5
    error = (perturbed(x, t) - exact(x, t)).pow(2).mean().sqrt().item()
    assert error == pytest.approx(0.1 * c_out, rel=0.1)
    assert torch.equal(perturbed.sample(3, 5), exact.sample(3, 5))


def test_the_ideal_digits_do_not_collapse():
    """End points lie a kernel's width from their digit, as the truth does, and not on it."""
    found = bed("digits-ideal")
    x = 80 * pfode.noise.normal(range(32), 0, found.shape, torch.float64)
    drawn = pfode.run(pfode.make_plan("unipc3", found.process, 64, grid="karras", chart="flow"), found, x)
    away, true = (torch.cdist(z.flatten(1), found.means).min(1).values.mean() for z in (drawn, found.sample(200)))
    assert away == pytest.approx(true.item(), rel=0.05)
    assert true > 0.7


def test_density_and_modes_of_a_finite_set_are_the_mixtures():
    found = bed("digits-ideal")
    few = pfode.scores.Empirical(found.means[:50].reshape(50, 1, 8, 8), std=0.4, process=pfode.VP())
    same = GaussianMixture(few.means.reshape(50, 1, 8, 8), std=0.4, process=pfode.VP())
    x = few.sample(20, seed=3)
    for t in (None, 0.3):
        assert torch.allclose(few.log_prob(x, t), same.log_prob(x, t), rtol=1e-9)
    assert torch.allclose(few.modes(x), same.modes(x), atol=1e-9)
    assert torch.allclose(same.modes(x).sum(1), torch.ones(20, dtype=torch.float64))
