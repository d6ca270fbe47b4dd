"""The Hugging Face hub: fetching a model's files, saving and pushing ours through huggingface_hub's mixin."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch

from pfode.errors import FileError, MissingError, PfodeError, UsageError, WriteError
from pfode.files import read_header, write_atomic
from pfode.optional import optional_module
from pfode.scores.denoiser import Denoiser
from pfode.scores.io.checkpoint import architecture_of, save
from pfode.scores.io.shipped import SELF_CONTAINED

try:
    from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
except ModuleNotFoundError:
    optional_module("huggingface_hub", "a model of a hub")  # says what installs it
    raise

SMALL = [
    "model_index.json", "config.json", "scheduler_config.json", "*/config.json", "*/scheduler_config.json",
    "*.safetensors.index*.json",
]  # fmt: skip
WEIGHTS = ["diffusion_pytorch_model*.safetensors", "*-of-*.safetensors"]
TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A score network for pfode: `pfode.load("owner/name")` in Python, `pfode sample --model owner/name` on the command line.

{{ summary }}
"""


def fetch(name: str, revision: str | None = None, **options: Any) -> Path:
    """The folder of a model of the hub: first its configurations, then the weights that `pfode.load` reads.

    Args:
        name: "owner/name". options: of `huggingface_hub.snapshot_download` (token, cache_dir, local_files_only, ...).

    Raises:
        MissingError: it is neither in the cache nor can it be fetched; FileError: it is of another kind.
        UsageError: no name of a model.
    """
    from pfode.scores.io.folders import parts

    options = {"revision": revision, **options}
    folder = _download(name, allow_patterns=[*SMALL, SELF_CONTAINED], **options)
    if os.path.isfile(folder / SELF_CONTAINED):
        return folder
    index, network, _ = parts(folder)
    places = [network, folder / "vae"] if "vae" in index else [network]
    prefixes = ["" if place == folder else f"{place.name}/" for place in places]
    return _download(
        name, allow_patterns=[*SMALL, *(prefix + pattern for prefix in prefixes for pattern in WEIGHTS)], **options
    )


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


class HubModel(
    ModelHubMixin,
    library_name="pfode",
    tags=["diffusion", "pfode", "probability-flow-ode"],
    pipeline_tag="unconditional-image-generation",
    model_card_template=TEMPLATE,
):
    """A denoiser as huggingface_hub's mixin handles it: model.safetensors (self-contained), config.json, README.md."""

    def __init__(self, denoiser: Denoiser, card: dict[str, Any], dtype: torch.dtype):
        architecture_of(denoiser)
        self.denoiser, self.card, self.dtype = denoiser, card, dtype

    def _save_pretrained(self, save_directory: Path) -> None:
        file = save(self.denoiser, save_directory / SELF_CONTAINED, card=self.card, dtype=self.dtype)
        config = read_header(file).config("pfode.config")
        write_atomic(save_directory / "config.json", json.dumps({"library_name": "pfode", **config}, indent=2).encode())

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README, with the licence that the card names."""
        data = copy.deepcopy(self._hub_mixin_info.model_card_data)
        if self.card.get("licence"):
            data.license = str(self.card["licence"]).lower()
        return ModelCard.from_template(card_data=data, template_str=TEMPLATE, **kwargs)

    def keep(self, folder: Path, **options: Any) -> str | None:
        """See `Denoiser.save_pretrained`."""
        try:
            return self.save_pretrained(folder, model_card_kwargs=self._words(), **options)
        except PfodeError:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            raise WriteError(f"{folder}: cannot be written: {reason}", "choose another path, or make room") from error

    def push(self, repo: str, **options: Any) -> str:
        """See `Denoiser.push_to_hub`."""
        return self.push_to_hub(repo, model_card_kwargs=self._words(), **options)

    def _words(self) -> dict[str, str]:
        den = self.denoiser
        parameters = sum(p.numel() for p in den.net.parameters())
        classes = f", {len(den.labels)} classes" if den.labels else ""
        summary = f"{type(den.net).__name__}, {parameters:,} parameters, {den.process}, prediction {den.prediction}"
        return {"title": str(self.card.get("name", "Model")), "summary": f"{summary}, shape {den.shape}{classes}."}


def from_pretrained(name: str, revision: str | None = None, **options: Any) -> Path:
    """The file or folder of a local folder, or of a model of the hub.

    Raises:
        FileError: the folder has no model of pfode; MissingError: see `fetch`.
    """
    folder = Path(name) if os.path.isdir(name) else fetch(name, revision, **options)
    if not os.path.isfile(folder / SELF_CONTAINED):
        raise FileError(f"{folder}: no {SELF_CONTAINED}", "pfode.load reads folders of diffusers as well")
    return folder / SELF_CONTAINED
