"""Files that are not what they should be are called what they are; what training scripts leave is read."""

import importlib
import json
import os
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pfode
from pfode.errors import FileError, UsageError
from pfode.scores import save
from pfode.scores.io.find import model_path
from tests.cli.conftest import cli as cli
from tests.scores import tiny
from tests.scores.small import denoiser

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))

SINGLE: dict[str, tuple[list[str], str]] = {
    "sd": (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.x", "first_stage_model.y"],
           "a single-file checkpoint of Stable Diffusion'"),
    "sdxl": (["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x"], "Stable Diffusion XL"),
    "sd3": (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3"),
    "flux": (["double_blocks.0.img_attn.x", "single_blocks.0.x"], "Flux"),
    "lora": (["unet.down_blocks.0.attn.to_q.lora_A.weight"], "LoRA"),
    "kohya": (["lora_unet_down_blocks_0.lora_up.weight"], "LoRA"),
    "network": (["down_blocks.0.x", "conv_in.weight"], "the weights of a network of diffusers"),
    "vae": (["encoder.conv_in.weight", "decoder.conv_in.weight"], "autoencoder"),
    "unknown": (["some.weight"], "not a pfode model"),
}  # fmt: skip


@pytest.mark.parametrize(("names", "what"), SINGLE.values(), ids=SINGLE)
def test_single_files_are_called_what_they_are(names, what, tmp_path, cli):
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(FileError) as caught:
        pfode.load(tmp_path / "x.safetensors")
    assert what.rstrip("'") in caught.value.message
    assert caught.value.hint
    told = cli("info", tmp_path / "x.safetensors")
    assert told.code == 0
    if what != "not a pfode model":
        assert what.rstrip("'") in told.out


@pytest.mark.parametrize(
    "raw", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", b"\xff\xd8\xff\xe0" + bytes(50)]
)
@pytest.mark.parametrize("words", [["info"], ["sample", "--model"]])
def test_pointers_and_pictures_given_as_models(raw, words, tmp_path, cli):
    (tmp_path / "x.safetensors").write_bytes(raw)
    run = cli(*words, tmp_path / "x.safetensors")
    assert run.code == 3
    assert "Git LFS" in run.err or "a JPEG picture" in run.err or "a damaged one" in run.err


def test_eight_bit_and_meta_weights_are_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match="float8_e4m3fn is none that weights are kept in"):
        save(denoiser(), tmp_path / "a.safetensors", card={}, dtype=torch.float8_e4m3fn)
    den = denoiser()
    with pytest.raises(UsageError, match="on the meta device"):
        save(den.with_network(den.net.to("meta")), tmp_path / "a.safetensors", card={})
    assert not list(tmp_path.iterdir())


def test_a_folder_of_eight_bit_weights(tmp_path):
    tiny.unet().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = importlib.import_module("safetensors.torch").load_file(file)
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}, file)
    with pytest.raises(FileError, match="dtype F8_E4M3, expected one of"):
        pfode.load(tmp_path, process=pfode.VP())


def test_ema_folders_of_training_scripts(tmp_path):
    ema: Any = importlib.import_module("diffusers.training_utils").EMAModel
    net = tiny.unet()
    average = ema(net.parameters(), decay=0.99, use_ema_warmup=True, model_cls=type(net), model_config=net.config)
    place = tmp_path / "run" / "checkpoint-500" / "unet_ema"
    average.save_pretrained(place)
    assert {"decay", "inv_gamma", "optimization_step"} <= set(json.loads((place / "config.json").read_text()))
    with pytest.raises(FileError, match=r"no scheduler_config\.json"):
        pfode.load(place)
    loaded = pfode.load(place, process=pfode.VP(), prediction="eps")
    torch.testing.assert_close(loaded.net(X, torch.tensor([3.0, 3.0])), net(X, torch.tensor([3.0, 3.0])).sample)
    tiny.scheduler("DDPMScheduler").save_pretrained(tmp_path / "run" / "scheduler")
    for folder in (place, place.parent):  # the averaged network alone, and the checkpoint that holds it
        found = pfode.load(folder)
        assert isinstance(found.process, pfode.VPDiscrete)
        torch.testing.assert_close(found.net(X, torch.tensor([3.0, 3.0])), net(X, torch.tensor([3.0, 3.0])).sample)


def test_a_field_of_ema_with_another_content_is_still_unknown(tmp_path):
    tiny.unet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "decay": "a word"}))
    with pytest.raises(FileError, match="unknown field 'decay'"):
        pfode.load(tmp_path, process=pfode.VP())


@pytest.mark.parametrize(
    "shard",
    [
        "a\0b.safetensors",
        "",
        ".",
        "..",
        "a/b.safetensors",
        "/dev/zero",
        "a\nb.safetensors",
        "\u202ea.safetensors",
        "pipe.safetensors",
        "zero.safetensors",
        5,
        None,
    ],
)
def test_names_of_shards_that_are_none(shard, tmp_path, cli):
    tiny.unet().save_pretrained(tmp_path)
    os.remove(tmp_path / "diffusion_pytorch_model.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.symlink("/dev/zero", tmp_path / "zero.safetensors")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": shard}}))
    with pytest.raises(FileError) as caught:
        pfode.load(tmp_path, process=pfode.VP())
    assert caught.value.message.isprintable()
    assert cli("info", tmp_path).code == 3


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"])
def test_parts_of_a_folder_that_are_no_files(name, tmp_path, cli):
    tiny.unet().save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(FileError, match="is a pipe"):
        pfode.load(tmp_path, process=None if name == "scheduler_config.json" else pfode.VP())
    if name != "scheduler_config.json":
        assert cli("info", tmp_path).code == 3


@pytest.mark.parametrize("name", ["pipe.safetensors", "pipe.pkl", "pipe", "/dev/zero", "loop"])
def test_models_that_are_no_files(name, tmp_path, cli):
    for pipe in ("pipe.safetensors", "pipe.pkl", "pipe"):
        os.mkfifo(tmp_path / pipe)
    os.symlink("loop", tmp_path / "loop")
    with pytest.raises(FileError, match="cannot be read"):
        pfode.load(tmp_path / name)
    for words in (["info"], ["sample", "--model"]):
        assert cli(*words, tmp_path / name).code == 3


@pytest.mark.parametrize("name", ["two\nlines", os.fsdecode(b"\xff\xfe"), "\x1b[31m", "-", "a b", "x.plan"])
def test_what_was_written_under_any_name_is_found(name, tmp_path):
    file = save(denoiser(), tmp_path / f"{name}.safetensors", card={"source": name})
    assert model_path(file) == file
    assert pfode.load(file).shape == (1, 8, 8)
    plan = pfode.make_plan("heun", process=pfode.EDM(), steps=2).save(tmp_path / f"{name}.plan-3.safetensors")
    assert list(pfode.load(file).plans) == [3]
    assert pfode.Plan.load(plan).nfe == 3


@pytest.mark.parametrize("model", [5, None, 1.5, ["a"]])
def test_a_model_that_is_no_name(model):
    with pytest.raises(UsageError, match="expected a name or a path"):
        pfode.load(model)
