"""docs/samplers.md: the catalogue, the adaptive samplers, the charts and the grids as a page to read."""

import functools
import inspect
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pfode.cli.figures import ADAPTIVE_GROUP, GROUPS, OF_AUTO, adaptive_figures, choices, figures, group, options

if TYPE_CHECKING:
    from pfode.samplers import AdaptiveRecipe, Recipe

__all__ = ["page"]

INTRO = """\
# Samplers

Written by `pfode samplers --markdown`. `pfode samplers` prints the tables, `pfode samplers NAME` one sampler in full.

A sampler is a method in a chart on a grid. Any combination becomes a *plan*, a table of numbers that one executor runs:

    pfode sample --sampler unipc3 --chart dpm++ --grid 'karras(5)' --nfe 10
    pfode sample --sampler sa-solver --set tau=0.5 --set between=0.5,30

    plan = pfode.make_plan("unipc3", process=net.process, nfe=10, chart="dpm++", grid="karras(5)")

Every one runs on every process: variance preserving or exploding, EDM, flow.

## The columns

* **order**: of convergence, between two interior times, when the first steps of a multistep method are given exactly;
  in brackets, where it differs, when it starts by itself. Of stochastic samplers the weak order, that of mean and
  covariance.
* **measured**: the same, measured in float64: the slope of the logarithm of the error over the last two doublings of
  the number of steps above rounding, on a smoothly uneven grid between sigma/alpha = 2 and 0.25; the least over a VP,
  an EDM and a flow process, on a Gaussian and on a mixture of three, whose solutions are known. Stochastic samplers: of
  mean and covariance on the Gaussian, carried through the rows of the plan without sampling. The tests that measure,
  `tests/samplers/test_orders.py` and `test_weak_orders.py`, fail where a figure here is not what they find.
* **NFE**: denoiser calls per step. The last step, onto clean data, always takes one.
* **charts**: the coordinates in which it makes sense, the default first; see [below](#charts).
* **options**: with their defaults; on the command line `--eta X`, and `--set NAME=VALUE` for the others.
"""

ADAPTIVE_INTRO = """\
Embedded pairs: they integrate the probability-flow ODE with steps of every sample's own, such that the estimated error
of each is at most atol + rtol |x/m|, in the root mean square over the sample; m is the scale of the chart. Neither
steps nor a grid are given, and the number of calls is an outcome: that of the slowest sample is reported as NFE, and
that of every one beside it.

    pfode sample --sampler rk45 --rtol 1e-3
    pfode samplers rk45

    out = pfode.sample(net, sampler="rk45", rtol=1e-3)
    out.nfe, out.stats["nfe"]

* **NFE**: calls per attempted step; a rejected step costs as much. The first slope and the last step, onto clean data,
  take one each.
* **rtol**, **atol**: the defaults; atol is scaled with rtol where only that is given.

`dpm-adaptive` is k-diffusion's, controller and norm included.
"""


CHARTS = {
    "ddim": ("eps", "alpha", "s", "1", "DDIM, EDM's Heun, LMS, DEIS (rho)"),
    "dpm": ("eps", "alpha", "log s", "e^u", "DPM-Solver"),
    "dpm++": ("x0", "sigma", "-log s", "e^u", "DPM-Solver++"),
    "deis": ("eps", "alpha", "t, of the process", "ds/dt", "DEIS (t)"),
    "flow": ("eps - x0", "alpha + sigma", "sigma/(alpha + sigma)", "1", "rectified flow, flow matching"),
    "trig": ("v", "hypot(alpha, sigma)", "atan s", "1", "TrigFlow"),
    "dpm3": ("v", "hypot(alpha, sigma)", "log s", "1/(2 cosh u)", "DPM-Solver-v3-like"),
}
CHARTS_INTRO = """\
## Charts

A chart is a prediction n, a scale m, a clock u and a weight w such that the probability-flow ODE is d(x/m)/du = w(u) n,
exactly; s is sigma/alpha.
"""

AUTO_INTRO = """\
## What auto takes

The default, `auto`, goes by the process, the number of denoiser calls, and whether there is guidance; VE is taken as
EDM is, sub-VP, cosine and discrete VP as VP.
"""

GRIDS_INTRO = """\
## Grids

Where the steps lie: `--grid NAME`, or with parameters, in the order given here, `--grid 'beta(0.5,0.7)'`. In Python a
grid may also be the times themselves, or what `pfode.samplers.fit.search` finds for a denoiser.
"""


def page() -> str:
    """The text of docs/samplers.md."""
    from pfode.samplers import ADAPTIVE

    parts = [INTRO]
    for name in GROUPS:
        head = ("name", "order", "measured", "NFE", "charts", "options", "what it is", "source")
        parts += [f"## {name.capitalize()}\n", _table(head, map(_row, group(name)))]
    head = ("name", "order", "rtol", "atol", "NFE", "charts", "what it is", "source")
    parts += [f"## {ADAPTIVE_GROUP.capitalize()}\n", ADAPTIVE_INTRO, _table(head, map(_adaptive, ADAPTIVE.values()))]
    rows = [(f"`{name}`", *row) for name, row in CHARTS.items()]
    parts += [CHARTS_INTRO, _table(("name", "n", "m", "u", "w", "known as"), rows)]
    parts += [GRIDS_INTRO, _table(("name", "parameters", "rule"), _grids())]
    return "\n".join([*parts, AUTO_INTRO, _table(OF_AUTO, _auto())])


def _row(recipe: "Recipe") -> list[str]:
    name, *others = figures(recipe)
    given = ", ".join(f"`{key}={_plain(value)}`" for key, value in options(recipe).items())
    return [f"`{name}`", *others, given, recipe.summary, recipe.source]


def _adaptive(row: "AdaptiveRecipe") -> list[str]:
    name, order, rtol, calls, charts = adaptive_figures(row)
    return [f"`{name}`", order, rtol, f"{row.atol:g}", calls, charts, row.summary, row.source]


def _grids() -> list[list[str]]:
    from pfode.grids import GRIDS

    rows = []
    for name, make in GRIDS.items():
        rule = make.func if isinstance(make, functools.partial) else make
        text = (inspect.getdoc(rule) or "").splitlines()[0]
        if isinstance(make, functools.partial) and rule.__name__ in GRIDS:
            text = f"`{rule.__name__}({','.join(map(_plain, make.args))})`"
        parameters = inspect.signature(make).parameters.values()
        rows.append([f"`{name}`", ", ".join(f"`{p.name}={_plain(p.default)}`" for p in parameters), text])
    return rows


def _auto() -> list[list[str]]:
    return [[*where, f"`{name}`", f"`{grid}`", chart] for *where, name, grid, chart in choices()]


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)
