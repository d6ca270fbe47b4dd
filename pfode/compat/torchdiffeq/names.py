"""The names that torchdiffeq has: methods, what options each group of them takes, callbacks."""

from typing import NamedTuple

__all__ = ["CALLBACKS", "METHODS", "OPTIONS", "SUPPORTED", "Method"]


class Method(NamedTuple):
    """A method: pfode's name, the group it shares its options with, and torchdiffeq's class, for warnings."""

    solver: str
    group: str
    label: str


METHODS = {
    "dopri8": Method("dopri8", "adaptive", "Dopri8Solver"),
    "dopri5": Method("dopri5", "adaptive", "Dopri5Solver"),
    "tsit5": Method("tsit5", "adaptive", "Tsit5Solver"),
    "bosh3": Method("bosh3", "adaptive", "Bosh3Solver"),
    "fehlberg2": Method("fehlberg2", "adaptive", "Fehlberg2"),
    "adaptive_heun": Method("adaptive_heun", "adaptive", "AdaptiveHeunSolver"),
    "euler": Method("euler", "fixed", "Euler"),
    "midpoint": Method("midpoint", "fixed", "Midpoint"),
    "heun2": Method("heun2", "fixed", "Heun2"),
    "heun3": Method("heun3", "fixed", "Heun3"),
    "rk4": Method("rk4-38", "fixed", "RK4"),
    "explicit_adams": Method("explicit_adams", "adams", "AdamsBashforth"),
    "implicit_adams": Method("implicit_adams", "adams", "AdamsBashforthMoulton"),
    "implicit_euler": Method("implicit_euler", "implicit", "ImplicitEuler"),
    "implicit_midpoint": Method("implicit_midpoint", "implicit", "ImplicitMidpoint"),
    "trapezoid": Method("trapezoid", "implicit", "Trapezoid"),
    "radauIIA3": Method("radauIIA3", "implicit", "RadauIIA3"),
    "gl4": Method("gl4", "implicit", "GaussLegendre4"),
    "radauIIA5": Method("radauIIA5", "implicit", "RadauIIA5"),
    "gl6": Method("gl6", "implicit", "GaussLegendre6"),
    "sdirk2": Method("sdirk2", "implicit", "SDIRK2"),
    "trbdf2": Method("trbdf2", "implicit", "TRBDF2"),
    "fixed_adams": Method("implicit_adams", "adams", "AdamsBashforthMoulton"),
    "scipy_solver": Method("scipy", "scipy", "ScipyWrapperODESolver"),
}
_FIXED = {"step_size", "grid_constructor", "interp", "perturb"}
OPTIONS = {
    "adaptive": {
        *("first_step", "min_step", "max_step", "safety", "ifactor", "dfactor", "max_num_steps", "dtype"),
        *("step_t", "jump_t"),
    },
    "fixed": _FIXED,
    "adams": {*_FIXED, "max_order", "max_iters"},
    "implicit": {*_FIXED, "max_iters"},
    "scipy": {"solver", "min_step", "max_step", "grid_points", "eps"},
}
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
SUPPORTED = {"adaptive": set(CALLBACKS), "scipy": set[str]()}  # the others: callback_step
