"""pfode samplers: the catalogue as a table."""

from typing import TYPE_CHECKING, Any

import click

from pfode.cli.common import Command, output, table

if TYPE_CHECKING:
    from pfode.samplers.catalogue import Recipe


@click.command(cls=Command, name="samplers")
@click.pass_context
def command(ctx: click.Context) -> None:
    """List the samplers: order, network calls per step, noise, charts, source.

    The order is that from exact starting values; in brackets, where it differs, that of the sampler starting by itself.
    """
    from pfode.samplers import CATALOGUE

    head = ("name", "order", "NFE/step", "noise", "charts, the default first", "source")
    recipes = CATALOGUE.values()
    output(ctx).emit([_data(recipe) for recipe in recipes], table(head, [_row(recipe) for recipe in recipes]))


def _data(recipe: "Recipe") -> dict[str, Any]:
    keys = ("name", "order", "order_as_shipped", "nfe_per_step", "stochastic", "summary", "source")
    return {key: getattr(recipe, key) for key in keys} | {"charts": list(recipe.charts)}


def _row(recipe: "Recipe") -> list[str]:
    order = f"{recipe.order}" + (f" ({recipe.order_as_shipped})" if recipe.order_as_shipped != recipe.order else "")
    noise = "yes" if recipe.stochastic else "no"
    return [recipe.name, order, f"{recipe.nfe_per_step:g}", noise, " ".join(recipe.charts), recipe.source]
