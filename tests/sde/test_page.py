"""The page docs/sde.md runs, from its first block to its last."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "sde.md"


def test_the_page_runs():
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    exec("\n".join(blocks), names)
    assert names["paths"].shape == (3, 256, 1)
    assert "spark" in names["names"]
    assert names["size"].grad is not None
    assert (names["fine"].ys[-1] - names["coarse"].ys[-1]).abs().max() < 0.05
