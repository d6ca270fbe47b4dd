"""sampler="auto" against the table it was read off."""

import json
import math
from pathlib import Path

import pytest

import pfode
from pfode.samplers import auto, make_plan
from tests import problems

TABLE = json.loads((Path(__file__).parents[2] / "benchmarks" / "recipes.json").read_text())
BEDS = {"digits": pfode.EDM(), "digits-vp": pfode.VP(), "digits-flow": pfode.Flow()}


@pytest.mark.parametrize("bed", BEDS)
def test_the_choice_is_near_the_best_of_the_table(bed):
    """In the geometric mean over the budgets within 1.55 times the best of each, and everywhere ahead of DDIM."""
    table = TABLE["beds"][bed]["1"]["table"]
    ratios = []
    for i, nfe in enumerate(TABLE["nfe"]):
        choice = auto.choose(BEDS[bed], nfe)
        mine = table[choice.grid][f"{choice.sampler}@{choice.chart}"][i][0]
        ratios.append(mine / min(row[i][0] for rows in table.values() for row in rows.values()))
        assert mine < min(rows["ddim@ddim"][i][0] for rows in table.values())
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) < 1.55, ratios


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("process", problems.ALL_PROCESSES.values(), ids=problems.ALL_PROCESSES)
def test_every_process_has_a_choice(process, guided):
    for nfe in (1, 5, 6, 20):
        choice = auto.choose(process, nfe, guided)
        plan = make_plan("auto", process, nfe=nfe, guided=guided)
        assert (plan.meta["sampler"], plan.meta["grid"], plan.meta["chart"]) == choice


def test_what_is_given_stays():
    assert make_plan("auto", pfode.EDM(), 5, grid="time(7)").meta["grid"] == "time(7)"
    assert make_plan("heun", pfode.EDM(), 5).meta["chart"] == "ddim"
    assert make_plan("auto", pfode.EDM(), 5, chart="dpm++").meta["chart"] == "dpm++"
    net = pfode.load("digits")
    guided = pfode.sample(net, 1, nfe=6, label=3, guidance=2.0).plan.meta
    assert (guided["sampler"], guided["chart"]) == ("ipndm2", "trig")
