"""Recipes: chart x method x grid -> Plan; the catalogue, `make_plan` and `sample`."""

if __name__ != "pfode.samplers":
    raise ImportError("import pfode.samplers: the folder is a part of the package pfode, not a package of its own")

import importlib
from typing import Any

_HOME = {
    "CATALOGUE": "catalogue",
    "Recipe": "catalogue",
    "make_plan": "catalogue",
    "usual": "catalogue",
    "sample": "sampling",
    "Samples": "sampling",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pfode.samplers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pfode.samplers.{_HOME[name]}"), name)
