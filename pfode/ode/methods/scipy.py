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

__all__ = ["NAMES", "Scipy"]

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
        """See Solver. In per-sample mode each sample is solved by itself, while the others wait at the start.

        Raises:
            UsageError: gradients are wanted through it.
        """
        if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in (t0, t1, y0)):
            raise _no_gradients(self.name)
        start, end, y0 = float(t0), float(t1), y0.detach()
        made = [self._solve(field, start, end, y0, i) for i in range(len(y0))] if field.layout.per_sample else None
        if made is None:
            return self._solve(field, start, end, y0, None)
        y1 = torch.stack([step.y1 for step in made])
        jacobians = torch.tensor([s.jacobians for s in made], device=y0.device)
        nfe = torch.tensor([s.nfe for s in made], device=y0.device)
        return Step(
            y1,
            None,
            lambda theta: torch.stack([s.dense(_of(theta, i)) for i, s in enumerate(made)], 1),
            jacobians=jacobians,
            nfe=nfe,
        )

    def _solve(self, field: Field, start: float, end: float, y0: Tensor, sample: int | None) -> Step:
        """The solution of the state, or of one of its samples."""
        solve_ivp = optional_module("scipy.integrate", f"method {self.name!r}").solve_ivp
        state = y0 if sample is None else y0[sample]
        real = torch.view_as_real(state) if state.is_complex() else state
        calls = field.calls

        def to_state(values: Any) -> Tensor:
            """(..., n) in float64 -> (..., *state.shape)."""
            ahead = np.shape(values)[:-1]
            made = torch.from_numpy(np.array(values)).to(y0.device, real.dtype).reshape(*ahead, *real.shape)
            return torch.view_as_complex(made) if y0.is_complex() else made

        def slope(t: float, values: Any) -> Any:
            if sample is None:
                found = field(field.time(t), to_state(values))
            else:
                times, states = field.time(start).clone(), y0.clone()
                times[sample], states[sample] = t, to_state(values)
                found = field(times, states)[sample]
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
        limits = (
            v[sample] if sample is not None and isinstance(v, Tensor) else v
            for v in (field.context.rtol, field.context.atol)
        )
        rtol, atol = (_array(v, real) for v in limits)
        if self.solver in ("Radau", "BDF"):  # they take one number
            rtol = np.min(rtol)
        values = real.reshape(-1).to("cpu", torch.float64).numpy()
        try:
            out = solve_ivp(
                slope, (start, end), values, self.solver, dense_output=True, rtol=rtol, atol=atol, **options
            )
        except FloatingPointError:  # the field is not finite
            out = None
        nfe: Any = field.calls - calls
        if out is None or not out.success:
            nothing = torch.full_like(state, math.nan)
            return Step(nothing, None, lambda theta: nothing.expand(len(theta), *nothing.shape), nfe=nfe)

        def dense(theta: Tensor) -> Tensor:
            times = start + theta.to("cpu", clock(torch.device("cpu"))) * (end - start)
            return to_state(out.sol(times.numpy()).T)

        return Step(to_state(out.y[:, -1]), None, dense, jacobians=int(out.njev), nfe=nfe)


def _of(theta: Tensor, sample: int) -> Tensor:
    return theta if theta.ndim == 1 else theta[:, sample]


def _no_gradients(name: str) -> UsageError:
    return UsageError(f"{name}: gradients cannot go through SciPy", 'adjoint="backsolve", or torch.no_grad()')


def _array(limit: Any, real: Tensor) -> Any:
    if not isinstance(limit, Tensor):
        return limit
    wide = limit[..., None].expand(real.shape) if limit.ndim < real.ndim else limit.expand(real.shape)
    return wide.reshape(-1).to("cpu", torch.float64).numpy()
