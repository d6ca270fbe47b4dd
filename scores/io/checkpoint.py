"""Reading models that `pfode.scores.io.save` wrote: header, digest, configuration and every tensor are checked.

Nothing of a file is executed.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfode.errors import FileError, PfodeError, UsageError
from pfode.files import shown
from pfode.header import read_header
from pfode.plans.table import Plan
from pfode.process import from_config
from pfode.scores.denoiser import KNOWN, Denoiser
from pfode.scores.io import kinds
from pfode.scores.io.save import REQUIRED
from pfode.scores.io.shipped import plan_files
from pfode.scores.io.weights import fill
from pfode.scores.networks.build import build
from pfode.tensors import read_tensors

__all__ = ["Plans", "load_file"]


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
        bins=_bins(config),
        moments=_moments(config, shape),
    )


def _bins(config: dict[str, Any]) -> int | None:
    """How many values an element of the data has; of files that do not say it, those of a byte for known pictures."""
    data = config.get("data")
    name = data.get("name") if isinstance(data, dict) else None
    bins = config.get("bins", 17 if name == "digits" else 256 if name else None)
    if bins is not None and (type(bins) is not int or not 2 <= bins <= 2**16):
        raise UsageError(f"bins: expected an integer from 2 to 65536, got {bins!r:.60}")
    return bins


def _moments(config: dict[str, Any], shape: list[int] | None) -> tuple[Tensor, Tensor] | None:
    """Mean and variances of the data, where the card has them."""
    moments = config.get("moments")
    if moments is None or shape is None:
        return None
    found = []
    for key in ("mean", "variances"):
        values = moments.get(key) if isinstance(moments, dict) else None
        low = 0 if key == "variances" else -math.inf
        if not isinstance(values, list) or len(values) != math.prod(shape):
            raise UsageError(f"moments: {key}: expected {math.prod(shape)} numbers")
        if not all(type(one) in (int, float) and math.isfinite(one) and one >= low for one in values):
            raise UsageError(f"moments: {key}: expected finite numbers" + (" of at least 0" if low == 0 else ""))
        found.append(torch.tensor(values, dtype=torch.float64, device="cpu").reshape(shape))
    return found[0], found[1]


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
