"""`solve`: look everything up, check it, run the loop, hand back a `Solution`."""

import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode.errors import NumericalError, UsageError, integer, number, unknown
from pfode.ode import tables
from pfode.ode.control import PID
from pfode.ode.explicit import RungeKutta
from pfode.ode.loop import Counts, Course, End, Joint, Lanes, Move, PerSample, Status, advance
from pfode.ode.outputs import JointOutputs, PerSampleOutputs, outputs
from pfode.ode.solver import Solver, clock
from pfode.ode.state import Field, Layout, Tree, leaves

SOLVERS: dict[str, Solver] = {tableau.name: RungeKutta(tableau) for tableau in tables.EXPLICIT}
ADJOINTS = ("direct",)
_MESSAGES = {
    Status.MAX_STEPS: (
        "max_steps = {max_steps} attempts were not enough",
        "max_steps=, looser tolerances, or a stiff solver",
    ),
    Status.MIN_STEP: ("the step size fell to its limit", "looser tolerances, or jump_t= where the field jumps"),
    Status.NON_FINITE: ("the field or the state is not finite", "check the field at that time"),
    Status.NEWTON_FAILED: ("a nonlinear solve did not converge", "a smaller step_size, or looser tolerances"),
}


class Stats(NamedTuple):
    """Work of a solve: ints, or shape (batch,) with batch="per-sample".

    Fields: steps attempted, accepted and rejected; nfe: evaluations of the field (of a sample that was still running);
    jacobians; iterations (Newton's).
    """

    steps: Any
    accepted: Any
    rejected: Any
    nfe: Any
    jacobians: Any
    iterations: Any


@dataclass(frozen=True, eq=False)
class Solution:
    """What `solve` returns.

    Attributes:
        ts: the output times as given.
        ys: the states there, a tree like y0 with the times first; NaN where the solve did not get to.
        status: a Status, or shape (batch,) of their numbers in per-sample mode.
        t, y: where the solve ended (of every sample, in per-sample mode) and the state there.
        stats: the work done.
    """

    ts: Any
    ys: Tree
    status: Any
    t: Any
    y: Tree
    stats: Stats


class _Setup(NamedTuple):
    field: Field
    solver: Solver
    control: PID
    course: Course
    lanes: Lanes
    y: Tensor
    ts: Tensor


def solve(
    f: Callable[..., Tree],
    y0: Tree,
    ts: Tensor | Sequence[float],
    *,
    method: str | Solver = "dopri5",
    rtol: Any = 1e-6,
    atol: Any = 1e-8,
    adjoint: str = "direct",
    batch: str = "joint",
    args: tuple[Any, ...] = (),
    controller: PID | None = None,
    step_size: float | None = None,
    grid: Tensor | Sequence[float] | None = None,
    step_t: Tensor | Sequence[float] | None = None,
    jump_t: Tensor | Sequence[float] | None = None,
    norm: Callable[[Tree], Tensor] | None = None,
    max_steps: int = 100_000,
    throw: bool = True,
) -> Solution:
    """Solve dy/dt = f(t, y, *args), y(ts[0]) = y0, for the states at ts.

    Args:
        f: the field: (t, y, *args) -> a tree like y. t has shape () and the state's real dtype (float32 for half
            precision); in per-sample mode it has shape (batch,).
        y0: a tensor, or tuples, lists, dicts and dataclasses of tensors, real or complex.
        ts: times, rising or falling, shape (times,); in per-sample mode also (batch, times). Gradients flow to them.
        method: a name or a Solver.
        rtol, atol: a step is accepted if its error is at most atol + rtol |y|, in the norm: numbers, or trees like y0.
        adjoint: how gradients are made: "direct" records every operation.
        batch: "joint", one step size for the whole state, or "per-sample", one for each entry of the first dimension.
        controller: of the step size, with its limits; default PID(), the integral controller.
        step_size: fixed steps of this size (the last one may be shorter).
        grid: fixed steps between these times, from ts[0] to ts[-1]. Methods that estimate no error step from one
            output time to the next if neither is given.
        step_t, jump_t: times that steps must end at; at jump_t the field jumps and is evaluated on either side.
        norm: of an error in units of the tolerance, given as a tree like y0; default the root mean square.
        max_steps: attempts allowed; beyond them the solution is partial.
        throw: raise where a solve does not succeed; else `status` says so.

    Raises:
        UsageError: anything that cannot be carried out as written.
        NumericalError: with throw, a solve that did not get to its end.
    """
    wants_gradient = torch.is_grad_enabled()
    if adjoint not in ADJOINTS:
        raise unknown("adjoint", adjoint, ADJOINTS)
    options = {"step_size": step_size, "grid": grid, "step_t": step_t, "jump_t": jump_t}
    setup = _setup(
        f, y0, ts, method, rtol, atol, batch, args, controller, norm, max_steps, options, pure=wants_gradient
    )
    out, end = _run(setup)
    return _finish(setup, ts, out, end, throw)


def steps(
    f: Callable[..., Tree],
    y0: Tree,
    ts: Tensor | Sequence[float],
    *,
    method: str | Solver = "dopri5",
    rtol: Any = 1e-6,
    atol: Any = 1e-8,
    args: tuple[Any, ...] = (),
    controller: PID | None = None,
    max_steps: int = 100_000,
    **options: Any,
) -> Generator["Point", None, End]:
    """Yield the accepted steps of `solve` in joint mode, as they are made, for ts = (t0, ..., t1)."""
    setup = _setup(f, y0, ts, method, rtol, atol, "joint", args, controller, None, max_steps, options, pure=True)
    moves = advance(*setup[:4], setup.y, setup.lanes)
    tree = setup.field.layout.tree
    while True:
        try:
            move = next(moves)
        except StopIteration as stop:
            return stop.value
        if move.accepted:
            yield Point(move.t0, move.t1, tree(move.y, cast=False), move, setup)


@dataclass(frozen=True, eq=False)
class Point:
    """An accepted step from t0 to t1, where the state is y; `at(t)` is the state in between."""

    t0: float
    t1: float
    y: Tree
    _move: Move
    _setup: _Setup

    def at(self, t: float) -> Tree:
        """Dense output at a time between t0 and t1."""
        theta = torch.tensor([(t - self.t0) / (self.t1 - self.t0)], dtype=self._setup.ts.dtype)
        flat = self._move.step.dense(theta.to(self._setup.ts.device))[0]
        return self._setup.field.layout.tree(flat, cast=False)


def _run(setup: _Setup) -> tuple[Tensor, End]:
    """The loop with its outputs: states at the times, and how it ended."""
    field, solver, control, course, lanes, y, ts = setup
    out = outputs(ts, course.sign, lanes, field.layout.batch)
    out.start(y)
    if len(ts) == 1:
        zero = torch.zeros(field.layout.batch, dtype=torch.int64, device=y.device) if lanes.per_sample else 0
        return out.result(), End(zero + Status.SUCCESS, course.start, y, Counts(zero, zero, zero, zero, zero))
    if isinstance(out, PerSampleOutputs):
        passing = out

        def probe(t0: Any, y0: Tensor, t1: Any, y1: Tensor, accepted: Any) -> Tensor:
            return torch.where(accepted, passing.passed(t1), 0).max()[None]

        many = len(ts) > 2
        moves = advance(field, solver, control, course, y, lanes, probe if many else None)
    else:
        moves = advance(field, solver, control, course, y, lanes)
    while True:
        try:
            move = next(moves)
        except StopIteration as stop:
            end: End = stop.value
            break
        if isinstance(out, JointOutputs):
            if move.accepted:
                out.add(move)
        else:
            out.add(move, int(move.tried[0]) if move.tried else 1)
    return out.result(), end


def _setup(
    f: Callable[..., Tree],
    y0: Tree,
    ts: Any,
    method: str | Solver,
    rtol: Any,
    atol: Any,
    batch: str,
    args: Any,
    controller: PID | None,
    norm: Callable[[Tree], Tensor] | None,
    max_steps: int,
    options: dict[str, Any],
    pure: bool,
) -> _Setup:
    """Look up and check everything."""
    if not callable(f):
        raise UsageError(f"f: need a function (t, y, *args), got {type(f).__name__}")
    if batch not in ("joint", "per-sample"):
        raise unknown("batch", batch, ("joint", "per-sample"))
    for name in options:
        if name not in ("step_size", "grid", "step_t", "jump_t"):
            raise unknown("option", name, ("step_size", "grid", "step_t", "jump_t"))
    solver = SOLVERS.get(method) if isinstance(method, str) else method
    if solver is None:
        raise unknown("method", method, SOLVERS)
    layout = Layout(y0, batch == "per-sample")
    y = layout.flat(y0)
    times = _times(ts, layout)
    floats = None if times.ndim == 2 else times.detach().tolist()
    step_size, grid = options.get("step_size"), options.get("grid")
    fixed = step_size is not None or grid is not None or not solver.error_order
    lanes: Lanes = PerSample() if layout.per_sample and not fixed else Joint()
    if floats is None and not lanes.per_sample:
        raise UsageError("ts of shape (batch, times) needs adaptive steps", "leave step_size and grid out")
    if floats is None:
        sign: Any = torch.sign(times[-1] - times[0]).detach()
        start: Any = times[0].detach()
    else:
        sign = 1.0 if floats[-1] >= floats[0] else -1.0
        start = floats[0]
    stops, jumps = _stops(floats, sign, fixed, options) if floats is not None else ([], ())
    stop_source: Any = stops
    if lanes.per_sample:
        start = (
            torch.full((layout.batch,), start, dtype=times.dtype, device=times.device) if floats is not None else start
        )
        stop_source = (
            times[-1:].detach() if floats is None else torch.tensor(stops, dtype=times.dtype, device=times.device)
        )
        jumps = jumps or (False,)
    course = Course(
        start,
        stop_source,
        jumps,
        sign,
        _tolerance("rtol", rtol, layout),
        _tolerance("atol", atol, layout),
        None if fixed else _norm(norm, layout),
        integer("max_steps", max_steps, 1),
        _lift(times, floats, stops) if times.requires_grad and floats is not None else None,
    )
    args = args if isinstance(args, tuple) else (args,)
    return _Setup(Field(f, layout, args, pure), solver, controller or PID(), course, lanes, y, times)


def _times(ts: Any, layout: Layout) -> Tensor:
    """ts on the state's device in the clock's dtype, (times,) or (times, batch), checked."""
    times = ts if isinstance(ts, Tensor) else torch.as_tensor(ts, dtype=torch.float64)
    if not times.is_floating_point():
        times = times.to(torch.float64) if not times.is_complex() else times
    shapes = "(times,) or (batch, times)" if layout.per_sample else "(times,)"
    if times.is_complex() or times.ndim not in ((1, 2) if layout.per_sample else (1,)) or not times.shape[-1]:
        raise UsageError(f"ts: need real times of shape {shapes}, got {times.dtype} of shape {tuple(times.shape)}")
    if times.ndim == 2 and len(times) != layout.batch:
        raise UsageError(f"ts: {len(times)} rows of times for a batch of {layout.batch}")
    times = times.to(layout.device, clock(layout.device))
    times = times.mT if times.ndim == 2 else times
    gaps = times.detach().diff(dim=0)
    if not torch.isfinite(times).all() or not ((gaps > 0).all(0) | (gaps < 0).all(0)).all():
        raise UsageError(f"ts: need finite times that rise or fall strictly, got {times.tolist()!r:.80}")
    return times


def _stops(
    floats: list[float], sign: float, fixed: bool, options: dict[str, Any]
) -> tuple[list[float], tuple[bool, ...]]:
    """Times that steps must end at, and whether the field jumps there."""
    first, last = floats[0], floats[-1]
    step_size, grid = options.get("step_size"), options.get("grid")
    if step_size is not None and grid is not None:
        raise UsageError("step_size and grid: give one of them")
    stops = [last]
    if step_size is not None:
        h = number("step_size", step_size, 0.0)
        if h == 0:
            raise UsageError("step_size: need a positive number, got 0")
        n = max(1, math.ceil(abs(last - first) / h * (1 - 1e-9)))
        stops = [first + sign * h * k for k in range(1, n)] + [last]
    elif grid is not None:
        nodes = torch.as_tensor(grid, dtype=torch.float64).tolist()
        rising = all((b - a) * sign > 0 for a, b in itertools.pairwise(nodes))
        if len(nodes) < 2 or nodes[0] != first or nodes[-1] != last or not rising:
            raise UsageError(f"grid: need times from ts[0] = {first:g} on to ts[-1] = {last:g}, got {nodes!r:.80}")
        stops = nodes[1:]
    elif fixed:
        stops = floats[1:]
    marks: dict[float, bool] = dict.fromkeys(stops, False)
    for name in ("step_t", "jump_t"):
        if options.get(name) is not None:
            for t in torch.as_tensor(options[name], dtype=torch.float64).flatten().tolist():
                if (t - first) * sign >= 0 and (last - t) * sign >= 0 and t != first:
                    marks[t] = marks.get(t, False) or name == "jump_t"
    ordered = sorted(marks, key=lambda t: t * sign)
    return ordered, tuple(marks[t] for t in ordered)


def _lift(times: Tensor, floats: list[float], stops: list[float]) -> Callable[[float, int], Tensor]:
    """Times as tensors: an end of a step that is an output time moves with it, any other with ts[0]."""
    index = {t: i for i, t in enumerate(floats)}

    def lift(t: float, stop: int) -> Tensor:
        i = index.get(stops[stop]) if stop >= 0 else 0
        return times[i] if i and stop >= 0 else times[0] + (t - floats[0])

    return lift


def _tolerance(name: str, value: Any, layout: Layout) -> Any:
    """A number, or a flat tensor where it is a tree like y0 or a tensor."""
    if isinstance(value, int | float):
        return number(name, value, 0.0)
    if any(isinstance(v, Tensor) and v.requires_grad for v in leaves(value)):
        raise UsageError(f"{name}: cannot have a gradient", f"{name}={name}.detach()")
    parts = list(leaves(value))
    if len(parts) == 1:
        parts = parts * len(layout.shapes)
    if len(parts) != len(layout.shapes):
        raise UsageError(f"{name}: need a number or a tree like y0, got {len(parts)} leaves for {len(layout.shapes)}")
    shaped = [
        torch.as_tensor(v, dtype=layout.real, device=layout.device).expand(shape)
        for v, shape in zip(parts, layout.shapes, strict=True)
    ]
    if any(bool((v < 0).any() | ~torch.isfinite(v).all()) for v in shaped):
        raise UsageError(f"{name}: need finite numbers of at least 0")
    flat = [v.reshape(layout.batch, -1) if layout.lead else v.reshape(-1) for v in shaped]
    return torch.cat(flat, layout.lead)


def _norm(norm: Callable[[Tree], Tensor] | None, layout: Layout) -> Callable[[Tensor], Tensor]:
    if norm is not None:
        return lambda error: norm(layout.tree(error, cast=False))
    root = math.sqrt(sum(layout.sizes))
    if layout.per_sample:
        return lambda error: torch.linalg.vector_norm(error, dim=1) / root
    return lambda error: torch.linalg.vector_norm(error) / root


def _finish(setup: _Setup, ts: Any, flat: Tensor, end: End, throw: bool) -> Solution:
    """The solution, or the error it amounts to."""
    tree, counts = setup.field.layout.tree, end.counts
    stats = Stats(
        counts.steps, counts.accepted, counts.steps - counts.accepted, counts.nfe, counts.jacobians, counts.iterations
    )
    solution = Solution(ts, tree(flat, cast=False), end.status, end.t, tree(end.y, cast=False), stats)
    if throw:
        _check(setup, end)
    return solution


def _check(setup: _Setup, end: End) -> None:
    """Raise NumericalError unless every sample succeeded or met its event."""
    status, t = end.status, end.t
    where = ""
    if isinstance(status, Tensor):
        bad = ((status != Status.SUCCESS) & (status != Status.EVENT)).nonzero().flatten().tolist()
        if not bad:
            return
        where = f", sample {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
        status, t = int(status[bad[0]]), float(t[bad[0]])
    if status in _MESSAGES:
        problem, hint = _MESSAGES[Status(status)]
        name = setup.solver.name
        text = problem.format(max_steps=setup.course.max_steps)
        raise NumericalError(
            f"{name} stopped at t = {t:.6g}{where}: {text}", f"{hint}; throw=False returns what there is"
        )
