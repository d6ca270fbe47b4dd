"""Who may import whom, and what an import may cost."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pfode.cli.common import COMMANDS

ROOT = Path(__file__).parents[1]
ROOMS = {"samplers", "scores", "cli"}
MAY_IMPORT = {"pfode": set(), "samplers": set(), "scores": set(), "cli": {"samplers", "scores"}}
NAMES_OF_ROOMS = {"make_plan", "sample", "load"}  # reached as pfode.<name>; they live in samplers and scores
HEAVY = ("diffusers", "accelerate", "PIL", "matplotlib", "huggingface_hub")


def imported_rooms(source: str) -> set[str]:
    """The rooms that a module of the package imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pfode":
            names = [f"pfode.{node.attr}"]
        for name in names:
            parts = name.split(".")
            if parts[0] in ROOMS:
                found.add(parts[0])
            elif parts[0] == "pfode" and len(parts) > 1:
                found |= {parts[1]} & ROOMS
                found |= {"samplers" if parts[1] != "load" else "scores"} if parts[1] in NAMES_OF_ROOMS else set()
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_lies_below(room):
    files = sorted((ROOT / room).rglob("*.py"))
    if room == "pfode":  # its front door names what lies in the rooms, lazily
        files = [f for f in files if f.relative_to(ROOT).parts[1] not in {*ROOMS, "__init__.py"}]
    assert files
    for file in files:
        extra = imported_rooms(file.read_text()) - MAY_IMPORT[room] - {room}
        assert not extra, f"{file.relative_to(ROOT)} imports {extra}"


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import pfode.samplers", {"samplers"}),
        ("from pfode import scores", {"scores"}),
        ("from pfode.cli.common import output", {"cli"}),
        ("def f():\n    import pfode\n    return pfode.make_plan", {"samplers"}),
        ("from pfode import load, Plan", {"scores"}),
        ("import scores", {"scores"}),
        ("from pfode.plan import Plan", set()),
    ],
)
def test_the_layer_test_sees_violations(source, rooms):
    assert imported_rooms(source) == rooms


def loaded(code: str, cwd: Path = ROOT) -> set[str]:
    """Top-level modules after running code in a fresh interpreter."""
    tail = "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    run = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, cwd=cwd, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_import_pfode_is_light():
    everything = "import pfode\nfor name in dir(pfode): getattr(pfode, name)"
    assert not loaded("import pfode") & {"torch", "numpy", *HEAVY}
    assert not loaded(everything) & set(HEAVY)


@pytest.mark.parametrize("words", ["--help", "--version", *(f"{name} --help" for name in COMMANDS)])
def test_help_imports_no_torch(words, tmp_path):
    assert not loaded(command(words.split()), tmp_path) & {"torch", "numpy", *HEAVY}


def test_info_of_a_file_imports_no_torch(tmp_path):
    raw = json.dumps({"__metadata__": {}, "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    for words in (["info", "x.safetensors"], ["info", "digits"], ["info", "models"]):
        assert not loaded(command(words), tmp_path) & {"torch", "numpy", *HEAVY}


def command(words: list[str]) -> str:
    """Code that runs `pfode` with these words and expects success."""
    return (
        "from pfode.cli.__main__ import main\n"
        f"try: main({words})\n"
        "except SystemExit as done: assert done.code == 0, done.code"
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["info", "digits"]])
def test_first_answers_are_quick(words):
    """At most four times the processor time of importing click, the best of a few tries."""

    def seconds(code: str) -> float:
        used = []
        for _ in range(5):
            began = os.times()
            subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
            ended = os.times()
            used.append(sum(ended[2:4]) - sum(began[2:4]))
        return min(used)

    assert seconds(command(words)) <= 4 * seconds("import click")


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_are_no_packages_of_their_own(room):
    run = subprocess.run([sys.executable, "-c", f"import {room}"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode != 0
    assert f"import pfode.{room}" in run.stderr


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_the_link_leads_to_the_room(room):
    if os.path.islink(ROOT / "pfode" / room):
        assert os.readlink(ROOT / "pfode" / room) == f"../{room}"


@pytest.mark.parametrize("package", ["pfode", "pfode.samplers", "pfode.scores"])
def test_lazy_names_exist_and_type_checkers_see_the_same(package):
    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert sorted(seen) == module.__dir__()
    for name, home in seen.items():
        assert getattr(module, name) is not None
        assert home == package or hasattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018
