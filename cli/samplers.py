"""pfode samplers: the catalogue as a table."""

import math
from typing import Any

import click

from pfode.cli.common import Command, output, table


@click.command(cls=Command, name="samplers")
@click.pass_context
def command(ctx: click.Context) -> None:
    """List the samplers: order, network calls per step, noise, charts, source."""
    from pfode.samplers import CATALOGUE

    recipes = list(CATALOGUE.values())
    data: list[dict[str, Any]] = [
        {
            "name": recipe.name,
            "order": recipe.order,
            "nfe_per_step": recipe.nfe_per_step,
            "stochastic": recipe.stochastic,
            "charts": list(recipe.charts),
            "summary": recipe.summary,
            "source": recipe.source,
        }
        for recipe in recipes
    ]
    rows = [
        [
            entry["name"],
            str(entry["order"]),
            _number(entry["nfe_per_step"]),
            "yes" if entry["stochastic"] else "no",
            " ".join(entry["charts"]),
            entry["source"],
        ]
        for entry in data
    ]
    head = ("name", "order", "NFE/step", "stochastic", "charts (the first is the default)", "source")
    output(ctx).emit(data, table(head, rows))


def _number(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else "-"
