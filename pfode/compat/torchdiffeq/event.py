"""`odeint_event`: the time of an event, with gradients."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pfode.compat.torchdiffeq.forward import odeint
from pfode.compat.torchdiffeq.problem import checked, event_values, flattened

__all__ = ["odeint_event"]


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
    problem = checked(func, y0, t, 0.0, 0.0, None, None, None)
    flat = ys if problem.shapes is None else flattened(ys, 1)
    y, time = flat[-1], event_t.detach()
    with torch.enable_grad():
        at, state = time.clone().requires_grad_(), y.detach().requires_grad_()
        values = event_values(event_fn, at, problem.tree(state))
        if not values.requires_grad:  # true or false: no derivative says how the time moves
            return event_t, ys
        met = int(values.detach().abs().argmin())
        g_t, g_y = torch.autograd.grad(values[met], (at, state), allow_unused=True)
    with torch.no_grad():
        slope = problem.func(time.to(state.abs().dtype), state.detach())
        rate = torch.zeros((), dtype=values.dtype, device=values.device) if g_t is None else g_t
        rate = rate + (0.0 if g_y is None else (g_y.conj() * slope).real.sum())
    moved = event_values(event_fn, time, problem.tree(y))[met]
    shift = -(moved - moved.detach()) / torch.where(rate == 0, math.inf, rate)
    event_t = time + shift.to(time.dtype)
    flat = torch.cat([flat[:-1], (y + slope * shift.to(y.abs().dtype))[None]])
    return event_t, problem.tree(flat)
