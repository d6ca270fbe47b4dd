import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pfode
from pfode.cli import images
from pfode.cli.sample import command as sample
from pfode.cli.settings import format_seeds, format_set, parse_seeds, parse_set
from pfode.samplers.settle import start_time


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_sheet_and_streams(cli, tmp_path):
    run = cli("sample", "--steps", 3, "--n", 5)
    assert run.code == 0
    assert run.out == "sheet.png\n"
    assert re.search(r"steps 3, NFE \d+, evals \d+", run.err)
    assert pixels(tmp_path / "sheet.png").shape == (2 + 2 * 98, 2 + 3 * 98)
    assert cli("sample", "--steps", 3, "--n", 5, "--quiet").err == ""


def test_pixels_are_those_of_the_library(sheet):
    net = pfode.load("digits")
    x = pfode.sample(net, n=4, steps=3, seed=7).x
    first = ((x[0, 0].double().clamp(-1, 1) + 1) * 127.5).round().numpy()
    assert np.array_equal(pixels(sheet)[2:98:12, 2:98:12], first)


def test_like_repeats_a_sheet(cli, sheet):
    assert cli("sample", "--like", sheet, "--out", "again.png").code == 0
    assert sheet.read_bytes() == (sheet.parent / "again.png").read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        "--nfe 6 --sampler heun --grid karras --n 3",
        "--steps 4 --sampler ddpm --seeds 3,9-10 --label 3 --guidance 1.5",
        "--steps 2 --label all --scale 3 --dtype fp64",
        "--steps 5 --sampler sa-solver --set tau=0.5 --set between=0.5,30 --set predictor=2 --n 2",
        "--steps 5 --sampler bdia --set gamma=0.5 --chart trig --n 2",
        "--steps 5 --sampler unipc3 --lower-order-final --afs --grid shifted(time,3) --n 2",
        "--nfe 5 --afs 0.7 --n 2",
        "--steps 5 --sampler dpm++2m-sde --eta 0.5 --brownian --n 2",
        "--steps 3 --label all --guidance 3 --negative 5 --guidance-interval 0.3,5 --guidance-rescale 0.7 --n 2",
        "--steps 3 --init given.png --strength 0.4 --n 2",
        "--sampler rk45 --rtol 0.05 --n 3",
        "--sampler rk23 --rtol 0.05 --atol 0.1 --chart trig --label 3 --guidance 1.5 --seeds 3,9-10",
        "--sampler dpm-adaptive --rtol 0.2 --init given.png --strength 0.4 --n 2 --dtype fp64",
    ],
)
def test_settings_are_repeated(cli, tmp_path, words):
    """By --like, by the command that `pfode info` shows, and by --like from a single picture."""
    Image.linear_gradient("L").save(tmp_path / "given.png")
    assert cli("sample", *words.split(), "--separate", "a").code == 0
    whole = (tmp_path / "sheet.png").read_bytes()
    assert cli("sample", "--like", "sheet.png", "--out", "again.png").code == 0
    assert (tmp_path / "again.png").read_bytes() == whole
    command = shlex.split(cli("info", "sheet.png", "--json").json["command"])
    assert cli(*command[1:], "--out", "typed.png").code == 0
    assert (tmp_path / "typed.png").read_bytes() == whole
    first = min((tmp_path / "a").glob("*.png"))
    assert cli("sample", "--like", first, "--separate", "b").code == 0
    assert (tmp_path / "b" / first.name).read_bytes() == first.read_bytes()


def test_flags_override_like_and_like_the_environment(cli, sheet, monkeypatch):
    monkeypatch.setenv("PFODE_STEPS", "9")
    monkeypatch.setenv("PFODE_GUIDANCE", "2")
    settings = cli("sample", "--like", sheet, "--seed", 1, "--json").json["settings"]
    assert settings["steps"] == 3
    assert settings["options"]["seed"] == 1
    assert settings["options"]["n"] == 4
    assert "guidance" not in settings["options"]
    assert cli("sample", "--like", sheet, "--nfe", 5, "--json").json["nfe"] == 5
    assert cli("sample", "--like", sheet, "--seeds", "5,8", "--json").json["settings"]["options"]["seeds"] == "5,8"


def test_another_sampler_leaves_the_options_of_the_first(cli):
    words = ("--steps", 4, "--n", 2, "--set", "tau=0.5", "--lower-order-final")
    assert cli("sample", "--sampler", "sa-solver", *words).code == 0
    words = ("sample", "--like", "sheet.png", "--out", "other.png", "--json")
    options = cli(*words, "--sampler", "heun").json["settings"]["options"]
    assert (options["sampler"], options["steps"], options["chart"]) == ("heun", 4, "ddim")
    assert not {"set", "lower_order_final"} & set(options)
    again = cli(*words, "--no-lower-order-final").json["settings"]["options"]
    assert "tau=0.5" in again["set"]
    assert "lower_order_final" not in again


def test_options_reach_the_plan(cli):
    """The pictures are those of the library with the same options."""
    net = pfode.load("digits")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("--sampler edm --set churn=20 --set s_noise=1.01", {"sampler": "edm", "churn": 20, "s_noise": 1.01}),
        ("--sampler unipc2 --lower-order-final", {"sampler": "unipc2", "lower_order_final": True}),
        ("--afs", {"afs": True}),
        ("--sampler ddpm --brownian", {"sampler": "ddpm", "brownian": True}),
    ]
    for words, options in cases:
        assert cli("sample", "--steps", 5, "--n", 1, "--scale", 1, "--out", "sheet.png", *words.split()).code == 0
        x = pfode.sample(net, n=1, steps=5, **options).x
        assert np.array_equal(pixels("sheet.png")[2:-2, 2:-2], images.to_pixels(x)[0]), words


def test_guidance(cli):
    """Interval, rescaling and negative class are those of `guide`, and the evals are counted."""
    words = ("--n", 1, "--steps", 5, "--scale", 1, "--label", 3, "--guidance", 4)
    extra = ("--guidance-interval", "0.3,5", "--guidance-rescale", 0.5, "--negative", 8)
    run = cli("sample", *words, *extra, "--json").json
    net = pfode.scores.guide(pfode.load("digits"), 4.0, negative="8", interval=(0.3, 5.0), rescale=0.5)
    out = pfode.sample(net, n=1, steps=5, label=3)
    assert np.array_equal(pixels("sheet.png")[2:-2, 2:-2], images.to_pixels(out.x)[0])
    assert (run["nfe"], run["evals"]) == (5, out.evals)
    assert 5 < out.evals < 10


@pytest.mark.parametrize("model", ["digits", "digits-vp", "digits-flow"])
def test_image_to_image(cli, tmp_path, model):
    """The stronger, the farther from the picture; --strength is the share of noise; --separate draws the same."""
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, 8:24, 1] = 255  # the centre square is green
    Image.fromarray(picture).save(tmp_path / "green.png")
    words = (
        "sample",
        "--model",
        model,
        "--steps",
        6,
        "--n",
        4,
        "--scale",
        1,
        "--init",
        "green.png",
        "--out",
        "sheet.png",
    )
    far = []
    for strength in (0.1, 0.5, 1):
        assert cli(*words, "--strength", strength).code == 0
        whole = pixels("sheet.png").astype(float)
        tiles = [whole[2 + 10 * i : 10 + 10 * i, 2 + 10 * j : 10 + 10 * j] for i in (0, 1) for j in (0, 1)]
        far.append(np.mean([np.abs(tile - 150).mean() for tile in tiles]))  # 0.587 of 255
    assert far == sorted(far)
    assert far[0] < 25
    net = pfode.load(model)
    start = start_time(net.process, 0.5)
    assert start is not None
    assert net.process.sigma(start) == pytest.approx(net.process.alpha(start))
    assert cli(*words, "--separate", "a", "--out", "b.png").code == cli(*words).code == 0
    assert np.array_equal(pixels("b.png"), pixels("sheet.png"))
    Image.new("L", (8, 8)).save(tmp_path / "green.png")
    changed = cli("sample", "--like", "sheet.png")
    assert (changed.code, "made with another green.png" in changed.err) == (3, True)


def test_image_to_image_with_a_plan_file(cli, tmp_path):
    """The picture is noised to the first time of the plan."""
    Image.new("L", (8, 8), 200).save(tmp_path / "grey.png")
    net = pfode.load("digits")
    start = start_time(net.process, 0.4)
    pfode.make_plan("heun", net.process, 4, start=start).save(tmp_path / "late.safetensors")
    words = ("sample", "--n", 2, "--init", "grey.png", "--out")
    assert cli(*words, "a.png", "--sampler", "late.safetensors").code == 0
    assert cli(*words, "b.png", "--sampler", "heun", "--steps", 4, "--strength", 0.4).code == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert cli(*words, "c.png", "--sampler", "late.safetensors", "--strength", 0.4).code == 2
    assert cli("sample", "--n", 2, "--sampler", "late.safetensors").code == 2


def test_texts_of_a_png(sheet):
    texts = images.read_text(sheet)
    digest = images.read_settings(sheet)["model"]["digest"]
    assert re.fullmatch(
        rf"Steps: 3, Sampler: \S+, Schedule type: \S+, Seed: 7, Size: 8x8, Model hash: {digest[:10]}, "
        rf"Model: digits, Version: pfode {re.escape(pfode.__version__)}",
        texts["parameters"],
    )
    with Image.open(sheet) as picture:
        assert picture.mode == "L"


def test_texts_with_commas_are_quoted(cli):
    assert cli("sample", "--steps", 3, "--n", 1, "--grid", "shifted(time,3)").code == 0
    assert 'Schedule type: "shifted(time,3)", Seed: 0' in images.read_text(Path("sheet.png"))["parameters"]


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
    assert cli("sample", "--like", "c/000004.png", "--out", "one.png").code == 0
    assert np.array_equal(pixels(tmp_path / "one.png")[2:-2:12, 2:-2:12], pixels(tmp_path / "c/000004.png"))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_trajectory(cli, tmp_path, suffix):
    run = cli("sample", "--steps", 4, "--n", 4, "--trajectory", f"path.{suffix}", "--json")
    assert run.json["files"] == ["sheet.png", f"path.{suffix}"]
    with Image.open(tmp_path / f"path.{suffix}") as film:
        frames = getattr(film, "n_frames", 1)
        assert 4 <= frames <= 5  # equal ones are merged
        film.seek(frames - 1)
        assert film.size == (2 * 198 + 8, 198)
        last = np.asarray(film.convert("L"))
        assert np.array_equal(last[:, :198], last[:, 206:])
        assert np.array_equal(last[:, :198], pixels(tmp_path / "sheet.png"))


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
    assert run.json["nfe"] == run.json["settings"]["nfe"]
    guided = cli("sample", "--steps", 2, "--n", 2, "--label", "3", "--guidance", 2, "--json").json
    assert guided["evals"] == 2 * guided["nfe"]


def test_adaptive_samplers(cli, tmp_path):
    """NFE of every picture: in the report, in the sheet, in the files and their results."""
    words = ("sample", "--sampler", "rk45", "--rtol", "0.01", "--n", 5)
    run = cli(*words, "--json")
    out = pfode.sample(pfode.load("digits"), 5, sampler="rk45", rtol=0.01)
    each = out.stats["nfe"].tolist()
    assert np.array_equal(pixels("sheet.png"), images.contact_sheet(images.to_pixels(out.x), 12, 3))
    assert run.json["nfe_of_each"] == each
    assert (run.json["nfe"], run.json["evals"], run.json["nfe_mean"]) == (max(each), max(each), sum(each) / 5)
    assert len(set(each)) > 1
    assert f"steps {out.steps}, NFE {max(each)} (on average {sum(each) / 5:.1f}), evals {max(each)}" in run.err
    assert "sampler rk45, rtol 0.01, n 5" in run.err
    assert "Steps: 4, Sampler: rk45, Seed: 0" in images.read_text(tmp_path / "sheet.png")["parameters"]
    info = cli("info", "sheet.png", "--json").json
    assert (info["nfe"], info["nfe_mean"], info["options"]["rtol"]) == (max(each), sum(each) / 5, 0.01)
    assert "nfe_mean  " in cli("info", "sheet.png").out
    whole = (tmp_path / "sheet.png").read_bytes()
    assert cli(*words[:-1], 2, "--separate", "a").code == 0
    rest = cli(*words, "--separate", "a", "--json")
    assert (tmp_path / "sheet.png").read_bytes() == whole
    assert (rest.json["drawn"], rest.json["kept"], rest.json["nfe_of_each"]) == (3, 2, each)
    lines = [json.loads(line) for line in (tmp_path / "a/results.jsonl").read_text().splitlines()]
    assert [line["nfe"] for line in lines] == each
    assert [cli("info", f"a/{i:06d}.png", "--json").json["nfe"] for i in range(5)] == each
    assert cli(*words, "--separate", "a", "--rtol", "0.02").code == 2


def test_another_kind_of_sampler_leaves_the_options_of_the_first(cli, monkeypatch):
    assert cli("sample", "--sampler", "rk23", "--rtol", 0.05, "--n", 2).code == 0
    words = ("sample", "--like", "sheet.png", "--out", "other.png", "--json")
    options = cli(*words, "--sampler", "heun", "--steps", 3).json["settings"]["options"]
    assert (options["sampler"], options["steps"]) == ("heun", 3)
    assert not {"rtol", "atol"} & set(options)
    assert cli("sample", "--steps", 4, "--n", 2, "--eta", 0.5, "--sampler", "ddim").code == 0
    monkeypatch.setenv("PFODE_STEPS", "9")
    options = cli(*words, "--sampler", "rk23", "--rtol", 0.05).json["settings"]["options"]
    assert (options["sampler"], options["rtol"], options["chart"]) == ("rk23", 0.05, "flow")
    assert not {"steps", "grid", "eta"} & set(options)


@pytest.mark.parametrize("separate", [(), ("--separate", "a")])
def test_adaptive_samplers_that_fail(cli, tmp_path, monkeypatch, separate):
    monkeypatch.setattr("pfode.samplers.adaptive.MAX_STEPS", 3)
    words = ("sample", "--sampler", "rk45", "--rtol", 1e-3, "--n", 2, *separate)
    run = cli(*words)
    assert run.code == 5
    assert "max_steps were not enough" in run.err
    run = cli(*words, "--nan", "flag")
    assert run.code == 5
    assert re.search(
        r"2 of 2 pictures not finite: seed 0 after step \d, t = .*: max_steps were not enough; seed 1", run.err
    )
    assert (tmp_path / "sheet.png").is_file()


def test_scale_and_columns():
    assert [images.default_scale(16, s, s, 4) for s in (8, 28, 32, 64, 128)] == [12, 4, 3, 2, 1]
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


@pytest.mark.parametrize("options", [{"tau": 0.1, "between": (0.5, 1e9)}, {"predictor": 3, "s_tmin": 1e-7}, {}])
def test_set_round_trip(options):
    assert parse_set(format_set({"sampler": "x", "eta": 1.0, **options})) == options


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
