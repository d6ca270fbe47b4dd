"""`pfode samplers`: the tables, one sampler in full, the page in docs/."""

import io
import itertools
import re
from pathlib import Path

import pytest

import pfode
from pfode.chart import CHARTS
from pfode.cli import page, samplers
from pfode.grids import GRIDS
from pfode.samplers import ADAPTIVE, CATALOGUE

DOCS = Path(__file__).parents[2] / "docs"


def test_table(cli):
    """A group is a heading and its rows; the columns are in line."""
    lines = cli("samplers").out.splitlines()
    heads = [i for i, line in enumerate(lines) if " order " in line]
    assert [lines[i].split("  ")[0] for i in heads] == [*samplers.GROUPS, "adaptive"]
    names = [line.split()[0] for i, line in enumerate(lines) if line and i not in heads]
    assert names[-len(ADAPTIVE) :] == [*ADAPTIVE]
    names = names[: -len(ADAPTIVE)]
    assert sorted(names) == sorted(CATALOGUE)
    assert {line.index(" order ") for line in lines if " order " in line} == {lines[0].index(" order ")}
    stochastic = names[-sum(recipe.stochastic for recipe in CATALOGUE.values()) :]
    assert {name for name in CATALOGUE if CATALOGUE[name].stochastic} == set(stochastic)
    (row,) = (line for line in lines if line.startswith("exp-ab4 "))
    assert row.split()[1:3] == ["4", "(2)"]
    assert float(row.split()[3]) == CATALOGUE["exp-ab4"].measured["exact"]
    assert "dpm++ or any" in row


def test_table_as_json(cli):
    entries = {entry["name"]: entry for entry in cli("samplers", "--json").json}
    assert set(entries) == {*CATALOGUE, *ADAPTIVE}
    assert (entries["rk45"]["adaptive"], entries["rk45"]["options"]) == (True, {"rtol": 1e-3, "atol": 1e-3})
    assert cli("samplers", "rk45", "--json").json == entries["rk45"]
    assert (entries["heun"]["order"], entries["heun"]["measured"]) == (2, CATALOGUE["heun"].measured)
    assert (entries["ddpm"]["stochastic"], entries["ddpm"]["options"]) == (True, {"eta": 1.0})
    assert cli("samplers", "ddpm", "--json").json == entries["ddpm"]


def test_lines_end_at_the_edge_of_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    whole = samplers._listing().splitlines()
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "70")
    cut = samplers._listing().splitlines()
    assert max(map(len, whole)) > max(map(len, cut)) == 70
    assert all(a == b or (b.endswith("…") and a.startswith(b[:-1])) for a, b in zip(whole, cut, strict=True))


@pytest.mark.parametrize("name", CATALOGUE)
def test_one_in_full(cli, name):
    """It says what can be set in words that can be typed."""
    lines = dict(line.split(maxsplit=1) for line in cli("samplers", name).out.splitlines() if "  " in line)
    assert lines["source"] == CATALOGUE[name].source
    options = [] if lines["options"] == "none" else lines["options"].split()
    assert len(options) == 2 * len(CATALOGUE[name].method.options)
    if options:
        assert cli("sample", "--n", 1, "--steps", 2, "--sampler", name, *options, "--quiet").code == 0


@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_adaptive_one_in_full(cli, name):
    lines = dict(line.split(maxsplit=1) for line in cli("samplers", name).out.splitlines() if "  " in line)
    assert lines["source"] == ADAPTIVE[name].source
    words = lines["options"].split(";")[0].split()
    assert words[::2] == ["--rtol", "--atol"]
    assert cli("sample", "--n", 1, "--sampler", name, "--rtol", 0.1, "--quiet").code == 0


def test_what_auto_takes(cli):
    rows = cli("samplers", "auto", "--json").json
    assert [line.split()[:2] for line in cli("samplers", "auto").out.splitlines()[1:]] == [
        [row["process"], row["guidance"]] for row in rows
    ]
    (row,) = (row for row in rows if (row["process"], row["guidance"], row["NFE"]) == ("EDM", "no", "16 on"))
    plan = pfode.make_plan("auto", pfode.EDM(), 20)
    assert (row["sampler"], row["grid"], row["chart"]) == (plan.name, plan.meta["grid"], plan.meta["chart"])


def test_the_page_is_the_one_in_docs(cli):
    """If not: pfode samplers --markdown > docs/samplers.md."""
    assert cli("samplers", "--markdown").out == (DOCS / "samplers.md").read_text()


def test_the_page_is_complete():
    text = page.page()
    for name in (*CATALOGUE, *ADAPTIVE, *CHARTS, *GRIDS):
        assert f"\n| `{name}` |" in text
    assert list(page.CHARTS) == list(CHARTS)
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| `")}
    assert widths == {7, 5, 2}
    (section,) = re.findall(r"^## What auto takes\n(.*)", text, re.MULTILINE | re.DOTALL)
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    pairs = [("VP", pfode.VP()), ("VP", pfode.SubVP()), ("VP", pfode.VPCosine())]
    pairs += [("EDM", pfode.EDM()), ("EDM", pfode.VE()), ("Flow", pfode.Flow())]
    for (name, process), guided in itertools.product(pairs, ("no", "yes")):
        some = [row for row in rows if row[:2] == [name, guided]]
        for nfe in (1, 5, 10, 20, 50):
            last = [row for row in some if int(row[2].split()[0]) <= nfe][-1]
            plan = pfode.make_plan("auto", process, nfe=nfe, guided=guided == "yes")
            assert last[3:] == [f"`{plan.name}`", f"`{plan.meta['grid']}`", plan.meta["chart"]]


def test_a_recipe_that_was_not_measured_yet():
    mine = CATALOGUE["exp-ab4"].__class__(**{**vars(CATALOGUE["exp-ab4"]), "name": "mine"})
    assert mine.measured == {}
    assert samplers.figures(mine)[1:3] == ["4 (2)", "- (-)"]
