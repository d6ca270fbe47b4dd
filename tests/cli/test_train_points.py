"""pfode train on points, and pfode reflow, as a user types them."""

import json

import pytest
from PIL import Image

import pfode
from pfode.cli.objective import LAW_NAMES, OBJECTIVES
from pfode.scores import load
from pfode.scores.toys import LAWS
from pfode.scores.training.objectives import OBJECTIVES as VALUES

SMALL = ("train", "--data", "moons", "--steps", 3, "--batch", 16, "--widths", "16,16", "--device", "cpu")


def test_the_names_are_those_of_the_library():
    assert set(LAW_NAMES) == set(LAWS)
    assert set(OBJECTIVES) == set(VALUES)


@pytest.mark.parametrize(
    ("words", "panels"),
    [
        (("--objective", "flow", "--coupling", "assignment"), 4),
        (("--objective", "flow", "--coupling", "entropic", "--interpolant", "bridge", "--from-data", "8gaussians"), 4),
        (("--objective", "likelihood"), 4),
        (("--objective", "sliced", "--energy"), 3),
        (("--objective", "denoising", "--weighting", "likelihood", "--process", "vp"), 3),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_run_trains_draws_and_says_how_likely(cli, tmp_path, words, panels):
    done = cli(*SMALL, *words, "--out", "run", "--json")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "run" / "points.png") as sheet:
        assert sheet.width == panels * 332 + 12
    assert ("gap" in done.json) == (panels == 4)
    if panels == 4:
        assert done.json["nll"] == pytest.approx(done.json["entropy"] + done.json["gap"])
        assert done.json["gap"] > 0
    den = load(tmp_path / "run" / "model.safetensors")
    assert pfode.sample(den, n=3, steps=2).x.shape == (3, 2)


def test_reflow_trains_on_the_models_own_pairs(cli, tmp_path):
    assert cli(*SMALL, "--objective", "flow", "--out", "first", "--sheet-every", 2).code == 0
    assert (tmp_path / "first" / "points-000002.png").exists()
    words = ("reflow", "first/model.safetensors", "--pairs", 300, "--nfe", 4, "--steps", 2, "--batch", 16)
    done = cli(*words, "--device", "cpu", "--out", "second", "--json")
    assert done.code == 0, done.err
    assert done.json["curvature_before"] >= -1e-6
    trained = json.loads((tmp_path / "second" / "step-000002" / "manifest.json").read_text())["config"]
    assert trained["objective"]["coupling"] == {"name": "given"}
    assert load(tmp_path / "second" / "model.safetensors").prediction == "flow"
    again = cli(*words, "--device", "cpu", "--out", "second")
    assert again.code == 2
    assert "--resume" in again.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--objective", "gan"), "--objective"),
        (("--coupling", "assignment"), "--coupling: --objective denoising takes none"),
        (("--objective", "flow", "--coupling", "emd"), "--coupling"),
        (("--objective", "sliced", "--interpolant", "linear"), "--interpolant"),
        (("--objective", "flow", "--weighting", "likelihood"), "--weighting"),
        (("--objective", "flow", "--from-data", "moon"), "unknown law 'moon'"),
        (("--objective", "flow", "--from-data", "twonorm"), "source"),
        (("--data", "digits", "--objective", "flow", "--from-data", "moons"), "--from-data"),
        (("--data", "digits", "--energy"), "--energy"),
        (("--widths", "16,32"), "--widths"),
        (("--blocks", "1"), "--blocks"),
        (("--size", "32"), "--size"),
        (("--held-out", "0.1"), "--held-out"),
        (("--flip",), "mirror"),
        (("--objective", "flow", "--process", "vp"), "velocities"),
        (("--objective", "sliced", "--balance"), "balance"),
        (("--data", "moon"), "no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_refused_and_nothing_is_left(cli, tmp_path, words, said):
    done = cli(*SMALL, "--out", "run", *words)
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("step*"))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("nowhere.safetensors",), 3, "nowhere"),
        (("digits",), 2, "reflow straightens velocities"),
        (("broken.safetensors",), 3, "broken.safetensors"),
        (("digits", "--pairs", "0"), 2, "--pairs"),
    ],
)
def test_reflow_refuses(cli, tmp_path, words, code, said):
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    done = cli("reflow", *words, "--out", "run")
    assert done.code == code, done.err
    assert said in done.err
    assert not (tmp_path / "run").exists()
