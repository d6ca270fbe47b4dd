"""Who may import whom, and what an import may cost."""

import ast
import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pfode.cli.options import COMMANDS

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
    if room == "pfode":  # its front doors name what lies in the rooms, lazily, and start the command
        files = [f for f in files if f.relative_to(ROOT).parts[1] not in {*ROOMS, "__init__.py", "__main__.py"}]
    assert files
    for file in files:
        extra = imported_rooms(file.read_text()) - MAY_IMPORT[room] - {room}
        assert not extra, f"{file.relative_to(ROOT)} imports {extra}"


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import pfode.samplers", {"samplers"}),
        ("from pfode import scores", {"scores"}),
        ("from pfode.cli.streams import output", {"cli"}),
        ("def f():\n    import pfode\n    return pfode.make_plan", {"samplers"}),
        ("from pfode import load, Plan", {"scores"}),
        ("import scores", {"scores"}),
        ("from pfode.plans.table import Plan", set()),
    ],
)
def test_the_layer_test_sees_violations(source, rooms):
    assert imported_rooms(source) == rooms


def modules() -> dict[str, Path]:
    """The files of the package by the names under which they are imported."""
    found = {}
    for room in MAY_IMPORT:
        for file in sorted((ROOT / room).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            if room == "pfode" and parts[1] in ROOMS:
                continue
            name = ".".join(parts if room == "pfode" else ("pfode", *parts))
            found[name.removesuffix(".__init__")] = file
    return found


def imported_modules(source: str, known: set[str]) -> set[str]:
    """The modules of the package that a file imports, those imported inside functions too; not those of annotations."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body.clear()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in known else node.module)
    return found & known


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The sets of nodes that reach one another (strongly connected components of more than one node, and loops)."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            for node in graph.get(ahead.pop(), set()) - seen:
                seen.add(node)
                ahead.append(node)
        return seen

    reach = {node: reached(node) for node in graph}
    return {
        frozenset({node} | {other for other in reach[node] if node in reach[other]})
        for node in graph
        if node in reach[node]
    }


def test_the_circle_test_sees_circles():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}, "e": {"a"}}
    assert circles(graph) == {frozenset("bc"), frozenset("d")}
    known = {"pfode.x", "pfode.y", "pfode.y.z"}
    source = "from pfode import x\ndef f():\n    from pfode.y import z\nif TYPE_CHECKING:\n    import pfode.y\n"
    assert imported_modules(source, known) == {"pfode.x", "pfode.y.z"}


def test_no_file_imports_in_a_circle():
    """Packages' `__init__` files are their front doors: they name what lies inside, lazily, and do not count."""
    files = modules()
    inner = {name for name, file in files.items() if file.name != "__init__.py"}
    graph = {name: imported_modules(files[name].read_text(), inner) - {name} for name in inner}
    assert sum(map(len, graph.values())) > len(graph), "the graph has no edges worth the name"
    assert circles(graph) == set()


def loaded(code: str, cwd: Path = ROOT) -> set[str]:
    """Top-level modules after running code in a fresh interpreter."""
    tail = "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    run = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, cwd=cwd, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_import_pfode_is_light():
    everything = "import pfode\nfor name in {*dir(pfode)} - {'PFODEScheduler'}: getattr(pfode, name)"
    assert not loaded("import pfode") & {"torch", "numpy", *HEAVY}
    assert not loaded(everything) & set(HEAVY)
    assert "diffusers" in loaded("import pfode; pfode.PFODEScheduler")  # whose classes it builds on


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
def test_first_answers_load_little(words, tmp_path):
    """click and the standard library alone, twice as many modules as click itself at most: benchmarks/latency.py."""
    tail = "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"

    def modules_of(code: str) -> set[str]:
        run = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, cwd=ROOT, check=True)
        return set(json.loads(run.stdout.splitlines()[-1]))

    theirs, ours = modules_of("import click"), modules_of(command(words))
    assert len(ours) <= 2 * len(theirs)
    assert {name.split(".")[0] for name in ours - theirs} - sys.stdlib_module_names <= {"pfode", "click"}


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_are_no_packages_of_their_own(room):
    run = subprocess.run([sys.executable, "-c", f"import {room}"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode != 0
    assert f"import pfode.{room}" in run.stderr


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_the_link_leads_to_the_room(room):
    """Editors and type checkers need pfode/<room> to be the folder; a checkout without symbolic links has a file."""
    link = ROOT / "pfode" / room
    remedy = "git config core.symlinks true, then git checkout -- pfode (on Windows in developer mode)"
    assert link.is_symlink(), f"pfode/{room} is a text file, not a link: {remedy}"
    assert os.readlink(link).replace(os.sep, "/") == f"../{room}"


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


def test_the_wheel_has_every_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name for name, file in modules().items() if file.name == "__init__.py"}
    folders = {name.rpartition(".")[0] for name, file in modules().items() if file.name != "__init__.py"}
    assert set(project["tool"]["setuptools"]["packages"]) == packages
    assert folders == packages
