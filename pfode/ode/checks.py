"""What `solve` asks of its arguments before anything runs: each mistake is one error with cause, value and remedy."""

import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pfode.errors import UsageError, did_you_mean, unknown
from pfode.ode.control import CONTROLLERS, PID
from pfode.ode.solver import Solver

__all__ = ["controller", "field", "finite_times", "norm", "reals", "refuse", "solver"]

_ELSEWHERE = {  # what other libraries take as options of their own
    **dict.fromkeys(("first_step", "min_step", "max_step", "safety"), "controller=PID({name}=...)"),
    **dict.fromkeys(("ifactor", "dfactor"), "controller=PID(grow=10.0, shrink=0.2)"),
    **dict.fromkeys(("t_eval", "saveat", "t", "t_span"), "ts=..., the output times"),
    **dict.fromkeys(("tol", "tolerance"), "rtol=..., atol=..."),
    **dict.fromkeys(("max_num_steps", "max_iter"), "max_steps=..."),
}


def refuse(options: dict[str, Any], known: Iterable[str]) -> None:
    """Raise UsageError for options that nobody knows."""
    for name, value in options.items():
        hint = _ELSEWHERE.get(name, "").format(name=name) or did_you_mean(name, known)
        raise UsageError(f"unknown option {name!r} ({value!r:.40})", hint)


def reals(name: str, value: Any, example: str) -> Tensor:
    """Numbers as a tensor, in float64 unless they are one already.

    Raises:
        UsageError: they are none.
    """
    try:
        found = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UsageError(f"{name}: need real numbers, got {value!r:.60}", f"{name}={example}") from error
    if found.is_meta or found.layout != torch.strided:
        raise UsageError(
            f"{name}: need numbers in memory, got a {found.device} tensor, {found.layout}", f"{name}={example}"
        )
    if found.is_complex():
        raise UsageError(f"{name}: need real numbers, got {found.dtype}", f"{name}={name}.real")
    return found


def finite_times(name: str, value: Any) -> list[float]:
    """Times, in any order, as floats.

    Raises:
        UsageError: no numbers, or not finite.
    """
    times = reals(name, value, "[0.5]").detach().to(torch.float64)
    if times.ndim > 1 or not torch.isfinite(times).all():
        raise UsageError(f"{name}: need a list of finite times, got {times.tolist()!r:.80}", f"{name}=[0.5]")
    return times.reshape(-1).tolist()


def field(f: Any, args: tuple[Any, ...]) -> None:
    """Raise UsageError for an f that cannot be called as f(t, y, *args)."""
    if not callable(f) or isinstance(f, type):
        got = f"the class {f.__name__}" if isinstance(f, type) else type(f).__name__
        raise UsageError(f"f: need a function (t, y, *args), got {got}", "f=lambda t, y: -y")
    if _takes(f, 2 + len(args)):
        return
    try:
        call = inspect.signature(f.forward if isinstance(f, torch.nn.Module) else f)
    except (TypeError, ValueError):  # of a built-in, which does not tell
        return
    try:
        call.bind(None, None, *args)
    except TypeError as error:
        name = getattr(f, "__name__", type(f).__name__)
        problem = f"f: cannot call {name}{call} as f(t, y, *args) with {len(args)} args: {error}"
        raise UsageError(problem, "def f(t, y): ..., and args=(a, b) for what comes after y") from error


def _takes(f: Any, count: int) -> bool:
    """Whether f is written in Python and takes so many positional arguments: what `inspect` finds out slowly."""
    call = f.forward if isinstance(f, torch.nn.Module) else f if isinstance(f, types.FunctionType) else f.__call__
    bound = isinstance(call, types.MethodType)
    call = call.__func__ if isinstance(call, types.MethodType) else call
    if not isinstance(call, types.FunctionType) or hasattr(call, "__wrapped__"):
        return False
    most, named = call.__code__.co_argcount - bound, call.__code__.co_kwonlyargcount
    return most - len(call.__defaults__ or ()) <= count <= most and named == len(call.__kwdefaults__ or ())


def solver(method: Any) -> Solver:
    """A method that is given as an object.

    Raises:
        UsageError: it is no Solver.
    """
    if isinstance(method, type) or not all(hasattr(method, name) for name in ("init", "step", "error_order")):
        raise UsageError(f"method: need a name or a Solver, got {method!r:.60}", 'method="dopri5"')
    return method


def controller(given: Any) -> PID:
    """The controller, by its name or as it is; the integral one for None.

    Raises:
        UsageError: no controller.
    """
    if isinstance(given, str):
        if given not in CONTROLLERS:
            raise unknown("controller", given, CONTROLLERS)
        return CONTROLLERS[given]
    if given is not None and not isinstance(given, PID):
        raise UsageError(f"controller: need a PID, got {given!r:.60}", "controller=PI(), or PID(first_step=0.1)")
    return PID() if given is None else given


def norm(given: Any, shape: tuple[int, ...]) -> Callable[[Any], Tensor]:
    """A norm that is held to the shape it must return.

    Raises:
        UsageError: no function; when called, a result of another shape.
    """
    hint = "norm=lambda e: e.square().mean().sqrt()" if shape == () else "norm=lambda e: e.flatten(1).norm(dim=1)"
    if not callable(given):
        raise UsageError(f"norm: need a function of the error, got {given!r:.60}", hint)

    def measured(error: Any) -> Tensor:
        value = given(error)
        if not isinstance(value, Tensor) or value.shape != shape or value.is_complex():
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"norm: need a real tensor of shape {shape} from it, got {got}", hint)
        return value

    return measured
