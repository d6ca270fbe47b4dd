"""SECURITY.md: the tests that it names exist, and nothing reaches for the network unasked."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROMISES = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())

WATCH = """
import sys

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("REACHED", event, args[:2], flush=True)
        raise SystemExit(99)

sys.addaudithook(watch)
"""


def watched(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that stops with 99 at the first attempt to reach for a network."""
    command = [sys.executable, "-c", WATCH + code]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300, check=False)


@pytest.mark.parametrize(("file", "name"), PROMISES, ids=[name for _, name in PROMISES])
def test_the_tests_that_hold_the_promises_exist(file, name):
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promise_has_its_tests():
    text = (ROOT / "SECURITY.md").read_text()
    section = text[text.index("## What pfode promises") : text.index("## What it does not promise")]
    for promise in section.split("\n\n**")[1:]:
        assert re.search(r"^- `tests/", promise, re.MULTILINE), promise[:60]


def test_nothing_reaches_for_the_network(tmp_path):
    """A picture, a model, its description, a training run, a solve; and the import of every module there is."""
    done = watched(
        """
import importlib, pkgutil, warnings
warnings.simplefilter("ignore")
import torch
import pfode
from pfode.cli.__main__ import main

for package in ("pfode", "pfode.samplers", "pfode.scores", "pfode.cli"):
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
for words in (
    ["sample", "--model", "digits", "--n", "2", "--steps", "3", "--out", "x.png", "--quiet"],
    ["info", "digits", "--verify"],
    ["train", "--data", "digits", "--steps", "2", "--batch", "4", "--out", "run", "--quiet"],
):
    try:
        main(words)
    except SystemExit as end:
        assert end.code in (0, None), (words, end.code)
pfode.load("digits")
pfode.solve(lambda t, y: -y, torch.ones(2), [0.0, 1.0])
print("DONE")
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "REACHED" not in done.stdout
    assert done.stdout.rstrip().endswith("DONE")


def test_a_name_of_a_hub_does(tmp_path):
    """The watch sees it where it is asked for, so the test above can fail."""
    code = "import os\nos.environ['HF_HOME'] = os.getcwd()\nimport pfode\npfode.load('nobody/nothing-of-this-name')"
    done = watched(code, tmp_path)
    assert "REACHED" in done.stdout, done.stdout + done.stderr
