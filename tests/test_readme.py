"""What the README shows works: its Python runs, its commands succeed, its table is the one of the code; and the
commands and lines of the pages beside it are what they say."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pfode
from pfode import errors
from pfode.cli.__main__ import main
from pfode.cli.options import COMMANDS, find_command
from pfode.header import read_header
from pfode.scores.io.shipped import shipped

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/samplers.md",
    "docs/networks.md",
    "docs/pipelines.md",
    "docs/text_to_image.md",
    "docs/your_model.md",
)


def indented(name: str) -> list[str]:
    """The lines of a page's indented blocks."""
    return re.findall(r"^    (.*)$", re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.M | re.S), re.M)


def shown() -> list[tuple[str, str]]:
    """Every command that a page shows, with the lines it goes on."""
    text = {name: (ROOT / name).read_text().replace("\\\n", "") for name in (*PAGES, "benchmarks/README.md")}
    known = "|".join(COMMANDS)
    return [(name, line) for name in text for line in re.findall(rf"^ *(pfode (?:{known})\b.*)$", text[name], re.M)]


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


@pytest.mark.parametrize(("page", "line"), shown())
def test_every_command_is_one_and_takes_its_options(page, line):
    """Those that take long, too, as far as they are read."""
    name, *words = shlex.split(line.split(" > ")[0], comments=True)[1:]
    find_command(name).make_context(name, words)


def test_lines_for_pipelines_are_those_of_their_page():
    """Which runs, in tests/samplers/adapters/test_pipelines.py."""
    (section,) = re.findall(r"^## In your pipelines\n(.*?)^## ", README, re.M | re.S)
    lines = re.findall(r"^    (.*)$", section, re.M)
    assert len(lines) == 2
    page = (ROOT / "docs/pipelines.md").read_text()
    assert all(re.search(rf"^{re.escape(line)}( +#|$)", page, re.M) for line in lines)


def test_lines_of_the_samplers_page_run():
    lines = [line for line in indented("docs/samplers.md") if not line.startswith("pfode ")]
    assert len(lines) >= 3
    exec("\n".join(lines), {"pfode": pfode, "net": pfode.load("digits")})


def test_blocks_of_the_text_to_image_page_run():
    found = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/text_to_image.md").read_text(), re.M | re.S)
    assert len(found) == 1
    exec(found[0], {})


def test_the_block_of_the_networks_page_runs():
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/networks.md").read_text(), re.M | re.S)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["word"].shape == found["again"].shape == (5, 1, 32, 32)


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
        made, moves = image.info.get("made"), getattr(image, "is_animated", False)
    if moves:  # its format has no place for the text
        assert picture.name in (ROOT / "benchmarks" / "pictures.py").read_text()
        return
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
