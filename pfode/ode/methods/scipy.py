"""SciPy's solvers as methods: `method="scipy:LSODA"`. They choose their own steps, on the host, in float64.

A step of the loop is a whole call of `scipy.integrate.solve_ivp`, from the start (or step_t, jump_t) to the end, with
its dense output. There is nothing for gradients to follow: they need an adjoint that solves another equation instead.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfode.errors import UsageError, unknown
from pfode.ode.solver import Step, Time, clock
from pfode.ode.state import Field
from pfode.optional import optional_module

NAMES = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")
_ORDERS: dict[str, int] = dict(zip(NAMES, (5, 3, 8, 5, 5, 12), strict=True))


@dataclass(frozen=True, eq=False)
class Scipy:
    """A solver of SciPy.

    Args:
        solver: "RK45", "RK23", "DOP853", "Radau", "BDF" or "LSODA".
        first_step, min_step, max_step: of its steps; LSODA alone heeds min_step.

    Raises:
        UsageError: another name.
    """

    solver: str
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    error_order = 0

    def __post_init__(self) -> None:
        if self.solver not in NAMES:
            raise unknown("SciPy solver", self.solver, NAMES)

    @property
    def name(self) -> str:
        return f"scipy:{self.solver}"

    @property
    def order(self) -> int:
        return _ORDERS[self.solver]

    def init(self, field: Field, t: Time, y: Tensor, slope: Tensor | None = None) -> None:
        return None

    def step(self, field: Field, t0: Time, t1: Time, y0: Tensor, carry: None) -> Step:
        """See Solver.

        Raises:
            UsageError: gradients are wanted through it.
        """
        solve_ivp = optional_module("scipy.integrate", f"method {self.name!r}").solve_ivp

        if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in (t0, t1, y0)):
            raise _no_gradients(self.name)
        y0 = y0.detach()
        real = torch.view_as_real(y0) if y0.is_complex() else y0

        def to_state(values: Any) -> Tensor:
            """(..., n) in float64 -> (..., *y0.shape)."""
            ahead = np.shape(values)[:-1]
            made = torch.as_tensor(np.array(values)).to(y0.device, real.dtype).reshape(*ahead, *real.shape)
            return torch.view_as_complex(made) if y0.is_complex() else made

        def slope(t: float, values: Any) -> Any:
            found = field(field.time(t), to_state(values))
            if found.requires_grad:
                raise _no_gradients(self.name)
            found = torch.view_as_real(found) if found.is_complex() else found
            array = found.reshape(-1).to("cpu", torch.float64, copy=True).numpy()  # fields may use one buffer
            if not np.isfinite(array).all():
                raise FloatingPointError
            return array

        options: dict[str, Any] = {"max_step": self.max_step, "first_step": self.first_step}
        if self.solver == "LSODA":
            options["min_step"] = self.min_step
        rtol, atol = (_array(v, real) for v in field.limits)
        start = real.reshape(-1).to("cpu", torch.float64).numpy()
        try:
            out = solve_ivp(
                slope, (float(t0), float(t1)), start, self.solver, dense_output=True, rtol=rtol, atol=atol, **options
            )
        except FloatingPointError:  # the field is not finite
            out = None
        if out is None or not out.success:
            return Step(torch.full_like(y0, math.nan), None, lambda theta: y0 * math.nan + 0 * theta[:, None])

        def dense(theta: Tensor) -> Tensor:
            times = float(t0) + theta.to("cpu", clock(torch.device("cpu"))) * (float(t1) - float(t0))
            return to_state(out.sol(times.numpy()).T)

        return Step(to_state(out.y[:, -1]), None, dense, iterations=0, jacobians=int(out.njev))


def _no_gradients(name: str) -> UsageError:
    return UsageError(f"{name}: gradients cannot go through SciPy", 'adjoint="backsolve", or torch.no_grad()')


def _array(limit: Any, real: Tensor) -> Any:
    if not isinstance(limit, Tensor):
        return limit
    wide = limit[..., None].expand(real.shape) if limit.ndim < real.ndim else limit.expand(real.shape)
    return wide.reshape(-1).to("cpu", torch.float64).numpy()
