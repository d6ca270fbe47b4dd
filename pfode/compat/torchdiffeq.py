"""torchdiffeq's names on pfode's solvers: `import pfode.compat.torchdiffeq as torchdiffeq`.

`odeint`, `odeint_adjoint`, `odeint_event` and `odeint_dense` take the arguments, methods, options, callbacks and norms
of torchdiffeq (0.2.5 and the implicit methods after it), return the same shapes and raise errors of the same types with
the same words. What differs is in the numbers, where torchdiffeq's are at fault: a solve ends at t[-1] and evaluates
nothing beyond, adaptive methods have output times in between from dense output of their own order, tsit5 and gl4 have
orders 5 and 4, explicit_adams converges, implicit steps are solved to rounding by Newton's method, a state that is not
finite ends the solve, an event function that is zero at the start does not, and gradients reach the parameters of event
functions.

A tuple state is one flat tensor here, as it is there: norms, adjoint norms and `grad_fn` see it so.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pfode.errors import NumericalError, PfodeError, UsageError
from pfode.ode import PID, SOLVERS, Solver, Status, Step, solve, steps
from pfode.ode.events import Event
from pfode.ode.methods.multistep import MOST, Adams
from pfode.ode.methods.scipy import Scipy
from pfode.ode.solve import MAX_STEPS
from pfode.ode.solver import hermite

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]


class _Method(NamedTuple):
    """A method: pfode's name, the group it shares its options with, and torchdiffeq's class, for warnings."""

    solver: str
    group: str
    label: str


METHODS = {
    "dopri8": _Method("dopri8", "adaptive", "Dopri8Solver"),
    "dopri5": _Method("dopri5", "adaptive", "Dopri5Solver"),
    "tsit5": _Method("tsit5", "adaptive", "Tsit5Solver"),
    "bosh3": _Method("bosh3", "adaptive", "Bosh3Solver"),
    "fehlberg2": _Method("fehlberg2", "adaptive", "Fehlberg2"),
    "adaptive_heun": _Method("adaptive_heun", "adaptive", "AdaptiveHeunSolver"),
    "euler": _Method("euler", "fixed", "Euler"),
    "midpoint": _Method("midpoint", "fixed", "Midpoint"),
    "heun2": _Method("heun2", "fixed", "Heun2"),
    "heun3": _Method("heun3", "fixed", "Heun3"),
    "rk4": _Method("rk4-38", "fixed", "RK4"),
    "explicit_adams": _Method("explicit_adams", "adams", "AdamsBashforth"),
    "implicit_adams": _Method("implicit_adams", "adams", "AdamsBashforthMoulton"),
    "implicit_euler": _Method("implicit_euler", "implicit", "ImplicitEuler"),
    "implicit_midpoint": _Method("implicit_midpoint", "implicit", "ImplicitMidpoint"),
    "trapezoid": _Method("trapezoid", "implicit", "Trapezoid"),
    "radauIIA3": _Method("radauIIA3", "implicit", "RadauIIA3"),
    "gl4": _Method("gl4", "implicit", "GaussLegendre4"),
    "radauIIA5": _Method("radauIIA5", "implicit", "RadauIIA5"),
    "gl6": _Method("gl6", "implicit", "GaussLegendre6"),
    "sdirk2": _Method("sdirk2", "implicit", "SDIRK2"),
    "trbdf2": _Method("trbdf2", "implicit", "TRBDF2"),
    "fixed_adams": _Method("implicit_adams", "adams", "AdamsBashforthMoulton"),
    "scipy_solver": _Method("scipy", "scipy", "ScipyWrapperODESolver"),
}
_FIXED = {"step_size", "grid_constructor", "interp", "perturb"}
_OPTIONS = {
    "adaptive": {
        *("first_step", "min_step", "max_step", "safety", "ifactor", "dfactor", "max_num_steps", "dtype"),
        *("step_t", "jump_t"),
    },
    "fixed": _FIXED,
    "adams": {*_FIXED, "max_order", "max_iters"},
    "implicit": {*_FIXED, "max_iters"},
    "scipy": {"solver", "min_step", "max_step", "grid_points", "eps"},
}
_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
_SUPPORTED = {"adaptive": set(_CALLBACKS), "scipy": set[str]()}  # the others: callback_step
_MAX_STEPS = 2**31 - 1
_MAX_EVENT_STEPS = 20000
_MIN_ORDER, _MAX_ORDER = 4, 12  # of Adams methods
_FAR = 2.0**120  # an event may be anywhere: a time beyond all of them that float32 still has


class _CheckError(UsageError, AssertionError):
    """A wrong argument, where torchdiffeq asserts."""


class _DtypeError(UsageError, TypeError):
    """A wrong dtype, where torchdiffeq raises TypeError."""


class _ShapeError(UsageError, RuntimeError):
    """A field whose result has another shape than the state, where torchdiffeq raises RuntimeError."""


class _SolveError(NumericalError, AssertionError):
    """A solve that failed, where torchdiffeq asserts."""


def _need(condition: Any, message: str) -> None:
    if not condition:
        raise _CheckError(message)


@dataclass
class _Problem:
    """A call, checked, its state one tensor.

    Attributes:
        func: (t, y) -> dy/dt for y like y0; `shapes` are those of the user's tuple, None for a tensor.
        norm: of a tensor like y0, or None for the default.
        callbacks: the user's, by name, on tensors like y0.
        inside: the ends of the step that is being made, as the field sees them, where times are perturbed.
    """

    func: Callable[[Tensor, Tensor], Tensor]
    y0: Tensor
    t: Tensor
    rtol: Any
    atol: Any
    method: str
    options: dict[str, Any]
    shapes: list[torch.Size] | None
    norm: Callable[[Tensor], Tensor] | None
    callbacks: dict[str, Callable[..., Any]]
    inside: tuple[Any, Any] = field(default=(None, None))

    @property
    def sign(self) -> float:
        return -1.0 if len(self.t) > 1 and bool(self.t[-1] < self.t[0]) else 1.0

    def slope(self, t: Tensor, y: Tensor) -> Tensor:
        """func(t, y).

        Raises:
            UsageError: it is no tensor, or of another shape than y0 (nothing is broadcast).
        """
        (slope,) = _like((self.func(t, y),), [self.y0.shape])
        return slope

    def tree(self, flat: Tensor) -> Any:
        """The user's form of states with any dimensions before them."""
        return flat if self.shapes is None else _split(flat, self.shapes)


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
    problem = _problem(func, y0, t, rtol, atol, method, options, event_fn)
    if event_fn is None:
        return problem.tree(_integrate(problem))
    event_t, ys = _integrate_to_event(problem, event_fn)
    return event_t, problem.tree(ys)


def odeint_adjoint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Any = None,
) -> Any:
    """`odeint` with gradients by solving the adjoint ODE backwards (Chen et al. 2018): no memory per step, and no more
    accurate than the tolerances.

    Args:
        adjoint_rtol, adjoint_atol, adjoint_method: of the backward solve; by default those of the forward one.
        adjoint_options: of the backward solve; by default `options` without the norm. `norm` gets the tuple
            (t, y, adj_y, *adj_params); "seminorm" is the default norm without the parameters.
        adjoint_params: tensors that get gradients; by default func's parameters.

    Raises:
        ValueError, TypeError, AssertionError: as torchdiffeq does; all are PfodeErrors too.
    """
    if adjoint_params is None and not isinstance(func, torch.nn.Module):
        raise UsageError(
            "func must be an instance of nn.Module to specify the adjoint parameters; alternatively they can be "
            "specified explicitly via the `adjoint_params` argument. If there are no parameters then it is allowable "
            "to set `adjoint_params=()`."
        )
    adjoint_method = method if adjoint_method is None else adjoint_method
    if adjoint_method != method and options is not None and adjoint_options is None:
        raise UsageError(
            "If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`. So as `options` has "
            "been passed then `adjoint_options` must be passed as well."
        )
    if adjoint_options is None:
        adjoint_options = {name: value for name, value in (options or {}).items() if name != "norm"}
    found = _parameters(func) if adjoint_params is None else tuple(adjoint_params)
    params = tuple(p for p in found if p.requires_grad)
    if len(params) != len(found) and callable(adjoint_options.get("norm")):
        warnings.warn(
            "An adjoint parameter was passed without requiring gradient. For efficiency this will be excluded from the "
            "adjoint pass, and will not appear as a tensor in the adjoint norm.",
            stacklevel=2,
        )
    problem = _problem(func, y0, t, rtol, atol, method, options, event_fn)
    backward = {
        "rtol": rtol if adjoint_rtol is None else adjoint_rtol,
        "atol": atol if adjoint_atol is None else adjoint_atol,
        "method": adjoint_method,
        "options": {**adjoint_options, "norm": _adjoint_norm(adjoint_options.get("norm"), problem)},
        "callbacks": {
            name: getattr(func, f"{name}_adjoint") for name in _CALLBACKS if hasattr(func, f"{name}_adjoint")
        },
    }
    out = _Backsolve.apply(problem, backward, event_fn, problem.y0, problem.t, *params)
    if event_fn is None:
        return problem.tree(out)
    event_t, ys = out
    return event_t, problem.tree(ys)


def odeint_event(
    func: Callable[..., Any],
    y0: Any,
    t0: Tensor,
    *,
    event_fn: Callable[..., Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> Any:
    """The time and states of an event, with gradients through the time: by the implicit function theorem, to y0, t0 and
    the parameters of func and of event_fn.

    Args:
        t0: the start, one element.
        reverse_time: solve towards smaller times.
        odeint_interface: `odeint`, `odeint_adjoint` or a function with their arguments.

    Returns:
        (event time, states at the start and at the event).
    """
    start = t0.reshape(-1)
    t = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    event_t, ys = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    problem = _problem(func, y0, t, 0.0, 0.0, None, None, None)
    flat = ys if problem.shapes is None else _flat(ys, 1)
    y, time = flat[-1], event_t.detach()
    with torch.enable_grad():
        at, state = time.clone().requires_grad_(), y.detach().requires_grad_()
        values = _event_values(event_fn, at, problem.tree(state))
        if not values.requires_grad:  # true or false: no derivative says how the time moves
            return event_t, ys
        met = int(values.detach().abs().argmin())
        g_t, g_y = torch.autograd.grad(values[met], (at, state), allow_unused=True)
    with torch.no_grad():
        slope = problem.func(time.to(state.abs().dtype), state.detach())
        rate = torch.zeros((), dtype=values.dtype, device=values.device) if g_t is None else g_t
        rate = rate + (0.0 if g_y is None else (g_y.conj() * slope).real.sum())
    moved = _event_values(event_fn, time, problem.tree(y))[met]
    shift = -(moved - moved.detach()) / torch.where(rate == 0, math.inf, rate)
    event_t = time + shift.to(time.dtype)
    flat = torch.cat([flat[:-1], (y + slope * shift.to(y.abs().dtype))[None]])
    return event_t, problem.tree(flat)


def odeint_dense(
    func: Callable[..., Any],
    y0: Any,
    t0: Tensor,
    t1: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[[Tensor], Any]:
    """The solution between t0 and t1 as a function of times: shape () gives a state, (m,) states (m, *y0.shape)."""
    t = torch.stack([torch.as_tensor(t0), torch.as_tensor(t1)]).reshape(-1)
    problem = _problem(func, y0, t, rtol, atol, method, options, None)
    arguments = _arguments(problem)
    for name in ("norm", "throw", "adjoint"):
        arguments.pop(name, None)
    points = list(steps(_field(problem), problem.y0, **arguments))
    ends = torch.tensor([point.t1 for point in points], dtype=torch.float64, device="cpu")
    first, sign = float(t[0]), problem.sign

    def dense(t_eval: Tensor) -> Any:
        times = torch.as_tensor(t_eval, dtype=torch.float64).reshape(-1)
        inside = ((times - first) * sign >= 0) & ((ends[-1] - times) * sign >= 0)
        _need(inside.all(), f"invalid interpolation, fails `t0 <= t <= t1`: {first}, {t_eval}, {float(ends[-1])}")
        which = torch.searchsorted(ends * sign, times * sign).tolist()
        found = [points[k].at(time).to(problem.y0.dtype) for k, time in zip(which, times.tolist(), strict=True)]
        return problem.tree(torch.stack(found).reshape(*torch.as_tensor(t_eval).shape, *problem.y0.shape))

    return dense


def _problem(
    func: Callable[..., Any],
    y0: Any,
    t: Any,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: dict[str, Any] | None,
    event_fn: Callable[..., Tensor] | None,
) -> _Problem:
    """Check a call, with torchdiffeq's words."""
    if event_fn is not None and len(t) != 2:
        raise UsageError(f"We require len(t) == 2 when in event handling mode, but got len(t)={len(t)}.")
    shapes, flat_func, state = None, func, y0
    if not isinstance(y0, Tensor):
        _need(isinstance(y0, tuple), "y0 must be either a torch.Tensor or a tuple")
        shapes = [part.shape for part in y0]
        rtol, atol = _tolerance("rtol", rtol, shapes), _tolerance("atol", atol, shapes)
        state = _flat(y0)

        def flat_func(t: Tensor, y: Tensor) -> Tensor:
            return _flat(_like(func(t, _split(y, shapes)), shapes))

    method = "dopri5" if method is None else method
    if method not in METHODS:
        raise UsageError('Invalid method "{}". Must be one of {}.'.format(method, '{"' + '", "'.join(METHODS) + '"}'))
    options = dict(options or {})
    norm = options.pop("norm", None)
    if shapes is not None:
        user_norm, tuple_shapes = norm or _mixed_norm, shapes
        norm = lambda flat: user_norm(_split(flat, tuple_shapes))  # noqa: E731
    _need(isinstance(t, Tensor), "t must be a torch.Tensor")
    if not t.is_floating_point():
        raise _DtypeError(f"`t` must be a floating point Tensor but is a {t.type()}")
    _need(t.ndim == 1, "t must be one dimensional")
    gaps = t.detach().diff()
    _need((gaps > 0).all() or (gaps < 0).all(), "t must be strictly increasing or decreasing")
    for name, value in (("rtol", rtol), ("atol", atol)):
        _need(not (isinstance(value, Tensor) and value.requires_grad), f"{name} cannot require gradient")
    if t.device != state.device:
        warnings.warn("t is not on the same device as y0. Coercing to y0.device.", stacklevel=3)
        t = t.to(state.device)
    callbacks = {name: getattr(func, name) for name in _CALLBACKS if hasattr(func, name)}
    group = METHODS[method].group
    if extra := set(callbacks) - _SUPPORTED.get(group, {"callback_step"}):
        warnings.warn(f"Solver '{method}' does not support callbacks {extra}", stacklevel=3)
    if unused := {name: options.pop(name) for name in set(options) - _OPTIONS[group]}:
        warnings.warn(f"{METHODS[method].label}: Unexpected arguments {unused}", stacklevel=3)
    return _Problem(flat_func, state, t, rtol, atol, method, options, shapes, norm, callbacks)


def _tolerance(name: str, value: Any, shapes: list[torch.Size]) -> Any:
    if not isinstance(value, Sequence) and not (isinstance(value, Tensor) and value.ndim):
        return value
    _need(len(value) == len(shapes), f"If using tupled {name} it must have the same length as the tuple y0")
    return torch.cat([torch.as_tensor(v).expand(shape.numel()) for v, shape in zip(value, shapes, strict=True)])


def _integrate(problem: _Problem) -> Tensor:
    """States at all times, shape (times, *y0.shape)."""
    if len(problem.t) == 1:
        return problem.y0[None]
    if METHODS[problem.method].group == "scipy":
        with torch.no_grad():
            solution = solve(_field(problem), problem.y0.detach(), **_arguments(problem, problem.t.detach()))
    else:
        solution = solve(_field(problem), problem.y0, **_arguments(problem))
    _check(problem, solution)
    return solution.ys.to(problem.y0.dtype)


def _integrate_to_event(problem: _Problem, event_fn: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """The event's time, and the states at the start and there, (2, *y0.shape)."""
    group, sign, start = METHODS[problem.method].group, problem.sign, problem.t[:1]
    if group == "scipy":
        raise UsageError("scipy_solver has no events", 'method="dopri5"')
    far = _FAR
    if group != "adaptive":
        _need(
            problem.options.get("step_size") is not None,
            "Event handling for fixed step solvers currently requires `step_size` to be provided in options.",
        )
        far = _MAX_EVENT_STEPS * float(problem.options["step_size"])
    t = torch.cat([start, start.detach() + sign * far])

    def condition(t: Tensor, y: Tensor) -> Tensor:
        return _event_values(event_fn, t, problem.tree(y))

    arguments = {**_arguments(problem, t), "events": Event(condition, gradient=False)}
    if group == "adaptive" and "max_num_steps" not in problem.options:  # for an event that never comes
        arguments["max_steps"] = MAX_STEPS
    solution = solve(_field(problem), problem.y0, **arguments)
    _check(problem, solution)
    if solution.status != Status.EVENT:
        if group == "adaptive":
            raise _SolveError("the event function does not change sign at any time")
        raise _EventError(f"Reached maximum number of iterations {_MAX_EVENT_STEPS}.")
    event_t = solution.events[0].t[-1].detach().to(problem.t.dtype)
    return event_t, torch.stack([problem.y0, solution.y.to(problem.y0.dtype)])


def _event_values(event_fn: Callable[..., Tensor], t: Tensor, y: Any) -> Tensor:
    """The components of an event function, shape (k,), real: of a condition that is true or false, 1 and -1."""
    value = torch.as_tensor(event_fn(t, y)).reshape(-1)
    if value.dtype == torch.bool:
        return torch.where(value, 1.0, -1.0)
    return value if value.is_floating_point() else value.to(torch.float32)


class _EventError(PfodeError, RuntimeError):
    """No event within the steps allowed."""


def _check(problem: _Problem, solution: Any) -> None:
    """Raise or warn what torchdiffeq does where a solve fails."""
    status = solution.status
    if METHODS[problem.method].group == "scipy":  # torchdiffeq returns fewer times, without a word
        if status != Status.SUCCESS:
            warnings.warn(f"scipy_solver {problem.options} did not reach the end: NaN after the start", stacklevel=4)
        return
    if status == Status.MIN_STEP:
        raise _SolveError(f"underflow in dt {problem.options.get('min_step', 0.0)}", f"it stopped at t = {solution.t}")
    if status == Status.NON_FINITE:
        raise _SolveError(f"non-finite values in state `y`: {solution.y}", f"it stopped at t = {solution.t}")
    if status == Status.MAX_STEPS:
        most = solution.stats.steps
        raise _SolveError(f"max_num_steps exceeded ({most}>={most})", f"it stopped at t = {solution.t}")
    if status == Status.NEWTON_FAILED:
        warnings.warn("Functional iteration did not converge. Solution may be incorrect.", stacklevel=4)


def _solver(problem: _Problem) -> Any:
    method, options = METHODS[problem.method], problem.options
    if method.group == "scipy":
        limits = {name: float(options[name]) for name in ("min_step", "max_step") if name in options}
        return Scipy(options.get("solver", "LSODA"), **limits)
    if method.group != "adams":
        return SOLVERS[method.solver]
    order = int(options.get("max_order", _MAX_ORDER))
    _need(order <= _MAX_ORDER, f"max_order must be at most {_MAX_ORDER}")
    if order < _MIN_ORDER:
        warnings.warn(f"max_order is below {_MIN_ORDER}, so the solver reduces to `rk4`.", stacklevel=4)
        return SOLVERS["rk4-38"]
    if method.solver == "explicit_adams":
        return Adams(min(order - 1, MOST), corrector=False, select=True)
    return Adams(min(order, MOST), iterations=int(options.get("max_iters", 1)), select=True)


def _arguments(problem: _Problem, t: Tensor | None = None) -> dict[str, Any]:
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
            watch = _Watch(problem, options.get("dtype"))
            control = _Observed(**{**vars(control), "watch": watch})
            solver = _Stepper(solver, problem, watch)
        found["controller"] = control
        found.update(_marked(options, t, problem.sign))
        norm = problem.norm
        found["norm"] = norm and (lambda state: torch.as_tensor(norm(state)))
        found["max_steps"] = min(int(options.get("max_num_steps", _MAX_STEPS)) * (len(t) - 1), _MAX_STEPS)
    elif group == "scipy":
        found["grid"] = t[[0, -1]]
    else:
        interp = options.get("interp", "linear")
        if interp not in ("linear", "cubic"):
            raise UsageError(f"Unknown interpolation method {interp}", 'interp="linear" or "cubic"')
        solver = _Stepper(solver, problem, _Watch(problem, t.dtype), interp)
        found["max_steps"] = _MAX_STEPS
        step_size, construct = options.get("step_size"), options.get("grid_constructor")
        if step_size is not None and construct is not None:
            raise UsageError("step_size and grid_constructor are mutually exclusive arguments.")
        if step_size is not None:
            found["step_size"] = float(step_size)
        else:
            grid = t.detach() if construct is None else construct(problem.func, problem.y0, t).detach().to(t)
            ends = grid[0] == t[0] and grid[-1] == t[-1]
            _need(ends, f"grid_constructor must return times from t[0] to t[-1], got {grid.tolist()!r:.80}")
            found["grid"] = grid
        problem.inside = (t[0].detach(), t[-1].detach())
    return {**found, "method": solver}


def _marked(options: dict[str, Any], t: Tensor, sign: float) -> dict[str, list[float]]:
    """step_t and jump_t from the start on."""
    found = {}
    for name in ("step_t", "jump_t"):
        if options.get(name) is not None:
            marks = torch.as_tensor(options[name]).detach().to("cpu", torch.float64).flatten()
            found[name] = marks[(marks - float(t[0])) * sign >= 0].tolist()
    together = [time for marks in found.values() for time in marks]
    if len(set(together)) < len(together):
        raise UsageError("`step_t` and `jump_t` must not have any repeated elements between them.")
    return found


def _field(problem: _Problem) -> Callable[[Tensor, Tensor], Tensor]:
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


class _Watch:
    """Calls callbacks as (t0, y0, dt), times in `dtype`: of the step begun, then of its verdict."""

    def __init__(self, problem: _Problem, dtype: torch.dtype | None):
        self.problem, self.dtype, self.last = problem, dtype or torch.float64, ()

    def begin(self, t0: Any, t1: Any, y0: Tensor) -> None:
        if self.problem.callbacks:
            start, end = (torch.as_tensor(t).detach().to(y0.device, self.dtype) for t in (t0, t1))
            y = y0.detach().view(self.problem.y0.shape).to(self.problem.y0.dtype)
            self.last = (start, self.problem.tree(y), (end - start).abs())
            self("callback_step")

    def __call__(self, name: str) -> None:
        if name in self.problem.callbacks:
            self.problem.callbacks[name](*self.last)


@dataclass(frozen=True)
class _Observed(PID):
    """A controller that tells the callbacks its verdicts."""

    watch: _Watch | None = None

    def factor(self, lanes: Any, error: Any, accepted: Any, memory: Any, order: int) -> Any:
        if self.watch is not None:
            self.watch("callback_accept_step" if accepted else "callback_reject_step")
        return super().factor(lanes, error, accepted, memory, order)


@dataclass(frozen=True, eq=False)
class _Stepper:
    """A solver that announces its steps and, on fixed grids, interpolates as torchdiffeq does."""

    solver: Solver
    problem: _Problem
    watch: _Watch
    interp: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.solver, name)

    def step(self, field: Any, t0: Any, t1: Any, y0: Tensor, carry: Any) -> Step:
        self.watch.begin(t0, t1, y0)
        start, end = (torch.as_tensor(t).detach().to(y0.device, field.layout.real) for t in (t0, t1))
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


class _Backsolve(torch.autograd.Function):
    """Solutions with gradients from the adjoint ODE; `grad_fn.adjoint_options` may be changed until backward."""

    @staticmethod
    def forward(
        ctx: Any, problem: _Problem, backward: dict[str, Any], event_fn: Any, y0: Tensor, t: Tensor, *params: Tensor
    ) -> Any:
        ctx.problem, ctx.arguments, ctx.event = problem, backward, event_fn is not None
        ctx.adjoint_options, ctx.wants_t = backward["options"], t.requires_grad
        with torch.no_grad():
            if event_fn is None:
                ys = _integrate(problem)
                ctx.save_for_backward(t, ys, *params)
                return ys.clone() if ys is y0 or ys._base is not None else ys
            event_t, ys = _integrate_to_event(problem, event_fn)
            ctx.save_for_backward(torch.stack([t[0], event_t]), ys, *params)
            return event_t, ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        t, ys, *params = ctx.saved_tensors
        grad_ys, func = grads[-1], ctx.problem.func
        wants_t = ctx.wants_t

        def augmented(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                time = t.detach().requires_grad_(wants_t)
                y = state[1].detach().requires_grad_()
                slope = func(time, y)
                inputs = (time, y, *params) if wants_t else (y, *params)
                found = [None] * len(inputs)
                if slope.requires_grad:
                    found = torch.autograd.grad(slope, inputs, -state[2], allow_unused=True)
            made = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
            at_t, *rest = made if wants_t else (torch.zeros_like(t), *made)
            return at_t, slope.detach(), *rest

        for name, callback in ctx.arguments["callbacks"].items():
            setattr(augmented, name, callback)
        at_t = torch.zeros((), dtype=ys.abs().dtype, device=ys.device)
        state = (at_t, ys[-1], grad_ys[-1], *(torch.zeros_like(p) for p in params))
        grad_t = torch.zeros_like(t) if wants_t else None
        for i in range(len(t) - 1, 0, -1):
            if grad_t is not None:
                slope = func(t[i].to(ys.abs().dtype), ys[i])
                grad_t[i] = (grad_ys[i].conj() * slope).real.sum().to(t.dtype)
                state = (state[0] - grad_t[i].to(at_t.dtype), *state[1:])
            out = odeint(
                augmented,
                state,
                torch.stack([t[i], t[i - 1]]),
                **{name: ctx.arguments[name] for name in ("rtol", "atol", "method")},
                options=ctx.adjoint_options,
            )
            now = [part[1] for part in out]
            state = (now[0].real if now[0].is_complex() else now[0], ys[i - 1], now[2] + grad_ys[i - 1], *now[3:])
        if grad_t is not None:
            grad_t[0] = state[0].to(t.dtype)
            if ctx.event:
                grad_t[1] = 0.0  # where the solve was to end had no effect
        grads_params = (
            g.real if g.is_complex() and not p.is_complex() else g for g, p in zip(state[3:], params, strict=True)
        )
        return None, None, None, state[2], grad_t, *grads_params


def _adjoint_norm(norm: Any, problem: _Problem) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """The norm of (t, y, adj_y, *adj_params)."""
    of_state = problem.norm or _rms

    def default(state: tuple[Tensor, ...]) -> Tensor:
        parts = [state[0].abs(), of_state(state[1]), of_state(state[2])]
        return torch.stack([*parts, *([] if norm == "seminorm" else map(_rms, state[3:]))]).max()

    if norm is None or norm == "seminorm":
        return default
    if problem.shapes is None:
        return norm
    shapes = problem.shapes
    return lambda state: norm((state[0], *_split(state[1], shapes), *_split(state[2], shapes), *state[3:]))


def _rms(x: Tensor) -> Tensor:
    return x.abs().pow(2).mean().sqrt()


def _mixed_norm(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([_rms(part) for part in parts]).max()


def _flat(parts: Any, lead: int = 0) -> Tensor:
    """A tuple as one tensor, its first `lead` dimensions kept."""
    return torch.cat([part.reshape(*part.shape[:lead], -1) for part in parts], -1)


def _split(flat: Tensor, shapes: list[torch.Size]) -> tuple[Tensor, ...]:
    """The tuple of a flat tensor: views of its slices."""
    parts, done = [], 0
    for shape in shapes:
        part = flat[..., done : done + shape.numel()]
        parts.append(part.view(*flat.shape[:-1], *shape) if flat.ndim > 1 or shape else part.view(()))
        done += shape.numel()
    return tuple(parts)


def _like(parts: Any, shapes: list[torch.Size]) -> Any:
    """The parts of a field's result, if they are tensors of these shapes.

    Raises:
        UsageError: another number of parts, no tensors, or other shapes.
    """
    found = [getattr(part, "shape", None) for part in parts] if isinstance(parts, tuple | list) else []
    if found == shapes and all(isinstance(part, Tensor) for part in parts):
        return parts
    got = ", ".join(
        f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
        for part in (parts if isinstance(parts, tuple | list) else (parts,))
    )
    need = ", ".join(str(tuple(shape)) for shape in shapes)
    raise _ShapeError(
        f"func must return tensors of the shapes of y0, {need}; got {got}", "return dy/dt, a tensor or tuple like y0"
    )


def _parameters(module: Any) -> tuple[Tensor, ...]:
    """Parameters; a replica of DataParallel has them as plain attributes."""
    if getattr(module, "_is_replica", False):
        inside = [value for part in module.modules() for value in vars(part).values()]
        return tuple(value for value in inside if isinstance(value, Tensor) and value.requires_grad)
    return tuple(module.parameters())
