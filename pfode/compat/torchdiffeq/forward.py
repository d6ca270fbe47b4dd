"""`odeint`: solutions, and those that end at an event, with gradients by differentiating the solver."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pfode.compat.torchdiffeq.names import METHODS
from pfode.compat.torchdiffeq.problem import EventError, Problem, SolveError, checked, event_values, need
from pfode.compat.torchdiffeq.stepping import MAX_STEPS, field_of, solve_options
from pfode.errors import UsageError
from pfode.ode import Event, Solution, Status, solve

__all__ = ["integrate", "integrate_to_event", "odeint"]

MAX_EVENT_STEPS = 20000
_FAR = 2.0**120  # an event may be anywhere: a time beyond all of them that float32 still has


def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
) -> Any:
    """Solve dy/dt = func(t, y), y(t[0]) = y0; gradients by differentiating the solver.

    Args:
        func: (t, y) -> a tensor, or tuple of tensors, like y; t has shape ().
        y0: a tensor or a tuple of tensors.
        t: times, rising or falling, shape (times,).
        rtol, atol: numbers or tensors without gradient; for a tuple also tuples of its length.
        method: a name in METHODS; None is "dopri5".
        options: of the method; unknown ones are warned about. max_iters is how often implicit_adams corrects; Newton's
            method has limits of its own.
        event_fn: (t, y) -> a tensor; the solve ends where its first component changes sign. t then is (start, any time
            in the direction of the solve); the event's time is a constant for gradients.

    Returns:
        Shape (times, *y0.shape), or a tuple of such; with event_fn (event time, states at start and event).

    Raises:
        ValueError, TypeError, AssertionError: as torchdiffeq does; all are PfodeErrors too.
    """
    problem = checked(func, y0, t, rtol, atol, method, options, event_fn)
    if event_fn is None:
        return problem.tree(integrate(problem))
    event_t, ys = integrate_to_event(problem, event_fn)
    return event_t, problem.tree(ys)


def integrate(problem: Problem) -> Tensor:
    """States at all times, shape (times, *y0.shape)."""
    if len(problem.t) == 1:
        return problem.y0[None]
    if METHODS[problem.method].group == "scipy":
        with torch.no_grad():
            solution = solve(field_of(problem), problem.y0.detach(), **solve_options(problem, problem.t.detach()))
    else:
        solution = solve(field_of(problem), problem.y0, **solve_options(problem))
    _check(problem, solution)
    return solution.ys.to(problem.y0.dtype)


def integrate_to_event(problem: Problem, event_fn: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """The event's time, and the states at the start and there, (2, *y0.shape)."""
    group, sign, start = METHODS[problem.method].group, problem.sign, problem.t[:1]
    if group == "scipy":
        raise UsageError("scipy_solver has no events", 'method="dopri5"')
    far = _FAR
    if group != "adaptive":
        need(
            problem.options.get("step_size") is not None,
            "Event handling for fixed step solvers currently requires `step_size` to be provided in options.",
        )
        far = MAX_EVENT_STEPS * float(problem.options["step_size"])
    t = torch.cat([start, start.detach() + sign * far])

    def condition(t: Tensor, y: Tensor) -> Tensor:
        return event_values(event_fn, t, problem.tree(y))

    options = {**solve_options(problem, t), "events": Event(condition, gradient=False)}
    if group == "adaptive" and "max_num_steps" not in problem.options:  # for an event that never comes
        options["max_steps"] = MAX_STEPS
    solution = solve(field_of(problem), problem.y0, **options)
    _check(problem, solution)
    if solution.status != Status.EVENT:
        if group == "adaptive":
            raise SolveError("the event function does not change sign at any time")
        raise EventError(f"Reached maximum number of iterations {MAX_EVENT_STEPS}.")
    event_t = solution.events[0].t[-1].detach().to(problem.t.dtype)
    return event_t, torch.stack([problem.y0, solution.y.to(problem.y0.dtype)])


def _check(problem: Problem, solution: Solution) -> None:
    """Raise or warn what torchdiffeq does where a solve fails."""
    status = solution.status
    if METHODS[problem.method].group == "scipy":  # torchdiffeq returns fewer times, without a word
        if status != Status.SUCCESS:
            warnings.warn(f"scipy_solver {problem.options} did not reach the end: NaN after the start", stacklevel=4)
        return
    if status == Status.MIN_STEP:
        raise SolveError(f"underflow in dt {problem.options.get('min_step', 0.0)}", f"it stopped at t = {solution.t}")
    if status == Status.NON_FINITE:
        raise SolveError(f"non-finite values in state `y`: {solution.y}", f"it stopped at t = {solution.t}")
    if status == Status.MAX_STEPS:
        most = solution.stats.steps
        raise SolveError(f"max_num_steps exceeded ({most}>={most})", f"it stopped at t = {solution.t}")
    if status == Status.NEWTON_FAILED:
        warnings.warn("Functional iteration did not converge. Solution may be incorrect.", stacklevel=4)
