"""A call of torchdiffeq's functions, checked in its words and with its types of errors."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pfode.compat.torchdiffeq.names import CALLBACKS, METHODS, OPTIONS, SUPPORTED
from pfode.errors import NumericalError, PfodeError, UsageError

__all__ = [
    "EventError",
    "Problem",
    "SolveError",
    "checked",
    "event_values",
    "flattened",
    "in_memory",
    "need",
    "rms",
    "split",
]


class CheckError(UsageError, AssertionError):
    """A wrong argument, where torchdiffeq asserts."""


class DtypeError(UsageError, TypeError):
    """A wrong dtype, where torchdiffeq raises TypeError."""


class ShapeError(UsageError, RuntimeError):
    """A field whose result has another shape than the state, where torchdiffeq raises RuntimeError."""


class SolveError(NumericalError, AssertionError):
    """A solve that failed, where torchdiffeq asserts."""


class EventError(PfodeError, RuntimeError):
    """No event within the steps allowed."""


def need(condition: Any, message: str) -> None:
    if not condition:
        raise CheckError(message)


@dataclass
class Problem:
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
        (slope,) = like((self.func(t, y),), [self.y0.shape])
        return slope

    def tree(self, flat: Tensor) -> Any:
        """The user's form of states with any dimensions before them."""
        return flat if self.shapes is None else split(flat, self.shapes)


def checked(
    func: Callable[..., Any],
    y0: Any,
    t: Any,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: dict[str, Any] | None,
    event_fn: Callable[..., Tensor] | None,
) -> Problem:
    """Check a call, with torchdiffeq's words."""
    if event_fn is not None and len(t) != 2:
        raise UsageError(f"We require len(t) == 2 when in event handling mode, but got len(t)={len(t)}.")
    shapes, flat_func, state = None, func, y0
    if not isinstance(y0, Tensor):
        need(isinstance(y0, tuple), "y0 must be either a torch.Tensor or a tuple")
        shapes = [part.shape for part in y0]
        rtol, atol = _tolerance("rtol", rtol, shapes), _tolerance("atol", atol, shapes)
        state = flattened(y0)

        def flat_func(t: Tensor, y: Tensor) -> Tensor:
            return flattened(like(func(t, split(y, shapes)), shapes))

    method = "dopri5" if method is None else method
    if method not in METHODS:
        raise UsageError('Invalid method "{}". Must be one of {}.'.format(method, '{"' + '", "'.join(METHODS) + '"}'))
    options = dict(options or {})
    norm = options.pop("norm", None)
    if shapes is not None:
        user_norm, tuple_shapes = norm or _mixed_norm, shapes
        norm = lambda flat: user_norm(split(flat, tuple_shapes))  # noqa: E731
    need(isinstance(t, Tensor), "t must be a torch.Tensor")
    if not t.is_floating_point():
        raise DtypeError(f"`t` must be a floating point Tensor but is a {t.type()}")
    need(t.ndim == 1, "t must be one dimensional")
    gaps = t.detach().diff()
    need((gaps > 0).all() or (gaps < 0).all(), "t must be strictly increasing or decreasing")
    for name, value in (("rtol", rtol), ("atol", atol)):
        need(not (isinstance(value, Tensor) and value.requires_grad), f"{name} cannot require gradient")
    if t.device != state.device:
        warnings.warn("t is not on the same device as y0. Coercing to y0.device.", stacklevel=3)
        t = t.to(state.device)
    callbacks = {name: getattr(func, name) for name in CALLBACKS if hasattr(func, name)}
    group = METHODS[method].group
    if extra := set(callbacks) - SUPPORTED.get(group, {"callback_step"}):
        warnings.warn(f"Solver '{method}' does not support callbacks {extra}", stacklevel=3)
    if unused := {name: options.pop(name) for name in set(options) - OPTIONS[group]}:
        warnings.warn(f"{METHODS[method].label}: Unexpected arguments {unused}", stacklevel=3)
    return Problem(flat_func, state, t, rtol, atol, method, options, shapes, norm, callbacks)


def _tolerance(name: str, value: Any, shapes: list[torch.Size]) -> Any:
    if not isinstance(value, Sequence) and not (isinstance(value, Tensor) and value.ndim):
        return value
    need(len(value) == len(shapes), f"If using tupled {name} it must have the same length as the tuple y0")
    return torch.cat([in_memory(v).expand(shape.numel()) for v, shape in zip(value, shapes, strict=True)])


def in_memory(value: Any) -> Tensor:
    """A tensor as it is, a number or an array on the CPU, whatever the default device."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def event_values(event_fn: Callable[..., Tensor], t: Tensor, y: Any) -> Tensor:
    """The components of an event function, shape (k,), real: of a condition that is true or false, 1 and -1."""
    value = in_memory(event_fn(t, y)).reshape(-1)
    if value.dtype == torch.bool:
        return torch.where(value, 1.0, -1.0)
    return value if value.is_floating_point() else value.to(torch.float32)


def like(parts: Any, shapes: list[torch.Size]) -> Any:
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
    raise ShapeError(
        f"func must return tensors of the shapes of y0, {need}; got {got}", "return dy/dt, a tensor or tuple like y0"
    )


def rms(x: Tensor) -> Tensor:
    return x.abs().pow(2).mean().sqrt()


def _mixed_norm(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([rms(part) for part in parts]).max()


def flattened(parts: Any, lead: int = 0) -> Tensor:
    """A tuple as one tensor, its first `lead` dimensions kept."""
    return torch.cat([part.reshape(*part.shape[:lead], -1) for part in parts], -1)


def split(flat: Tensor, shapes: list[torch.Size]) -> tuple[Tensor, ...]:
    """The tuple of a flat tensor: views of its slices."""
    parts, done = [], 0
    for shape in shapes:
        part = flat[..., done : done + shape.numel()]
        parts.append(part.view(*flat.shape[:-1], *shape) if flat.ndim > 1 or shape else part.view(()))
        done += shape.numel()
    return tuple(parts)
