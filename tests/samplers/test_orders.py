"""Convergence orders, measured: slope of the last two doublings in float64 on beds with known solutions."""

import math

import pytest
import torch

from pfode import iterate, run
from pfode.chart import CHARTS
from pfode.samplers import CATALOGUE, make_plan
from tests import problems

DETERMINISTIC = [name for name, recipe in CATALOGUE.items() if not recipe.stochastic]
CEILING, FLOOR = 1e-3, 1e-10
FINEST = 1024


def slope(name: str, bed: str, process: str, exact_start: bool) -> float:
    """log2 of the error's fall per doubling, over the last two doublings whose errors lie between floor and ceiling."""
    denoiser, times, states = problems.finest(bed, process, FINEST)
    errors = []
    counts = (256, 512, 1024) if CATALOGUE[name].order == 1 else (16, 32, 64, 128, 256, 512)
    for n in counts:
        stride = FINEST // n
        plan = make_plan(name, denoiser.process, grid=times[::stride])
        if exact_start:
            x = run_from_exact(plan, denoiser, states[::stride], CATALOGUE[name].method.order)
        else:
            x = run(plan, denoiser, states[0])
        errors.append(problems.rms(x, states[-1]))
    usable = [e for e in errors if FLOOR < e < CEILING]
    assert len(usable) >= 3, errors
    assert usable == sorted(usable, reverse=True), errors
    return math.log2(usable[-3] / usable[-1]) / 2


def run_from_exact(plan, denoiser, states, order):
    """Run a plan with its first `order - 1` nodes replaced by the exact solution."""
    points, x, sent = iterate(plan, denoiser, states[0]), states[0], None
    for _ in range(plan.steps):
        step, _, _, x, _, _ = points.send(sent)
        sent = states[step] if step < order else None
    return x


@pytest.mark.parametrize("process", problems.PROCESSES)
@pytest.mark.parametrize("bed", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order(name, bed, process):
    recipe = CATALOGUE[name]
    assert slope(name, bed, process, exact_start=True) == pytest.approx(recipe.order, abs=0.25)
    assert slope(name, bed, process, exact_start=False) > recipe.order_as_shipped - 0.25


@pytest.mark.parametrize("process", problems.PROCESSES)
@pytest.mark.parametrize("name", ["heun", "exp-ab2", "ipndm2"])
@pytest.mark.parametrize("chart", CHARTS)
def test_all_charts_converge_to_the_same_end(chart, name, process):
    denoiser, times, states = problems.finest("mixture", process, FINEST)
    errors = []
    for n in (64, 128):
        plan = make_plan(name, denoiser.process, grid=times[:: FINEST // n], chart=chart)
        errors.append(problems.rms(run(plan, denoiser, states[0]), states[-1]))
    assert errors[1] < 2e-3
    assert math.log2(errors[0] / errors[1]) > 1.7


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_plans_count_their_calls(name):
    calls = []
    denoiser = problems.gaussian(problems.PROCESSES["EDM"])

    class Counting:
        process = denoiser.process

        def __call__(self, x, t, **cond):
            calls.append(t)
            return denoiser(x, t)

    plan = make_plan(name, denoiser.process, 7)
    run(plan, Counting(), torch.randn(2, 3))
    assert len(calls) == plan.nfe
    assert plan.nfe == (13 if name == "heun" else 7)
    assert plan.steps == 7
