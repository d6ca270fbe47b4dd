"""Fetching the files of a model of the Hugging Face hub: its configurations first, then the weights that are read."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pfode.errors import FileError, MissingError, UsageError
from pfode.scores.io.layout import LEFT_OUT, TEXT_PIPELINES, parts, prompted_pipeline, stem, variants
from pfode.scores.io.shipped import SELF_CONTAINED

__all__ = ["fetch", "own_file"]

SMALL = [
    "model_index.json", "config.json", "scheduler_config.json", "*/config.json", "*/scheduler_config.json",
    "*.safetensors.index*.json",
]  # fmt: skip
WEIGHTS = ["diffusion_pytorch_model*.safetensors", "*-of-*.safetensors"]


def fetch(
    name: str, revision: str | None = None, *, prompts: bool = False, variant: str | None = None, **options: Any
) -> Path:
    """The folder of a model of the hub: first its configurations, then the weights that `pfode.load` reads.

    Args:
        name: "owner/name".
        prompts: whether a pipeline under prompts is wanted, and fetched; variant: of its weights, such as "fp16".
        options: of `huggingface_hub.snapshot_download` (token, cache_dir, local_files_only, ...).

    Raises:
        MissingError: it is neither in the cache nor can it be fetched; FileError: it is of another kind.
        UsageError: no name of a model.
    """
    options = {"revision": revision, **options}
    folder = _download(name, allow_patterns=[*SMALL, SELF_CONTAINED], **options)
    if os.path.isfile(folder / SELF_CONTAINED):
        return folder
    pipeline = prompted_pipeline(folder) if prompts else None
    if pipeline is not None:
        return _fetch_parts(name, folder, [k for k in TEXT_PIPELINES[pipeline] if k not in LEFT_OUT], variant, options)
    index, network, _ = parts(folder)
    places = [network, folder / "vae"] if "vae" in index else [network]
    prefixes = ["" if place == folder else f"{place.name}/" for place in places]
    return _download(
        name, allow_patterns=[*SMALL, *(prefix + pattern for prefix in prefixes for pattern in WEIGHTS)], **options
    )


def _fetch_parts(name: str, folder: Path, keys: list[str], variant: str | None, options: dict[str, Any]) -> Path:
    """The parts of a pipeline under prompts; a part that has not the variant in its plain form, and the other way."""
    texts = [f"{key}/*.{ending}" for key in keys for ending in ("json", "txt", "model")]
    for wanted in (variant, None if variant else "fp16"):
        lacking = [key for key in keys if not variants(folder / key, stem(key)) and not key.startswith("tokenizer")]
        dotted = f".{wanted}" if wanted else ""
        middles = ("", "-*-of-*") if wanted is None else ("", "-?????-of-?????")
        names = [f"{key}/{stem(key)}{part}" for key in lacking for part in {f"{m}{dotted}" for m in middles}]
        names += [f"{key}/{stem(key)}{dotted}-?????-of-?????" for key in lacking]
        if lacking:
            folder = _download(name, allow_patterns=[*SMALL, *texts, *(f"{n}.safetensors" for n in names)], **options)
    return folder


def _download(name: str, **options: Any) -> Path:
    try:
        return Path(snapshot_download(name, **options))
    except HFValidationError as error:
        raise UsageError(f"model {name!r}: no name of a model on the hub", "owner/name") from error
    except GatedRepoError as error:
        message = f"model {name!r}: its owner gives it to those who ask"
        raise MissingError(
            message, f"accept the terms at https://huggingface.co/{name}, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise MissingError(f"model {name!r}: the hub has no revision {options['revision']!r}", name) from error
    except RepositoryNotFoundError as error:
        message = f"model {name!r}: no such file or folder, and the hub has no public model of this name"
        raise MissingError(message, "check the name; for a private one `hf auth login`") from error
    except LocalEntryNotFoundError as error:
        message = f"model {name!r}: no such file or folder, not in the cache of the hub, and the hub cannot be reached"
        raise MissingError(message, f"`hf download {name}` where there is a network, or give a folder") from error
    except (HfHubHTTPError, EntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MissingError(f"model {name!r}: cannot be fetched from the hub: {reason}", "try again later") from error


def own_file(name: str, revision: str | None = None, **options: Any) -> Path:
    """The file or folder of a local folder, or of a model of the hub.

    Raises:
        FileError: the folder has no model of pfode; MissingError: see `fetch`.
    """
    folder = Path(name) if os.path.isdir(name) else fetch(name, revision, **options)
    if not os.path.isfile(folder / SELF_CONTAINED):
        raise FileError(f"{folder}: no {SELF_CONTAINED}", "pfode.load reads folders of diffusers as well")
    return folder / SELF_CONTAINED
