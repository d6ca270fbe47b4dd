"""Writing a model as one self-contained safetensors file: the weights, and in the metadata everything else.

Metadata: `pfode.config` (JSON: architecture, process, prediction, labels and the card: data, licence, ...),
`pfode.digest` (sha256 of everything), `modelspec.*` (https://github.com/Stability-AI/ModelSpec).
`pfode.scores.io.checkpoint` reads it back.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import pfode
from pfode.errors import UsageError
from pfode.tensors import FLOATS, write_tensors

if TYPE_CHECKING:
    from pfode.scores.denoiser import Denoiser

__all__ = ["FIELDS", "REQUIRED", "architecture_of", "save"]

REQUIRED = {"architecture", "process", "prediction", "sigma_data", "time_scale", "shape", "labels"}
FIELDS = REQUIRED | {
    "unseen",
    "bins",
    "moments",
}  # of the configuration that speak of the model itself; what else is there is its card


def save(
    den: "Denoiser", path: str | os.PathLike[str], *, card: dict[str, Any], dtype: torch.dtype = torch.float16
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
    if den.bins:
        config["bins"] = den.bins
    if den.moments is not None:
        mean, variances = (value.double().flatten().tolist() for value in den.moments)
        if len(mean) == len(variances):  # a covariance does not go into a file
            config["moments"] = {"mean": [round(v, 6) for v in mean], "variances": [round(v, 6) for v in variances]}
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


def architecture_of(den: "Denoiser") -> dict[str, Any]:
    """The JSON object of which `build` makes the denoiser's network.

    Raises:
        UsageError: a network that pfode cannot build.
    """
    net: Any = getattr(den, "net", den)
    whole = all(hasattr(den, field) for field in FIELDS - {"architecture"})  # a wrapper, say for guidance, is not
    if not whole or not isinstance(net, nn.Module) or not hasattr(net, "architecture"):
        hint = "those that pfode.load or `pfode train` gives; of your own keep the code and net.state_dict()"
        raise UsageError(f"save: only networks of pfode can be saved, got {type(net).__name__}", hint)
    described: Any = net.architecture
    return described()
