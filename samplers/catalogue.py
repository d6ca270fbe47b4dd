"""The catalogue: a recipe is a method in a chart on a grid (idea B); `make_plan` turns it into a Plan (idea C)."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pfode import grids
from pfode.chart import CHARTS, Node
from pfode.chart import chart as find_chart
from pfode.errors import UsageError, integer, number, unknown
from pfode.plan import Plan
from pfode.process import Flow, Process
from pfode.samplers.methods import Ancestral, Heun, Method, Multistep, Row, Space, constant, exact, midpoint

EVERY = tuple(CHARTS)


@dataclass(frozen=True)
class Recipe:
    """A row of the catalogue.

    Args:
        method: what is done per step. charts: where it makes sense, the default first.
        order: of convergence between interior times when started from exact values.
        order_as_shipped: the same with its own start-up, which for multistep methods begins at order 1.
        source: the paper; summary: one line for the table.
    """

    name: str
    method: Method
    charts: tuple[str, ...]
    order: int
    order_as_shipped: int
    source: str
    summary: str

    @property
    def stochastic(self) -> bool:
        """Whether noise is drawn beyond the initial one."""
        return self.method.stochastic

    @property
    def nfe_per_step(self) -> int:
        """Denoiser calls per inner step."""
        return self.method.calls


def _recipes() -> list[Recipe]:
    euler = Multistep(1, exact)
    rows = [
        Recipe("ddim", euler, ("ddim",), 1, 1, "Song et al. 2021 (DDIM), eq. 13", "Euler in sigma/alpha"),
        Recipe(
            "euler", euler, ("ddim",), 1, 1, "Karras et al. 2022, alg. 1 without its correction", "the same as ddim"
        ),
        Recipe(
            "heun", Heun(), EVERY, 2, 2, "Karras et al. 2022, alg. 1", "trapezoid; two calls per step, one in the last"
        ),
        Recipe(
            "dpm++2m",
            Multistep(2, midpoint),
            ("dpm++",),
            2,
            2,
            "Lu et al. 2022 (DPM-Solver++), alg. 2",
            "official form",
        ),
        Recipe("ddpm", Ancestral(euler), ("ddim",), 1, 1, "Ho et al. 2020, eq. 7", "posterior sampling"),
        Recipe(
            "euler-a", Ancestral(euler), ("ddim",), 1, 1, "k-diffusion, sample_euler_ancestral", "the same as ddpm; eta"
        ),
    ]
    charts = ("dpm++", *(c for c in EVERY if c != "dpm++"))
    for k in range(1, 5):
        line = f"Adams-Bashforth {k}, integrated exactly against the chart's weight"
        source = "Zhang & Chen 2022 (DEIS), eq. 15; Lu et al. 2022 (DPM-Solver++)"
        rows.append(Recipe(f"exp-ab{k}", Multistep(k, exact), charts, k, min(k, 2), source, line))
    for k in range(1, 5):
        line = f"Adams-Bashforth {k} with equal-step weights" + (": order 2 on uneven grids" if k > 2 else "")
        source = "Zhang & Chen 2022 (DEIS), appendix B"
        rows.append(Recipe(f"ipndm{k}", Multistep(k, constant), EVERY, min(k, 2), min(k, 2), source, line))
    return rows


CATALOGUE: dict[str, Recipe] = {recipe.name: recipe for recipe in _recipes()}


def recipe(name: str) -> Recipe:
    """Look a recipe up.

    Raises:
        UsageError: unknown name.
    """
    if name not in CATALOGUE:
        raise unknown("sampler", name, (*CATALOGUE, "auto"))
    return CATALOGUE[name]


def make_plan(
    sampler: str | Recipe,
    process: Process,
    steps: int | None = None,
    *,
    nfe: int | None = None,
    grid: str | grids.Grid | Tensor | Sequence[float] | None = None,
    chart: str | None = None,
    final: str = "denoise",
    start: float | None = None,
    stop: float | None = None,
    eta: float | None = None,
) -> Plan:
    """A plan: the sampler's rows on a grid of the process.

    Args:
        sampler: a name of the catalogue, "auto", or a recipe of your own.
        steps: moves from node to node; or nfe: a budget of denoiser calls, from which as many steps are made as fit.
        grid: a name, a `grids.Grid`, or the times themselves (used exactly); None is the process's usual one.
        chart: another of the recipe's charts than its first.
        final: "denoise" ends at clean data, "stop" at the process's t_min.
        start, stop: times of the process between which to integrate instead.
        eta: amount of fresh noise of the ancestral recipes.

    Raises:
        UsageError: unknown names, options that contradict each other, times outside the process.
    """
    if not isinstance(process, Process):
        raise UsageError(f"process: need a noise process, got {process!r:.60}", "process=net.process, or pfode.EDM()")
    found = sampler if isinstance(sampler, Recipe) else recipe(usual(process)[0] if sampler == "auto" else sampler)
    method = found.method if eta is None else _with_eta(found, eta)
    space = Space(find_chart(_chart_of(found, chart)), process)
    rule = usual(process)[1] if grid is None else grid

    def lay(n: int) -> tuple[list[Node], list[list[Row]]]:
        nodes = space.chart.nodes(process, grids.times(process, rule, n, final, start, stop))
        return nodes, _march(space, method, nodes)

    if isinstance(rule, str | grids.Grid):
        if (steps is None) == (nfe is None):
            raise UsageError(f"need either steps or nfe, got steps={steps!r}, nfe={nfe!r}", "steps=20")
        nodes, rows = _within(lay, nfe, method.calls) if steps is None else lay(steps)
    else:
        nodes, rows = lay(0)
        if nfe is not None or steps not in (None, len(nodes) - 1):
            raise UsageError(f"the grid's {len(nodes)} times make {len(nodes) - 1} steps", "leave steps and nfe out")
        if start is not None or stop is not None or final != "denoise":
            raise UsageError("a grid given as times has its own ends", "leave start, stop and final out")
    meta = {"sampler": found.name, "chart": space.chart.name, "grid": getattr(rule, "name", rule)}
    if isinstance(meta["grid"], str):
        meta["final"] = final
    else:
        meta["grid"] = "given"
    if isinstance(method, Ancestral):
        meta["eta"] = method.eta
    return _tabulate(space, nodes, rows, found.name, meta)


def usual(process: Process) -> tuple[str, str]:
    """The sampler and the grid used where none is named.

    Chosen from benchmarks/recipes.py: on the three digits networks they are good at every budget from 5 to 20 calls,
    though not at each the best of all.
    """
    if process.alpha(process.t_max) == 1:
        return "ipndm3", "karras"
    return ("ipndm3", "time") if isinstance(process, Flow) else ("dpm++2m", "time-quadratic")


def _with_eta(found: Recipe, eta: float) -> Method:
    if not isinstance(found.method, Ancestral):
        takers = ", ".join(name for name, r in CATALOGUE.items() if isinstance(r.method, Ancestral))
        raise UsageError(f"{found.name} takes no eta (got {eta})", f"leave it out, or choose one of: {takers}")
    return replace(found.method, eta=number("eta", eta, 0))


def _chart_of(found: Recipe, name: str | None) -> str:
    if name is not None and name not in found.charts:
        raise unknown(f"chart for {found.name}", name, found.charts)
    return name or found.charts[0]


Laid = tuple[list[Node], list[list[Row]]]


def _within(lay: Callable[[int], Laid], nfe: Any, calls: int) -> Laid:
    """The most steps whose rows number at most nfe."""
    nfe = integer("nfe", nfe, 1, grids.MAX_STEPS)
    for n in range(nfe // calls + 1, 0, -1):
        nodes, rows = lay(n)
        if sum(map(len, rows)) <= nfe:
            return nodes, rows
    raise UsageError(f"nfe: {nfe} calls are too few for one step of {calls}", f"nfe={calls}")


def _march(space: Space, method: Method, nodes: list[Node]) -> list[list[Row]]:
    """The rows of every step."""
    known: list[Node] = []
    rows = []
    for node, target in itertools.pairwise(nodes):
        known = [node, *known[: method.order - 1]]
        step, keep = method.step(space, known, target)
        rows.append(step)
        if not keep:
            known = []
    return rows


def _tabulate(space: Space, nodes: list[Node], steps: list[list[Row]], name: str, meta: dict[str, Any]) -> Plan:
    rows = [row for step in steps for row in step]
    states = [row.node for row in rows] + [nodes[-1]]
    window = max(len(row.b) for row in rows)
    return Plan(
        process=space.process,
        prediction=space.chart.prediction,
        t=_column([row.node.t for row in rows]),
        time=_column([node.t for node in states]),
        alpha=_column([node.alpha for node in states]),
        sigma=_column([node.sigma for node in states]),
        r=_column([row.r for row in rows]),
        r_prev=torch.zeros(len(rows)),
        b=_column([row.b + [0.0] * (window - len(row.b)) for row in rows]),
        c=_column([[row.c] if any(row.c for row in rows) else [] for row in rows]),
        init=_column([1.0, 0.0]),
        step=torch.tensor([i for i, step in enumerate(steps) for _ in step]),
        node=torch.tensor([j == 0 for step in steps for j in range(len(step))] + [True]),
        name=name,
        meta=meta,
    )


def _column(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
