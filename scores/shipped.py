"""The models that come with the package, found without importing torch."""

import os
from pathlib import Path

from pfode.errors import FileError, UsageError, did_you_mean

WEIGHTS = Path(__file__).parent / "weights"


def shipped() -> dict[str, Path]:
    """Their names and files."""
    return {file.stem: file for file in sorted(WEIGHTS.glob("*.safetensors"))}


def model_path(model: str | os.PathLike[str]) -> Path:
    """The file behind a model argument: the name of a shipped model, or a path.

    Raises:
        UsageError: an unknown name. FileError: no such file, or a folder.
    """
    known, name = shipped(), os.fspath(model)
    if name in known:
        return known[name]
    if os.path.isfile(name):
        return Path(name)
    if not Path(name).suffix and not os.path.exists(name):
        hint = f"{did_you_mean(name, known)} Or give the path of a .safetensors file."
        raise UsageError(f"unknown model {name!r:.200}", hint)
    what = "is a folder: give the .safetensors file in it" if os.path.isdir(name) else "no such file"
    raise FileError(f"{name!r:.200}: {what}", did_you_mean(name, known))
