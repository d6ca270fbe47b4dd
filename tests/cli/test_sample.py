import hashlib
import json
import re

import numpy as np
import pytest
from PIL import Image

import pfode
from pfode.cli import images
from pfode.cli.recipe import format_seeds, parse_seeds
from pfode.cli.sample import command as sample


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_sheet_and_streams(cli, tmp_path):
    run = cli("sample", "--steps", 3, "--n", 5)
    assert run.code == 0
    assert run.out == "sheet.png\n"
    assert re.search(r"steps 3, NFE \d+, evals \d+", run.err)
    assert pixels(tmp_path / "sheet.png").shape == (2 + 2 * 66, 2 + 3 * 66)
    assert cli("sample", "--steps", 3, "--n", 5, "--quiet").err == ""


def test_pixels_are_those_of_the_library(sheet):
    net = pfode.load("digits")
    x = pfode.sample(net, n=4, steps=3, seed=7).x
    first = ((x[0, 0].double().clamp(-1, 1) + 1) * 127.5).round().numpy()
    assert np.array_equal(pixels(sheet)[2:66:8, 2:66:8], first)


def test_like_repeats_a_sheet(cli, sheet):
    assert cli("sample", "--like", sheet, "--out", "again.png").code == 0
    assert sheet.read_bytes() == (sheet.parent / "again.png").read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        "--nfe 6 --sampler heun --grid karras --n 3",
        "--steps 4 --sampler ddpm --seeds 3,9-10 --label 3 --guidance 1.5",
        "--steps 2 --label all --scale 3 --dtype fp64",
    ],
)
def test_like_repeats_every_option(cli, tmp_path, words):
    assert cli("sample", *words.split()).code == 0
    assert cli("sample", "--like", "sheet.png", "--out", "again.png").code == 0
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_flags_override_like_and_like_the_environment(cli, sheet, monkeypatch):
    monkeypatch.setenv("PFODE_STEPS", "9")
    monkeypatch.setenv("PFODE_GUIDANCE", "2")
    recipe = cli("sample", "--like", sheet, "--seed", 1, "--json").json["recipe"]
    assert recipe["steps"] == 3
    assert recipe["options"]["seed"] == 1
    assert recipe["options"]["n"] == 4
    assert "guidance" not in recipe["options"]
    assert cli("sample", "--like", sheet, "--nfe", 5, "--json").json["nfe"] == 5
    assert cli("sample", "--like", sheet, "--seeds", "5,8", "--json").json["recipe"]["options"]["seeds"] == "5,8"


def test_texts_of_a_png(sheet):
    texts = images.read_text(sheet)
    digest = images.read_recipe(sheet)["model"]["digest"]
    assert re.fullmatch(
        rf"Steps: 3, Sampler: \S+, Schedule type: \S+, Seed: 7, Size: 8x8, Model hash: {digest[:10]}, "
        rf"Model: digits, Version: pfode {re.escape(pfode.__version__)}",
        texts["parameters"],
    )
    with Image.open(sheet) as picture:
        assert picture.mode == "L"


def test_separate_pictures_do_not_depend_on_the_batch(cli, tmp_path):
    assert cli("sample", "--steps", 3, "--n", 5, "--separate", "a/b", "--batch", 5).code == 0
    assert cli("sample", "--steps", 3, "--seeds", "4,2", "--separate", "c", "--batch", 1).code == 0
    for name in ("000002.png", "000004.png"):
        assert (tmp_path / "a/b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "c/results.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [4, 2]
    assert lines[0]["sha256"] == hashlib.sha256((tmp_path / "c/000004.png").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "c/run.json").read_text())["options"]["seeds"] == "4,2"
    assert pixels(tmp_path / "c/000004.png").shape == (8, 8)
    assert cli("sample", "--steps", 3, "--seeds", "4,2", "--separate", "d", "--out", "d/sheet.png").code == 0
    assert (tmp_path / "d/sheet.png").is_file()
    assert cli("sample", "--like", "c/000004.png").code == 0
    assert np.array_equal(pixels(tmp_path / "sheet.png")[2:-2:8, 2:-2:8], pixels(tmp_path / "c/000004.png"))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_trajectory(cli, tmp_path, suffix):
    run = cli("sample", "--steps", 4, "--n", 4, "--trajectory", f"path.{suffix}", "--json")
    assert run.json["files"] == ["sheet.png", f"path.{suffix}"]
    with Image.open(tmp_path / f"path.{suffix}") as film:
        frames = getattr(film, "n_frames", 1)
        assert 4 <= frames <= 5  # equal ones are merged
        film.seek(frames - 1)
        assert film.size == (2 * 134 + 8, 134)
        last = np.asarray(film.convert("L"))
        assert np.array_equal(last[:, :134], last[:, 142:])
        assert np.array_equal(last[:, :134], pixels(tmp_path / "sheet.png"))


def test_plan_file_as_sampler(cli, tmp_path):
    net = pfode.load("digits")
    pfode.make_plan("heun", process=net.process, steps=3).save(tmp_path / "three.safetensors")
    assert cli("sample", "--sampler", "three.safetensors", "--n", 2).code == 0
    assert cli("sample", "--sampler", "heun", "--steps", 3, "--n", 2, "--out", "named.png").code == 0
    assert np.array_equal(pixels(tmp_path / "sheet.png"), pixels(tmp_path / "named.png"))
    assert cli("sample", "--like", "sheet.png", "--out", "again.png").code == 0
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    pfode.make_plan("heun", process=net.process, steps=4).save(tmp_path / "three.safetensors")
    changed = cli("sample", "--like", "sheet.png")
    assert changed.code == 3
    assert "made with another three.safetensors" in changed.err
    assert cli("sample", "--sampler", "three.safetensors", "--steps", 3).code == 2


def test_json(cli):
    run = cli("sample", "--steps", 2, "--n", 2, "--json")
    assert run.json["out"] == "sheet.png"
    assert run.json["nfe"] == run.json["recipe"]["nfe"]
    guided = cli("sample", "--steps", 2, "--n", 2, "--label", "3", "--guidance", 2, "--json").json
    assert guided["evals"] == 2 * guided["nfe"]


def test_scale_and_columns():
    assert [images.default_scale(16, s, s, 4) for s in (8, 28, 32, 64, 128)] == [8, 2, 2, 1, 1]
    for n in (20_000, 50_000, 300_000):
        columns = images.sheet_columns(n)
        images.sheet_size(n, 8, 8, images.default_scale(n, 8, 8, columns), columns)
    assert [images.sheet_columns(n) for n in (1, 2, 4, 5, 16, 17)] == [1, 2, 2, 3, 4, 5]
    assert images.sheet_columns(30, classes=10) == 10
    colour = images.contact_sheet(np.zeros((3, 4, 5, 3), np.uint8), 2, 2)
    assert colour.shape == (2 + 2 * 10, 2 + 2 * 12, 3)
    assert colour[2, 2].max() == 0
    assert colour[-3, -3].min() == 255


@pytest.mark.parametrize("text", ["0-63,80", "5", "3,1", f"{2**64 - 1}"])
def test_seeds_round_trip(text):
    assert format_seeds(parse_seeds(text)) == text


def test_classes_in_turn_unless_none(cli, monkeypatch):
    """Without --label a model that has classes shows all of them, and the sheet says so."""
    label = next(option for option in sample.params if option.name == "label")
    monkeypatch.setattr(label, "default", None)
    words = ("sample", "--steps", 2, "--n", 10, "--out")
    assert cli(*words, "usual.png").code == cli(*words, "all.png", "--label", "all").code == 0
    assert cli(*words, "none.png", "--label", "none").code == 0
    usual, every, none = (pixels(f"{name}.png") for name in ("usual", "all", "none"))
    assert np.array_equal(usual, every)
    assert not np.array_equal(usual, none)
    assert cli("sample", "--like", "none.png", "--out", "again.png").code == 0
    assert np.array_equal(pixels("again.png"), none)
