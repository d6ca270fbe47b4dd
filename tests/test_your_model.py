"""The page docs/your_model.md runs, from its first block to its last."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "your_model.md"


def test_every_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == len(re.findall(r"^```\w", text, re.MULTILINE)) >= 7
    names: dict[str, object] = {"__name__": "your_model"}
    for code in blocks:
        line = text[: text.index(code)].count("\n")
        exec(compile("\n" * line + code, str(PAGE), "exec"), names)
    assert names["points"] is not None


def test_three_lines():
    """Import, denoiser, samples."""
    block = re.findall(r"^```python\nimport pfode\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
    assert len([line for line in block.splitlines() if line]) == 2
