"""pfode: a diffusion sampling engine based on probability-flow ODEs.

Every name is imported at first use (PEP 562), so that `import pfode` and `pfode --help` stay quick.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "VP": "process",
    "VPCosine": "process",
    "VPDiscrete": "process",
    "SubVP": "process",
    "VE": "process",
    "EDM": "process",
    "Flow": "process",
    "Process": "process",
    "Denoiser": "denoiser",
    "Plan": "plan",
    "run": "plan",
    "iterate": "plan",
    "grids": "",
    "noise": "",
    "make_plan": "samplers",
    "sample": "samplers",
    "load": "scores",
    "samplers": "",
    "scores": "",
    "errors": "",
    "PfodeError": "errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pfode' has no attribute {name!r}")
    home = _HOME[name]
    if not home:
        return importlib.import_module(f"pfode.{name}")
    value = getattr(importlib.import_module(f"pfode.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
