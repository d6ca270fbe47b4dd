"""`pfode likelihood`: its lines, its folder, what it refuses."""

import json
import math
import re

import pytest
from PIL import Image

import pfode
from pfode.cli import density_figures
from pfode.cli.densities import auroc
from pfode.scores.training.data import load_data

QUICK = ("likelihood", "digits", "--elbo", 4)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_per_picture_and_their_mean(cli):
    run = cli("likelihood", "digits", "--data", "digits-test", "--n", 2, "--rtol", 0.1, "--seed", 5, "--probes", 2)
    assert run.code == 0
    head, first, second, _, mean = run.out.splitlines()
    assert head.split() == ["picture", "bits/dim", "+-", "nats"]
    assert float(first.split()[1]) >= float(second.split()[1])
    assert "bits/dim in the mean of 2 (uniform dequantisation of 17 values; prior mean)" in mean
    assert "smooth pictures are likely" in run.err
    x = load_data("digits-test").images[:2].float() / 127.5 - 1
    how = {"divergence": pfode.flow.Hutchinson(2), "rtol": 0.1, "seeds": [5, 6], "end": "uniform"}
    found = pfode.log_likelihood(pfode.load("digits"), x, **how)
    for line in (first, second):
        name, bits, error, nats = line.split()
        k = int(name[-1])
        assert float(nats) == pytest.approx(found.nats[k].item(), abs=0.01)
        assert float(bits) == pytest.approx(found.bits_per_dim[k].item(), abs=1e-4)
        assert float(error) == pytest.approx(found.stderr[k].item() / 64 / math.log(2), abs=1e-4)


def test_json_and_files_of_pictures(cli, tmp_path):
    for i, grey in enumerate((0, 255)):
        Image.new("L", (8, 8), grey).save(tmp_path / f"{i}.png")
    run = cli(*QUICK, "0.png", "1.png", "--json", "--end", "none")
    assert [line["picture"] for line in run.json["pictures"]] == ["0.png", "1.png"]
    assert run.json["n"] == 2
    assert run.json["bins"] is None
    parts = run.json["pictures"][0]["parts"]
    assert sum(parts.values()) == pytest.approx(run.json["pictures"][0]["nats"])
    bits = [line["bits_per_dim"] for line in run.json["pictures"]]
    assert run.json["bits_per_dim"] == pytest.approx(sum(bits) / 2)
    assert run.json["standard_error"] == pytest.approx(abs(bits[0] - bits[1]) / 2)


def test_the_folder_is_continued_and_no_other_runs(cli, tmp_path):
    words = (*QUICK, "--data", "digits-test", "--n", 12, "--batch", 5, "--out", "found")
    assert cli(*words).code == 0
    folder = tmp_path / "found"
    whole = lines(folder / "results.jsonl")
    assert [line["number"] for line in whole] == list(range(12))
    assert {path.name for path in folder.iterdir()} >= {"run.json", "results.jsonl", "sheet.png", "histogram.png"}
    raw = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(raw[:7]) + raw[7][:40])
    again = cli(*words)
    assert "has 7 of 12 pictures" in again.err
    assert lines(folder / "results.jsonl") == whole
    other = cli(*words, "--seed", 3)
    assert other.code == 2
    assert "holds a run of another options" in other.err
    assert cli(*words, "--seed", 3, "--overwrite").code == 0
    (folder / "run.json").write_text("{")
    assert cli(*words).code == 3


def test_classes_by_bayes_rule(cli):
    run = cli(*QUICK, "--data", "digits-test", "--n", 3, "--label", "all", "--json")
    for line in run.json["pictures"]:
        assert sum(line["probabilities"].values()) == pytest.approx(1)
        assert line["class"] == max(line["probabilities"], key=line["probabilities"].get)
        assert line["probability"] == line["probabilities"][line["class"]]
    assert run.json["accuracy"] == pytest.approx(
        sum(line["class"] == line["label"] for line in run.json["pictures"]) / 3
    )
    assert "accuracy" in cli(*QUICK, "--data", "digits-test", "--n", 3, "--label", "all").out


def test_against_other_pictures_and_another_model(cli, tmp_path):
    run = cli(*QUICK, "--data", "digits-test", "--n", 6, "--against", "digits-train", "--out", "two", "--json")
    first, second = ([line["nats"] for line in of["pictures"]] for of in (run.json, run.json["against"]))
    wins = sum((a > b) + 0.5 * (a == b) for a in first for b in second)
    assert run.json["auroc"] == pytest.approx(wins / 36)
    assert len(lines(tmp_path / "two" / "against" / "results.jsonl")) == 6
    model = cli(*QUICK, "--data", "digits-test", "--n", 2, "--against", "digits-vp", "--json")
    assert model.json["against"]["model"] == "digits-vp"
    assert [line["picture"] for line in model.json["against"]["pictures"]] == ["digits-test-00000", "digits-test-00001"]


def test_auroc():
    assert auroc([2.0, 3.0], [0.0, 1.0]) == 1
    assert auroc([0.0], [1.0, 2.0]) == 0
    assert auroc([1.0, 1.0], [1.0]) == 0.5
    assert auroc([0.0, 2.0], [1.0, 2.0]) == pytest.approx((0 + 0 + 1 + 0.5) / 4)


def test_figures():
    drawing = density_figures.histogram(["a", "b"], [[1.0, 2.0, 2.0, 3.0], [2.5, 4.0]])
    bars = [mark for mark in drawing.marks if mark.kind == "area"]
    assert len(bars) == 3 + 2
    alone = density_figures.histogram(["a"], [[1.0]])
    assert sum(mark.kind == "area" for mark in alone.marks) == 1
    assert all(low <= value <= high for low, high in ((0, 1), (-3.2, 7)) for value in density_figures.ticks(low, high))
    assert 4 <= len(density_figures.ticks(-3.2, 7)) <= 11


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("digits",), 2, "need pictures: either files, or --data"),
        (("digits", "a.png", "--data", "digits"), 2, "need pictures: either files, or --data"),
        ((), 2, "Missing argument 'MODEL'|missing"),
        (("digitz", "--data", "digits"), 2, "did you mean 'digits'"),
        (("digits", "--data", "digitz"), 2, "did you mean 'digits'"),
        (("digits", "nowhere.png"), 3, "nowhere.png"),
        (("digits", "broken.png"), 3, "broken.png"),
        (("digits", "--data", "broken.npz"), 3, "broken.npz"),
        (("avatars", "--data", "digits", "--n", "1", "--elbo", "2"), 2, "pictures of shape"),
        (("digits", "--data", "digits", "--probes", "0"), 2, "--probes: need a number of at least 1, or exact"),
        (("digits", "--data", "digits", "--probes", "many"), 2, "--probes"),
        (("digits", "--data", "digits", "--rtol", "0"), 2, "--rtol"),
        (("digits", "--data", "digits", "--rtol", "nan"), 2, "--rtol"),
        (("digits", "--data", "digits", "--end", "sharp"), 2, "--end"),
        (("digits", "--data", "digits", "--bins", "1"), 2, "--bins"),
        (("digits", "--data", "digits", "--draws", "0"), 2, "--draws"),
        (("digits", "--data", "digits", "--elbo", "1"), 2, "--elbo"),
        (("digits", "--data", "digits", "--n", "0"), 2, "--n"),
        (("digits", "--data", "digits", "--seed", "-1"), 2, "--seed"),
        (("digits", "--data", "digits", "--n", "1", "--label", "ten", "--elbo", "2"), 2, "unknown label 'ten'"),
        (("digits", "--data", "digits", "--overwrite"), 2, "nothing is continued without --out"),
        (("digits", "--data", "digits", "--batch", "0"), 2, "--batch"),
        (("digits", "--data", "digits", "--guidance", "inf"), 2, "--guidance"),
        (("digits", "--data", "digits", "--device", "cuda:99"), 4, "device"),
        (("digits", "--data", "digits", "--against", "nothing.npz"), 2, "nothing.npz"),
        (("nomodule:net", "--data", "digits"), 2, "nomodule"),
        (("digits", "--data", "digits", "--n", "1", "--elbo", "2", "--out", "file"), 7, "file"),
    ],
)
def test_malformed_calls_leave_nothing(cli, tmp_path, words, code, says):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04" + bytes(30))
    (tmp_path / "file").write_text("mine")
    before = {path.name for path in tmp_path.iterdir()}
    run = cli("likelihood", *words)
    assert "Traceback" not in run.err
    assert "internal error" not in run.err
    assert re.search(says, run.err), run.err
    assert run.code == code, run.err
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "file").read_text() == "mine"
