"""Where denoisers come from: exact ones, networks and their preconditioning, guidance, training, the shipped models.

Every name is imported at first use (PEP 562).
"""

import importlib
from typing import Any

if __name__ != "pfode.scores":
    raise ImportError("import pfode.scores: the folder is a part of the package pfode, not a package of its own")

_HOME = {
    "Denoiser": ("denoiser", "Denoiser"),
    "guide": ("guidance", "guide"),
    "load": ("checkpoint", "load_model"),
    "save": ("checkpoint", "save"),
    "Gaussian": ("exact", "Gaussian"),
    "GaussianMixture": ("exact", "GaussianMixture"),
    "Empirical": ("exact", "Empirical"),
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pfode.scores' has no attribute {name!r}")
    module, attribute = _HOME[name]
    value = getattr(importlib.import_module(f"pfode.scores.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
