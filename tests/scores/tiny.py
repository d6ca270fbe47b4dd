"""Tiny networks and pipelines of diffusers with random weights, none of them zero."""

import importlib
import inspect
import json
import warnings
from typing import Any

import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers under newer versions of what it imports
    diffusers: Any = importlib.import_module("diffusers")
NEWER = "time_shift_type" in inspect.signature(diffusers.FlowMatchEulerDiscreteScheduler.__init__).parameters
"""Whether diffusers is newer than 0.31: its flows and their pipelines take more since."""

UNET: dict[str, Any] = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4, "attention_head_dim": 8,
}  # fmt: skip
DIT: dict[str, Any] = {
    "sample_size": 4, "in_channels": 4, "out_channels": 8, "num_layers": 1, "num_attention_heads": 2,
    "attention_head_dim": 4, "patch_size": 2, "num_embeds_ada_norm": 1000,
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


def randomised(net: Any, seed: int = 0) -> Any:
    """The network with every parameter drawn anew, so that no branch is silent."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
        parameter.data = std * torch.randn(parameter.shape, generator=generator)
    for module in net.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
            module.weight.data += 1
    return net.eval().requires_grad_(False)


def unet(**changes: Any) -> Any:
    return randomised(diffusers.UNet2DModel(**{**UNET, **changes}))


def dit(**changes: Any) -> Any:
    return randomised(diffusers.DiTTransformer2DModel(**{**DIT, **changes}))


def vae(**changes: Any) -> Any:
    return randomised(diffusers.AutoencoderKL(**{**VAE, **changes}))


def scheduler(name: str, **changes: Any) -> Any:
    return getattr(diffusers, name)(**changes)


def dit_pipeline(**changes: Any) -> Any:
    words = {i: f"class {i}" for i in range(1000)}
    return diffusers.DiTPipeline(dit(**changes), vae(), scheduler("DDIMScheduler", clip_sample=False), id2label=words)


WORDS = 12  # width of the embeddings of a prompt
POOLED = 6


def latent_unet(**changes: Any) -> Any:
    """The network of Stable Diffusion."""
    config: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": WORDS,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 4, "norm_num_groups": 4,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return randomised(diffusers.UNet2DConditionModel(**{**config, **changes}))


def stable_diffusion(scheduler: Any, **parts: Any) -> Any:
    made = {"vae": vae(), "text_encoder": None, "tokenizer": None, "unet": latent_unet(), **parts}
    pipe = diffusers.StableDiffusionPipeline(
        **made, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    return quiet(pipe)


def sdxl(scheduler: Any) -> Any:
    unet = latent_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + POOLED
    )
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae(), unet=unet, scheduler=scheduler, add_watermarker=False, **nothing
    )
    return quiet(pipe)


def sd3(scheduler: Any) -> Any:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=WORDS, caption_projection_dim=8, pooled_projection_dim=POOLED, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    nothing = dict.fromkeys(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))
    decoder = vae(shift_factor=0.06)
    return quiet(
        diffusers.StableDiffusion3Pipeline(transformer=randomised(model), vae=decoder, scheduler=scheduler, **nothing)
    )


def flux(scheduler: Any, guidance_embeds: bool = True) -> Any:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WORDS, pooled_projection_dim=POOLED, axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    nothing = dict.fromkeys(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2"))
    decoder = vae(shift_factor=0.06)
    return quiet(diffusers.FluxPipeline(transformer=randomised(model), vae=decoder, scheduler=scheduler, **nothing))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def words(seed: int) -> torch.Tensor:
    """Embeddings of a prompt."""
    return torch.randn(1, 5, WORDS, generator=torch.Generator().manual_seed(seed))


def pooled(seed: int) -> torch.Tensor:
    return torch.randn(1, POOLED, generator=torch.Generator().manual_seed(seed))


def text_encoder(folder: Any) -> dict[str, Any]:
    """A tokenizer of single letters and a text encoder."""
    transformers: Any = importlib.import_module("transformers")

    letters = "abcdefghijklmnopqrstuvwxyz"
    entries = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.model_max_length = 16
    config = transformers.CLIPTextConfig(
        vocab_size=len(entries), hidden_size=WORDS, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, eos_token_id=len(entries) - 1, bos_token_id=len(entries) - 2, pad_token_id=0,
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": randomised(transformers.CLIPTextModel(config))}


def projecting_encoder(folder: Any, seed: int = 1) -> dict[str, Any]:
    """The tokenizer of `text_encoder`, and a text encoder whose last state is projected."""
    transformers: Any = importlib.import_module("transformers")

    made = text_encoder(folder)
    config = made["text_encoder"].config
    config = transformers.CLIPTextConfig(**{**config.to_dict(), "projection_dim": config.hidden_size // 2})
    return {**made, "text_encoder": randomised(transformers.CLIPTextModelWithProjection(config), seed)}


def t5() -> dict[str, Any]:
    """A tokenizer of single letters and an encoder as T5 has them."""
    transformers: Any = importlib.import_module("transformers")

    letters = "abcdefghijklmnopqrstuvwxyz"
    special = {"<pad>": 0.0, "</s>": 0.0, "<unk>": -2.0, "\u2581": -1.0}
    entries = [*special.items(), *((letter, -1.0) for letter in letters)]
    tokenizer = transformers.T5Tokenizer(vocab=entries, extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(entries), d_model=WORDS, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": randomised(transformers.T5EncoderModel(config))}


def saved_pipeline(name: str, folder: Any, scheduler: Any) -> Any:
    """A pipeline with text encoders, which it also saves to `folder`/pipe: "sd", "sdxl", "sd3" or "flux"."""
    (folder / "words").mkdir()
    one, other = text_encoder(folder / "words"), projecting_encoder(folder / "words")
    if name == "sd":
        pipe = stable_diffusion(scheduler, **one)
    elif name == "sdxl":
        net = latent_unet(
            addition_embed_type="text_time", addition_time_embed_dim=4, cross_attention_dim=2 * WORDS,
            projection_class_embeddings_input_dim=6 * 4 + WORDS // 2,
        )  # fmt: skip
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=vae(), unet=net, scheduler=scheduler, add_watermarker=False, **one,
            text_encoder_2=other["text_encoder"], tokenizer_2=other["tokenizer"],
        )  # fmt: skip
    elif name == "sd3":
        model = diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
            joint_attention_dim=2 * WORDS, caption_projection_dim=8, pooled_projection_dim=WORDS, out_channels=4,
            pos_embed_max_size=8,
        )  # fmt: skip
        pipe = diffusers.StableDiffusion3Pipeline(
            transformer=randomised(model), vae=vae(shift_factor=0.06), scheduler=scheduler, **other,
            text_encoder_2=projecting_encoder(folder / "words", 2)["text_encoder"], tokenizer_2=other["tokenizer"],
            text_encoder_3=None, tokenizer_3=None,
        )  # fmt: skip
    else:
        model = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=WORDS, pooled_projection_dim=WORDS, axes_dims_rope=(2, 2, 4),
            guidance_embeds=True,
        )  # fmt: skip
        long = t5()
        pipe = diffusers.FluxPipeline(
            transformer=randomised(model), vae=vae(shift_factor=0.06), scheduler=scheduler, **one,
            text_encoder_2=long["text_encoder"], tokenizer_2=long["tokenizer"],
        )  # fmt: skip
    pipe.save_pretrained(folder / "pipe")
    return quiet(pipe)
