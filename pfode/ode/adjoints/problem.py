"""What an adjoint works with: the solve that was made, what is kept of it, and what the gradient goes to."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from pfode.ode.adjoints.sources import FirstCall, GraphContents
from pfode.ode.batching import Batching
from pfode.ode.control import PID
from pfode.ode.records import Attempt, End, Schedule
from pfode.ode.solver import Solver
from pfode.ode.state import Field, leaves, rebuild

__all__ = [
    "NOTHING",
    "Adjoint",
    "Cotangents",
    "Direct",
    "Inputs",
    "Problem",
    "Tape",
    "Work",
    "detached",
    "replay_field",
]

NOTHING = nullcontext()


class Problem(NamedTuple):
    """A solve, checked: what `advance` takes, and the output times."""

    field: Field
    solver: Solver
    control: PID
    schedule: Schedule
    batching: Batching
    y: Tensor
    ts: Tensor


@dataclass
class Work:
    """What backward passes did so far. `nfe`: evaluations of the field; `steps`: steps taken back."""

    nfe: int = 0
    steps: int = 0


class Inputs(NamedTuple):
    """What a solution depends on, all detached or leaves; `tensors`: those in args, then parameters.

    `searched`: whether parameters were looked for; `shared`: whether the field uses tensors that have graphs of their
    own, through which every evaluation leads.
    """

    y: Tensor
    ts: Tensor
    tensors: tuple[Tensor, ...]
    args: tuple[Any, ...]
    searched: bool
    shared: bool


class Cotangents(NamedTuple):
    """Gradients of the loss with respect to the states at the output times and at the end."""

    ys: Tensor
    end: Tensor


class Tape:
    """What an adjoint keeps of one solve.

    Attributes:
        recording: whether the next step is to be made with its graph; `found`: what lies in that of the first one.
        witness: the first call of the field, where it decides whether anything needs a gradient.
    """

    recording = False
    found: GraphContents | None = None
    witness: FirstCall | None = None

    @property
    def needless(self) -> bool:
        """Whether it is known that nothing needs a gradient: then nothing is to be kept."""
        return self.witness is not None and not (self.witness.due or self.witness.found.leaves)

    def recording_context(self) -> AbstractContextManager[Any]:
        """The surroundings to make the next step in."""
        return NOTHING

    def observe(self, attempt: Attempt, passed: int) -> None:
        """Look at an attempted step; `passed`: output times that it passed (at most, over samples)."""

    def finish(self, ys: Tensor, end: End) -> None:
        """See the states at the output times, and how it ended."""

    def pull_back(self, problem: Problem, inputs: Inputs, given: Cotangents, work: Work) -> list[Tensor | None]:
        """Gradients with respect to the state, the times and `inputs.tensors`; those not required may be None."""
        raise NotImplementedError


class Adjoint(Protocol):
    """A way to make gradients. `pure`: steps must stay valid, so the solve makes them without in-place operations."""

    @property
    def pure(self) -> bool:
        """Whether the solve must make its steps without operations in place."""
        ...

    def tape(self, problem: Problem) -> Tape:
        """What is to look on during a solve of this problem, and goes back afterwards."""
        ...


@dataclass(frozen=True)
class Direct:
    """Record every operation."""


def replay_field(problem: Problem, args: tuple[Any, ...], pure: bool) -> Field:
    """The field of a solve with other arguments, that counts from 0."""
    made = problem.field.renewed(args, problem.schedule.context(pure))
    made.jacobian_mode = problem.field.jacobian_mode
    return made


def detached(args: tuple[Any, ...], places: Sequence[int], values: Sequence[Tensor] | None = None) -> tuple[Any, ...]:
    """args with the tensors at some places as leaves of their own, or replaced by values."""
    if not places:
        return args
    parts = list(leaves(args))
    for i, place in enumerate(places):
        parts[place] = parts[place].detach().requires_grad_() if values is None else values[i]
    return rebuild(args, iter(parts))
