"""What the loop is given and what it hands back: the schedule of a solve, its attempts, counts and end."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from pfode.ode.solver import Step
from pfode.ode.state import Context

__all__ = ["Attempt", "Counts", "End", "Position", "Probe", "Reply", "Schedule", "Status"]

Probe = Callable[[Any, Tensor, Any, Tensor, Any], Tensor]


class Status(enum.IntEnum):
    """How a solve ended, for the state or for a sample."""

    RUNNING = -1
    SUCCESS = 0
    MAX_STEPS = 1
    MIN_STEP = 2
    NON_FINITE = 3
    NEWTON_FAILED = 4
    EVENT = 5


class Counts(NamedTuple):
    """Work so far: ints, or shape (batch,)."""

    steps: Any
    accepted: Any
    nfe: Any
    jacobians: Any
    iterations: Any


class Attempt(NamedTuple):
    """One attempted step from t0 to t1; in per-sample mode these and `accepted` have shape (batch,).

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
    """What may be sent back for an Attempt.

    Fields:
        halt: whether the solve ends there, a boolean or shape (batch,): an event.
        looked: whose dense output was used: evaluations made for it are counted there. A boolean or shape (batch,).
        live: which samples of a fixed grid still count, shape (batch,); None: all that did.
    """

    halt: Any = None
    looked: Any = True
    live: Any = None


class Position(NamedTuple):
    """Where the loop is between two attempts, in joint mode: time, next step size, the controller's memory, state,
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
class Schedule:
    """From where to where, and how exactly.

    Args:
        start: t0, a float or shape (batch,).
        stops: times that steps must end at, in the direction of the solve, the last one its end: a list of floats or
            shape (stops,) or (stops, batch). For fixed steps, the grid.
        jumps: at which of them the field jumps: it is evaluated on the near side only, and afresh beyond.
        begins_at_jump: whether it does at the start, a boolean or shape (batch,).
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
    begins_at_jump: Any = False

    def context(self, pure: bool) -> Context:
        """What the steps may know of this solve."""
        edges = [i for i, jumps in enumerate(self.jumps) if jumps] + [len(self.stops) - 1]
        if isinstance(self.stops, Tensor):
            return Context(pure, True, self.rtol, self.atol, self.norm, self.stops[edges])
        return Context(pure, True, self.rtol, self.atol, self.norm, [self.stops[i] for i in edges if self.stops])
