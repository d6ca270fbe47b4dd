"""`Checkpoint`: exact gradients from states that were kept on the way.

The graphs of the first steps are kept while they are small, and the state at every k-th step after these. Without a cap
k doubles whenever 64 states are kept: of n steps about sqrt(n) of them; the k steps in between, or 4, are taken again
together, so that nothing is evaluated more than once again. With a cap on memory k doubles whenever half of it is used;
the other half serves to go back through the k steps by binomial checkpoints (Griewank & Walther 2000, "Algorithm 799:
revolve"), with the graph of one step at a time.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfode.errors import UsageError, integer
from pfode.ode.adjoints.problem import Cotangents, Inputs, Problem, Work
from pfode.ode.adjoints.replay import BackwardPass, Replay, ReplayTape, State
from pfode.ode.adjoints.sources import GraphContents, graph_bytes, search_graph, sequence_number
from pfode.ode.records import Attempt, End
from pfode.ode.state import leaves, without_graph

__all__ = ["Checkpoint", "CheckpointTape"]

_FREE = 64  # states kept before steps are left out, about what the graph of one takes; also graphs kept at most
_TOGETHER = 4  # steps that are taken again together at least: one by one they take a tenth longer


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


class CheckpointTape(ReplayTape):
    """What `Checkpoint` keeps of a solve: the step records, every k-th state, and the graphs of the first steps.

    Args:
        memory: cap on the states' bytes, or None; graphs: bytes that the graphs of the first steps may take.
    """

    def __init__(self, problem: Problem, memory: int | None, graphs: int = 0):
        super().__init__(problem)
        self.memory, self.slots = memory, 0
        self.kept, self.every = [self.start], 1
        self.recording, self.graphs = graphs > 0 and not self.batching.per_sample, KeptGraphs(graphs)
        self.problem, self.field = problem, problem.field

    def recording_context(self) -> AbstractContextManager[Any]:
        if self.field.context.pure != self.recording:
            self.field.context = self.problem.schedule.context(self.recording)
        return torch.enable_grad() if self.recording else super().recording_context()

    def observe(self, attempt: Attempt, passed: int) -> None:
        if not self.recording:
            return super().observe(attempt, passed)
        if not attempt.accepted:
            return
        state = State(attempt.y, attempt.carry)
        self.found = self.graphs.add(state) or self.found
        self.recording = self.graphs.room >= self.graphs.weight and self.graphs.steps < _FREE
        bare = without_graph(state)
        if self.graphs.state is state:
            self.done, self.fresh, self.kept = self.done + passed, attempt.t1 in self.jumps, [bare]
        else:
            super().observe(attempt._replace(**bare._asdict()), passed)

    def finish(self, ys: Tensor, end: End) -> None:
        self.ys, self.last = ys, end.y.detach()

    def keep(self, state: State) -> None:
        if self.memory is not None and not self.slots:
            one = sum(t.numel() * t.element_size() for t in leaves(tuple(state)) if isinstance(t, Tensor))
            self.slots = self.memory // one
            if not self.slots:
                raise UsageError(
                    f"memory: {self.memory} bytes are less than one state, {one}", f"Checkpoint(memory={32 * one})"
                )
        if len(self.records) % self.every:
            return
        self.kept.append(state)
        most = max(1, self.slots // 2) if self.slots else _FREE * self.every
        while len(self.kept) > most:
            self.kept = self.kept[::2]
            self.every *= 2

    def graph(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """The states at the output times and at the end with one graph, of accepted steps only."""
        taken = Replay(self, problem, Inputs(problem.y, problem.ts, (), problem.field.args, False, False))
        taken.out.start(problem.y)
        end = taken.retake(self.records, State(problem.y, None))
        return taken.out.result(), end.y

    def pull_back(self, problem: Problem, inputs: Inputs, given: Cotangents, work: Work) -> list[Tensor | None]:
        back = BackwardPass(self, problem, inputs, given, work)
        kept, end, after = list(self.kept), len(self.records), self.last
        while kept:
            if not self.slots:
                del kept[max(1, len(kept) + 1 - max(1, _TOGETHER // self.every)) :]
            first, state = (len(kept) - 1) * self.every, kept.pop()
            if first < end and not self.slots:
                back.pull(first, end, state, after)
            elif first < end:
                self._binomial(back, first, end, state, self.slots - len(self.kept) - 1, after)  # one is on its way
            end, after = first, state.y
        if self.graphs.state:
            back.through_kept(self.graphs.before, self.graphs.state, self.graphs.steps, self.ys, problem)
        return back.result()

    def _binomial(
        self, back: BackwardPass, first: int, last: int, state: State, free: int, after: Tensor | None = None
    ) -> None:
        """Go back from step `last`, which led to `after`, to `first`, where `state` is, with room for `free` states."""
        while last - first > 1 and free > 0:
            n = last - first
            times = next(r for r in range(1, n + 1) if math.comb(free + 1 + r, r) >= n)
            forth = max(n - math.comb(free + times, times), math.comb(free - 1 + times, times - 2) if times > 1 else 1)
            middle = first + max(1, min(forth, n - 1))
            self._binomial(back, middle, last, back.forward(first, middle, state), free - 1, after)
            last, after = middle, None
        for i in range(last - 1, first - 1, -1):
            back.pull(i, i + 1, back.forward(first, i, state), after)
            after = None


class KeptGraphs:
    """The first steps of a joint solve, with one graph, while graphs have room.

    Args:
        room: bytes.

    Attributes:
        state, before: where the last of them ended and began, with the graph.
        steps: how many they are; weight: bytes that the graph of one takes, as that of the first.
    """

    def __init__(self, room: int):
        self.room, self.steps, self.weight, self.since = room, 0, 0, sequence_number()
        self.state: State | None = None
        self.before: State | None = None

    def add(self, state: State) -> GraphContents | None:
        """Keep a step up to this state if there is room; returns what the graph of the first one contains."""
        found = None
        if not self.steps:
            found = search_graph(leaves(tuple(state)), since=self.since)
            self.weight, found = graph_bytes(found), found._replace(nodes=[])
        self.room = self.room - self.weight if state.y.requires_grad else -1
        if self.room >= 0:
            self.before, self.state, self.steps = self.state, state, self.steps + 1
        return found
