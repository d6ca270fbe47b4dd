"""`odeint_adjoint`: gradients by solving the adjoint ODE backwards."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pfode.compat.torchdiffeq.forward import integrate, integrate_to_event, odeint
from pfode.compat.torchdiffeq.names import CALLBACKS
from pfode.compat.torchdiffeq.problem import Problem, checked, rms, split
from pfode.errors import UsageError

__all__ = ["odeint_adjoint"]


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
    problem = checked(func, y0, t, rtol, atol, method, options, event_fn)
    backward = {
        "rtol": rtol if adjoint_rtol is None else adjoint_rtol,
        "atol": atol if adjoint_atol is None else adjoint_atol,
        "method": adjoint_method,
        "options": {**adjoint_options, "norm": _adjoint_norm(adjoint_options.get("norm"), problem)},
        "callbacks": {name: getattr(func, f"{name}_adjoint") for name in CALLBACKS if hasattr(func, f"{name}_adjoint")},
    }
    out = _Backsolve.apply(problem, backward, event_fn, problem.y0, problem.t, *params)
    if event_fn is None:
        return problem.tree(out)
    event_t, ys = out
    return event_t, problem.tree(ys)


class _Backsolve(torch.autograd.Function):
    """Solutions with gradients from the adjoint ODE; `grad_fn.adjoint_options` may be changed until backward."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, backward: dict[str, Any], event_fn: Any, y0: Tensor, t: Tensor, *params: Tensor
    ) -> Any:
        ctx.problem, ctx.arguments, ctx.event = problem, backward, event_fn is not None
        ctx.adjoint_options, ctx.wants_t = backward["options"], t.requires_grad
        with torch.no_grad():
            if event_fn is None:
                ys = integrate(problem)
                ctx.save_for_backward(t, ys, *params)
                return ys.clone() if ys is y0 or ys._base is not None else ys
            event_t, ys = integrate_to_event(problem, event_fn)
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
                    # parameters may share a graph outside of func
                    found = torch.autograd.grad(slope, inputs, -state[2], allow_unused=True, retain_graph=True)
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


def _adjoint_norm(norm: Any, problem: Problem) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """The norm of (t, y, adj_y, *adj_params)."""
    of_state = problem.norm or rms

    def default(state: tuple[Tensor, ...]) -> Tensor:
        parts = [state[0].abs(), of_state(state[1]), of_state(state[2])]
        return torch.stack([*parts, *([] if norm == "seminorm" else map(rms, state[3:]))]).max()

    if norm is None or norm == "seminorm":
        return default
    if problem.shapes is None:
        return norm
    shapes = problem.shapes
    return lambda state: norm((state[0], *split(state[1], shapes), *split(state[2], shapes), *state[3:]))


def _parameters(module: Any) -> tuple[Tensor, ...]:
    """Parameters; a replica of DataParallel has them as plain attributes."""
    if getattr(module, "_is_replica", False):
        inside = [value for part in module.modules() for value in vars(part).values()]
        return tuple(value for value in inside if isinstance(value, Tensor) and value.requires_grad)
    return tuple(module.parameters())
