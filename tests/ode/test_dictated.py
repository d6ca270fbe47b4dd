"""The loop alone: a solver and a controller that do as they are told, so that every decision has one right outcome."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from pfode.ode.batching import Joint, PerSample
from pfode.ode.control import PID
from pfode.ode.loop import advance
from pfode.ode.records import Reply, Schedule, Status
from pfode.ode.solver import Step
from pfode.ode.state import Field, Layout

f64 = torch.float64


@dataclass
class Dictated:
    """A solver of y' = 1 whose attempts have these errors (rows: of each sample), and are solved or not."""

    errors: list[Any]
    solved: list[Any] | None = None
    again: bool = False
    order: int = 1
    error_order: int = 1
    name: str = "dictated"
    seen: list[Any] = field(default_factory=list)
    begun: list[Any] = field(default_factory=list)

    def init(self, field, t, y, slope=None):
        self.begun.append(t)
        return torch.zeros_like(y)

    def step(self, field, t0, t1, y0, carry):
        k = len(self.seen)
        self.seen.append((t0, t1, carry))
        error = torch.as_tensor(self.errors[min(k, len(self.errors) - 1)], dtype=f64)
        shape = error[:, None] if error.ndim else error
        ok = None if self.solved is None else torch.as_tensor(self.solved[min(k, len(self.solved) - 1)])
        h = t1 - t0
        h = h[:, None] if isinstance(h, torch.Tensor) and h.ndim else h
        dense = lambda theta: y0 + theta * h  # noqa: E731
        again = carry + 100 if self.again else None
        return Step(y0 + h, shape.expand_as(y0), dense, carry + 1, again, ok, 2, 3)


@dataclass
class Factors:
    """A controller that multiplies the step by these factors in turn."""

    factors: list[float]
    first_step: float | None = 0.25
    min_step: float = 0.0
    max_step: float = math.inf
    force: bool = False
    seen: list[Any] = field(default_factory=list)

    fit, stretch = PID.fit, PID.stretch

    def factor(self, batching, error, accepted, memory, order):
        k = len(self.seen)
        self.seen.append((error, accepted))
        return batching.fill(self.factors[min(k, len(self.factors) - 1)], error), memory


def run(solver, control, stops, mode="joint", sign=1.0, start=0.0, jumps=None, most=100, replies=()):
    """All records of a loop, and its end. One number per sample, in units of a tolerance of 1."""
    per_sample = mode == "per-sample"
    layout = Layout(torch.zeros(2, 1, dtype=f64) if per_sample else torch.zeros(1, dtype=f64), per_sample)
    jumps = tuple(jumps or [False] * len(stops))
    many: Any = torch.tensor(stops, dtype=f64) if per_sample else stops
    norm = (lambda e: e.abs()[:, 0]) if per_sample else (lambda e: e.abs()[0])
    begin: Any = torch.full((2,), start, dtype=f64) if per_sample else start
    schedule = Schedule(begin, many, jumps, sign, 0.0, 1.0, norm if solver.error_order else None, most)
    y = torch.zeros(2, 1, dtype=f64) if per_sample else torch.zeros(1, dtype=f64)
    loop = advance(
        Field(lambda t, y: torch.ones_like(y), layout),
        solver,
        control,
        schedule,
        y,
        PerSample() if per_sample else Joint(),
    )
    records, reply, replies = [], None, list(replies)
    while True:
        try:
            record = loop.send(reply)
        except StopIteration as stop:
            return records, stop.value
        records.append(record)
        reply = replies.pop(0) if replies else None


def attempts(records):
    return [(r.t0, r.t1, r.accepted) for r in records]


def test_steps_are_those_that_the_controller_wants():
    records, end = run(Dictated([0.5]), Factors([2.0, 1.0, 0.5]), [1.5])
    assert attempts(records) == [(0.0, 0.25, True), (0.25, 0.75, True), (0.75, 1.25, True), (1.25, 1.5, True)]
    assert (end.status, end.t, float(end.y)) == (Status.SUCCESS, 1.5, 1.5)
    assert end.counts == (4, 4, 0, 8, 12)
    back, end = run(Dictated([0.5]), Factors([2.0, 1.0, 0.5]), [-1.5], sign=-1.0)
    assert attempts(back) == [(-a if a else 0.0, -b, c) for a, b, c in attempts(records)]


def test_an_error_above_one_is_tried_again_with_the_carry_or_what_the_step_says():
    errors = [1.0, 1.0001, 0.2]
    for again in (False, True):
        solver = Dictated(errors, again=again)
        records, end = run(solver, Factors([1.0, 0.5, 1.0]), [0.625])
        assert attempts(records) == [
            (0.0, 0.25, True),
            (0.25, 0.5, False),
            (0.25, 0.375, True),
            (0.375, 0.5, True),
            (0.5, 0.625, True),
        ]
        assert [float(carry) for _, _, carry in solver.seen] == [
            0,
            1,
            101 if again else 1,
            *([102, 103] if again else [2, 3]),
        ]
        assert end.counts.accepted == 4
        assert float(records[1].y) == float(records[1].y0) == 0.25


def test_the_controller_sees_errors_and_infinity_for_failures():
    control = Factors([1.0])
    run(Dictated([0.5, 3.0, math.nan, 0.1]), control, [0.5])
    assert control.seen == [(0.5, True), (3.0, False), (math.inf, False), (0.1, True)]


@pytest.mark.parametrize("mode", ["joint", "per-sample"])
@pytest.mark.parametrize(
    ("solver", "status", "attempts"),
    [
        ({"errors": [math.nan]}, Status.NON_FINITE, 12),
        ({"errors": [math.inf]}, Status.NON_FINITE, 12),
        ({"errors": [0.5], "solved": [False]}, Status.NEWTON_FAILED, 12),
        ({"errors": [2.0]}, Status.MIN_STEP, 3),
    ],
)
def test_what_a_solve_ends_with(solver, status, attempts, mode):
    dictated: dict[str, Any] = {k: [[v[0]] * 2] if mode == "per-sample" else v for k, v in solver.items()}
    control = Factors([0.5], min_step=0.25 / 4 if status == Status.MIN_STEP else 0.0)
    records, end = run(Dictated(**dictated), control, [1.0], mode)
    assert len(records) == attempts
    assert (torch.as_tensor(end.status) == status).all()
    assert (torch.as_tensor(end.t) == 0).all()
    forced, end = run(
        Dictated([[9.0] * 2] if mode == "per-sample" else [9.0]),
        Factors([0.5], min_step=0.125, force=True),
        [0.5],
        mode,
    )
    assert (torch.as_tensor(end.status) == Status.SUCCESS).all()
    assert len(forced) == 5  # one rejected, four of min_step


@pytest.mark.parametrize("mode", ["joint", "per-sample"])
def test_attempts_are_bounded(mode):
    records, end = run(Dictated([0.5] if mode == "joint" else [[0.5, 0.5]]), Factors([1.0]), [9.0], mode, most=7)
    assert len(records) == 7
    assert (torch.as_tensor(end.status) == Status.MAX_STEPS).all()
    assert (torch.as_tensor(end.t) == 1.75).all()


def test_steps_end_at_stops_and_a_step_that_is_cut_short_says_nothing_of_the_next():
    records, _ = run(Dictated([0.5]), Factors([1.0]), [0.3, 1.0])
    assert [r.t1 for r in records] == pytest.approx([0.25, 0.3, 0.55, 0.8, 1.0])
    assert records[1].t1 == 0.3
    records, _ = run(Dictated([0.5]), Factors([1.0]), [0.2515, 1.0])  # within a hundredth: the step is stretched
    assert next(r.t1 for r in records) == 0.2515


def test_fixed_grids_take_one_step_from_stop_to_stop():
    solver = Dictated([99.0], error_order=0)
    records, end = run(solver, Factors([1.0], first_step=None), [0.1, 0.7, 1.0])
    assert attempts(records) == [(0.0, 0.1, True), (0.1, 0.7, True), (0.7, 1.0, True)]
    assert end.status == Status.SUCCESS
    assert run(Dictated([99.0], [True, False, True], error_order=0), Factors([1.0], first_step=None), [0.1, 0.7, 1.0])[
        1
    ].status == (Status.NEWTON_FAILED)


@pytest.mark.parametrize("mode", ["joint", "per-sample"])
def test_at_a_jump_both_sides_are_seen_and_the_carry_begins_anew(mode):
    solver = Dictated([0.5] if mode == "joint" else [[0.5, 0.5]])
    records, _ = run(solver, Factors([1.0]), [0.5, 1.0], mode, jumps=[True, False])
    numbers = [tuple(float(torch.as_tensor(x, dtype=f64).reshape(-1)[0]) for x in (a, b, c)) for a, b, c in solver.seen]
    before, after = math.nextafter(0.5, 0), math.nextafter(0.5, 1)
    assert [n[:2] for n in numbers] == [(0.0, 0.25), (0.25, before), (after, 0.75), (0.75, 1.0)]
    assert [n[2] for n in numbers] == [0, 1, 0, 1]
    assert [float(torch.as_tensor(t, dtype=f64).reshape(-1)[0]) for t in solver.begun] == [0.0, after]
    assert [float(torch.as_tensor(r.t1, dtype=f64).reshape(-1)[0]) for r in records] == [0.25, 0.5, 0.75, 1.0]


def test_samples_go_their_own_ways():
    solver = Dictated([[0.5, 0.5], [2.0, 0.5], [0.5, 0.5], [math.nan, 0.5]])
    records, end = run(solver, Factors([1.0]), [0.75], "per-sample")
    assert [r.accepted.tolist() for r in records[:4]] == [[True, True], [False, True], [True, True], [False, False]]
    assert [r.t1.tolist() for r in records[:3]] == [[0.25, 0.25], [0.5, 0.5], [0.5, 0.75]]
    assert end.status.tolist() == [Status.NON_FINITE, Status.SUCCESS]
    assert end.t.tolist() == [0.5, 0.75]
    assert end.y.flatten().tolist() == [0.5, 0.75]
    assert end.counts.steps.tolist() == [len(records), 3]
    assert end.counts.accepted.tolist() == [2, 3]
    assert end.counts.iterations.tolist() == [3 * len(records), 9]


def test_what_is_answered():
    assert run(Dictated([0.5]), Factors([1.0]), [9.0], replies=[Reply(), Reply(halt=True)])[1].status == Status.EVENT
    halts = [Reply(halt=torch.tensor([True, False]))]
    _, end = run(Dictated([[0.5, 0.5]]), Factors([1.0]), [0.75], "per-sample", replies=halts)
    assert end.status.tolist() == [Status.EVENT, Status.SUCCESS]
    assert end.counts.steps.tolist() == [1, 3]
    live = [Reply(live=torch.tensor([True, False])), Reply(live=torch.tensor([True, False]))]
    end = run(Dictated([0.5], error_order=0), Factors([1.0], first_step=None), [0.25, 0.5, 0.75], replies=live)[1]
    assert end.counts.steps.tolist() == [3, 1]
