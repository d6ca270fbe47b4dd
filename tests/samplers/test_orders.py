"""Convergence orders, measured: slope of the last two doublings in float64 on beds with known solutions.

`samplers/measured.json` holds what is measured here; `PFODE_MEASURE=1 python -m pytest tests/samplers/test_orders.py
tests/samplers/test_weak_orders.py` writes it anew, and then `pfode samplers --markdown > docs/samplers.md` the page.
"""

import functools
import math

import pytest
import torch

import pfode
from pfode import iterate, run
from pfode.chart import CHARTS
from pfode.plans.table import Plan
from pfode.samplers import CATALOGUE, Recipe, make_plan
from pfode.samplers.methods import RungeKutta
from pfode.tableau import Tableau
from tests import problems
from tests.samplers.measured import agree

DETERMINISTIC = [name for name, recipe in CATALOGUE.items() if not recipe.stochastic]
BEDS = ("gaussian", "mixture")
CEILING, FLOOR = 3e-3, 5e-12
FINEST = 512


@functools.cache
def slopes(name: str, process: str) -> dict[str, tuple[float, ...]]:
    """Orders on every bed, started from exact values and as shipped."""
    recipe = CATALOGUE[name]
    options = {"p": 0.5} if name == "edict" else {}  # with p = 0.93 order 1 shows from a thousand steps on
    return measured(recipe, process, (128, 256, 512) if recipe.order == 1 else (16, 32, 64, 128, 256), **options)


def measured(recipe: Recipe, process: str, counts: tuple[int, ...], **options) -> dict[str, tuple[float, ...]]:
    grid = problems.interior_grid(problems.PROCESSES[process], FINEST)
    plans = [make_plan(recipe, problems.PROCESSES[process], grid=grid[:: FINEST // n], **options) for n in counts]
    errors: dict[str, list[list[float]]] = {"exact": [], "shipped": []}
    for bed in BEDS:
        denoiser, _, states = problems.finest(bed, process, FINEST)
        parts = [states[:: FINEST // n] for n in counts]
        pairs = list(zip(plans, parts, strict=True))
        exact = [from_exact(plan, denoiser, part, recipe.method.memory) for plan, part in pairs]
        shipped = [run(plan, denoiser, states[0]) for plan in plans] if recipe.method.memory > 1 else exact
        errors["exact"].append([problems.rms(x, states[-1]) for x in exact])
        errors["shipped"].append([problems.rms(x, states[-1]) for x in shipped])
    return {start: tuple(slope(line) for line in lines) for start, lines in errors.items()}


def slope(errors: list[float]) -> float:
    """log2 of the error's fall per doubling, over the last two doublings whose errors lie between floor and ceiling."""
    usable = [e for e in errors if FLOOR < e < CEILING]
    assert len(usable) >= 3, errors
    assert usable == sorted(usable, reverse=True), errors
    return math.log2(usable[-3] / usable[-1]) / 2


def from_exact(plan: Plan, denoiser, states: list[torch.Tensor], memory: int) -> torch.Tensor:
    """Run a plan with its first `memory` nodes after x_T replaced by the exact solution.

    One fewer are enough for a multistep method; with a corrector it is the last one's whose step has full order.
    """
    points, x, sent = iterate(plan, denoiser, states[0]), states[0], None
    for _ in range(plan.steps):
        point = points.send(sent)
        x, sent = point.x, states[point.step] if point.step <= memory else None
    return x


@pytest.mark.parametrize("process", problems.PROCESSES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order(name, process):
    recipe, found = CATALOGUE[name], slopes(name, process)
    assert all(abs(order - recipe.order) < 0.25 for order in found["exact"]), found
    assert all(order > recipe.order_as_shipped - 0.25 for order in found["shipped"]), found


def test_measured_orders_are_recorded():
    for name in DETERMINISTIC:
        for start in ("exact", "shipped"):
            agree(name, start, min(min(slopes(name, process)[start]) for process in problems.PROCESSES))


@pytest.mark.parametrize("process", problems.PROCESSES)
@pytest.mark.parametrize("name", ["heun", "rk4", "exp-ab2", "ipndm2", "ipndm-v2", "unipc2", "res-2s"])
@pytest.mark.parametrize("chart", CHARTS)
def test_all_charts_converge_to_the_same_end(chart, name, process):
    denoiser, times, states = problems.finest("mixture", process, FINEST)
    errors = []
    for n in (64, 128):
        plan = make_plan(name, denoiser.process, grid=times[:: FINEST // n], chart=chart)
        errors.append(problems.rms(run(plan, denoiser, states[0]), states[-1]))
    assert errors[1] < 2e-3
    assert math.log2(errors[0] / errors[1]) > CATALOGUE[name].order - 0.35


KUTTA_3 = Tableau("kutta3", 3, [[], [0.5], [-1.0, 2.0]], [1 / 6, 2 / 3, 1 / 6])
RALSTON = Tableau("ralston", 2, [[], [2 / 3]], [1 / 4, 3 / 4])


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("classical", [False, True])
@pytest.mark.parametrize(("tableau", "order"), [(KUTTA_3, 3), (RALSTON, 2)], ids=["kutta3", "ralston"])
def test_a_tableau_of_ones_own(tableau, order, classical, chart):
    mine = Recipe("mine", RungeKutta(tableau, classical), tuple(CHARTS), order, order, "here", "a test")
    found = measured(mine, "EDM", (32, 64, 128), chart=chart)
    assert all(o > order - 0.25 for o in found["exact"]), found


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
    per_step = CATALOGUE[name].nfe_per_step
    assert len(calls) == plan.nfe
    assert plan.nfe == (16 if name == "pndm" else 6 * per_step + 1 if per_step > 1 else 7)
    assert plan.steps == 7


@pytest.mark.parametrize("name", ["dpm++3m", "unipc3", "exp-ab4", "sa-solver"])
def test_lower_order_final(name):
    """The last steps look back on 3, 2, 1 predictions."""
    full, lower = (make_plan(name, pfode.EDM(), 9, final="stop", lower_order_final=flag) for flag in (False, True))
    assert torch.equal(full.b[:5], lower.b[:5, : full.b.shape[1]])
    assert (lower.b[-1] != 0).sum() < (full.b[-1] != 0).sum()
    with pytest.raises(pfode.errors.UsageError, match="lower_order_final"):
        make_plan("heun", pfode.EDM(), 9, lower_order_final=True)
