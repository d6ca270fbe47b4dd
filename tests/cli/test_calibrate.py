"""pfode sample --calibrate, and pfode fit --tune."""

import shutil

import pytest

import pfode
from pfode.samplers.calibration import calibration_calls
from pfode.scores.io.shipped import WEIGHTS


@pytest.fixture
def model(tmp_path):
    return shutil.copy(WEIGHTS / "digits.safetensors", tmp_path / "mine.safetensors")


WORDS = ["sample", "--model", "mine.safetensors", "--n", 2, "--out", "a.png"]


def test_the_plan_is_kept_beside_the_model_and_taken_again(cli, model, tmp_path):
    first = cli(*WORDS, "--nfe", 7, "--calibrate")
    assert first.code == 0, first.err
    assert f"{calibration_calls(7):,} denoiser calls" in first.err
    plan = pfode.Plan.load(tmp_path / "mine.calibrated-7.safetensors")
    assert plan.fitted_to == pfode.load(model).fingerprint
    again = cli(*WORDS[:-1], "b.png", "--nfe", 7)
    assert (again.code, f"sampler {plan.name}, grid {plan.meta['grid']}" in again.err) == (0, True)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    third = cli(*WORDS, "--nfe", 7, "--calibrate")
    assert (third.code, "nothing to calibrate" in third.err) == (0, True)
    (tmp_path / "mine.calibrated-7.safetensors").unlink()
    like = cli("sample", "--like", "a.png", "--out", "c.png")
    assert (like.code, (tmp_path / "c.png").read_bytes()) == (0, (tmp_path / "a.png").read_bytes())


@pytest.mark.parametrize(
    "words",
    [
        ["--sampler", "ddim"], ["--no-fitted"], ["--grid", "karras"], ["--chart", "flow"], ["--eta", "0.5"],
        ["--model", "tests.scores.small:denoiser"],
    ],
)  # fmt: skip
def test_what_leaves_no_choice(cli, model, words):
    refused = cli(*WORDS, "--nfe", 6, "--calibrate", *words)
    assert refused.code == 2
    assert "--calibrate" in refused.err
    assert refused.err.count("\n") <= 2


def test_tune_writes_a_plan_that_auto_prefers(cli, model, tmp_path):
    few = ["--n", 8, "--active", 8, "--check", 8, "--teacher", 8, "--iterations", 1, "--start", "ddim", "--out", "."]
    done = cli("fit", "--model", "mine.safetensors", "--nfe", 2, *few, "--tune", "--tune-steps", 2, "--tune-batch", 8)
    assert done.code == 0, done.err
    plan = pfode.Plan.load(tmp_path / "mine.tuned-2.safetensors")
    assert plan.tune
    drawn = cli(*WORDS, "--nfe", 2)
    assert (drawn.code, "sampler tuned-2" in drawn.err) == (0, True)
    shown = cli("info", "mine.tuned-2.safetensors")
    assert (shown.code, "tuned-2" in shown.out) == (0, True)
    other = cli("sample", "--model", "digits-small", "--sampler", "mine.tuned-2.safetensors", "--n", 2)
    assert other.code in (2, 3)
