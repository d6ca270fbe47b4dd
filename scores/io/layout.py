"""What lies where in a folder of diffusers, read without importing torch: pipelines, components, files of weights.

Nothing of a folder is executed, and only regular files are read.
"""

import os
import re
from pathlib import Path
from typing import Any

from pfode.errors import FileError
from pfode.fields import shown
from pfode.files import parse_json, read_file

__all__ = [
    "LEFT_OUT",
    "PIPELINES",
    "TEXT_PIPELINES",
    "parts",
    "prompted_pipeline",
    "read_json",
    "stem",
    "variants",
    "weight_files",
]

STEM = "diffusion_pytorch_model"
MAX_JSON = 8 << 20  # bytes; an index of shards names every tensor
PIPELINES = {
    "DDPMPipeline": "unet", "DDIMPipeline": "unet", "PNDMPipeline": "unet", "DiTPipeline": "transformer"
}  # fmt: skip
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder", "scheduler")  # no weights that a picture needs
TEXT_PIPELINES = {  # those under prompts, and what they consist of
    "StableDiffusionPipeline": (
        "unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor"
    ),
    "StableDiffusionXLPipeline": (
        "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"
    ),
    "StableDiffusion3Pipeline": (
        "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2",
        "tokenizer_3", "scheduler",
    ),
    "FluxPipeline": (
        "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"
    ),
}  # fmt: skip


def parts(folder: Path) -> tuple[dict[str, Any], Path, Path | None]:
    """What a folder of diffusers consists of: a pipeline, one component, or a checkpoint of a training script.

    Returns:
        The content of model_index.json ({} where there is none), the folder of the network, and the file of the
        scheduler's configuration if there is one.

    Raises:
        FileError: none of what diffusers writes, or a pipeline of another kind.
    """
    index_file = folder / "model_index.json"
    if os.path.exists(index_file):
        index = read_json(index_file)
        name = index.get("_class_name")
        component = PIPELINES.get(name) if isinstance(name, str) else None
        if component is None:
            if name in TEXT_PIPELINES:
                hint = "it takes a prompt: pfode.load(FOLDER, prompt='a cat'), or pfode.from_pipeline(pipe, prompt=...)"
            else:
                hint = "pipe = diffusers.DiffusionPipeline.from_pretrained(...); pfode.from_pipeline(pipe, ...)"
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


def prompted_pipeline(folder: Path) -> str | None:
    """The class of the pipeline under prompts that a folder holds; None where it holds another, or none."""
    index = folder / "model_index.json"
    name = read_json(index).get("_class_name") if os.path.exists(index) else None
    return name if isinstance(name, str) and name in TEXT_PIPELINES else None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a file.

    Raises:
        FileError: it cannot be read, is too large, no JSON object, or has a field twice.
    """
    value = parse_json(str(file), read_file(file, MAX_JSON, "a configuration file"))
    if not isinstance(value, dict):
        raise FileError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def weight_files(place: Path) -> tuple[list[Path], dict[str, Path] | None, Path]:
    """The files that hold the weights of a component.

    Returns:
        The files; for shards the file of every tensor as the index states it, else None; and the file to name in
        messages about all of them.

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
                raise FileError(
                    f"{index}: weight_map: {name!r:.80}: this is no name of a safetensors file: {shown(file)}"
                )
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


def stem(key: str) -> str:
    """How the files of weights of a pipeline's part begin: those of diffusers, and of transformers."""
    return "model" if key.startswith("text_encoder") else STEM


def variants(place: Path, stem: str) -> set[str | None]:
    """The variants of weights in a folder, by the names of their files: None for the plain ones, "fp16", ..."""
    shards = r"(?:-\d{1,6}-of-\d{1,6})?"
    pattern = re.compile(rf"{re.escape(stem)}{shards}(?:\.([\w]+))?{shards}\.safetensors")
    return {found[1] for found in map(pattern.fullmatch, os.listdir(place) if os.path.isdir(place) else []) if found}
