"""Options of `pfode train` as an objective, and what is usual for points."""

from typing import TYPE_CHECKING, Any

import click

from pfode.errors import UsageError

if TYPE_CHECKING:
    from pfode.scores.networks.mlp import MLPConfig
    from pfode.scores.training.objectives import Objective
    from pfode.scores.training.points import Points

__all__ = ["LAW_NAMES", "OBJECTIVES", "find_objective", "find_points", "perceptron", "usual"]

OBJECTIVES = ("denoising", "flow", "sliced", "implicit", "likelihood")
LAW_NAMES = ("8gaussians", "checkerboard", "moons", "swissroll", "rings", "spirals", "twonorm", "ringnorm")
TAKES = {"weighting": "denoising", "coupling": "flow", "interpolant": "flow", "from_data": "flow"}
VELOCITIES = ("flow", "likelihood")
USUAL = {"batch": 256, "steps": 5000, "lr": 3e-3, "drop": 0.0}  # for points, of what is not said
WIDTH, DEPTH = 96, 4


def usual(ctx: click.Context, options: dict[str, Any]) -> None:
    """Set what nobody said: the process of velocities, the sizes of runs on points, no balance of signed losses.

    Raises:
        UsageError: an option that the objective or the data do not take.
    """

    def said(name: str) -> bool:
        return ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT

    objective, points = options["objective"], options["data"] in LAW_NAMES
    for name, taker in TAKES.items():
        if options[name] is not None and objective != taker:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag}: --objective {objective} takes none", f"--objective {taker}")
    if options["from_data"] is not None and not points:
        raise UsageError(f"--from-data: flows between two sets of points, not {options['data']!r:.60}", "--data moons")
    if options["energy"] and not points:
        raise UsageError(f"--energy: networks of points are potentials, not those of {options['data']!r:.60}")
    if objective in VELOCITIES and not said("process"):
        options["process"] = "flow"
    if points:
        options |= {name: value for name, value in USUAL.items() if not said(name)}
        for name in ("size", "blocks", "attention"):
            if options[name] is not None:
                raise UsageError(f"--{name}: points have none", "--width 2 --depth 4")
        if options["held_out"]:
            raise UsageError("--held-out: a law's points are fresh at every step", "leave it out")
    if (points or objective != "denoising") and not said("balance"):
        options["balance"] = False


def find_objective(options: dict[str, Any]) -> "Objective":
    """The objective of the options."""
    from pfode.scores.training import coupling, objectives

    name = options["objective"]
    given: dict[str, Any] = {key: options[key] for key, taker in TAKES.items() if taker == name and options[key]}
    given.pop("from_data", None)
    if "coupling" in given:
        given["coupling"] = coupling.COUPLINGS[given["coupling"]]()
    return objectives.OBJECTIVES[name](**given)


def find_points(options: dict[str, Any]) -> "Points | None":
    """The points of the options' law, with the points at the other end of a flow; None for pictures.

    Raises:
        UsageError: an unknown law at the other end.
    """
    if options["data"] not in LAW_NAMES:
        return None
    import dataclasses

    from pfode.scores.training.points import points_of

    found, other = points_of(options["data"]), options["from_data"]
    if other is None:
        return found
    card = {**found.card, "from": other, "sha256": f"{other} to {found.card['sha256']}"}
    return dataclasses.replace(found, source=points_of(other), card=card)


def perceptron(options: dict[str, Any], points: "Points", widths: tuple[int, ...] | None) -> "MLPConfig":
    """The network of a run on points: 4 x 96 by default.

    Raises:
        UsageError: layers of several widths, or values out of range.
    """
    from pfode.scores.networks.mlp import MLPConfig

    if widths is not None and len(set(widths)) > 1:
        raise UsageError(f"--widths: a network of points has layers of one width, got {widths}", "--widths 96,96,96,96")
    width = WIDTH if widths is None else widths[0]
    depth = DEPTH if widths is None else len(widths)
    return MLPConfig(
        dims=points.shape[0],
        width=max(8, round(width * (options["width"] or 1))),
        depth=options["depth"] or depth,
        potential=options["energy"],
    )
