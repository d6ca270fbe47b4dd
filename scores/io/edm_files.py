"""Network pickles of EDM (Karras et al. 2022) and EDM2 (2024) as denoisers: read by `pickles`, run by `edm`."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pfode.errors import FileError, PfodeError
from pfode.fields import FLAG, Field, checked, either, real, shown, whole
from pfode.header import SIZES
from pfode.process import EDM, VP, Process, VPDiscrete
from pfode.scores.denoiser import Denoiser
from pfode.scores.io import pickles
from pfode.scores.io.pickles import Stored
from pfode.scores.io.weights import fill
from pfode.scores.networks import edm
from pfode.tensors import DTYPES

__all__ = ["load_pickle"]

NETWORKS = {"SongUNet": "SongUNet", "DhariwalUNet": "DhariwalUNet", "UNet": "EDM2UNet"}  # their names and ours
DEPTH = 32  # of modules within modules
MAX_NAME = 1000  # characters of the name of a tensor
UNUSED = ("logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight")  # of the loss of EDM2
LEVEL = either(real(0, 1e9), Field("infinity", lambda value: value == math.inf))
SHARED: dict[str, Field] = {
    "img_resolution": whole(1, 4096), "img_channels": whole(1, 64), "label_dim": whole(0, 100_000)
}  # fmt: skip
PRECONDITIONING: dict[str, dict[str, Field]] = {
    "VPPrecond": {"beta_d": real(0, 1e4), "beta_min": real(1e-6, 1e4), "M": whole(2, 100_000), "epsilon_t": real(0, 1)},
    "VEPrecond": {"sigma_min": real(1e-9, 1e9), "sigma_max": real(1e-9, 1e9)},
    "iDDPMPrecond": {"M": whole(2, 100_000)},
    "EDMPrecond": {"sigma_min": LEVEL, "sigma_max": LEVEL, "sigma_data": real(1e-6, 1e6)},
    "Precond": {"use_fp16": FLAG, "sigma_data": real(1e-6, 1e6)},
}


def load_pickle(file: Path) -> Denoiser:
    """The denoiser in a network pickle: the network under "ema" (or "net") of a snapshot, or the pickled object itself.

    Its process has the noise levels that the preconditioning states: VP for VPPrecond, EDM (alpha = 1) for VEPrecond,
    EDMPrecond and EDM2, the discrete levels of iDDPMPrecond. Classes are named by their numbers.

    Raises:
        FileError: broken, not such a pickle, or one that asks for anything but tensors and plain values.
    """
    precond = _network(file, pickles.read(file))
    place = f"{file}: {precond.name}"
    fields = SHARED | PRECONDITIONING[precond.name]
    try:
        state = checked(place, {key: precond.state[key] for key in fields if key in precond.state}, fields)
        inner = _modules(precond).get("unet" if precond.name == "Precond" else "model")
        if not isinstance(inner, Stored) or inner.name not in NETWORKS:
            known = ", ".join(NETWORKS)
            raise FileError(f"{place}: network: expected one of {known}, got {shown(getattr(inner, 'name', inner))}")
        network = _build(inner, state)
        process, prediction, scale = _process(precond, state)
    except PfodeError as error:
        message = error.message if error.message.startswith(str(file)) else f"{place}: {error.message}"
        raise FileError(message, error.hint) from error
    prefix = "unet." if precond.name == "Precond" else "model."
    buffers = ("u",) if precond.name == "iDDPMPrecond" else UNUSED if precond.name == "Precond" else ()
    stored = {}
    for name, value in _tensors(file, precond):
        if name.startswith(prefix):
            stored[name.removeprefix(prefix)] = value
        elif name not in buffers:
            raise FileError(f"{file}: tensor {shown(name)} is unknown", "the file is of another model, or damaged")
    if sum(value.numel * SIZES[value.storage.dtype] for value in stored.values()) > file.stat().st_size:
        raise FileError(f"{file}: its tensors share their numbers and are larger than the file")
    fill(network, {name: _torch(value) for name, value in stored.items()}, lambda name: file)
    classes = state["label_dim"]
    return Denoiser(
        network.eval().requires_grad_(False),
        process,
        prediction,
        sigma_data=state.get("sigma_data", 0.5),
        shape=network.shape,
        labels=[str(i) for i in range(classes)] if classes else None,
        time_scale=scale,
        unseen=[classes] if classes and not network.config.get("label_dropout", 0) else (),
    )


def _network(file: Path, value: Any) -> Stored:
    """The preconditioned network of what was pickled."""
    if type(value) is dict:
        found = value.get("ema", value.get("net"))
        if found is None:
            raise FileError(f"{file}: no network under 'ema': it has {shown(list(value))}")
        value = found
    if type(value) is not Stored or value.name not in PRECONDITIONING:
        known = ", ".join(PRECONDITIONING)
        what = value.name if type(value) is Stored else type(value).__name__
        raise FileError(f"{file}: expected a network with one of {known}, got {shown(what)}")
    return value


def _build(inner: Stored, state: dict[str, Any]) -> edm.Network:
    """Our network for theirs, without weights; its constructor's arguments are in the pickle."""
    given = inner.state.get("_init_kwargs")
    positional = inner.state.get("_init_args")
    if type(given) is not dict or (positional is not None and (type(positional) is not tuple or positional)):
        raise FileError(f"{inner.name}: _init_kwargs: expected named arguments, got {shown(given)}")
    name = NETWORKS[inner.name]
    with torch.device("meta"):
        network = edm.NETWORKS[name](**{str(key): value for key, value in given.items()})
    wanted = (state["img_channels"], state["img_resolution"], state["img_resolution"])
    if network.shape != wanted or network.classes != state["label_dim"]:
        found = f"shape {list(network.shape)} and {network.classes} classes"
        raise FileError(f"{inner.name}: {found}, but its preconditioning has {list(wanted)} and {state['label_dim']}")
    return network


def _process(precond: Stored, state: dict[str, Any]) -> tuple[Process, str, float]:
    """Process, prediction and time scale: the table 1 of Karras et al. 2022, a column each."""
    if precond.name == "VPPrecond":
        low = state["beta_min"]
        process = VP(low, low + state["beta_d"], t_min=max(state["epsilon_t"], 1e-9))
        return process, "eps", float(state["M"] - 1)
    if precond.name == "VEPrecond":
        return EDM(state["sigma_min"], state["sigma_max"]), "ve", 1.0
    if precond.name == "iDDPMPrecond":
        buffers = precond.state.get("_buffers")
        levels = buffers.get("u") if type(buffers) is dict else None
        if type(levels) is not pickles.Tensor or levels.shape != (state["M"] + 1,):
            raise FileError(f"iDDPMPrecond: u: expected {state['M'] + 1} noise levels")
        sigma = _torch(levels).double()[:-1].flip(0)
        return VPDiscrete(1 / (1 + sigma**2)), "eps", 1.0
    if precond.name == "EDMPrecond":
        low, high = state["sigma_min"], state["sigma_max"]
        return EDM(low or 0.002, 80.0 if high == math.inf else high), "edm", 1.0
    return EDM(), "edm", 1.0


def _modules(module: Stored) -> dict[Any, Any]:
    found = module.state.get("_modules", {}) if type(module.state) is dict else {}
    if type(found) is not dict:
        raise FileError(f"{module.name}: _modules: expected a dict, got {type(found).__name__}")
    return found


def _tensors(file: Path, top: Stored) -> Iterator[tuple[str, pickles.Tensor]]:
    """Parameters and persistent buffers with their names, as a state dict has them; each module is visited once.

    Raises:
        FileError: modules within modules more than 32 deep, one that stands in two places, or something else in the
            place of a tensor or a module.
    """
    seen: set[int] = set()
    left = [(top, "", 0)]
    while left:
        module, prefix, depth = left.pop()
        if depth > DEPTH or len(prefix) > MAX_NAME:
            raise FileError(f"{file}: modules within modules, more than {DEPTH} deep")
        if id(module) in seen:
            raise FileError(f"{file}: {shown(prefix)}: a module that stands in two places")
        seen.add(id(module))
        for key in ("_parameters", "_buffers"):
            values = module.state.get(key, {})
            if type(values) is not dict:
                raise FileError(f"{file}: {shown(prefix + key)}: expected a dict, got {type(values).__name__}")
            for name, value in values.items():
                if type(value) is pickles.Tensor:
                    yield prefix + _part(file, name), value
                elif value is not None:
                    place = shown(prefix + _part(file, name))
                    raise FileError(f"{file}: {place}: expected a tensor, got {type(value).__name__}")
        for name, inner in _modules(module).items():
            if type(inner) is Stored and type(inner.state) is dict:
                left.append((inner, f"{prefix}{_part(file, name)}.", depth + 1))
            elif inner is not None:
                place = shown(prefix + _part(file, name))
                raise FileError(f"{file}: {place}: expected a module, got {type(inner).__name__}")


def _part(file: Path, name: Any) -> str:
    """A part of the name of a tensor."""
    if type(name) is not str or len(name) > MAX_NAME:
        raise FileError(f"{file}: a name of a module or a tensor that is none: {shown(name)}")
    return name


def _torch(tensor: pickles.Tensor) -> torch.Tensor:
    storage = tensor.storage
    if not tensor.numel:
        return torch.empty(tensor.shape, dtype=DTYPES[storage.dtype])
    flat = torch.frombuffer(storage.data, dtype=DTYPES[storage.dtype])
    return flat.as_strided(tensor.shape, tensor.stride, tensor.offset).clone(memory_format=torch.contiguous_format)
