"""Folders of diffusers as denoisers, read strictly, so that what is loaded is what was saved.

Every field of a configuration is checked and every tensor must be there, of its shape, floating point and finite;
diffusers itself fills gaps with defaults and random numbers. Nothing of a folder is executed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pfode.compat.schedules import Stated, stated
from pfode.errors import FileError, PfodeError, UsageError
from pfode.fields import shown
from pfode.header import read_header
from pfode.process import Flow, Process
from pfode.scores.denoiser import Denoiser
from pfode.scores.io.layout import PIPELINES, parts, read_json, weight_files
from pfode.scores.io.weights import fill
from pfode.scores.latent import Autoencoder, LatentDenoiser
from pfode.scores.networks.diffusers import FIELDS, NETWORKS, Adapter, build_model, check_config
from pfode.tensors import read_tensors

__all__ = ["load_folder"]

# DiT networks were once saved as Transformer2DModel, whose other fields then have these values
DIT_BEFORE = {
    "attention_type": "default", "cross_attention_dim": None, "double_self_attention": False,
    "num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False, "caption_channels": None,
    "interpolation_scale": None, "use_additional_conditions": None,
}  # fmt: skip
EMA = (
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"
)  # fmt: skip
ATTENTION_BEFORE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


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


def _scheduler(file: Path, index: Mapping[str, Any]) -> Stated:
    """Process, prediction and time scale that the configuration of a scheduler states."""
    config = read_json(file)
    _same_class(file, config, index.get("scheduler"))
    try:
        return stated(config)
    except PfodeError as error:
        raise FileError(f"{file}: {error.message}", error.hint) from error


def _same_class(file: Path, config: Mapping[str, Any], entry: Any) -> None:
    """Refuse a component whose class is not the one that model_index.json names.

    Raises:
        FileError: the two differ.
    """
    if entry is not None and config.get("_class_name") != entry[1]:
        raise FileError(
            f"{file}: _class_name: {shown(config.get('_class_name'))}, but model_index.json has {entry[1]!r}"
        )


def _network(place: Path, index: Mapping[str, Any]) -> Adapter:
    """The network of a pipeline or a component, with its weights."""
    entry = index.get(PIPELINES[index["_class_name"]]) if index else None
    name = read_json(place / "config.json").get("_class_name")
    model, name, config = _component(place, "DiTTransformer2DModel" if name == "Transformer2DModel" else name, entry)
    if name not in NETWORKS:
        raise FileError(f"{place / 'config.json'}: _class_name: {name} is no denoising network")
    return Adapter(model, name, config).eval().requires_grad_(False)


def _component(place: Path, wanted: Any, entry: Any) -> tuple[Any, str, dict[str, Any]]:
    """A component with its weights.

    Args:
        place: its folder.
        wanted: the name of the class it should be.
        entry: what model_index.json says of it, [library, class]; None without one.

    Returns:
        The model, the name of its class, and its configuration.

    Raises:
        FileError: it is of another class, a field is wrong, or its weights are not exactly those of the model.
    """
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
            raise FileError(f"{where(name)}: tensor {name!r} appears twice, under an older name too")
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


def read_weights(place: Path) -> tuple[dict[str, Tensor], Callable[[str], Path]]:
    """All tensors of a component.

    Returns:
        The tensors by their names, and a function that gives the file of a name, for messages.

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
