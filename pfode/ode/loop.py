"""The one loop: every solve, fixed or adaptive, joint or per-sample, is `advance` with other values passed in.

`LoopState` is where a solve is between two attempts: `propose` says the next one, `judge` what it is worth, `commit`
goes on. What it is given and hands back is in records.py; joint and per-sample steps are two arithmetics of the same
lines (batching.py).
"""

import math
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pfode._torch import is_transformed
from pfode.ode.batching import Batching
from pfode.ode.control import PID
from pfode.ode.records import Attempt, Counts, End, Position, Probe, Reply, Schedule, Status
from pfode.ode.solver import RMS, Solver, Step, clock, column
from pfode.ode.state import Field

__all__ = ["LoopState", "advance"]

_TRIES = 12  # attempts in a row that are not finite or not solved before a sample is given up
FLOOR = {real: 16 * torch.finfo(real).eps for real in (torch.float32, torch.float64)}  # least step by the time's size
_LEAST = 1e-300  # of a first step's size
_NO_REPLY = Reply()
_RUNNING, _SUCCESS, _MAX_STEPS, _MIN_STEP, _NON_FINITE, _NEWTON_FAILED, _EVENT = map(int, Status)  # quicker as ints


def advance(
    field: Field,
    solver: Solver,
    control: PID,
    schedule: Schedule,
    y: Tensor,
    batching: Batching,
    probe: Probe | None = None,
    until: Callable[[], float] | None = None,
) -> Generator[Attempt, Reply | None, End]:
    """Yield every attempted step; a Reply may be sent back.

    Args:
        field, solver, control, schedule: what, how, at which steps, from where to where.
        y: the flat state.
        batching: the batching mode: whether steps are chosen jointly or per sample.
        probe: (t0, y0, t1, y1, accepted) -> a 1-d tensor to be read together with the loop's own facts,
            `Attempt.tried`; in joint mode it is called before the verdict, accepted = None and y1 the state tried.
        until: in joint mode, the time up to which nobody looks at single steps; None: every one is looked at.
    """
    state = LoopState(field, solver, control, schedule, y, batching, probe, until)
    while state.alive and state.attempts < schedule.max_steps:
        record = state.leap()
        if record is None and (not state.alive or state.attempts == schedule.max_steps):
            continue
        if record is None:
            proposal = state.propose()
            calls = field.calls
            step = solver.step(field, proposal.u0, proposal.u1, state.y, state.carry)
            verdict = state.judge(proposal, step)
            record = state.commit(proposal, step, verdict, field.calls - calls)
        calls = field.calls
        reply = yield record
        state.answer(record, reply or _NO_REPLY, field.calls - calls)
    return state.end()


class _Proposal(NamedTuple):
    """A step to try: from t0 to t1, as the solver is given them u0 to u1; its size; whether it ends at the stop ahead
    (`last`), and that stop's index, else -1 (`reached`)."""

    t0: Any
    t1: Any
    u0: Any
    u1: Any
    size: Any
    last: Any
    reached: Any


class _Verdict(NamedTuple):
    """Of an attempt: its error in units of the tolerance, whether its equations were solved (None: there are none),
    whether both are fine and it is accepted; what was probed; |y1|."""

    error: Any
    ok: Any
    fine: Any
    accepted: Any
    tried: list[float]
    size_of_y: Tensor


class LoopState:
    """Where a solve is between two attempts: `propose` says the next one, `judge` what it is worth, `commit` goes on.

    Everything but y and carry is a float, int or boolean in joint mode and has shape (batch,) per sample.

    Attributes:
        t, y, carry: time, flat state and what the solver keeps for (t, y).
        h, memory: the size of the next step, and the controller's memory.
        at, here: the index of the stop ahead, and of the one that t is, or -1.
        at_jump: whether t is a jump, beyond which the carry is not made yet.
        status: how far the solve is; running: where it is under way; alive: whether anything is.
        failures: attempts in a row that were not finite or not solved.
        counts, attempts: work so far; attempts of the whole batch.
        counting: which samples of a fixed grid still count: True, or shape (batch,).
    """

    def __init__(
        self,
        field: Field,
        solver: Solver,
        control: PID,
        schedule: Schedule,
        y: Tensor,
        batching: Batching,
        probe: Probe | None,
        until: Callable[[], float] | None,
    ):
        self.field, self.solver, self.control, self.schedule = field, solver, control, schedule
        self.batching, self.probe, self.until, self.adaptive = batching, probe, until, schedule.norm is not None
        self.zero, self.nowhere = batching.fill(0, schedule.start), batching.fill(-1, schedule.start)
        self.never = self.zero != 0
        self.jumps: Any = torch.tensor(schedule.jumps, device=y.device) if batching.per_sample else schedule.jumps
        self.jumping = any(schedule.jumps) or schedule.begins_at_jump is not False
        self.last_stop = _last_stop(schedule.stops)
        self.floor = FLOOR[clock(y.device)]
        self.units = _units(schedule, y) if self.adaptive else None
        self.read = torch.no_grad()(_read) if field.context.pure else _read
        self.differentiable = field.context.pure and torch.is_grad_enabled() and self.adaptive and batching.per_sample

        self.t, self.y = schedule.start, y
        self.at, self.here, self.at_jump = self.zero, self.nowhere, self.never | schedule.begins_at_jump
        self.h, slope, self.status = _first_step(field, solver, control, schedule, batching, y, self.units)
        self.carry = solver.init(field, _beginning(field, schedule, self.here), y, slope)
        self.memory = (batching.fill(1.0, self.t), batching.fill(1.0, self.t), self.never)
        self.size_of_y = y.detach().abs() if self.adaptive else y
        self.solved: Tensor | None = None  # on fixed grids: whether all steps solved their equations, read at the end
        self.failures, self.attempts, self.counting = self.zero, 0, True
        self.restart: Any = False  # where a jump was reached just now
        started = (self.zero + field.calls) * (self.status != _SUCCESS)
        self.counts = Counts(self.zero, self.zero, started, self.zero, self.zero)
        self.running = self.status == _RUNNING
        self._look()
        watched = (
            until is None or batching.per_sample or field.context.pure or not self.adaptive or schedule.lift or probe
        )
        self.ahead = None if watched else getattr(solver, "ahead", None)

    def _look(self) -> None:
        """Whether anything is still on its way."""
        self.alive = bool(self.running.any()) if self.batching.per_sample else self.running

    def leap(self) -> Attempt | None:
        """Attempts that nobody looks at, in one call of a solver that can (`Compiled.ahead`), up to the stop if that is
        looked at next: its record. None where an attempt is to be made by itself, or no more are allowed.
        """
        if not self.ahead or not self.until or self.at_jump:
            return None
        field, schedule, until = self.field, self.schedule, self.until()
        calls, stop = field.calls, schedule.stops[self.at]
        closes = not self.jumping and (until - stop) * schedule.sign >= 0
        here = Position(self.t, self.h, self.memory, self.y, self.carry)
        most = schedule.max_steps - self.attempts
        went = self.ahead(field, self.control, here, stop, until, closes, schedule.sign, most)
        if not went:
            return None
        (self.t, self.h, self.memory, self.y, self.carry), made, passed = went
        self.attempts, self.size_of_y = self.attempts + made, self.y.abs()
        if passed:
            self.failures, self.here = self.zero, self.nowhere
        steps, accepted, nfe = self.counts.steps + made, self.counts.accepted + passed, field.calls - calls
        self.counts = self.counts._replace(steps=steps, accepted=accepted, nfe=self.counts.nfe + nfe)
        if not closes or self.t != stop:
            return None
        self.alive = self.running = self.at < self.last_stop
        self.status = self.status if self.alive else _SUCCESS
        self.here, self.at = self.at, min(self.at + 1, self.last_stop)
        t, y = self.t, self.y
        return Attempt(t, t, t, t, y, y, True, Step(y, None, _unseen), [], self.counts, self.carry)

    def propose(self) -> _Proposal:
        """The step to try next: of the size wanted, or to the stop ahead where that is as near."""
        schedule, where, t, sign = self.schedule, self.batching.where, self.t, self.schedule.sign
        h, stretch = self.control.fit(self.batching, t, self.h), self.control.stretch
        stop = self.batching.pick(schedule.stops, self.at)
        left = (stop - t) * sign
        last = where(left <= self.control.max_step, h * stretch, h) >= left
        size = where(last, left, h)
        t1 = where(self.running, where(last, stop, t + h * sign), t)
        reached = where(last & self.running, self.at, self.nowhere)
        u0, u1 = (schedule.lift(t, self.here), schedule.lift(t1, reached)) if schedule.lift else (t, t1)
        if self.jumping:
            ahead = last & self.batching.pick(self.jumps, self.at)
            near = _nudged(u0, u1, sign, self.at_jump, self.field)
            u0, u1 = near, _nudged(u1, near, -sign, ahead, self.field)
        self.attempts += 1
        return _Proposal(t, t1, u0, u1, size, last, reached)

    def judge(self, proposal: _Proposal, step: Step) -> _Verdict:
        """Whether a step is good enough: one read-back in joint mode."""
        t, y, probe = self.t, self.y, self.probe
        asked = probe and (lambda: probe(t, y, proposal.t1, step.y1, None))
        error, ok, tried, size_of_y = self.read(self.units, self.batching, step, self.size_of_y, asked)
        fine = error < math.inf if ok is None else (error < math.inf) & ok
        enough = error <= 1
        if self.control.force:
            enough = enough | (proposal.size <= self.control.min_step)
        accepted = self.running & fine & enough
        return _Verdict(error, ok, fine, accepted, tried, size_of_y)

    def commit(self, proposal: _Proposal, step: Step, verdict: _Verdict, calls: int) -> Attempt:
        """Go on where the step was accepted, choose the next size, count; `calls` is what the step evaluated."""
        batching, where, accepted = self.batching, self.batching.where, verdict.accepted
        before = self.y, self.carry, self.running
        self._count(step, accepted, calls)
        if not self.adaptive and step.ok is not None:
            self.solved = step.ok if self.solved is None else self.solved & step.ok
        self.y = batching.merge(accepted, step.y1, self.y)
        self.carry = batching.merge(accepted, step.carry, self.carry if step.again is None else step.again)
        self.t = where(accepted, proposal.t1, self.t)
        hit = accepted & proposal.last
        if self.adaptive:
            if step.measured is None:
                self.size_of_y = batching.merge(accepted, verdict.size_of_y, self.size_of_y)
            self._resize(proposal.size, verdict, hit)
        self.status = where(hit & (self.at == self.last_stop), _SUCCESS, self.status)
        self.running = self.status == _RUNNING
        if self.jumping:
            jumped = hit & batching.pick(self.jumps, self.at)
            self.at_jump = jumped | (self.at_jump & batching.no(accepted))
        self.here, self.at = where(accepted, proposal.reached, self.here), batching.low(self.at + hit, self.last_stop)
        self.restart, tried = self.jumping and self.at_jump & hit, verdict.tried
        if batching.per_sample:
            step, tried = self._settle(proposal, step, verdict, before)
        else:
            self.alive = self.running
        ends = proposal.t0, proposal.t1, proposal.u0, proposal.u1
        return Attempt(*ends, before[0], self.y, accepted, step, tried, self.counts, self.carry)

    def _count(self, step: Step, accepted: Any, calls: int) -> None:
        """Add the work of an attempt, of the samples that it was made for."""
        counted, count = self.running if self.batching.per_sample else self.counting, self.batching.count
        steps, passed, nfe, jacobians, iterations = self.counts
        self.counts = Counts(
            steps + counted,
            passed + (accepted & counted),
            count(nfe, counted, calls if step.nfe is None else step.nfe),
            count(jacobians, counted, step.jacobians),
            count(iterations, counted, step.iterations),
        )

    def _resize(self, size: Any, verdict: _Verdict, hit: Any) -> None:
        """The size of the next step, after one of this size, and whether it is too small to go on with."""
        batching, where, control, fine = self.batching, self.batching.where, self.control, verdict.fine
        error, order = where(batching.no(fine), math.inf, verdict.error), self.solver.error_order
        factor, self.memory = control.factor(batching, error, verdict.accepted, self.memory, order)
        wanted = batching.low(batching.high(size * factor, control.min_step), control.max_step)
        # a step cut short by a stop says little about the next one
        self.h = where(hit & (wanted < self.h), self.h, wanted)
        self.failures = where(fine, 0, self.failures + 1)
        if batching.sure(verdict.accepted):
            return
        least = batching.high(abs(self.t) * self.floor, control.min_step)
        stuck = (self.failures >= _TRIES) | (self.h < least) | (size <= control.min_step)
        cause = batching.fill(_NON_FINITE, self.t)
        cause = cause if verdict.ok is None else where(verdict.ok, cause, _NEWTON_FAILED)
        cause = where(fine, _MIN_STEP, cause)
        self.status = where(self.running & batching.no(verdict.accepted) & stuck, cause, self.status)

    def _settle(
        self, proposal: _Proposal, step: Step, verdict: _Verdict, before: tuple[Tensor, Any, Any]
    ) -> tuple[Step, list[float]]:
        """Per sample: read what the host must know, and what was probed. Where an attempt that is to be differentiated
        was not fine it is made again without these samples, as zero times the derivative of NaN is not zero.
        """
        y0, carry0, live = before
        batching, accepted = self.batching, verdict.accepted
        facts = [self.running.any()[None]]
        facts += [self.restart.any()[None]] if self.jumping else []
        facts += [(live & batching.no(verdict.fine)).any()[None]] if self.differentiable else []
        facts += [self.probe(proposal.t0, y0, self.t, self.y, accepted)] if self.probe else []
        self.alive, *tried = torch.cat([fact.double() for fact in facts]).tolist()
        self.restart = self.restart if self.jumping and tried.pop(0) else False
        if self.differentiable and tried.pop(0):
            u1 = batching.where(verdict.fine, proposal.u1, proposal.u0)
            step = self.solver.step(self.field, proposal.u0, u1, y0, carry0)
            self.y, self.carry = batching.merge(accepted, step.y1, y0), batching.merge(accepted, step.carry, carry0)
        return step, tried

    def answer(self, record: Attempt, reply: Reply, calls: int) -> None:
        """What came back for a record, of which dense output took so many evaluations: samples that end there. Beyond a
        jump the carry is made anew."""
        if calls:
            looked = record.accepted & self.counting & reply.looked
            self.counts = self.counts._replace(nfe=self.counts.nfe + looked * calls)
        if reply.live is not None:
            self.counting = reply.live
        if reply.halt is not None:
            self.status = self.batching.where(reply.halt, _EVENT, self.status)
            self.running = self.status == _RUNNING
            self._look()
        restart, self.restart = self.restart, False
        if restart is False or not self.jumping or not self.alive:
            return
        field, schedule = self.field, self.schedule
        u0 = schedule.lift(self.t, self.here) if schedule.lift else self.t
        calls = field.calls
        fresh = self.solver.init(field, _nudged(u0, None, schedule.sign, self.at_jump, field), self.y)
        self.carry = self.batching.merge(restart, fresh, self.carry)
        self.counts = self.counts._replace(nfe=self.counts.nfe + restart * (field.calls - calls))

    def end(self) -> End:
        """How it ended; on a fixed grid that is read here."""
        status, t = self.batching.where(self.running, _MAX_STEPS, self.status), self.t
        if not self.adaptive:
            status, t = _fixed_outcome(self.field, status, t, self.y, self.solved)
        return End(status, t, self.y, self.counts)


def _last_stop(stops: Any) -> Any:
    """The index of the end among the stops: of each sample the first that is the last one, shape (batch,)."""
    each = isinstance(stops, Tensor) and stops.ndim == 2
    return (stops != stops[-1]).sum(0) if each else len(stops) - 1


def _unseen(theta: Tensor) -> Tensor:
    raise AssertionError("dense output of attempts that nobody was to look at")


@torch.no_grad()
def _fixed_outcome(field: Field, status: Any, t: float, y: Tensor, solved: Tensor | None) -> tuple[Any, Any]:
    """Status and time at the end of fixed steps, (batch,) in per-sample mode: their only read-back.

    What is not finite stays so up to the end. torch.func's transforms can read nothing: there NaN is left to be seen.
    """
    if is_transformed(y):
        return status, t
    finite = torch.isfinite(y).flatten(field.layout.lead).all(-1)
    if solved is not None:
        finite = torch.stack([finite, solved.expand_as(finite)])
    flags = finite.tolist()
    unsolved, broken = _NEWTON_FAILED, _NON_FINITE
    if not field.layout.per_sample:
        rows: Any = flags if solved is not None else [flags, True]
        fine, ok = (all(row) if isinstance(row, list) else row for row in rows)  # of samples, or of the state
        return (status if fine and ok else broken if ok else unsolved), t
    pairs = [(f, True) for f in flags] if solved is None else zip(*flags, strict=True)
    each = [status if fine and ok else broken if ok else unsolved for fine, ok in pairs]
    times = torch.full((len(each),), t, dtype=clock(y.device), device=y.device)
    return torch.tensor(each, dtype=torch.int64, device=y.device), times


class _Units(NamedTuple):
    """atol and rtol as the norm wants them, and the norm: where it is a mean, that is taken of the units, once."""

    atol: Tensor
    rtol: Any
    norm: Callable[[Tensor], Tensor]

    def scale(self, size: Tensor) -> Tensor:
        """The unit of the error of states of a size."""
        if isinstance(self.rtol, Tensor):
            return torch.addcmul(self.atol, self.rtol, size)
        return torch.add(self.atol, size, alpha=self.rtol)


def _units(schedule: Schedule, y: Tensor) -> _Units:
    atol, rtol, norm = schedule.atol, schedule.rtol, schedule.norm
    assert norm is not None
    if isinstance(norm, RMS):
        root = math.sqrt(norm.count)
        atol, rtol, norm = atol * root, rtol * root, torch.linalg.vector_norm if norm.dim is None else norm.root
    if not isinstance(atol, Tensor):
        atol = torch.scalar_tensor(atol, dtype=y.dtype.to_real(), device=y.device)
    return _Units(atol, rtol, norm)


def _read(
    units: _Units | None, batching: Batching, step: Step, before: Tensor, probe: Callable[[], Tensor] | None
) -> tuple[Any, Any, list[float], Tensor]:
    """The error in units of the tolerance, whether the step was solved, what was probed: one read-back; |y1|."""
    after, error = before, None
    if step.measured is not None:
        error = step.measured.detach()
    elif units is not None and step.error is not None:
        after = step.y1.abs()
        error = units.norm(step.error / units.scale(torch.maximum(before, after)))
        if not batching.per_sample and step.ok is None and probe is None:
            return error.item(), None, [], after
    elif batching.per_sample:
        error = torch.zeros((), device=before.device)
    if batching.per_sample:
        assert error is not None
        return error.to(clock(error.device)), step.ok, [], after
    facts = [] if error is None else [error]
    facts += [step.ok] if step.ok is not None and error is not None else []
    if not facts and probe is None:
        return 0.0, None, [], after
    if len(facts) == 1 and probe is None:
        return facts[0].item(), None, [], after
    flat = [fact.double().reshape(1) for fact in facts] + ([probe().double()] if probe else [])
    values = torch.cat(flat).tolist()
    first = 0.0 if error is None else values[0]
    return first, bool(values[1]) if len(facts) == 2 else None, values[len(facts) :], after


def _first_step(
    field: Field,
    solver: Solver,
    control: PID,
    schedule: Schedule,
    batching: Batching,
    y: Tensor,
    units: _Units | None,
) -> tuple[Any, Tensor | None, Any]:
    """The size of the first step, f(t0, y0) if it was needed, and the status: NON_FINITE where f is, SUCCESS where
    there is no way to go.

    Hairer, Norsett & Wanner 1993, II.4, in units of time in which something happens: 1, or, where it is above 10^4, the
    time that f takes to change the state by its size. Slopes are measured in units of the largest one, so that no
    number overflows that f can return.
    """
    zero = batching.fill(0, schedule.start)
    status = batching.where(schedule.stops[-1] == schedule.start, zero + _SUCCESS, zero + _RUNNING)
    arrived = not batching.per_sample and status == _SUCCESS
    if units is None or control.first_step is not None or arrived:
        return batching.fill(control.first_step or math.inf, schedule.start), None, status
    t = _beginning(field, schedule, zero - 1)
    slope = field(field.time(t), y).clone()  # fields may use one buffer for all their results
    with torch.no_grad():
        here, f = y.detach(), slope.detach()
        scale, norm = units.scale(here.abs()), units.norm
        (most,) = _host(batching, f.abs().amax(-1) if batching.per_sample else f.abs().amax())
        most = batching.where((most > 0) & (most < math.inf), most, batching.fill(1.0, most))
        unit = column(most, y)
        along = f / unit
        d0, d1 = _host(batching, norm(here / scale), norm(along / scale))
        finite = (d0 < math.inf) & (d1 < math.inf)
        status = batching.where(finite | (status == _SUCCESS), status, zero + _NON_FINITE)
        span = abs(schedule.stops[-1] - schedule.start)
        slow = batching.high(d0, 1.0) / batching.high(d1, 1e-300) / most
        slow = batching.where(slow < span, slow, span)
        unit_of_time = batching.where(slow > 1e4, slow, batching.fill(1.0, d0))
        most = most * unit_of_time
        small = (d0 < 1e-5) | (d1 * most < 1e-5)
        h = batching.where(small, batching.fill(1e-6, d0), 0.01 * d0 / batching.high(d1, 1e-300) / most) * unit_of_time
        h = batching.low(batching.high(batching.low(h, control.max_step), _LEAST), math.inf)
        room = abs(batching.pick(schedule.stops, zero) - schedule.start)
        h = batching.where(h < room, h, room)
        moved = schedule.start + h * schedule.sign
        far = column(h * schedule.sign, y)
        ahead = here + f * far if isinstance(far, Tensor) else torch.add(here, f, alpha=far)
        (d2,) = _host(batching, norm((field(field.time(moved), ahead) / unit - along) / scale))
        h, d2 = h / unit_of_time, d2 * unit_of_time / batching.high(h, _LEAST)
        steepest = batching.where(d1 > d2, d1, d2)
        flat = steepest * most <= 1e-15
        h1 = batching.where(
            flat,
            batching.high(h * 1e-3, 1e-6),
            (0.01 / batching.high(steepest, 1e-300) / most) ** (1 / solver.error_order),
        )
        h1 = batching.where(h1 < 100 * h, h1, 100 * h)
        h1 = batching.where(h1 == h1, h1, h) * unit_of_time
        h1 = batching.high(h1, batching.high(abs(schedule.start) * FLOOR[clock(y.device)], control.min_step))
        return batching.low(h1, control.max_step), slope, status


def _host(batching: Batching, *values: Tensor) -> list[Any]:
    """Values as the batching mode has them: read, or left on the device in the clock's dtype."""
    if batching.per_sample:
        return [value.to(clock(value.device)) for value in values]
    return torch.stack(values).tolist() if len(values) != 1 else [values[0].item()]


def _beginning(field: Field, schedule: Schedule, here: Any) -> Any:
    """Where a solve first evaluates its field: its start, or next to it where the field jumps there."""
    t = schedule.lift(schedule.start, here) if schedule.lift else schedule.start
    return t if schedule.begins_at_jump is False else _nudged(t, None, schedule.sign, schedule.begins_at_jump, field)


def _nudged(t: Any, other: Any, sign: Any, condition: Any, field: Field) -> Any:
    """t, moved to the next representable value in the direction of `sign` where the condition holds."""
    real = field.layout.real
    if isinstance(t, Tensor):
        towards = torch.as_tensor(sign * math.inf, dtype=real, device=t.device)
        moved = torch.nextafter(t.detach().to(real), towards.expand_as(t)).to(t.dtype) - t.detach()
        return t + torch.where(torch.as_tensor(condition, device=t.device), moved, torch.zeros_like(moved))
    kind = np.float32 if real == torch.float32 else np.float64
    return float(np.nextafter(kind(t), kind(sign * math.inf))) if condition else t
