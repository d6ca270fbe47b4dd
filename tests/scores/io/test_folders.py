"""Folders of diffusers: what is sound gives what diffusers itself computes, what is damaged is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pfode
from pfode.errors import FileError, UsageError
from pfode.fields import REQUIRED
from pfode.scores.networks.diffusers import DIT, UNET
from tests.scores import tiny
from tests.scores.tiny import diffusers

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers under numpy 2

STEM = "diffusion_pytorch_model"
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LATENT = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A DDPM pipeline as diffusers saves it."""
    folder = tmp_path_factory.mktemp("saved") / "ddpm"
    diffusers.DDPMPipeline(tiny.unet(), tiny.scheduler("DDIMScheduler", clip_sample=False)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved_dit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "dit"
    tiny.dit_pipeline().save_pretrained(folder)
    write_fields(folder / INDEX, id2label={str(i): f"class {i}, number {i}" for i in range(1000)})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


# ---- sound folders


def steps_of(scheduler: Any, model: Any, x: torch.Tensor, n: int) -> torch.Tensor:
    """The loop of diffusers' pipelines."""
    scheduler.set_timesteps(n)
    x = x * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else x
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        with torch.no_grad():
            out = model(seen, t.expand(len(x)), return_dict=False)[0]
        x = scheduler.step(out, t, x, return_dict=False)[0]
    return x


def grid_of(scheduler: Any, process: pfode.Process, n: int) -> torch.Tensor:
    """The same times, as the process has them."""
    scheduler.set_timesteps(n)
    if isinstance(process, pfode.VPDiscrete):
        return torch.cat([scheduler.timesteps.double(), torch.tensor([-1.0], dtype=torch.float64)])
    return scheduler.sigmas.double()


VP = {"clip_sample": False}
SOUND: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", VP, {"sampler": "ddim"}),
    "ddim-cosine": ("DDIMScheduler", {**VP, "beta_schedule": "squaredcos_cap_v2"}, {"sampler": "ddim"}),
    "ddim-v": ("DDIMScheduler", {**VP, "prediction_type": "v_prediction"}, {"sampler": "ddim"}),
    "ddim-x0": ("DDIMScheduler", {**VP, "prediction_type": "sample"}, {"sampler": "ddim"}),
    "dpm++2m": (
        "DPMSolverMultistepScheduler",
        {"beta_schedule": "scaled_linear"},
        {"sampler": "dpm++2m", "lower_order_final": True},
    ),
    "edm": ("EDMEulerScheduler", {"sigma_max": 40.0, "sigma_data": 0.7}, {"sampler": "euler"}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {"sampler": "euler"}),
}


@pytest.mark.parametrize(("name", "changes", "options"), SOUND.values(), ids=SOUND)
def test_sampling_equals_diffusers(tmp_path, name, changes, options):
    scheduler = tiny.scheduler(name, **changes)
    diffusers.DDPMPipeline(tiny.unet(), scheduler).save_pretrained(tmp_path / "m")
    net = pfode.load(tmp_path / "m")
    assert net.shape == (3, 8, 8)
    assert net.labels is None
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "m" / "unet")
    wanted = steps_of(scheduler, theirs, X, 6)
    grid = grid_of(scheduler, net.process, 6)
    start = X * scheduler.init_noise_sigma if name.startswith("EDM") else X
    got = pfode.sample(net, x=start, grid=grid, **options).x
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["DDPMScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler"])
def test_the_process_is_that_of_the_scheduler(tmp_path, name):
    scheduler = tiny.scheduler(name, beta_end=0.015)
    diffusers.DDPMPipeline(tiny.unet(), scheduler).save_pretrained(tmp_path / "m")
    process = pfode.load(tmp_path / "m").process
    alphas = torch.tensor(process.config()["alphas_cumprod"], dtype=torch.float32)
    torch.testing.assert_close(alphas, scheduler.alphas_cumprod, rtol=1e-6, atol=0)


@pytest.mark.parametrize("base", ["DDIMScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_our_own_scheduler_states_what_it_was_made_from(tmp_path, base):
    changes = {"shift": 3.0} if base.startswith("Flow") else {}
    scheduler = tiny.scheduler(base, **changes)
    diffusers.DDPMPipeline(tiny.unet(), scheduler).save_pretrained(tmp_path / "theirs")
    own = pfode.samplers.PFODEScheduler.from_config(scheduler.config)
    diffusers.DDPMPipeline(tiny.unet(), own).save_pretrained(tmp_path / "ours")
    a, b = pfode.load(tmp_path / "theirs"), pfode.load(tmp_path / "ours")
    assert a.process.config() == b.process.config()
    assert (a.prediction, a.time_scale) == (b.prediction, b.time_scale)


def test_classes_without_a_null_class(tmp_path):
    net = tiny.unet(num_class_embeds=3)
    diffusers.DDPMPipeline(net, tiny.scheduler("DDPMScheduler")).save_pretrained(tmp_path / "m")
    den = pfode.load(tmp_path / "m")
    assert den.labels == ("0", "1", "2")
    t = torch.tensor(500.0)
    labels = torch.tensor([2, 0])
    eps = net(X, 500, class_labels=labels, return_dict=False)[0]
    alpha, sigma = den.process.alpha(500.0), den.process.sigma(500.0)
    torch.testing.assert_close(den(X, t, label=labels), (X - sigma * eps) / alpha, rtol=1e-5, atol=1e-5)
    for missing in (None, 3):
        with pytest.raises(UsageError, match="always needs a class"):
            den(X, t, label=missing)


def test_dit_with_guidance_and_pictures(saved_dit):
    pipe = tiny.dit_pipeline()
    net: Any = pfode.load(saved_dit)
    assert net.shape == (4, 4, 4)
    assert net.labels[:2] == ("class 0", "class 1")
    assert len(net.labels) == 1000
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    wanted = pipe([3, 7], guidance_scale=4.0, num_inference_steps=4, output_type="pt",
                  generator=torch.Generator().manual_seed(5)).images  # fmt: skip
    grid = grid_of(pipe.scheduler, net.process, 4)
    got = pfode.sample(net, x=noise, sampler="ddim", grid=grid, label=["class 3", 7], guidance=4.0)
    torch.testing.assert_close(net.decode(got.x) / 2 + 0.5, wanted, rtol=0, atol=2e-5)
    with pytest.raises(UsageError, match=r"decode: need samples of shape \(n, 4, 4, 4\)"):
        net.decode(got.x[0])


def test_shards_variants_and_components(tmp_path, saved):
    whole = pfode.load(saved)
    t = torch.tensor(300.0)
    model = tiny.unet()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 1
    shutil.copy(saved / "scheduler" / "scheduler_config.json", tmp_path / "shards")
    assert torch.equal(pfode.load(tmp_path / "shards")(X, t), whole(X, t))
    model.save_pretrained(tmp_path / "v" / "unet", variant="fp16")
    shutil.copytree(saved / "scheduler", tmp_path / "v" / "scheduler")
    assert torch.equal(pfode.load(tmp_path / "v")(X, t), whole(X, t))
    assert torch.equal(pfode.load(saved / "unet")(X, t), whole(X, t))
    shutil.rmtree(tmp_path / "v" / "scheduler")
    alone = pfode.load(tmp_path / "v" / "unet", process=whole.process, prediction="eps")
    assert torch.equal(alone(X, t), whole(X, t))
    flow = pfode.load(tmp_path / "v" / "unet", process=pfode.Flow())
    assert (flow.prediction, flow.time_scale) == ("flow", 1000)
    with pytest.raises(FileError, match="what noise the network was trained for is not known"):
        pfode.load(tmp_path / "v" / "unet")
    with pytest.raises(UsageError, match="are stated by"):
        pfode.load(saved, process=whole.process)


def test_the_oldest_pipelines(tmp_path, saved):
    """No subfolders, and weights of attention under their names before diffusers 0.18."""
    flat = tmp_path / "flat"
    shutil.copytree(saved / "unet", flat)
    shutil.copy(saved / SCHEDULER, flat)
    shutil.copy(saved / INDEX, flat)
    tensors = load_file(flat / f"{STEM}.safetensors")
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {name.replace(f".{new}.", f".{old}."): value for name, value in tensors.items()}
    assert "mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, flat / f"{STEM}.safetensors")
    t = torch.tensor(300.0)
    assert torch.equal(pfode.load(flat)(X, t), pfode.load(saved)(X, t))
    save_file({**tensors, "mid_block.attentions.0.to_q.bias": torch.zeros(16)}, flat / f"{STEM}.safetensors")
    with pytest.raises(FileError, match="appears twice"):
        pfode.load(flat)


def test_half_precision_folders(tmp_path, saved):
    tiny.unet().half().save_pretrained(tmp_path / "m" / "unet")
    shutil.copytree(saved / "scheduler", tmp_path / "m" / "scheduler")
    den = pfode.load(tmp_path / "m", dtype=torch.float16)
    assert den.dtype == torch.float16
    torch.testing.assert_close(
        den(X, torch.tensor(300.0)), pfode.load(saved)(X, torch.tensor(300.0)), rtol=0.1, atol=0.1
    )


def test_a_folder_becomes_one_file(tmp_path, saved, saved_dit):
    for source, x, cond in ((saved, X, {}), (saved_dit, LATENT, {"label": torch.tensor([1, 1000])})):
        net = pfode.load(source)
        file = pfode.scores.save(net, tmp_path / "one.safetensors", card={"name": "one"}, dtype=torch.float32)
        again = pfode.load(file)
        t = torch.tensor(300.0)
        assert torch.equal(again(x, t, **cond), net(x, t, **cond))
        assert again.process == net.process


def test_other_pipelines_are_pointed_to_from_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(FileError, match="_class_name: 'StableDiffusionPipeline' is none of") as error:
        pfode.load(tmp_path)
    assert "from_pipeline" in error.value.hint


# ---- damaged folders


UNET_FILE, UNET_CONFIG = f"unet/{STEM}.safetensors", "unet/config.json"
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
TENSORS = (
    "conv_in.weight", "time_embedding.linear_1.bias", "down_blocks.0.resnets.0.conv1.weight",
    "mid_block.attentions.0.to_q.weight", "up_blocks.1.resnets.0.norm1.weight", "conv_out.bias",
)  # fmt: skip


def spoilt(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.flatten()[-1] = value
        return tensor

    return change


CHANGES: dict[str, Any] = {
    "missing": (lambda t: None, "is missing"),
    "longer": (lambda t: torch.cat([t, t]), "shape"),
    "flat": (lambda t: t[None], "shape"),
    "integer": (lambda t: t.to(torch.int32), "dtype I32"),
    "bool": (lambda t: t > 0, "dtype BOOL"),
    "double": (lambda t: t.double(), "dtype F64, the others have F32"),
    "half": (lambda t: t.half(), "dtype F16, the others have F32"),
    "nan": (spoilt(float("nan")), "not finite"),
    "inf": (spoilt(float("inf")), "not finite"),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("kind", CHANGES)
def test_damaged_tensors(folder, name, kind):
    change, message = CHANGES[kind]
    tensors = load_file(folder / UNET_FILE)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed.contiguous()}, folder / UNET_FILE)
    refused(folder, UNET_FILE, f"tensor {name!r}", message)


@pytest.mark.parametrize("name", TENSORS)
def test_renamed_and_extra_tensors(folder, name):
    tensors = load_file(folder / UNET_FILE)
    save_file({**tensors, f"{name}.more": torch.zeros(1)}, folder / UNET_FILE)
    refused(folder, UNET_FILE, f"tensor '{name}.more'", "is unknown")
    tensors[name.replace(".", "_")] = tensors.pop(name)
    save_file(tensors, folder / UNET_FILE)
    refused(folder, UNET_FILE, "tensor", "is missing")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
def test_truncated_weights(folder, share):
    raw = (folder / UNET_FILE).read_bytes()
    (folder / UNET_FILE).write_bytes(raw[: int(len(raw) * share)])
    refused(folder, UNET_FILE)


@pytest.mark.parametrize("seed", range(24))
def test_flipped_bits_of_the_header(folder, seed):
    raw = bytearray((folder / UNET_FILE).read_bytes())
    first, last = raw.index(b"conv_in.bias"), raw.rindex(b"}}")
    generator = torch.Generator().manual_seed(seed)
    place, bit = int(torch.randint(first, last, (), generator=generator)), seed % 7
    raw[place] ^= 1 << bit
    (folder / UNET_FILE).write_bytes(raw)
    refused(folder, UNET_FILE)


def write_fields(file: Path, remove: str | None = None, **changes: Any) -> None:
    config = json.loads(file.read_text())
    config.pop(remove, None)
    file.write_text(json.dumps({**config, **changes}))


JUNK: dict[str, Any] = {"object": {"a": 1}, "word": "no such word", "nested": [[]], "negative": -1, "nan": float("nan")}


@pytest.mark.parametrize("field", UNET)
@pytest.mark.parametrize("junk", JUNK)
def test_broken_fields_of_the_network(folder, field, junk):
    write_fields(folder / UNET_CONFIG, **{field: JUNK[junk]})
    refused(folder, UNET_CONFIG, field)


@pytest.mark.parametrize("field", [field for field, one in UNET.items() if one.default is REQUIRED])
def test_missing_fields_of_the_network(folder, field):
    write_fields(folder / UNET_CONFIG, field)
    refused(folder, UNET_CONFIG, f"no {field!r}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_chanels": [8, 16]}, "unknown field 'block_out_chanels'"),
        ({"block_out_channels": [8, 16, 16]}, "down_block_types: 2 for 3 block_out_channels"),
        ({"block_out_channels": [8, 10]}, "norm_num_groups: 4 does not divide the width 10"),
        ({"norm_num_groups": 3}, "norm_num_groups"),
        ({"attention_head_dim": 5}, "attention_head_dim: 5 does not divide"),
        ({"layers_per_block": 10**9}, "layers_per_block"),
        ({"block_out_channels": [8, 10**9]}, "block_out_channels"),
        ({"down_block_types": ["DownBlock2D", "os.system"]}, "down_block_types"),
        ({"out_channels": 5}, "out_channels: 5 for in_channels = 3"),
        ({"act_fn": "__import__"}, "act_fn"),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name"),
        ({"_class_name": ["UNet2DModel"]}, "_class_name"),
        ({"_class_name": "AutoencoderKL"}, "_class_name"),
        ({"add_attention": False}, None),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, None),
        ({"in_channels": 4}, "out_channels: 3 for in_channels = 4"),
        ({"layers_per_block": 2}, None),
        ({"num_class_embeds": 10}, None),
    ],
    ids=str,
)
def test_networks_that_do_not_fit(folder, change, message):
    write_fields(folder / UNET_CONFIG, **change)
    if message is None:  # a sound configuration, of which the weights are not
        refused(folder, "unet/", "tensor")
    else:
        refused(folder, UNET_CONFIG, message)


@pytest.mark.parametrize("junk", ["object", "nested", "negative", "nan"])
@pytest.mark.parametrize(
    "field", ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
              "rescale_betas_zero_snr", "steps_offset", "timestep_spacing"],
)  # fmt: skip
def test_broken_fields_of_the_scheduler(folder, field, junk):
    write_fields(folder / SCHEDULER, **{field: JUNK[junk]})
    refused(folder, SCHEDULER, field)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("DDIMScheduler", {"beta_strat": 0.1}, "unknown field 'beta_strat'"),
        ("DDIMScheduler", {"beta_start": None}, "no 'beta_start'"),
        ("DDIMScheduler", {"beta_schedule": None}, "no 'beta_schedule'"),
        ("DDIMScheduler", {"beta_start": 0.5, "beta_end": 0.1}, "beta_start: need"),
        ("DDIMScheduler", {"trained_betas": [0.1, 0.2]}, "trained_betas: 2 values"),
        ("DDIMScheduler", {"trained_betas": [0.0] * 1000}, "trained_betas: the noise must grow"),
        ("DDIMScheduler", {"_class_name": "UnCLIPScheduler"}, "_class_name"),
        ("DDIMScheduler", {"_class_name": None}, "_class_name"),
        ("DDIMScheduler", {"prediction_type": "flow"}, "prediction_type"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type"),
        ("EulerDiscreteScheduler", {"_class_name": "DDIMScheduler"}, "_class_name"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "prediction_type"),
        ("EDMEulerScheduler", {"sigma_min": 90.0}, "sigma_min"),
        ("EDMEulerScheduler", {"sigma_data": 0}, "sigma_data"),
        ("EDMEulerScheduler", {"sigma_max": None}, "sigma_max"),
        ("EDMEulerScheduler", {"prediction_type": "v_prediction"}, "prediction_type"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 0}, "shift"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas"),
        ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 2.5}, "num_train_timesteps"),
    ],
    ids=str,
)
def test_schedulers_that_cannot_be(folder, name, change, message):
    tiny.scheduler(name).save_pretrained(folder / "scheduler")
    write_fields(folder / INDEX, scheduler=["diffusers", name])
    write_fields(folder / SCHEDULER, **change)
    refused(folder, SCHEDULER, message)


@pytest.mark.parametrize("file", [UNET_CONFIG, SCHEDULER, INDEX])
@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"_class_name": "A", "_class_name": "B"}', b"{}"],
    ids=["empty", "open", "list", "null", "utf-16", "deep", "twice", "bare"],
)
def test_broken_json(folder, file, text):
    (folder / file).write_bytes(text)
    refused(folder, file)


@pytest.mark.parametrize("file", [UNET_CONFIG, SCHEDULER, UNET_FILE])
def test_missing_files(folder, file):
    (folder / file).unlink()
    refused(folder, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "NoPipeline"}, "_class_name"),
        ({"_class_name": None}, "_class_name"),
        ({"unet": None}, "unet"),
        ({"unet": ["diffusers"]}, "unet"),
        ({"unet": "UNet2DModel"}, "unet"),
        ({"scheduler": [1, 2]}, "scheduler"),
    ],
    ids=str,
)
def test_broken_pipelines(folder, change, message):
    write_fields(folder / INDEX, **change)
    refused(folder, INDEX, message)


def test_pickles_are_refused(folder):
    torch.save(load_file(folder / UNET_FILE), folder / "unet" / f"{STEM}.bin")
    (folder / UNET_FILE).unlink()
    refused(folder, f"unet/{STEM}.bin", "is a pickle")


@pytest.fixture
def sharded(folder):
    (folder / UNET_FILE).unlink()
    tiny.unet().save_pretrained(folder / "unet", max_shard_size="20KB")
    return folder


SHARDS = f"unet/{STEM}.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {}, "weight_map"),
        (lambda m: None, "weight_map"),
        (lambda m: {**m, "conv_in.weight": "../../secret.safetensors"}, "no name of a safetensors file"),
        (lambda m: {**m, "conv_in.weight": "evil.bin"}, "no name of a safetensors file"),
        (lambda m: {**m, "conv_in.weight": 3}, "no name of a safetensors file"),
        (lambda m: {**m, "conv_in.weight": "nowhere.safetensors"}, "'conv_in.weight'"),
        (lambda m: {**m, "extra.weight": next(iter(m.values()))}, "'extra.weight' is missing"),
        (lambda m: {k: v for k, v in m.items() if k != "conv_in.weight"}, "does not place it here"),
    ],
    ids=range(8),
)
def test_broken_shards(sharded, change, message):
    index = json.loads((sharded / SHARDS).read_text())
    (sharded / SHARDS).write_text(json.dumps({**index, "weight_map": change(index["weight_map"])}))
    refused(sharded, "unet/", message)


def test_a_missing_shard(sharded):
    first = min((sharded / "unet").glob("*-of-*.safetensors"))
    first.unlink()
    refused(sharded, f"unet/{first.name}")


@pytest.mark.parametrize("field", DIT)
def test_broken_fields_of_dit(saved_dit, tmp_path, field):
    folder = Path(shutil.copytree(saved_dit, tmp_path / "model"))
    change: dict[str, Any] = {field: {"a": 1}}
    write_fields(folder / "transformer" / "config.json", **change)
    refused(folder, "transformer/config.json", field)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor"),
        ("vae/config.json", {"latent_channels": 8}, None),
        ("vae/config.json", {"latents_mean": [1.0]}, "latents_mean"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "_class_name"),
        ("transformer/config.json", {"patch_size": 3}, "patch_size"),
        ("transformer/config.json", {"num_embeds_ada_norm": 999}, None),
        ("transformer/config.json", {"norm_type": "layer_norm"}, "norm_type"),
        (INDEX, {"id2label": {"0": "only one"}}, "id2label"),
        (INDEX, {"id2label": 5}, "id2label"),
        (INDEX, {"vae": None}, "vae"),
    ],
    ids=str,
)
def test_broken_dit(saved_dit, tmp_path, file, change, message):
    folder = Path(shutil.copytree(saved_dit, tmp_path / "model"))
    write_fields(folder / file, **change)
    refused(folder, Path(file).parent.name if message is None else file, message or "tensor")


def test_dit_saved_by_its_older_name(saved_dit, tmp_path):
    folder = Path(shutil.copytree(saved_dit, tmp_path / "model"))
    before: dict[str, Any] = {
        "_class_name": "Transformer2DModel",
        "num_vector_embeds": None,
        "cross_attention_dim": None,
    }
    write_fields(folder / "transformer" / "config.json", **before)
    write_fields(folder / INDEX, transformer=["diffusers", "Transformer2DModel"])
    cond = {"label": torch.tensor([1, 2])}
    t = torch.tensor(300.0)
    assert torch.equal(pfode.load(folder)(LATENT, t, **cond), pfode.load(saved_dit)(LATENT, t, **cond))


def refused(folder: Path, file: str, *words: str) -> None:
    """Loading ends in one FileError that names the file and says these words."""
    with pytest.raises(FileError) as error:
        pfode.load(folder)
    message = error.value.message
    for word in (file, *words):
        assert word in message, message
    assert "\n" not in message
