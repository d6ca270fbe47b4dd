"""`solve`: look everything up, check it, run the loop, hand back a `Solution`."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode._torch import transformed
from pfode.errors import NumericalError, UsageError, integer, number, unknown
from pfode.ode import checks
from pfode.ode.adjoints.attach import Attached, attach
from pfode.ode.adjoints.checkpoint import Checkpoint, CheckpointTape
from pfode.ode.adjoints.continuous import Backsolve, Interpolated
from pfode.ode.adjoints.implicit import Implicit
from pfode.ode.adjoints.problem import NOTHING, Adjoint, Direct, Problem, Tape, Work, detached
from pfode.ode.adjoints.replay import lift
from pfode.ode.adjoints.reversible import Reversible
from pfode.ode.adjoints.sources import FirstCall, Sources, sources
from pfode.ode.compiled import Compiled
from pfode.ode.control import PID
from pfode.ode.events import Events, Hits, Watch
from pfode.ode.loop import Counts, Course, End, Joint, Lanes, Move, PerSample, Reply, Status, advance
from pfode.ode.methods import tables
from pfode.ode.methods.explicit import RungeKutta
from pfode.ode.methods.implicit import ImplicitRungeKutta, implicit_solvers
from pfode.ode.methods.multistep import ADAMS
from pfode.ode.methods.reversible import Coupled, ReversibleHeun
from pfode.ode.methods.scipy import Scipy
from pfode.ode.methods.symplectic import SYMPLECTIC
from pfode.ode.outputs import JointOutputs, PerSampleOutputs, outputs
from pfode.ode.solver import RMS, Solver, clock
from pfode.ode.state import Field, Layout, Tree, leaves, rebuild

SOLVERS: dict[str, Solver] = {
    **{tableau.name: RungeKutta(tableau) for tableau in tables.EXPLICIT},
    **implicit_solvers(),
}
SOLVERS.update({solver.name: solver for solver in ADAMS})
PAIRED: dict[str, Solver] = {solver.name: solver for solver in SYMPLECTIC}  # for states that are pairs (q, p)
SOLVERS["reversible-heun"] = ReversibleHeun()
SOLVERS.update({c.name: c for c in (Coupled(RungeKutta(t)) for t in (tables.MIDPOINT, tables.RK4, tables.DOPRI5))})
ADJOINTS: dict[str, Adjoint | Direct] = {
    "direct": Direct(),
    "checkpoint": Checkpoint(),
    "reversible": Reversible(),
    "backsolve": Backsolve(),
    "interpolated": Interpolated(),
    "implicit": Implicit(),
}
MAX_STEPS = 10_000  # seconds for small states; steps that cannot be this many are too small or the method is wrong
_FIXED_STEPS = 100_000
_MOST_STEPS = 10**7  # of one size: their times are listed
_MESSAGES = {
    Status.MAX_STEPS: (
        "max_steps = {max_steps} attempts were not enough",
        'looser tolerances, method="kvaerno5" where the equation is stiff, or a larger max_steps=',
    ),
    Status.MIN_STEP: ("the step size fell to its limit", "looser tolerances, or jump_t= where the field jumps"),
    Status.NON_FINITE: ("the field or the state is not finite", "check the field at that time"),
    Status.NEWTON_FAILED: ("a nonlinear solve did not converge", "a smaller step_size, or looser tolerances"),
}


class Stats(NamedTuple):
    """Work of a solve: ints, or shape (batch,) with batch="per-sample".

    Fields: steps attempted, accepted and rejected; nfe: evaluations of the field (of a sample that was still running);
    jacobians; iterations (Newton's); backward: what backward passes have done so far (its `nfe`, its `steps`), which
    grows when they run.
    """

    steps: Any
    accepted: Any
    rejected: Any
    nfe: Any
    jacobians: Any
    iterations: Any
    backward: Work


@dataclass(frozen=True, eq=False)
class Solution:
    """What `solve` returns.

    Attributes:
        ts: the output times as given.
        ys: the states there, a tree like y0 with the times first; NaN where the solve did not get to.
        status: a Status, or shape (batch,) of their numbers in per-sample mode.
        t, y: where the solve ended (of every sample, in per-sample mode) and the state there.
        stats: the work done.
        events: where each event was met; the solve ended at the last hit of one that is terminal.
    """

    ts: Any
    ys: Tree
    status: Any
    t: Any
    y: Tree
    stats: Stats
    events: tuple[Hits, ...] = ()


def solve(
    f: Callable[..., Tree],
    y0: Tree,
    ts: Tensor | Sequence[float],
    *,
    method: str | Solver = "dopri5",
    rtol: Any = 1e-6,
    atol: Any = 1e-8,
    adjoint: str | Adjoint | Direct = "checkpoint",
    params: Iterable[Tensor] | None = None,
    batch: str = "joint",
    args: tuple[Any, ...] = (),
    events: Events | None = None,
    controller: PID | str | None = None,
    step_size: float | None = None,
    grid: Tensor | Sequence[float] | None = None,
    step_t: Tensor | Sequence[float] | None = None,
    jump_t: Tensor | Sequence[float] | None = None,
    norm: Callable[[Tree], Tensor] | None = None,
    max_steps: int = MAX_STEPS,
    throw: bool = True,
    compile: bool = False,
    **unknown_options: Any,
) -> Solution:
    """Solve dy/dt = f(t, y, *args), y(ts[0]) = y0, for the states at ts.

    Args:
        f: the field: (t, y, *args) -> a tree like y. t has shape () and the state's real dtype (float32 for half
            precision); in per-sample mode it has shape (batch,).
        y0: a tensor, or tuples, lists, dicts and dataclasses of tensors, real or complex.
        ts: times, rising or falling, shape (times,); in per-sample mode also (batch, times). Gradients flow to them.
        method: a name or a Solver.
        rtol, atol: a step is accepted if its error is at most atol + rtol |y|, in the norm: numbers, or trees like y0.
        adjoint: how gradients are made, a name or a value (see pfode.ode.adjoints). "checkpoint" takes accepted steps
            again, "direct" records every operation: it can be differentiated twice, and is what solves with events
            and torch.func transforms use. "reversible", "backsolve", "interpolated"; "implicit" for fixed points.
        params: tensors that the field uses, for gradients; default: found (ditto).
        batch: "joint", one step size for the whole state, or "per-sample", one for each entry of the first dimension.
        events: an Event or several; a function (t, y, *args) is one that ends the solve where it is zero. Outputs
            after that are NaN.
        controller: of the step size, with its limits: "I" (the default), "PI", "PID", or a PID.
        step_size: fixed steps of this size (the last one may be shorter).
        grid: fixed steps between these times, from ts[0] to ts[-1]. Methods that estimate no error step from one
            output time to the next if neither is given.
        step_t, jump_t: times that steps must end at; at jump_t the field jumps and is evaluated on either side.
        norm: of an error in units of the tolerance, given as a tree like y0; default the root mean square.
        max_steps: attempts allowed; beyond them the solution is partial. Where the steps are given by step_size they
            are counted beforehand, and 100,000 are allowed by default.
        throw: raise where a solve does not succeed; else `status` says so.
        compile: explicit Runge-Kutta steps through torch.compile, with the field in them (see pfode.ode.compiled).
        unknown_options: refused by name, with what to write instead.

    Raises:
        UsageError: anything that cannot be carried out as written.
        NumericalError: with throw, a solve that did not get to its end.
        MissingError: compile without a C++ compiler.
    """
    checks.refuse(unknown_options, solve.__kwdefaults__ or ())
    how = ADJOINTS.get(adjoint) if isinstance(adjoint, str) else adjoint
    if how is None or isinstance(how, type) or (not isinstance(how, Direct) and not hasattr(how, "tape")):
        raise unknown("adjoint", adjoint if isinstance(adjoint, str) else type(adjoint).__name__, ADJOINTS)
    args = args if isinstance(args, tuple) else (args,)
    options = {"step_size": step_size, "grid": grid, "step_t": step_t, "jump_t": jump_t}
    recording, inside = torch.is_grad_enabled(), transformed()
    if compile:
        if inside:
            raise UsageError("compile=True: not inside torch.func transforms", "compile=False")
        method = method if isinstance(method, Compiled) else Compiled(_solver(method))
    setup = _setup(f, y0, ts, method, rtol, atol, batch, args, controller, norm, max_steps, options, pure=True)
    if inside:
        _refuse_inside(inside, setup)
    found = sources(f, args, params) if recording and not inside else Sources([], [], 0, False)
    if inside or events is not None or not recording or isinstance(how, Direct):
        depends = any(t.requires_grad for t in (setup.y, setup.ts, *found.tensors))
        opaque = params is None and not isinstance(f, torch.nn.Module)
        pure = bool(inside) or (recording and (depends or opaque))
        setup = setup._replace(field=setup.field.within(pure=pure))
        if pure and setup.lanes.per_sample and events is None and not inside:
            return _twice(setup, ts, throw)
        with torch.set_grad_enabled(pure and recording):
            course = setup.course
            watch = None if events is None else Watch(events, setup.field, course.sign, course.start, setup.y)
            out, end = _run(setup, watch)
            solution = _finish(setup, ts, out, end, throw)
            return solution if watch is None else dataclasses.replace(solution, events=watch.result())
    with torch.no_grad():
        bare = _bare(setup, found.places, how.pure)
        tape, sight = how.tape(bare), FirstCall(f)
        known = any(t.requires_grad for t in (setup.y, *found.tensors))
        tape.recording = tape.recording and known and not setup.ts.requires_grad
        if found.searched and not tape.recording:
            bare.field.f = sight
        out, end = _run(bare, None, tape)
        bare.field.f = f
    made = attach(bare, tape, found, tape.found or sight.found, setup.y, setup.ts, out.detach(), end.y.detach())
    return _finish(setup, ts, made.ys, end._replace(y=made.end), throw, made)


def _refuse_inside(inside: str, setup: Problem) -> None:
    """Raise UsageError for solves that torch.func's transforms (and forward-mode differentiation) cannot follow."""
    if isinstance(setup.solver, Scipy):
        raise UsageError(f"{setup.solver.name}: cannot be used inside torch.func transforms", 'method="dopri5"')
    if inside == "vmap" and setup.course.norm is not None:
        raise UsageError(
            "torch.func.vmap: adaptive steps cannot be chosen inside it", 'batch="per-sample" outside it, or step_size='
        )
    if inside == "vmap" and isinstance(setup.solver, ImplicitRungeKutta):
        raise UsageError(
            f"torch.func.vmap: {setup.solver.name} cannot see inside it whether its equations are solved",
            'batch="per-sample" outside it, or an explicit method',
        )


def _bare(setup: Problem, places: Sequence[int], pure: bool) -> Problem:
    """The same solve from leaves of its own."""
    field = Field(setup.field.f, setup.field.layout, detached(setup.field.args, places), setup.course.context(pure))
    course = dataclasses.replace(setup.course, lift=None)
    y = setup.y.detach().requires_grad_(setup.y.requires_grad)
    return setup._replace(field=field, course=course, y=y, ts=setup.ts.detach())


def _twice(setup: Problem, ts: Any, throw: bool) -> Solution:
    """Per-sample steps, found without a graph and taken again with it: what is rejected leaves no trace."""
    with torch.no_grad():
        bare = _bare(setup, (), False)
        tape = CheckpointTape(bare, None)
        _, end = _run(bare, None, tape)
    ys, y = tape.graph(setup)
    return _finish(setup, ts, ys, end._replace(y=y), throw)


def steps(
    f: Callable[..., Tree],
    y0: Tree,
    ts: Tensor | Sequence[float],
    *,
    method: str | Solver = "dopri5",
    rtol: Any = 1e-6,
    atol: Any = 1e-8,
    batch: str = "joint",
    args: tuple[Any, ...] = (),
    controller: PID | str | None = None,
    max_steps: int = MAX_STEPS,
    **options: Any,
) -> Generator["Point", None, End]:
    """Yield the accepted steps of `solve` as they are made, for ts = (t0, ..., t1); per sample, those of any sample."""
    setup = _setup(f, y0, ts, method, rtol, atol, batch, args, controller, None, max_steps, options, pure=True)
    moves = advance(*setup[:4], setup.y, setup.lanes)
    tree = setup.field.layout.tree
    while True:
        try:
            move = next(moves)
        except StopIteration as stop:
            end: End = stop.value
            return end if isinstance(end.status, Tensor) else end._replace(status=Status(end.status))
        accepted = move.accepted
        if bool(accepted.any()) if isinstance(accepted, Tensor) else accepted:
            t1 = torch.where(accepted, move.t1, move.t0) if isinstance(accepted, Tensor) else move.t1
            yield Point(move.t0, t1, tree(move.y.clone(), cast=False), accepted, move, setup)


@dataclass(frozen=True, eq=False)
class Point:
    """An accepted step from t0 to t1, where the state is y; `at(t)` is the state in between.

    Per sample, t0, t1 and `accepted` have shape (batch,); t1 = t0 where a sample is done or its step was rejected.
    """

    t0: Any
    t1: Any
    y: Tree
    accepted: Any
    _move: Move
    _setup: Problem

    def at(self, t: Any) -> Tree:
        """Dense output at a time between t0 and t1; per sample also at times of shape (batch,)."""
        move, ts = self._move, self._setup.ts
        if isinstance(self.t0, Tensor):
            span = move.u1 - move.u0
            theta = torch.where(move.accepted, (t - move.u0) / torch.where(span == 0, 1.0, span), 0.0)[None]
            flat = torch.where(move.accepted[:, None], move.step.dense(theta)[0], move.y)
        else:
            theta = torch.tensor([(t - self.t0) / (self.t1 - self.t0)], dtype=ts.dtype, device="cpu").to(ts.device)
            flat = move.step.dense(theta)[0]
        return self._setup.field.layout.tree(flat, cast=False)


def _run(setup: Problem, watch: Watch | None = None, tape: Tape | None = None) -> tuple[Tensor, End]:
    """The loop with its outputs, events and tape: states at the times, and how it ended."""
    field, solver, control, course, lanes, y, ts = setup
    out = outputs(ts, course.sign, lanes, field.layout.batch)
    out.start(y)
    stands = isinstance(course.stops, list) and (not course.stops or course.stops[-1] == course.start)
    if stands or len(ts) == 1 or not y.numel():  # no way to go
        each = field.layout.per_sample
        zero = torch.zeros(field.layout.batch, dtype=torch.int64, device=y.device) if each else 0
        end = End(zero + Status.SUCCESS, course.start, y, Counts(zero, zero, zero, zero, zero))
        ys = y.expand(len(ts), *y.shape).clone()
        if tape:
            tape.finish(ys, end)
        return ys, end
    passing = isinstance(out, PerSampleOutputs) and len(ts) > 2

    def probe(t0: Any, y0: Tensor, t1: Any, y1: Tensor, accepted: Any) -> Tensor:
        facts = []
        if isinstance(out, PerSampleOutputs) and passing:
            counts = torch.stack([out.passed(t1), out.between(t1)])
            facts.append(torch.where(accepted, counts, 0).amax(1).double())
        if watch:
            facts.append(watch.probe(t0, y0, t1, y1, accepted))
        return torch.cat(facts)

    until = None
    if isinstance(out, JointOutputs) and tape is None and watch is None:
        field, until = field.within(lasting=False), lambda: out.next
    moves = advance(field, solver, control, course, y, lanes, probe if passing or watch else None, until)
    reply = None
    while True:
        with tape.recording_context() if tape else NOTHING:
            try:
                move = moves.send(reply)
            except StopIteration as stop:
                end = stop.value
                break
            if isinstance(out, JointOutputs):
                passed = out.done
                looked: Any = out.add(move) if move.accepted else False
                passed = out.done - passed
            else:
                passed, between = (int(n) for n in move.tried[:2]) if passing else (1, 0)
                looked = out.add(move, passed, between)
                looked = False if looked is None else looked
        if tape:
            tape.observe(move, passed)
        reply = Reply(looked=looked)
        if watch:
            reply = watch.add(move, move.tried[2 * passing :])
            reply = reply._replace(looked=reply.looked | looked)
    with torch.enable_grad() if tape else NOTHING:  # of steps made with their graphs
        ys = out.result()
    if tape:
        tape.finish(ys, end)
    return (ys, end) if watch is None else (watch.cut(ts, ys), watch.end(end))


def _setup(
    f: Callable[..., Tree],
    y0: Tree,
    ts: Any,
    method: str | Solver,
    rtol: Any,
    atol: Any,
    batch: str,
    args: Any,
    controller: PID | str | None,
    norm: Callable[[Tree], Tensor] | None,
    max_steps: int,
    options: dict[str, Any],
    pure: bool,
) -> Problem:
    """Look up and check everything."""
    args = args if isinstance(args, tuple) else (args,)
    checks.field(f, args)
    if batch not in ("joint", "per-sample"):
        raise unknown("batch", batch, ("joint", "per-sample"))
    taken = ("step_size", "grid", "step_t", "jump_t")
    checks.refuse({name: value for name, value in options.items() if name not in taken}, taken)
    max_steps = integer("max_steps", max_steps, 1)
    solver = _solver(method)
    layout = Layout(y0, batch == "per-sample")
    y = layout.flat(y0).clone()  # y0's own memory is neither given to the field nor to the solution
    times, floats = _times(ts, layout)
    step_size, grid = options.get("step_size"), options.get("grid")
    fixed = step_size is not None or grid is not None or not solver.error_order
    lanes: Lanes = PerSample() if layout.per_sample and not fixed else Joint()
    if floats is None and not lanes.per_sample:
        raise UsageError("ts of shape (batch, times) needs adaptive steps", "leave step_size and grid out")
    for name in ("step_t", "jump_t"):
        if floats is None and options.get(name) is not None:
            raise UsageError(
                f"{name}: got {options[name]!r:.60} with ts of shape (batch, times)", "ts of shape (times,)"
            )
    if floats is None:
        sign: Any = torch.where(times[-1] < times[0], -1.0, 1.0).to(times.dtype)
        start: Any = times[0].detach()
    else:
        sign = 1.0 if floats[-1] >= floats[0] else -1.0
        start = floats[0]
    whole = isinstance(solver, Scipy)  # one step to the end
    most = _FIXED_STEPS if max_steps == MAX_STEPS else max_steps
    stops, jumps = _stops(floats, sign, fixed, whole, options, most) if floats is not None else ([], ())
    stop_source: Any = stops
    if lanes.per_sample:
        start = (
            torch.full((layout.batch,), start, dtype=times.dtype, device=times.device) if floats is not None else start
        )
        stop_source = (
            times[-1:].detach() if floats is None else torch.tensor(stops, dtype=times.dtype, device=times.device)
        )
        jumps = jumps or (False,)
    relative, absolute = _tolerance("rtol", rtol, layout), _tolerance("atol", atol, layout)
    nothing = (relative == 0) & (absolute == 0)  # a bool, or where
    if not fixed and (bool(nothing.any()) if isinstance(nothing, Tensor) else nothing):
        raise UsageError(f"rtol and atol: no step has an error of at most 0 (rtol={rtol}, atol={atol})", "atol=1e-8")
    if isinstance(absolute, float) and absolute == 0:
        absolute = torch.finfo(layout.real).tiny  # a state of 0 with an error of 0 is accepted
    course = Course(
        start,
        stop_source,
        jumps,
        sign,
        relative,
        absolute,
        None if fixed else _norm(norm, layout),
        most if fixed else max_steps,
        (lambda t, _: lift(times, t)) if times.requires_grad or transformed() else None,
    )
    return Problem(
        Field(f, layout, args, course.context(pure)), solver, checks.controller(controller), course, lanes, y, times
    )


def _solver(method: str | Solver) -> Solver:
    """A method by its name, or as it is."""
    if not isinstance(method, str):
        return checks.solver(method)
    if method.startswith("scipy:"):
        return Scipy(method.removeprefix("scipy:"))
    known = {**SOLVERS, **PAIRED}
    if method not in known:
        raise unknown("method", method, known)
    return known[method]


def _times(ts: Any, layout: Layout) -> tuple[Tensor, list[float] | None]:
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


def _stops(
    floats: list[float], sign: float, fixed: bool, whole: bool, options: dict[str, Any], max_steps: int
) -> tuple[list[float], tuple[bool, ...]]:
    """Times that steps must end at, and whether the field jumps there."""
    first, last = floats[0], floats[-1]
    step_size, grid = options.get("step_size"), options.get("grid")
    if step_size is not None and grid is not None:
        raise UsageError(f"step_size = {step_size!r} and grid = {grid!r:.60}: both say the steps", "give one of them")
    stops = [last]
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
        stops = [first + sign * h * k for k in range(1, n)] + [last]
    elif grid is not None:
        nodes = checks.finite_times("grid", grid)
        rising = all((b - a) * sign > 0 for a, b in itertools.pairwise(nodes))
        if len(nodes) < 2 or nodes[0] != first or nodes[-1] != last or not rising:
            problem = f"grid: need times from ts[0] = {first:g} on to ts[-1] = {last:g}, got {nodes!r:.80}"
            raise UsageError(problem, "in that order, each once")
        stops = nodes[1:]
    elif fixed and not whole:
        stops = list(dict.fromkeys(t for t in floats if t != first))
    wanted: dict[float, bool] = {}
    for name in ("step_t", "jump_t"):
        if options.get(name) is not None:
            for t in checks.finite_times(name, options[name]):
                if (t - first) * sign >= 0 and (last - t) * sign >= 0 and t != first:
                    wanted[t] = wanted.get(t, False) or name == "jump_t"
    if not wanted:
        return stops, (False,) * len(stops)
    if step_size is not None:  # a multiple of it that is one of these but for rounding
        near = 1e-9 * number("step_size", step_size, 0.0)
        stops = [t for t in stops if t == last or not any(0 < abs(t - other) < near for other in wanted)]
    marks = {**dict.fromkeys(stops, False), **wanted}
    ordered = sorted(marks, key=lambda t: t * sign)
    return ordered, tuple(marks[t] for t in ordered)


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


def _finish(setup: Problem, ts: Any, flat: Tensor, end: End, throw: bool, made: Attached | None = None) -> Solution:
    """The solution, or the error it amounts to."""
    if throw:
        _check(setup, end)
    layout, counts = setup.field.layout, end.counts
    if layout.per_sample:
        kind: dict[str, Any] = {"dtype": torch.int64, "device": layout.device}
        counts = Counts(*(torch.as_tensor(count, **kind).expand(layout.batch) for count in counts))
    rejected = counts.steps - counts.accepted
    work = Work() if made is None else made.work
    stats = Stats(counts.steps, counts.accepted, rejected, counts.nfe, counts.jacobians, counts.iterations, work)
    ys, y = (layout.tree(value, cast=False) for value in (flat, end.y))
    if made is not None:
        ys, y = (rebuild(tree, map(made.held, leaves(tree))) for tree in (ys, y))
    status = end.status if isinstance(end.status, Tensor) else Status(end.status)
    return Solution(ts, ys, status, end.t, y, stats)


def _check(setup: Problem, end: End) -> None:
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
        if status == Status.NON_FINITE and end.note:
            problem, hint = end.note, "a condition that is a number wherever the solution goes"
        name = setup.solver.name
        text = problem.format(max_steps=setup.course.max_steps)
        if status == Status.NON_FINITE and setup.course.norm and _vanishes(setup.course.atol, setup.field.layout.real):
            hint = f"atol=1e-8, as with atol = 0 a state of 0 allows no error; else {hint}"
        raise NumericalError(
            f"{name} stopped at t = {t:.6g}{where}: {text}", f"{hint}; throw=False returns what there is"
        )


def _vanishes(atol: Any, real: torch.dtype) -> bool:
    """Whether the absolute tolerance was given as 0 somewhere."""
    return bool(
        (torch.as_tensor(atol, device=None if isinstance(atol, Tensor) else "cpu") <= torch.finfo(real).tiny).any()
    )
