"""Keyed noise."""

import pytest
import torch

from pfode import noise
from pfode.errors import UsageError


def test_noise_depends_on_seed_and_draw_alone():
    a = noise.normal([5, 6, 7], 2, (3, 4))
    assert torch.equal(noise.normal([7, 5], 2, (3, 4)), a[[2, 0]])
    assert not torch.equal(noise.normal([5], 3, (3, 4)), a[:1])
    assert torch.equal(noise.normal([5], 2, (3, 4), torch.float64).float(), a[:1])


def test_all_64_bits_of_a_seed_count():
    draws = [noise.normal([seed], 0, (8,)) for seed in (0, 1, 2**32, 2**63, 2**64 - 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_the_numbers_are_pinned():
    """The same on every machine and version: a change here changes everybody's pictures."""
    pinned = [-0.6174507449613245, 0.837016802930019, -0.04720822676778238, -0.10252846182729469]
    assert noise.normal([2**40 + 1], 3, (4,), torch.float64)[0].tolist() == pytest.approx(pinned, abs=1e-15)


def test_it_is_standard_normal_and_uncorrelated():
    z = noise.normal(range(500), 0, (200,), torch.float64)
    y = noise.normal(range(500), 1, (200,), torch.float64)
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z * y).mean()) < 4 / n**0.5
    assert abs((z[1:] * z[:-1]).mean()) < 4 / n**0.5


def test_shapes():
    assert noise.normal([1, 2], 0, ()).shape == (2,)
    assert noise.normal([1, 2], 0, (3, 1, 2)).shape == (2, 3, 1, 2)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(UsageError, match="seed"):
        noise.check_seeds([seed])
