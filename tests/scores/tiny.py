"""Tiny networks and pipelines of diffusers with random weights, none of them zero."""

import warnings
from typing import Any

import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # diffusers under newer versions of what it imports
    import diffusers

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
