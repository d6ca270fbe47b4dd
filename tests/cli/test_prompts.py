"""Pipelines under prompts from the command line: pictures, provenance, image to image, fits, figures, mistakes."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pfode
from tests.scores import tiny

pytest.importorskip("transformers", reason="diffusers has text-to-image pipelines only beside it")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # of the peers
    pytest.mark.skipif(not tiny.NEWER, reason="this version's pipelines take less"),
]
FAST = ("--sampler", "ddim", "--steps", 3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a tiny pipeline by its name, made once."""
    folders: dict[str, Path] = {}
    flow = {"use_dynamic_shifting": True}
    schedulers: dict[str, Any] = {
        "sd": ("DDIMScheduler", {"beta_schedule": "scaled_linear", "clip_sample": False}),
        "flux": ("FlowMatchEulerDiscreteScheduler", flow),
    }

    def get(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            kind, options = schedulers[name]
            tiny.saved_pipeline(name, folder, tiny.scheduler(kind, **options))
            folders[name] = folder / "pipe"
        return folders[name]

    return get


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def bytes_of(x: torch.Tensor) -> np.ndarray:
    return ((x.double().clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()


def test_a_picture_for_every_prompt(cli, tmp_path, made):
    """As the library draws them, each by its own seed; alone, in a batch and in a folder."""
    words = ("--model", made("sd"), "--prompt", "a cat", "--prompt", "a bat", "--negative-prompt", "a dog")
    run = cli("sample", *words, "--guidance", 3, *FAST, "--n", 3, "--seed", 5, "--separate", "all", "--json")
    assert run.code == 0, run.err
    assert run.json["evals"] == 6
    den: Any = pfode.load(made("sd"), prompts=["a cat", "a bat"], negative_prompt="a dog", guidance=3.0)
    x = den.decode(pfode.sample(den, seeds=[5, 6, 7], sampler="ddim", steps=3, label=[0, 1, 0]).x)
    for i in range(3):
        got = pixels(tmp_path / "all" / f"{5 + i:06d}.png")
        assert np.abs(got - bytes_of(x[i])).max() <= 1
    assert (
        cli("sample", *words, "--guidance", 3, *FAST, "--n", 3, "--seed", 5, "--separate", "one", "--batch", 1).code
        == 0
    )
    for i in range(3):
        single, several = (pixels(tmp_path / name / f"{5 + i:06d}.png").astype(int) for name in ("one", "all"))
        assert np.abs(single - several).max() <= 1
    assert cli("sample", "--like", "all/000006.png", "--separate", "again").code == 0
    assert (tmp_path / "again" / "000006.png").read_bytes() == (tmp_path / "all" / "000006.png").read_bytes()
    found = cli("info", "all/000006.png", "--json").json
    assert found["options"]["prompt"] == ["a bat"]
    assert found["options"]["size"] == "16x16"


def test_settings_are_kept_and_repeated(cli, tmp_path, made):
    words = ("--model", made("sd"), "--prompt", "a cat, sleeping: 'red'", "--size", "24x16", "--tiling", *FAST)
    assert cli("sample", *words, "--n", 2, "--guidance-interval", "0.1,3", "--guidance", 4, "--out", "a.png").code == 0
    whole = (tmp_path / "a.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        text = picture.info["parameters"].splitlines()
    assert text[0] == "a cat, sleeping: 'red'"
    assert "Size: 24x16" in text[1]
    assert "CFG scale: 4" in text[1]
    command = shlex.split(cli("info", "a.png", "--json").json["command"])
    assert cli(*command[1:], "--out", "b.png").code == 0
    assert (tmp_path / "b.png").read_bytes() == whole
    assert cli("sample", "--like", "a.png", "--out", "c.png").code == 0
    assert (tmp_path / "c.png").read_bytes() == whole
    assert cli("sample", "--like", "a.png", "--prompt", "a bat", "--out", "d.png").code == 0
    assert (tmp_path / "d.png").read_bytes() != whole


def test_the_guidance_of_the_pipeline_is_kept(cli, made):
    """Without --guidance it is the pipeline's own, which the picture says."""
    run = cli("sample", "--model", made("sd"), "--prompt", "a cat", *FAST, "--json")
    assert run.json["settings"]["options"]["guidance"] == 7.5
    assert run.json["n"] >= 1
    assert run.json["evals"] == 2 * run.json["nfe"]
    flux = cli("sample", "--model", made("flux"), "--prompt", "a cat", "--size", "16", "--steps", 2, "--n", 1, "--json")
    assert flux.json["evals"] == flux.json["nfe"]  # an input of the network, no guidance of two calls
    both = cli("sample", "--model", made("flux"), "--prompt", "a cat", "--negative-prompt", "b", "--true-cfg", 3,
               "--size", "16", "--steps", 2, "--n", 1, "--json")  # fmt: skip
    assert both.json["evals"] == 2 * both.json["nfe"]


def test_picture_to_picture_and_inpainting(cli, tmp_path, made):
    given = np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(given).save(tmp_path / "given.png")
    hole = np.zeros((16, 16), np.uint8)
    hole[:, 8:] = 255
    Image.fromarray(hole).save(tmp_path / "hole.png")
    words = ("--model", made("sd"), "--prompt", "a cat", *FAST, "--n", 1, "--init", "given.png")
    assert cli("sample", *words, "--strength", 0.4, "--separate", "a").code == 0
    assert cli("sample", *words, "--mask", "hole.png", "--separate", "b").code == 0
    painted = pixels(tmp_path / "b" / "000000.png")
    assert np.array_equal(painted[:, :8], given[:, :8])
    assert np.abs(painted[:, 8:].astype(int) - given[:, 8:]).mean() > 10
    assert not np.array_equal(pixels(tmp_path / "a" / "000000.png")[:, :8], given[:, :8])
    den: Any = pfode.load(made("sd"), prompts=["a cat"])
    init = torch.from_numpy(given).permute(2, 0, 1)[None] / 127.5 - 1
    mask = den.cells(torch.from_numpy(hole) / 255)
    x = pfode.sample(den, n=1, steps=3, sampler="ddim", init=den.encode(init)[0], mask=mask, label=0).x
    assert np.abs(bytes_of(den.decode(x)[0])[:, 8:] - painted[:, 8:]).max() <= 1
    assert cli("sample", "--like", "b/000000.png", "--separate", "c").code == 0
    assert (tmp_path / "b" / "000000.png").read_bytes() == (tmp_path / "c" / "000000.png").read_bytes()
    Image.fromarray(255 - hole).save(tmp_path / "hole.png")
    run = cli("sample", "--like", "b/000000.png", "--separate", "d")
    assert run.code == 3
    assert "made with another hole.png" in run.err


def test_inpainting_of_pixels(cli, tmp_path):
    """The shipped digits: what the mask keeps is the picture to the byte, for any sampler."""
    given = np.random.default_rng(3).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(given).save(tmp_path / "given.png")
    Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 4, 1).repeat(8, 0)).save(tmp_path / "hole.png")
    words = ("--n", 4, "--steps", 4, "--init", "given.png", "--mask", "hole.png", "--label", "3")
    for sampler in ("auto", "euler-a", "rk45"):
        run = cli("sample", *(words if sampler != "rk45" else (*words[:2], *words[4:])), "--sampler", sampler,
                  "--separate", sampler, "--json")  # fmt: skip
        assert run.code == 0, run.err
        drawn = [pixels(tmp_path / sampler / f"{i:06d}.png") for i in range(4)]
        for picture in drawn:
            assert np.array_equal(picture[:, :4], given[:, :4])
        assert len({picture.tobytes() for picture in drawn}) == 4
        assert run.json["settings"]["options"]["mask"] == "hole.png"
    strong = cli("sample", *words, "--strength", 0.3, "--separate", "weak", "--json")
    assert strong.json["settings"]["options"]["strength"] == 0.3


def test_fit_and_bench(cli, tmp_path, made):
    words = ("--model", made("sd"), "--prompt", "a cat", "--prompt", "a bat")
    fit = (*words, "--nfe", 3, "--iterations", 1, "--n", 8, "--active", 8, "--check", 8, "--teacher", 8)
    fit = (*fit, "--start", "ipndm3@ddim")
    run = cli("fit", *fit, "--guidance", 2, "--json")
    assert run.code == 0, run.err
    assert run.json["plans"][0]["kept"] is False
    assert cli("fit", *fit, "--guidance", 2, "--json").json["plans"][0]["kept"] is True
    other = cli("fit", *fit, "--guidance", 3)
    assert other.code == 2
    assert "fitted to other prompts, guidance or size" in other.err
    plan = run.json["plans"][0]["file"]
    drawn = cli("sample", *words, "--guidance", 2, "--sampler", plan, "--json")
    assert drawn.code == 0, drawn.err
    assert (drawn.json["nfe"], drawn.json["evals"]) == (3, 6)
    done = cli("bench", *words, "--guidance", 2, "--sampler", "ddim", "--sampler", plan, "--nfe", "6", "--n", 4,
               "--validation", 2, "--teacher", 16, "--json")  # fmt: skip
    assert done.code == 0, done.err
    cells = json.loads((tmp_path / "bench" / "results.json").read_text())["cells"]
    assert {cell["evals"] for cell in cells} == {6}


def test_calibrate_and_info(cli, tmp_path, made):
    words = ("--model", made("sd"), "--prompt", "a cat", "--guidance", 1, "--calibrate", "--steps", 2, "--n", 1)
    first = cli("sample", *words, "--out", "a.png", "--json")
    assert first.code == 0, first.err
    assert (tmp_path / "pipe.calibrated-2-16x16.safetensors").is_file()
    assert first.json["nfe"] == 2
    again = cli("sample", *words, "--out", "b.png")
    assert "nothing to calibrate" in again.err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    found = cli("info", made("sd"), "--json").json
    assert found["pipeline"] == "StableDiffusionPipeline"
    assert found["process"]["name"] == "VPDiscrete"
    assert "UNet2DConditionModel" in found["unet"]
    assert cli("info", made("flux")).code == 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("", 3, "--prompt"),
        ("--size 20", 2, "--prompt"),
        ("--prompt a --size 15x15", 2, "--size 16x16"),
        ("--prompt a --size big", 2, "--size: need width x height in pixels"),
        ("--prompt a --size 0x8", 2, "--size: need width x height"),
        ("--prompt a --label 3", 2, "--label: is a class"),
        ("--prompt a --guidance 2 --negative cat", 2, "--negative-prompt"),
        ("--prompt a --guidance 1 --negative-prompt b", 2, "no classifier-free guidance"),
        ("--prompt a --true-cfg 3", 2, "true_cfg: is of Flux"),
        ("--prompt a --variant ema", 0, ""),
        ("--prompt a --mask hole.png", 2, "--mask does nothing without --init"),
        ("--prompt a --init given.png --mask small.png", 3, "small.png: 8x8 pixels, given.png has 16x16"),
        ("--prompt a --init none.png", 3, "none.png"),
        ("--model digits --prompt a", 2, "takes no prompt"),
        ("--model tests.scores.tiny:unet --prompt a", 2, "a denoiser of your own takes no prompt"),
        ("--guidance 3 --prompt a --base nowhere", 2, "nowhere"),
    ],
)
def test_mistakes(cli, tmp_path, made, words, code, message):
    for name, side in (("given", 16), ("small", 8), ("hole", 16)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    first = () if "--model" in words else ("--model", made("sd"))
    run = cli("sample", *first, *shlex.split(words), *FAST, "--n", 1)
    assert run.code == code, run.err
    assert message in run.err
    assert "Traceback" not in run.err
    if code:
        assert "hint" in run.err.lower() or "none.png" in words
        assert not (tmp_path / "sheet.png").exists()


def test_a_prompt_that_cannot_be_kept(cli, made):
    run = cli("sample", "--model", made("sd"), "--prompt", "a\ncat", *FAST)
    assert run.code == 2
    assert "one line of text" in run.err
