"""Events: zeros of functions along a solution, found on the dense output of the step that crosses them.

Every component of every condition keeps its side, the sign it had last; a step crosses it where the sign at its end is
another. The signs are compared on the device and read with the loop's own facts (`Watch.probe`), the crossing is
located by Chandrupatla's method (1997) on theta in [0, 1], in all samples at once.

A condition that is zero at the start, to rounding, has the side that the flow takes it to: the sign of
g_t + g_y f. So a solve that goes on from an event does not meet it again. Where that is zero as well the state rests on
its event, and the event is met where the condition leaves zero: a ball at rest does not fall through the ground.

A condition that is NaN at the end of a step, or on the way to its zero, ends the solve as NON_FINITE where it turns so,
unless a terminal event comes before. NaN within a step that both ends do not show is not seen: limit max_step.

Work is bounded: the attempts by max_steps, each crossing by 200 evaluations of its condition.

With G(theta, p) = g(t(theta), y(theta; p)), the implicit function theorem gives d theta / dp = -G_p / G_theta. Two
Newton steps from the root, recorded, have this derivative and the right second one, for whatever p the condition, the
state and the ends of the step depend on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode.errors import UsageError
from pfode.ode.records import Attempt, End, Reply, Status
from pfode.ode.solver import clock
from pfode.ode.state import Field, Tree, changed, unchanged, versions

__all__ = ["Event", "Events", "Hits", "Watch", "chandrupatla"]

_ULPS = 64  # a condition counts as zero at the start within this rounding of its arguments
_NEWTON = 2


@dataclass(frozen=True)
class Event:
    """A zero to look for.

    Args:
        condition: (t, y, *args) -> a real tensor, of shape () or (k,) in joint mode, (batch,) or (batch, k) in
            per-sample mode; a change of sign of any component is met. A step that crosses it twice does not see it:
            limit max_step.
        terminal: whether it ends the solve, in per-sample mode that of its sample.
        direction: 1 for zeros that the condition passes rising (in the direction of the solve), -1 falling, 0 for both.
        gradient: whether its time has a gradient. Without, it is a constant at which the state is differentiated.

    Raises:
        UsageError: no function, or another direction.
    """

    condition: Callable[..., Tensor]
    terminal: bool = True
    direction: int = 0
    gradient: bool = True

    def __post_init__(self) -> None:
        if not callable(self.condition):
            raise UsageError(f"events: need a function (t, y, *args), got {type(self.condition).__name__}")
        if self.direction not in (-1, 0, 1):
            raise UsageError(f"direction: need -1, 0 or 1, got {self.direction!r}")


class Hits(NamedTuple):
    """Where a solution met an event, in the order of the solve.

    Fields:
        t: times, shape (hits,), or (hits, batch) in per-sample mode, NaN where a sample had fewer.
        y: the states there, a tree like y0 with the hits first.
    """

    t: Tensor
    y: Tree


Events = Event | Callable[..., Tensor] | Sequence[Event | Callable[..., Tensor]]


class Watch:
    """The events of one solve.

    Args:
        events: what to look for; functions are terminal events.
        field: its field.
        sign: its direction, a float or shape (batch,).
        t, y: its start, as the field takes it.
        cast: what keeps a condition inside of the caller's torch.autocast, None where that is off.
    """

    def __init__(
        self, events: Events, field: Field, sign: Any, t: Any, y: Tensor, cast: Callable[..., Any] | None = None
    ):
        listed = list(events) if isinstance(events, Sequence) else [events]
        self.events = [event if isinstance(event, Event) else Event(event) for event in listed]
        if not self.events:
            raise UsageError("events: need at least one", "events=None")
        self.conditions = [e.condition if cast is None else cast(e.condition) for e in self.events]
        self.field, self.sign, self.batched = field, sign, field.layout.per_sample
        kind: dict[str, Any] = {"dtype": clock(y.device), "device": y.device}
        with torch.no_grad(), unchanged("a condition of events", (y,)):
            parts = [self._condition(i, t, y) for i in range(len(self.events))]
        self.parts = [(i, j) for i, part in enumerate(parts) for j in range(len(part))]  # event and component
        self.before = torch.cat(parts)
        directions = torch.tensor([self.events[i].direction for i, _ in self.parts], device=y.device)
        self.direction = directions[:, None] if self.batched else directions
        self.resting = torch.zeros_like(self.before, dtype=torch.bool)
        self.side = self._first_sides(t, y)
        shape = self.before.shape[1:]
        self.ended = torch.zeros(shape, dtype=torch.bool, device=y.device)
        self.failed = self.ended  # at a condition that is NaN
        self.which = torch.full(shape, -1, dtype=torch.int64, device=y.device)
        self.t, self.y = torch.full(shape, math.nan, **kind), y
        self.hits: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in self.events]

    def _condition(self, index: int, t: Any, y: Tensor) -> Tensor:
        """The components of an event at a flat state, (k,) or (k, batch), in the clock's dtype."""
        field, counts = self.field, versions((y,))
        value = self.conditions[index](field.time(t), field.layout.tree(y), *field.args)
        if versions((y,)) != counts:
            raise changed("a condition of events")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"events: a condition must return a real tensor, got {got}")
        need = "() or (k,)" if not self.batched else "(batch,) or (batch, k)"
        if value.ndim - self.batched not in (0, 1) or (self.batched and len(value) != field.layout.batch):
            raise UsageError(f"events: a condition must have shape {need}, got {tuple(value.shape)}")
        value = value.to(clock(y.device))
        return (value[:, None] if value.ndim == 1 else value).T if self.batched else value.reshape(-1)

    def _first_sides(self, t: Any, y: Tensor) -> Tensor:
        """Signs at the start; of a zero the sign that it is about to have."""
        field, sides = self.field, self.before.sign()
        time = field.time(t).detach()
        real = y.detach()
        scale = real.abs().amax(-1) if real.numel() else real.abs().sum(-1)
        slope = None
        for row, (i, j) in enumerate(self.parts):
            with torch.enable_grad():
                at, state = time.clone().requires_grad_(), real.clone().requires_grad_()
                value = self._condition(i, at, state)[j]
                g_t, g_y = _gradient(value.sum(), at), _gradient(value.sum(), state)
            with torch.no_grad():
                room = g_y.abs().sum(-1) * scale + (g_t * time).abs()
                near = self.before[row].abs() <= _ULPS * torch.finfo(field.layout.real).eps * room
                if not near.any():
                    continue
                if slope is None:
                    slope = field(field.time(t), y.detach())
                ahead = ((g_y.conj() * slope).real.sum(-1) + g_t) * self.sign
                sides[row] = torch.where(near, ahead.sign().to(sides.dtype), sides[row])
                self.resting[row] = near & (ahead == 0)
        return sides

    @torch.no_grad()
    def probe(self, t0: Any, y0: Tensor, t1: Any, y1: Tensor, accepted: Any) -> Tensor:
        """In how many samples a step crosses each component, or makes it NaN, shape (components,)."""
        self.after = torch.cat([self._condition(i, t1, y1) for i in range(len(self.events))])
        crossed = (self._crosses(self.after) | self.after.isnan() | self.before.isnan()) & ~self.ended
        self.crossed = crossed if accepted is None else crossed & accepted
        return (self.crossed.sum(1) if self.batched else self.crossed).double()

    def _crosses(self, value: Tensor, row: Any = slice(None)) -> Tensor:
        """Whether components that have a value now were on another side before, in the direction that is met."""
        side, direction, sign = self.side[row], self.direction[row], value.sign()
        left = self.resting[row] & (sign != 0) & ((direction == 0) | (direction == sign))
        return left | (side != 0) & (side * sign <= 0) & ((direction == 0) | (direction == -side))

    def add(self, attempt: Attempt, counts: list[float]) -> Reply:
        """Locate what an attempted step crossed."""
        if not isinstance(attempt.accepted, Tensor) and not attempt.accepted:
            return Reply()
        crossed = self.crossed
        rows = [row for row, count in enumerate(counts) if count]
        if rows:
            attempt.step.dense(torch.full_like(self.t, 0.5)[None])  # what it evaluates once, it does with gradients
        found = {row: self._locate(row, attempt) for row in rows}
        with torch.no_grad():
            stop = torch.full_like(self.t, math.inf)
            which, failed = torch.full_like(self.which, -1), torch.zeros_like(self.failed)
            for row, (theta, crosses, edge, lost) in found.items():
                if self.events[self.parts[row][0]].terminal:
                    earlier = crosses & (theta < stop)
                    stop, which = torch.where(earlier, theta, stop), torch.where(earlier, row, which)
                    failed = failed & ~earlier
                earlier = lost & (edge < stop)
                stop, which = torch.where(earlier, edge, stop), torch.where(earlier, row, which)
                failed = failed | earlier
            ends = stop < math.inf
            self.which, self.failed = torch.where(ends, which, self.which), self.failed | failed
        for row, (theta, crosses, _, _) in found.items():
            valid = crosses & (theta <= stop)
            t, y = self._point(row, attempt, torch.where(valid, theta, 0.5), valid)
            self.hits[self.parts[row][0]].append((t, y, valid))
            now = valid & ends & (which == row)
            self.t, self.y = torch.where(now, t, self.t), torch.where(now[..., None], y, self.y)
        if rows and bool(failed.any()):
            t, y = _at(attempt, torch.where(failed, stop, 0.5))
            self.t, self.y = torch.where(failed, t, self.t), torch.where(failed[..., None], y, self.y)
        moved = attempt.accepted if isinstance(attempt.accepted, Tensor) else torch.ones_like(self.ended)
        self.before, self.side = (
            torch.where(moved, self.after, self.before),
            torch.where(moved & (self.after == self.after), self.after.sign(), self.side),
        )
        self.resting = self.resting & (self.side == 0)
        if not rows or not bool(crossed.any()):
            return Reply(looked=False)
        self.ended = self.ended | ends
        looked = crossed.any(0) if self.batched else True
        if isinstance(attempt.accepted, Tensor):
            return Reply(ends, looked)
        # on a fixed grid samples end together
        return Reply(bool(self.ended.all()) or None, looked, ~self.ended if self.batched else None)

    @torch.no_grad()
    def _locate(self, row: int, attempt: Attempt) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """theta of the crossing and in which samples there is one; theta from which on the condition is NaN, and in
        which it is."""
        i, j = self.parts[row]
        seen, side = self.crossed[row], self.side[row]

        def g(theta: Tensor) -> Tensor:
            t, y = _at(attempt, theta)
            return self._condition(i, t, y)[j]

        low, at_low = torch.zeros_like(self.t), self.before[row]
        high, at_high = torch.ones_like(low), self.after[row]
        lost = seen & (at_low.isnan() | at_high.isnan())
        if lost.any():  # the last time at which it is a number
            known, high = self._boundary(lambda theta: ~g(theta).isnan(), lost), torch.where(lost, 0.0, high)
            high = torch.where(lost & ~at_low.isnan(), known, high)
            at_high = torch.where(lost, g(high), at_high)
        crossed = seen & self._crosses(at_high, row)
        resting = crossed & self.resting[row]
        left = self._boundary(lambda theta: g(theta).abs() <= self.before[row].abs(), resting) if resting.any() else low
        searched = crossed & ~resting
        for halvings in range(1, 50):  # a side that the flow was to take begins after the start
            late = searched & (at_low.sign() != side)
            if not late.any():
                break
            low = torch.where(late, 0.5**halvings, low)
            at_low = torch.where(late, g(low), at_low)
        late = searched & (at_low.sign() != side)  # it was there for less than that: the event is at the start
        hole = torch.full_like(low, math.inf)  # where the condition turned out to be NaN

        def seen_g(theta: Tensor) -> Tensor:
            value = g(theta)
            hole.copy_(torch.where(value.isnan() & (theta < hole), theta, hole))
            return value

        theta = chandrupatla(seen_g, low, high, at_low, at_high, searched & ~late)
        wrong = searched & ~late & (hole < math.inf)
        theta = torch.where(resting, left, torch.where(late, low, torch.where(wrong, hole, theta)))
        return theta, crossed & ~wrong, torch.where(wrong, theta, high), lost | wrong

    def _boundary(self, holds: Callable[[Tensor], Tensor], where: Tensor) -> Tensor:
        """The last theta of a step up to which something holds that holds at its start; by bisection, 0 elsewhere."""
        low = torch.zeros_like(self.t)
        high = torch.ones_like(low)
        for _ in range(60):
            middle = (low + high) / 2
            inside = where & holds(middle)
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        return low

    def _point(self, row: int, attempt: Attempt, theta: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The time and the state at theta; with gradients if anything has them."""
        i, j = self.parts[row]
        t, y = _at(attempt, theta)
        if not (self.field.context.pure and torch.is_grad_enabled()):
            return t, y
        if not self.events[i].gradient:
            span = attempt.u1 - attempt.u0
            theta = (t.detach() - attempt.u0) / (
                torch.where(span == 0, 1.0, span) if isinstance(span, Tensor) else span
            )
            return t.detach(), attempt.step.dense(theta[None])[0]
        if not (t.requires_grad or y.requires_grad or self._condition(i, t, y)[j].requires_grad):
            return t, y
        theta = theta.detach().requires_grad_()
        for _ in range(_NEWTON):
            g = self._condition(i, *_at(attempt, theta))[j]
            slope = torch.where(valid, _gradient(g.sum(), theta, create_graph=True), 1.0)
            slope = torch.where(slope == 0, math.inf, slope)  # a time that does not move with the state
            theta = theta - torch.where(valid, g, 0.0) / slope
        return _at(attempt, theta)

    def cut(self, ts: Tensor, ys: Tensor) -> Tensor:
        """States at the output times, NaN after the event that ended the solve."""
        t = self.t.detach()
        times = ts if ts.ndim > t.ndim else ts[:, None]
        beyond = (times - t) * self.sign > 0
        return torch.where(beyond[..., None], math.nan, ys) if bool(beyond.any()) else ys

    def end(self, end: End) -> End:
        """The end of the solve: at the events where there were any."""
        if not bool(self.ended.any()):
            return end
        y = torch.where(self.ended[..., None], self.y, end.y)
        note = ""
        if bool(self.failed.any()):
            rows = self.which[self.failed].reshape(-1).tolist()
            note = f"a condition is NaN, component {self.parts[rows[0]][1]} of events[{self.parts[rows[0]][0]}]"
        if not self.batched:
            status = Status.NON_FINITE if note else Status.EVENT
            return end._replace(status=status, t=float(self.t.detach()), y=y, note=note)
        met = torch.where(self.failed, int(Status.NON_FINITE), int(Status.EVENT))
        status, t = torch.where(self.ended, met, end.status), torch.where(self.ended, self.t.detach(), end.t)
        return end._replace(status=status, t=t, y=y, note=note)

    def result(self) -> tuple[Hits, ...]:
        """The hits of every event."""
        return tuple(self._sorted(hits) for hits in self.hits)

    def _sorted(self, hits: list[tuple[Tensor, Tensor, Tensor]]) -> Hits:
        tree = self.field.layout.tree
        if not hits:
            empty = self.t.new_empty((0, *self.t.shape))
            return Hits(empty, tree(self.y.detach().new_empty((0, *self.y.shape)), cast=False))
        t, y, valid = (torch.stack(part) for part in zip(*hits, strict=True))
        t = torch.where(valid, t, math.nan)
        order = (t.detach() * self.sign).argsort(dim=0, stable=True)[: int(valid.sum(0).max())]
        y = torch.where(valid[..., None], y, math.nan)
        return Hits(t.gather(0, order), tree(y.gather(0, order[..., None].expand(*order.shape, y.shape[-1])), False))


def chandrupatla(
    g: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, at_a: Tensor, at_b: Tensor, where: Tensor
) -> Tensor:
    """Zeros of g between a and b, elementwise, where its signs there differ (`where`); b elsewhere.

    Inverse quadratic interpolation where it is safe, else bisection: T. R. Chandrupatla, "A new hybrid
    quadratic/bisection algorithm for finding the zero of a nonlinear function without using derivatives" (1997).
    """
    eps = torch.finfo(a.dtype).eps
    first = a
    a, b, at_a, at_b = b, a, at_b, at_a  # a is the newest point, b the other end of the bracket
    part = torch.full_like(a, 0.5)
    done = ~where | (at_a == 0)
    best = a
    for _ in range(100):
        if bool(done.all()):
            break
        x = torch.where(done, a, a + part * (b - a))
        at_x = torch.where(done, at_a, g(x))
        same = at_x.sign() == at_a.sign()
        c, at_c = torch.where(same, a, b), torch.where(same, at_a, at_b)
        b, at_b = torch.where(same, b, a), torch.where(same, at_b, at_a)
        a, at_a = x, at_x
        best = torch.where(done, best, torch.where(at_a.abs() < at_b.abs(), a, b))
        least = (2 * eps * best.abs() + eps * first.abs() + torch.finfo(a.dtype).tiny) / (b - a).abs()
        done = done | (at_a == 0) | ~(least <= 0.5)
        xi, phi = (a - b) / (c - b), (at_a - at_b) / (at_c - at_b)
        smooth = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi)
        inverse = at_a / (at_b - at_a) * at_c / (at_b - at_c)
        inverse = inverse + (c - a) / (b - a) * at_a / (at_c - at_a) * at_b / (at_c - at_b)
        part = torch.where(smooth, inverse, 0.5)
        part = torch.where(part < least, least, torch.where(part > 1 - least, 1 - least, part))
    return best


def _at(attempt: Attempt, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Time and flat state at theta of a step, shape () or (batch,)."""
    return attempt.u0 + theta * (attempt.u1 - attempt.u0), attempt.step.dense(theta[None])[0]


def _gradient(value: Tensor, of: Tensor, create_graph: bool = False) -> Tensor:
    """d value / d of, zero where it does not depend on it."""
    if not value.requires_grad:
        return torch.zeros_like(of)
    (found,) = torch.autograd.grad(value, of, create_graph=create_graph, retain_graph=True, allow_unused=True)
    return torch.zeros_like(of) if found is None else found
