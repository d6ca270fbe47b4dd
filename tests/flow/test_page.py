"""The page docs/likelihood.md: its code runs, its commands parse."""

import re
import shlex
from pathlib import Path
from typing import Any

from pfode.cli.options import find_command

PAGE = (Path(__file__).parents[2] / "docs" / "likelihood.md").read_text()


def test_its_code_runs(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["found"].nats.shape == (2,)
    assert "dequantisation" in capsys.readouterr().out


def test_its_commands_parse():
    lines = re.findall(r"^    (pfode .*)$", PAGE, re.M)
    assert lines
    for line in lines:
        _, name, *words = shlex.split(line)
        find_command(name).make_context(name, words)
