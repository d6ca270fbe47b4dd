"""What a solve returns, and the error it amounts to where it did not get to its end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode.errors import NumericalError
from pfode.ode.adjoints.attach import Attached
from pfode.ode.adjoints.problem import Problem, Work
from pfode.ode.autocast import autocast_off
from pfode.ode.events import Hits
from pfode.ode.records import Attempt, Counts, End, Status
from pfode.ode.state import Tree, leaves, rebuild

__all__ = ["Point", "Solution", "Stats", "finish"]

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
    """The work of a solve: whole numbers, or int64 tensors of shape (batch,) with batch="per-sample".

    Fields:
        steps, accepted, rejected: attempted steps, and what became of them.
        nfe: evaluations of the field; of a sample, those made while it was still running.
        jacobians, iterations: Jacobians that were made, and iterations of Newton's method.
        backward: what backward passes have done so far, its `nfe` and its `steps`; it grows when they run.
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

    A module may keep its own solution, `solution` or `solution.ys`: Python's garbage collector frees both. What was
    computed from them keeps the field alive until its backward pass, or until it is dropped.

    Attributes:
        ts: the output times as given.
        ys: the states there, a tree like y0 with the times first; NaN where the solve did not get to.
        status: how the solve ended, a Status; with batch="per-sample" their numbers, an int64 tensor of shape (batch,).
        t: the time where it ended, a float; with batch="per-sample" shape (batch,).
        y: the state there, a tree like y0.
        stats: the work done.
        events: where each event was met; the solve ended at the last hit of one that is terminal.
    """

    ts: Tensor | Sequence[float]
    ys: Tree
    status: Any
    t: Any
    y: Tree
    stats: Stats
    events: tuple[Hits, ...] = ()


@dataclass(frozen=True, eq=False)
class Point:
    """An accepted step of `steps`, from t0 to t1, where the state is y; `at(t)` is the state in between.

    With batch="per-sample", t0, t1 and `accepted` have shape (batch,); t1 = t0 where a sample is done or its step was
    rejected.
    """

    t0: Any
    t1: Any
    y: Tree
    accepted: Any
    _attempt: Attempt
    _problem: Problem

    def at(self, t: Any) -> Tree:
        """The state, a tree like y0, at a time between t0 and t1.

        Per sample also at times of shape (batch,), or (times, batch) for states with the times first.
        """
        attempt, ts = self._attempt, self._problem.ts
        several = isinstance(t, Tensor) and t.ndim == 2
        with autocast_off(ts.device):
            if isinstance(self.t0, Tensor):
                span = attempt.u1 - attempt.u0
                theta = torch.where(attempt.accepted, (t - attempt.u0) / torch.where(span == 0, 1.0, span), 0.0)
                flat = attempt.step.dense(theta if several else theta[None])
                flat = torch.where(attempt.accepted[:, None], flat, attempt.y)
            else:
                theta = torch.tensor([(t - self.t0) / (self.t1 - self.t0)], dtype=ts.dtype, device="cpu").to(ts.device)
                flat = attempt.step.dense(theta)
        flat = flat if several else flat[0]
        return self._problem.field.layout.tree(flat, cast=False)


def finish(setup: Problem, ts: Any, flat: Tensor, end: End, throw: bool, made: Attached | None = None) -> Solution:
    """The solution of a problem.

    Args:
        ts: the output times as the caller gave them.
        flat: the flat states there; end: how the loop ended.
        throw: raise where it did not get to its end.
        made: what `attach` made of it, if gradients go through an adjoint.

    Raises:
        NumericalError: with throw, unless every sample succeeded or met its event.
    """
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
    if made is not None and made.held is not None:
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
        text = problem.format(max_steps=setup.schedule.max_steps)
        if (
            status == Status.NON_FINITE
            and setup.schedule.norm
            and _vanishes(setup.schedule.atol, setup.field.layout.real)
        ):
            hint = f"atol=1e-8, as with atol = 0 a state of 0 allows no error; else {hint}"
        raise NumericalError(
            f"{name} stopped at t = {t:.6g}{where}: {text}", f"{hint}; throw=False returns what there is"
        )


def _vanishes(atol: Any, real: torch.dtype) -> bool:
    """Whether the absolute tolerance was given as 0 somewhere."""
    return bool(
        (torch.as_tensor(atol, device=None if isinstance(atol, Tensor) else "cpu") <= torch.finfo(real).tiny).any()
    )
