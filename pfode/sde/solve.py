"""`sdesolve`: check what was asked for, run ode's loop on it, hand back what came of it."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode._torch import transformed
from pfode.brownian import Brownian
from pfode.errors import UsageError, integer, number, unknown
from pfode.ode import checks, options
from pfode.ode.adjoints.problem import Adjoint, Direct, Problem, Work
from pfode.ode.adjoints.reversible import Reversible
from pfode.ode.batching import Batching, Joint, PerSample
from pfode.ode.control import PID
from pfode.ode.records import Schedule
from pfode.ode.registry import ADJOINTS
from pfode.ode.solution import Solution
from pfode.ode.solve import carry_out
from pfode.ode.solver import RMS
from pfode.ode.state import Layout, Tree
from pfode.sde.control import Dyadic
from pfode.sde.methods import StochasticSolver
from pfode.sde.problem import SDE, Driver, Form, StochasticField, find_form
from pfode.sde.registry import method_for

__all__ = ["StochasticSolution", "StochasticStats", "sdesolve"]

_ADJOINTS = ("checkpoint", "direct", "reversible")
_NEAR = 1e-3  # a step this much of its size longer or shorter saves one that is due to rounding, of times in float32
_FIRST = 64  # of the whole time, the first step where none is given


class StochasticStats(NamedTuple):
    """The work of a solve: whole numbers, or int64 tensors of shape (samples,) with batch="per-sample".

    Fields:
        steps, accepted, rejected: attempted steps, and what became of them.
        drifts, diffusions: evaluations of f and of g (or of products with it).
        products: products with the Jacobian of g.
        backward: what backward passes have done so far: its `nfe` counts drifts, its `steps` steps.
    """

    steps: Any
    accepted: Any
    rejected: Any
    drifts: Any
    diffusions: Any
    products: Any
    backward: Work


@dataclass(frozen=True, eq=False)
class StochasticSolution(Solution):
    """What `sdesolve` returns: a Solution, and the path.

    Attributes:
        stats: StochasticStats.
        brownian: the path that drove it; solve with it again to see the same noise.
    """

    stats: Any
    brownian: Driver | None = None


def sdesolve(
    sde: SDE,
    y0: Tree,
    ts: Tensor | Sequence[float],
    *,
    seed: int | Sequence[int] | Tensor = 0,
    brownian: Driver | None = None,
    method: str | StochasticSolver = "auto",
    step_size: float | None = None,
    rtol: Any = 1e-3,
    atol: Any = 1e-4,
    adjoint: str | Adjoint | Direct = "checkpoint",
    params: Iterable[Tensor] | None = None,
    batch: str = "joint",
    args: tuple[Any, ...] = (),
    controller: PID | str | None = None,
    norm: Callable[[Tree], Tensor] | None = None,
    max_steps: int = options.MAX_STEPS,
    throw: bool = True,
    **unknown_options: Any,
) -> StochasticSolution:
    """Solve dy = f(t, y) dt + g(t, y) dW, y(ts[0]) = y0, for the states at ts.

    Every output time is a stop: the states there have the law that steps of this size give them. Steps of one size are
    counted, not added up.

    Args:
        sde: the equation.
        y0: a tensor (samples, ...), or a tree of such tensors, real.
        ts: times, rising or falling.
        seed: sample i is driven by the Brownian path of seed + i, whatever the batch; or a seed for every sample.
        brownian: the path instead, a Brownian that covers ts; one with `area` serves every method.
        method: a name or a stochastic solver. "auto": srid2 for Ito equations with diagonal or scalar noise, euler with
            general noise; shark for additive noise; spark for other Stratonovich equations.
        step_size: fixed steps of this size (those before an output time or the end may be shorter). None: steps are
            adapted to rtol and atol; a method without an error estimate makes every step twice, once in halves.
        rtol, atol: a step is accepted if its error is at most atol + rtol |y| in the norm.
        adjoint: how gradients are made: "checkpoint" takes accepted steps again, with the noise made again from its
            keys; "direct" records every operation, and can be differentiated twice; "reversible" for reversible-heun.
        params: tensors that f and g use, for gradients; default: found.
        batch: "joint", one step size for all samples, or "per-sample".
        args: further arguments of f and g.
        controller: of the step size; None: Dyadic. Others need noise that commutes: diagonal, scalar or additive.
        norm, max_steps, throw: as for `pfode.solve`.
        unknown_options: refused by name, with what to write instead.

    Raises:
        UsageError: anything that cannot be carried out as written.
        NumericalError: with throw, a solve that did not get to its end.
    """
    checks.refuse(unknown_options, sdesolve.__kwdefaults__ or ())
    if not isinstance(sde, SDE):
        raise UsageError(f"sde: need an SDE, got {type(sde).__name__}", "pfode.sde.SDE(f, g)")
    args = args if isinstance(args, tuple) else (args,)
    how = _adjoint(adjoint)
    wanted = options.Options(
        rtol=rtol, atol=atol, batch=batch, controller=controller, step_size=step_size, norm=norm, max_steps=max_steps
    )
    setup = _prepare(sde, y0, ts, seed, brownian, method, args, wanted)
    if isinstance(how, Reversible):
        how.tape(setup)  # refuses methods that cannot go back
    made = carry_out(setup, sde, how, params, ts, None, throw)
    assert isinstance(setup.field, StochasticField)
    steps, accepted, rejected, nfe, products, diffusions, backward = made.stats
    stats: Any = StochasticStats(steps, accepted, rejected, nfe, diffusions, products, backward)
    return StochasticSolution(made.ts, made.ys, made.status, made.t, made.y, stats, (), setup.field.driver)


def _adjoint(adjoint: Any) -> Adjoint | Direct:
    """An adjoint that serves for stochastic equations.

    Raises:
        UsageError: another one.
    """
    found = ADJOINTS.get(adjoint) if isinstance(adjoint, str) else adjoint
    kinds = tuple(type(ADJOINTS[name]) for name in _ADJOINTS)
    if not isinstance(found, kinds):
        name = adjoint if isinstance(adjoint, str) else type(adjoint).__name__
        raise unknown("adjoint of a stochastic equation", name, _ADJOINTS)
    return found


def _prepare(
    sde: SDE,
    y0: Tree,
    ts: Any,
    seed: Any,
    brownian: Driver | None,
    method: str | StochasticSolver,
    args: tuple[Any, ...],
    wanted: options.Options,
) -> Problem:
    """Look up and check everything.

    Raises:
        UsageError: anything that cannot be carried out as written.
    """
    if wanted.batch not in ("joint", "per-sample"):
        raise unknown("batch", wanted.batch, ("joint", "per-sample"))
    if transformed() == "vmap":
        raise UsageError("sdesolve: not inside torch.func.vmap", "the samples as y0's first dimension")
    integer("max_steps", wanted.max_steps, 1)
    if wanted.step_size is not None and number("step_size", wanted.step_size, 0.0) == 0:
        raise UsageError("step_size: need a positive number, got 0", "step_size=0.01")
    for name, function in (("f", sde.f), ("g", sde.g)):
        _callable(name, function, args)
    per_sample, fixed = wanted.batch == "per-sample", wanted.step_size is not None
    layout = Layout(y0, per_sample, samples=True)
    if layout.dtype.is_complex:
        raise UsageError(f"y0: need real tensors, got {layout.dtype}", "the real and imaginary parts as components")
    y = layout.flat(y0).clone()
    times, floats = options.output_times(ts, layout)
    if floats is None:
        raise UsageError(f"ts: need times of shape (times,), got {tuple(times.mT.shape)}", "one list for all samples")
    if times.requires_grad:
        raise UsageError("ts: a Brownian path has no derivative in time, so times have no gradients", "ts=ts.detach()")
    solver = method_for(method, sde.noise, sde.calculus, not fixed)
    time = times[0].to(layout.real)
    form = find_form(sde, layout, time.expand(layout.batch) if per_sample else time, y, args)
    _refuse_product(solver, form)
    driver = _driver(seed, brownian, form, layout, floats, solver, wanted.step_size)
    return _problem(sde, layout, y, times, floats, args, solver, form, driver, wanted)


def _problem(
    sde: SDE,
    layout: Layout,
    y: Tensor,
    times: Tensor,
    floats: list[float],
    args: tuple[Any, ...],
    solver: Any,
    form: Form,
    driver: Driver,
    wanted: options.Options,
) -> Problem:
    fixed = wanted.step_size is not None
    batching: Batching = PerSample() if layout.per_sample and not fixed else Joint()
    sign = 1.0 if floats[-1] >= floats[0] else -1.0
    wanted = dataclasses.replace(wanted, step_t=floats)
    most = options.most_steps(wanted, fixed)
    nodes = options.step_nodes(floats, sign, solver, fixed, wanted, most)
    stops, jumps = options.step_stops(floats, sign, nodes, wanted, _NEAR)
    start: Any = floats[0]
    if batching.per_sample:
        start = torch.full((layout.batch,), start, dtype=times.dtype, device=times.device)
        stops = torch.tensor(stops, dtype=times.dtype, device=times.device)
    rtol, atol = options.tolerances(wanted, layout, fixed)
    norm = None if fixed else _norm(wanted.norm, layout)
    schedule = Schedule(start, stops, jumps, sign, rtol, atol, norm, most)
    control = PID() if fixed else _controller(wanted.controller, sde, driver, floats)
    field = StochasticField(sde, layout, args, schedule.context(pure=True), form, driver)
    return Problem(field, solver, control, schedule, batching, y, times)


def _callable(name: str, function: Any, args: tuple[Any, ...]) -> None:
    """Raise UsageError for a function that cannot be called as (t, y, *args)."""
    try:
        checks.field(function, args)
    except UsageError as error:
        raise UsageError(f"SDE: {name}: {error}") from error


def _refuse_product(solver: Any, form: Form) -> None:
    """Raise UsageError where a method needs g itself and there are only products."""
    base = getattr(solver, "base", solver)
    if form.kind == "product" and not hasattr(base, "tableau"):
        raise UsageError(f"method: {base.name} needs g itself, not only its products", "leave product= out")


def _driver(
    seed: Any,
    brownian: Any,
    form: Form,
    layout: Layout,
    floats: list[float],
    solver: Any,
    step_size: float | None,
) -> Driver:
    """The path that drives the equation.

    Raises:
        UsageError: seeds or a path that do not fit.
    """
    low, high = min(floats), max(floats)
    if brownian is None:
        seeds = _seeds(seed, layout.batch)
        first, last = (floats[0], floats[-1]) if low < high else (low, low + 1.0)
        options_: dict[str, Any] = {"step": step_size, "dtype": layout.dtype, "device": layout.device}
        return Brownian(seeds, (form.channels,), first, last, solver.area, **options_)
    if not hasattr(brownian, "increment") or isinstance(brownian, type):
        raise UsageError(f"brownian: need a Brownian path, got {type(brownian).__name__}", "brownian=None, and seed=")
    if seed is not None and not (isinstance(seed, int) and seed == 0):
        raise UsageError("seed and brownian: both say what drives the equation", "give one of them")
    area = getattr(brownian, "area", False)
    if solver.area and not area:
        raise UsageError(f"brownian: {solver.name} needs space-time areas", "Brownian(..., area=True)")
    if isinstance(brownian, Brownian):
        shape, count = brownian.shape, layout.batch * form.channels
        if not shape or shape[0] != layout.batch or torch.Size(shape).numel() != count:
            needed = (layout.batch, form.channels)
            raise UsageError(f"brownian: need increments of shape {needed}, got {shape}", "one seed for every sample")
        ends = min(brownian.t0, brownian.t1), max(brownian.t0, brownian.t1)
        if low < ends[0] or high > ends[1]:
            raise UsageError(f"brownian: is known from {ends[0]:g} to {ends[1]:g}, ts go from {low:g} to {high:g}")
    return brownian


def _seeds(seed: Any, batch: int) -> list[int]:
    """A seed for every sample."""
    if isinstance(seed, Tensor):
        seed = seed.tolist()
    if isinstance(seed, Iterable) and not isinstance(seed, str):
        seeds = list(seed)
        if len(seeds) != batch:
            raise UsageError(f"seed: got {len(seeds)} seeds for {batch} samples", "one for every sample, or one number")
        return seeds
    first = integer("seed", seed, 0, 2**64 - 1)
    return [(first + i) % 2**64 for i in range(batch)]


def _norm(norm: Any, layout: Layout) -> Callable[[Tensor], Tensor]:
    if norm is not None:
        measured = checks.norm(norm, (layout.batch,) if layout.per_sample else ())
        return lambda error: measured(layout.tree(error, cast=False))
    size = sum(layout.sizes)
    return RMS(size, 1) if layout.per_sample else RMS(size * layout.batch)


def _controller(given: Any, sde: SDE, driver: Any, floats: list[float]) -> PID:
    """The controller of a solve; Dyadic gets its unit and origin from the path.

    Raises:
        UsageError: no controller, or one whose steps are not nested for noise that need not commute.
    """
    control = Dyadic() if given is None else checks.controller(given)
    if not isinstance(control, Dyadic) and sde.noise == "general":
        raise UsageError(
            f"controller: with general noise, which need not commute, steps of {type(control).__name__} may converge "
            "to a wrong limit",
            "controller=None, or pfode.sde.Dyadic(...)",
        )
    span = abs(floats[-1] - floats[0]) or 1.0
    if control.first_step is None:
        control = dataclasses.replace(control, first_step=min(max(span / _FIRST, control.min_step), control.max_step))
    if isinstance(control, Dyadic) and control.unit is None:
        unit, origin = getattr(driver, "unit", None), getattr(driver, "t0", None)
        if unit is None or origin is None:
            unit, origin = span, floats[0]
        away = (floats[-1] - floats[0]) * ((floats[0] - origin) + (floats[-1] - origin)) >= 0
        control = dataclasses.replace(control, unit=unit, origin=origin, towards=1 if away else -1)
    return control
