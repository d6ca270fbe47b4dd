"""Text-to-image pipelines from a folder of diffusers or from one file, opened so that nothing in them is executed.

A part is read by the class of diffusers or transformers that model_index.json names, from safetensors alone. Where
those classes fill gaps with random numbers, here a tensor that is missing or not finite is an error.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pfode.errors import FileError, MissingError, PfodeError, UsageError
from pfode.fields import shown
from pfode.header import read_header
from pfode.optional import optional_module
from pfode.scores.io.kinds import pipeline_of
from pfode.scores.io.layout import LEFT_OUT, TEXT_PIPELINES, prompted_pipeline, read_json, stem, variants
from pfode.scores.io.pipelines import PipelineDenoiser, prompted
from pfode.tensors import DTYPES

__all__ = ["load_prompted", "takes_prompts"]

ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast")
NETWORKS = {
    "unet": ("UNet2DConditionModel",), "transformer": ("SD3Transformer2DModel", "FluxTransformer2DModel"),
    "vae": ("AutoencoderKL",),
}  # fmt: skip
_VAE, _CLIP = {"vae": ("first_stage_model.", "vae.")}, ("text_encoders.clip_l.",)
IN_ONE_FILE: dict[str, dict[str, tuple[str, ...]]] = {  # how the names of a part's tensors begin there
    "StableDiffusionPipeline": {**_VAE, "text_encoder": ("cond_stage_model.",)},
    "StableDiffusionXLPipeline": {
        **_VAE, "text_encoder": ("conditioner.embedders.0.",), "text_encoder_2": ("conditioner.embedders.1.",)
    },
    "StableDiffusion3Pipeline": {
        **_VAE, "text_encoder": _CLIP, "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
    },
    "FluxPipeline": {**_VAE, "text_encoder": _CLIP, "text_encoder_2": ("text_encoders.t5xxl.",)},
}  # fmt: skip


def takes_prompts(path: Path) -> str | None:
    """The class of the pipeline that is in a folder or in one file, where it is one under prompts; else None.

    Raises:
        FileError: a damaged file.
    """
    if path.is_dir():
        return prompted_pipeline(path)
    return pipeline_of(read_header(path)) if path.suffix == ".safetensors" else None


def load_prompted(
    path: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    *,
    variant: str | None = None,
    base: Path | None = None,
    tiling: bool = False,
    **words: Any,
) -> PipelineDenoiser:
    """The denoiser of a pipeline on the disk under prompts, with its autoencoder; the text encoders are let go again.

    Args:
        path: a folder that diffusers saved, or one .safetensors file with the names of the original repository.
        device, dtype: of all parts; None: the dtype they were saved in.
        variant: of the weights, such as "fp16"; without it the plain ones, or with dtype float16 the fp16 ones, or the
            only ones that are there.
        base: a folder of diffusers of the same pipeline: for one file, whose configurations and tokenizers it has, and
            the parts that the file lacks. Without it diffusers fetches what it takes the file for.
        tiling: decode large pictures in overlapping tiles, of the size that the autoencoder was trained on.
        words: of `prompted`: prompt, prompts, negative_prompt, guidance, true_cfg, height, width, ...

    Raises:
        FileError: damaged, incomplete, or with parts of another kind; the message names the file.
        UsageError: words that the pipeline cannot take. MissingError: transformers is missing, or a file of a hub.
    """
    optional_module("transformers", "a pipeline under prompts")
    name = takes_prompts(path)
    if name is None:
        raise FileError(f"{path}: is no pipeline under prompts", f"one of {', '.join(TEXT_PIPELINES)}")
    with _quiet():
        if path.is_dir():
            config = _config(path)
            parts = _parts(path, TEXT_PIPELINES[name], dtype, variant) | _arguments(path, name)
            pipe = _pipeline(name)(**parts)
        else:
            pipe = _from_one_file(path, name, dtype, base)
            config = {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}
            config = {k: v for k, v in config.items() if k == "_class_name" or not k.startswith("_")}
        for key, part in pipe.components.items():
            if isinstance(part, nn.Module):
                _check_numbers(path / key if path.is_dir() else path, key, part)
                part.eval().requires_grad_(False)
        pipe.to(device)
        if tiling:
            pipe.vae.enable_tiling()
        if words.get("true_cfg", 1.0) != 1.0 and name != "FluxPipeline":
            raise UsageError(f"true_cfg: is of Flux, {path} is a {name}", "guidance=7.5")
        try:
            den = prompted(pipe, config, **words)
        except UsageError as error:
            if error.message.startswith("pipe.scheduler"):
                raise FileError(f"{path}: {error.message.removeprefix('pipe.')}", error.hint) from error
            raise
    if words.get("negative_prompt") is not None and not den.net.guided:
        hint = "true_cfg=4.0" if name == "FluxPipeline" else "guidance=7.5"
        raise UsageError("negative_prompt: does nothing here: there is no classifier-free guidance", hint)
    return den


def _pipeline(name: str) -> Any:
    """A class of diffusers."""
    return getattr(optional_module("diffusers", f"a {name}"), name)


def _config(folder: Path) -> dict[str, Any]:
    """The configuration of the scheduler."""
    place = folder / "scheduler" / "scheduler_config.json"
    return {key: value for key, value in read_json(place).items() if key == "_class_name" or not key.startswith("_")}


def _parts(folder: Path, keys: Iterable[str], dtype: torch.dtype | None, variant: str | None) -> dict[str, Any]:
    """Parts of a pipeline by their names, None for those that it goes without.

    Raises:
        FileError: one is missing, damaged, or of another class than the pipeline can have.
    """
    file = folder / "model_index.json"
    index, found = read_json(file), {}
    for key in keys:
        if key in LEFT_OUT:
            found[key] = None
            continue
        entry = index.get(key)
        if not isinstance(entry, list) or len(entry) != 2 or not all(e is None or isinstance(e, str) for e in entry):
            raise FileError(f"{file}: {key}: expected [library, class], got {shown(entry)}")
        if entry == [None, None] and key.startswith(("text_encoder", "tokenizer")):
            found[key] = None
        else:
            found[key] = _part(folder / key, file, key, entry, dtype, variant)
    return found


def _arguments(folder: Path, name: str) -> dict[str, Any]:
    """What a pipeline is made with besides its parts."""
    index = read_json(folder / "model_index.json")
    given: dict[str, Any] = {"requires_safety_checker": False} if name == "StableDiffusionPipeline" else {}
    if name == "StableDiffusionXLPipeline":
        given["add_watermarker"] = False
        if isinstance(index.get("force_zeros_for_empty_prompt"), bool):
            given["force_zeros_for_empty_prompt"] = index["force_zeros_for_empty_prompt"]
    return given


def _part(place: Path, index: Path, key: str, entry: list[Any], dtype: torch.dtype | None, variant: str | None) -> Any:
    """One part of a pipeline."""
    library, name = entry
    coder = key.startswith("tokenizer")
    allowed = TOKENIZERS if coder else ENCODERS if key.startswith("text_encoder") else NETWORKS[key]
    if name not in allowed or library != ("diffusers" if key in NETWORKS else "transformers"):
        raise FileError(f"{index}: {key}: expected one of {', '.join(allowed)}, got {shown(entry)}")
    if not place.is_dir():
        raise FileError(f"{place}: no such folder, which {index.name} names", "the download may be incomplete")
    cls = getattr(optional_module(library, f"the {key} of a pipeline"), name)
    with _blamed(place):
        if coder:
            return cls.from_pretrained(str(place), local_files_only=True)
        chosen = _variant(place, stem(key), dtype, variant)
        model, info = cls.from_pretrained(
            str(place), torch_dtype=_saved(place, stem(key)) if dtype is None else dtype, variant=chosen,
            use_safetensors=True, local_files_only=True, output_loading_info=True,
        )  # fmt: skip
    lost = sorted(map(str, info["missing_keys"]))
    lost += [] if library == "transformers" else sorted(map(str, info["unexpected_keys"]))
    lost += sorted(str(one) for one in info.get("mismatched_keys", ()))
    if lost:
        raise FileError(
            f"{place}: tensor {lost[0]!r:.80} is missing, unknown or of another shape",
            "the file is of another model, or damaged",
        )
    return model


def _saved(place: Path, stem: str) -> torch.dtype:
    """The dtype that weights were saved in."""
    entries = read_header(min(place.glob(f"{stem}*.safetensors"))).entries.values()
    return DTYPES.get(next(iter(entries)).dtype if entries else "", torch.float32)


def _variant(place: Path, stem: str, dtype: torch.dtype | None, wanted: str | None) -> str | None:
    """Which of the weights in a folder to read: None for the plain ones, "fp16" for STEM.fp16.safetensors.

    Raises:
        FileError: there is none, or not the wanted one.
    """
    there = variants(place, stem)
    if not there:
        pickles = [*place.glob("*.bin"), *place.glob("*.ckpt"), *place.glob("*.pt")]
        if pickles:
            hint = "write it as safetensors where you trust it: model.save_pretrained(folder, safe_serialization=True)"
            raise FileError(f"{pickles[0]}: is a pickle, which can run any code when read: refused", hint)
        raise FileError(f"{place}: no {stem}.safetensors", "the download may be incomplete")
    names = sorted("(plain)" if one is None else one for one in there)
    if wanted is not None:
        if wanted not in there and None not in there:
            raise FileError(f"{place}: no weights of the variant {wanted!r}", f"there are: {', '.join(names)}")
        return wanted if wanted in there else None
    if dtype == torch.float16 and "fp16" in there:
        return "fp16"
    if None in there:
        return None
    if len(there) > 1:
        raise FileError(f"{place}: several variants of the weights: {', '.join(names)}", f"variant={names[0]}")
    return there.pop()


def _from_one_file(path: Path, name: str, dtype: torch.dtype | None, base: Path | None) -> Any:
    """The pipeline of one file."""
    given: dict[str, Any] = {"torch_dtype": dtype}
    if base is not None:
        if not base.is_dir() or takes_prompts(base) != name:
            problem = f"base {base}: no folder of a {name}, which {path.name} is"
            raise UsageError(problem, "a folder that diffusers saved")
        given |= {"config": str(base), "local_files_only": True}
        names = read_header(path).entries
        lacking = [key for key, start in IN_ONE_FILE[name].items() if not any(n.startswith(start) for n in names)]
        given |= _parts(base, lacking, dtype, None)
    if name == "StableDiffusionPipeline":
        given |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with _blamed(path, base is None):
        return _pipeline(name).from_single_file(str(path), **given)


def _check_numbers(place: Path, key: str, part: nn.Module) -> None:
    """Raise FileError for a part with weights that the file did not have, or that are not finite."""
    for name, value in part.named_parameters():
        if value.is_meta:
            raise FileError(f"{place}: {key}: tensor {name!r} is missing", "the file is of another model, or damaged")
        if not value.isfinite().all():
            raise FileError(f"{place}: {key}: tensor {name!r}: not finite", "the training diverged, or it is damaged")


@contextlib.contextmanager
def _blamed(place: Path, fetched: bool = False) -> Iterator[None]:
    """Name the file in the errors of the libraries that read it.

    Raises:
        FileError: in place of theirs. MissingError: what had to be fetched could not be.
    """
    try:
        yield
    except PfodeError:
        raise
    except Exception as error:  # whatever a reader of damaged files raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        reason = "weights are missing" if "meta tensor" in reason else reason
        if fetched and isinstance(error, OSError | ConnectionError):
            hint = "base=FOLDER, the pipeline that it belongs to as diffusers saved it"
            raise MissingError(f"{place}: its configurations cannot be fetched: {reason}", hint) from error
        hint = "damaged, incomplete, or of another model; a part that is not in the file can come from base=FOLDER"
        raise FileError(f"{place}: cannot be read: {reason}", hint) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the remarks and the bars of the libraries to themselves: what matters of them is an error here."""
    logging_of = [optional_module(f"{name}.utils.logging", name) for name in ("diffusers", "transformers")]
    before = [module.get_verbosity() for module in logging_of]
    for module in logging_of:
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, level in zip(logging_of, before, strict=True):
            module.set_verbosity(level)
            module.enable_progress_bar()
