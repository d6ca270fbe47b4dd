"""pfode fit: plans that sample takes, kept when finished, continued when interrupted."""

import shutil
from dataclasses import replace

import pytest
import torch

import pfode
from pfode.plans.table import Plan
from pfode.scores.io import shipped
from tests.held import held

FEW = ("--n", 16, "--active", 16, "--check", 16, "--teacher", 6, "--iterations", 2, "--out", "plans")


@pytest.fixture
def fit(cli):
    return lambda *words: cli("fit", "--model", "digits", *FEW, *words)


def test_there_and_back(fit, cli, tmp_path):
    """Fit two plans, look at one, draw with it; a second call keeps them."""
    run = fit("--nfe", "2,3", "--json")
    assert run.code == 0, run.err
    first, second = run.json["plans"]
    assert (first["nfe"], second["nfe"], first["kept"]) == (2, 3, False)
    assert second["file"] == "plans/digits.plan-3.safetensors"
    assert second["median"] <= second["start median"]
    shown = cli("info", second["file"], "--json").json
    assert shown["kind"] == "plan"
    assert shown["nfe"] == 3
    assert shown["meta"]["fitted"]["model"] == pfode.load("digits").fingerprint
    assert "validation" in cli("info", second["file"]).out
    drawn = cli("sample", "--sampler", second["file"], "--n", 2, "--json")
    assert drawn.code == 0, drawn.err
    assert drawn.json["nfe"] == 3
    assert "another model" not in drawn.err
    again = fit("--nfe", "3", "--json").json["plans"][0]
    assert again == {**second, "kept": True}
    refused = fit("--nfe", "3", "--loss", "l2")
    assert (refused.code, "loss is balanced there, l2 here" in refused.err) == (2, True), refused.err
    for words in (("--start", "heun"), ("--grid", "karras"), ("--chart", "nowhere")):
        refused = fit("--nfe", "3", *words)
        assert (refused.code, "fitted from another start" in refused.err) == (2, True), refused.err
    other = fit("--nfe", "3", "--loss", "l2", "--overwrite", "--json").json["plans"][0]
    assert other["kept"] is False


def test_a_table(fit):
    run = fit("--nfe", "2")
    assert run.code == 0
    assert run.out.splitlines()[0].split()[:2] == ["NFE", "rms"]
    assert "written" in run.err


def test_continues_after_an_interruption(fit, monkeypatch, tmp_path):
    from pfode.samplers.fit.levenberg import Objective

    whole = fit("--nfe", "2").code, Plan.load("plans/digits.plan-2.safetensors")
    shutil.rmtree("plans")
    iterate, calls = Objective.iterate, []

    def interrupted(*arguments):
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyboardInterrupt
        iterate(*arguments)

    monkeypatch.setattr(Objective, "iterate", interrupted)
    assert fit("--nfe", "2").code == 130
    assert not list((tmp_path / "plans").glob("*.safetensors"))
    assert fit("--nfe", "2").code == 0
    assert (whole[0], len(calls)) == (0, 3)
    assert Plan.load("plans/digits.plan-2.safetensors") == whole[1]


def test_a_plan_of_another_model(fit, cli):
    assert fit("--nfe", "2").code == 0
    drawn = cli("sample", "--model", "avatars-small", "--sampler", "plans/digits.plan-2.safetensors", "--n", 1)
    assert drawn.code == 0, drawn.err
    assert drawn.err.count("another model") == 1


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (("--nfe", "two"), 2, "whole numbers"),
        (("--nfe", "0"), 2, "nfe: need an integer"),
        (("--nfe", "3", "--guidance", "1,2,3"), 2, "one or two numbers"),
        (("--nfe", "3", "--label", "eleven"), 2, "unknown label"),
        (("--nfe", "3", "--start", "none.safetensors"), 3, "cannot be read"),
        (("--nfe", "3", "--start", "heun", "--grid", "nowhere"), 2, "unknown grid"),
        (("--nfe", "3", "--out", "taken/plans"), 7, "cannot be made"),
    ],
)
def test_errors(fit, tmp_path, words, code, problem):
    (tmp_path / "taken").touch()
    run = fit(*words)
    assert (run.code, problem in run.err) == (code, True), run.err
    assert "Traceback" not in run.err
    assert "none.safetensors" not in words or not (tmp_path / "plans").exists()


def test_auto_finds_plans_beside_the_model(fit, cli, tmp_path, monkeypatch):
    """A sheet drawn with one is repeated by --like, and not with another plan."""
    shutil.copy(shipped.shipped()["digits"], tmp_path / "mine.safetensors")
    words = ("sample", "--model", "mine.safetensors", "--nfe", 2, "--n", 1, "--out", "sheet.png")
    assert cli("fit", "--model", "mine.safetensors", "--nfe", "2", *FEW).code == 0
    assert "sampler fitted" not in cli(*words).err
    shutil.copy("plans/mine.plan-2.safetensors", tmp_path)
    assert "sampler fitted-2" in cli(*words).err
    assert "sampler fitted" not in cli(*words, "--no-fitted").err
    assert "sampler fitted" not in cli(*words, "--grid", "karras").err
    again = cli("sample", "--like", "sheet.png", "--out", "again.png")
    assert cli(*words).code == 0
    again = cli("sample", "--like", "sheet.png", "--out", "again.png")
    assert "sampler fitted-2" in again.err, again.err
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "sheet.png").read_bytes()
    net = pfode.load("mine.safetensors")
    assert list(net.plans) == [2]
    assert torch.equal(net.plans[2].t, Plan.load("plans/mine.plan-2.safetensors").t)
    shutil.copy("plans/mine.plan-2.safetensors", tmp_path / "mine.plan-4.safetensors")
    assert cli("sample", "--model", "mine.safetensors", "--nfe", 4, "--n", 1).code == 3


def test_a_second_run_in_the_folder_is_told_so(fit, tmp_path):
    (tmp_path / "plans").mkdir()
    with held(tmp_path / "plans"):
        done = fit("--nfe", "2")
    assert (done.code, "another fit is working in it" in done.err) == (2, True), done.err
    assert not list((tmp_path / "plans").iterdir())


def test_a_plan_that_no_fit_wrote_is_not_kept(fit, tmp_path):
    (tmp_path / "plans").mkdir()
    plan = pfode.make_plan("ddim", pfode.EDM(), 2)
    for fitted in (None, 3, {"model": 1}, {"settings": {}, "iterations": 1, "validation": {"rms": "x"}}):
        meta = plan.meta if fitted is None else {**plan.meta, "fitted": fitted}
        replace(plan, meta=meta).save("plans/digits.plan-2.safetensors")
        done = fit("--nfe", "2")
        assert (done.code, "digits.plan-2.safetensors" in done.err) == (2 if fitted is None else 3, True), done.err
