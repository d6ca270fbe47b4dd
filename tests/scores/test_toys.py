"""Laws with known densities: mass one, the entropies of the literature, keyed samples."""

import math

import pytest
import torch

from pfode.errors import UsageError
from pfode.scores import toys
from pfode.scores.toys import LAWS, Checkerboard, TwoNormals, law, patches

PLANE = ["8gaussians", "checkerboard", "moons", "swissroll", "rings", "spirals"]


@pytest.mark.parametrize(
    ("made", "entropy"),
    [
        (toys.eight_gaussians(), 2.83188),  # FFJORD's; log 8 + log(2 pi e std^2) = 2.83818 leaves the overlap out
        (toys.eight_gaussians(5.0, 0.1**0.5), 2.61473),  # torchcfm's
        (Checkerboard(), math.log(32)),
        (toys.moons(), 2.39388),
        (toys.moons(0.2, 3.0, (-1.0, -1.0)), 3.87470),
        (TwoNormals("one", 3, (0.0, 0.0), (2.0, 2.0)), 1.5 * math.log(2 * math.pi * math.e * 4)),
        (TwoNormals("far", 5, (-40.0, 40.0), (1.0, 1.0)), 2.5 * math.log(2 * math.pi * math.e) + math.log(2)),
    ],
)
def test_entropies(made, entropy):
    assert made.entropy == pytest.approx(entropy, abs=6e-6)


@pytest.mark.parametrize("name", LAWS)
def test_the_entropy_is_the_mean_of_minus_log_prob(name):
    made = law(name)
    log_prob = made.log_prob(made.sample(3000, seed=5))
    error = float(log_prob.std()) / math.sqrt(3000)
    assert abs(made.entropy + float(log_prob.mean())) <= 3.5 * error + 1e-9


@pytest.mark.parametrize("name", PLANE)
def test_the_mass_is_one(name):
    axis = torch.linspace(-6, 6, 121, dtype=torch.float64)[:-1] + 6 / 120
    x = torch.cartesian_prod(axis, axis)
    assert float(law(name).log_prob(x).exp().sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("name", LAWS)
def test_sample_i_depends_on_its_seed_alone(name):
    made = law(name)
    whole = made.sample(7, seed=2**40 + 3)
    for i in (0, 6):
        assert torch.equal(made.sample(1, seed=2**40 + 3 + i)[0], whole[i])
    assert len(made.sample(0)) == 0
    assert not torch.equal(made.sample(1, 0), made.sample(1, 1))


def test_ringnorm_is_breimans():
    made = law("ringnorm")
    x = made.sample(20_000)
    near = x[(x - 1 / math.sqrt(20)).square().sum(1) < 40]
    assert abs(float(near.mean()) - 1 / math.sqrt(20)) < 0.02
    assert abs(len(near) / 20_000 - 0.5) < 0.02


def test_patches_are_photographs():
    pytest.importorskip("sklearn", reason="pip install scikit-learn: its photographs")
    some = patches(40, seed=9)
    assert some.shape == (40, 63)
    assert torch.equal(patches(1, seed=9 + 17)[0], some[17])
    whole = torch.cat([some, -some.sum(1, keepdim=True)], 1)  # what was left out makes the mean zero
    neighbours = (whole[:, 1:8] - whole[:, :7]).square().mean()
    assert neighbours < 0.8 * whole.square().mean()


@pytest.mark.parametrize(
    "call",
    [
        lambda: law("moon"),
        lambda: law("moons").sample(-1),
        lambda: law("moons").sample(1, seed=-1),
        lambda: law("moons").sample(1, seed=2**63),
        lambda: law("moons").log_prob(torch.zeros(3, 3)),
        lambda: law("twonorm").log_prob(torch.zeros(20)),
        lambda: Checkerboard(3),
        lambda: Checkerboard(4, 0.0),
        lambda: toys.moons(std=0.0),
        lambda: toys.rings(std=math.nan),
        lambda: TwoNormals("x", 1, (0.0, 0.0), (1.0, 1.0)),
    ],
)
def test_bad_requests_are_refused(call):
    with pytest.raises(UsageError):
        call()
