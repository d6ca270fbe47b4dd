"""Networks of diffusers, called as pfode calls networks; their configurations, checked field by field.

diffusers itself fills gaps with defaults and takes what it does not know; here every field is checked first. diffusers
and accelerate are imported when a network is built.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pfode.errors import UsageError
from pfode.fields import FLAG, REQUIRED, Field, checked, either, real, several, whole, word
from pfode.labels import label_tensor
from pfode.optional import optional_module
from pfode.tensors import readable, transformed

__all__ = ["FIELDS", "NETWORKS", "Adapter", "build", "build_model", "check_config"]

SIDES = either(whole(1, 4096), several(whole(1, 4096), 2, 2))
UNET: dict[str, Field] = {
    "sample_size": SIDES.or_none.otherwise(REQUIRED),
    "in_channels": whole(1, 1024),
    "out_channels": whole(1, 2048),
    "center_input_sample": FLAG,
    "time_embedding_type": word("positional"),
    "time_embedding_dim": whole(1, 100_000).or_none,
    "freq_shift": either(whole(0, 1), real(0, 1)),
    "flip_sin_to_cos": FLAG,
    "down_block_types": several(
        word("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D"),
        1, 10,
    ),
    "mid_block_type": word("UNetMidBlock2D").or_none.otherwise("UNetMidBlock2D"),
    "up_block_types": several(
        word("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D"), 1, 10
    ),
    "block_out_channels": several(whole(1, 16384), 1, 10),
    "layers_per_block": whole(1, 32),
    "mid_block_scale_factor": real(1e-3, 1e3),
    "downsample_padding": whole(0, 1),
    "downsample_type": word("conv", "resnet").otherwise("conv"),
    "upsample_type": word("conv", "resnet").otherwise("conv"),
    "dropout": real(0, 0.999).otherwise(0.0),
    "act_fn": word("silu", "swish", "mish", "gelu", "relu"),
    "attention_head_dim": whole(1, 16384).or_none.otherwise(REQUIRED),
    "norm_num_groups": whole(1, 1024),
    "attn_norm_num_groups": whole(1, 1024).or_none,
    "norm_eps": real(1e-12, 1),
    "resnet_time_scale_shift": word("default", "scale_shift").otherwise("default"),
    "add_attention": FLAG.otherwise(True),
    "class_embed_type": Field("null", lambda value: value is None, None),
    "num_class_embeds": whole(1, 1_000_000).or_none,
    "num_train_timesteps": whole(1, 1_000_000).or_none,
}  # fmt: skip
DIT: dict[str, Field] = {
    "num_attention_heads": whole(1, 256),
    "attention_head_dim": whole(1, 4096),
    "in_channels": whole(1, 1024),
    "out_channels": whole(1, 2048).or_none.otherwise(REQUIRED),
    "num_layers": whole(1, 512),
    "dropout": real(0, 0.999).otherwise(0.0),
    "norm_num_groups": whole(1, 1024).otherwise(32),
    "attention_bias": FLAG,
    "sample_size": whole(1, 4096),
    "patch_size": whole(1, 64),
    "activation_fn": word("gelu-approximate", "gelu", "geglu", "geglu-approximate", "swiglu", "linear-silu"),
    "num_embeds_ada_norm": whole(1, 1_000_000),
    "upcast_attention": FLAG.otherwise(False),
    "norm_type": word("ada_norm_zero"),
    "norm_elementwise_affine": FLAG,
    "norm_eps": real(1e-12, 1).otherwise(1e-5),
}
VAE: dict[str, Field] = {
    "in_channels": whole(1, 64),
    "out_channels": whole(1, 64),
    "down_block_types": several(word("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), 1, 8),
    "up_block_types": several(word("UpDecoderBlock2D", "AttnUpDecoderBlock2D"), 1, 8),
    "block_out_channels": several(whole(1, 16384), 1, 8),
    "layers_per_block": whole(1, 32),
    "act_fn": word("silu", "swish", "mish", "gelu", "relu"),
    "latent_channels": whole(1, 1024),
    "norm_num_groups": whole(1, 1024),
    "sample_size": SIDES.otherwise(32),
    "scaling_factor": real(1e-6, 1e6).otherwise(0.18215),
    "shift_factor": real(-1e6, 1e6).or_none,
    "latents_mean": several(real(-1e6, 1e6), 1, 1024).or_none,
    "latents_std": several(real(1e-6, 1e6), 1, 1024).or_none,
    "force_upcast": FLAG.otherwise(True),
    "use_quant_conv": FLAG.otherwise(True),
    "use_post_quant_conv": FLAG.otherwise(True),
    "mid_block_add_attention": FLAG.otherwise(True),
}
FIELDS = {"UNet2DModel": UNET, "DiTTransformer2DModel": DIT, "AutoencoderKL": VAE}
NETWORKS = ("UNet2DModel", "DiTTransformer2DModel")


class Adapter(nn.Module):
    """A network of diffusers, called as pfode calls networks: (x, c_noise, label) -> out.

    Output channels beyond those of the input (a learned variance) are dropped.

    Args:
        model: the network itself.
        name: of its class in diffusers, one of `NETWORKS`.
        config: its configuration, as `check_config` returns it.
    """

    def __init__(self, model: nn.Module, name: str, config: Mapping[str, Any]):
        super().__init__()
        self.model, self.name, self.config = model, name, dict(config)
        size = config["sample_size"]
        sides = (size, size) if isinstance(size, int) else size
        self.channels: int = config["in_channels"]
        self.shape = None if sides is None else (self.channels, *sides)
        classes = config["num_embeds_ada_norm" if name == "DiTTransformer2DModel" else "num_class_embeds"]
        self.classes: int = classes or 0
        self.null = name == "DiTTransformer2DModel"  # whether the label `classes` is no class

    def architecture(self) -> dict[str, Any]:
        """A JSON object of which `build` makes the same network."""
        return {"name": self.name, **self.config}

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """x (batch, channels, height, width), c_noise (batch,), label (batch,) of integers; None: no class.

        Raises:
            UsageError: a label for an unconditional network, or none for one that always needs it; labels out of
                range or of another length.
        """
        if not self.classes and label is not None:
            raise UsageError("this network is unconditional: it takes no label", "leave label= out")
        if self.classes and not self.null:
            known = label is not None and readable(label)
            if label is None or (known and int(label.max()) >= self.classes):
                raise UsageError("this network always needs a class: it has none for 'no class'", "label=0")
        if self.null and label is None:
            label = torch.full((len(x),), self.classes, device=x.device)
        given = {} if label is None else {"class_labels": label_tensor(label, range(self.classes), x)}
        if not transformed(x):
            return self.model(x, c_noise, **given, return_dict=False)[0][:, : self.channels]
        with sdpa_kernel(SDPBackend.MATH), _Differentiable():
            return self.model(x, c_noise, **given, return_dict=False)[0][:, : self.channels]


class _Differentiable(TorchFunctionMode):
    """Within it group normalisation has a forward-mode derivative: torch's own needs a contiguous input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.nn.functional.group_norm, torch.group_norm):
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


def check_config(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a model with its defaults.

    Raises:
        UsageError: a field that is unknown, missing or out of range, or that does not fit another; it is named.
    """
    c = checked(name, values, FIELDS[name])
    if "block_out_channels" in c:
        widths = c["block_out_channels"]
        for key in ("down_block_types", "up_block_types"):
            if len(c[key]) != len(widths):
                raise UsageError(f"{name}: {key}: {len(c[key])} for {len(widths)} block_out_channels")
        for width in widths:
            if width % c["norm_num_groups"]:
                raise UsageError(f"{name}: norm_num_groups: {c['norm_num_groups']} does not divide the width {width}")
            head = c.get("attention_head_dim")
            if head is not None and width % head:
                raise UsageError(f"{name}: attention_head_dim: {head} does not divide the width {width}")
    if name == "DiTTransformer2DModel" and c["sample_size"] % c["patch_size"]:
        raise UsageError(f"{name}: patch_size: {c['patch_size']} does not divide the sample_size {c['sample_size']}")
    if name in NETWORKS and (c["out_channels"] or c["in_channels"]) not in (c["in_channels"], 2 * c["in_channels"]):
        raise UsageError(
            f"{name}: out_channels: {c['out_channels']} for in_channels = {c['in_channels']}: a denoising network has"
            " as many, or twice as many"
        )
    for key in ("latents_mean", "latents_std"):
        if c.get(key) is not None and len(c[key]) != c["latent_channels"]:
            raise UsageError(f"{name}: {key}: {len(c[key])} values for {c['latent_channels']} latent_channels")
    return c


def build_model(name: str, config: Mapping[str, Any]) -> Any:
    """A model of diffusers without weights: its parameters on the meta device.

    Raises:
        UsageError: diffusers cannot build it. MissingError: diffusers or accelerate is not installed.
    """
    library = optional_module("diffusers", f"a {name}")
    empty = optional_module("accelerate", f"a {name}").init_empty_weights
    try:
        with empty(include_buffers=False):
            return getattr(library, name)(**config)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise UsageError(f"{name}: this configuration builds no network: {str(error)[:200]}") from error


def build(name: str, fields: Mapping[str, Any]) -> Adapter:
    """The network of `Adapter.architecture`, its parameters on the meta device.

    Raises:
        UsageError: a broken configuration, named by its field.
    """
    config = check_config(name, fields)
    return Adapter(build_model(name, config), name, config)
