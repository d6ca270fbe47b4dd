"""Pipelines under prompts from the disk: `pfode.load(folder, prompt=...)` draws what diffusers' own pipeline draws."""

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pfode
from pfode.errors import FileError, UsageError
from tests.scores import tiny

pytest.importorskip("transformers", reason="diffusers has text-to-image pipelines only beside it")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # of the peers
    pytest.mark.skipif(not tiny.NEWER, reason="this version's pipelines take less"),
]

STEPS = 4
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
BETAS = {"beta_schedule": "scaled_linear", "clip_sample": False}
SCHEDULERS: dict[str, Any] = {
    "sd": ("DDIMScheduler", BETAS),
    "sdxl": ("DDIMScheduler", {**BETAS, "prediction_type": "v_prediction"}),
    "sd3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flux": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """A function from a name to a pipeline of diffusers and the folder that it saved."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            kind, options = SCHEDULERS[name]
            made[name] = tiny.saved_pipeline(name, folder, tiny.scheduler(kind, **options)), folder / "pipe"
        return made[name]

    return get


def grid(pipe: Any, process: pfode.Process) -> torch.Tensor:
    """The times of the pipeline's last run."""
    if isinstance(process, pfode.VPDiscrete):
        return torch.cat([pipe.scheduler.timesteps.double(), torch.tensor([-1.0], dtype=torch.float64)])
    return pipe.scheduler.sigmas.double()


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_folder_under_a_prompt_draws_what_the_pipeline_draws(pipelines, name):
    pipe, folder = pipelines(name)
    flux = name == "flux"
    latents = tiny.diffusers.FluxPipeline._pack_latents(LATENTS, *LATENTS.shape) if flux else LATENTS
    options = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "height": 16, "width": 16, "output_type": "pt"}
    words: dict[str, Any] = {} if flux else {"negative_prompt": "a dog"}
    wanted = pipe(["a cat"] * 2, latents=latents, **options, **{k: [v] * 2 for k, v in words.items()}).images
    den: Any = pfode.load(folder, prompt="a cat", guidance=4.0, height=16, width=16, **words)
    result = pfode.sample(den, x=LATENTS, sampler="euler" if name in ("sd3", "flux") else "ddim",
                          grid=grid(pipe, den.process))  # fmt: skip
    assert result.evals == STEPS * (1 if flux else 2)
    close(den.decode(result.x) / 2 + 0.5, wanted)
    other: Any = pfode.load(folder, prompt="a bat", guidance=4.0, height=16, width=16, **words)
    assert (pfode.sample(other, x=LATENTS, plan=result.plan).x - result.x).abs().max() > 1e-3


def test_several_prompts_are_the_classes(pipelines):
    """Each as the denoiser of that prompt alone, guided by its own scale and by `guide`, which can do more."""
    _, folder = pipelines("sd")
    words: dict[str, Any] = {"negative_prompt": "a dog", "guidance": 3.0}
    den: Any = pfode.load(folder, prompts=["a cat", "a bat"], **words)
    assert den.labels == ("a cat", "a bat")
    both = pfode.sample(den, seeds=[7, 8], steps=3, sampler="ddim", label="all")
    assert both.evals == 6
    for i, prompt in enumerate(den.labels):
        alone: Any = pfode.load(folder, prompt=prompt, **words)
        close(pfode.sample(alone, seeds=[7 + i], steps=3, sampler="ddim").x, both.x[i : i + 1])
    guided = pfode.scores.guide(den.guided(1.0), 3.0)
    close(pfode.sample(guided, seeds=[7, 8], steps=3, sampler="ddim", label=["a cat", 1]).x, both.x)
    part = pfode.scores.guide(den.guided(1.0), 3.0, interval=(0.1, 2.0))
    assert pfode.sample(part, seeds=[7, 8], steps=3, sampler="ddim", label="all").evals < 6
    other: Any = pfode.load(folder, prompts=["a cat", "a hat"], **words)
    assert den.words != other.words
    assert den.fingerprint == pfode.load(folder, prompt="a hat").fingerprint


def test_dtype_variant_and_tiles(pipelines, tmp_path):
    pipe, folder = pipelines("sd")
    half: Any = pfode.load(folder, dtype=torch.bfloat16, prompt="a cat")
    assert half.dtype == half.autoencoder.vae.dtype == torch.bfloat16
    copy = tmp_path / "pipe"
    shutil.copytree(folder, copy)
    for key, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        tensors = load_file(copy / key / f"{stem}.safetensors")
        small = {name: value.half() for name, value in tensors.items()}
        save_file(small, copy / key / f"{stem}.fp16.safetensors", {"format": "pt"})
    plain: Any = pfode.load(copy, prompt="a cat")
    assert torch.equal(plain.net.model.conv_in.weight, pipe.unet.conv_in.weight)
    rounded = pipe.unet.conv_in.weight.half().float()
    assert torch.equal(pfode.load(copy, prompt="a cat", variant="fp16").net.model.conv_in.weight, rounded)
    for key, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (copy / key / f"{stem}.safetensors").unlink()
    only: Any = pfode.load(copy, dtype=None, prompt="a cat")
    assert only.dtype == torch.float16
    with pytest.raises(FileError, match="no weights of the variant 'ema'"):
        pfode.load(copy, prompt="a cat", variant="ema")
    x = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(5))
    large: Any
    tiled: Any
    large, tiled = (pfode.load(folder, prompt="a cat", height=48, width=48, tiling=t) for t in (False, True))
    whole, parts = large.decode(x), tiled.decode(x)
    assert whole.shape == parts.shape == (1, 3, 48, 48)
    assert not torch.equal(whole, parts)
    close(large.decode(x), whole)


def without(folder: Any, name: str) -> None:
    (folder / name).unlink() if (folder / name).is_file() else shutil.rmtree(folder / name)


def edited(folder: Any, name: str, **fields: Any) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **fields}))


def spoilt(folder: Any, name: str, change: Any) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, {"format": "pt"})


UNET, WORDS = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
DAMAGE: dict[str, tuple[Any, str]] = {
    "no unet": (lambda f: without(f, "unet"), r"unet: no such folder"),
    "no weights": (lambda f: without(f, UNET), r"unet: no diffusion_pytorch_model.safetensors"),
    "a pickle": (lambda f: (f / UNET).rename(f / "unet" / "pytorch_model.bin"), r"pytorch_model.bin: is a pickle"),
    "no tokenizer": (lambda f: without(f, "tokenizer"), r"tokenizer: no such folder"),
    "cut off": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-40]), r"unet: cannot be read"),
    "a tensor less": (lambda f: spoilt(f, UNET, lambda t: t.pop("conv_in.weight")), r"unet: .*conv_in.weight"),
    "a tensor more": (lambda f: spoilt(f, UNET, lambda t: t.update(odd=torch.zeros(1))), r"unet: .*'odd'"),
    "no word": (lambda f: spoilt(f, WORDS, lambda t: t.pop(sorted(t)[0])), r"text_encoder: tensor"),
    "nan": (lambda f: spoilt(f, UNET, lambda t: t["conv_in.bias"].fill_(torch.nan)), r"unet: .*not finite"),
    "code": (lambda f: edited(f, "model_index.json", unet=["mine", "Net"]), r"model_index.json: unet: expected one of"),
    "another unet": (
        lambda f: edited(f, "model_index.json", unet=["diffusers", "FluxTransformer2DModel"]), r"unet: expected one of"
    ),
    "scheduler": (
        lambda f: edited(f, "scheduler/scheduler_config.json", prediction_type="noise"), r"scheduler: .*prediction_type"
    ),
    "config": (lambda f: edited(f, "unet/config.json", block_out_channels=[8]), r"unet: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders(pipelines, tmp_path, name):
    _, folder = pipelines("sd")
    copy = tmp_path / "pipe"
    shutil.copytree(folder, copy)
    damage, message = DAMAGE[name]
    damage(copy)
    with pytest.raises(FileError, match=message) as error:
        pfode.load(copy, prompt="a cat")
    assert "pipe" in error.value.message


def test_what_cannot_be(pipelines, tmp_path):
    _, folder = pipelines("sd")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ("digits", {"prompt": "a cat"}, "takes no prompt"),
        (folder, {"negative_prompt": "a cat"}, "needs a prompt"),
        (folder, {"prompt": "a cat", "height": 17}, "height: need a multiple of 2, got 17"),
        (folder, {"prompt": "a cat", "colour": 3}, "colour: not an option"),
        (folder, {"prompt": "a", "prompts": ["b"]}, "prompt and prompts exclude each other"),
        (folder, {"prompts": []}, "prompts: need a list of strings"),
        (f"{folder}@3", {"prompt": "a", "guidance": 2.0}, "guidance: given twice"),
        (folder, {"prompt": "a", "process": pfode.EDM()}, "stated by its scheduler"),
    ]
    for source, given, message in cases:
        with pytest.raises(UsageError, match=message):
            pfode.load(source, **given)
    with pytest.raises(FileError, match="StableDiffusionPipeline") as error:
        pfode.load(folder)
    assert "prompt=" in error.value.hint


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
PLACES = {  # of the tiny U-Net in the names of Stable Diffusion's own repository
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op", "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2", "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    **{f"up_blocks.1.resnets.{i}": f"output_blocks.{2 + i}.0" for i in (0, 1)},
    **{f"up_blocks.1.attentions.{i}": f"output_blocks.{2 + i}.1" for i in (0, 1)},
}  # fmt: skip
CODER = {
    "conv_norm_out": "norm_out", "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q",
    "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
    **{f"down_blocks.{i}": f"down.{i}" for i in (0, 1)}, **{f"up_blocks.{i}": f"up.{1 - i}" for i in (0, 1)},
    "resnets.0": "block.0", "resnets.1": "block.1", "resnets.2": "block.2",
}  # fmt: skip


def one_file(pipe: Any, file: Any, leave: str = "") -> None:
    """The weights of the tiny Stable Diffusion in one file, in the names of its own repository."""
    found: dict[str, torch.Tensor] = {}
    for name, value in pipe.unet.state_dict().items():
        place = max((key for key in PLACES if name.startswith(f"{key}.")), key=len)
        rest = name.removeprefix(f"{place}.")
        if "resnets" in place:
            rest = f"{RESNET[rest.rpartition('.')[0]]}.{rest.rpartition('.')[2]}"
        found[f"model.diffusion_model.{PLACES[place]}.{rest}"] = value
    for name, value in pipe.vae.state_dict().items():
        new = name
        for old, other in CODER.items():
            new = new.replace(f".{old}.", f".{other}.")
        flat = "attn_1" in new and value.ndim == 2
        found[f"first_stage_model.{new}"] = value[..., None, None] if flat else value
    for name, value in pipe.text_encoder.state_dict().items():
        found[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    kept = {name: value.contiguous() for name, value in found.items() if not leave or not name.startswith(leave)}
    save_file(kept, file, {"format": "pt"})


@pytest.mark.parametrize("leave", ["", "first_stage_model.", "cond_stage_model."])
def test_one_file(pipelines, tmp_path, leave):
    """As the folder it was made from, with the configurations, and the parts that it lacks, of that folder."""
    pipe, folder = pipelines("sd")
    file = tmp_path / "whole.safetensors"
    one_file(pipe, file, leave)
    wanted: Any = pfode.load(folder, prompt="a cat", negative_prompt="a dog")
    den: Any = pfode.load(file, prompt="a cat", negative_prompt="a dog", base=folder)
    x = pfode.sample(wanted, n=2, steps=3, sampler="ddim").x
    close(pfode.sample(den, n=2, steps=3, sampler="ddim").x, x)
    close(den.decode(x), wanted.decode(x))
    assert den.process == wanted.process


def test_one_file_that_is_not_enough(pipelines, tmp_path):
    pipe, folder = pipelines("sd")
    file = tmp_path / "whole.safetensors"
    one_file(pipe, file)
    with pytest.raises(FileError, match="single-file checkpoint of Stable Diffusion") as error:
        pfode.load(file)
    assert "prompt=" in error.value.hint
    with pytest.raises(UsageError, match="no folder of a StableDiffusionPipeline"):
        pfode.load(file, prompt="a cat", base=tmp_path)
    one_file(pipe, file, "model.diffusion_model.middle_block")
    with pytest.raises(FileError, match=r"whole\.safetensors: .*weights are missing"):
        pfode.load(file, prompt="a cat", base=folder)
