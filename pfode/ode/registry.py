"""The names of methods and adjoints: what `solve` takes as words."""

from pfode.errors import unknown
from pfode.ode import checks
from pfode.ode.adjoints.checkpoint import Checkpoint
from pfode.ode.adjoints.continuous import Backsolve, Interpolated
from pfode.ode.adjoints.implicit import Implicit
from pfode.ode.adjoints.problem import Adjoint, Direct
from pfode.ode.adjoints.reversible import Reversible
from pfode.ode.methods import tables
from pfode.ode.methods.explicit import RungeKutta
from pfode.ode.methods.implicit import implicit_solvers
from pfode.ode.methods.multistep import ADAMS
from pfode.ode.methods.reversible import Coupled, ReversibleHeun
from pfode.ode.methods.scipy import Scipy
from pfode.ode.methods.symplectic import SYMPLECTIC
from pfode.ode.solver import Solver

__all__ = ["ADJOINTS", "PAIRED", "SOLVERS", "adjoint_named", "solver_named"]

SOLVERS: dict[str, Solver] = {
    **{tableau.name: RungeKutta(tableau) for tableau in tables.EXPLICIT},
    **implicit_solvers(),
}
SOLVERS.update({solver.name: solver for solver in ADAMS})
PAIRED: dict[str, Solver] = {solver.name: solver for solver in SYMPLECTIC}  # for states that are pairs (q, p)
SOLVERS["reversible-heun"] = ReversibleHeun()
SOLVERS.update({c.name: c for c in (Coupled(RungeKutta(t)) for t in (tables.MIDPOINT, tables.RK4, tables.DOPRI5))})
ADJOINTS: dict[str, Adjoint | Direct] = {
    "direct": Direct(),
    "checkpoint": Checkpoint(),
    "reversible": Reversible(),
    "backsolve": Backsolve(),
    "interpolated": Interpolated(),
    "implicit": Implicit(),
}


def solver_named(method: str | Solver) -> Solver:
    """A method by its name ("dopri5", "scipy:LSODA"), or as it is.

    Raises:
        UsageError: an unknown name, or no solver.
    """
    if not isinstance(method, str):
        return checks.solver(method)
    if method.startswith("scipy:"):
        return Scipy(method.removeprefix("scipy:"))
    known = {**SOLVERS, **PAIRED}
    if method not in known:
        raise unknown("method", method, known)
    return known[method]


def adjoint_named(adjoint: str | Adjoint | Direct) -> Adjoint | Direct:
    """An adjoint by its name, or as it is.

    Raises:
        UsageError: an unknown name, or no adjoint.
    """
    found = ADJOINTS.get(adjoint) if isinstance(adjoint, str) else adjoint
    if found is None or isinstance(found, type) or (not isinstance(found, Direct) and not hasattr(found, "tape")):
        raise unknown("adjoint", adjoint if isinstance(adjoint, str) else type(adjoint).__name__, ADJOINTS)
    return found
