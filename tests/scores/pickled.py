"""Network pickles as the EDM repositories write them, made of our own networks by stand-ins for their classes.

`torch_utils.persistence` gives every object a reducer: a call of `_reconstruct_persistent_obj` with a dict that holds
the source code of the class's module, its name and the state. Nothing here is of those repositories.
"""

import collections
import functools
import math
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn

from pfode.scores.networks import edm

THEIRS = {"SongUNet": "SongUNet", "DhariwalUNet": "DhariwalUNet", "EDM2UNet": "UNet"}
SOURCE = "import os\nos.system('touch canary')\nraise SystemExit('the source of a pickle was run')\n"
SMALL: dict[str, Any] = {
    "img_resolution": 8, "label_dim": 3, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4],
}  # fmt: skip
PICTURES = {"in_channels": 2, "out_channels": 2}
SONG = {**SMALL, **PICTURES, "model_channels": 8, "augment_dim": 5}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm++": ("SongUNet", SONG),
    "ncsn++": (
        "SongUNet",
        {**SONG, "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
         "resample_filter": [1, 3, 3, 1]},
    ),
    "skip": ("SongUNet", {**SONG, "encoder_type": "skip", "decoder_type": "skip", "resample_filter": [1, 3, 3, 1]}),
    "adm": ("DhariwalUNet", {**SMALL, **PICTURES, "model_channels": 64, "augment_dim": 5}),
    "edm2": ("EDM2UNet", {**SMALL, "img_channels": 2, "model_channels": 16, "channels_per_head": 8}),
}  # fmt: skip
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100},
    "iDDPMPrecond": {"M": 1000, "C_1": 0.001, "C_2": 0.008},
    "EDMPrecond": {"sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5},
    "Precond": {"sigma_data": 0.5},
}


def by_formula(net: Any) -> Any:
    """The network with weights that are no random numbers: sines of their index, about 1/sqrt(fan in) large."""
    values = {**dict(net.named_parameters()), **{n: b for n, b in net.named_buffers() if "resample" not in n}}
    for k, name in enumerate(sorted(values)):
        value = values[name]
        wave = torch.sin(0.7 * torch.arange(value.numel(), dtype=torch.float64) + k)
        size = 1.5 * value[0].numel() ** -0.5 if value.ndim > 1 else 0.4
        value.data = (size * wave).reshape(value.shape).to(value.dtype)
    return net.eval().requires_grad_(False)


@functools.cache
def network(name: str, **changes: Any) -> Any:
    """One of `NETWORKS`; every test shares it."""
    cls, config = NETWORKS[name]
    return by_formula(edm.NETWORKS[cls](**{**config, **changes}))


class Persistent:
    """An object with their reducer."""

    def __init__(self, name: str, state: dict[str, Any]):
        self.name, self.contents = name, state

    def __reduce__(self) -> Any:
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.name, "state": self.contents}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def persistent(module: nn.Module, name: str | None = None, **more: Any) -> Any:
    """A module as theirs: torch's containers stay what they are."""
    inner = {key: None if m is None else persistent(m) for key, m in module._modules.items()}
    if isinstance(module, nn.ModuleDict):
        copy = nn.ModuleDict()
        copy.__dict__["_modules"] = inner
        return copy
    state = {
        "training": False,
        "_parameters": dict(module._parameters),
        "_buffers": dict(module._buffers),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": collections.OrderedDict(),
        "_modules": inner,
        "_init_args": (),
        "_init_kwargs": {},
        **more,
    }
    return Persistent(name or type(module).__name__, state)


def preconditioned(net: Any, precond: str, **changes: Any) -> Persistent:
    """A network within their preconditioning."""
    config = {key: value for key, value in net.config.items() if value is not None}
    inner = persistent(net, THEIRS[type(net).__name__], _init_kwargs=config, label_dropout=0)
    state: dict[str, Any] = {"training": False, "use_fp16": False, **ATTRIBUTES[precond]}
    state |= {"img_resolution": net.shape[1], "img_channels": net.shape[0], "label_dim": net.classes}
    buffers = {"u": iddpm_levels()} if precond == "iDDPMPrecond" else {}
    modules = {"model": inner}
    if precond == "Precond":
        fourier, linear = edm.MPFourier(4), edm.MPConv(4, 1)
        modules = {"unet": inner, "logvar_fourier": persistent(fourier), "logvar_linear": persistent(linear)}
    state |= {"_parameters": {}, "_buffers": buffers, "_modules": modules, "_init_args": (), "_init_kwargs": {}}
    return Persistent(precond, {**state, **changes})


def iddpm_levels(steps: int = 1000) -> torch.Tensor:
    """Noise levels of iDDPM, the largest first and 0 last (Karras et al. 2022, table 1: C_1 = 0.001, C_2 = 0.008)."""
    bar = [math.sin(0.5 * math.pi * j / steps / 1.008) ** 2 for j in range(steps + 1)]
    u = [0.0] * (steps + 1)
    for j in range(steps, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(bar[j - 1] / bar[j], 0.001) - 1)
    return torch.tensor(u)


def dump(value: Any, protocol: int = 4) -> bytes:
    """Pickle with their modules at hand, by name alone."""
    package, module = ModuleType("torch_utils"), ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("never called")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"torch_utils": package, "torch_utils.persistence": module}):
        return pickle.dumps(value, protocol)


def snapshot(path: Path, net: Any, precond: str, protocol: int = 4, **changes: Any) -> Path:
    """A file as training writes it."""
    value: dict[str, Any] = {"ema": preconditioned(net, precond, **changes)}
    value |= {"loss_fn": Persistent("EDMLoss", {"P_mean": -1.2})}
    path.write_bytes(
        dump({**value, "augment_pipe": None, "dataset_kwargs": {"path": "x", "use_labels": True}}, protocol)
    )
    return path
