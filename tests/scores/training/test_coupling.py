"""Couplings: optimal, every point once, labels kept."""

import itertools
import math
import sys

import pytest
import torch

from pfode.errors import MissingError, UsageError
from pfode.scores.training.coupling import (
    COUPLINGS,
    Assignment,
    Entropic,
    Independent,
    assignment,
    costs,
    coupling,
    described,
)


def normal(n: int, d: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_an_assignment_is_the_best_of_all(n):
    for seed in range(5):
        cost = costs(normal(n, 3, seed), 2 * normal(n, 3, seed + 50))
        best = min(sum(float(cost[i, p]) for i, p in enumerate(order)) for order in itertools.permutations(range(n)))
        found = assignment(cost)
        assert sorted(found.tolist()) == list(range(n))
        assert float(cost[torch.arange(n), found].sum()) == pytest.approx(best, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_an_assignment_costs_what_scipys_does(scale):
    from scipy.optimize import linear_sum_assignment

    cost = scale * costs(normal(256, 2, 1), 5 * normal(256, 2, 2) + 3)
    rows, columns = linear_sum_assignment(cost.numpy())
    assert float(cost[torch.arange(256), assignment(cost)].sum()) == pytest.approx(
        float(cost[rows, columns].sum()), rel=1e-12
    )


def test_equal_points_are_no_trouble():
    x = torch.zeros(20, 2)
    assert sorted(assignment(costs(x, x)).tolist()) == list(range(20))


@pytest.mark.parametrize("name", COUPLINGS)
def test_every_point_is_used_once(name):
    x0, x1 = normal(97), normal(97, seed=1) + 2
    order = coupling({"name": name}).order(x0, x1, None, 3)
    assert sorted(order.tolist()) == list(range(97))


def test_a_transport_is_straight():
    """Of a shift, the optimal pairs are those of the shift itself."""
    x0, shuffled = normal(200, 5), torch.randperm(200, generator=torch.Generator().manual_seed(4))
    order = Assignment().order(x0, (x0 + 3)[shuffled], None, 0)
    assert torch.equal(shuffled[order], torch.arange(200))


def test_classes_keep_their_sources():
    x0, x1 = normal(60), normal(60, seed=1)
    label = torch.arange(60) % 3
    order = Assignment(within=True).order(x0, x1, label, 0)
    assert torch.equal(label[order], label)
    assert sorted(order.tolist()) == list(range(60))
    for one in range(3):
        mine = label == one
        alone = Assignment().order(x0[mine], x1[mine], None, 0)
        assert torch.equal(order[mine], mine.nonzero()[:, 0][alone])


def entropic_cost(cost: torch.Tensor, reg: float) -> float:
    """Mean cost of the entropic plan, by Sinkhorn's algorithm in log space."""
    n = len(cost)
    f = g = torch.zeros(n, dtype=torch.float64)
    for _ in range(400):
        f = -torch.logsumexp(g - cost / reg, 1) - math.log(n)
        g = -torch.logsumexp(f[:, None] - cost / reg, 0) - math.log(n)
    plan = (f[:, None] + g - cost / reg).exp()
    assert torch.allclose(plan.sum(1), torch.full((n,), 1 / n, dtype=torch.float64), atol=1e-5)
    return float((plan * cost).sum())


@pytest.mark.parametrize("reg", [0.3, 2.0, 1e6])
def test_entropic_pairs_cost_what_the_entropic_plan_does(reg):
    x0, x1 = normal(256), normal(256, seed=1) + 1
    mean = sum(float((x0 - x1[Entropic(reg).order(x0, x1, None, i)]).square().sum(1).mean()) for i in range(4)) / 4
    assert mean == pytest.approx(entropic_cost(costs(x0, x1), reg), rel=0.05)


def test_entropic_pairs_are_optimal_without_entropy_and_keyed():
    x0, x1 = normal(64), normal(64, seed=1) + 1
    assert torch.equal(Entropic(1e-9).order(x0, x1, None, 0), Assignment().order(x0, x1, None, 0))
    assert torch.equal(Entropic().order(x0, x1, None, 5), Entropic().order(x0, x1, None, 5))
    assert not torch.equal(Entropic().order(x0, x1, None, 5), Entropic().order(x0, x1, None, 6))


def test_permutations_have_their_probabilities():
    """Of three points, all six permutations by their weights exp(-cost / reg)."""
    x0, x1 = normal(3), normal(3, seed=1)
    cost = costs(x0, x1)
    every = list(itertools.permutations(range(3)))
    weights = torch.tensor([math.exp(-sum(float(cost[i, p]) for i, p in enumerate(o)) / 2.0) for o in every])
    drawn = [tuple(Entropic(2.0, 20).order(x0, x1, None, seed).tolist()) for seed in range(2000)]
    for order, weight in zip(every, weights / weights.sum(), strict=True):
        assert drawn.count(order) / 2000 == pytest.approx(float(weight), abs=4 * math.sqrt(0.25 / 2000))


def test_the_order_of_the_batch_does_not_matter():
    x0, x1 = normal(50), normal(50, seed=1)
    order = Assignment().order(x0, x1, None, 0)
    there = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Assignment().order(x0[there], x1, None, 0), order[there])


def test_values_and_their_json():
    for value in (Independent(), Assignment(within=True), Entropic(2.0, 7)):
        assert coupling(described(value)) == value
    for bad in ({"name": "emd"}, {}, {"name": "entropic", "reg": -1.0}, {"name": "entropic", "rag": 1.0}):
        with pytest.raises(UsageError):
            coupling(bad)


def test_what_cannot_be_coupled():
    with pytest.raises(UsageError, match="as many points"):
        costs(normal(3), normal(4))
    with pytest.raises(UsageError, match="not finite"):
        costs(normal(3), normal(3) / 0)
    with pytest.raises(UsageError, match="smaller batch"):
        costs(torch.zeros(9000, 1), torch.zeros(9000, 1))


def test_without_scipy_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingError, match="the coupling 'assignment' needs scipy"):
        assignment(costs(normal(3), normal(3)))
