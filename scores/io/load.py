"""`load`: whatever names a model, as a denoiser. It stands on all other readers, and none of them on it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pfode.errors import UsageError
from pfode.process import Process
from pfode.scores.denoiser import Denoiser
from pfode.scores.guidance import guide
from pfode.scores.io.checkpoint import load_file
from pfode.scores.io.edm_files import load_pickle
from pfode.scores.io.find import guided_name, model_path
from pfode.scores.io.folders import load_folder

__all__ = ["READERS", "load"]

READERS: dict[str, Callable[[Path], Denoiser]] = {".pkl": load_pickle}  # by a file's ending; others: `load_file`


def load(
    source: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    *,
    process: Process | None = None,
    prediction: str | None = None,
) -> Denoiser | Any:  # a `Guided` for NAME@2 alone: who names no scale need not tell them apart
    """A model by its name, from a file or a folder, or from the Hugging Face hub.

    Args:
        source: a shipped model; a .safetensors file written by `save`; a folder of diffusers (a DDPM, DDIM, PNDM or DiT
            pipeline, or its network alone) or of `Denoiser.save_pretrained`; a network pickle (.pkl) of EDM or EDM2; or
            the name of such a folder on the hub, "owner/name" or "owner/name@revision", fetched unless it is cached.
            With a number behind an @, "emoji@2", under classifier-free guidance of that scale.
        device, dtype: of the network; None: the dtype it was saved in.
        process, prediction: of a network of diffusers without a scheduler beside it.

    Nothing is executed: header, digest, configuration and every tensor are checked first.

    Raises:
        UsageError: nothing of that name. MissingError: the hub cannot be reached, or has no such model.
        FileError: missing, damaged, changed, or of another kind; the message names the file and the field.
    """
    name, scale = guided_name(source)
    path = model_path(name)
    if path.is_dir():
        den = load_folder(path, process, prediction)
    elif process is not None or prediction is not None:
        raise UsageError(f"{path}: the file says what its process and its prediction are", "leave them out")
    else:
        den = READERS.get(path.suffix, load_file)(path)
    network = den.net.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    found = den.with_network(network.eval().requires_grad_(False), den.digest, den.plans)
    return found if scale is None else guide(found, scale)
