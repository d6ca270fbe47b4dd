"""`solve` and `steps`: check the options, run the loop, hand back what came of it."""

import dataclasses
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pfode._torch import transformed
from pfode.errors import UsageError
from pfode.ode import checks
from pfode.ode.adjoints.attach import attach
from pfode.ode.adjoints.checkpoint import CheckpointTape
from pfode.ode.adjoints.problem import NOTHING, Adjoint, Direct, Problem, Tape, detached
from pfode.ode.adjoints.sources import FirstCall, Sources, sources
from pfode.ode.autocast import autocast_off, casting
from pfode.ode.compiled import Compiled
from pfode.ode.control import PID
from pfode.ode.events import Events, Watch
from pfode.ode.loop import advance
from pfode.ode.methods.implicit import ImplicitRungeKutta
from pfode.ode.methods.scipy import Scipy
from pfode.ode.options import MAX_STEPS, Options, prepare
from pfode.ode.outputs import JointOutputs, PerSampleOutputs, outputs
from pfode.ode.records import Counts, End, Reply, Status
from pfode.ode.registry import adjoint_named, solver_named
from pfode.ode.solution import Point, Solution, finish
from pfode.ode.solver import Solver
from pfode.ode.state import Tree

__all__ = ["carry_out", "solve", "steps"]


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
    options = Options(method, rtol, atol, batch, controller, step_size, grid, step_t, jump_t, norm, max_steps)
    how, args = adjoint_named(adjoint), args if isinstance(args, tuple) else (args,)
    inside = transformed()
    if compile and inside:
        raise UsageError("compile=True: not inside torch.func transforms", "compile=False")
    if compile and not isinstance(method, Compiled):
        options = dataclasses.replace(options, method=Compiled(solver_named(method)))
    setup = prepare(f, y0, ts, args, options)
    if inside:
        _refuse_inside(inside, setup)
    return carry_out(setup, f, how, params, ts, events, throw)


def carry_out(
    setup: Problem,
    f: Any,
    how: Adjoint | Direct,
    params: Iterable[Tensor] | None,
    ts: Any,
    events: Events | None = None,
    throw: bool = True,
) -> Solution:
    """Solve a problem that was checked, with gradients.

    Args:
        f: what the caller gave: where parameters are looked for.
        how, params, events, throw: as for `solve`; ts: as the caller gave them.

    Raises:
        UsageError, NumericalError: as `solve`.
    """
    recording, inside = torch.is_grad_enabled(), transformed()
    device = setup.field.layout.device
    cast = casting(device)
    if cast is not None:
        setup.field.map(cast)
    found = sources(f, setup.field.args, params) if recording and not inside else Sources([], [], 0, False)
    with autocast_off(device):
        if not (inside or events is not None or not recording or isinstance(how, Direct)):
            return _with_tape(setup, how, found, ts, throw)
        depends = any(t.requires_grad for t in (setup.y, setup.ts, *found.tensors))
        opaque = params is None and not isinstance(f, torch.nn.Module)
        pure = bool(inside) or (recording and (depends or opaque))
        setup = setup._replace(field=setup.field.within(pure=pure))
        if pure and setup.batching.per_sample and events is None and not inside:
            return _twice(setup, ts, throw)
        with torch.set_grad_enabled(pure and recording):
            schedule = setup.schedule
            watch = None
            if events is not None:
                watch = Watch(events, setup.field, schedule.sign, schedule.start, setup.y, cast)
            out, end = _run(setup, watch)
            solution = finish(setup, ts, out, end, throw)
            return dataclasses.replace(solution, events=watch.result()) if watch else solution


def _with_tape(setup: Problem, how: Adjoint, found: Sources, ts: Any, throw: bool) -> Solution:
    """Solve without gradients, an adjoint's tape looking on, and attach the solution to what it came from."""
    with torch.no_grad():
        bare = _bare(setup, found.places, how.pure)
        tape, known = how.tape(bare), any(t.requires_grad for t in (setup.y, *found.tensors))
        tape.recording = tape.recording and known and not setup.ts.requires_grad
        first = FirstCall(setup.field.f, found.searched and not tape.recording, setup.field.others)
        bare.field.witness = first
        tape.witness = None if known or setup.ts.requires_grad else first
        out, end = _run(bare, None, tape)
    made = attach(bare, tape, found, tape.found or first.found, setup.y, setup.ts, out.detach(), end.y.detach())
    return finish(setup, ts, made.ys, end._replace(y=made.end), throw, made)


def _refuse_inside(inside: str, setup: Problem) -> None:
    """Raise UsageError for solves that torch.func's transforms (and forward-mode differentiation) cannot follow."""
    if isinstance(setup.solver, Scipy):
        raise UsageError(f"{setup.solver.name}: cannot be used inside torch.func transforms", 'method="dopri5"')
    if inside == "vmap" and setup.schedule.norm is not None:
        raise UsageError(
            "torch.func.vmap: adaptive steps cannot be chosen inside it", 'batch="per-sample" outside it, or step_size='
        )
    if inside == "vmap" and isinstance(setup.solver, ImplicitRungeKutta):
        raise UsageError(
            f"torch.func.vmap: {setup.solver.name} cannot see inside it whether its equations are solved",
            'batch="per-sample" outside it, or an explicit method',
        )


def _bare(setup: Problem, places: Sequence[int], pure: bool) -> Problem:
    """The same problem, its state and the tensors at `places` in args as leaves of its own, times without gradients."""
    field = setup.field.renewed(detached(setup.field.args, places), setup.schedule.context(pure))
    schedule = dataclasses.replace(setup.schedule, lift=None)
    y = setup.y.detach().requires_grad_(setup.y.requires_grad)
    return setup._replace(field=field, schedule=schedule, y=y, ts=setup.ts.detach())


def _twice(setup: Problem, ts: Any, throw: bool) -> Solution:
    """Direct gradients per sample: steps are found without a graph and the accepted ones taken again with it."""
    with torch.no_grad():
        bare = _bare(setup, (), False)
        tape = CheckpointTape(bare, None)
        _, end = _run(bare, None, tape)
    ys, y = tape.graph(setup)
    return finish(setup, ts, ys, end._replace(y=y), throw)


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
    """Yield the accepted steps of `solve` as they are made, from ts[0] to ts[-1].

    Args:
        f, y0, ts, method, rtol, atol, batch, args, controller, max_steps: as for `solve`; with batch="per-sample" a
            step is yielded where any sample accepts it.
        options: step_size, grid, step_t, jump_t, as for `solve`.

    Returns:
        How the solve ended; nothing is raised for a solve that does not get to its end.

    Raises:
        UsageError: anything that cannot be carried out as written.
    """
    known = ("step_size", "grid", "step_t", "jump_t")
    checks.refuse({name: value for name, value in options.items() if name not in known}, known)
    every = Options(method, rtol, atol, batch, controller, max_steps=max_steps, **options)
    setup = prepare(f, y0, ts, args if isinstance(args, tuple) else (args,), every)
    device = setup.field.layout.device
    cast = casting(device)
    if cast is not None:
        setup.field.map(cast)
    attempts = advance(*setup[:4], setup.y, setup.batching)
    tree = setup.field.layout.tree
    while True:
        try:
            with autocast_off(device):
                attempt = next(attempts)
        except StopIteration as stop:
            end: End = stop.value
            return end if isinstance(end.status, Tensor) else end._replace(status=Status(end.status))
        accepted = attempt.accepted
        if bool(accepted.any()) if isinstance(accepted, Tensor) else accepted:
            t1 = torch.where(accepted, attempt.t1, attempt.t0) if isinstance(accepted, Tensor) else attempt.t1
            yield Point(attempt.t0, t1, tree(attempt.y.clone(), cast=False), accepted, attempt, setup)


def _run(setup: Problem, watch: Watch | None = None, tape: Tape | None = None) -> tuple[Tensor, End]:
    """The loop with its outputs, events and tape: states at the times, and how it ended."""
    field, solver, control, schedule, batching, y, ts = setup
    out = outputs(ts, schedule.sign, batching, field.layout.batch)
    out.start(y)
    stands = isinstance(schedule.stops, list) and (not schedule.stops or schedule.stops[-1] == schedule.start)
    if stands or len(ts) == 1 or not y.numel():  # no way to go
        each = field.layout.per_sample
        zero = torch.zeros(field.layout.batch, dtype=torch.int64, device=y.device) if each else 0
        end = End(zero + Status.SUCCESS, schedule.start, y, Counts(zero, zero, zero, zero, zero))
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

    until, alone = None, isinstance(out, JointOutputs) and watch is None  # nobody looks at single steps
    if isinstance(out, JointOutputs) and alone and tape is None:
        field, until = field.within(lasting=False), lambda: out.next
    attempts = advance(field, solver, control, schedule, y, batching, probe if passing or watch else None, until)
    reply = None
    while True:
        with tape.recording_context() if tape else NOTHING:
            try:
                attempt = attempts.send(reply)
            except StopIteration as stop:
                end = stop.value
                break
            if isinstance(out, JointOutputs):
                passed = out.done
                looked: Any = out.add(attempt) if attempt.accepted else False
                passed = out.done - passed
            else:
                passed, between = (int(n) for n in attempt.tried[:2]) if passing else (1, 0)
                looked = out.add(attempt, passed, between)
                looked = False if looked is None else looked
        if tape and tape.needless:
            tape, field.context = None, dataclasses.replace(field.context, lasting=not alone)
        if tape:
            tape.observe(attempt, passed)
        reply = None if looked is False else Reply(looked=looked)
        if watch:
            met = watch.add(attempt, attempt.tried[2 * passing :])
            reply = met._replace(looked=met.looked | looked)
    with torch.enable_grad() if tape else NOTHING:  # of steps made with their graphs
        ys = out.result()
    if tape:
        tape.finish(ys, end)
    return (ys, end) if watch is None else (watch.cut(ts, ys), watch.end(end))
