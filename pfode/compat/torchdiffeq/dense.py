"""`odeint_dense`: a solution as a function of time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pfode.compat.torchdiffeq.problem import checked, in_memory, need
from pfode.compat.torchdiffeq.stepping import field_of, solve_options
from pfode.ode import steps

__all__ = ["odeint_dense"]


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
    t = torch.stack([in_memory(t0), in_memory(t1)]).reshape(-1)
    problem = checked(func, y0, t, rtol, atol, method, options, None)
    options_of_solve = solve_options(problem)
    for name in ("norm", "throw", "adjoint"):
        options_of_solve.pop(name, None)
    points = list(steps(field_of(problem), problem.y0, **options_of_solve))
    ends = torch.tensor([point.t1 for point in points], dtype=torch.float64, device="cpu")
    first, sign = float(t[0]), problem.sign

    def dense(t_eval: Tensor) -> Any:
        times = torch.as_tensor(t_eval, dtype=torch.float64, device="cpu").reshape(-1)
        inside = ((times - first) * sign >= 0) & ((ends[-1] - times) * sign >= 0)
        need(inside.all(), f"invalid interpolation, fails `t0 <= t <= t1`: {first}, {t_eval}, {float(ends[-1])}")
        which = torch.searchsorted(ends * sign, times * sign).tolist()
        found = [points[k].at(time).to(problem.y0.dtype) for k, time in zip(which, times.tolist(), strict=True)]
        return problem.tree(torch.stack(found).reshape(*in_memory(t_eval).shape, *problem.y0.shape))

    return dense
