"""Keyed noise: fresh draws, and the increments of a Brownian path."""

import itertools

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


N = 20_000  # numbers that a statistic is made of


def path(start: float, stop: float) -> torch.Tensor:
    """N normalised increments over one interval, of 20 seeds."""
    return noise.brownian(range(20), start, stop, (N // 20,), torch.float64).flatten()


def total(seeds, times, shape, **more) -> torch.Tensor:
    """The sum of W's increments over the intervals between successive times."""
    parts = [
        abs(b - a) ** 0.5 * noise.brownian(seeds, a, b, shape, torch.float64, **more)
        for a, b in itertools.pairwise(times)
    ]
    return torch.stack(parts).sum(0)


GRID = [k / 64 for k in range(65)]  # where nothing is rounded


def test_brownian_increments_are_those_of_one_path():
    """Whatever is asked for, in whichever order, with or without what the last call left, alone or in a batch."""
    seeds = [3, 2**64 - 1, 8]
    whole = noise.brownian(seeds, 0.0, 1.0, (2, 3), torch.float64)
    ends: dict = {}
    for stride in (1, 4, 16, 32):
        for sign, times in ((1, GRID[::stride]), (-1, GRID[::-stride])):
            assert torch.allclose(total(seeds, times, (2, 3)), sign * whole, atol=1e-12)
            assert torch.allclose(total(seeds, times, (2, 3), ends=ends), sign * whole, atol=1e-12)
    pairs = list(itertools.pairwise(GRID))
    alone = [noise.brownian([8], a, b, (2, 3), torch.float64) for a, b in pairs]
    batched = [noise.brownian(seeds, a, b, (2, 3), torch.float64) for a, b in reversed(pairs)]
    assert all(torch.equal(a[0], b[2]) for a, b in zip(alone, reversed(batched), strict=True))
    assert torch.equal(-alone[5], noise.brownian([8], GRID[6], GRID[5], (2, 3), torch.float64))


@pytest.mark.parametrize("steps", [10, 20, 40])
def test_the_path_is_the_same_for_any_number_of_steps(steps):
    """Times that fall between the tree's: additive to its resolution."""
    times = torch.linspace(0.83, 0.17, steps + 1, dtype=torch.float64).tolist()
    seeds = range(4)
    missed = total(seeds, times, (500,)) - total(seeds, [times[0], times[-1]], (500,))
    assert missed.square().mean().sqrt() < 1e-4


@pytest.mark.parametrize("times", [[0.9, 0.43, 0.2, 0.1999, 0.01], [0.0, 0.5, 0.75, 1.0], [0.3, 0.300003, 0.300006]])
def test_disjoint_brownian_increments_are_standard_normal_and_uncorrelated(times):
    z = torch.stack([path(a, b) for a, b in itertools.pairwise(times)])
    assert (z.mean(1).abs() < 4 / N**0.5).all()
    products = z @ z.T / N - torch.eye(len(z), dtype=torch.float64)
    assert (products.abs() < 4 * (2 / N) ** 0.5).all()
    assert abs((z**4).mean() - 3) < 4 * (96 / z.numel()) ** 0.5


def test_brownian_motion_has_its_covariance():
    """E W(s) W(t) = min(s, t), of intervals that overlap."""
    w = {t: t**0.5 * path(0.0, t) for t in (0.1, 0.37, 0.6, 1.0)}
    for s, t in itertools.combinations(w, 2):
        assert abs((w[s] * w[t]).mean() - s) < 4 * (2 * s * t / N) ** 0.5


def test_an_interval_below_the_resolution_draws_noise_of_its_own():
    tiny = 2.0**-30
    here, beyond, whole = path(0.3, 0.3 + tiny), path(0.3 + tiny, 0.3 + 2 * tiny), path(0.3, 0.31)
    assert torch.equal(path(0.3 + tiny, 0.3), -here)
    for z, other in ((here, beyond), (beyond, whole), (whole, here)):
        assert abs(z.var() - 1) < 4 * (2 / N) ** 0.5
        assert abs((z * other).mean()) < 4 / N**0.5


def test_brownian_noise_is_no_draw_of_the_other_kind():
    """Nodes of the tree and draw numbers are counted apart."""
    whole = noise.brownian([5], 0.0, 1.0, (4,), torch.float64)
    assert all(not torch.equal(whole, noise.normal([5], draw, (4,), torch.float64)) for draw in range(40))


def test_brownian_numbers_are_pinned():
    pinned = [0.06865637937626475, 0.5851259281973837, -0.2534699839032822]
    assert noise.brownian([2**40 + 1], 0.7, 0.2, (3,), torch.float64)[0].tolist() == pytest.approx(pinned, abs=1e-14)


def test_brownian_noise_of_another_dtype_is_the_same_rounded():
    z = noise.brownian([1, 2], 0.7, 0.2, (3, 1, 2), torch.float64)
    assert torch.equal(noise.brownian([1, 2], 0.7, 0.2, (3, 1, 2)), z.float())


@pytest.mark.parametrize(("start", "stop"), [(0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_bad_intervals_are_refused(start, stop):
    with pytest.raises(UsageError):
        noise.brownian([0], start, stop, (3,))
