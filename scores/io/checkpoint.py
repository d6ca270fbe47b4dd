"""Models as one self-contained safetensors file: the weights, and in the metadata everything else; and `load`.

Metadata: `pfode.config` (JSON: architecture, process, prediction, labels and the card: data, licence, ...),
`pfode.digest` (sha256 of everything), `modelspec.*` (https://github.com/Stability-AI/ModelSpec). Loading runs no code.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pfode
from pfode.errors import FileError, PfodeError, UsageError
from pfode.files import read_header, shown
from pfode.plans.table import Plan
from pfode.process import Process, from_config
from pfode.scores.denoiser import KNOWN, Denoiser
from pfode.scores.io import kinds
from pfode.scores.io.shipped import model_path, plan_files
from pfode.scores.networks import edm
from pfode.scores.networks.unet import UNet, UNetConfig
from pfode.tensors import FLOATS, NAMES, read_tensors, write_tensors

REQUIRED = {"architecture", "process", "prediction", "sigma_data", "time_scale", "shape", "labels"}
FIELDS = REQUIRED | {"unseen"}  # of the configuration that speak of the model itself; what else is there is its card


def save(
    den: Denoiser, path: str | os.PathLike[str], *, card: dict[str, Any], dtype: torch.dtype = torch.float16
) -> Path:
    """Write a denoiser whose network pfode can build again: a `UNet`, or what `load` read.

    Args:
        card: JSON about the model: data, licence, command, ...; kept beside the configuration.
        dtype: of the weights in the file.

    Raises:
        UsageError: another network, weights that are not finite (in that dtype), or a card that is no JSON.
        WriteError: the file cannot be written; an older one is kept.
    """
    architecture = architecture_of(den)
    if dtype not in FLOATS.values():
        known = ", ".join(str(known) for known in FLOATS.values())
        raise UsageError(f"save: dtype: {dtype} is none that weights are kept in", f"one of {known}")
    for name, value in den.net.state_dict().items():
        if value.is_meta:
            raise UsageError(f"save: {name}: is on the meta device and holds no numbers", "load its weights first")
    clash = FIELDS & set(card)
    if clash:
        raise UsageError(f"save: card: {sorted(clash)[0]!r} is a field of the model itself", "choose another key")
    config = {
        **card,
        "architecture": architecture,
        "process": den.process.config(),
        "prediction": den.prediction,
        "sigma_data": den.sigma_data,
        "time_scale": den.time_scale,
        "shape": den.shape,
        "labels": den.labels,
    }
    if den.unseen:
        config["unseen"] = sorted(den.unseen)
    try:
        text = json.dumps(config, sort_keys=True, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"save: card: not JSON ({error})") from error
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in den.net.state_dict().items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise UsageError(
                f"save: {name}: not finite in {dtype}", "the training diverged, or save(..., dtype=torch.float32)"
            )
    metadata = {
        "pfode.kind": "model",
        "pfode.version": pfode.__version__,
        "pfode.config": text,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"pfode/{architecture['name']}",
        "modelspec.implementation": "pfode",
        "modelspec.title": str(card.get("name", Path(path).stem)),
        "modelspec.license": str(card.get("licence", "")),
        "modelspec.resolution": "x".join(str(side) for side in (den.shape or ())[1:]),
    }
    return write_tensors(path, tensors, metadata)


def architecture_of(den: Denoiser) -> dict[str, Any]:
    """The JSON object of which `build` makes the denoiser's network.

    Raises:
        UsageError: a network that pfode cannot build.
    """
    net: Any = getattr(den, "net", den)
    if not isinstance(den, Denoiser) or not isinstance(net, nn.Module) or not hasattr(net, "architecture"):
        hint = "those that pfode.load or `pfode train` gives; of your own keep the code and net.state_dict()"
        raise UsageError(f"save: only networks of pfode can be saved, got {type(net).__name__}", hint)
    described: Any = net.architecture
    return described()


def load(
    source: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    *,
    process: Process | None = None,
    prediction: str | None = None,
) -> Denoiser:
    """A model by its name, from a file or a folder, or from the Hugging Face hub.

    Args:
        source: a shipped model; a .safetensors file written by `save`; a folder of diffusers (a DDPM, DDIM, PNDM or DiT
            pipeline, or its network alone) or of `Denoiser.save_pretrained`; a network pickle (.pkl) of EDM or EDM2; or
            the name of such a folder on the hub, "owner/name" or "owner/name@revision", fetched unless it is cached.
        device, dtype: of the network; None: the dtype it was saved in.
        process, prediction: of a network of diffusers without a scheduler beside it.

    Nothing is executed: header, digest, configuration and every tensor are checked first.

    Raises:
        UsageError: nothing of that name. MissingError: the hub cannot be reached, or has no such model.
        FileError: missing, damaged, changed, or of another kind; the message names the file and the field.
    """
    den = _read(model_path(source), process, prediction)
    network = den.net.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    return den.with_network(network.eval().requires_grad_(False), den.digest, den.plans)


def _read(path: Path, process: Process | None, prediction: str | None) -> Denoiser:
    if path.is_dir():
        from pfode.scores.io.folders import load_folder

        return load_folder(path, process, prediction)
    if process is not None or prediction is not None:
        raise UsageError(f"{path}: the file says what its process and its prediction are", "leave them out")
    if path.suffix == ".pkl":
        from pfode.scores.io.edm_files import load_pickle

        return load_pickle(path)
    return load_file(path)


def load_file(file: Path) -> Denoiser:
    """The denoiser in a file of `save`, its network in the dtype of the file.

    Raises:
        FileError: see `load`.
    """
    header = read_header(file)
    kind = header.metadata.get("pfode.kind")
    if kind != "model":
        what, hint = kinds.kind(header)
        what = f"a pfode {kind}" if kind else what or "not a pfode model"
        hint = hint or "pfode info FILE shows what it holds"
        if os.path.exists(file.parent / "config.json") and "folder" not in hint:
            hint += "; for a model of diffusers give the folder"
        raise FileError(f"{shown(file)}: metadata 'pfode.kind': this is {what}", hint)
    if "pfode.digest" not in header.metadata:
        raise FileError(f"{file}: metadata: no 'pfode.digest'", "the file is damaged: fetch or write it again")
    tensors = read_tensors(header)
    config = header.config("pfode.config")
    try:
        den = _build(config)
    except PfodeError as error:
        raise FileError(f"{file}: metadata 'pfode.config': {error.message}", error.hint) from error
    fill(den.net, tensors, lambda name: file, uniform=False)
    den.digest = header.metadata["pfode.digest"]
    den.plans = Plans(file, den.digest)
    return den


def build(architecture: dict[str, Any]) -> nn.Module:
    """A network from the JSON object that its `architecture` gave, its parameters on the meta device.

    Raises:
        UsageError: an unknown network, or a broken configuration, named by its field.
    """
    name = architecture["name"]
    fields = {key: value for key, value in architecture.items() if key != "name"}
    with torch.device("meta"):
        if name == "UNet":
            return UNet(UNetConfig.from_json(fields))
        if name in edm.NETWORKS:
            return edm.NETWORKS[name](**fields)
    from pfode.scores.io import folders

    if name in folders.NETWORKS:
        return folders.build(name, fields)
    known = ", ".join(("UNet", *edm.NETWORKS, *folders.NETWORKS))
    raise UsageError(f"architecture: unknown network {name!r:.60}", f"known: {known}")


class Plans(Mapping[int, Plan]):
    """The fitted plans beside a model's file, read when they are asked for.

    Raises:
        FileError: a plan that is damaged, or was fitted to other weights.
    """

    def __init__(self, file: Path, digest: str):
        self.files, self.digest = plan_files(file), digest

    def __getitem__(self, nfe: int) -> Plan:
        file = self.files[nfe]
        plan = Plan.load(file)
        if plan.fitted_to != self.digest or plan.nfe != nfe:
            raise FileError(f"{file}: not a plan of {nfe} calls fitted to the model beside it", "pfode fit makes one")
        return plan

    def __contains__(self, nfe: object) -> bool:
        return nfe in self.files

    def __iter__(self) -> Iterator[int]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _build(config: dict[str, Any]) -> Denoiser:
    """The denoiser of a configuration, its network on the meta device."""
    for key in sorted(REQUIRED - set(config)):
        raise UsageError(f"no {key!r}")
    architecture, process = config["architecture"], config["process"]
    for key, value in (("architecture", architecture), ("process", process)):
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise UsageError(f"{key}: expected an object with a name, got {value!r:.60}")
    network: Any = build(architecture)
    prediction = config["prediction"]
    if not isinstance(prediction, str) or prediction not in KNOWN:
        raise UsageError(f"prediction: unknown {prediction!r:.60}")
    for key in ("sigma_data", "time_scale"):
        value = config[key]
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UsageError(f"{key}: expected a positive number, got {value!r:.60}")
    shape = None if network.shape is None else list(network.shape)
    if config["shape"] != shape:
        raise UsageError(f"shape: expected {shape}, as the architecture says, got {config['shape']!r:.60}")
    labels, classes = config["labels"], network.classes
    named = isinstance(labels, list) and all(isinstance(name, str) for name in labels)
    if (labels is not None and not named) or len(labels or ()) != classes:
        raise UsageError(f"labels: expected {classes} names, as the architecture says, got {labels!r:.60}")
    _scalars(process)
    return Denoiser(
        network,
        from_config(process),
        prediction,
        sigma_data=config["sigma_data"],
        shape=shape,
        labels=labels,
        time_scale=config["time_scale"],
        unseen=_unseen(config, classes),
    )


def _unseen(config: dict[str, Any], classes: int) -> list[int]:
    """The classes that never came up in training, `classes` for none; of older files what the recipe says."""
    training = config.get("training")
    hidden = training.get("drop") != 0 if isinstance(training, dict) else True
    unseen = config.get("unseen", [] if hidden or not classes else [classes])
    if not isinstance(unseen, list) or not all(type(one) is int and 0 <= one <= classes for one in unseen):
        raise UsageError(f"unseen: expected numbers of classes from 0 to {classes}, got {unseen!r:.60}")
    return unseen


def _scalars(process: dict[str, Any]) -> None:
    """Refuse anything but numbers (and one list of them) as parameters of a process."""
    for key, value in process.items():
        items = value if isinstance(value, list) else [value]
        if key != "name" and not all(type(item) in (int, float) and math.isfinite(item) for item in items):
            raise UsageError(f"process: {key}: expected a number, got {value!r:.60}")


def fill(network: nn.Module, tensors: Mapping[str, Tensor], where: Callable[[str], Path], uniform: bool = True) -> None:
    """Give a network exactly its tensors.

    Args:
        network: its parameters may be on the meta device.
        tensors: by the names of its state dict.
        where: the file of a tensor, for messages.
        uniform: refuse a tensor whose dtype is another than that of most.

    Raises:
        FileError: a tensor is missing, unknown, of another shape or dtype, or not finite.
    """
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for name in sorted(set(expected) ^ set(tensors)):
        what = "missing" if name in expected else "unknown"
        raise FileError(f"{where(name)}: tensor {name!r} is {what}", "the file is of another model, or damaged")
    found = [tensors[name].dtype for name in expected]
    usual = max(set(found), key=found.count)
    for name, shape in expected.items():
        value = tensors[name]
        dtype = NAMES.get(value.dtype, str(value.dtype))
        if tuple(value.shape) != shape:
            raise FileError(f"{where(name)}: tensor {name!r}: shape {list(value.shape)}, expected {list(shape)}")
        if dtype not in FLOATS:
            raise FileError(f"{where(name)}: tensor {name!r}: dtype {dtype}, expected one of {', '.join(FLOATS)}")
        if uniform and value.dtype != usual:
            raise FileError(f"{where(name)}: tensor {name!r}: dtype {dtype}, the others have {NAMES.get(usual, usual)}")
        if not value.isfinite().all():
            raise FileError(f"{where(name)}: tensor {name!r}: not finite", "the training diverged, or it is damaged")
    network.load_state_dict(dict(tensors), assign=True)
