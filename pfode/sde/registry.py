"""The methods by their names, what "auto" takes, and which equations each is for."""

from pfode.errors import UsageError, unknown
from pfode.sde.methods import Doubling, LogODE, Milstein, ReversibleHeun, StochasticRungeKutta, StochasticSolver
from pfode.sde.tables import MILSTEIN_ITO, MILSTEIN_STRATONOVICH, TABLEAUS

__all__ = ["METHODS", "method_for", "methods_for"]

_BY_CALCULUS = {  # words that mean another method for either calculus
    "milstein": {"ito": Milstein("ito"), "stratonovich": Milstein("stratonovich")},
    "milstein-grad-free": {
        "ito": StochasticRungeKutta(MILSTEIN_ITO),
        "stratonovich": StochasticRungeKutta(MILSTEIN_STRATONOVICH),
    },
}
METHODS: dict[str, StochasticSolver] = {
    **{t.name: StochasticRungeKutta(t) for t in TABLEAUS if not t.name.startswith("milstein")},
    "reversible-heun": ReversibleHeun(),
    "log-ode": LogODE(),
}
_NAMES = [*METHODS, *_BY_CALCULUS]
_AUTO = {
    ("ito", "diagonal"): "srid2",
    ("ito", "scalar"): "srid2",
    ("ito", "general"): "euler",
    ("ito", "additive"): "shark",
    ("stratonovich", "additive"): "shark",
}


def methods_for(noise: str, calculus: str) -> list[str]:
    """The names of the methods for one kind of equation, those of the highest strong order first."""
    found = {name: _named(name, calculus) for name in _NAMES}
    fit = {name: s for name, s in found.items() if calculus in s.calculus and noise in s.noises}
    return sorted(fit, key=lambda name: -fit[name].strong[noise])


def _named(name: str, calculus: str) -> StochasticSolver:
    return _BY_CALCULUS[name][calculus] if name in _BY_CALCULUS else METHODS[name]


def method_for(method: str | StochasticSolver, noise: str, calculus: str, adaptive: bool) -> StochasticSolver:
    """The method for an equation.

    Args:
        method: a name, "auto", or a solver.
        adaptive: whether an estimate of the error is needed: methods that have none are doubled.

    Raises:
        UsageError: an unknown name, or a method that is not for this kind of equation.
    """
    if method == "auto":
        method = _AUTO.get((calculus, noise), "spark")
    if isinstance(method, str):
        if method not in _NAMES:
            raise unknown("method", method, ["auto", *_NAMES])
        method = _named(method, calculus)
    if isinstance(method, type) or not all(hasattr(method, name) for name in ("init", "step", "noises", "calculus")):
        raise UsageError(f"method: need a name or a stochastic solver, got {method!r:.60}", 'method="auto"')
    if calculus not in method.calculus or noise not in method.noises:
        kinds = f"{' and '.join(method.calculus)} equations with {', '.join(method.noises)} noise"
        problem = f"method: {method.name} is for {kinds}; this one is {calculus} with {noise} noise"
        raise UsageError(problem, f"method= one of {', '.join(methods_for(noise, calculus))}")
    return Doubling(method) if adaptive and not method.error_order else method
