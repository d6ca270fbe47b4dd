"""pfode samplers: the catalogue and the adaptive samplers as tables, one in full, or the page docs/samplers.md."""

import functools
import inspect
import itertools
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from pfode.cli.options import Command
from pfode.cli.settings import format_set
from pfode.cli.streams import output, table
from pfode.errors import UsageError

if TYPE_CHECKING:
    from pfode.samplers import AdaptiveRecipe, Recipe

ADAPTIVE_GROUP = "adaptive"
OF_AUTO = ("process", "guidance", "NFE", "sampler", "grid", "chart")
MANY = 100  # denoiser calls from which on nothing changes
GROUPS: dict[str, "Callable[[Recipe], bool]"] = {
    "deterministic": lambda recipe: not recipe.stochastic and not recipe.method.pair,
    "exactly invertible": lambda recipe: not recipe.stochastic and recipe.method.pair,
    "stochastic": lambda recipe: recipe.stochastic,
}


@click.command(cls=Command, name="samplers")
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="The page docs/samplers.md.")
@click.pass_context
def command(ctx: click.Context, name: str | None, markdown: bool) -> None:
    """List the samplers: order, measured order, network calls per step, charts, source; or show one, by its NAME; of
    auto what it takes.

    The order is that from exact starting values, in brackets, where it differs, that of the sampler starting by itself;
    of stochastic samplers it is the weak one. Charts are coordinates to step in, the default first. Adaptive samplers
    choose the steps of every picture by the tolerance --rtol.
    """
    from pfode.cli.page import page
    from pfode.samplers import ADAPTIVE, CATALOGUE
    from pfode.samplers.catalogue import recipe

    out = output(ctx)
    if markdown and (name is not None or out.json):
        raise UsageError("--markdown prints the page of all samplers", "leave the rest out")
    if markdown:
        out.emit(None, page().rstrip("\n"))
    elif name in ADAPTIVE:
        out.emit(_adaptive_data(ADAPTIVE[name]), _adaptive_full(ADAPTIVE[name]))
    elif name == "auto":
        rows = choices()
        out.emit([dict(zip(OF_AUTO, row, strict=True)) for row in rows], table(OF_AUTO, rows))
    elif name is not None:
        found = recipe(name)
        out.emit(_data(found), _full(found))
    else:
        rows = [*map(_data, CATALOGUE.values()), *map(_adaptive_data, ADAPTIVE.values())]
        out.emit(rows, _listing())


def _data(recipe: "Recipe") -> dict[str, Any]:
    keys = ("name", "order", "order_as_shipped", "measured", "nfe_per_step", "stochastic", "summary", "source")
    return {key: getattr(recipe, key) for key in keys} | {"charts": list(recipe.charts), "options": options(recipe)}


def _adaptive_data(row: "AdaptiveRecipe") -> dict[str, Any]:
    keys = ("name", "order", "nfe_per_step", "stochastic", "summary", "source")
    found = {key: getattr(row, key) for key in keys}
    return found | {"adaptive": True, "charts": list(row.charts), "options": {"rtol": row.rtol, "atol": row.atol}}


def options(recipe: "Recipe") -> dict[str, Any]:
    """What can be set, and what it is if it is not."""
    return {name: getattr(recipe.method, name) for name in recipe.method.options}


def group(name: str) -> "list[Recipe]":
    """The recipes of a group."""
    from pfode.samplers import CATALOGUE

    return [recipe for recipe in CATALOGUE.values() if GROUPS[name](recipe)]


def choices() -> list[list[str]]:
    """What auto takes by process and guidance, a row per range of NFE."""
    from pfode.process import EDM, VP, Flow
    from pfode.samplers.auto import choose

    rows = []
    for process, guided in itertools.product((VP(), EDM(), Flow()), (False, True)):
        for chosen, run in itertools.groupby(range(1, MANY + 1), functools.partial(choose, process, guided=guided)):
            nfe = [*run]
            calls = f"{nfe[0]} on" if nfe[-1] == MANY else f"{nfe[0]} to {nfe[-1]}"
            rows.append([type(process).__name__, "yes" if guided else "no", calls, *chosen])
    return rows


def _listing() -> str:
    """A table per group, their columns in line, cut to the width of a terminal."""
    from pfode.samplers import ADAPTIVE

    lines: list[Sequence[str]] = []
    for name in GROUPS:
        head = (name, "order", "measured", "NFE/step", "charts", "source")
        lines += [[""] * len(head), head, *([*figures(recipe), recipe.source] for recipe in group(name))]
    head = (ADAPTIVE_GROUP, "order", "rtol", "NFE/step", "charts", "source")
    lines += [[""] * len(head), head, *([*adaptive_figures(row), row.source] for row in ADAPTIVE.values())]
    text = table(lines[1], lines[2:])
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(line if len(line) <= width else f"{line[: width - 1]}…" for line in text.splitlines())


def figures(recipe: "Recipe") -> list[str]:
    """Name, order, measured order, NFE per step and charts."""
    return [recipe.name, _order(recipe), _measured(recipe), f"{recipe.nfe_per_step}", _charts(recipe)]


def adaptive_figures(row: "AdaptiveRecipe") -> list[str]:
    """Name, order, default tolerance, NFE per attempted step and charts."""
    return [row.name, f"{row.order}", f"{row.rtol:g}", f"{row.nfe_per_step}", _charts(row)]


def _charts(recipe: "Recipe | AdaptiveRecipe") -> str:
    from pfode.chart import CHARTS

    return f"{recipe.charts[0]} or any" if set(recipe.charts) == set(CHARTS) else " ".join(recipe.charts)


def _order(recipe: "Recipe") -> str:
    own = recipe.order_as_shipped
    return f"{recipe.order}" if own == recipe.order else f"{recipe.order} ({own})"


def _measured(recipe: "Recipe") -> str:
    starts = ["weak"] if recipe.stochastic else ["exact", "shipped"]
    first, *own = [f"{recipe.measured[start]:.2f}" if start in recipe.measured else "-" for start in starts]
    return first if recipe.order_as_shipped == recipe.order else f"{first} ({own[0]})"


def _full(recipe: "Recipe") -> str:
    """One sampler with all that is known of it."""
    memory, pair, given = recipe.method.memory, recipe.method.pair, options(recipe)
    eta = [f"--eta {given['eta']}"] if "eta" in given else []
    rows = {
        "source": recipe.source,
        "order": f"{'weak ' if recipe.stochastic else ''}{_order(recipe)}, measured {_measured(recipe)}",
        "NFE per step": f"{recipe.nfe_per_step}",
        "charts": " ".join(recipe.charts),
        "options": " ".join([*eta, *(f"--set {word}" for word in format_set(given))]) or "none",
        "looks back": f"on {memory} predictions: takes --lower-order-final" if memory > 1 else "no",
        "stochastic": "yes" if recipe.stochastic else "no",
        "invertible": "exactly" if pair else "no" if recipe.stochastic else "but for the error of the steps",
    }
    lines = [f"{key:<13} {value}" for key, value in rows.items()]
    return "\n".join([f"{recipe.name}: {recipe.summary}", "", *lines, "", inspect.getdoc(type(recipe.method)) or ""])


def _adaptive_full(row: "AdaptiveRecipe") -> str:
    """The same of an adaptive sampler."""
    from pfode.samplers import make_adaptive
    from pfode.samplers.adaptive import MAX_STEPS

    rows = {
        "source": row.source,
        "order": f"{row.order}",
        "NFE per step": f"{row.nfe_per_step}, accepted or rejected",
        "charts": " ".join(row.charts),
        "options": f"--rtol {row.rtol:g} --atol {row.atol:g}; atol goes with rtol where only that is given",
        "steps": f"chosen for every sample, at most {MAX_STEPS}",
        "stochastic": "no",
        "invertible": "to the tolerance",
    }
    lines = [f"{key:<13} {value}" for key, value in rows.items()]
    return "\n".join([f"{row.name}: {row.summary}", "", *lines, "", inspect.getdoc(make_adaptive) or ""])
