"""What a grid is, and the register of grids by name: "karras", or with parameters "karras(5)".

Each rule registers itself under its name with `named`; the files of this folder hold them by kind.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from pfode.errors import UsageError, unknown
from pfode.process import Process

__all__ = ["GRIDS", "Grid", "grid", "named", "spelt"]


@dataclass(frozen=True)
class Grid:
    """A rule `place(process, high, low, n)` -> n + 1 falling times from high to low.

    `to_data`: the rule is finite at clean data, so with final = "denoise" it runs on to it instead of to t_min.
    `late`: its first point may lie below t_max, unless the caller names a start.
    """

    name: str
    place: Callable[[Process, float, float, int], Tensor]
    to_data: bool = False
    late: bool = False


GRIDS: dict[str, Callable[..., Grid]] = {}
Rule = TypeVar("Rule", bound=Callable[..., Grid])


def named(name: str) -> Callable[[Rule], Rule]:
    """Register a function of numbers (and grids) that makes a Grid, under its name in texts."""

    def register(rule: Rule) -> Rule:
        GRIDS[name] = rule
        return rule

    return register


def spelt(name: str, values: Sequence[float | str], usual: Sequence[float] = ()) -> str:
    """The text from which `grid` makes the same rule: the name alone where the values are the usual ones."""
    if list(values) == list(usual):
        return name
    return f"{name}({','.join(value if isinstance(value, str) else f'{value:.15g}' for value in values)})"


def grid(text: str) -> Grid:
    """A grid by its name, with or without parameters: "karras", "karras(5)", "beta(0.5,0.7)", "shifted(time,3)".

    `Grid.name` is such a text.

    Raises:
        UsageError: unknown name, unreadable text, or parameters that the grid does not take.
    """
    found = re.fullmatch(r"\s*([^\s(),]+)\s*(?:\((.*)\))?\s*", text)
    if found is None:
        raise UsageError(f"grid: cannot read {text!r:.60}", '"karras", or with parameters "karras(5)"')
    name, inside = found.groups()
    if name not in GRIDS:
        raise unknown("grid", name, GRIDS)
    values = [_parameter(name, part) for part in _split(inside)] if inside is not None else []
    taken = inspect.signature(GRIDS[name])
    try:
        taken.bind(*values)
    except TypeError:
        takes = ", ".join(taken.parameters) or "none"
        problem = f"grid {name}: got {len(values)} parameters, takes {takes}"
        raise UsageError(problem, f'"{GRIDS[name]().name}"') from None
    return GRIDS[name](*values)


def _split(inside: str) -> list[str]:
    """The parts between commas that stand in no inner parentheses."""
    parts, depth = [""], 0
    for letter in inside:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _parameter(name: str, text: str) -> Any:
    """A whole number, a number, or a grid."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    if "rule" in inspect.signature(GRIDS[name]).parameters:
        return grid(text)
    raise UsageError(f"grid {name}: need a number, got {text!r:.60}", '"karras(5)"')
