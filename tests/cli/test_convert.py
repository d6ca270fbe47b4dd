"""Models of diffusers and EDM on the command line: convert, info and sample."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pfode
from pfode.header import read_header
from tests.scores import pickled, tiny
from tests.scores.io.test_pickles import call
from tests.scores.tiny import diffusers

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))

UNSEEN = pytest.mark.filterwarnings("ignore::pfode.errors.UnseenLabelWarning")  # EDM hides no labels in training


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder of diffusers, a DiT one, and a pickle of EDM."""
    folder = tmp_path_factory.mktemp("models")
    diffusers.DDPMPipeline(tiny.unet(), tiny.scheduler("DDPMScheduler")).save_pretrained(folder / "ddpm")
    tiny.dit_pipeline().save_pretrained(folder / "dit")
    net = pickled.network("ddpm++", in_channels=3, out_channels=3)
    pickled.snapshot(folder / "edm.pkl", net, "EDMPrecond")
    return folder


def pixels(file: str) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture).astype(float)


@pytest.mark.parametrize("name", ["ddpm", "edm.pkl"])
def test_convert(cli, models, name):
    run = cli("convert", models / name, "one.safetensors", "--licence", "MIT", "--json")
    assert run.code == 0
    source, again = pfode.load(models / name), pfode.load("one.safetensors")
    cond = {"label": torch.tensor([1, 3])} if again.labels else {}
    t = torch.tensor(2.0)
    assert torch.equal(again(X, t, **cond), source(X, t, **cond))
    header = read_header("one.safetensors")
    assert run.json["digest"] == header.metadata["pfode.digest"]
    assert run.json["parameters"] == sum(p.numel() for p in source.net.state_dict().values())
    config = header.config("pfode.config")
    assert (config["name"], config["licence"], config["source"]) == ("one", "MIT", name)
    assert cli("info", "one.safetensors", "--verify").code == 0


@UNSEEN
def test_convert_to_another_dtype_and_from_our_own(cli, models):
    assert cli("convert", models / "edm.pkl", "half.safetensors", "--dtype", "bf16").code == 0
    assert cli("info", "half.safetensors", "--json").json["dtypes"] == ["BF16"]
    assert cli("convert", "half.safetensors", "again.safetensors").out == "again.safetensors\n"
    assert cli("info", "again.safetensors", "--json").json["dtypes"] == ["BF16"]
    run = cli("convert", models / "dit", "dit.safetensors")
    assert run.code == 0
    assert "autoencoder" in run.err
    assert pfode.load("dit.safetensors").shape == (4, 4, 4)


def test_what_a_file_says_of_its_licence_and_data_goes_with_it(cli):
    assert cli("convert", "digits", "half.safetensors", "--dtype", "bf16").code == 0
    before, after = (cli("info", name, "--json").json for name in ("digits", "half.safetensors"))
    assert before["licence"]
    for key in ("licence", "data", "command", "training", "labels"):
        assert after[key] == before[key]
    assert (after["name"], after["source"]) == ("half", "digits")
    assert cli("convert", "half.safetensors", "again.safetensors", "--licence", "MIT").code == 0
    assert cli("info", "again.safetensors", "--json").json["licence"] == "MIT"


def test_info(cli, models):
    found = cli("info", models / "ddpm", "--json").json
    assert (found["kind"], found["pipeline"], found["scheduler"]) == (
        "diffusers folder",
        "DDPMPipeline",
        "DDPMScheduler",
    )
    assert (found["architecture"]["name"], found["prediction"]) == ("UNet2DModel", "eps")
    assert found["parameters"] == sum(p.numel() for p in tiny.unet().parameters())
    text = cli("info", models / "ddpm").out
    assert "VPDiscrete" in text
    assert max(map(len, text.splitlines())) < 220
    found = cli("info", models / "edm.pkl", "--json").json
    assert (found["kind"], found["architecture"]["name"], found["classes"]) == ("network pickle", "SongUNet", 3)
    assert found["process"] == {"name": "EDM", "sigma_min": 0.002, "sigma_max": 80.0}
    assert cli("info", models / "dit", "--json").json["autoencoder"] == "vae"
    run = cli("info", models / "ddpm", "--verify")
    assert (run.code, "has no digest" in run.err) == (2, True)


@UNSEEN
@pytest.mark.parametrize("name", ["ddpm", "edm.pkl"])
def test_sample(cli, models, name):
    assert cli("sample", "--model", models / name, "--steps", 2, "--n", 4, "--out", "a.png", "--scale", 1).code == 0
    assert cli("sample", "--like", "a.png", "--out", "b.png").code == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert cli("convert", models / name, "one.safetensors").code == 0
    other = cli("sample", "--like", "a.png", "--model", "one.safetensors", "--out", "c.png")
    assert other.code == 0
    assert np.array_equal(pixels("a.png"), pixels("c.png"))


def test_latents_become_pictures(cli, models):
    words = ["sample", "--model", models / "dit", "--steps", 2, "--label", "3", "--guidance", 2, "--n", 2]
    assert cli(*words, "--separate", "many", "--out", "a.png", "--trajectory", "a.gif").code == 0
    net: Any = pfode.load(models / "dit")
    drawn = pfode.sample(net, n=2, steps=2, label=3, guidance=2.0).x
    wanted = ((net.decode(drawn)[1] + 1) * 127.5).permute(1, 2, 0).numpy()
    found = pixels("many/000001.png")
    assert found.shape == (8, 8, 3)
    assert np.abs(found - wanted).max() <= 1
    Image.new("RGB", (8, 8)).save("init.png")
    begun = cli(*words, "--init", "init.png", "--separate", "begun", "--out", "b.png")
    assert begun.code == 0, begun.err
    assert np.abs(pixels("begun/000001.png").astype(int) - found.astype(int)).max() > 1


@UNSEEN
def test_a_changed_model_is_noticed(cli, models, tmp_path):
    pickled.snapshot(tmp_path / "net.pkl", pickled.network("ddpm++", in_channels=3, out_channels=3), "EDMPrecond")
    assert cli("sample", "--model", "net.pkl", "--steps", 2, "--n", 1, "--out", "a.png").code == 0
    pickled.snapshot(tmp_path / "net.pkl", pickled.network("ddpm++", in_channels=3, out_channels=3), "VEPrecond")
    run = cli("sample", "--like", "a.png", "--out", "b.png")
    assert (run.code, "made with another net.pkl" in run.err) == (3, True)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["evil.pkl", "a.safetensors"], 3, "evil.pkl: not a network pickle: it asks for 'os.system'"),
        (["broken", "a.safetensors"], 3, "config.json: broken JSON"),
        (["empty", "a.safetensors"], 3, "is a folder without model_index.json"),
        (["weights.bin", "a.safetensors"], 3, "is a pickle, which can run any code"),
        (["nothing.safetensors", "a.safetensors"], 3, "no such file"),
        (["nothing", "a.safetensors"], 2, "unknown model 'nothing'"),
        (["nobody/nothing", "a.safetensors"], 4, "cannot be reached"),
        (["digits", "a.pt"], 2, "the file is a safetensors file"),
        (["digits", "none/a.safetensors"], 7, "cannot be written"),
        (["digits"], 2, "Missing argument"),
        (["digits", "a.safetensors", "--dtype", "int8"], 2, "int8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors(cli, tmp_path, monkeypatch, words, code, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "evil.pkl").write_bytes(call("os", "system", "touch canary"))
    (tmp_path / "weights.bin").write_bytes(b"x")
    for name in ("broken", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    before = set(os.listdir(tmp_path))
    run = cli("convert", *words)
    assert (run.code, run.out) == (code, "")
    assert message in run.err
    assert "Traceback" not in run.err
    assert set(os.listdir(tmp_path)) - before <= {"cache"}
