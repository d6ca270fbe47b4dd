"""The figures of the samplers, for the tables of `pfode samplers` and the page docs/samplers.md."""

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pfode.samplers import AdaptiveRecipe, Recipe

__all__ = [
    "ADAPTIVE_GROUP",
    "GROUPS",
    "OF_AUTO",
    "adaptive_figures",
    "choices",
    "figures",
    "group",
    "measured",
    "options",
    "order",
]

ADAPTIVE_GROUP = "adaptive"
OF_AUTO = ("process", "guidance", "NFE", "sampler", "grid", "chart")
MANY = 100  # denoiser calls from which on nothing changes
GROUPS: dict[str, "Callable[[Recipe], bool]"] = {
    "deterministic": lambda recipe: not recipe.stochastic and not recipe.method.pair,
    "exactly invertible": lambda recipe: not recipe.stochastic and recipe.method.pair,
    "stochastic": lambda recipe: recipe.stochastic,
}


def options(recipe: "Recipe") -> dict[str, Any]:
    """The options of a sampler with their defaults."""
    return {name: getattr(recipe.method, name) for name in recipe.method.options}


def group(name: str) -> "list[Recipe]":
    """The recipes of a group of `GROUPS`."""
    from pfode.samplers import CATALOGUE

    return [recipe for recipe in CATALOGUE.values() if GROUPS[name](recipe)]


def choices() -> list[list[str]]:
    """The choices of auto: a row of `OF_AUTO` for every process, with and without guidance, and range of NFE."""
    from pfode.process import EDM, VP, Flow
    from pfode.samplers.auto import choose

    rows = []
    for process, guided in itertools.product((VP(), EDM(), Flow()), (False, True)):
        for chosen, run in itertools.groupby(range(1, MANY + 1), functools.partial(choose, process, guided=guided)):
            nfe = [*run]
            calls = f"{nfe[0]} on" if nfe[-1] == MANY else f"{nfe[0]} to {nfe[-1]}"
            rows.append([type(process).__name__, "yes" if guided else "no", calls, *chosen])
    return rows


def figures(recipe: "Recipe") -> list[str]:
    """The cells of a sampler: name, order, measured order, NFE per step and charts."""
    return [recipe.name, order(recipe), measured(recipe), f"{recipe.nfe_per_step}", charts(recipe)]


def adaptive_figures(row: "AdaptiveRecipe") -> list[str]:
    """The cells of an adaptive sampler: name, order, default tolerance, NFE per attempted step and charts."""
    return [row.name, f"{row.order}", f"{row.rtol:g}", f"{row.nfe_per_step}", charts(row)]


def charts(recipe: "Recipe | AdaptiveRecipe") -> str:
    from pfode.chart import CHARTS

    return f"{recipe.charts[0]} or any" if set(recipe.charts) == set(CHARTS) else " ".join(recipe.charts)


def order(recipe: "Recipe") -> str:
    own = recipe.order_as_shipped
    return f"{recipe.order}" if own == recipe.order else f"{recipe.order} ({own})"


def measured(recipe: "Recipe") -> str:
    starts = ["weak"] if recipe.stochastic else ["exact", "shipped"]
    first, *own = [f"{recipe.measured[start]:.2f}" if start in recipe.measured else "-" for start in starts]
    return first if recipe.order_as_shipped == recipe.order else f"{first} ({own[0]})"
