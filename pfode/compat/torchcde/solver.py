"""`cdeint`: controlled differential equations with torchcde's arguments."""

import warnings
from typing import Any

import torch
from torch import Tensor

from pfode.compat.torchcde.controls import CubicSpline, GridError
from pfode.compat.torchdiffeq import METHODS, odeint, odeint_adjoint
from pfode.errors import UsageError
from pfode.ode.solve import solve

__all__ = ["cdeint"]

# what the methods of torchsde are where there is no noise
_NOISELESS = {
    "euler": "euler",
    "milstein": "euler",
    "srk": "ralston",
    "euler_heun": "euler",
    "heun": "heun2",
    "midpoint": "midpoint",
    "log_ode": "midpoint",
    "reversible_heun": "reversible-heun",
}
_SDE_WORDS = {"dt", "method", "names", "bm", "options", "rtol", "atol", "dt_min", "adaptive", "logqp"}
_SDE_ADJOINT_WORDS = {"adjoint_method", "adjoint_rtol", "adjoint_atol", "adjoint_options", "adjoint_adaptive"}


def cdeint(
    X: Any, func: Any, z0: Any, t: Tensor, adjoint: bool = True, backend: str = "torchdiffeq", **kwargs: Any
) -> Any:
    """Solve dz = func(t, z) dX, z(t[0]) = z0.

    Args:
        X: the control, with `derivative`: t of shape () -> (..., channels), or a tuple where z0 is one.
        func: (t, z) -> shape (..., hidden, channels), or an object with `prod`: (t, z, dXdt) -> (..., hidden).
        z0: shape (..., hidden), or a tuple of such tensors.
        t: times, shape (times,).
        adjoint: gradients by the adjoint equation, else by differentiating the solver.
        backend: "torchdiffeq" or "torchsde": whose methods are named in kwargs. There is no noise, so those of torchsde
            are the methods for ordinary equations that they then amount to.
        kwargs: rtol (1e-4), atol (1e-6), method, options, adjoint_params ... of the backend. Adaptive steps end at X's
            knots, unless options have step_t or jump_t.

    Returns:
        Shape (..., times, hidden), or a tuple of such tensors.

    Raises:
        ValueError: malformed inputs, in torchcde's words.
    """
    kwargs = {"atol": 1e-6, "rtol": 1e-4, **kwargs}
    if adjoint:
        kwargs = {"adjoint_atol": kwargs["atol"], "adjoint_rtol": kwargs["rtol"], **kwargs}
    pair, prod = _checked(X, func, z0, t)
    buffers = X.buffers() if isinstance(X, torch.nn.Module) else ()
    if adjoint and "adjoint_params" not in kwargs and any(buffer.requires_grad for buffer in buffers):
        warnings.warn(
            "One of the inputs to the control path X requires gradients but `kwargs['adjoint_params']` has not been "
            "passed. This is probably a mistake: these inputs will not receive a gradient when using the adjoint "
            "method. Either have the input not require gradients (if that was unintended), or include it (and every "
            "other parameter needing gradients) in `adjoint_params`. For example:\n```\ncoeffs = ...\nfunc = ...\n"
            "X = CubicSpline(coeffs)\nadjoint_params = tuple(func.parameters()) + (coeffs,)\n"
            "cdeint(X=X, func=func, ..., adjoint_params=adjoint_params)\n```",
            stacklevel=2,
        )
    field = _VectorField(X, func, pair, prod)
    if backend == "torchdiffeq":
        out = (odeint_adjoint if adjoint else odeint)(field, z0, t, **_with_knots(X, kwargs))
    elif backend == "torchsde":
        out = _noiseless(field, z0, t, kwargs, adjoint)
    else:
        raise UsageError(f"Unrecognised backend={backend}")
    return tuple(part.movedim(0, -2) for part in out) if pair else out.movedim(0, -2)


class _VectorField(torch.nn.Module):
    """func(t, z) dX/dt."""

    def __init__(self, X: Any, func: Any, pair: bool, prod: bool):
        super().__init__()
        self.X, self.func, self.pair, self.prod = X, func, pair, prod

    def forward(self, t: Tensor, z: Any) -> Any:
        slope = self.X.derivative(t)
        if self.prod:
            return self.func.prod(t, z, slope)
        field = self.func(t, z)
        if not self.pair:
            return (field @ slope.unsqueeze(-1)).squeeze(-1)
        return tuple((m @ dx.unsqueeze(-1)).squeeze(-1) for m, dx in zip(field, slope, strict=True))


def _with_knots(X: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the control's knots as times that adaptive steps end at. A spline whose coefficients have
    gradients jumps there too: those of one piece alone change it on one side."""
    options = dict(kwargs.get("options") or {})
    method = kwargs.get("method") or "dopri5"
    adaptive = method in METHODS and METHODS[method].group == "adaptive"
    if not adaptive or options.keys() & {"step_t", "jump_t"}:
        return kwargs
    try:
        knots = getattr(X, "grid_points", None)
    except GridError:
        knots = torch.cat([control.grid_points for control in X.controls]).unique()
    if not isinstance(knots, Tensor):
        return kwargs
    smooth = isinstance(X, CubicSpline) and not any(buffer.requires_grad for buffer in X.buffers())
    options["step_t" if smooth else "jump_t"] = knots.detach()
    return {**kwargs, "options": options}


def _noiseless(field: _VectorField, z0: Any, t: Tensor, kwargs: dict[str, Any], adjoint: bool) -> Any:
    """By a method of torchsde with steps dt, where there is no noise."""
    known = _SDE_WORDS | (_SDE_ADJOINT_WORDS | {"adjoint_params"} if adjoint else set())
    if unused := {name: value for name, value in kwargs.items() if name not in known}:
        warnings.warn(f"Unexpected arguments {unused}", stacklevel=3)
    method = kwargs.get("method") or "midpoint"
    if method not in _NOISELESS:
        raise UsageError(f"Expected method in {sorted(_NOISELESS)}, but found {method}.")
    if kwargs.get("adaptive"):
        raise UsageError(
            "adaptive: not with backend='torchsde', which integrates no noise here", "backend='torchdiffeq'"
        )
    dt = float(kwargs.get("dt", 1e-3))
    params = kwargs.get("adjoint_params") if adjoint else None
    return solve(field, z0, t, method=_NOISELESS[method], step_size=dt, params=params).ys


def _checked(X: Any, func: Any, z0: Any, t: Tensor) -> tuple[bool, bool]:
    """Whether z0 is a tuple, and whether func has a product; everything checked in torchcde's words."""
    if not hasattr(X, "derivative"):
        raise UsageError("X must have a 'derivative' method.")
    slope, prod = X.derivative(t[0].detach()), hasattr(func, "prod")
    word = "func.prod" if prod else "func"
    found = func.prod(t[0], z0, slope) if prod else func(t[0], z0)
    if isinstance(z0, Tensor):
        for value, name in ((slope, "X.derivative"), (found, word)):
            if not isinstance(value, Tensor):
                raise UsageError(f"z0 is a tensor and so {name} must return a tensor as well.")
        _fits(slope, found, z0, prod)
        return False, prod
    if not isinstance(z0, tuple | list):
        raise UsageError("z0 must either a tensor or a tuple/list of tensors.")
    for value, name in ((slope, "X.derivative"), (found, word)):
        if not isinstance(value, tuple | list):
            raise UsageError(f"z0 is a tuple/list and so {name} must return a tuple/list as well.")
    for value, name in ((slope, "X.derivative(t)"), (found, "func.prod(t, z, dXdt)" if prod else "func(t, z)")):
        if len(value) != len(z0):
            raise UsageError(f"z0 and {name} must be tuples of the same length.")
    for dx, part, z in zip(slope, found, z0, strict=True):
        if not isinstance(dx, Tensor):
            raise UsageError("X.derivative must return a tensor or tuple of tensors.")
        if not isinstance(part, Tensor):
            raise UsageError(f"{word} must return a tensor or tuple/list of tensors.")
        _fits(dx, part, z, prod)
    return True, prod


def _fits(slope: Tensor, found: Tensor, z0: Tensor, prod: bool) -> None:
    """Raise UsageError for shapes that do not go together."""

    def words(
        name: str, got: tuple[int, ...], batch: tuple[int, ...], have: tuple[int, ...], z: tuple[int, ...]
    ) -> str:
        return (
            f"{name} returned shape {got} (meaning {batch} batch dimensions), whilst z0 has shape {have} (meaning {z} "
            "batch dimensions)."
        )

    dx, shape, z = tuple(slope.shape), tuple(found.shape), tuple(z0.shape)
    if dx[:-1] != z[:-1]:
        raise UsageError(
            "X.derivative did not return a tensor with the same number of batch dimensions as z0. "
            + words("X.derivative", dx, dx[:-1], z, z[:-1])
        )
    if prod:
        if shape != z:
            raise UsageError(
                f"func.prod did not return a tensor with the same shape as z0. func.prod returned shape {shape} whilst "
                f"z0 has shape {z}."
            )
        return
    if shape[:-2] != z[:-1]:
        raise UsageError(
            "func did not return a tensor with the same number of batch dimensions as z0. "
            + words("func", shape, shape[:-2], z, z[:-1])
        )
    if shape[-2] != z[-1]:
        raise UsageError(
            "func did not return a tensor with the same number of hidden channels as z0. func returned shape "
            f"{shape} (meaning {shape[-2]} channels), whilst z0 has shape {z} (meaning {z[-1]} channels)."
        )
    if shape[-1] != dx[-1]:
        raise UsageError(
            "func did not return a tensor with the same number of input channels as X.derivative returned. func "
            f"returned shape {shape} (meaning {shape[-1]} channels), whilst X.derivative returned shape {dx} (meaning "
            f"{dx[-1]} channels)."
        )
