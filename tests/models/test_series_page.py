"""The page docs/series.md and the examples beside it run; here with fewer passes over the data."""

import re
import runpy
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def test_every_block_runs_and_they_are_short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "series.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == len(re.findall(r"^```\w", text, re.MULTILINE)) >= 5
    assert sum(bool(line.strip()) for code in blocks for line in code.splitlines()) < 60
    names: dict[str, object] = {"__name__": "series"}
    for code in blocks:
        line = text[: text.index(code)].count("\n")
        fewer = re.sub(r"epochs=\d+", "epochs=1", code)
        exec(compile("\n" * line + fewer, "docs/series.md", "exec"), names)
    assert (tmp_path / "forecast.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["spirals", "pharmacokinetics"])
def test_an_example_writes_its_picture(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--epochs", "1", "--out", str(tmp_path / "made.png")])
    monkeypatch.syspath_prepend(str(DOCS / "examples"))
    runpy.run_path(str(DOCS / "examples" / f"{name}.py"), run_name="__main__")
    assert (tmp_path / "made.png").read_bytes()[:4] == b"\x89PNG"
    assert "series" in capsys.readouterr().out
