"""What the README shows works: its Python runs, its commands succeed, its table is the one of the code."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pfode import errors
from pfode.cli.__main__ import main
from pfode.files import read_header
from pfode.scores.shipped import shipped

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("block", blocks("sh"))
def test_commands_succeed(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [line for line in block.splitlines() if line.startswith("pfode ")]
    assert lines
    for line in lines:
        with pytest.raises(SystemExit) as done:
            main(shlex.split(line, comments=True)[1:])
        assert done.value.code == 0, f"{line}\n{capsys.readouterr().err}"


def test_there_are_blocks():
    assert blocks("python")
    assert blocks("sh")


def test_exit_codes_are_all_there():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PfodeError)]
    stated = re.findall(r"^\| ([\d, ]+) \|", README, re.MULTILINE)
    assert {str(kind.code) for kind in kinds} <= set(stated)


@pytest.mark.parametrize("name", re.findall(r"!\[[^]]*\]\(([^):]+)\)", README))
def test_pictures_are_what_the_shipped_network_draws(name, tmp_path, capsys):
    picture = ROOT / name
    with Image.open(picture) as image:
        made = image.info.get("made")
    if made is not None:  # by a script too slow for a test: by this network at least
        script, model, digest = re.fullmatch(r"(\S+), (\S+) (\S+)", made).groups()  # type: ignore[union-attr]
        assert (ROOT / script).is_file()
        assert digest == read_header(shipped()[model]).metadata["pfode.digest"]
        return
    with pytest.raises(SystemExit) as done:
        main(["sample", "--like", str(picture), "--out", str(tmp_path / "again.png")])
    assert done.value.code == 0, capsys.readouterr().err
    shown, drawn = (np.asarray(Image.open(path), int) for path in (picture, tmp_path / "again.png"))
    assert np.abs(shown - drawn).max() <= 2  # another processor may round otherwise
