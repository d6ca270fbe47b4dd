"""torchsde's `sdeint` and `sdeint_adjoint`, carried out by `pfode.sdesolve`."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pfode.compat.torchsde.brownian import BaseBrownian, BrownianInterval
from pfode.compat.torchsde.classes import equation, logqp, renamed
from pfode.compat.torchsde.settings import LEVY_AREA_APPROXIMATIONS, METHODS, NOISE_TYPES, SDE_TYPES
from pfode.ode.solver import Step
from pfode.sde import Dyadic, LogODE, sdesolve
from pfode.sde.methods import Doubling, ReversibleHeun

__all__ = ["sdeint", "sdeint_adjoint"]

_ITO = (METHODS.euler, METHODS.milstein, METHODS.srk)
_MOST_STEPS = 10**7


def sdeint(
    sde: Any, y0: Any, ts: Any, bm: Any = None, method: str | None = None, dt: Any = 1e-3, adaptive: bool = False,
    rtol: Any = 1e-5, atol: Any = 1e-4, dt_min: Any = 1e-5, options: dict[str, Any] | None = None,
    names: dict[str, str] | None = None, logqp: bool = False, extra: bool = False, extra_solver_state: Any = None,
    **unused_kwargs: Any,
) -> Any:  # fmt: skip
    """Integrate an SDE; gradients flow through every operation.

    Steps end at all output times, where the original interpolates; srk calls f 3 and g 4 times a step. The arguments
    are the original's.

    Returns:
        ys of shape (times, batch, d); with logqp also the log-ratios (times - 1, batch); with extra also the solver's
        state.

    Raises:
        ValueError: what the original refuses.
    """
    _unused(unused_kwargs, "sdeint")
    call = _Call(sde, y0, ts, bm, method, dt, adaptive, rtol, atol, dt_min, options, names, logqp, extra_solver_state)
    return call.run("direct", None, extra)


def sdeint_adjoint(
    sde: Any, y0: Any, ts: Any, bm: Any = None, method: str | None = None, adjoint_method: str | None = None,
    dt: Any = 1e-3, adaptive: bool = False, adjoint_adaptive: bool = False, rtol: Any = 1e-5,
    adjoint_rtol: Any = 1e-5, atol: Any = 1e-4, adjoint_atol: Any = 1e-4, dt_min: Any = 1e-5,
    options: dict[str, Any] | None = None, adjoint_options: dict[str, Any] | None = None, adjoint_params: Any = None,
    names: dict[str, str] | None = None, logqp: bool = False, extra: bool = False, extra_solver_state: Any = None,
    **unused_kwargs: Any,
) -> Any:  # fmt: skip
    """Integrate an SDE; gradients are exact, those of `sdeint`, in memory of the square root of the steps.

    The steps are taken again going back, with the same noise, where the original solves an adjoint equation: so
    adjoint_method is checked, and it and the other adjoint_ options but adjoint_params are of no effect. Otherwise as
    `sdeint`.

    Raises:
        ValueError: what the original refuses.
    """
    _unused(unused_kwargs, "sdeint_adjoint")
    if adjoint_params is None and not isinstance(sde, nn.Module):
        raise ValueError(
            "`sde` must be an instance of nn.Module to specify the adjoint parameters; alternatively they can be "
            "specified explicitly via the `adjoint_params` argument, which may be `()`."
        )
    if adjoint_method is not None and adjoint_method not in METHODS:
        raise ValueError(f"Expected adjoint_method in {METHODS}, but found {adjoint_method}.")
    _no_gradients(adjoint_rtol=adjoint_rtol, adjoint_atol=adjoint_atol)
    params: Iterable[Tensor] = sde.parameters() if adjoint_params is None else adjoint_params
    call = _Call(sde, y0, ts, bm, method, dt, adaptive, rtol, atol, dt_min, options, names, logqp, extra_solver_state)
    return call.run("checkpoint", tuple(p for p in params if p.requires_grad), extra)


def _unused(given: dict[str, Any], name: str) -> None:
    if given:
        warnings.warn(f"`{name}`: Unexpected arguments {given}", stacklevel=3)


def _no_gradients(**values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"Argument {name} must not require gradient.")


@dataclass
class _Driver:
    """A Brownian motion of torchsde's as the driver of a solve."""

    bm: Any
    area: bool = False
    unit: float | None = None
    t0: float | None = None

    def __post_init__(self) -> None:
        self.area = self.bm.levy_area_approximation != LEVY_AREA_APPROXIMATIONS.none
        if isinstance(self.bm, BrownianInterval):
            self.unit, self.t0 = self.bm._path.unit, self.bm._path.t0

    def increment(self, ta: float, tb: float) -> Any:
        """W, or (W, H)."""
        bm = self.bm
        if isinstance(bm, BrownianInterval) and bm._start <= min(ta, tb) and max(ta, tb) <= bm._end:
            return bm._path.increment(ta, tb)
        low, high, sign = (ta, tb, 1) if ta <= tb else (tb, ta, -1)
        if not self.area:
            return sign * bm(low, high)
        w, u = bm(low, high, return_U=True)
        return sign * w, sign * (u / (high - low) - 0.5 * w)

    def levy_area(self, ta: float, tb: float, how: str) -> Tensor:
        """A; how is the motion's own."""
        return self.bm(ta, tb, return_A=True)[-1]


@dataclass(frozen=True)
class _Kept(ReversibleHeun):
    """Reversible Heun that begins with a given carry, if any, and keeps its last one."""

    begin: Any = None
    kept: list[Any] = field(default_factory=list)

    def init(self, field: Any, t: Any, y: Tensor, slope: Tensor | None = None) -> Any:
        carry = super().init(field, t, y, slope) if self.begin is None else self.begin
        self.kept[:] = [carry]
        return carry

    def step(self, field: Any, t0: Any, t1: Any, y0: Tensor, carry: Any) -> Step:
        step = super().step(field, t0, t1, y0, carry)
        self.kept[:] = [step.carry]
        return step


class _Call:
    """A call's arguments, checked."""

    def __init__(
        self, sde: Any, y0: Any, ts: Any, bm: Any, method: str | None, dt: Any, adaptive: bool, rtol: Any, atol: Any,
        dt_min: Any, options: dict[str, Any] | None, names: dict[str, str] | None, with_logqp: bool, state: Any,
    ):  # fmt: skip
        for name, known in (("noise_type", NOISE_TYPES), ("sde_type", SDE_TYPES)):
            if not hasattr(sde, name):
                raise ValueError(f"sde does not have the attribute {name}.")
            if getattr(sde, name) not in known:
                raise ValueError(f"Expected {name} in {known}, but found {getattr(sde, name)}.")
        if not isinstance(y0, Tensor) or y0.dim() != 2:
            raise ValueError("`y0` must be a 2-dimensional torch.Tensor of shape (batch, channels).")
        _no_gradients(ts=ts, dt=dt, rtol=rtol, atol=atol, dt_min=dt_min)
        sde = renamed(sde, names)
        if with_logqp:
            sde, y0 = logqp(sde), torch.cat([y0, y0.new_zeros(len(y0), 1)], 1)
        self.with_logqp, self.y0, self.ts, self.adaptive = with_logqp, y0, _times(ts, y0), adaptive
        self.dt, self.dt_min = float(dt), float(dt_min)
        self.tolerances = {"rtol": float(rtol), "atol": float(atol)}
        self.method = _default(sde.sde_type, sde.noise_type) if method is None else method
        if adaptive and self.method == METHODS.euler and sde.noise_type != NOISE_TYPES.additive:
            warnings.warn(
                "Numerical solution is not guaranteed to converge to the correct solution when using adaptive "
                "time-stepping with the Euler--Maruyama method with non-additive noise.",
                stacklevel=4,
            )
        _check_method(self.method, sde.sde_type, sde.noise_type)
        channels = _channels(sde, self.ts[0], y0, bm)
        self.bm = self._motion(channels) if bm is None else bm
        self.solver = _solver(self.method, sde, self.bm, options or {}, state)
        self.sde = equation(sde, channels)

    def _motion(self, channels: int) -> BaseBrownian:
        """The motion where none was given."""
        levy = {METHODS.srk: "space-time", METHODS.log_ode_midpoint: "foster"}.get(self.method, "none")
        start, end = float(self.ts[0]), float(self.ts[-1])
        size, like = (len(self.y0), channels), {"dtype": self.y0.dtype, "device": self.y0.device}
        step = None if self.adaptive else self.dt
        return BrownianInterval(start, end, size, levy_area_approximation=levy, dt=step, **like)

    def run(self, adjoint: str, params: Any, extra: bool) -> Any:
        """Solve, and return what the original does."""
        how: dict[str, Any] = {"step_size": self.dt, "max_steps": _MOST_STEPS}
        solver: Any = self.solver
        if self.adaptive:
            limits = {"first_step": max(self.dt, self.dt_min), "min_step": self.dt_min, "force": True}
            how = {**self.tolerances, "controller": Dyadic(grow=1.4, **limits), "max_steps": _MOST_STEPS}
            if isinstance(solver, str | _Kept) and self.method in (METHODS.euler, METHODS.reversible_heun):
                solver = Doubling(solver) if isinstance(solver, _Kept) else solver
        solved = sdesolve(
            self.sde, self.y0, self.ts, brownian=_Driver(self.bm), method=solver, adjoint=adjoint, params=params, **how
        )
        ys, state = solved.ys, ()
        if extra and isinstance(self.solver, _Kept):
            z, f, g = self.solver.kept[0]
            state = (f, g, z)
        if not self.with_logqp:
            return (ys, state) if extra else ys
        ys, ratio = ys.split([ys.shape[-1] - 1, 1], -1)
        rises = (ratio[1:] - ratio[:-1])[..., 0]
        return (ys, rises, state) if extra else (ys, rises)


def _times(ts: Any, y0: Tensor) -> Tensor:
    if not isinstance(ts, Tensor):
        if not isinstance(ts, tuple | list) or not all(isinstance(t, float | int) for t in ts):
            raise ValueError("Evaluation times `ts` must be a 1-D Tensor or list/tuple of floats.")
        ts = torch.tensor(ts, dtype=y0.dtype, device=y0.device)
    if ts.ndim != 1 or len(ts) < 1 or not bool((ts[1:] > ts[:-1]).all()):
        raise ValueError("Evaluation times `ts` must be strictly increasing.")
    return ts


def _default(sde_type: str, noise_type: str) -> str:
    """The method where none was given."""
    if sde_type != SDE_TYPES.ito:
        return METHODS.midpoint
    return METHODS.euler if noise_type == NOISE_TYPES.general else METHODS.srk


def _check_method(method: str, sde_type: str, noise_type: str) -> None:
    """Raise ValueError for a method that is not for such equations."""
    if method not in METHODS or method == METHODS.adjoint_reversible_heun:
        raise ValueError(f"Expected method in {METHODS}, but found {method}.")
    if method != METHODS.milstein and (method in _ITO) != (sde_type == SDE_TYPES.ito):
        raise ValueError(f"SDE is of type {sde_type}, for which {method} is not.")
    if method in (METHODS.milstein, METHODS.srk) and noise_type == NOISE_TYPES.general:
        raise ValueError(f"SDE has noise type {noise_type}, which {method} does not support.")


def _solver(method: str, sde: Any, bm: Any, options: dict[str, Any], state: Any) -> Any:
    """The method of pfode's, checked against the Levy areas that the motion gives."""
    levy = bm.levy_area_approximation
    given = {METHODS.srk: ("space-time", "davie", "foster"), METHODS.log_ode_midpoint: ("davie", "foster")}
    if levy not in given.get(method, (levy,)):
        raise ValueError(
            f"SDE solver requires one of {given[method]} set as the `levy_area_approximation` on the Brownian motion."
        )
    if method == METHODS.reversible_heun:
        begin = None if state is None else (state[2], state[0], state[1])
        return _Kept(begin=begin)
    if method == METHODS.log_ode_midpoint:
        return LogODE(levy)
    if method == METHODS.milstein:
        return "milstein-grad-free" if options.get("grad_free") else "milstein"
    if method == METHODS.srk:
        return "sra1" if sde.noise_type == NOISE_TYPES.additive else "srid2"
    return method.replace("_", "-")


def _channels(sde: Any, t: Tensor, y0: Tensor, bm: Any) -> int:
    """How many Brownian motions there are, of one evaluation of everything; all sizes are compared.

    Raises:
        ValueError: functions that are missing, or sizes that differ.
    """
    batch, noise = {len(y0)}, set[int]()
    diagonal = sde.noise_type == NOISE_TYPES.diagonal
    if bm is not None:
        if len(bm.shape) != 2:
            raise ValueError("`bm` must be of shape (batch, noise_channels).")
        batch.add(bm.shape[0])
        noise.add(bm.shape[1])

    def drift(name: str, value: Tensor) -> None:
        if value.dim() != 2 or value.shape[1] != y0.shape[1]:
            raise ValueError(f"{name} must be of shape (batch, state_channels), but got {tuple(value.shape)}.")
        batch.add(len(value))

    def diffusion(value: Tensor) -> None:
        if value.dim() != (2 if diagonal else 3) or value.shape[1] != y0.shape[1]:
            wanted = "(batch, state_channels)" if diagonal else "(batch, state_channels, noise_channels)"
            raise ValueError(f"Diffusion must be of shape {wanted}, but got {tuple(value.shape)}.")
        batch.add(len(value))
        noise.add(value.shape[-1])

    names = ("f", "g", "f_and_g", "g_prod", "f_and_g_prod")
    has = {name: hasattr(sde, name) for name in names}
    if not (has["f"] or has["f_and_g"] or has["f_and_g_prod"]):
        raise ValueError("sde must define at least one of `f`, `f_and_g`, or `f_and_g_prod`.")
    if not any(has[name] for name in names[1:]):
        raise ValueError("sde must define at least one of `g`, `f_and_g`, `g_prod` or `f_and_g_prod`.")
    with torch.no_grad():
        if has["f"]:
            drift("Drift", sde.f(t, y0))
        if has["g"]:
            diffusion(sde.g(t, y0))
        elif has["f_and_g"]:
            f, g = sde.f_and_g(t, y0)
            drift("Drift", f)
            diffusion(g)
    if not noise:
        raise ValueError(
            "Cannot infer noise size (i.e. number of Brownian motion channels). Either pass `bm` explicitly, or "
            "specify one of the `g`, `f_and_g` functions."
        )
    if len(batch) > 1:
        raise ValueError("Batch sizes not consistent.")
    if len(noise) > 1:
        raise ValueError("Noise sizes not consistent.")
    if sde.noise_type == NOISE_TYPES.scalar and noise != {1}:
        raise ValueError(f"Scalar noise must have only one channel; the diffusion has {noise} noise channels.")
    return noise.pop()
