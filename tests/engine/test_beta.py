"""The beta distribution beside SciPy's, where grids use it."""

import numpy as np
import pytest
import scipy.special

from pfode.beta import beta_cdf, beta_quantile

SHAPES = (0.3, 0.6, 1.0, 2.0, 7.0, 30.0)


@pytest.mark.parametrize("a", SHAPES)
@pytest.mark.parametrize("b", SHAPES)
def test_distribution_and_quantiles_are_scipys(a, b):
    x = np.linspace(0, 1, 101)
    np.testing.assert_allclose(beta_cdf(x, a, b), scipy.special.betainc(a, b, x), rtol=0, atol=5e-14)
    p = np.concatenate([x, [1e-6, 1 - 1e-3]])
    np.testing.assert_allclose(beta_quantile(p, a, b), scipy.special.betaincinv(a, b, p), rtol=2e-12, atol=0)


def test_quantiles_at_the_ends_are_the_ends():
    assert beta_quantile(np.array([0.0, 1.0]), 0.6, 0.6).tolist() == [0.0, 1.0]
    assert beta_quantile(np.array([0.5]), 3.0, 3.0) == pytest.approx(0.5, abs=1e-15)


def test_newtons_method_ends_soon(monkeypatch):
    calls = []
    monkeypatch.setattr("pfode.beta.beta_cdf", lambda *at: calls.append(at) or beta_cdf(*at))
    for a, b in ((0.6, 0.6), (0.3, 30.0), (30.0, 0.3), (1.0, 1.0)):
        calls.clear()
        beta_quantile(np.linspace(0, 1, 21), a, b)
        assert len(calls) <= 30
