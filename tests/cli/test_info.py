import shlex

import pytest

import pfode
from pfode.header import read_header
from pfode.scores.io.shipped import shipped


def test_shipped_models(cli):
    run = cli("info", "models", "--json")
    assert {entry["name"] for entry in run.json} >= {"digits"}
    assert cli("info", "models").out.splitlines()[0].split() == [
        "name", "process", "prediction", "shape", "parameters", "bytes",
    ]  # fmt: skip


def test_model(cli):
    path = shipped()["digits"]
    found = cli("info", "digits", "--verify", "--json").json
    assert found["kind"] == "model"
    assert found["verified"] is True
    assert found["parameters"] == read_header(path).parameters
    assert found["shape"] == [1, 8, 8]
    assert cli("info", path).out == cli("info", "digits").out


def test_plan(cli, tmp_path):
    plan = pfode.make_plan("heun", process=pfode.EDM(), steps=4)
    plan.save(tmp_path / "four.safetensors")
    found = cli("info", "four.safetensors", "--json", "--verify").json
    assert (found["kind"], found["name"], found["nfe"]) == ("plan", "heun", plan.nfe)


def test_picture(cli, sheet, tmp_path):
    found = cli("info", sheet, "--json").json
    assert found["command"].startswith("pfode sample --model digits --sampler")
    again = cli(*shlex.split(found["command"])[1:], "--out", "again.png")
    assert again.code == 0
    assert sheet.read_bytes() == (tmp_path / "again.png").read_bytes()
    assert "command" in cli("info", sheet).out


def test_env(cli):
    found = cli("info", "env", "--json").json
    assert found["pfode"] == pfode.__version__
    assert "torch" in cli("info", "env").out


def test_a_file_has_no_say_over_the_terminal(cli, tmp_path):
    header = b'{"__metadata__": {"x": "\\u001b[31mred\\u0007"}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    run = cli("info", "x.safetensors")
    assert run.code == 0
    assert "\x1b" not in run.out
    assert "\x07" not in run.out


@pytest.mark.parametrize("word", ["models", "config", "env"])
def test_words_have_no_digest(cli, word):
    assert cli("info", word, "--verify").code == 2
