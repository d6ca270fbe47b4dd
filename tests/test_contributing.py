"""What CONTRIBUTING.md shows works: its sampler is as short as it says, runs as it is, and has the order it states."""

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pfode
from pfode.errors import FileError
from pfode.plans.table import Plan
from pfode.samplers import CATALOGUE, Recipe, make_plan
from pfode.samplers.fit.losses import LOSSES
from pfode.samplers.measure.bench import bench
from pfode.samplers.measure.comparison import DISTRIBUTION
from pfode.samplers.measure.problem import Problem
from pfode.scores.beds import bed
from pfode.scores.io.load import READERS
from pfode.scores.training.config import TrainConfig, usual_network
from pfode.scores.training.data import load_data
from pfode.scores.training.levels import LEVELS
from pfode.scores.training.trainer import Trainer
from tests import problems
from tests.samplers.test_orders import measured

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def names() -> Iterator[dict[str, Any]]:
    """What the Python blocks define, run one after another."""
    found: dict[str, Any] = {}
    tables: list[dict[str, Any]] = [LEVELS, LOSSES, DISTRIBUTION, READERS]
    known = [dict(table) for table in tables]
    for block in BLOCKS:
        exec(compile(block, "CONTRIBUTING.md", "exec"), found)
    yield found
    for table, before in zip(tables, known, strict=True):
        table.clear()
        table.update(before)


def test_a_sampler_is_as_short_as_it_says():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert any("Recipe(" in line for line in lines)
    assert len(lines) < 10


def test_it_runs_without_registration(names):
    assert isinstance(names["plan"], Plan)
    assert (names["plan"].nfe, names["plan"].name, names["plan"].meta["chart"]) == (10, "mine", "ddim")
    assert names["x"].shape == (4, 1, 8, 8)
    assert names["x"].abs().max() < 2
    assert "mine" not in CATALOGUE


def test_its_formula_is_the_one_it_names(names):
    """The value of the line at the middle of the step is DPM-Solver++(2M)."""
    process = problems.PROCESSES["EDM"]
    ours, theirs = (make_plan(sampler, process, 9) for sampler in (names["mine"], "dpm++2m"))
    assert (ours.b - theirs.b).abs().max() < 1e-12 * theirs.b.abs().max()
    assert (ours.r - theirs.r).abs().max() < 1e-12


@pytest.mark.parametrize("process", problems.PROCESSES)
@pytest.mark.parametrize("name", ["mine", "theirs"])
def test_it_has_the_order_it_states(names, name, process):
    recipe: Recipe = names[name]
    for chart in recipe.charts:
        found = measured(recipe, process, (32, 64, 128), chart=chart)
        assert all(abs(order - recipe.order) < 0.25 for order in found["exact"]), found
        assert all(order > recipe.order_as_shipped - 0.25 for order in found["shipped"]), found


def test_its_noise_levels_are_those_that_it_names(names):
    """Quantiles of the Laplace distribution, and a network that is trained on them."""
    process = pfode.EDM()
    quantiles = torch.tensor([0.1, 0.3, 0.5, 0.8], dtype=torch.float64)
    found = names["laplace"](process, quantiles, -1.0, 0.5).log()
    density = torch.distributions.Laplace(
        torch.tensor(-1.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    )
    torch.testing.assert_close(found, density.icdf(quantiles))
    try:
        config = TrainConfig(
            usual_network(8, 1, 10, widths=(8, 16)), process.config(), levels="laplace", steps=1, batch=4
        )
        assert [record.step for record in Trainer(config, load_data("digits"), device="cpu").run()] == [1]
    finally:
        del LEVELS["laplace"]


def test_its_loss_has_the_slope_it_says_and_fits(names):
    value, slope = names["LOSSES"]["cauchy"]
    q, h = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64), 1e-6
    torch.testing.assert_close((value(q + h, 2.0, 3.0) - value(q - h, 2.0, 3.0)) / (2 * h), slope(q, 2.0, 3.0))
    sizes: dict[str, Any] = {"n": 16, "active": 16, "check": 16, "teacher": 8, "iterations": 2}
    fitted = pfode.fit_plan(bed("mixture-2"), 3, loss="cauchy", **sizes).meta["fitted"]["validation"]
    assert fitted["rms"] <= fitted["start rms"]


def test_its_metric_is_in_the_results(names, tmp_path):
    mixture = bed("mixture-2")
    problem = Problem("m", mixture, n=20, teacher=16)
    (cell,) = bench([(problem, ["ddim"])], tmp_path, [4])["cells"]
    drawn, truth = problem.run(make_plan("ddim", mixture.process, 4), problem.seeds()), problem.true()
    assert truth is not None
    assert cell["means"] == pytest.approx((drawn.mean(0) - truth.mean(0)).norm().item(), rel=1e-4)


def test_its_solver_solves_and_its_reader_reads(names, tmp_path):
    assert names["decayed"].item() == pytest.approx(math.exp(-1), rel=1e-5)
    (tmp_path / "half.scale").write_bytes(struct.pack("<f", 0.5))
    assert pfode.load(tmp_path / "half.scale").net is not None
    assert pfode.sample(pfode.load(tmp_path / "half.scale"), 2, steps=3).x.shape == (2, 1)
    (tmp_path / "long.scale").write_bytes(bytes(5))
    (tmp_path / "short.scale").write_bytes(bytes(3))
    for name in ("long", "short"):
        with pytest.raises(FileError, match=f"{name}.scale"):
            pfode.load(tmp_path / f"{name}.scale")


@pytest.mark.parametrize("path", re.findall(r"`((?:\w+/)+\w+\.\w+|test_\w+\.py)`", TEXT))
def test_files_it_names_are_there(path):
    assert any((ROOT / folder / path).is_file() for folder in (".", "tests/samplers", "scores/training"))
