"""Folders of diffusers, read strictly, so that what is loaded is what was saved.

Every field of a configuration is checked and every tensor must be there, of its shape, floating point and finite;
diffusers itself fills gaps with defaults and random numbers. Nothing of a folder is executed.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pfode.compat.schedules import Stated, stated
from pfode.errors import FileError, PfodeError, UsageError
from pfode.fields import FLAG, REQUIRED, Field, checked, either, real, several, shown, whole, word
from pfode.files import parse_json, read_file, read_header
from pfode.process import Flow, Process
from pfode.scores.denoiser import Denoiser
from pfode.scores.io.checkpoint import fill
from pfode.scores.latent import Autoencoder, LatentDenoiser
from pfode.tensors import read_tensors, readable, transformed

STEM = "diffusion_pytorch_model"
MAX_JSON = 8 << 20  # bytes; an index of shards names every tensor
PIPELINES = {
    "DDPMPipeline": "unet", "DDIMPipeline": "unet", "PNDMPipeline": "unet", "DiTPipeline": "transformer"
}  # fmt: skip
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
# DiT networks were saved as Transformer2DModel once, with the fields of its other uses at these values
DIT_BEFORE = {
    "attention_type": "default", "cross_attention_dim": None, "double_self_attention": False,
    "num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False, "caption_channels": None,
    "interpolation_scale": None, "use_additional_conditions": None,
}  # fmt: skip
EMA = (
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"
)  # fmt: skip
ATTENTION_BEFORE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Adapter(nn.Module):
    """A network of diffusers, called as pfode calls networks: (x, c_noise, label) -> out.

    Output channels beyond those of the input (a learned variance) are dropped.
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
            UsageError: a label for an unconditional network, or none for one that always needs it.
        """
        if not self.classes and label is not None:
            raise UsageError("this network is unconditional: it takes no label", "leave label= out")
        if self.classes and not self.null:
            known = label is not None and readable(label)
            if label is None or (known and int(label.max()) >= self.classes):
                raise UsageError("this network always needs a class: it has none for 'no class'", "label=0")
        if self.null and label is None:
            label = torch.full((len(x),), self.classes, device=x.device)
        given = {} if label is None else {"class_labels": label}
        if not transformed(x):
            return self.model(x, c_noise, **given, return_dict=False)[0][:, : self.channels]
        with sdpa_kernel(SDPBackend.MATH), _Differentiable():
            return self.model(x, c_noise, **given, return_dict=False)[0][:, : self.channels]


class _Differentiable(TorchFunctionMode):
    """Within it group normalisation has a forward-mode derivative: torch's views its input as rows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.nn.functional.group_norm, torch.group_norm):
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


# ---- reading


def load_folder(folder: Path, process: Process | None = None, prediction: str | None = None) -> Denoiser:
    """The denoiser in a folder of diffusers: a pipeline (DDPM, DDIM, PNDM, DiT), or one component of it.

    Args:
        folder: with a model_index.json, or with the config.json of a UNet2DModel or a DiTTransformer2DModel.
        process, prediction: for a component that has no scheduler beside it.

    Raises:
        FileError: something is missing, damaged or of another kind; the message names the file and the field.
        UsageError: a process for a folder that states one.
    """
    index, place, scheduler = parts(folder)
    read_json(place / "config.json")
    given = process is not None or prediction is not None
    if given and scheduler is not None:
        raise UsageError(f"{folder}: process and prediction are stated by {scheduler}", "leave them out")
    if scheduler is not None:
        known = _scheduler(scheduler, index)
    elif process is not None:
        flow = isinstance(process, Flow)  # diffusers counts its time from 0 to 1000
        known = Stated(process, prediction or ("flow" if flow else "eps"), 1000.0 if flow else 1.0, 0.5)
    else:
        message = f"{folder}: no scheduler_config.json: what noise the network was trained for is not known"
        raise FileError(message, "pfode.load(folder, process=pfode.VPDiscrete(...), prediction='eps')")
    network = _network(place, index)
    labels = _labels(folder, index, network)
    options: dict[str, Any] = {
        "sigma_data": known.sigma_data, "shape": network.shape, "labels": labels, "time_scale": known.time_scale
    }  # fmt: skip
    if "vae" not in index:
        return Denoiser(network, known.process, known.prediction, **options)
    vae = _component(folder / "vae", "AutoencoderKL", index.get("vae"))[0].eval().requires_grad_(False)
    if vae.config["latent_channels"] != network.channels:
        where = folder / "vae" / "config.json"
        raise FileError(
            f"{where}: latent_channels: {vae.config['latent_channels']}, the network has {network.channels}"
        )
    return LatentDenoiser(network, known.process, known.prediction, autoencoder=Autoencoder(vae), **options)


def parts(folder: Path) -> tuple[dict[str, Any], Path, Path | None]:
    """The model_index.json ({} without one), the folder of the network, and the scheduler's file if there is one.

    Raises:
        FileError: none of what diffusers writes, or a pipeline of another kind.
    """
    index_file = folder / "model_index.json"
    if os.path.exists(index_file):
        index = read_json(index_file)
        name = index.get("_class_name")
        component = PIPELINES.get(name) if isinstance(name, str) else None
        if component is None:
            hint = "pipe = diffusers.DiffusionPipeline.from_pretrained(...); pfode.from_pipeline(pipe, prompt=...)"
            raise FileError(f"{index_file}: _class_name: {shown(name)} is none of {', '.join(PIPELINES)}", hint)
        vae = "vae" if name == "DiTPipeline" else None
        for key in (component, "scheduler", *([vae] if vae else [])):
            entry = index.get(key)
            if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(e, str) for e in entry):
                raise FileError(f"{index_file}: {key}: expected [library, class], got {shown(entry)}")
        # the oldest pipelines have no subfolders
        network, scheduler = (
            folder / key if os.path.isdir(folder / key) else folder for key in (component, "scheduler")
        )
        return index, network, scheduler / "scheduler_config.json"
    for place in (folder, *(folder / name for name in ("unet", "transformer", "unet_ema", "transformer_ema"))):
        if os.path.exists(place / "config.json"):
            # the training scripts of diffusers write checkpoint-500/unet_ema, and the scheduler beside the checkpoints
            run = [place.parent.parent / "scheduler"] if place.parent.name.startswith("checkpoint-") else []
            found = [near / "scheduler_config.json" for near in (place, place.parent / "scheduler", *run)]
            return {}, place, next((file for file in found if os.path.exists(file)), None)
    raise FileError(
        f"{folder}: is a folder without model_index.json, config.json or model.safetensors",
        "give a folder that diffusers or pfode saved, or a .safetensors file",
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a file.

    Raises:
        FileError: it cannot be read, is too large, no JSON object, or has a field twice.
    """

    value = parse_json(str(file), read_file(file, MAX_JSON, "a configuration file"))
    if not isinstance(value, dict):
        raise FileError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _scheduler(file: Path, index: Mapping[str, Any]) -> Stated:
    config = read_json(file)
    _same_class(file, config, index.get("scheduler"))
    try:
        return stated(config)
    except PfodeError as error:
        raise FileError(f"{file}: {error.message}", error.hint) from error


def _same_class(file: Path, config: Mapping[str, Any], entry: Any) -> None:
    """The class of a component as its own configuration and the pipeline's name it."""
    if entry is not None and config.get("_class_name") != entry[1]:
        raise FileError(
            f"{file}: _class_name: {shown(config.get('_class_name'))}, but model_index.json has {entry[1]!r}"
        )


def _network(place: Path, index: Mapping[str, Any]) -> Adapter:
    entry = index.get(PIPELINES[index["_class_name"]]) if index else None
    name = read_json(place / "config.json").get("_class_name")
    model, name, config = _component(place, "DiTTransformer2DModel" if name == "Transformer2DModel" else name, entry)
    if name not in NETWORKS:
        raise FileError(f"{place / 'config.json'}: _class_name: {name} is no denoising network")
    return Adapter(model, name, config).eval().requires_grad_(False)


def _component(place: Path, wanted: Any, entry: Any) -> tuple[Any, str, dict[str, Any]]:
    """A model with its weights, its class and its configuration."""
    file = place / "config.json"
    found = read_json(file)
    if entry is not None and found.get("_class_name") != entry[1] and wanted != entry[1]:
        _same_class(file, found, entry)
    if wanted not in FIELDS:
        known = ", ".join(FIELDS)
        raise FileError(f"{file}: _class_name: expected one of {known}, got {shown(found.get('_class_name'))}")
    public = {key: value for key, value in found.items() if not key.startswith("_") and not _of_training(key, value)}
    if found.get("_class_name") == "Transformer2DModel":
        public = {k: v for k, v in public.items() if k not in DIT_BEFORE or v != DIT_BEFORE[k]}
    elif found.get("_class_name") != wanted:
        raise FileError(f"{file}: _class_name: expected {wanted!r}, got {shown(found.get('_class_name'))}")
    try:
        config = check_config(wanted, public)
        model = build_model(wanted, config)
    except UsageError as error:
        raise FileError(f"{file}: {error.message}", error.hint) from error
    tensors, where = read_weights(place)
    expected, named = set(model.state_dict()), {}
    for name, value in tensors.items():
        if _renamed(name, expected) in named:
            raise FileError(f"{where(name)}: tensor {name!r} stands there twice, under an older name too")
        named[_renamed(name, expected)] = value
    fill(model, named, where)
    return model, wanted, config


def _of_training(key: str, value: Any) -> bool:
    """Whether `EMAModel.save_pretrained` of diffusers leaves this field in a configuration: how it averaged."""
    return key in EMA and type(value) in (bool, int, float, type(None))


def _renamed(name: str, expected: set[str]) -> str:
    """The name that a weight of attention has today, where the file has that of diffusers before 0.18."""
    if name in expected:
        return name
    parts = name.split(".")
    new = ".".join(ATTENTION_BEFORE.get(part, part) for part in parts)
    return new if new in expected else name


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
            f"{name}: out_channels: {c['out_channels']} for in_channels = {c['in_channels']}: not what denoises them"
        )
    for key in ("latents_mean", "latents_std"):
        if c.get(key) is not None and len(c[key]) != c["latent_channels"]:
            raise UsageError(f"{name}: {key}: {len(c[key])} values for {c['latent_channels']} latent_channels")
    return c


def build_model(name: str, config: Mapping[str, Any]) -> Any:
    """A model of diffusers without weights: its parameters on the meta device.

    Raises:
        UsageError: diffusers cannot build it.
    """
    import diffusers
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            return getattr(diffusers, name)(**config)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise UsageError(f"{name}: this configuration builds no network: {str(error)[:200]}") from error


def build(name: str, fields: Mapping[str, Any]) -> Adapter:
    """The network of `Adapter.architecture`, its parameters on the meta device.

    Raises:
        UsageError: a broken configuration, named by its field.
    """
    config = check_config(name, fields)
    return Adapter(build_model(name, config), name, config)


def _labels(folder: Path, index: Mapping[str, Any], network: Adapter) -> list[str] | None:
    """Names of the classes: those of the pipeline, shortened where that stays unique, else numbers."""
    if not network.classes:
        return None
    named = index.get("id2label")
    if named is None:
        return [str(i) for i in range(network.classes)]
    file, wanted = folder / "model_index.json", {str(i) for i in range(network.classes)}
    if not isinstance(named, dict) or set(named) != wanted or not all(isinstance(v, str) for v in named.values()):
        raise FileError(f"{file}: id2label: expected a name for each of the {network.classes} classes")
    names = [named[str(i)] for i in range(network.classes)]
    short = [name.split(",")[0].strip() for name in names]
    return [a if short.count(a) == 1 else b for a, b in zip(short, names, strict=True)]


# ---- weights


def weight_files(place: Path) -> tuple[list[Path], dict[str, Path] | None, Path]:
    """The files of weights in a folder, where shards say each tensor is, and the file that messages name.

    Raises:
        FileError: none, none that is safe to read, or a broken index of shards.
    """
    plain, index = place / f"{STEM}.safetensors", place / f"{STEM}.safetensors.index.json"
    if os.path.exists(plain):
        return [plain], None, plain
    variants = sorted(place.glob(f"{STEM}.*.safetensors"))
    if not os.path.exists(index):
        others = sorted(place.glob(f"{STEM}.safetensors.index.*.json")) + sorted(place.glob(f"{STEM}.*.index.json"))
        index = others[0] if others else index
    if os.path.exists(index):
        entries = read_json(index).get("weight_map")
        if not isinstance(entries, dict) or not entries:
            raise FileError(f"{index}: weight_map: expected the file of every tensor, got {shown(entries)}")
        for name, file in entries.items():
            plain_name = isinstance(file, str) and file.isprintable() and Path(file).name == file
            if not plain_name or not file.endswith(".safetensors"):
                raise FileError(f"{index}: weight_map: {name!r:.80}: no name of a safetensors file: {shown(file)}")
        placed = {name: place / file for name, file in entries.items()}
        return sorted(set(placed.values())), placed, index
    if len(variants) == 1:
        return variants, None, variants[0]
    if variants:
        names = ", ".join(file.name for file in variants)
        raise FileError(f"{place}: several variants: {names}", f"rename one to {plain.name}")
    pickles = [file for suffix in ("bin", "pt", "ckpt") for file in sorted(place.glob(f"*.{suffix}"))]
    if pickles:
        hint = "write it as safetensors where you trust it: model.save_pretrained(folder, safe_serialization=True)"
        raise FileError(f"{pickles[0]}: is a pickle, which can run any code when read: refused", hint)
    raise FileError(f"{plain}: no such file", f"the folder holds no {STEM}.safetensors")


def read_weights(place: Path) -> tuple[dict[str, Tensor], Callable[[str], Path]]:
    """All tensors of a folder, and the file that each belongs to.

    Raises:
        FileError: a file is missing or damaged, or shards and their index disagree.
    """
    files, placed, named = weight_files(place)
    tensors: dict[str, Tensor] = {}
    origin: dict[str, Path] = {}
    for file in files:
        found = read_tensors(read_header(file), verify=False)
        for name in found:
            if placed is not None and placed.get(name) != file:
                raise FileError(f"{file}: tensor {name!r}: {named.name} does not place it here")
        tensors |= found
        origin |= dict.fromkeys(found, file)
    if placed is not None:
        for name, file in placed.items():
            if name not in tensors:
                raise FileError(f"{file}: tensor {name!r} is missing, which {named.name} places here")
    return tensors, lambda name: origin.get(name, named)
