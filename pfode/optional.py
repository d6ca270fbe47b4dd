"""Packages that pfode can do without: imported where they are needed, and named with what installs them."""

import importlib
from types import ModuleType

from pfode.errors import MissingError

__all__ = ["optional_module"]

_EXTRAS = {"scipy": "ode"}  # package -> the extra of pyproject.toml that brings it; the others come by default


def optional_module(name: str, what: str) -> ModuleType:
    """Import a module of a package that may not be installed.

    Args:
        name: the module, such as "scipy.special".
        what: what needs it, for the message: "grid 'dm-nonuniform'".

    Raises:
        MissingError: the package is not installed; the hint is the command that installs it.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        extra = _EXTRAS.get(package)
        checkout = f" (in a checkout: pip install --editable '.[{extra}]')" if extra else ""
        raise MissingError(f"{what} needs {package}", f"pip install {package}{checkout}") from error
