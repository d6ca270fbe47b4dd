"""How pfode's `solve` is to step for a call: solver, controller, callbacks, and torchdiffeq's interpolation."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfode.compat.torchdiffeq.names import METHODS
from pfode.compat.torchdiffeq.problem import Problem, in_memory, need
from pfode.errors import UsageError
from pfode.ode import PID, SOLVERS, Solver, Step
from pfode.ode.methods.multistep import MOST, Adams
from pfode.ode.methods.scipy import Scipy
from pfode.ode.solver import hermite

__all__ = ["MAX_STEPS", "field_of", "solve_options"]

MAX_STEPS = 2**31 - 1
_MIN_ORDER, _MAX_ORDER = 4, 12  # of Adams methods


def _solver(problem: Problem) -> Any:
    method, options = METHODS[problem.method], problem.options
    if method.group == "scipy":
        limits = {name: float(options[name]) for name in ("min_step", "max_step") if name in options}
        return Scipy(options.get("solver", "LSODA"), **limits)
    if method.group != "adams":
        return SOLVERS[method.solver]
    order = int(options.get("max_order", _MAX_ORDER))
    need(order <= _MAX_ORDER, f"max_order must be at most {_MAX_ORDER}")
    if order < _MIN_ORDER:
        warnings.warn(f"max_order is below {_MIN_ORDER}, so the solver reduces to `rk4`.", stacklevel=4)
        return SOLVERS["rk4-38"]
    if method.solver == "explicit_adams":
        return Adams(min(order - 1, MOST), corrector=False, select=True)
    return Adams(min(order, MOST), iterations=int(options.get("max_iters", 1)), select=True)


def solve_options(problem: Problem, t: Tensor | None = None) -> dict[str, Any]:
    """Arguments of `solve` for a problem, over other times if given."""
    options, group = problem.options, METHODS[problem.method].group
    t = problem.t if t is None else t
    solver = _solver(problem)
    found: dict[str, Any] = {"ts": t, "rtol": problem.rtol, "atol": problem.atol, "adjoint": "direct", "throw": False}
    if group == "adaptive":
        limits = {
            "shrink": options.get("dfactor", 0.2),
            "grow": options.get("ifactor", 10.0),
            **{name: options[name] for name in ("first_step", "min_step", "max_step", "safety") if name in options},
        }
        limits = {name: float(value) for name, value in limits.items() if value is not None}
        control = PID(force=True, **limits)
        if problem.callbacks:
            callbacks = _Callbacks(problem, options.get("dtype"))
            control = _Observed(**{**vars(control), "callbacks": callbacks})
            solver = _Stepper(solver, problem, callbacks)
        found["controller"] = control
        found.update(_marked(options, t, problem.sign))
        norm = problem.norm
        found["norm"] = norm and (lambda state: in_memory(norm(state)))
        found["max_steps"] = min(int(options.get("max_num_steps", MAX_STEPS)) * (len(t) - 1), MAX_STEPS)
    elif group == "scipy":
        found["grid"] = t[[0, -1]]
    else:
        interp = options.get("interp", "linear")
        if interp not in ("linear", "cubic"):
            raise UsageError(f"Unknown interpolation method {interp}", 'interp="linear" or "cubic"')
        solver = _Stepper(solver, problem, _Callbacks(problem, t.dtype), interp)
        found["max_steps"] = MAX_STEPS
        step_size, construct = options.get("step_size"), options.get("grid_constructor")
        if step_size is not None and construct is not None:
            raise UsageError("step_size and grid_constructor are mutually exclusive arguments.")
        if step_size is not None:
            found["step_size"] = float(step_size)
        else:
            grid = t.detach() if construct is None else construct(problem.func, problem.y0, t).detach().to(t)
            ends = grid[0] == t[0] and grid[-1] == t[-1]
            need(ends, f"grid_constructor must return times from t[0] to t[-1], got {grid.tolist()!r:.80}")
            found["grid"] = grid
        problem.inside = (t[0].detach(), t[-1].detach())
    return {**found, "method": solver}


def _marked(options: dict[str, Any], t: Tensor, sign: float) -> dict[str, list[float]]:
    """step_t and jump_t from the start on."""
    found = {}
    for name in ("step_t", "jump_t"):
        if options.get(name) is not None:
            marks = in_memory(options[name]).detach().to("cpu", torch.float64).flatten()
            found[name] = marks[(marks - float(t[0])) * sign >= 0].tolist()
    together = [time for marks in found.values() for time in marks]
    if len(set(together)) < len(together):
        raise UsageError("`step_t` and `jump_t` must not have any repeated elements between them.")
    return found


def field_of(problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    """The field as `solve` takes it: with perturb, at the ends of a step the next value of t inside it."""
    if not problem.options.get("perturb"):
        return problem.slope

    def perturbed(t: Tensor, y: Tensor) -> Tensor:
        start, end = problem.inside
        with torch.no_grad():
            into = torch.where(t == start, end, torch.where(t == end, start, t)).to(t.dtype)
            move = torch.nextafter(t, into) - t
        return problem.slope(t + move, y)

    return perturbed


class _Callbacks:
    """Calls callbacks as (t0, y0, dt), times in `dtype`: of the step begun, then of its verdict."""

    def __init__(self, problem: Problem, dtype: torch.dtype | None):
        self.problem, self.dtype, self.last = problem, dtype or torch.float64, ()

    def begin(self, t0: Any, t1: Any, y0: Tensor) -> None:
        if self.problem.callbacks:
            start, end = (in_memory(t).detach().to(y0.device, self.dtype) for t in (t0, t1))
            y = y0.detach().view(self.problem.y0.shape).to(self.problem.y0.dtype)
            self.last = (start, self.problem.tree(y), (end - start).abs())
            self("callback_step")

    def __call__(self, name: str) -> None:
        if name in self.problem.callbacks:
            self.problem.callbacks[name](*self.last)


@dataclass(frozen=True)
class _Observed(PID):
    """A controller that tells the callbacks its verdicts."""

    callbacks: _Callbacks | None = None

    def factor(self, batching: Any, error: Any, accepted: Any, memory: Any, order: float) -> Any:
        if self.callbacks is not None:
            self.callbacks("callback_accept_step" if accepted else "callback_reject_step")
        return super().factor(batching, error, accepted, memory, order)


@dataclass(frozen=True, eq=False)
class _Stepper:
    """A solver that announces its steps and, on fixed grids, interpolates as torchdiffeq does."""

    solver: Solver
    problem: Problem
    callbacks: _Callbacks
    interp: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.solver, name)

    def step(self, field: Any, t0: Any, t1: Any, y0: Tensor, carry: Any) -> Step:
        self.callbacks.begin(t0, t1, y0)
        start, end = (in_memory(t).detach().to(y0.device, field.layout.real) for t in (t0, t1))
        self.problem.inside = start, end
        step = self.solver.step(field, t0, t1, y0, carry)
        if self.interp is None:
            return step

        def dense(theta: Tensor) -> Tensor:
            if self.interp == "linear":
                return torch.lerp(y0, step.y1, theta[..., None].to(y0.abs().dtype).to(y0.dtype))
            slopes = field(field.time(t0), y0).clone(), field(field.time(t1), step.y1).clone()
            return hermite(t1 - t0, y0, slopes[0], step.y1, slopes[1])(theta)

        return step._replace(dense=dense)
