"""Names imported at first use (PEP 562), so that `import pfode` and `pfode --help` stay quick."""

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy(package: str, homes: dict[str, list[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        homes: modules and the names they give, `"name"` or `"name = name there"`; the modules under "" are names
            themselves.
    """
    table: dict[str, tuple[str, str]] = {}
    for home, names in homes.items():
        for entry in names:
            name, _, there = entry.partition(" = ")
            table[name] = (home or name, there or (name if home else ""))

    def find(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home, there = table[name]
        module = importlib.import_module(f"{package}.{home}")
        value = getattr(module, there) if there else module
        setattr(sys.modules[package], name, value)
        return value

    return find, lambda: sorted(table)
