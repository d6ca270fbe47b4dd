"""The one loop: every solve, fixed or adaptive, joint or per-sample, is `advance` with other values passed in.

What differs between one step size for the whole state and one per sample is only the arithmetic of times, errors and
decisions: Python's floats, read from the device once per attempted step, or tensors of shape (batch,) that stay there.
`Joint` and `PerSample` are these two arithmetics ("lanes").
"""

import enum
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pfode._torch import is_transformed
from pfode.ode.control import PID
from pfode.ode.solver import RMS, Solver, Step, clock, column
from pfode.ode.state import Field, leaves, rebuild

STRETCH = 1.01  # a step that ends this near to a stop goes to the stop
_TRIES = 12  # attempts in a row that are not finite or not solved before a sample is given up
FLOOR = {real: 16 * torch.finfo(real).eps for real in (torch.float32, torch.float64)}  # least step by the time's size


_LEAST = 1e-300  # of a first step's size


class Status(enum.IntEnum):
    """How a solve ended, for the state or for a sample."""

    RUNNING = -1
    SUCCESS = 0
    MAX_STEPS = 1
    MIN_STEP = 2
    NON_FINITE = 3
    NEWTON_FAILED = 4
    EVENT = 5


class Joint:
    """One step size for the state: floats and booleans."""

    per_sample = False

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return a if condition else b

    def low(self, a: Any, b: Any) -> Any:
        return min(a, b)

    def high(self, a: Any, b: Any) -> Any:
        return max(a, b)

    def no(self, a: Any) -> Any:
        return not a

    def fill(self, value: Any, like: Any) -> Any:
        return value

    def pick(self, table: Any, at: Any) -> Any:
        """The entry of a table of stops at each lane's index."""
        return table[at]

    def merge(self, condition: Any, new: Any, old: Any) -> Any:
        return new if condition else old


class PerSample:
    """One step size per sample: tensors of shape (batch,)."""

    per_sample = True

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return torch.where(condition, a, b)

    def low(self, a: Any, b: Any) -> Any:
        return a.clamp(max=b)

    def high(self, a: Any, b: Any) -> Any:
        return a.clamp(min=b)

    def no(self, a: Any) -> Any:
        return ~a

    def fill(self, value: Any, like: Any) -> Any:
        return torch.full(
            like.shape, value, device=like.device, dtype=torch.int64 if type(value) is int else like.dtype
        )

    def pick(self, table: Any, at: Any) -> Any:
        return table[at] if table.ndim == 1 else table.gather(0, at[None])[0]

    def merge(self, condition: Any, new: Any, old: Any) -> Any:
        """Samples of `new` where the condition holds, else of `old`; None, a carry not known, stays None."""
        if new is None or old is None:
            return None
        pairs = zip(leaves(new), leaves(old), strict=True)
        return rebuild(new, (torch.where(condition.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))


Lanes = Joint | PerSample
Probe = Callable[[Any, Tensor, Any, Tensor, Any], Tensor]


class Counts(NamedTuple):
    """Work so far: ints, or shape (batch,)."""

    steps: Any
    accepted: Any
    nfe: Any
    jacobians: Any
    iterations: Any


class Move(NamedTuple):
    """One attempted step from t0 to t1; in per-sample lanes these and `accepted` have shape (batch,).

    Fields:
        t0, t1: its ends; t1 = t0 for samples that are done.
        u0, u1: the same as the step was given them: with gradients, or on the near sides of jumps.
        y0, y: the states before and after it; y is y0 where it was rejected.
        accepted, step: the verdict, and what the solver returned.
        tried: what was probed.
        counts: work so far, this step included.
        carry: what belongs to (t, y) after it.
    """

    t0: Any
    t1: Any
    u0: Any
    u1: Any
    y0: Tensor
    y: Tensor
    accepted: Any
    step: Step
    tried: list[float]
    counts: Counts
    carry: Any = None


class Reply(NamedTuple):
    """What may be sent back for a Move.

    Fields:
        halt: whether the solve ends there, a boolean or shape (batch,): an event.
        looked: whose dense output was used: evaluations made for it are counted there. A boolean or shape (batch,).
        live: which samples of a fixed grid still count, shape (batch,); None: all that did.
    """

    halt: Any = None
    looked: Any = True
    live: Any = None


class Ahead(NamedTuple):
    """Where the loop is between two attempts, in joint lanes: time, next step size, the controller's memory, state,
    carry.
    """

    t: float
    h: float
    memory: tuple[Any, Any, Any]
    y: Tensor
    carry: Any


class End(NamedTuple):
    """How the loop ended; `status` is a Status, or their numbers in shape (batch,); `note`: what made it NON_FINITE."""

    status: Any
    t: Any
    y: Tensor
    counts: Counts
    note: str = ""


@dataclass(frozen=True)
class Course:
    """From where to where, and how exactly.

    Args:
        start: t0, a float or shape (batch,).
        stops: times that steps must end at, in the direction of the solve, the last one its end: a list of floats or
            shape (stops,) or (stops, batch). For fixed steps, the grid.
        jumps: at which of them the field jumps: it is evaluated on the near side only, and afresh beyond.
        sign: 1.0 or -1.0, the direction; or shape (batch,).
        rtol, atol: floats, or shaped like the state.
        norm: flat error in units of the tolerance -> shape () or (batch,); None: fixed steps, from stop to stop.
        max_steps: attempts allowed.
        lift: for gradients to times: (t, index of the stop it is, or -1) -> t as a tensor that depends on them.
    """

    start: Any
    stops: Any
    jumps: tuple[bool, ...]
    sign: Any
    rtol: Any = 0.0
    atol: Any = 0.0
    norm: Callable[[Tensor], Tensor] | None = None
    max_steps: int = 100_000
    lift: Callable[[Any, Any], Tensor] | None = None

    def inform(self, field: Field) -> None:
        """Tell the steps of a field how exactly to solve equations, and where the field ends or jumps."""
        field.tolerance = None if self.norm is None else (self.rtol, self.atol)
        field.norm, field.limits = self.norm, (self.rtol, self.atol)
        edges = [i for i, jumps in enumerate(self.jumps) if jumps] + [len(self.stops) - 1]
        field.edges = [self.stops[i] for i in edges] if isinstance(self.stops, list) else self.stops[edges]


def advance(
    field: Field, solver: Solver, control: PID, course: Course, y: Tensor, lanes: Lanes, probe: Probe | None = None
) -> Generator[Move, Reply | None, End]:
    """Yield every attempted step; a Reply may be sent back.

    Args:
        field, solver, control, course: what, how, at which steps, from where to where.
        y: the flat state.
        lanes: whether steps are chosen jointly or per sample.
        probe: (t0, y0, t1, y1, accepted) -> a 1-d tensor to be read together with the loop's own facts: `Move.tried`;
            in joint lanes it is called before the verdict, accepted = None and y1 the state tried.
    """
    where, no, adaptive = lanes.where, lanes.no, course.norm is not None
    stops, last_stop, sign = course.stops, len(course.stops) - 1, course.sign
    jumps = torch.tensor(course.jumps, device=y.device) if lanes.per_sample else course.jumps
    jumping = any(course.jumps)
    floor = FLOOR[clock(y.device)]
    never, zero = lanes.fill(0, course.start) != 0, lanes.fill(0, course.start)

    t, at, here = course.start, zero, zero - 1  # `at` is the stop ahead, `here` the one that t is, or -1
    course.inform(field)
    units = _units(course, y) if adaptive else None
    h, slope, status = _first_step(field, solver, control, course, lanes, y, units)
    u0 = course.lift(t, here) if course.lift else t
    carry = solver.init(field, u0, y, slope)
    counts = Counts(zero, zero, (zero + field.calls) * (status != Status.SUCCESS), zero, zero)
    memory = (lanes.fill(1.0, t), lanes.fill(1.0, t), never)
    read = torch.no_grad()(_read) if field.pure else _read
    size_of_y = y.detach().abs() if adaptive else y
    differentiable = field.pure and torch.is_grad_enabled() and adaptive
    solved: Any = None  # on fixed grids: whether all steps solved their equations, read at the end
    failures, behind = zero, never  # tries in a row that were not finite or not solved; whether t is a jump
    alive = bool((status == Status.RUNNING).any()) if lanes.per_sample else status == Status.RUNNING
    watched = lanes.per_sample or field.pure or not adaptive or course.lift or probe
    go_ahead = None if watched else getattr(solver, "ahead", None)
    tries, counting = 0, True  # `counting`: of samples on a fixed grid, those that met no event yet
    while alive and tries < course.max_steps:
        if go_ahead and field.until is not None and not behind:  # attempts that nobody looks at
            calls, stop = field.calls, stops[at]
            most, closes = course.max_steps - tries, not jumping and (field.until - stop) * sign >= 0
            went = go_ahead(field, control, Ahead(t, h, memory, y, carry), stop, closes, sign, most)
            if went:
                (t, h, memory, y, carry), made, passed = went
                tries, size_of_y = tries + made, y.abs()
                failures, here = (zero, zero - 1) if passed else (failures, here)
                steps, nfe = counts.steps + made, counts.nfe + field.calls - calls
                counts = counts._replace(steps=steps, accepted=counts.accepted + passed, nfe=nfe)
                if closes and t == stop:
                    status = Status.SUCCESS if at == last_stop else status
                    here, at, alive = at, min(at + 1, last_stop), at < last_stop
                    yield Move(t, t, t, t, y, y, True, Step(y, None, _unseen), [], counts, carry)
                if (closes and t == stop) or tries == course.max_steps:
                    continue
        tries += 1
        live = status == Status.RUNNING
        counted = live if lanes.per_sample else counting
        stop = lanes.pick(stops, at)
        left = (stop - t) * sign
        last = where(left <= control.max_step, h * STRETCH, h) >= left
        size = where(last, left, h)
        t1 = where(live, where(last, stop, t + h * sign), t)
        there = where(last & live, at, zero - 1)
        u0, u1 = (course.lift(t, here), course.lift(t1, there)) if course.lift else (t, t1)
        if jumping:
            ahead = last & lanes.pick(jumps, at)
            u0, u1 = _nudged(u0, u1, sign, behind, field), _nudged(u1, u0, -sign, ahead, field)
        calls = field.calls
        step = solver.step(field, u0, u1, y, carry)

        attempt = probe and (lambda y=y, t=t, t1=t1, y1=step.y1: probe(t, y, t1, y1, None))
        error, ok, tried, size_of_y1 = read(units, lanes, step, size_of_y, attempt)
        if not adaptive and step.ok is not None:
            solved = step.ok if solved is None else solved & step.ok
        fine = (error < math.inf) & ok
        accepted = live & fine & (error <= 1)
        if control.force:
            accepted = accepted | (live & fine & (size <= control.min_step))
        y0, y = y, lanes.merge(accepted, step.y1, y)
        if step.measured is None:
            size_of_y = lanes.merge(accepted, size_of_y1, size_of_y)
        carry0, carry = carry, lanes.merge(accepted, step.carry, carry if step.again is None else step.again)
        hit = accepted & last
        t0, t = t, where(accepted, t1, t)
        spent = field.calls - calls if step.nfe is None else step.nfe
        counts = Counts(
            counts.steps + counted,
            counts.accepted + (accepted & counted),
            counts.nfe + counted * spent,
            counts.jacobians + counted * step.jacobians,
            counts.iterations + counted * step.iterations,
        )
        if adaptive:
            factor, memory = control.factor(
                lanes, where(fine, error, lanes.fill(math.inf, error)), accepted, memory, solver.error_order
            )
            wanted = lanes.low(lanes.high(size * factor, control.min_step), control.max_step)
            # a step cut short by a stop says little about the next one
            h = where(hit & (wanted < h), h, wanted)
            failures = where(fine, zero, failures + 1)
            least = lanes.high(abs(t) * floor, control.min_step)
            stuck = no(accepted) & ((failures >= _TRIES) | (h < least) | (size <= control.min_step))
            cause = where(
                fine, zero + Status.MIN_STEP, where(ok, zero + Status.NON_FINITE, zero + Status.NEWTON_FAILED)
            )
            status = where(live & stuck, cause, status)
        status = where(hit & (at == last_stop), zero + Status.SUCCESS, status)
        behind = (hit & lanes.pick(jumps, at)) | (behind & no(accepted)) if jumping else never
        here, at = where(accepted, there, here), lanes.low(at + hit, last_stop)
        if lanes.per_sample:
            facts = [(status == Status.RUNNING).any()[None], (behind & hit).any()[None]]
            facts += [(live & no(fine)).any()[None]] if differentiable else []
            facts += [probe(t0, y0, t, y, accepted)] if probe else []
            alive, restart, *tried = torch.cat([fact.double() for fact in facts]).tolist()
            if differentiable and tried.pop(0):  # zero times the derivative of what is not finite is not zero
                again = solver.step(field, u0, where(fine, u1, u0), y0, carry0)
                y, carry = lanes.merge(accepted, again.y1, y0), lanes.merge(accepted, again.carry, carry0)
                step = again
        else:
            alive, restart = status == Status.RUNNING, behind and hit
        calls = field.calls
        reply = yield Move(t0, t1, u0, u1, y0, y, accepted, step, tried, counts, carry)
        reply = Reply() if reply is None else reply
        if field.calls > calls:  # for dense output
            counts = counts._replace(nfe=counts.nfe + (accepted & counted & reply.looked) * (field.calls - calls))
        counting = counting if reply.live is None else reply.live
        if reply.halt is not None:
            status = where(reply.halt, zero + Status.EVENT, status)
            alive = bool((status == Status.RUNNING).any()) if lanes.per_sample else status == Status.RUNNING
        if restart and alive:
            u0 = course.lift(t, here) if course.lift else t
            calls = field.calls
            carry = lanes.merge(behind & hit, solver.init(field, _nudged(u0, None, sign, behind, field), y), carry)
            counts = counts._replace(nfe=counts.nfe + (behind & hit) * (field.calls - calls))
    status = where(status == Status.RUNNING, zero + Status.MAX_STEPS, status)
    if not adaptive:
        status, t = _verdict(field, status, t, y, solved)
    return End(status, t, y, counts)


def _unseen(theta: Tensor) -> Tensor:
    raise AssertionError("dense output of attempts that nobody was to look at")


@torch.no_grad()
def _verdict(field: Field, status: Any, t: float, y: Tensor, solved: Tensor | None) -> tuple[Any, Any]:
    """Status and time at the end of fixed steps, (batch,) in per-sample mode: their only read-back.

    What is not finite stays so up to the end. torch.func's transforms can read nothing: there NaN is left to be seen.
    """
    if is_transformed(y):
        return status, t
    finite = torch.isfinite(y).flatten(field.layout.lead).all(-1)
    if solved is not None:
        finite = torch.stack([finite, solved.expand_as(finite)])
    flags = finite.tolist()
    unsolved, broken = Status.NEWTON_FAILED, Status.NON_FINITE
    if not field.layout.per_sample:
        fine, ok = (flags, True) if solved is None else flags
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


def _units(course: Course, y: Tensor) -> _Units:
    atol, rtol, norm = course.atol, course.rtol, course.norm
    assert norm is not None
    if isinstance(norm, RMS):
        root = math.sqrt(norm.count)
        atol, rtol, norm = atol * root, rtol * root, torch.linalg.vector_norm if norm.dim is None else norm.root
    if not isinstance(atol, Tensor):
        atol = torch.scalar_tensor(atol, dtype=y.dtype.to_real(), device=y.device)
    return _Units(atol, rtol, norm)


def _read(
    units: _Units | None, lanes: Lanes, step: Step, before: Tensor, probe: Callable[[], Tensor] | None
) -> tuple[Any, Any, list[float], Tensor]:
    """The error in units of the tolerance, whether the step was solved, what was probed: one read-back; |y1|."""
    after, error = before, None
    if step.measured is not None:
        error = step.measured.detach()
    elif units is not None and step.error is not None:
        after = step.y1.abs()
        error = units.norm(step.error / units.scale(torch.maximum(before, after)))
        if not lanes.per_sample and step.ok is None and probe is None:
            return error.item(), True, [], after
    elif lanes.per_sample:
        error = torch.zeros((), device=before.device)
    if lanes.per_sample:
        assert error is not None
        return error.to(clock(error.device)), (error == error) | True if step.ok is None else step.ok, [], after
    facts = [] if error is None else [error]
    facts += [step.ok] if step.ok is not None and error is not None else []
    if not facts and probe is None:
        return 0.0, True, [], after
    if len(facts) == 1 and probe is None:
        return facts[0].item(), True, [], after
    flat = [fact.double().reshape(1) for fact in facts] + ([probe().double()] if probe else [])
    values = torch.cat(flat).tolist()
    first = 0.0 if error is None else values[0]
    return first, len(facts) < 2 or bool(values[1]), values[len(facts) :], after


def _first_step(
    field: Field, solver: Solver, control: PID, course: Course, lanes: Lanes, y: Tensor, units: "_Units | None"
) -> tuple[Any, Tensor | None, Any]:
    """The size of the first step, f(t0, y0) if it was needed, and the status: NON_FINITE where f is, SUCCESS where
    there is no way to go.

    Hairer, Norsett & Wanner 1993, II.4, in units of time in which something happens: 1, or, where it is above 10^4, the
    time that f takes to change the state by its size. Slopes are measured in units of the largest one, so that no
    number overflows that f can return.
    """
    zero = lanes.fill(0, course.start)
    status = lanes.where(course.stops[-1] == course.start, zero + Status.SUCCESS, zero + Status.RUNNING)
    arrived = not lanes.per_sample and status == Status.SUCCESS
    if units is None or control.first_step is not None or arrived:
        return lanes.fill(control.first_step or math.inf, course.start), None, status
    t = course.lift(course.start, zero - 1) if course.lift else course.start
    slope = field(field.time(t), y).clone()  # fields may use one buffer for all their results
    with torch.no_grad():
        here, f = y.detach(), slope.detach()
        scale, norm = units.scale(here.abs()), units.norm
        largest = (f.abs().amax(-1) if lanes.per_sample else f.abs().amax()).to(scale.dtype)
        largest = torch.where((largest > 0) & (largest < math.inf), largest, 1.0)
        unit = largest[:, None] if lanes.per_sample else largest
        d0, d1, most = _host(lanes, norm(here / scale), norm(f / unit / scale), largest)
        finite = (d0 < math.inf) & (d1 < math.inf)
        status = lanes.where(finite | (status == Status.SUCCESS), status, zero + Status.NON_FINITE)
        span = abs(course.stops[-1] - course.start)
        slow = lanes.high(d0, 1.0) / lanes.high(d1, 1e-300) / most
        slow = lanes.where(slow < span, slow, span)
        unit_of_time = lanes.where(slow > 1e4, slow, lanes.fill(1.0, d0))
        most = most * unit_of_time
        small = (d0 < 1e-5) | (d1 * most < 1e-5)
        h = lanes.where(small, lanes.fill(1e-6, d0), 0.01 * d0 / lanes.high(d1, 1e-300) / most) * unit_of_time
        h = lanes.low(lanes.high(lanes.low(h, control.max_step), _LEAST), math.inf)
        room = abs(lanes.pick(course.stops, zero) - course.start)
        h = lanes.where(h < room, h, room)
        moved = course.start + h * course.sign
        far = column(h * course.sign, y)
        ahead = here + f * far if isinstance(far, Tensor) else torch.add(here, f, alpha=far)
        (d2,) = _host(lanes, norm((field(field.time(moved), ahead) / unit - f / unit) / scale))
        h, d2 = h / unit_of_time, d2 * unit_of_time / lanes.high(h, _LEAST)
        steepest = lanes.where(d1 > d2, d1, d2)
        flat = steepest * most <= 1e-15
        h1 = lanes.where(
            flat, lanes.high(h * 1e-3, 1e-6), (0.01 / lanes.high(steepest, 1e-300) / most) ** (1 / solver.error_order)
        )
        h1 = lanes.where(h1 < 100 * h, h1, 100 * h)
        h1 = lanes.where(h1 == h1, h1, h) * unit_of_time
        h1 = lanes.high(h1, lanes.high(abs(course.start) * FLOOR[clock(y.device)], control.min_step))
        return lanes.low(h1, control.max_step), slope, status


def _host(lanes: Lanes, *values: Tensor) -> list[Any]:
    """Values as the lanes have them: read, or left on the device in the clock's dtype."""
    if lanes.per_sample:
        return [value.to(clock(value.device)) for value in values]
    return torch.stack(values).tolist() if len(values) != 1 else [values[0].item()]


def _nudged(t: Any, other: Any, sign: Any, condition: Any, field: Field) -> Any:
    """t, moved to the next representable value in the direction of `sign` where the condition holds."""
    real = field.layout.real
    if isinstance(t, Tensor):
        towards = torch.as_tensor(sign * math.inf, dtype=real, device=t.device)
        moved = torch.nextafter(t.detach().to(real), towards.expand_as(t)).to(t.dtype) - t.detach()
        return t + torch.where(torch.as_tensor(condition, device=t.device), moved, torch.zeros_like(moved))
    kind = np.float32 if real == torch.float32 else np.float64
    return float(np.nextafter(kind(t), kind(sign * math.inf))) if condition else t
