"""The pages on flows, objectives and energies: their blocks run, in order, and say what the page says."""

import re
from pathlib import Path
from typing import Any

import pytest

from pfode.scores.training.interpolants import INTERPOLANTS

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> dict[str, Any]:
    """The names that the blocks of a page leave behind."""
    names: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S):
        exec(compile(code, page, "exec"), names)
    return names


def test_flows():
    found = blocks("flows.md")
    assert found["density"].shape == (256,)
    assert found["samples"].shape == (8, 2)
    assert (found["back"] - found["x1"]).abs().max() < 0.2
    assert found["log_p"].isfinite().all()
    assert found["excess"] == pytest.approx(0, abs=0.4)


def test_objectives():
    try:
        found = blocks("objectives.md")
    finally:
        INTERPOLANTS.pop("quadratic", None)
    assert len(found["losses"]) == 10
    assert found["value"].interpolant == "quadratic"


def test_energies():
    found = blocks("energies.md")
    assert found["samples"].isfinite().all()
    assert found["ratio"].shape == (1,)
    assert found["chain"].accepted.mean() > 0.7
