"""Saving and pushing a denoiser as huggingface_hub's mixin does it: model.safetensors, config.json and README.md."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin

from pfode.errors import PfodeError, WriteError
from pfode.files import write_atomic
from pfode.header import read_header
from pfode.scores.io.save import architecture_of, save
from pfode.scores.io.shipped import SELF_CONTAINED

__all__ = ["HubModel"]

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A score network for pfode: `pfode.load("owner/name")` in Python, `pfode sample --model owner/name` on the command line.

{{ summary }}
"""


class HubModel(
    ModelHubMixin,
    library_name="pfode",
    tags=["diffusion", "pfode", "probability-flow-ode"],
    pipeline_tag="unconditional-image-generation",
    model_card_template=TEMPLATE,
):
    """A denoiser as huggingface_hub's mixin handles it: model.safetensors (self-contained), config.json, README.md."""

    def __init__(self, denoiser: Any, card: dict[str, Any], dtype: torch.dtype):
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
