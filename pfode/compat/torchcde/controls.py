"""torchcde's controls: modules around a `pfode.cde.Path`, which they make of coefficients."""

import abc
from typing import Any

import torch
from torch import Tensor

from pfode._torch import version
from pfode.cde import Path
from pfode.errors import PfodeError, UsageError

__all__ = ["CubicSpline", "InterpolationBase", "LinearInterpolation", "NaturalCubicSpline", "TupleControl"]


class GridError(PfodeError, RuntimeError):
    """Knots that several controls do not have in common, where torchcde raises RuntimeError."""


class InterpolationBase(torch.nn.Module, metaclass=abc.ABCMeta):
    """What a control has: `grid_points`, `interval`, `evaluate` and `derivative`."""

    @property
    @abc.abstractmethod
    def grid_points(self) -> Tensor: ...

    @property
    @abc.abstractmethod
    def interval(self) -> Tensor: ...

    @abc.abstractmethod
    def evaluate(self, t: Any) -> Any: ...

    @abc.abstractmethod
    def derivative(self, t: Any) -> Any: ...


class _Control(InterpolationBase):
    """A control that is a path, made of the module's buffers, again if these have changed."""

    _t: Tensor

    def _made(self) -> Path:
        raise NotImplementedError

    @property
    def path(self) -> Path:
        """The path."""
        buffers = list(self.buffers())
        key = [(id(b), b.is_inference() or version(b)) for b in buffers]
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] != key:
            kept = key, self._made(), buffers
            object.__setattr__(self, "_kept", kept)  # no part of the module's state
        return kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    @property
    def grid_points(self) -> Tensor:
        """The knots, shape (length,)."""
        return self._t

    @property
    def interval(self) -> Tensor:
        """First and last knot, shape (2,)."""
        return self._t[[0, -1]]

    def _interpret_t(self, t: Any) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t, dtype=self._t.dtype, device=self._t.device)
        index = torch.bucketize(t.detach(), self._t.detach()).sub(1).clamp(0, len(self._t) - 2)
        return t - self._t[index], index

    def evaluate(self, t: Any) -> Tensor:
        """X(t), shape (..., *t.shape, channels); outside the knots the first or last piece goes on."""
        return self.path.evaluate(t)

    def derivative(self, t: Any) -> Tensor:
        """dX/dt, as `evaluate`; at a knot that of the piece on its left."""
        if isinstance(t, Tensor) and not t.ndim:
            return self.path.slope(t)
        return self.path.derivative(t)


class CubicSpline(_Control):
    """The cubic spline of coefficients [a, b, 2 c, 3 d], shape (..., length - 1, 4 channels), with knots t."""

    def __init__(self, coeffs: Tensor, t: Tensor | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        if t is None:
            t = torch.arange(coeffs.shape[-2] + 1, dtype=coeffs.dtype, device=coeffs.device)
        if coeffs.shape[-1] % 4:
            raise UsageError("Passed invalid coeffs.")
        self.register_buffer("_t", t)
        for name, part in zip(("_a", "_b", "_two_c", "_three_d"), coeffs.chunk(4, -1), strict=True):
            self.register_buffer(name, part)

    def _made(self) -> Path:
        a, b, two_c, three_d = (self.get_buffer(name) for name in ("_a", "_b", "_two_c", "_three_d"))
        return Path(self._t, a, (b, two_c, three_d), smooth=True)


class NaturalCubicSpline(CubicSpline):
    """CubicSpline by its former name."""


class LinearInterpolation(_Control):
    """The linear path through values of shape (..., length, channels), with knots t."""

    def __init__(self, coeffs: Tensor, t: Tensor | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        if t is None:
            t = torch.arange(coeffs.shape[-2], dtype=coeffs.dtype, device=coeffs.device)
        self.register_buffer("_t", t)
        self.register_buffer("_coeffs", coeffs)
        self.register_buffer("_derivs", coeffs.diff(dim=-2) / t.diff()[:, None])

    def _made(self) -> Path:
        return Path(self._t, self.get_buffer("_coeffs")[..., :-1, :], (self.get_buffer("_derivs"),))


class TupleControl(torch.nn.Module):
    """Several controls over one interval, whose values and derivatives are tuples."""

    def __init__(self, *controls: Any):
        super().__init__()
        if not controls:
            raise UsageError("Expected one or more controls to batch together.")
        self._interval = controls[0].interval
        if any(bool((control.interval != self._interval).any()) for control in controls[1:]):
            raise UsageError("Can only batch togehter controls over the same interval.")
        self.controls = torch.nn.ModuleList(controls)

    @property
    def interval(self) -> Tensor:
        """First and last time, shape (2,)."""
        return self._interval

    @property
    def grid_points(self) -> Tensor:
        """The knots, if all controls have the same."""
        first, *others = (control.grid_points for control in self.controls)  # type: ignore[union-attr]
        if any(not torch.equal(first, other) for other in others):  # type: ignore[arg-type]
            raise GridError("Batch of controls have different grid points.")
        return first  # type: ignore[return-value]

    def evaluate(self, t: Any) -> tuple[Any, ...]:
        """The values of all."""
        return tuple(control.evaluate(t) for control in self.controls)  # type: ignore[operator]

    def derivative(self, t: Any) -> tuple[Any, ...]:
        """The derivatives of all."""
        return tuple(control.derivative(t) for control in self.controls)  # type: ignore[operator]
