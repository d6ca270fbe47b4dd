"""pfode samplers: the catalogue and the adaptive samplers as tables, one in full, or the page docs/samplers.md."""

import inspect
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from pfode.cli.figures import (
    ADAPTIVE_GROUP,
    GROUPS,
    OF_AUTO,
    adaptive_figures,
    choices,
    figures,
    group,
    measured,
    options,
    order,
)
from pfode.cli.options import Command
from pfode.cli.settings import format_set
from pfode.cli.streams import output, table
from pfode.errors import UsageError

if TYPE_CHECKING:
    from pfode.samplers import AdaptiveRecipe, Recipe

__all__ = ["command"]


@click.command(cls=Command, name="samplers")
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="The page docs/samplers.md.")
@click.pass_context
def command(ctx: click.Context, name: str | None, markdown: bool) -> None:
    """List the samplers, or show the one of this NAME.

    The list has order, measured order, network calls per step, charts and source. NAME auto shows which sampler it
    chooses for each process and number of calls.

    The order holds from exact starting values; in brackets, where it differs, that of the sampler starting by itself.
    For stochastic samplers it is the weak order. Charts are coordinates to step in, the default first. Adaptive
    samplers choose the steps of every picture by the tolerance --rtol.
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


def _listing() -> str:
    """The tables of all groups with their columns aligned, cut to the width of a terminal."""
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


def _full(recipe: "Recipe") -> str:
    """Everything that is known of a sampler, as text."""
    memory, pair, given = recipe.method.memory, recipe.method.pair, options(recipe)
    eta = [f"--eta {given['eta']}"] if "eta" in given else []
    rows = {
        "source": recipe.source,
        "order": f"{'weak ' if recipe.stochastic else ''}{order(recipe)}, measured {measured(recipe)}",
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
    """Everything that is known of an adaptive sampler, as text."""
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
