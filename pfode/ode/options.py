"""The options of a solve as one value, and the checks that make a `Problem` of them."""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfode._torch import transformed
from pfode.errors import UsageError, integer, number, unknown
from pfode.ode import checks
from pfode.ode.adjoints.problem import Problem
from pfode.ode.adjoints.replay import lift
from pfode.ode.batching import Batching, Joint, PerSample
from pfode.ode.control import PID
from pfode.ode.methods.scipy import Scipy
from pfode.ode.records import Schedule
from pfode.ode.registry import solver_named
from pfode.ode.solver import RMS, Solver, clock
from pfode.ode.state import Field, Layout, Tree, leaves

__all__ = [
    "MAX_STEPS",
    "Options",
    "most_steps",
    "output_times",
    "prepare",
    "step_nodes",
    "step_stops",
    "tolerances",
]

MAX_STEPS = 10_000  # seconds for small states; steps that cannot be this many are too small or the method is wrong
_FIXED_STEPS = 100_000
_MOST_STEPS = 10**7  # of one size: their times are listed


@dataclass(frozen=True, eq=False)
class Options:
    """How a solve is to step; see `solve` for each of them."""

    method: str | Solver = "dopri5"
    rtol: Any = 1e-6
    atol: Any = 1e-8
    batch: str = "joint"
    controller: PID | str | None = None
    step_size: float | None = None
    grid: Tensor | Sequence[float] | None = None
    step_t: Tensor | Sequence[float] | None = None
    jump_t: Tensor | Sequence[float] | None = None
    norm: Callable[[Tree], Tensor] | None = None
    max_steps: int = MAX_STEPS


def prepare(f: Callable[..., Tree], y0: Tree, ts: Any, args: tuple[Any, ...], options: Options) -> Problem:
    """Look up and check everything.

    Raises:
        UsageError: anything that cannot be carried out as written.
    """
    checks.field(f, args)
    if options.batch not in ("joint", "per-sample"):
        raise unknown("batch", options.batch, ("joint", "per-sample"))
    integer("max_steps", options.max_steps, 1)
    solver = solver_named(options.method)
    layout = Layout(y0, options.batch == "per-sample")
    y = layout.flat(y0).clone()  # y0's own memory is neither given to the field nor to the solution
    times, floats = output_times(ts, layout)
    fixed = options.step_size is not None or options.grid is not None or not solver.error_order
    batching: Batching = PerSample() if layout.per_sample and not fixed else Joint()
    most = most_steps(options, fixed)
    rtol, atol = tolerances(options, layout, fixed)
    if floats is None:
        if not batching.per_sample:
            raise UsageError("ts of shape (batch, times) needs adaptive steps", "leave step_size and grid out")
        start: Any = times[0].detach()
        sign: Any = torch.where(times[-1] < times[0], -1.0, 1.0).to(times.dtype)
        stops: Any
        stops, jumps = _stops_of_rows(times.detach(), sign, options)
    else:
        start, sign = floats[0], 1.0 if floats[-1] >= floats[0] else -1.0
        stops, jumps = step_stops(floats, sign, step_nodes(floats, sign, solver, fixed, options, most), options)
        if batching.per_sample:
            start = torch.full((layout.batch,), start, dtype=times.dtype, device=times.device)
            stops = torch.tensor(stops, dtype=times.dtype, device=times.device)
    norm = None if fixed else _norm(options.norm, layout)
    lifted = (lambda t, _: lift(times, t)) if times.requires_grad or transformed() else None
    begins = _begins_at_jump(options, start)
    schedule = Schedule(start, stops, jumps, sign, rtol, atol, norm, most, lifted, begins)
    controller = checks.controller(options.controller)
    field = Field(f, layout, args, schedule.context(pure=True))
    return Problem(field, solver, controller, schedule, batching, y, times)


def most_steps(options: Options, fixed: bool) -> int:
    """The attempts allowed: more where fixed steps were counted beforehand, unless the caller said how many."""
    return _FIXED_STEPS if fixed and options.max_steps == MAX_STEPS else options.max_steps


def output_times(ts: Any, layout: Layout) -> tuple[Tensor, list[float] | None]:
    """ts on the state's device in the clock's dtype, (times,) or (times, batch), checked; if (times,) as floats too."""
    times = checks.reals("ts", ts, "[0.0, 1.0]")
    times = times if times.is_floating_point() else times.to(torch.float64)
    shapes = "(times,) or (batch, times)" if layout.per_sample else "(times,)"
    if times.ndim not in ((1, 2) if layout.per_sample else (1,)) or not times.shape[-1]:
        each = times.ndim == 2 and not layout.per_sample
        hint = 'batch="per-sample" for times of every sample' if each else "ts=[0.0, 1.0]"
        raise UsageError(f"ts: need times of shape {shapes}, got shape {tuple(times.shape)}", hint)
    if times.ndim == 2 and len(times) != layout.batch:
        raise UsageError(f"ts: {len(times)} rows of times for a batch of {layout.batch}", "one row per sample")
    times = times.to(layout.device, clock(layout.device)).clone()  # the field may be given parts of it
    times = times.mT if times.ndim == 2 else times
    floats = None if times.ndim == 2 else times.detach().tolist()
    for each in times.detach().mT.tolist() if floats is None else [floats]:
        ordered = all(map(operator.le, each, each[1:])) or all(map(operator.ge, each, each[1:]))
        if not ordered or not math.isfinite(each[0]) or not math.isfinite(each[-1]):
            raise UsageError(f"ts: need finite times that rise or fall, got {times.tolist()!r:.80}", "sort them")
        if times.requires_grad and len(set(each)) < len(each):
            problem = f"ts: times that are repeated have no gradients of their own, got {times.tolist()!r:.80}"
            raise UsageError(problem, "each time once, and its state indexed twice")
    return times, floats


def step_nodes(
    floats: list[float], sign: float, solver: Solver, fixed: bool, options: Options, max_steps: int
) -> list[float]:
    """The times after the start that fixed steps go to; of adaptive steps, and SciPy's solvers, the end alone."""
    first, last = floats[0], floats[-1]
    step_size, grid = options.step_size, options.grid
    if step_size is not None and grid is not None:
        raise UsageError(f"step_size = {step_size!r} and grid = {grid!r:.60}: both say the steps", "give one of them")
    if step_size is not None:
        h = number("step_size", step_size, 0.0)
        if h == 0:
            raise UsageError("step_size: need a positive number, got 0", f"step_size={abs(last - first) / 100:g}")
        n = max(1, math.ceil(min(abs(last - first) / h * (1 - 1e-9), 1e18)))
        if n > max_steps:
            hint = f"step_size={abs(last - first) / max_steps:g}, or max_steps={n}"
            raise UsageError(f"step_size: {h:g} makes {n} steps, more than max_steps = {max_steps}", hint)
        if n > _MOST_STEPS:
            raise UsageError(f"step_size: {h:g} makes {n} steps, more than {_MOST_STEPS}", "method=..., with rtol=")
        return [first + sign * h * k for k in range(1, n)] + [last]
    if grid is not None:
        nodes = checks.finite_times("grid", grid)
        rising = all((b - a) * sign > 0 for a, b in itertools.pairwise(nodes))
        if len(nodes) < 2 or nodes[0] != first or nodes[-1] != last or not rising:
            problem = f"grid: need times from ts[0] = {first:g} on to ts[-1] = {last:g}, got {nodes!r:.80}"
            raise UsageError(problem, "in that order, each once")
        return nodes[1:]
    if fixed and not isinstance(solver, Scipy):  # which makes one step to the end
        return list(dict.fromkeys(t for t in floats if t != first))
    return [last]


def step_stops(
    floats: list[float], sign: float, nodes: list[float], options: Options, near: float = 1e-9
) -> tuple[list[float], tuple[bool, ...]]:
    """Times that steps must end at, nodes, step_t and jump_t in order, and whether the field jumps there.

    Args:
        near: share of step_size within which a multiple of it is one of the others but for rounding.
    """
    first, last = floats[0], floats[-1]
    wanted: dict[float, bool] = {}
    for name, given in (("step_t", options.step_t), ("jump_t", options.jump_t)):
        for t in [] if given is None else checks.finite_times(name, given):
            if (t - first) * sign >= 0 and (last - t) * sign >= 0 and t != first:
                wanted[t] = wanted.get(t, False) or name == "jump_t"
    if not wanted:
        return nodes, (False,) * len(nodes)
    if options.step_size is not None:
        near = near * number("step_size", options.step_size, 0.0)
        nodes = [t for t in nodes if t == last or not any(0 < abs(t - other) < near for other in wanted)]
    marks = {**dict.fromkeys(nodes, False), **wanted}
    ordered = sorted(marks, key=lambda t: t * sign)
    return ordered, tuple(marks[t] for t in ordered)


def _stops_of_rows(times: Tensor, sign: Tensor, options: Options) -> tuple[Tensor, tuple[bool, ...]]:
    """The same for times of shape (times, batch): of each sample its own, then its end, shape (stops, batch)."""
    first, last = times[0], times[-1:]
    given = {name: getattr(options, name) for name in ("step_t", "jump_t") if getattr(options, name) is not None}
    if len(given) > 1:
        raise UsageError("step_t and jump_t: one of them where ts has shape (batch, times)", "all of them as jump_t")
    for name, value in given.items():
        wanted = torch.tensor(sorted(set(checks.finite_times(name, value))), dtype=times.dtype, device=times.device)
        ahead = (wanted[:, None] - first) * sign
        inside = (ahead > 0) & ((last - wanted[:, None]) * sign > 0)
        most = int(inside.sum(0).max()) if len(wanted) else 0
        order = torch.argsort(torch.where(inside, ahead, math.inf), dim=0, stable=True)[:most]
        stops = torch.where(inside.gather(0, order), wanted[order], last)
        return torch.cat([stops, last]), (name == "jump_t",) * most + (False,)
    return last, (False,)


def _begins_at_jump(options: Options, start: Any) -> Any:
    """Whether the start is a time at which the field jumps; per sample a tensor, if it is for one of them."""
    if options.jump_t is None:
        return False
    jumps = checks.finite_times("jump_t", options.jump_t)
    if not isinstance(start, Tensor):
        return start in jumps
    found = torch.isin(start, torch.tensor(jumps, dtype=start.dtype, device=start.device))
    return found if bool(found.any()) else False


def tolerances(options: Options, layout: Layout, fixed: bool) -> tuple[Any, Any]:
    """rtol and atol, each a number or a flat tensor; an atol of 0 becomes the least positive number.

    Raises:
        UsageError: no tolerances, or of adaptive steps both 0 somewhere.
    """
    rtol, atol = _tolerance("rtol", options.rtol, layout), _tolerance("atol", options.atol, layout)
    nothing = (rtol == 0) & (atol == 0)  # a bool, or where
    if not fixed and (bool(nothing.any()) if isinstance(nothing, Tensor) else nothing):
        problem = f"no step has an error of at most 0 (rtol={options.rtol}, atol={options.atol})"
        raise UsageError(f"rtol and atol: {problem}", "atol=1e-8")
    if isinstance(atol, float) and atol == 0:
        atol = torch.finfo(layout.real).tiny  # a state of 0 with an error of 0 is accepted
    return rtol, atol


def _tolerance(name: str, value: Any, layout: Layout) -> Any:
    """A number, or a flat tensor where it is a tree like y0 or a tensor."""
    if isinstance(value, int | float):
        if number(name, value, 0.0) > torch.finfo(layout.real).max:
            raise UsageError(f"{name}: {value:g} is beyond {layout.real}, the state's dtype", f"{name}=1e-6")
        return float(value)
    if any(isinstance(v, Tensor) and v.requires_grad for v in leaves(value)):
        raise UsageError(f"{name}: cannot have a gradient", f"{name}={name}.detach()")
    parts = [checks.reals(name, v, "1e-6").to(layout.device, layout.real) for v in leaves(value)]
    if len(parts) == 1:
        parts = parts * len(layout.shapes)
    if len(parts) != len(layout.shapes):
        problem = f"{name}: need a number or a tree like y0, got {len(parts)} leaves for {len(layout.shapes)}"
        raise UsageError(problem, f"{name}=1e-6")
    for v, shape in zip(parts, layout.shapes, strict=True):
        if not _expands(v.shape, shape):
            raise UsageError(f"{name}: shape {tuple(v.shape)} does not fit y0, of shape {tuple(shape)}", f"{name}=1e-6")
    shaped = [v.expand(shape) for v, shape in zip(parts, layout.shapes, strict=True)]
    if any(bool((v < 0).any() | ~torch.isfinite(v).all()) for v in shaped):
        raise UsageError(f"{name}: need finite numbers of at least 0, got {value!r:.60}", f"{name}=1e-6")
    flat = [
        v.reshape(layout.batch, n) if layout.lead else v.reshape(n) for v, n in zip(shaped, layout.sizes, strict=True)
    ]
    return torch.cat(flat, layout.lead)


def _expands(small: torch.Size, shape: torch.Size) -> bool:
    """Whether a tensor of one shape broadcasts to the other."""
    return len(small) <= len(shape) and all(a in (1, b) for a, b in zip(small[::-1], shape[::-1], strict=False))


def _norm(norm: Callable[[Tree], Tensor] | None, layout: Layout) -> Callable[[Tensor], Tensor]:
    if norm is not None:
        measured = checks.norm(norm, (layout.batch,) if layout.per_sample else ())
        return lambda error: measured(layout.tree(error, cast=False))
    return RMS(sum(layout.sizes), 1 if layout.per_sample else None)
