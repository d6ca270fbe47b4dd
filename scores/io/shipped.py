"""The models that come with pfode, and the plans that lie beside a model; found without importing torch."""

import glob
import re
from pathlib import Path

__all__ = ["SELF_CONTAINED", "WEIGHTS", "plan_files", "shipped"]

WEIGHTS = Path(__file__).parents[1] / "weights"
SELF_CONTAINED = "model.safetensors"  # of a folder that pfode saved
_PLAN = re.compile(r".*\.(?:calibrated|plan|tuned)-(\d{1,5})\.safetensors", re.DOTALL)


def shipped() -> dict[str, Path]:
    """Their names and files."""
    return {file.stem: file for file in sorted(WEIGHTS.glob("*.safetensors")) if not _PLAN.fullmatch(file.name)}


def plan_files(model: Path) -> dict[int, Path]:
    """The plans beside a model by their number of calls: MODEL.tuned-6.safetensors, else plan-6, else calibrated-6."""
    found = {}
    for kind in ("calibrated", "plan", "tuned"):  # the better ones last
        for file in model.parent.glob(f"{glob.escape(model.stem)}.{kind}-*.safetensors"):
            if match := _PLAN.fullmatch(file.name):
                found[int(match[1])] = file
    return dict(sorted(found.items()))
