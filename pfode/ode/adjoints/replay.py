"""Exact gradients by taking the accepted steps again, what `Checkpoint` and `Reversible` share.

An accepted step is recorded as the times (t0, t1) that the solver got; with the state and the carry at its start it can
be taken again, to the same numbers. Going back, a few steps at a time are taken again with their graph, and the
gradients of state, carry, times and parameters are pulled back through it. Steps that come out with other numbers than
before are an error: the field is random, or something that it uses was changed since.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode._torch import keeps_graph
from pfode.errors import UsageError
from pfode.ode.adjoints.problem import Cotangents, Inputs, Problem, Tape, Work, replay_field
from pfode.ode.adjoints.sources import refuse_unknown
from pfode.ode.outputs import JointOutputs, PerSampleOutputs, outputs
from pfode.ode.records import Attempt, Counts
from pfode.ode.solver import Step
from pfode.ode.state import Field, leaves, rebuild

__all__ = ["BackwardPass", "Replay", "ReplayTape", "State", "StepRecord", "lift"]


class StepRecord(NamedTuple):
    """An accepted step.

    Fields:
        t0, t1, u0, u1: as in Attempt; of samples whose step was not accepted u1 = u0.
        accepted: shape (batch,), or None in joint mode.
        fresh: whether the carry is made anew at its start: the first one, and beyond jumps; or shape (batch,).
        passed: output times that it passed, at most over the samples.
        node: further output times that it began at or before, joint mode only.
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
    """Where a step begins: the flat state and the solver's carry."""

    y: Tensor
    carry: Any


class ReplayTape(Tape):
    """The step records of a solve; subclasses keep the states to begin again from."""

    def __init__(self, problem: Problem):
        self.records: list[StepRecord] = []
        self.batching, self.start = problem.batching, State(problem.y, None)
        schedule = problem.schedule
        jumps = [stop for stop, jump in zip(schedule.stops, schedule.jumps, strict=False) if jump]
        self.jumps: Any = torch.stack(jumps) if jumps and self.batching.per_sample else jumps
        self.fresh: Any = True
        self.first = problem.ts == problem.ts[0]  # outputs at the start: (times,) or (times, batch)
        self.done = int(self.first.sum()) if self.first.ndim == 1 else 1

    def observe(self, attempt: Attempt, passed: int) -> None:
        if not self.batching.per_sample and not attempt.accepted:
            return
        accepted = attempt.accepted if self.batching.per_sample else None
        u1 = attempt.u1 if accepted is None else torch.where(accepted, attempt.u1, attempt.u0)
        t1 = attempt.t1 if accepted is None else torch.where(accepted, attempt.t1, attempt.t0)
        self.records.append(StepRecord(attempt.t0, t1, attempt.u0, u1, accepted, self.fresh, passed, self.done))
        self.done += passed
        if accepted is None:
            self.fresh = attempt.t1 in self.jumps
        else:
            self.fresh = accepted & torch.isin(attempt.t1, self.jumps) if len(self.jumps) else False
        self.keep(State(attempt.y, attempt.carry))

    def keep(self, state: State) -> None:
        """Keep what is wanted of the state after the newest step."""
        raise NotImplementedError


class Replay:
    """Takes recorded steps again: without graphs, in place, or with graphs that begin at the inputs."""

    def __init__(self, tape: ReplayTape, problem: Problem, inputs: Inputs):
        self.tape, self.problem, self.inputs = tape, problem, inputs
        self.batching, self.solver = problem.batching, problem.solver
        self.quick = replay_field(problem, inputs.args, pure=False)
        self.exact = replay_field(problem, inputs.args, pure=True)
        with torch.enable_grad():
            self.out = outputs(inputs.ts, problem.schedule.sign, problem.batching, problem.field.layout.batch)

    def _retake_one(self, field: Field, record: StepRecord, state: State) -> tuple[StepRecord, Step, State]:
        """Take a step again: its record with times that have gradients, the step, the state after it."""
        if self.inputs.ts.requires_grad and torch.is_grad_enabled():
            lifted = {"u0": lift(self.inputs.ts, record.t0) + (record.u0 - record.t0)}
            lifted["u1"] = lift(self.inputs.ts, record.t1) + (record.u1 - record.t1)
            record = record._replace(**lifted)
        y, carry = state
        if record.fresh is not False:
            fresh = self.solver.init(field, record.u0, y)
            carry = fresh if record.fresh is True else self.batching.merge(record.fresh, fresh, carry)
        step = self.solver.step(field, record.u0, record.u1, y, carry)
        if record.accepted is None:
            return record, step, State(step.y1, step.carry)
        after = State(
            self.batching.merge(record.accepted, step.y1, y), self.batching.merge(record.accepted, step.carry, carry)
        )
        return record, step, after

    def forward(self, first: int, last: int, state: State) -> State:
        """The state after the steps from `first` to before `last`, without gradients."""
        for record in self.tape.records[first:last]:
            state = self._retake_one(self.quick, record, state)[2]
        return state

    def retake(self, records: list[StepRecord], state: State) -> State:
        """The state after some steps, with graphs; the states at output times that they pass go to `out`."""
        out = self.out
        for record in records:
            lifted, step, after = self._retake_one(self.exact, record, state)
            if record.passed:
                accepted = True if record.accepted is None else record.accepted
                counts = Counts(0, 0, 0, 0, 0)
                out_of = (record.t0, record.t1, lifted.u0, lifted.u1, state.y, after.y)
                attempt = Attempt(*out_of, accepted, step, [], counts)
                out.add(attempt, record.passed) if isinstance(out, PerSampleOutputs) else out.add(attempt)
            state = after
        return state


class BackwardPass(Replay):
    """A backward pass: gradients of the loss with respect to state, carry and inputs, pulled back step by step."""

    def __init__(self, tape: ReplayTape, problem: Problem, inputs: Inputs, given: Cotangents, work: Work):
        super().__init__(tape, problem, inputs)
        self.given, self.work = given, work
        self.slope_y, self.slope_carry = given.end, list[Tensor | None]()
        self.leaves = [t for t in (inputs.ts, *inputs.tensors) if t.requires_grad]
        self.made: list[Tensor | None] = [None] * len(self.leaves)
        self.checked = False
        self.wrong: Tensor | None = None  # on the device, read once

    def pull(self, first: int, last: int, state: State, after: Tensor | None = None) -> None:
        """Pull the gradients back through the steps from `first` to before `last`.

        Args:
            state: where they begin; after: where they had led to, if that is known, to compare with.
        """
        records = self.tape.records[first:last]
        y = state.y.detach().requires_grad_()
        parts = [] if state.carry is None or records[0].fresh is True else list(leaves(state.carry))
        parts = [_leaf(p) for p in parts]
        self._rewind(records[0])
        with torch.enable_grad():
            end = self.retake(records, State(y, rebuild(state.carry, iter(parts)) if parts else None))
            shown = self._shown(records[0])
        if after is not None:
            self._compare(state.y, end.y.detach(), after)
        wanted = [p for p in parts if _wanted(p)]
        slopes = iter(self._through(end, shown, [y, *wanted], self.leaves))
        self.slope_y = _or_zeros(next(slopes), y)
        self.slope_carry = [next(slopes) if _wanted(p) else None for p in parts]
        self.work.steps += len(records)

    def _compare(self, y0: Tensor, y1: Tensor, before: Tensor) -> None:
        """Remember whether steps came out other than before, by more than rounding and what the solve allows."""
        schedule, eps = self.problem.schedule, torch.finfo(y1.real.dtype).eps
        allowed = 0.01 * (before - y0).abs().amax() + 100 * eps * before.abs().amax()
        if schedule.norm is not None:
            allowed = allowed + schedule.rtol * before.abs() + schedule.atol
        wrong = ((y1 - before).abs() > allowed).any()
        self.wrong = wrong if self.wrong is None else self.wrong | wrong

    def through_kept(self, before: State | None, end: State, steps: int, ys: Tensor, problem: Problem) -> None:
        """Pull the gradients through the first steps, whose graphs were kept, back to the solve's own state and args.

        Args:
            before, end: where the last of these steps began, unless it is the first, and ended.
            steps: how many they are; ys: the output states, those that they pass with their graphs.
        """
        y, args = problem.y, problem.field.args
        own = {id(a): b for a, b in zip(leaves(self.inputs.args), leaves(args), strict=True)}
        into = [own.get(id(t), t) for t in self.leaves]
        last = leaves(tuple(before)) if before else ()
        keep = keeps_graph()
        first = [y] if y.requires_grad else []
        with torch.enable_grad():
            shown = [(ys[self.tape.first.sum() :], self.given.ys[self.tape.first.sum() :])]
        slopes = self._through(end, shown, first, into, last, keep)
        self.slope_y = _or_zeros(slopes[0] if slopes else None, y)
        self.work.steps += steps

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

    def _rewind(self, record: StepRecord) -> None:
        """Set `out` to where it was at the start of a step."""
        out = self.out
        out.blocks = []
        if isinstance(out, JointOutputs):
            out.done = record.node
        else:
            out.next, out.source = torch.ones_like(out.next), torch.full_like(out.source, -1)
            out.next = out.next + out.passed(record.t0)

    def _shown(self, record: StepRecord) -> list[tuple[Tensor, Tensor]]:
        """The output states of the steps just taken again, and the gradients given for them."""
        out, given = self.out, self.given.ys
        if not out.blocks:
            return []
        if isinstance(out, JointOutputs):
            return list(zip(out.blocks, given[record.node : out.done].split([len(b) for b in out.blocks]), strict=True))
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
    """A time as one that attempts with ts: with the output time that it is, else with the first."""
    if not isinstance(t, Tensor):
        t = torch.full((), t, dtype=ts.dtype, device=ts.device)
    same = ts.detach() == t if ts.ndim > t.ndim else ts.detach()[:, None] == t
    rows = ts if ts.ndim > t.ndim else ts[:, None].expand(same.shape)
    moved = torch.where(same.any(0), torch.where(same, rows, 0.0).sum(0), rows[0] + (t - rows[0].detach()))
    return moved
