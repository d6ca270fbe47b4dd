"""Neural ODEs: solvers, step-size control, events and adjoints. Imports torch and numpy only.

    solver    a value with `init` and a pure `step(field, t0, t1, y0, carry) -> Step`: the new state, an estimate of its
              error, dense output, the next carry (solver.py). Runge-Kutta methods are tableaus (tables.py);
              explicit.py steps them. A solver keeps no memory: what it wants to remember is its carry.
    field     the user's f on flat states (state.py): any tree of tensors is flattened once, to (n,), or to (batch, d)
              in per-sample mode. It counts its calls: nfe is not assumed. It lends out scratch memory.
    control   how an error becomes the next step size (control.py): a value, its memory handed round by the loop.
    loop      `advance` (loop.py), the only one: it yields an Attempt for every step it tries. Fixed grids are a list of
              stops, reached by one step each. One step size for the state or one per sample are two arithmetics
              (batching modes) of the same lines: floats, read once per attempted step, or tensors of shape (batch,).
    outputs   which output times a step passes, and the states there (outputs.py).
    events    zeros of functions along the solution (events.py): signs are compared in the loop's own read-back, a
              crossing is located on the dense output; its time and state have gradients.
    adjoint   how gradients are made (adjoints/): values that hand out a tape, which observes the steps and pulls
              gradients back. Every step can be taken again from (t0, t1, y0, carry): Checkpoint stores some of these,
              Reversible computes them backwards; Backsolve and Interpolated solve the adjoint equation; Implicit is for
              fixed points; Direct keeps the graph. All but Direct end in one autograd node.
    solve     runs what options.py has looked up and checked (names are in registry.py) and returns a Solution
              (solution.py); `steps` yields accepted steps instead (solve.py).

Times: the loop's own are float64, on the host in joint mode; the field sees the state's real dtype. Steps end exactly
at stops (the last output time, step_t, jump_t, a grid's nodes) and evaluate nothing outside; output times in between
come from dense output of the method's own order, which pfode/tableau.py derives from the order conditions. Where a
time needs a gradient, a step's ends are tensors: an end that is an output time attempts with it, any other with ts[0].

No operation in place happens to a tensor that gradients or transforms could see: `field.context.pure` says whether
steps must be so. A failure (error not finite, equations not solved) is a rejected step; what then ends a solve is its
Status, for the state or for every sample by itself.

A new method is a tableau, or one file with `init` and `step`, and a line in `registry.SOLVERS`.
"""

from pfode.ode.adjoints.checkpoint import Checkpoint as Checkpoint
from pfode.ode.adjoints.continuous import Backsolve as Backsolve
from pfode.ode.adjoints.continuous import Interpolated as Interpolated
from pfode.ode.adjoints.implicit import Implicit as Implicit
from pfode.ode.adjoints.problem import Direct as Direct
from pfode.ode.adjoints.reversible import Reversible as Reversible
from pfode.ode.control import PI as PI
from pfode.ode.control import PID as PID
from pfode.ode.control import I as I
from pfode.ode.events import Event as Event
from pfode.ode.events import Hits as Hits
from pfode.ode.methods.explicit import RungeKutta as RungeKutta
from pfode.ode.records import Status as Status
from pfode.ode.registry import SOLVERS as SOLVERS
from pfode.ode.solution import Solution as Solution
from pfode.ode.solve import solve as solve
from pfode.ode.solve import steps as steps
from pfode.ode.solver import Solver as Solver
from pfode.ode.solver import Step as Step
from pfode.tableau import Tableau as Tableau
