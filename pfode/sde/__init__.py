"""Stochastic differential equations: dy = f dt + g dW on ode's loop, driven by a Brownian path.

    problem   SDE, the equation; StochasticField, its functions on flat states for one solve, and what drives them.
    tableau   methods as values: stages, noise terms, error estimates; tables.py lists them.
    methods   one stepper for all tableaus, and Milstein, reversible Heun, log-ODE, and the doubling of any method.
    control   Dyadic: nested step sizes.
    registry  names, and which method is for which equation.
    solve     `sdesolve`.

The driver is a path with increments (docs/design.md, idea E): a step asks it for W, and H, by the step's ends. Replays
for gradients ask again, so no noise is kept.
"""

from pfode.sde.control import Dyadic as Dyadic
from pfode.sde.methods import LogODE as LogODE
from pfode.sde.methods import StochasticRungeKutta as StochasticRungeKutta
from pfode.sde.problem import SDE as SDE
from pfode.sde.registry import METHODS as METHODS
from pfode.sde.registry import methods_for as methods_for
from pfode.sde.solve import StochasticSolution as StochasticSolution
from pfode.sde.solve import StochasticStats as StochasticStats
from pfode.sde.solve import sdesolve as sdesolve
from pfode.sde.tableau import Row as Row
from pfode.sde.tableau import Stage as Stage
from pfode.sde.tableau import Tableau as Tableau
