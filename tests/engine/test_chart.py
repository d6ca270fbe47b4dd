"""Predictions and charts: the two tables of the design."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch

import pfode
from pfode.chart import CHARTS, chart
from pfode.prediction import PREDICTIONS, prediction
from tests import problems


@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_invert(name):
    generator = torch.Generator().manual_seed(0)
    alpha, sigma, x, d = torch.rand(4, 50, generator=generator, dtype=torch.float64) + 0.1
    p, q = PREDICTIONS[name].of_x0(alpha, sigma)
    c, e = PREDICTIONS[name].to_x0(alpha, sigma)
    assert torch.allclose(c * x + e * (p * x + q * d), d, rtol=1e-12)


def test_predictions_are_what_they_are_called():
    alpha, sigma, x0, eps = 0.8, 0.6, 1.3, -0.4
    x = alpha * x0 + sigma * eps
    expected = {"x0": x0, "eps": eps, "score": -eps / sigma, "v": alpha * eps - sigma * x0, "flow": eps - x0}
    for name, value in expected.items():
        p, q = PREDICTIONS[name].of_x0(alpha, sigma)
        assert p * x + q * x0 == pytest.approx(value, rel=1e-14)


@pytest.mark.parametrize("process", problems.ALL_PROCESSES.values(), ids=problems.ALL_PROCESSES)
@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_an_exact_change_of_coordinates(name, process):
    """d(x/m) = w(u) n du along the exact flow of a Gaussian, over a short interval."""
    denoiser = problems.gaussian(process)
    table = chart(name)
    t = process.time(-2 * math.log(0.9))
    if isinstance(process, pfode.VPDiscrete):
        t = math.floor(t) + 0.5  # within a linear piece
    h = 1e-5 * t
    x = problems.start(denoiser, t)
    before, here, after = table.nodes(process, [t - h, t, t + h])
    z = [denoiser.flow(x, t, node.t) / node.m for node in (before, after)]
    p, q = prediction(table.prediction).of_x0(here.alpha, here.sigma)
    n = p * x + q * denoiser(x, torch.tensor(t, dtype=torch.float64))
    (width,) = table.integrate(process, [here], before, after)
    assert torch.allclose((z[1] - z[0]) / width, n, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CHARTS)
@pytest.mark.parametrize("process", problems.PROCESSES.values(), ids=problems.PROCESSES)
def test_weights_integrate_polynomials_in_the_clock(name, process):
    """sum_j W_j f(u_j) is the integral of w f for every polynomial the nodes can carry, against a fine trapezoid."""
    table = chart(name)
    times = process.time(torch.tensor([-2.2, -1.5, -1.0, 0.4], dtype=torch.float64)).tolist()
    *known, target = table.nodes(process, times)
    known = known[::-1]
    weights = table.integrate(process, known, known[0], target)
    v = np.linspace(known[0].v, target.v, 40001)
    u = table.clock(process, v)
    for k in range(3):
        if table.density is None:
            exact = (target.u ** (k + 1) - known[0].u ** (k + 1)) / (k + 1)
        else:
            exact = scipy.integrate.trapezoid(table.density(v) * u**k, v)
        assert sum(w * node.u**k for w, node in zip(weights, known, strict=True)) == pytest.approx(exact, rel=1e-8)


def test_exponential_adams_1_and_2_in_closed_form():
    """The phi functions: W_0 = 1 - e^-h, and (h - 1 + e^-h)/h for the slope, in the chart of DPM-Solver++."""
    table, process = chart("dpm++"), pfode.EDM()
    before, here, target = table.nodes(process, [3.0, 1.7, 0.2])
    h, past = target.u - here.u, here.u - before.u
    (one,) = table.integrate(process, [here], here, target)
    assert target.m * one == pytest.approx(-math.expm1(-h), rel=1e-15)
    w = table.integrate(process, [here, before], here, target)
    slope = (h + math.expm1(-h)) / past
    assert target.m * w[1] == pytest.approx(-slope, rel=1e-13)
    assert sum(w) == pytest.approx(one, rel=1e-14)
