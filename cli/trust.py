"""Code of the user's own: which options may import it, from where their values may come, and the import itself.

A configuration file or an environment variable may belong to somebody else: the working folder can be a download. A
value that runs Python code is therefore taken from the command line alone, unless `--trust-python` stands there too.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click
from click.core import ParameterSource

from pfode.errors import FileError, UsageError

__all__ = ["TRUST", "CodeOption", "calling", "check_sources", "import_name", "names_code", "trust_option"]

TRUST = "trust_python"


class CodeOption(click.Option):
    """An option some of whose values run code.

    Args:
        runs: whether a value does; every other argument is that of `click.Option`.
    """

    def __init__(self, *args: Any, runs: Callable[[str], bool], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.runs = runs


def names_code(value: str) -> bool:
    """Whether a value is MODULE:NAME, and not the path of a file with a colon in it, a model of a hub or an address."""
    return ":" in value and not value.startswith("hf:") and "://" not in value and not os.path.exists(value)


def trust_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--trust-python` to a command. It has no variable and no key in configuration files."""
    return click.option(
        "--trust-python",
        is_flag=True,
        allow_from_autoenv=False,
        help="Let configuration files and PFODE_* variables name Python code, too.",
    )(function)


def check_sources(ctx: click.Context) -> None:
    """Refuse code that is named by anything but the command line.

    Raises:
        FileError: by a configuration file. UsageError: by an environment variable.
    """
    if ctx.params.get(TRUST):
        return
    for option in ctx.command.params:
        if not isinstance(option, CodeOption) or not option.name:
            continue
        where = ctx.get_parameter_source(option.name)
        if where not in (ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP):
            continue
        given = ctx.params[option.name]
        for value in given if isinstance(given, tuple) else [given]:
            if value is None or not option.runs(value):
                continue
            hint = f"{option.opts[0]} {value} on the command line, or --trust-python"
            if where is ParameterSource.ENVIRONMENT:
                raise UsageError(f"PFODE_{option.name.upper()}: {value!r:.60} would run Python code", hint)
            file = ctx.meta.get("pfode.origin", {}).get(option.name, "the configuration")
            raise FileError(f"{file}: {option.name}: {value!r:.60} would run Python code", hint)


def import_name(option: str, name: str) -> Any:
    """What MODULE:NAME stands for; modules of the working folder count.

    Raises:
        UsageError: no such module, or nothing of this name in it.
    """
    module, _, attribute = name.partition(":")
    if module.endswith(".py"):
        right = module.removesuffix(".py").strip("./").replace("/", ".")
        raise UsageError(f"{option} {name}: a module is named without .py", f"{option} {right}:{attribute}")
    with calling(option, name):
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            where = "it is looked for from the working folder"
            raise UsageError(f"{option} {name}: no module {error.name!r}", where) from error
        except AttributeError as error:
            raise UsageError(f"{option} {name}: {error}", f"{module}:NAME, something defined in it") from error


@contextlib.contextmanager
def calling(option: str, name: str) -> Iterator[None]:
    """While code of the user's own runs: the working folder is on `sys.path`, and its exceptions become errors.

    Raises:
        UsageError: the code raised something.
    """
    path = list(sys.path)
    with contextlib.suppress(FileNotFoundError):  # a working folder that was deleted
        sys.path.insert(0, os.getcwd())
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        problem = f"{option} {name}: {type(error).__name__}: {error}"
        raise UsageError(problem, "--debug shows where it was raised") from error
    finally:
        sys.path[:] = path
