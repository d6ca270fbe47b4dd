"""Tableaus: rooted trees, order conditions, and dense output derived from them."""

import numpy as np
import pytest

from pfode import tableau
from pfode.errors import UsageError
from pfode.ode import Tableau
from pfode.ode.methods import tables
from pfode.samplers import catalogue
from pfode.samplers.methods import RungeKutta
from pfode.tableau import elementary, gamma, order_of, trees


def test_numbers_and_densities_of_trees():
    assert [len(trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]  # A000081
    tall = ((((),),),)  # the path of four nodes
    bushy = ((), (), ())
    assert (gamma(tall), gamma(bushy)) == (24, 4)
    assert sum(1 / gamma(tree) for tree in trees(3)) == pytest.approx(1 / 3 + 1 / 6)


@pytest.mark.parametrize("tableau", tables.EXPLICIT, ids=lambda t: t.name)
def test_order_is_exactly_as_claimed(tableau):
    b = np.array(tableau.b)
    assert order_of(tableau.matrix, b, tableau.order + 1) == tableau.order
    if len(tableau.error):
        assert order_of(tableau.matrix, b - np.array(tableau.error), tableau.embedded + 1) == tableau.embedded


@pytest.mark.parametrize("tableau", tables.EXPLICIT, ids=lambda t: t.name)
def test_dense_output_satisfies_its_order_conditions(tableau):
    ext, s = tableau.extension, tableau.stages
    a = np.zeros((len(ext.p), len(ext.p)))
    a[:s, :s] = tableau.matrix
    for i, row in enumerate(ext.a):
        a[s + i, : len(row)] = row
    powers = np.linspace(0, 1, 9)[:, None] ** np.arange(1, ext.p.shape[1] + 1)
    assert ext.order >= max(tableau.order - 1, 1)
    for n in range(1, ext.order + 1):
        for tree, phi in elementary(a, n)[-len(trees(n)) :]:
            wrong = powers @ ext.p.T @ phi - np.linspace(0, 1, 9) ** n / gamma(tree)
            assert abs(wrong).max() < 1e-11
    end = np.append(tableau.b, np.zeros(len(ext.a)))
    assert abs(ext.p.sum(1) - end).max() < 1e-9
    assert abs(powers @ ext.p.T).sum(1).max() < 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": [[], [1 / 2], [1e-6, 1 / 2 - 1e-6], [0, 0, 1]]}, "b has order 2, not 4"),
        ({"b": [1 / 6, 1 / 3, 1 / 3, 1 / 5]}, "b has order 0, not 4"),
        ({"c": [0, 1 / 2, 1 / 2, 0.9]}, "do not sum to c"),
        ({"error": [0.1, -0.1, 0, 0], "embedded": 2}, "b - error has order 1, not 2"),
    ],
)
def test_a_wrong_digit_is_refused(change, message):
    rk4 = {"name": "rk4", "order": 4, "a": tables.RK4.a, "b": tables.RK4.b}
    with pytest.raises(UsageError, match=message):
        Tableau(**{**rk4, **change})


def test_samplers_and_solvers_step_the_same_tableaus():
    assert tables.RK4 is tableau.RK4
    method = catalogue.recipe("rk4").method
    assert isinstance(method, RungeKutta)
    assert method.tableau is tableau.RK4
    assert tableau.HEUN3.rows == ((1 / 3,), (0.0, 2 / 3), (1 / 4, 0.0, 3 / 4))
