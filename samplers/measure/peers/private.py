"""Modules of other packages as copies of our own: run from their source, with other modules in place of what they name.

Nothing outside of a copy is changed: neither `sys.modules`, nor the package that it is a copy of, nor torch.
"""

import builtins
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from pfode.errors import MissingError

__all__ = ["folder_of", "private_copy"]


def folder_of(package: str, install: str) -> Path:
    """Where a package lies, which is not imported.

    Args:
        install: what installs it, for the error.

    Raises:
        MissingError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingError(f"the package {package.replace('_', '-')} is not installed", install)
    return Path(spec.submodule_search_locations[0])


def private_copy(file: Path, package: str, instead: Mapping[str, Any]) -> ModuleType:
    """A new module of a file's source.

    Args:
        file: the source.
        package: that it belongs to: what its relative imports start from.
        instead: what its import statements get, by the name as it stands there (with the dots of a relative import),
            in place of the module of that name.
    """

    def imported(name: str, globals: Any = None, locals: Any = None, names: Any = (), level: int = 0) -> Any:
        found = instead.get("." * level + name)
        return builtins.__import__(name, globals, locals, names or (), level) if found is None else found

    module = ModuleType(f"{__name__}.{package.replace('.', '_')}_{file.stem}")
    module.__package__, module.__file__ = package, str(file)
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": imported}
    exec(_compiled(file), module.__dict__)
    return module


@functools.cache
def _compiled(file: Path) -> CodeType:
    """The code of a source file."""
    return compile(file.read_text("utf-8"), str(file), "exec")
