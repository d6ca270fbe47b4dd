"""The catalogue: a recipe is a method in a chart on a grid; `make_plan` turns it into a Plan (docs/design.md, B, C)."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pfode import defaults, grids
from pfode.chart import CHARTS, Node
from pfode.chart import chart as find_chart
from pfode.errors import UsageError, integer, number, shortened, unknown
from pfode.plans.table import Plan
from pfode.prediction import PREDICTIONS
from pfode.process import Process
from pfode.samplers import auto
from pfode.samplers.invertible import Bdia, Belm, Edict
from pfode.samplers.langevin import AnnealedLangevin, Corrected
from pfode.samplers.methods import (
    Method,
    Multistep,
    Pndm,
    PredictorCorrector,
    Res3,
    RungeKutta,
    Space,
    Trail,
    constant,
    exact,
    halved,
    official,
    taylor,
    variable,
)
from pfode.samplers.names import ARGUMENTS, CLASSES, FAMILIES, squeezed, with_grid
from pfode.samplers.stochastic import Ancestral, AncestralMidpoint, Churn, ErSde, Reverse, SaSolver
from pfode.samplers.tape import Linear, Tape
from pfode.tableau import HEUN2, HEUN3, MIDPOINT, RK4

__all__ = [
    "CATALOGUE",
    "Recipe",
    "make_plan",
    "recipe",
]

EVERY = tuple(CHARTS)
FLAT = tuple(name for name, chart in CHARTS.items() if chart.density is None)


@dataclass(frozen=True)
class Recipe:
    """A row of the catalogue.

    Args:
        method: what is done per step. charts: where it makes sense, the default first.
        order: of convergence between interior times when started from exact values; weak where stochastic.
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

    @property
    def measured(self) -> dict[str, float]:
        """The orders that the tests measured: from "exact" values and as "shipped", or "weak" where stochastic.

        The least over the processes; empty for a recipe that is not in the catalogue.
        """
        return _measured().get(self.name, {}) if CATALOGUE.get(self.name) is self else {}


@functools.cache
def _measured() -> dict[str, dict[str, float]]:
    return json.loads(Path(__file__).with_name("measured.json").read_text())


EULER_STEP = Multistep(1, exact)
KARRAS = "Karras et al. 2022"
DPM, DPM_PP = "Lu et al. 2022 (DPM-Solver)", "Lu et al. 2022 (DPM-Solver++)"
DEIS, UNIPC = "Zhang & Chen 2022 (DEIS)", "Zhao et al. 2023 (UniPC)"
RES, K_DIFFUSION = "Zhang et al. 2023 (RES)", "k-diffusion"


def _first(name: str) -> tuple[str, ...]:
    """Every chart, this one the first."""
    return (name, *(c for c in EVERY if c != name))


def _recipes() -> list[Recipe]:
    heun, midpoint = RungeKutta(HEUN2), RungeKutta(MIDPOINT)
    heun_3 = RungeKutta(HEUN3, support=((), (0,), ()))
    midpoint_slope = RungeKutta(MIDPOINT, support=((), (0,)))
    ddim, dpm, plus = ("ddim",), ("dpm",), ("dpm++",)
    rows: list[Recipe] = []

    def add(name: str, method: Method, charts: tuple[str, ...], order: int, shipped: int, source: str, text: str):
        rows.append(Recipe(name, method, charts, order, shipped, source, text))

    add("ddim", Ancestral(EULER_STEP, 0.0), ddim, 1, 1, "Song et al. 2021 (DDIM), eq. 13, 16", "Euler in s; eta")
    add("euler", Churn(EULER_STEP, 0.0), ddim, 1, 1, f"{KARRAS}, alg. 2 without its correction", "Euler in s; churn")
    add("heun", Churn(heun, 0.0), EVERY, 2, 2, f"{KARRAS}, alg. 1 and 2", "trapezoid; churn")
    add("dpm2", Churn(midpoint, 0.0), _first("dpm"), 2, 2, f"{K_DIFFUSION}, sample_dpm_2", "as dpm-2s; churn")
    add("rk4", RungeKutta(RK4, True), EVERY, 4, 4, "Kutta 1901", "Runge-Kutta 4 on w n")
    weighted = ("dpm++", *(name for name in EVERY if name not in (*FLAT, "dpm++")))
    add("exp-rk4", RungeKutta(RK4), weighted, 3, 3, "Kutta 1901", "the same, its interpolants integrated against w")
    add("dpm-1", EULER_STEP, dpm, 1, 1, f"{DPM}, eq. 3.7", "the same as ddim")
    add("dpm-2s", midpoint, dpm, 2, 2, f"{DPM}, alg. 1", "singlestep, r1 = 1/2")
    add("dpm-3s", heun_3, dpm, 3, 3, f"{DPM}, alg. 2", "singlestep, r1 = 1/3, r2 = 2/3")
    add("dpm-2m", Multistep(2, variable), dpm, 2, 2, f"{DPM_PP}, on eps", "multistep")
    add("dpm-3m", Multistep(3, official), dpm, 2, 2, f"{DPM_PP}, on eps", "multistep, half the curvature as in code")
    add("dpm++2s", midpoint, plus, 2, 2, f"{DPM_PP}, alg. 1", "singlestep, r1 = 1/2")
    add("dpm++3s", heun_3, plus, 3, 3, f"{DPM_PP}, code", "singlestep, r1 = 1/3, r2 = 2/3")
    add("dpm++2m", Multistep(2, variable), plus, 2, 2, f"{DPM_PP}, alg. 2", "official (midpoint) form")
    add("dpm++2m-heun", Multistep(2, exact), plus, 2, 2, f"{DPM_PP}, code", "exact slope: as exp-ab2, res-2m")
    add("dpm++3m", Multistep(3, official), plus, 2, 2, f"{DPM_PP}, code", "official form: half the curvature")
    add("dpm++3m-exact", Multistep(3, exact), plus, 3, 2, f"{DPM_PP}, eq. 4.2", "as exp-ab3, res-3m")
    for k in range(1, 5):
        line = f"Adams-Bashforth {k}, integrated exactly against the chart's weight"
        add(f"exp-ab{k}", Multistep(k, exact), _first("dpm++"), k, min(k, 2), f"{DEIS}, eq. 15; {DPM_PP}", line)
    for k in range(1, 4):
        source, line = f"{DEIS}, eq. 15", f"polynomials of degree {k} in"
        add(f"deis-tab{k}", Multistep(k + 1, exact), ("deis",), k + 1, 2, source, f"{line} t (on EDM of a fitted VP)")
        add(f"deis-rhoab{k}", Multistep(k + 1, exact), ddim, k + 1, 2, source, f"{line} s")
    for k in range(1, 5):
        line = f"Adams-Bashforth {k} with equal-step weights" + (": order 2 on uneven grids" if k > 2 else "")
        add(f"ipndm{k}", Multistep(k, constant), EVERY, min(k, 2), min(k, 2), f"{DEIS}, appendix B", line)
    for k in range(1, 5):
        line = f"Adams-Bashforth {k} with the weights of the uneven steps, times the mean of w"
        add(f"ipndm-v{k}", Multistep(k, variable), EVERY, k, min(k, 2), f"{DEIS}, appendix B; diff-sampler", line)
    add("lms", Multistep(4, exact), ddim, 4, 2, f"{K_DIFFUSION}, sample_lms", "Adams-Bashforth 4 in s")
    add("pndm", Pndm(), ddim, 2, 2, "Liu et al. 2022 (PNDM), eq. 12-13", "pseudo Runge-Kutta, 12 calls, then ipndm4")
    for bh, suffix in ((2, ""), (1, "-bh1")):
        for k in range(1, 6):
            source = f"{UNIPC}, alg. 3-4"
            add(
                f"unip{k}{suffix}",
                PredictorCorrector(k, 0, bh),
                _first("dpm++"),
                k,
                min(k, 2),
                source,
                "predictor only",
            )
        for k in range(1, 6):
            source = f"{UNIPC}, alg. 1-2"
            add(
                f"unipc{k}{suffix}",
                PredictorCorrector(k, k, bh),
                _first("dpm++"),
                k + 1,
                min(k + 1, 3),
                source,
                "with UniC",
            )
    add("res-2s", midpoint_slope, _first("dpm++"), 2, 2, f"{RES}, alg. 1", "singlestep, c2 = 1/2")
    add("res-3s", Res3(), _first("dpm++"), 3, 3, f"{RES}; Hochbruck & Ostermann 2005, eq. 5.9", "stiff order 3")
    add("res-2m", Multistep(2, exact), plus, 2, 2, f"{RES}, alg. 2", "as exp-ab2")
    add("res-3m", Multistep(3, exact), plus, 3, 2, f"{RES}, section 4", "as exp-ab3")
    add("o-belm", Belm(), FLAT, 2, 2, "Wang et al. 2024 (BELM), eq. 18", "exactly invertible")
    add("bdia", Bdia(), FLAT, 1, 1, "Zhang et al. 2024 (BDIA), eq. 18", "exactly invertible; gamma")
    calm = ("flow", "ddim", "trig")
    add("edict", Edict(), calm, 1, 1, "Wallace et al. 2023 (EDICT), eq. 13-16", "exactly invertible; two calls; p")

    add("ddpm", Ancestral(EULER_STEP), ddim, 1, 1, "Ho et al. 2020, eq. 7", "posterior sampling; eta")
    add("euler-a", Ancestral(EULER_STEP), ddim, 1, 1, f"{K_DIFFUSION}, sample_euler_ancestral", "the same as ddpm; eta")
    add("dpm2-a", Ancestral(midpoint), dpm, 2, 2, f"{K_DIFFUSION}, sample_dpm_2_ancestral", "eta")
    add("dpm++2s-a", Ancestral(midpoint), plus, 2, 2, f"{K_DIFFUSION}, sample_dpmpp_2s_ancestral", "eta")
    add("edm", Churn(heun, 40.0, 0.05, 50.0), EVERY, 2, 2, f"{KARRAS}, alg. 2, table 5", "heun with churn")
    add("dpm++sde", AncestralMidpoint(), plus, 1, 1, f"{K_DIFFUSION}, sample_dpmpp_sde", "eta")
    for name, weights, text in (("", variable, "midpoint"), ("-heun", exact, "exact slope")):
        source = f"{DPM_PP}, {K_DIFFUSION}"
        add(f"dpm++2m-sde{name}", Reverse(Multistep(2, weights)), plus, 2, 2, source, f"{text}; eta")
    add("dpm++3m-sde", Reverse(Multistep(3, halved)), plus, 2, 2, f"{K_DIFFUSION}, sample_dpmpp_3m_sde", "eta")
    for name, sa in (("sa-solver", SaSolver()), ("sa-solver2", SaSolver(predictor=2, corrector=2))):
        text = f"predictor {sa.predictor}, corrector {sa.corrector}; tau"
        add(name, sa, plus, 2, 2, "Xue et al. 2023 (SA-Solver), alg. 1", text)
    langevin = AnnealedLangevin(EULER_STEP)
    add("langevin", langevin, ddim, 0, 0, "Song & Ermon 2019, alg. 1", "annealed Langevin dynamics; rounds, size")
    source, text = "Song et al. 2021 (score SDE), alg. 4-5", "ddpm, then a Langevin step; rounds, size"
    add("ddpm-pc", Corrected(Ancestral(EULER_STEP)), ddim, 1, 1, source, text)
    for k in range(1, 4):
        text = f"Taylor order {k} in s"
        source = "Cui et al. 2023 (ER-SDE-Solver)"
        add(f"er-sde-{k}", ErSde(Multistep(k, taylor)), plus, min(k, 2), min(k, 2), source, text)
    return rows


CATALOGUE: dict[str, Recipe] = {recipe.name: recipe for recipe in _recipes()}
_SPELT = {squeezed(name): found for name, found in ({name: name for name in CATALOGUE} | FAMILIES).items()}
_SPELT |= {squeezed(name): _SPELT[squeezed(found)] for name, found in CLASSES.items()}


def recipe(name: str) -> Recipe:
    """Look a recipe up by its name, "dpm++2m", as others write it, "dpmpp_2m", or by its family, "unipc".

    Raises:
        UsageError: unknown name, one that says the grid as well, or an adaptive sampler.
    """
    if not isinstance(name, str):
        raise UsageError(f"sampler: need a name or a recipe, got {shortened(name)}", 'sampler="auto"')
    found = _find(name)
    if found is None:
        plain, grid = with_grid(name)
        if grid is not None and _find(plain) is not None:
            hint = f'sampler="{recipe(plain).name}" and grid="{grid}"'
            raise UsageError(f"sampler {name!r:.60}: a name with its grid, which is asked for apart here", hint)
        if name.endswith(".safetensors"):
            raise UsageError(f"sampler {name!r:.200}: a plan's file is no name of a sampler", "pfode.Plan.load(file)")
        from pfode.samplers.adaptive import ADAPTIVE

        if name in ADAPTIVE:
            hint = f'pfode.sample(net, sampler="{name}", rtol=1e-3), or make_adaptive("{name}", process)'
            raise UsageError(f"{name} is adaptive: it has no plan, every sample chooses its own steps", hint)
        raise unknown("sampler", name, (*CATALOGUE, *ADAPTIVE, *FAMILIES, "auto"))
    return found


def _find(name: str) -> Recipe | None:
    """The recipe of a name, however it is spelt; None for an unknown one."""
    return CATALOGUE.get(name) or CATALOGUE.get(_SPELT.get(squeezed(name), ""))


def recipe_and_grid(name: str, grid: Any = None) -> tuple[Recipe, Any]:
    """The recipe of a name, and the grid: the one given, else that of a name such as "DPM++ 2M Karras".

    Raises:
        UsageError: as `recipe`; or two grids.
    """
    if isinstance(name, str) and _find(name) is None:
        plain, said = with_grid(name)
        if said is not None and _find(plain) is not None:
            if grid not in (None, said):
                raise UsageError(f"sampler {name!r:.60} and grid {grid!r:.60} are two grids", f'grid="{said}"')
            return recipe(plain), said
    return recipe(name), grid


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
    lower_order_final: bool = False,
    afs: float | None = None,
    guided: bool = False,
    **options: Any,
) -> Plan:
    """A plan: the sampler's rows on a grid of the process.

    Args:
        sampler: a name of the catalogue, or one that others have for the same ("dpmpp_2m", "DPM++ 2M Karras", with its
            grid), "auto", or a recipe of your own.
        steps: moves from node to node; or nfe: a budget of denoiser calls, from which as many steps are made as fit.
        grid: a name, a `grids.Grid`, or the times themselves (used exactly; rising ones lead from data to noise);
            None is the one that `auto.choose` has for the process and the number of calls.
        chart: another of the recipe's charts than its first (of exactly invertible recipes the first that holds where
            alpha = 0, if the plan begins there).
        final: "denoise" ends at clean data, "stop" at the process's t_min.
        start, stop: times of the process between which to integrate instead.
        lower_order_final: the last k steps of a multistep recipe have at most order k, k - 1, ..., 1.
        afs: make the first step without a call, from the denoiser of Gaussian data of mean 0 and this standard
            deviation (the analytical first step of Dockhorn et al. 2022).
        guided: whether the denoiser is guided, for what is chosen by itself.
        options: of the recipe: eta, churn, tau, ...; `Recipe.method.options` names them.

    Raises:
        UsageError: unknown names, options that contradict each other, times outside the process.
    """
    _check_kinds(process, {"steps": steps, "nfe": nfe}, {"lower_order_final": lower_order_final, "guided": guided})
    count = nfe if steps is None else steps
    chosen = auto.choose(process, defaults.STEPS if count is None else int(count), guided)
    if isinstance(sampler, str) and sampler == "auto":
        sampler, chart = chosen.sampler, chosen.chart if chart is None else chart
    found = sampler
    if not isinstance(found, Recipe):
        found, grid = recipe_and_grid(found, grid)
    options = {name: value for name, value in options.items() if value is not None}
    method = _with(found, options)
    if lower_order_final and method.memory == 1:
        raise UsageError(f"lower_order_final: {found.name} has one order only", "leave it out")
    if afs is not None and method.calls > 1:
        raise UsageError(f"afs: the first step of {found.name} has inner calls", "choose a multistep recipe")
    afs = None if afs is None else number("afs", afs, 0)
    rule = chosen.grid if grid is None else grid
    placed = isinstance(rule, str | grids.Grid)  # else it is the times themselves
    named = _chart_of(found, chart)
    if chart is None and method.pair:
        named = _invertible_chart(found, process, start if placed else grids.times(process, rule, 0)[0])
    space = Space(method.chart(find_chart(named)), process)

    def lay(n: int) -> Plan:
        nodes = space.chart.nodes(process, grids.times(process, rule, n, final, start, stop))
        if nodes[-1].v > nodes[0].v and method.stochastic:
            raise UsageError(f"{found.name} adds noise: times must fall", "a deterministic recipe, or eta=0")
        try:
            return _march(space, method, nodes, lower_order_final, afs, name=found.name, meta=meta)
        except OverflowError as error:
            values = {**options, **({} if afs is None else {"afs": afs})}
            problem = f"{found.name}: its coefficients pass the largest number there is, with {values}"
            raise UsageError(problem, "smaller values") from error

    meta: dict[str, Any] = {"sampler": found.name, "chart": named}
    meta |= {"grid": getattr(rule, "name", rule), "final": final} if placed else {"grid": "given"}
    meta |= {name: getattr(method, name) for name in method.options if method.stochastic or name in options}
    meta |= {"lower_order_final": True} if lower_order_final else {}
    meta |= {} if afs is None else {"afs": afs}
    if not placed:
        plan = lay(0)
        if nfe is not None or steps not in (None, plan.steps):
            raise UsageError(f"the grid's {plan.steps + 1} times make {plan.steps} steps", "leave steps and nfe out")
        if start is not None or stop is not None or final != "denoise":
            raise UsageError("a grid given as times has its own ends", "leave start, stop and final out")
        return plan
    if (steps is None) == (nfe is None):
        raise UsageError(f"need either steps or nfe, got steps={steps!r}, nfe={nfe!r}", "steps=20")
    return _within(lay, nfe, method.calls) if steps is None else lay(steps)


def _check_kinds(process: Any, counts: dict[str, Any], flags: dict[str, Any]) -> None:
    """Raise UsageError for what is no process, counts that are none (None: not given), or flags that are none."""
    if not isinstance(process, Process):
        raise UsageError(f"process: need a noise process, got {process!r:.60}", "process=net.process, or pfode.EDM()")
    for name, given in counts.items():
        if given is not None:
            integer(name, given, 1, grids.MAX_STEPS)
    for name, said in flags.items():
        if not isinstance(said, bool):
            raise UsageError(f"{name}: need True or False, got {shortened(said)}", f"{name}=True")


def _with(found: Recipe, options: dict[str, Any]) -> Method:
    """The recipe's method with these options."""
    for name, value in options.items():
        if name not in found.method.options:
            takers = [other for other, r in CATALOGUE.items() if name in r.method.options]
            if name in ARGUMENTS:
                raise UsageError(f"no such argument: {name}", f"here it is called {ARGUMENTS[name]}")
            if not takers:
                raise unknown("option", name, sorted({o for r in CATALOGUE.values() for o in r.method.options}))
            raise UsageError(
                f"{found.name} takes no {name} (got {shortened(value)})", f"choose one of: {', '.join(takers)}"
            )
        if isinstance(getattr(found.method, name), float):
            options[name] = number(name, value)
    return replace(found.method, **options) if options else found.method  # type: ignore[type-var]


def _chart_of(found: Recipe, name: str | None) -> str:
    if name is not None and name not in found.charts:
        raise unknown(f"chart for {found.name}", name, found.charts)
    return name or found.charts[0]


def _invertible_chart(found: Recipe, process: Process, start: float | None) -> str:
    """The recipe's first chart that holds at the first time: from pure noise (alpha = 0) no other inverts its steps."""
    first = process.t_max if start is None else number("start", start)
    if not process.t_min <= first <= process.t_max or process.alpha(first) > 0:
        return found.charts[0]
    return next(name for name in found.charts if find_chart(name).nodes(process, [first])[0].regular)


def _within(lay: Callable[[int], Plan], nfe: Any, calls: int) -> Plan:
    """The most steps whose rows number at most nfe."""
    nfe = integer("nfe", nfe, 1, grids.MAX_STEPS)
    for n in range(nfe // calls + 1, 0, -1):
        plan = lay(n)
        if plan.nfe <= nfe:
            return plan
    least = lay(1).nfe
    raise UsageError(f"nfe: {nfe} calls are too few for one step of {least}", f"nfe={least}")


def _march(space: Space, method: Method, nodes: list[Node], lower: bool, afs: float | None, **about: Any) -> Plan:
    """Step after step from the first node to the last."""
    tape = Tape(method.pair)
    trail = Trail(space, tape, len(nodes) - 1, nodes[0], lower, x=tape.first)
    if afs is not None:
        trail.past, trail.seen, trail.predicted = [(nodes[0], _analytical(space, nodes[0], afs))], trail.x, True
    for target in nodes[1:]:
        tape.begin()
        trail.arrive(method.step(trail, target), target, method.memory)
    return tape.plan(space.process, space.chart.prediction, trail.x, nodes[0], nodes[-1], **about)


def _analytical(space: Space, node: Node, scale: float) -> Linear:
    """The prediction at x_T for Gaussian data: D = alpha scale^2 / (alpha^2 scale^2 + sigma^2) x."""
    gain = node.alpha * scale**2 / (node.alpha**2 * scale**2 + node.sigma**2)
    named = PREDICTIONS[space.chart.prediction]
    p, q = (0.0, 1.0) if node.alpha == 0 and named.singular else named.of_x0(node.alpha, node.sigma)
    return Linear({("y", -1): p + q * gain})
