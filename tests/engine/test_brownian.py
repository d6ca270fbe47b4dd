"""Brownian paths: law, consistency, and that a number depends on its seed, its interval and nothing else."""

import itertools
import math

import numpy as np
import pytest
import torch

from pfode import noise
from pfode.brownian import Brownian
from pfode.errors import UsageError

N = 100_000  # samples that a statistic is made of
TIMES = [0.0, 0.25, 0.3, 0.3001, 1.0, 1.1, 2.0]


def increments(bm: Brownian, a, b) -> list[torch.Tensor]:
    made = bm.increment(a, b)
    return list(made) if bm.area else [made]


def standardised(bm: Brownian, times) -> np.ndarray:
    """Increments and areas of successive intervals in units of their standard deviations, one row each."""
    rows = []
    for a, b in itertools.pairwise(times):
        rows += [z.flatten() / math.sqrt((b - a) / c) for z, c in zip(increments(bm, a, b), (1, 12), strict=False)]
    return torch.stack(rows).numpy()


def kolmogorov(z: np.ndarray) -> float:
    """sqrt(n) times the distance of the empirical distribution from the standard normal one."""
    phi = 0.5 * (1 + torch.erf(torch.from_numpy(np.sort(z)) / math.sqrt(2))).numpy()
    steps = np.arange(len(z) + 1) / len(z)
    return math.sqrt(len(z)) * max(abs(phi - steps[1:]).max(), abs(phi - steps[:-1]).max())


@pytest.mark.parametrize("area", [False, True])
def test_increments_and_areas_are_independent_normal_numbers_of_their_variances(area):
    for bm in (
        Brownian(range(N // 50), (50,), 0, 2, area, dtype=torch.float64),
        Brownian.single(7, (N,), 0, 2, area, dtype=torch.float64),
    ):
        z = standardised(bm, TIMES)
        assert all(kolmogorov(row) < 2.2 for row in z)  # exceeded once in 8000
        wrong = z @ z.T / N - np.eye(len(z))
        assert abs(wrong).max() < 4.5 * math.sqrt(2 / N)


@pytest.mark.parametrize("area", [False, True])
def test_given_the_whole_the_parts_have_the_bridge_s_law(area):
    """E(W(1/4) | W, H) = W/4 + 6 (1/4)(3/4) H, and its variance (the polynomial of Foster, Lyons & Oberhauser 2020)."""
    bm = Brownian.single(3, (N,), 0, 1, area, dtype=torch.float64)
    whole, part = increments(bm, 0, 1), increments(bm, 0, 0.25)[0]
    known = torch.stack(whole)
    slopes = torch.linalg.lstsq(known.T, part[:, None]).solution.flatten()
    assert slopes.tolist() == pytest.approx([0.25, 6 * 0.1875][: len(whole)], abs=0.02)
    left = (part - slopes @ known).var()
    assert float(left) == pytest.approx(0.1875 - (3 * 0.1875**2 if area else 0), rel=0.03)


@pytest.mark.parametrize("area", [False, True])
def test_intervals_add_up(area):
    """W = sum w, U = sum u + w' h over the parts, U = h (W/2 + H); backwards W is the negative and H the same."""
    bm = Brownian([3, 2**64 - 1], (2, 5), -1.0, 3.0, area, dtype=torch.float64)
    whole = increments(bm, -1.0, 3.0)
    for n in (2, 8, 12, 64):
        times = torch.linspace(-1, 3, n + 1, dtype=torch.float64).tolist()
        w, u = torch.zeros_like(whole[0]), torch.zeros_like(whole[0])
        for a, b in itertools.pairwise(times):
            part = increments(bm, a, b)
            u = u + (b - a) * (w + (part[0] / 2 + part[-1] if area else 0))
            w = w + part[0]
            back = increments(bm, b, a)
            assert torch.equal(back[0], -part[0])
            assert not area or torch.allclose(back[1], part[1], atol=1e-12)
        assert torch.allclose(w, whole[0], atol=1e-13)
        if area:
            assert torch.allclose(u, 4 * (w / 2 + whole[1]), atol=1e-6 if n == 12 else 1e-12)  # thirds are rounded


PAIRS = [(0.0, 0.5), (0.13, 0.7), (0.7, 0.13), (0.75, 0.7500001), (0.4, 0.4), (1 / 3, 1.0), (0.0, 1.0), (0.5, 0.501)]


@pytest.mark.parametrize("area", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (2, 600)])
def test_a_number_depends_on_its_seed_and_interval_alone(area, shape):
    """Not on the batch, nor the order of samples and queries, nor what was asked before, nor how it is asked."""

    def fresh(seeds):
        return Brownian(seeds, shape, 0, 1, area, dtype=torch.float64)

    seeds, old = [8, 3, 2**40 + 1], fresh([8, 3, 2**40 + 1])
    expected = [increments(old, a, b) for a, b in PAIRS]
    assert all(torch.equal(a, b) for a, b in zip(increments(old, *PAIRS[1]), expected[1], strict=True))
    again = fresh(seeds[::-1])
    for k in np.random.default_rng(0).permutation(len(PAIRS)):
        assert all(torch.equal(a.flip(0), b) for a, b in zip(increments(again, *PAIRS[k]), expected[k], strict=True))
        alone = increments(fresh([3]), *PAIRS[k])
        assert all(torch.equal(a[0], b[1]) for a, b in zip(alone, expected[k], strict=True))
    each = fresh(seeds)
    for ks in ([0, 1, 2], [3, 1, 5], [6, 7, 4]):
        ta, tb = (torch.tensor(t, dtype=torch.float64) for t in zip(*(PAIRS[k] for k in ks), strict=True))
        made = increments(each, ta, tb)
        for i, k in enumerate(ks):
            assert all(torch.equal(a[i], b[i]) for a, b in zip(made, expected[k], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(increments(each, *PAIRS[1]), expected[1], strict=True))


def test_walks_of_the_hinted_step_are_on_nodes_and_see_the_path_of_half_the_step():
    """Whatever the step, the increments of a walk are exact: the sums of those of half the step."""
    coarse = Brownian([1], (4,), 0.0, 1.0, step=0.01, dtype=torch.float64)
    fine = Brownian([1], (4,), 0.0, 1.0, step=0.005, dtype=torch.float64)
    for k in range(100):
        halves = [fine.increment(0.005 * j, 0.005 * (j + 1)) for j in (2 * k, 2 * k + 1)]
        assert torch.allclose(coarse.increment(0.01 * k, 0.01 * (k + 1)), halves[0] + halves[1], atol=1e-14)


def test_the_other_direction_and_dtypes():
    down = Brownian([1], (3,), 2.0, 0.0, dtype=torch.float64)
    up = Brownian([1], (3,), 0.0, 2.0, dtype=torch.float64)
    assert torch.equal(down.increment(2.0, 0.5), -up.increment(0.0, 1.5))  # its time runs from its t0
    assert torch.equal(Brownian([1], (3,), 0.0, 2.0).increment(0, 1.3), up.increment(0, 1.3).float())
    assert not torch.equal(up.increment(0, 2), noise.normal([1], 0, (3,), torch.float64) * 2**0.5)


def test_memory_does_not_grow():
    bm = Brownian.single(1, (2, 3), 0, 1, area=True)
    for k in range(2000):
        bm.increment(k / 2000, (k + 1) / 2000)
    blocks = bm._tree.blocks
    assert len(blocks) <= 25
    assert sum(b.size for b in blocks) < 25 * 2 * 65 * 6
    assert len(bm._tree.ends) <= 4


def test_the_numbers_are_pinned():
    """A change here changes everybody's paths."""
    w, h = Brownian([2**40 + 1], (2,), 0, 1, area=True, dtype=torch.float64).increment(0.2, 0.7)
    assert [*w[0].tolist(), *h[0].tolist()] == pytest.approx(PINNED[0], abs=1e-13)
    w = Brownian([2**40 + 1], (2,), 0, 1, dtype=torch.float64).increment(0.2, 0.7)
    assert w[0].tolist() == pytest.approx(PINNED[1], abs=1e-13)


PINNED = [
    [0.541239812454287, -0.35190046520655394, 0.041213119208767024, -0.07040616343809564],
    [0.6679645004747805, -0.7250497424117006],
]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Brownian([-1], (3,)), "seed"),
        (lambda: Brownian([1.5], (3,)), "seed"),  # type: ignore[list-item]
        (lambda: Brownian(5, (3,)), "one per sample"),  # type: ignore[arg-type]
        (lambda: Brownian([1], (-3,)), "shape"),
        (lambda: Brownian([1], (3,), 1, 1), "interval"),
        (lambda: Brownian([1], (3,), 0, math.nan), "t1"),
        (lambda: Brownian([1], (3,), 0, 1, step=0), "step"),
        (lambda: Brownian([1], (3,), 0, 1, dtype=torch.int64), "dtype"),
        (lambda: Brownian([1], (3,)).increment(0, 1.5), "beyond"),
        (lambda: Brownian([1], (3,)).increment(-0.1, 0.5), "beyond"),
        (lambda: Brownian([1], (3,)).increment(0, math.nan), "beyond"),
        (lambda: Brownian([1, 2], (3,)).increment(torch.zeros(2), torch.full((2,), 1.5)), "beyond"),
        (lambda: Brownian([1, 2], (3,)).increment(torch.zeros(3), torch.ones(3)), "2 seeds"),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(UsageError, match=words):
        make()
