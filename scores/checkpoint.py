"""Models as one self-contained safetensors file: the weights, and in the metadata everything else.

Metadata: `pfode.config` (JSON: architecture, process, prediction, labels and the card: data, licence, ...),
`pfode.digest` (sha256 of everything), `modelspec.*` (https://github.com/Stability-AI/ModelSpec). Loading runs no code.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor, nn

import pfode
from pfode.errors import FileError, PfodeError, UsageError
from pfode.files import Header, content_digest, read_header, write_atomic
from pfode.plan import Plan
from pfode.prediction import PREDICTIONS
from pfode.process import from_config
from pfode.scores.denoiser import Denoiser
from pfode.scores.shipped import model_path, plan_files
from pfode.scores.unet import UNet, UNetConfig

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
NAMES = {dtype: name for name, dtype in FLOATS.items()}
FIELDS = {"architecture", "process", "prediction", "sigma_data", "time_scale", "shape", "labels"}


def save(
    den: Denoiser, path: str | os.PathLike[str], *, card: dict[str, Any], dtype: torch.dtype = torch.float16
) -> Path:
    """Write a denoiser whose network is a `UNet`.

    Args:
        card: JSON about the model: data, licence, command, ...; kept beside the configuration.
        dtype: of the weights in the file.

    Raises:
        UsageError: another network, weights that are not finite (in that dtype), or a card that is no JSON.
        WriteError: the file cannot be written; an older one is kept.
    """
    if not isinstance(den.net, UNet):
        raise UsageError(f"save: only networks of pfode can be saved, got {type(den.net).__name__}")
    clash = FIELDS & set(card)
    if clash:
        raise UsageError(f"save: card: {sorted(clash)[0]!r} is a field of the model itself", "choose another key")
    config = {
        **card,
        "architecture": {"name": "UNet", **den.net.config.to_json()},
        "process": den.process.config(),
        "prediction": den.prediction,
        "sigma_data": den.sigma_data,
        "time_scale": den.time_scale,
        "shape": den.shape,
        "labels": den.labels,
    }
    try:
        text = json.dumps(config, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"save: card: not JSON ({error})") from error
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in den.net.state_dict().items()}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise UsageError(
                f"save: {name}: not finite in {dtype}", "the training diverged, or save(..., dtype=torch.float32)"
            )
    metadata = {
        "format": "pt",
        "pfode.kind": "model",
        "pfode.version": pfode.__version__,
        "pfode.config": text,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "pfode/UNet",
        "modelspec.implementation": "pfode",
        "modelspec.title": str(card.get("name", Path(path).stem)),
        "modelspec.license": str(card.get("licence", "")),
        "modelspec.resolution": "x".join(str(side) for side in (den.shape or ())[1:]),
    }
    raw = {name: (NAMES[dtype], tuple(value.shape), _bytes(value)) for name, value in tensors.items()}
    metadata["pfode.digest"] = content_digest(metadata, raw)
    return write_atomic(path, serialise(tensors, metadata=metadata))


def load(
    source: str | os.PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Denoiser:
    """A shipped model by its name, or a file written by `save`.

    Nothing is executed: header, digest, configuration and every tensor are checked first.

    Raises:
        UsageError: neither a name nor a file.
        FileError: missing, damaged, changed, or of another kind; the message names the file and the field.
    """
    file = model_path(source)
    header = read_header(file)
    kind = header.metadata.get("pfode.kind")
    if kind != "model":
        what = f"a pfode {kind}" if kind else "not a pfode model"
        raise FileError(f"{file}: metadata 'pfode.kind': this is {what}", "pfode info FILE shows what it holds")
    if "pfode.digest" not in header.metadata:
        raise FileError(f"{file}: metadata: no 'pfode.digest'", "the file is damaged: fetch or write it again")
    header.verify()
    config = header.config("pfode.config")
    try:
        den = _build(config)
    except PfodeError as error:
        raise FileError(f"{file}: metadata 'pfode.config': {error.message}", error.hint) from error
    tensors = _tensors(header, den.net)
    den.net.load_state_dict(tensors, assign=True)
    network = den.net.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    digest = header.metadata["pfode.digest"]
    return den.with_network(network.eval().requires_grad_(False), digest, Plans(file, digest))


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
        if plan.meta.get("fitted", {}).get("model") != self.digest or plan.nfe != nfe:
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
    for key in sorted(FIELDS - set(config)):
        raise UsageError(f"no {key!r}")
    architecture, process = config["architecture"], config["process"]
    for key, value in (("architecture", architecture), ("process", process)):
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise UsageError(f"{key}: expected an object with a name, got {value!r:.60}")
    if architecture["name"] != "UNet":
        raise UsageError(f"architecture: unknown network {architecture['name']!r:.60}", "known: UNet")
    net = UNetConfig.from_json({key: value for key, value in architecture.items() if key != "name"})
    prediction = config["prediction"]
    if not isinstance(prediction, str) or prediction not in ("edm", *PREDICTIONS):
        raise UsageError(f"prediction: unknown {prediction!r:.60}")
    for key in ("sigma_data", "time_scale"):
        value = config[key]
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UsageError(f"{key}: expected a positive number, got {value!r:.60}")
    shape = [net.channels, net.size, net.size]
    if config["shape"] != shape:
        raise UsageError(f"shape: expected {shape}, as the architecture says, got {config['shape']!r:.60}")
    labels = config["labels"]
    named = isinstance(labels, list) and all(isinstance(name, str) for name in labels)
    if (labels is not None and not named) or len(labels or ()) != net.classes:
        raise UsageError(f"labels: expected {net.classes} names, as the architecture says, got {labels!r:.60}")
    _scalars(process)
    with torch.device("meta"):
        network = UNet(net)
    return Denoiser(
        network,
        from_config(process),
        prediction,
        sigma_data=config["sigma_data"],
        shape=shape,
        labels=labels,
        time_scale=config["time_scale"],
    )


def _scalars(process: dict[str, Any]) -> None:
    """Refuse anything but numbers (and one list of them) as parameters of a process."""
    for key, value in process.items():
        items = value if isinstance(value, list) else [value]
        if key != "name" and not all(type(item) in (int, float) and math.isfinite(item) for item in items):
            raise UsageError(f"process: {key}: expected a number, got {value!r:.60}")


def _tensors(header: Header, network: nn.Module) -> dict[str, Tensor]:
    """The tensors of the file, exactly those the network has, floating point and finite."""
    file, expected = header.path, {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for name in sorted(set(expected) ^ set(header.entries)):
        raise FileError(
            f"{file}: tensor {name!r} is {'missing' if name in expected else 'unknown'}", "the file is of another model"
        )
    for name, shape in expected.items():
        entry = header.entries[name]
        if entry.shape != shape:
            raise FileError(f"{file}: tensor {name!r}: shape {list(entry.shape)}, expected {list(shape)}")
        if entry.dtype not in FLOATS:
            raise FileError(f"{file}: tensor {name!r}: dtype {entry.dtype}, expected one of {', '.join(FLOATS)}")
    try:
        tensors = parse(file.read_bytes())
    except (SafetensorError, OSError) as error:
        raise FileError(f"{file}: cannot be read: {error}") from error
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise FileError(f"{file}: tensor {name!r}: not finite", "the training diverged, or the file is damaged")
    return tensors


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
