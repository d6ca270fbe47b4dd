"""pfode train, as a user types it."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

from pfode.scores import load
from pfode.scores.training.trainer import Trainer

SMALL = ("train", "--widths", "8,16", "--batch", 8, "--no-amp")


def test_train_resume_and_sample(cli, tmp_path):
    words = (*SMALL, "--process", "flow", "--steps", 6, "--save-every", 2, "--sheet-every", 3, "--out", "a.safetensors")
    done = cli(*words, "--json")
    assert done.code == 0, done.err
    assert done.json["out"] == "a.safetensors"
    assert done.json["steps"] == 6
    den = load(tmp_path / "a.safetensors")
    assert (den.prediction, den.shape, den.labels) == ("flow", (1, 8, 8), tuple("0123456789"))
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 6
    with Image.open(tmp_path / "a" / "sheet-000003.png") as sheet:
        assert sheet.width > 8 * 8
    again = cli(*words)
    assert again.code == 2
    assert "--resume" in again.err
    assert cli(*words, "--resume").code == 0
    assert cli("sample", "--model", "a.safetensors", "--steps", 2, "--n", 2, "--label", "3").code == 0


def test_the_same_command_gives_the_same_network(cli, tmp_path):
    losses = []
    for name in ("a", "b"):
        assert cli(*SMALL, "--steps", 3, "--out", name).code == 0
        losses.append(
            [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        )
    assert losses[0] == losses[1]
    a, b = (load(tmp_path / name / "model.safetensors").net.state_dict() for name in ("a", "b"))
    assert all((a[key] == b[key]).all() for key in a)


def test_own_pictures(cli, tmp_path):
    np.savez(tmp_path / "mine.npz", images=np.zeros((9, 16, 16, 3), np.uint8))
    assert cli(*SMALL, "--data", "mine.npz", "--process", "vp", "--prediction", "v", "--steps", 2).code == 0
    den = load(tmp_path / "runs" / "mine-vp" / "model.safetensors")
    assert (den.labels, den.shape, den.prediction) == (None, (3, 16, 16), "v")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--data", "digit"), 2, "did you mean 'digits'"),
        (("--data", "nowhere.npz"), 2, "no such file"),
        (("--data", "emoji", "--font", "nowhere.ttf"), 4, "apt-get install"),
        (("--process", "ddpm"), 2, "--process"),
        (("--prediction", "noise"), 2, "--prediction"),
        (("--widths", "a"), 2, "--widths"),
        (("--widths", "8,12"), 2, "widths"),
        (("--widths", "8,16,32,64,128"), 2, "size"),
        (("--blocks", "1,2,3"), 2, "blocks"),
        (("--ema", "x"), 2, "--ema"),
        (("--ema", "0.999"), 2, "no decay"),
        (("--data", ".", "--size", 30), 2, "a size of 28 or 32"),
        (("--batch", "9", "--accum", "2"), 2, "accum"),
        (("--lr", "0"), 2, "rate"),
        (("--lr", "nan"), 2, "--lr"),
        (("--drop", "2"), 2, "drop"),
        (("--steps", "0"), 2, "--steps"),
        (("--steps", 10**40), 2, "steps"),
        (("--batch", 10**20), 2, "batch"),
        (("--sigma-data", "1e300"), 2, "sigma_data"),
        (("--tracker", "tensorbord"), 2, "did you mean 'tensorboard'"),
        (("--tracker", "aim"), 4, "aim"),
        (("--data", ""), 2, "data"),
        (("--device", "tpu"), 2, "device"),
    ],
)
def test_mistakes(cli, words, code, said, tmp_path):
    done = cli("train", *words)
    assert done.code == code
    assert said in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_folder_that_cannot_be_written(cli, tmp_path):
    (tmp_path / "file").write_text("")
    done = cli(*SMALL, "--steps", 1, "--out", "file/run")
    assert done.code == 7
    assert "file/run" in done.err


def test_what_is_left_out_is_counted_and_the_classes_are_named(cli, tmp_path):
    for name in ("cat/1.png", "dog/2.png", "dog/._2.png"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "d" / name)
    (tmp_path / "d" / "notes.txt").write_text("")
    done = cli(*SMALL, "--data", "d", "--size", 8, "--steps", 1, "--out", "run")
    assert done.code == 0, done.err
    for line in (
        "left out: 1 hidden files and folders",
        "left out: 1 files that are no pictures",
        "2 classes: cat, dog",
    ):
        assert line in done.err


def test_a_resumed_run_says_what_it_found(cli, tmp_path):
    words = (*SMALL, "--steps", 2, "--save-every", 1, "--out", "run")
    assert "no checkpoint there: from the start" in cli(*words, "--resume").err
    (tmp_path / "run" / "step-000002" / "manifest.json").write_text("")
    again = cli(*words, "--resume")
    assert (again.code, "passed over" in again.err, "continuing after step 1" in again.err) == (0, True, True)
    for path in (tmp_path / "run").glob("step-*/network.safetensors"):
        path.write_bytes(b"")
    damaged = cli(*words, "--resume")
    assert (damaged.code, "every checkpoint is damaged" in damaged.err) == (3, True)


def test_one_run_at_a_time(cli, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    handle = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    refused = cli(*SMALL, "--steps", 1, "--out", "run")
    os.close(handle)
    assert (refused.code, "another run is working in it" in refused.err) == (2, True)
    assert cli(*SMALL, "--steps", 1, "--out", "run").code == 0


@pytest.mark.parametrize(("name", "code"), [("d.npz", 3), ("d.zip", 3), ("d", 3)])
def test_bad_data_ends_with_its_code(cli, tmp_path, name, code):
    if name == "d":
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    else:
        (tmp_path / name).write_bytes(b"PK" + bytes(100))
    done = cli(*SMALL, "--data", name)
    assert (done.code, name in done.err, "Traceback" in done.err) == (code, True, False)


def test_arrays_are_resized_when_asked(cli, tmp_path):
    np.savez(tmp_path / "mine.npz", images=np.full((9, 14, 14), 200, np.uint8), licence=np.array("CC0"))
    assert cli(*SMALL, "--data", "mine.npz", "--size", 8, "--steps", 1, "--out", "a", "--name", "grey").code == 0
    den = load(tmp_path / "a")
    assert den.shape == (1, 8, 8)
    about = cli("info", "a", "--json").json
    assert about["name"] == "grey"
    assert about["data"]["licence"] == "CC0"
    assert "resized from 14 to 8" in about["data"]["source"]
    assert cli(*SMALL, "--data", "mine.npz", "--steps", 1, "--out", "b").code == 0
    assert load(tmp_path / "b").shape == (1, 14, 14)


def test_what_is_measured_and_what_is_given(cli):
    assert cli(*SMALL, "--steps", 1, "--out", "a").code == 0
    found = cli("info", "a", "--json").json
    assert found["sigma_data"] == pytest.approx(0.752, abs=0.01)
    training = found["training"]
    assert (training["levels"], training["level_std"], training["balance"]) == ("lognormal", 1.0, True)
    assert -0.6 < training["level_mean"] < -0.3
    words = ("--sigma-data", 0.6, "--level-mean", 0.25, "--level-std", 1.5, "--no-balance", "--process", "flow")
    assert cli(*SMALL, "--steps", 1, "--out", "b", *words).code == 0
    given = cli("info", "b", "--json").json["training"]
    assert [given[key] for key in ("levels", "level_mean", "level_std", "balance")] == ["lognormal", 0.25, 1.5, False]


def test_a_model_says_its_losses_and_the_next_command(cli):
    done = cli(*SMALL, "--steps", 2, "--held-out", 0.1, "--out", "a", "--json", "--export-ema", 0.1)
    assert done.code == 0, done.err
    found = done.json
    assert found["next"] == "pfode sample --model a/model.safetensors"
    assert found["held_out_loss"] > 0
    assert len(found["loss_by_level"]) == 8
    assert "next: pfode sample" in done.err
    assert cli("sample", "--model", "a", "--steps", 2, "--n", 2).code == 0
    assert cli(*SMALL, "--steps", 2, "--out", "b", "--export-ema", 0.07).code == 2


def test_lines_where_there_is_no_terminal(cli, monkeypatch):
    monkeypatch.setattr("pfode.cli.watch.EVERY", 0.0)
    done = cli(*SMALL, "--steps", 12, "--out", "a")
    lines = [line for line in done.err.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == [f"step {step} of 12" for step in (10, 11, 12)]
    assert not [line for line in cli("-q", *SMALL, "--steps", 12, "--out", "b").err.splitlines() if "step 10" in line]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_stop_keeps_what_was_done(cli, monkeypatch, tmp_path, number, code):
    advance, steps = Trainer._advance, []

    def stopped(self):
        steps.append(self.step)
        if self.step == 3:
            signal.raise_signal(number)
        return advance(self)

    whole = (*SMALL, "--steps", 6, "--out", "whole")
    assert cli(*whole).code == 0
    words = (*SMALL, "--steps", 6, "--out", "run")
    monkeypatch.setattr(Trainer, "_advance", stopped)
    monkeypatch.setattr("sys.argv", ["pfode", *map(str, words)])
    done = cli(*words)
    assert (done.code, steps) == (code, [0, 1, 2, 3])
    assert "stopped after step 4" in done.err
    assert f"pfode {' '.join(map(str, words))} --resume" in done.err
    assert load(tmp_path / "run").shape == (1, 8, 8)  # the model of the newest checkpoint
    assert cli("sample", "--model", "run/step-000004", "--steps", 2, "--n", 1).code == 0
    monkeypatch.setattr(Trainer, "_advance", advance)
    assert cli(*words, "--resume").code == 0
    a, b = (load(tmp_path / name).net.state_dict() for name in ("whole", "run"))
    assert all((a[key] == b[key]).all() for key in a)


def test_a_budget_of_time_ends_the_run(cli):
    done = cli(*SMALL, "--time-budget", "0.001s", "--out", "a", "--json")
    assert done.code == 0
    assert done.json["steps"] == 11
    for text in ("soon", "0m", "-3m", "1d"):
        assert cli(*SMALL, f"--time-budget={text}").code == 2
    both = cli(*SMALL, "--time-budget", "1m", "--steps", 3)
    assert (both.code, "exclude" in both.err) == (2, True)


def test_width_and_depth(cli, tmp_path):
    words = ("train", "--batch", 4, "--no-amp", "--steps", 1)
    assert cli(*words, "--width", 0.5, "--depth", 2, "--out", "a").code == 0
    config = load(tmp_path / "a").net.config
    assert (config.widths, config.blocks) == ((16, 24), (2, 2))
    assert cli(*words, "--width", 2, "--widths", "8,16").code == 2


def test_string_labels_and_sheets_of_many_classes(cli, tmp_path):
    names = np.array([f"class {i:02d}" for i in range(25)])
    np.savez(tmp_path / "d.npz", images=np.zeros((25, 8, 8), np.uint8), labels=names)
    done = cli(*SMALL, "--data", "d.npz", "--steps", 1, "--sheet-every", 1, "--sheet-guidance", 2, "--out", "a")
    assert done.code == 0, done.err
    assert load(tmp_path / "a").labels == tuple(names)
    with Image.open(tmp_path / "a" / "sheet-000001.png") as sheet:
        assert sheet.width == sheet.height  # 5 x 5: one of every class
