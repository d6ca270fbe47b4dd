"""Run the command line inside the test process, in an empty folder, with no PFODE_* variables."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pfode.cli.__main__ import main
from pfode.cli.sample import command as sample


class Run(NamedTuple):
    """What a run of the command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """A function from the words of a command line to its Run; `sample` draws with the small network, no class."""
    for option in sample.params:
        if option.name in ("model", "label"):
            monkeypatch.setattr(option, "default", {"model": "digits", "label": "none"}[option.name])
    for name in [name for name in os.environ if name.startswith("PFODE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def run(*words: str | int | Path) -> Run:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main([str(word) for word in words])
        text = capsys.readouterr()
        code = done.value.code
        return Run(code if isinstance(code, int) else 0, text.out, text.err)

    return run


@pytest.fixture
def sheet(cli, tmp_path) -> Path:
    """A sheet of four digits in three steps."""
    assert cli("sample", "--steps", 3, "--n", 4, "--seed", 7, "--out", "first.png").code == 0
    return tmp_path / "first.png"
