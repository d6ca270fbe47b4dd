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
from pfode.scores.io.opening import load_prompted, takes_prompts

__all__ = ["READERS", "load"]

READERS: dict[str, Callable[[Path], Denoiser]] = {".pkl": load_pickle}  # by a file's ending; others: `load_file`


def load(
    source: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    *,
    process: Process | None = None,
    prediction: str | None = None,
    variant: str | None = None,
    **words: Any,
) -> Denoiser | Any:  # a `Guided` for NAME@2 alone: who names no scale need not tell them apart
    """A model by its name, from a file or a folder, or from the Hugging Face hub.

    Args:
        source: a shipped model; a .safetensors file written by `save`; a folder of diffusers (a DDPM, DDIM, PNDM or DiT
            pipeline, or its network alone) or of `Denoiser.save_pretrained`; a network pickle (.pkl) of EDM or EDM2; or
            the name of such a folder on the hub, "owner/name" or "owner/name@revision", fetched unless it is cached.
            With a number behind an @, "avatars@2", under classifier-free guidance of that scale.
        device, dtype: of the network; None: the dtype it was saved in.
        process, prediction: of a network of diffusers without a scheduler beside it.
        words: of a pipeline under prompts (Stable Diffusion, SDXL, SD3, Flux), a folder or one .safetensors file:
            prompt, or prompts, several as the classes of the denoiser; negative_prompt, guidance, true_cfg, height,
            width, as for `from_pipeline`; base, the folder or the name of the pipeline that one file belongs to;
            tiling: decode large pictures in tiles.
        variant: of its weights, such as "fp16".

    Nothing is executed: header, digest, configuration and every tensor are checked first.

    Raises:
        UsageError: nothing of that name. MissingError: the hub cannot be reached, or has no such model.
        FileError: missing, damaged, changed, or of another kind; the message names the file and the field.
    """
    name, scale = guided_name(source)
    path = model_path(name, bool(words), variant)
    if words:
        return _under_prompts(path, device, dtype, scale, process or prediction, variant=variant, **words)
    if path.is_dir():
        den = load_folder(path, process, prediction)
    elif process is not None or prediction is not None:
        raise UsageError(f"{path}: the file says what its process and its prediction are", "leave them out")
    else:
        den = READERS.get(path.suffix, load_file)(path)
    network = den.net.to(device=device, dtype=dtype, memory_format=torch.channels_last)
    found = den.with_network(network.eval().requires_grad_(False), den.digest, den.plans)
    return found if scale is None else guide(found, scale)


def _under_prompts(
    path: Path, device: torch.device | str, dtype: torch.dtype | None, scale: float | None, stated: Any, **words: Any
) -> Denoiser:
    """A pipeline under prompts.

    Raises:
        UsageError: a model without prompts, or what is stated twice.
    """
    if takes_prompts(path) is None:
        given = next(key for key in words if key != "variant")
        what = "no prompt" if given in ("prompt", "prompts") else f"no {given}="
        hint = "a text-to-image pipeline does: Stable Diffusion, SDXL, SD3, Flux"
        raise UsageError(f"model {path.name}: takes {what}", hint)
    if stated is not None:
        raise UsageError(f"{path}: process and prediction are stated by its scheduler", "leave them out")
    if scale is not None:
        if words.get("guidance") is not None:
            raise UsageError(f"guidance: given twice, {words['guidance']} and @{scale:g}", "give one of them")
        words["guidance"] = scale
    if words.get("base") is not None:
        words["base"] = model_path(words["base"], True)
    return load_prompted(path, device, dtype, **words)
