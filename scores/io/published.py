"""The methods by which a denoiser goes to the Hugging Face hub and comes from it; its library is imported when used."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import pfode
from pfode.optional import optional_module

if TYPE_CHECKING:
    from pfode.scores.denoiser import Denoiser

__all__ = ["Published"]


class Published:
    """What a `Denoiser` is saved, pushed and fetched with."""

    dtype: torch.dtype | None

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        card: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> str | None:
        """Write a folder as the Hugging Face hub has them: model.safetensors, config.json and README.md.

        Args:
            card, dtype: as for `pfode.scores.save`; the dtype is the network's where none is given.
            options: of huggingface_hub's `ModelHubMixin.save_pretrained` (push_to_hub, repo_id, ...).

        Raises:
            UsageError: another network than those of pfode. WriteError: the folder cannot be written.
            MissingError: huggingface_hub is not installed.
        """
        return self._for_hub(card, dtype).keep(Path(folder), **options)

    def push_to_hub(
        self, repo_id: str, *, card: dict[str, Any] | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> str:
        """Upload what `save_pretrained` writes to "owner/name", through huggingface_hub's mixin; returns the commit.

        Args:
            repo_id: "owner/name".
            card, dtype: as for `save_pretrained`.
            options: of `ModelHubMixin.push_to_hub` (private, token, branch, commit_message, create_pr, ...).

        Raises:
            UsageError, MissingError: as `save_pretrained`.
        """
        return self._for_hub(card, dtype).push(repo_id, **options)

    def _for_hub(self, card: dict[str, Any] | None, dtype: torch.dtype | None) -> Any:
        optional_module("huggingface_hub", "a model of a hub")
        from pfode.scores.io.hub import HubModel

        return HubModel(self, card or {}, dtype or self.dtype or torch.float32)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], revision: str | None = None, **options: Any) -> "Denoiser":
        """The denoiser of a folder of `save_pretrained`, on the disk or of the hub; `pfode.load` reads more kinds.

        Args:
            name: a folder, or "owner/name".
            revision: a branch, a tag or a commit of the hub.
            options: of `huggingface_hub.snapshot_download` (token, cache_dir, local_files_only, ...).

        Raises:
            FileError: damaged, or of another kind.
            MissingError: the hub cannot be reached or has no such model, or huggingface_hub is not installed.
        """
        optional_module("huggingface_hub", "a model of a hub")
        from pfode.scores.io.fetch import own_file

        return pfode.load(own_file(os.fspath(name), revision, **options))
