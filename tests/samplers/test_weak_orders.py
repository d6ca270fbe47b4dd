"""Stochastic recipes: mean and covariance propagated through the rows on a Gaussian, and one large run against them."""

import functools
import math
import sys

import numpy as np
import pytest
import torch

import pfode
from pfode import run
from pfode.plans.rows import row_affine
from pfode.plans.table import Plan
from pfode.plans.unrolled import spread
from pfode.process import Process
from pfode.samplers import CATALOGUE, make_plan
from tests import problems
from tests.samplers.measured import agree

STOCHASTIC = [name for name, recipe in CATALOGUE.items() if recipe.stochastic]
STEPS = (128, 256, 512)


MEAN, VARIANCE = np.array([0.3, -0.5, 1.2]), np.array([0.25, 0.64, 0.04])  # of problems.gaussian


def marginal(process: Process, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of x_t per direction."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return MEAN * alpha, VARIANCE * alpha**2 + sigma**2


def propagated(plan: Plan, mean: np.ndarray, var: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the last state, per direction, of x_T ~ N(mean, var): no sampling, float64.

    The rows are linear in (y_k, y_{k-1}, predictions and noises of the window), and on a Gaussian D = offset + gain x.
    """
    window, noises = plan.b.shape[1], plan.c.shape[1]
    size = 2 + window + noises
    p, q = (v.numpy() for v in row_affine(plan.prediction, plan.alpha[:-1], plan.sigma[:-1]))
    alpha, sigma = (level(plan.t).numpy()[:, None] for level in (plan.process.alpha, plan.process.sigma))
    gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    offset = (1 - gain * alpha) * MEAN
    z, cov = np.zeros((3, size)), np.zeros((3, size, size))
    z[:, 0] = plan.init[0].item() * mean
    cov[:, 0, 0] = plan.init[0].item() ** 2 * var + plan.init[1].item() ** 2
    for k, (b, c) in enumerate(zip(plan.b.numpy(), plan.c.numpy(), strict=True)):
        move, shift, fresh = np.zeros((3, size, size)), np.zeros((3, size)), np.zeros(size)
        move[:, 1, 0] = 1.0
        move[:, 2, 0], shift[:, 2] = p[k] + q[k] * gain[k], q[k] * offset[k]
        for j in range(1, window):
            move[:, 2 + j, 1 + j] = 1.0
        for j in range(1, noises):
            move[:, 2 + window + j, 1 + window + j] = 1.0
        if noises:
            fresh[2 + window] = 1.0
        factors = np.array([0.0, 0.0, *b, *c])
        move[:, 0] = factors @ move
        move[:, 0, 0] += plan.r[k].item()
        move[:, 0, 1] += plan.r_prev[k].item()
        shift[:, 0], fresh[0] = shift @ factors, fresh @ factors
        z = np.einsum("dij,dj->di", move, z) + shift
        cov = move @ cov @ move.transpose(0, 2, 1) + np.outer(fresh, fresh)
    return z[:, 0], cov[:, 0, 0]


@functools.cache
def weak_slope(name: str, process: str) -> float:
    """log2 of the fall per doubling of the error in mean and variance, between two interior times."""
    times = problems.interior_grid(problems.PROCESSES[process], STEPS[-1])
    errors = []
    for n in STEPS:
        plan = make_plan(name, problems.PROCESSES[process], grid=times[:: STEPS[-1] // n])
        mean, var = propagated(plan, *marginal(plan.process, times[0]))
        true_mean, true_var = marginal(plan.process, times[-1])
        errors.append(max(np.abs(mean - true_mean).max(), np.abs(var - true_var).max()))
    assert errors == sorted(errors, reverse=True), errors
    return math.log2(errors[0] / errors[-1]) / 2


CONVERGENT = [name for name in STOCHASTIC if CATALOGUE[name].order]  # the others have a step of their own to refine


@pytest.mark.parametrize("process", problems.PROCESSES)
@pytest.mark.parametrize("name", CONVERGENT)
def test_weak_order(name, process):
    assert weak_slope(name, process) == pytest.approx(CATALOGUE[name].order, abs=0.25)


def test_measured_weak_orders_are_recorded():
    for name in CONVERGENT:
        agree(name, "weak", min(weak_slope(name, process) for process in problems.PROCESSES))


class Many:
    """The Gaussian on samples of shape (each, 3): every row of them is one."""

    process = pfode.EDM()
    one = problems.gaussian(process)

    def __call__(self, x, t, **cond):
        return self.one(x.reshape(-1, 3), t).reshape(x.shape)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_large_run_has_the_propagated_moments(name):
    plan = make_plan(name, pfode.EDM(), 6)
    seeds, each = range(200), 1000  # a sample of shape (1000, 3) is a thousand samples
    x = plan.first[2] * torch.from_numpy(np.random.default_rng(3).standard_normal((len(seeds), each, 3)))
    end = run(plan, Many(), x, seeds=seeds).reshape(-1, 3).numpy()
    mean, var = propagated(plan, np.zeros(3), np.full(3, plan.first[2].item() ** 2))
    assert np.all(np.abs(end.mean(0) - mean) < 4 * np.sqrt(var / len(end)))
    assert np.all(np.abs(end.var(0) - var) < 4 * var * math.sqrt(2 / len(end)))


@pytest.mark.parametrize("name", ["heun", "dpm2-a", "pndm", "sa-solver", "dpm++3m-sde", "unipc3", "bdia"])
def test_the_spread_of_a_plan_is_that_of_its_propagated_moments(name, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "MEAN", np.zeros(3))
    process = pfode.VP()
    plan = make_plan(name, process, nfe=6)
    begun = plan.first[1].item() ** 2 * VARIANCE + plan.first[2].item() ** 2
    ends = propagated(plan, np.zeros(3), begun)[1] / (
        plan.alpha[-1].item() ** 2 * VARIANCE + plan.sigma[-1].item() ** 2
    )
    for variance, ratio in zip(np.broadcast_to(VARIANCE, 3), ends, strict=True):
        assert spread(plan, math.sqrt(variance)) == pytest.approx(math.sqrt(ratio), rel=1e-9)


@pytest.mark.parametrize("process", problems.PROCESSES)
def test_langevin_steps_leave_the_law_as_their_size_says(process):
    """At one level, of a Gaussian of variance V: x <- (1 - h/V) x + sqrt(2h) xi, whose variance is V / (1 - h/2V)."""
    noise = problems.PROCESSES[process]
    t = problems.interior_grid(noise, 4)[2]
    errors = []
    for size in (0.2, 0.1, 0.05):
        plan = make_plan("langevin", noise, grid=[t, 0.999999 * t], size=size, rounds=400)
        mean, var = propagated(plan, *marginal(noise, t))
        true_mean, true_var = marginal(noise, 0.999999 * t)
        h = size * noise.sigma(t) ** 2
        assert mean == pytest.approx(true_mean, rel=1e-4, abs=1e-5)
        assert var == pytest.approx(true_var / (1 - 0.5 * h / true_var), rel=1e-4)
        errors.append(np.abs(var - true_var).max())
    assert errors[0] > 1.8 * errors[1] > 3.2 * errors[2]


def test_annealed_langevin_follows_the_levels():
    process = pfode.EDM()
    errors = []
    for rounds in (10, 50, 250):
        plan = make_plan("langevin", process, 20, rounds=rounds, size=0.05)
        mean, var = propagated(plan, np.zeros(3), np.full(3, plan.first[2].item() ** 2))
        errors.append(max(np.abs(mean - MEAN).max(), np.abs(var / VARIANCE - 1).max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.15
