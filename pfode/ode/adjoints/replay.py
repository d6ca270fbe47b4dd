"""Exact gradients by taking the accepted steps again: `Checkpoint` and `Reversible`.

A leg is an accepted step, (t0, t1) as the solver got them; with the state and the carry at its start it can be taken
again, to the same numbers. Going back, legs are taken again in chunks with their graph, and the gradients of state,
carry, times and parameters are pulled through each chunk.

Checkpoint keeps the graphs of the first legs while they are small, and the state at every k-th leg after these.
Without a cap k doubles whenever 64 k states are kept: sqrt(n) of them for n legs; the k legs in between, or 4, make
one chunk, so that nothing is evaluated more than once again. With a cap on memory k doubles whenever half of it is
used; the other half serves to go back through the k legs by binomial checkpoints (Griewank & Walther 2000), with the
graph of one leg at a time.

Reversible keeps the last state and computes those before it backwards, `solver.back`. Rounding errors grow on the way
where the solution forgets its past; at anchors, every `every` legs and at the start, what came out is compared with
what was there.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode._torch import keeps_graph
from pfode.errors import NumericalError, UsageError, integer, number
from pfode.ode.adjoints.adjoint import (
    Behind,
    Cotangents,
    Inputs,
    Problem,
    Tape,
    Work,
    again,
    behind,
    mark,
    refuse_unknown,
    weight,
)
from pfode.ode.loop import Counts, End, Move
from pfode.ode.outputs import JointOutputs, PerSampleOutputs, outputs
from pfode.ode.solver import Step
from pfode.ode.state import Field, leaves, rebuild, without_graph

_FREE = 64  # states kept before legs are left out, about what the graph of one leg takes; also graphs kept at most
_TOGETHER = 4  # legs that make one chunk at least: one by one they take a tenth longer


class Leg(NamedTuple):
    """An accepted step.

    Fields:
        t0, t1, u0, u1: as in Move; of samples whose step was not accepted u1 = u0.
        accepted: shape (batch,), or None in joint lanes.
        fresh: whether the carry is made anew at its start: the first one, and beyond jumps; or shape (batch,).
        passed: output times that it passed, at most over the samples.
        node: further output times that it began at or before, joint lanes only.
    """

    t0: Any
    t1: Any
    u0: Any
    u1: Any
    accepted: Tensor | None
    fresh: Any
    passed: int
    node: int


class State(NamedTuple):
    """Where a leg begins: the flat state and the solver's carry."""

    y: Tensor
    carry: Any


@dataclass(frozen=True)
class Checkpoint:
    """Take the accepted steps again, from states kept on the way.

    The gradient is that of the numbers computed, and as far off as they are: a method of higher order ("vern7") leaves
    a tenth of that at 1e-5 for two fifths more time, and at tolerances near the rounding of float32 a float64 state,
    cast for the field, leaves half (benchmarks/ode_gradient.py).

    Args:
        graphs: bytes that the graphs of the first 64 steps may take: as many of these as they hold are not taken again.
            None are kept with a cap on memory, per sample, and with gradients to times.
        memory: bytes that the kept states (and carries) may take, forwards and backwards; the graph of one step and the
            times of the steps come on top. None: of n steps about 8 sqrt(n) states, every one while n <= 64, the graphs
            of 4 steps, and `graphs`.

    Raises:
        UsageError: no positive whole number.
    """

    memory: int | None = None
    graphs: int = 2**24
    pure = False

    def __post_init__(self) -> None:
        integer("graphs", self.graphs, 0)
        if self.memory is not None:
            integer("memory", self.memory, 1)

    def tape(self, problem: Problem) -> "CheckpointTape":
        return CheckpointTape(problem, self.memory, self.graphs if self.memory is None else 0)


@dataclass(frozen=True)
class Reversible:
    """Compute the states backwards too: exact up to rounding, memory that does not grow with the steps.

    Args:
        every: keep a state every so many steps, to begin anew from; None: none but the first and the last.
        tolerance: allowed difference between a state that was kept and what came out, relative to its size, in units of
            the square root of the dtype's rounding.

    Raises:
        UsageError: no positive numbers; a solver that cannot go back.
    """

    every: int | None = None
    tolerance: float = 1.0
    pure = False

    def __post_init__(self) -> None:
        if self.every is not None:
            integer("every", self.every, 1)
        number("tolerance", self.tolerance, 0.0)

    def tape(self, problem: Problem) -> "ReversibleTape":
        if problem.lanes.per_sample and any(problem.course.jumps):
            raise UsageError('adjoint="reversible": cannot go back over jumps in per-sample mode', 'batch="joint"')
        if not hasattr(problem.solver, "back"):
            raise UsageError(
                f'adjoint="reversible": {problem.solver.name} cannot be stepped backwards exactly',
                'method="reversible-heun", or adjoint="checkpoint"',
            )
        return ReversibleTape(problem, self)


class _Tape(Tape):
    """The legs of a solve, and how they are taken again."""

    def __init__(self, problem: Problem):
        self.legs: list[Leg] = []
        self.lanes, self.start = problem.lanes, State(problem.y, None)
        course = problem.course
        jumps = [stop for stop, jump in zip(course.stops, course.jumps, strict=False) if jump]
        self.jumps: Any = torch.stack(jumps) if jumps and self.lanes.per_sample else jumps
        self.fresh: Any = True
        self.first = problem.ts == problem.ts[0]  # outputs at the start: (times,) or (times, batch)
        self.done = int(self.first.sum()) if self.first.ndim == 1 else 1

    def add(self, move: Move, passed: int) -> None:
        if not self.lanes.per_sample and not move.accepted:
            return
        accepted = move.accepted if self.lanes.per_sample else None
        u1 = move.u1 if accepted is None else torch.where(accepted, move.u1, move.u0)
        t1 = move.t1 if accepted is None else torch.where(accepted, move.t1, move.t0)
        self.legs.append(Leg(move.t0, t1, move.u0, u1, accepted, self.fresh, passed, self.done))
        self.done += passed
        if accepted is None:
            self.fresh = move.t1 in self.jumps
        else:
            self.fresh = accepted & torch.isin(move.t1, self.jumps) if len(self.jumps) else False
        self.reached(State(move.y, move.carry))

    def reached(self, state: State) -> None:
        """Keep what is wanted of the state after the newest leg."""
        raise NotImplementedError


class _Again:
    """A field to take the legs of a tape again with: in place, and with graphs that begin at the inputs."""

    def __init__(self, tape: _Tape, problem: Problem, inputs: Inputs):
        self.tape, self.problem, self.inputs = tape, problem, inputs
        self.lanes, self.solver = problem.lanes, problem.solver
        self.quick = again(problem, inputs.args, pure=False)
        self.exact = again(problem, inputs.args, pure=True)
        with torch.enable_grad():
            self.out = outputs(inputs.ts, problem.course.sign, problem.lanes, problem.field.layout.batch)

    def take(self, field: Field, leg: Leg, state: State) -> tuple[Leg, Step, State]:
        """Take a leg again: the leg with its times lifted, the step, the state after it."""
        if self.inputs.ts.requires_grad and torch.is_grad_enabled():
            lifted = {"u0": lift(self.inputs.ts, leg.t0) + (leg.u0 - leg.t0)}
            lifted["u1"] = lift(self.inputs.ts, leg.t1) + (leg.u1 - leg.t1)
            leg = leg._replace(**lifted)
        y, carry = state
        if leg.fresh is not False:
            fresh = self.solver.init(field, leg.u0, y)
            carry = fresh if leg.fresh is True else self.lanes.merge(leg.fresh, fresh, carry)
        step = self.solver.step(field, leg.u0, leg.u1, y, carry)
        if leg.accepted is None:
            return leg, step, State(step.y1, step.carry)
        after = State(self.lanes.merge(leg.accepted, step.y1, y), self.lanes.merge(leg.accepted, step.carry, carry))
        return leg, step, after

    def forth(self, first: int, last: int, state: State) -> State:
        """The state after some legs, without gradients."""
        for leg in self.tape.legs[first:last]:
            state = self.take(self.quick, leg, state)[2]
        return state

    def chunk(self, legs: list[Leg], state: State) -> State:
        """The state after some legs, with graphs; output times that they pass go to `out`."""
        out = self.out
        for leg in legs:
            lifted, step, after = self.take(self.exact, leg, state)
            if leg.passed:
                accepted = True if leg.accepted is None else leg.accepted
                counts = Counts(0, 0, 0, 0, 0)
                out_of = (leg.t0, leg.t1, lifted.u0, lifted.u1, state.y, after.y)
                move = Move(*out_of, accepted, step, [], counts)
                out.add(move, leg.passed) if isinstance(out, PerSampleOutputs) else out.add(move)
            state = after
        return state


class _Back(_Again):
    """One backward pass: the gradients so far."""

    def __init__(self, tape: _Tape, problem: Problem, inputs: Inputs, given: Cotangents, work: Work):
        super().__init__(tape, problem, inputs)
        self.given, self.work = given, work
        self.slope_y, self.slope_carry = given.end, list[Tensor | None]()
        self.leaves = [t for t in (inputs.ts, *inputs.tensors) if t.requires_grad]
        self.made: list[Tensor | None] = [None] * len(self.leaves)
        self.checked = False
        self.wrong: Tensor | None = None  # on the device, read once

    def pull(self, first: int, last: int, state: State, after: Tensor | None = None) -> None:
        """Pull the gradients through some legs, that begin at `state` and had led to `after`, where that is known."""
        legs = self.tape.legs[first:last]
        y = state.y.detach().requires_grad_()
        parts = [] if state.carry is None or legs[0].fresh is True else list(leaves(state.carry))
        parts = [_leaf(p) for p in parts]
        self._rewind(legs[0])
        with torch.enable_grad():
            end = self.chunk(legs, State(y, rebuild(state.carry, iter(parts)) if parts else None))
            shown = self._shown(legs[0])
        if after is not None:
            self._compare(state.y, end.y.detach(), after)
        wanted = [p for p in parts if _wanted(p)]
        slopes = iter(self._through(end, shown, [y, *wanted], self.leaves))
        self.slope_y = _or_zeros(next(slopes), y)
        self.slope_carry = [next(slopes) if _wanted(p) else None for p in parts]
        self.work.steps += len(legs)

    def _compare(self, y0: Tensor, y1: Tensor, before: Tensor) -> None:
        """Remember whether legs came out other than before, by more than rounding and what the solve allows."""
        course, eps = self.problem.course, torch.finfo(y1.real.dtype).eps
        allowed = 0.01 * (before - y0).abs().amax() + 100 * eps * before.abs().amax()
        if course.norm is not None:
            allowed = allowed + course.rtol * before.abs() + course.atol
        wrong = ((y1 - before).abs() > allowed).any()
        self.wrong = wrong if self.wrong is None else self.wrong | wrong

    def recorded(self, kept: "Recording", ys: Tensor, y: Tensor, args: tuple[Any, ...]) -> None:
        """Pull the gradients through the steps whose graphs were kept, from output states back to y and args."""
        assert kept.state
        own = {id(a): b for a, b in zip(leaves(self.inputs.args), leaves(args), strict=True)}
        into = [own.get(id(t), t) for t in self.leaves]
        last = leaves(tuple(kept.before)) if kept.before else ()
        keep = keeps_graph()
        first = [y] if y.requires_grad else []
        with torch.enable_grad():
            shown = [(ys[self.tape.first.sum() :], self.given.ys[self.tape.first.sum() :])]
        slopes = self._through(kept.state, shown, first, into, last, keep)
        self.slope_y = _or_zeros(slopes[0] if slopes else None, y)
        self.work.steps += kept.steps

    def _through(
        self,
        end: State,
        shown: list[tuple[Any, Any]],
        first: list[Tensor],
        into: list[Tensor],
        until: Iterable[Any] = (),
        keep: bool = False,
    ) -> Sequence[Tensor | None]:
        """Pull the gradients through a graph: those of `first` are returned, those of `into` added to the others.

        Args:
            end: the state and carry where it ends; shown: output states and the gradients given for them.
            until: how far unknown leaves are looked for; keep: the graph is wanted again.
        """
        pairs: list[tuple[Any, Tensor | None]] = [(end.y, self.slope_y), *shown]
        if self.slope_carry:
            pairs += zip(leaves(end.carry), self.slope_carry, strict=True)
        pairs = [(value, slope) for value, slope in pairs if slope is not None and _wanted(value)]
        whole = [*first, *into]
        if not self.checked and self.inputs.searched:
            refuse_unknown((value for value, _ in pairs), whole, until)
            self.checked = True
        made: Any = [None] * len(whole)
        if pairs and whole:
            values, slopes = zip(*pairs, strict=True)
            made = torch.autograd.grad(
                values, whole, slopes, retain_graph=keep or self.inputs.shared, allow_unused=True
            )
        rest = made[len(first) :]
        self.made = [
            new if old is None else old if new is None else old + new for old, new in zip(self.made, rest, strict=True)
        ]
        return made[: len(first)]

    def _rewind(self, leg: Leg) -> None:
        """Set `out` to where it was at the start of a leg."""
        out = self.out
        out.blocks = []
        if isinstance(out, JointOutputs):
            out.done = leg.node
        else:
            out.next, out.source = torch.ones_like(out.next), torch.full_like(out.source, -1)
            out.next = out.next + out.passed(leg.t0)

    def _shown(self, leg: Leg) -> list[tuple[Tensor, Tensor]]:
        """The output states of a chunk and the gradients given for them."""
        out, given = self.out, self.given.ys
        if not out.blocks:
            return []
        if isinstance(out, JointOutputs):
            return list(zip(out.blocks, given[leg.node : out.done].split([len(b) for b in out.blocks]), strict=True))
        values = torch.cat(out.blocks)
        there = (out.source >= 0)[..., None]
        there = there & ~(out.ts == out.ts[0])[..., None]  # the start
        index = out.source.clamp(min=0)[..., None].expand_as(given)
        return [(values, torch.zeros_like(values).scatter_add_(0, index, torch.where(there, given, 0.0)))]

    def result(self) -> list[Tensor | None]:
        """Gradients with respect to the state, the times and the tensors; the first output is the state.

        Raises:
            UsageError: the field gave other numbers than in the solve.
        """
        if self.wrong is not None and bool(self.wrong):
            raise UsageError(
                "adjoint: steps that were taken again for the gradient came out with other numbers than in the solve: "
                "the field is random, or what it uses was changed since",
                'keep what it uses until the backward pass, or adjoint="direct"',
            )
        self.work.nfe += self.quick.calls + self.exact.calls
        made = iter(self.made)
        found = [next(made) if t.requires_grad else None for t in (self.inputs.ts, *self.inputs.tensors)]
        first = self.tape.first[:, None] if self.tape.first.ndim == 1 else self.tape.first[..., None]
        first = first.view(*first.shape, *[1] * (self.given.ys.ndim - first.ndim))
        return [self.slope_y + torch.where(first, self.given.ys, 0.0).sum(0), *found]


def _leaf(part: Any) -> Any:
    """A part of a carry as a leaf of a new graph."""
    if not isinstance(part, Tensor):
        return part
    return part.detach().requires_grad_(part.is_floating_point() or part.is_complex())


def _or_zeros(slope: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if slope is None else slope


def _wanted(part: Any) -> bool:
    return isinstance(part, Tensor) and part.requires_grad


def lift(ts: Tensor, t: Any) -> Tensor:
    """A time as one that moves with ts: with the output time that it is, else with the first."""
    if not isinstance(t, Tensor):
        t = torch.full((), t, dtype=ts.dtype, device=ts.device)
    same = ts.detach() == t if ts.ndim > t.ndim else ts.detach()[:, None] == t
    rows = ts if ts.ndim > t.ndim else ts[:, None].expand(same.shape)
    moved = torch.where(same.any(0), torch.where(same, rows, 0.0).sum(0), rows[0] + (t - rows[0].detach()))
    return moved


class Recording:
    """The first steps of a joint solve, with one graph, while graphs have room.

    Args:
        room: bytes.

    Attributes:
        state, before: where the last of them ended and began, with the graph.
        steps: how many they are; weight: bytes that the graph of one takes, as that of the first.
    """

    def __init__(self, room: int):
        self.room, self.steps, self.weight, self.since = room, 0, 0, mark()
        self.state: State | None = None
        self.before: State | None = None

    def add(self, state: State) -> Behind | None:
        """Keep a step up to this state if there is room; what is behind the first one."""
        found = None
        if not self.steps:
            found = behind(leaves(tuple(state)), since=self.since)
            self.weight, found = weight(found), found._replace(nodes=[])
        self.room = self.room - self.weight if state.y.requires_grad else -1
        if self.room >= 0:
            self.before, self.state, self.steps = self.state, state, self.steps + 1
        return found


class CheckpointTape(_Tape):
    """See `Checkpoint`."""

    def __init__(self, problem: Problem, memory: int | None, graphs: int = 0):
        super().__init__(problem)
        self.memory, self.slots = memory, 0
        self.kept, self.every = [self.start], 1
        self.recording, self.record = graphs > 0 and not self.lanes.per_sample, Recording(graphs)
        self.field = problem.field

    def making(self) -> AbstractContextManager[Any]:
        self.field.pure = self.recording
        return torch.enable_grad() if self.recording else super().making()

    def add(self, move: Move, passed: int) -> None:
        if not self.recording:
            return super().add(move, passed)
        if not move.accepted:
            return
        state = State(move.y, move.carry)
        self.seen = self.record.add(state) or self.seen
        self.recording = self.record.room >= self.record.weight and self.record.steps < _FREE
        bare = without_graph(state)
        if self.record.state is state:
            self.done, self.fresh, self.kept = self.done + passed, move.t1 in self.jumps, [bare]
        else:
            super().add(move._replace(**bare._asdict()), passed)

    def finish(self, ys: Tensor, end: End) -> None:
        self.ys, self.last = ys, end.y.detach()

    def reached(self, state: State) -> None:
        if self.memory is not None and not self.slots:
            one = sum(t.numel() * t.element_size() for t in leaves(tuple(state)) if isinstance(t, Tensor))
            self.slots = self.memory // one
            if not self.slots:
                raise UsageError(
                    f"memory: {self.memory} bytes are less than one state, {one}", f"Checkpoint(memory={32 * one})"
                )
        if len(self.legs) % self.every:
            return
        self.kept.append(state)
        most = max(1, self.slots // 2) if self.slots else _FREE * self.every
        while len(self.kept) > most:
            self.kept = self.kept[::2]
            self.every *= 2

    def graph(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """The states at the output times and at the end with one graph, of accepted steps only."""
        taken = _Again(self, problem, Inputs(problem.y, problem.ts, (), problem.field.args, False, False))
        taken.out.start(problem.y)
        end = taken.chunk(self.legs, State(problem.y, None))
        return taken.out.result(), end.y

    def pull(self, problem: Problem, inputs: Inputs, given: Cotangents, work: Work) -> list[Tensor | None]:
        back = _Back(self, problem, inputs, given, work)
        kept, end, after = list(self.kept), len(self.legs), self.last
        while kept:
            if not self.slots:
                del kept[max(1, len(kept) + 1 - max(1, _TOGETHER // self.every)) :]
            first, state = (len(kept) - 1) * self.every, kept.pop()
            if first < end and not self.slots:
                back.pull(first, end, state, after)
            elif first < end:
                self._binomial(back, first, end, state, self.slots - len(self.kept) - 1, after)  # one is on its way
            end, after = first, state.y
        if self.record.state:
            back.recorded(self.record, self.ys, problem.y, problem.field.args)
        return back.result()

    def _binomial(
        self, back: _Back, first: int, last: int, state: State, free: int, after: Tensor | None = None
    ) -> None:
        """Go back from leg `last`, which led to `after`, to `first`, where `state` is, with room for `free` more."""
        while last - first > 1 and free > 0:
            n = last - first
            times = next(r for r in range(1, n + 1) if math.comb(free + 1 + r, r) >= n)
            forth = max(n - math.comb(free + times, times), math.comb(free - 1 + times, times - 2) if times > 1 else 1)
            middle = first + max(1, min(forth, n - 1))
            self._binomial(back, middle, last, back.forth(first, middle, state), free - 1, after)
            last, after = middle, None
        for i in range(last - 1, first - 1, -1):
            back.pull(i, i + 1, back.forth(first, i, state), after)
            after = None


class ReversibleTape(_Tape):
    """See `Reversible`."""

    def __init__(self, problem: Problem, how: Reversible):
        super().__init__(problem)
        self.how, self.anchors = how, {0: self.start}
        self.last = self.start

    def reached(self, state: State) -> None:
        self.last = state
        if self.fresh is True or (self.how.every is not None and len(self.legs) % self.how.every == 0):
            self.anchors[len(self.legs)] = state

    def pull(self, problem: Problem, inputs: Inputs, given: Cotangents, work: Work) -> list[Tensor | None]:
        back = _Back(self, problem, inputs, given, work)
        state = self.last
        for i in range(len(self.legs) - 1, -1, -1):
            leg = self.legs[i]
            y, carry = problem.solver.back(back.quick, leg.u0, leg.u1, state.y, state.carry)  # type: ignore[attr-defined]
            before = State(y, carry)
            if leg.accepted is not None:
                before = State(
                    *(self.lanes.merge(leg.accepted, new, old) for new, old in zip(before, state, strict=True))
                )
            state = before
            if i in self.anchors:
                self._compare(problem, leg, state.y, self.anchors[i].y)
                state = self.anchors[i]
            back.pull(i, i + 1, state)
        return back.result()

    def _compare(self, problem: Problem, leg: Leg, y: Tensor, kept: Tensor) -> None:
        wrong = float((y - kept).abs().max() / kept.abs().max().clamp(min=torch.finfo(kept.dtype).tiny))
        most = self.how.tolerance * torch.finfo(kept.dtype).eps ** 0.5
        if not wrong <= most:
            raise NumericalError(
                f"reversible: the state at t = {float(torch.as_tensor(leg.t0).flatten()[0]):.6g} came out wrong by "
                f"{wrong:.1e} of its size, more than {most:.1e}: rounding errors grow on the way back, or the field "
                "changed since the solve",
                'Reversible(every=...) with fewer steps between anchors, float64, or adjoint="checkpoint" or "direct"',
            )
