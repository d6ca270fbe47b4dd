"""What a fit keeps in a folder, so that it can be gone on with: each file is bound to what it was kept for."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from pfode.errors import FileError
from pfode.tensors import read_sealed, write_tensors

__all__ = ["Cache"]

KIND = "cache"  # what its files say they are
HINT = "delete it: it is made again"


class Cache:
    """Floating-point tensors by what they depend on.

    Args:
        folder: that is there; None keeps nothing.
        model: what all of them depend on, as JSON.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, model: dict[str, Any]):
        self.folder, self.model = None if folder is None else Path(folder), model

    def path(self, kind: str, what: dict[str, Any]) -> Path | None:
        """The file of something that depends on the model and on `what`; None where nothing is kept."""
        if self.folder is None:
            return None
        whole = {**what, **self.model}
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()
        return self.folder / f"{kind}-{digest[:16]}.safetensors"

    @staticmethod
    def read(path: Path | None, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
        """The tensors of a file, which have these names and shapes; None where there is no file.

        Raises:
            FileError: damaged, renamed, or with other tensors.
        """
        if path is None or not os.path.lexists(path):
            return None
        found, metadata = read_sealed(path, KIND, HINT)
        sound = {name: tuple(value.shape) for name, value in found.items()} == shapes
        floating = all(value.is_floating_point() for value in found.values())
        if not sound or not floating or metadata.get("pfode.for") != path.name:
            raise FileError(f"{path}: not what a fit keeps under this name", HINT)
        return found

    @staticmethod
    def write(path: Path | None, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under a name of `path`; with None nothing is kept."""
        if path is not None:
            write_tensors(path, tensors, {"pfode.kind": KIND, "pfode.for": path.name})


def broken(path: Path | None) -> FileError:
    """The error for a file whose tensors cannot be what a fit keeps."""
    return FileError(f"{path}: not the state of this fit", HINT)
