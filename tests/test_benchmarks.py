"""Benchmarks: one claim a file, one harness, and every figure beside the command that makes it."""

import argparse
import ast
import importlib.util
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
FILES = sorted(file for file in (ROOT / "benchmarks").glob("*.py") if file.name != "harness.py")
README = (ROOT / "benchmarks" / "README.md").read_text()
MAKERS = ("avatars", "emoji", "figure", "letters", "pictures", "quality")  # write folders, and measure no time


@pytest.fixture(scope="module")
def harness() -> Any:
    spec = importlib.util.spec_from_file_location("harness", ROOT / "benchmarks" / "harness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_says_its_command_and_so_does_the_page(file):
    tree = ast.parse(file.read_text())
    assert re.search(rf"^    python benchmarks/{file.name}", ast.get_docstring(tree) or "", re.MULTILINE)
    assert re.search(rf"^    python benchmarks/{file.name}", README, re.MULTILINE)
    assert re.search(rf"^## .*\b{file.name}", README, re.MULTILINE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_all_share_one_harness(file):
    """Its arguments, its record; no loop of its own over repeats."""
    text = file.read_text()
    names = {node.names[0].name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)}
    assert ("harness" in names) == (file.stem not in MAKERS)
    assert '"--json"' not in text
    assert '"--repeats"' not in text
    assert not re.search(r"for \w+ in range\((?:\w+ \+ )?(?:options\.)?repeats", text)


@pytest.mark.parametrize("command", re.findall(r"^    python (benchmarks/.*)$", README, re.MULTILINE))
def test_commands_of_the_page_name_options_that_there_are(command):
    file, *words = command.split()
    text = (ROOT / file).read_text() + (ROOT / "benchmarks" / "harness.py").read_text()
    for word in words:
        assert not word.startswith("--") or f'"{word}"' in text, word


def test_turns_change_their_order_and_leave_out_the_first(harness):
    order: list[str] = []
    counts = itertools.count()

    def run(name: str) -> int:
        order.append(name)
        return next(counts)

    found = harness.turns({name: lambda name=name: run(name) for name in "ab"}, repeats=3, warm=1)
    assert "".join(order) == "abbaabba"
    assert found == {"a": [3, 4, 7], "b": [2, 5, 6]}
    assert harness.least([{"x": 2.0, "y": 1.0}, {"x": 1.0, "y": 3.0}]) == {"x": 1.0, "y": 1.0}


def test_seconds_are_those_of_the_clock_between_two_waits(harness):
    times, seen = iter([10.0, 12.5]), []
    run = harness.seconds(lambda: seen.append("work"), lambda: next(times), lambda: seen.append("wait"))
    assert run() == 2.5
    assert seen == ["wait", "work", "wait"]


def test_operations_and_reads_are_counted_between_calls(harness):
    x = torch.ones(3)
    with harness.Count() as count:
        for _ in range(3):
            count.called()
            float((x + 1).sum())
    assert count.per_call() == {"operations": 3, "reads": 1}


def test_a_record_says_how_it_was_made(harness, tmp_path):
    options = harness.parser("Doc.", repeats=7).parse_args(["--json", str(tmp_path / "r.json")])
    harness.record(options, {"rows": [1]})
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["rows"] == [1]
    assert found["made"]["options"] == {"repeats": 7}
    assert found["made"]["versions"]["torch"] == torch.__version__
    assert {"machine", "processors", "load", "threads", "benchmark"} <= found["made"].keys()
    harness.record(argparse.Namespace(json=None), {})
