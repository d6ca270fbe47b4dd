"""The models that come with the package, found without importing torch."""

import glob
import os
import re
from pathlib import Path

from pfode.errors import FileError, UsageError, did_you_mean

WEIGHTS = Path(__file__).parent / "weights"
_PLAN = re.compile(r".*\.plan-(\d{1,5})\.safetensors")


def shipped() -> dict[str, Path]:
    """Their names and files."""
    return {file.stem: file for file in sorted(WEIGHTS.glob("*.safetensors")) if not _PLAN.fullmatch(file.name)}


def plan_files(model: Path) -> dict[int, Path]:
    """The fitted plans beside a model, MODEL.plan-6.safetensors, by their number of calls."""
    found = {}
    for file in model.parent.glob(f"{glob.escape(model.stem)}.plan-*.safetensors"):
        if match := _PLAN.fullmatch(file.name):
            found[int(match[1])] = file
    return dict(sorted(found.items()))


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
