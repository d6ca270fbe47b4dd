"""Gradients from the adjoint equation: `Backsolve` and `Interpolated`.

With a = dL/dy, the gradient with respect to the state at a time,

    da/dt = -a df/dy,    dL/dp = integral of a df/dp dt,    dL/dt_i = (gradient given at t_i) f(t_i, y_i)

(Pontryagin et al. 1962; Chen et al. 2018), solved backwards from output time to output time. It is the gradient of the
exact solution, made with errors of its own: not that of the numbers that were computed. Backsolve computes y backwards
with it, from the output states: that is unstable wherever the equation is stiff or forgets its past. Interpolated takes
y from the dense output of the forward solve, which it keeps.
"""

import bisect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfode._torch import version
from pfode.errors import NumericalError, UsageError, number
from pfode.ode.adjoints.problem import Cotangents, Inputs, Problem, Tape, Work, replay_field
from pfode.ode.adjoints.sources import refuse_unknown
from pfode.ode.batching import Joint
from pfode.ode.control import PID
from pfode.ode.loop import advance
from pfode.ode.records import Attempt, End, Schedule, Status
from pfode.ode.solver import Solver
from pfode.ode.state import Field, Layout

__all__ = ["Backsolve", "Interpolated"]


@dataclass(frozen=True)
class Backsolve:
    """Solve state and adjoint backwards; memory is that of the output states.

    Args:
        solver, rtol, atol, controller: of the backward solve; None: those of the forward one.
        seminorm: leave the parameters out of the error of a step (Kidger et al. 2021).

    Raises:
        UsageError: a solver by name, tolerances that are no numbers of at least 0, no controller.
    """

    solver: Solver | None = None
    rtol: float | None = None
    atol: float | None = None
    controller: PID | None = None
    seminorm: bool = True
    pure = False

    def __post_init__(self) -> None:
        if self.solver is not None and not hasattr(self.solver, "step"):
            hint = f"pfode.ode.SOLVERS[{self.solver if isinstance(self.solver, str) else 'dopri5'!r}]"
            raise UsageError(f"solver: need a solver, got {self.solver!r:.60}", f"solver={hint}")
        for name in ("rtol", "atol"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), 0.0)
        if self.controller is not None and not isinstance(self.controller, PID):
            raise UsageError(f"controller: need a PID, got {self.controller!r:.60}", "controller=pfode.ode.PI()")

    def tape(self, problem: Problem) -> "_Continuous":
        return _Continuous(problem, self)


@dataclass(frozen=True)
class Interpolated(Backsolve):
    """Solve the adjoint backwards along the dense output of the forward solve, which is kept.

    Arguments as Backsolve.
    """

    pure = True  # so that dense output stays valid

    def tape(self, problem: Problem) -> "_Continuous":
        if problem.batching.per_sample:
            raise UsageError('adjoint="interpolated": needs batch="joint"', 'adjoint="checkpoint"')
        return _Along(problem, self)


class _Continuous(Tape):
    """The output states of a solve, and the backward solve from them."""

    def __init__(self, problem: Problem, how: Backsolve):
        self.how = how
        if problem.ts.ndim > 1:
            raise UsageError("adjoint: ts of shape (batch, times) cannot be solved backwards", 'adjoint="checkpoint"')

    def finish(self, ys: Tensor, end: End) -> None:
        self.ys, self.end, self.version = ys, end, version(ys)

    def pull_back(self, problem: Problem, inputs: Inputs, given: Cotangents, work: Work) -> list[Tensor | None]:
        if version(self.ys) != self.version:
            raise UsageError("adjoint: the states at the output times were changed in place", "ys.clone()")
        times, sign = problem.ts.tolist(), problem.schedule.sign
        ends = set(torch.as_tensor(self.end.t, dtype=problem.ts.dtype, device=problem.ts.device).flatten().tolist())
        if len(ends) > 1:
            raise NumericalError("adjoint: samples ended at different times, which cannot be solved backwards from")
        (last,) = ends
        reached = sum((t - last) * sign <= 0 for t in times)
        at = [(times[i], self.ys[i], given.ys[i]) for i in range(reached)]
        if at[-1][0] == last:
            at[-1] = (last, at[-1][1], at[-1][2] + given.end)
        else:
            at.append((last, self.end.y, given.end))
        system = _System(self, problem, inputs)
        slopes_ts = torch.zeros_like(problem.ts)
        a, made = torch.zeros_like(problem.y), [torch.zeros_like(t) for t in inputs.tensors]
        for i in range(len(at) - 1, 0, -1):
            t, y, cotangent = at[i]
            a = a + cotangent
            if inputs.ts.requires_grad and i < reached:
                slopes_ts[i] += system.along(t, y, cotangent)
            a, *made = system.back(t, at[i - 1][0], y, a, made)
        if inputs.ts.requires_grad and len(at) > 1:
            slopes_ts[0] -= system.along(at[0][0], at[0][1], a)
        work.nfe += system.field.calls
        work.steps += system.steps
        return [a + at[0][2], slopes_ts, *made]

    def state(self, t: Tensor, y: Tensor | None) -> Tensor:
        """The state at a time of the backward solve, where y is the one that is solved with it."""
        assert y is not None
        return y

    def solved(self, y: Tensor) -> list[Tensor]:
        """What is solved beside the adjoint."""
        return [y]


class _Along(_Continuous):
    """The same along the steps of the forward solve."""

    def __init__(self, problem: Problem, how: Backsolve):
        super().__init__(problem, how)
        self.attempts: list[Attempt] = []
        self.ends: list[float] = []
        self.sign = problem.schedule.sign

    def observe(self, attempt: Attempt, passed: int) -> None:
        if attempt.accepted:
            self.attempts.append(attempt)
            self.ends.append(attempt.t1 * self.sign)

    def state(self, t: Tensor, y: Tensor | None) -> Tensor:
        time = float(t)
        attempt = self.attempts[min(bisect.bisect_left(self.ends, time * self.sign), len(self.attempts) - 1)]
        theta = (time - attempt.u0) / (attempt.u1 - attempt.u0)
        return attempt.step.dense(torch.tensor([theta], dtype=torch.float64, device=t.device))[0]

    def solved(self, y: Tensor) -> list[Tensor]:
        return []


class _System:
    """The adjoint equation of a problem."""

    def __init__(self, tape: _Continuous, problem: Problem, inputs: Inputs):
        self.tape, self.problem, self.inputs, self.how = tape, problem, inputs, tape.how
        self.field = replay_field(problem, inputs.args, pure=True)
        self.steps, self.checked = 0, False

    def along(self, t: float, y: Tensor, cotangent: Tensor) -> Tensor:
        """The product of a gradient and the slope at a state."""
        return (cotangent.conj() * self.field(self.field.time(t), y)).real.sum()

    def slope(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        beside = len(state) - 1 - len(self.inputs.tensors)
        a = state[beside]
        y = self.tape.state(t, state[0] if beside else None).detach().requires_grad_()
        with torch.enable_grad():
            slope = self.field(self.field.time(t), y)
        into = [y, *self.inputs.tensors]
        if not self.checked and self.inputs.searched:
            refuse_unknown([slope], into)
            self.checked = True
        made: Any = [None] * len(into)
        if slope.requires_grad:
            into = [x for x in into if x.requires_grad]
            found = iter(torch.autograd.grad(slope, into, a, retain_graph=self.inputs.shared, allow_unused=True))
            made = [next(found) if x.requires_grad else None for x in (y, *self.inputs.tensors)]
        like = (a, *self.inputs.tensors)
        rates = [torch.zeros_like(x) if g is None else -g for g, x in zip(made, like, strict=True)]
        return (*([slope.detach()] if beside else []), *rates)

    def back(self, t1: float, t0: float, y: Tensor, a: Tensor, made: list[Tensor]) -> list[Tensor]:
        """From t1 back to t0: the adjoint, and the gradients made so far."""
        problem, how = self.problem, self.how
        schedule, solver = problem.schedule, how.solver or problem.solver
        first = tuple(x.detach() for x in (*self.tape.solved(y), a, *made))
        layout = Layout(first)
        adaptive = schedule.norm is not None and solver.error_order
        marks = dict(zip(_listed(schedule.stops), schedule.jumps or [False] * len(schedule.stops), strict=False))
        between = [t for t in reversed(marks) if (t - t0) * schedule.sign > 0 and (t1 - t) * schedule.sign > 0]
        rtol = schedule.rtol if how.rtol is None else how.rtol
        atol = schedule.atol if how.atol is None else how.atol
        if isinstance(rtol, Tensor) or isinstance(atol, Tensor):
            raise UsageError(
                "adjoint: tolerances that are trees need their own going back", "Backsolve(rtol=..., atol=...)"
            )
        back = Schedule(
            t1, [*between, t0], (*(marks[t] for t in between), False), -schedule.sign, rtol, atol,
            self._norm(layout) if adaptive else None, schedule.max_steps,
        )  # fmt: skip
        field = Field(self.slope, layout, (), back.context(pure=False))
        attempts = advance(field, solver, how.controller or problem.control, back, layout.flat(first), Joint())
        while True:
            try:
                self.steps += bool(next(attempts).accepted)
            except StopIteration as stop:
                end: End = stop.value
                break
        if end.status != Status.SUCCESS:
            raise NumericalError(
                f"the adjoint equation could not be solved back beyond t = {end.t:.6g}: {Status(end.status).name}",
                'adjoint="checkpoint"',
            )
        return [x.to(g.dtype) for x, g in zip(layout.tree(end.y), first, strict=True)][len(self.tape.solved(y)) :]

    def _norm(self, layout: Layout) -> Any:
        """The largest root mean square of the parts; with the seminorm, of state and adjoint."""
        count = len(self.tape.solved(self.problem.y)) + 1 if self.how.seminorm else len(layout.sizes)

        def norm(error: Tensor) -> Tensor:
            parts = error.split(layout.sizes)[:count]
            return torch.stack([p.abs().square().mean().sqrt() for p in parts]).amax()

        return norm


def _listed(stops: Any) -> list[float]:
    return stops.tolist() if isinstance(stops, Tensor) else list(stops)
