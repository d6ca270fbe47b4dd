"""torchdiffeq's names on pfode's solvers: `import pfode.compat.torchdiffeq as torchdiffeq`.

`odeint`, `odeint_adjoint`, `odeint_event` and `odeint_dense` take the arguments, methods, options, callbacks and norms
of torchdiffeq (0.2.5 and the implicit methods after it), return the same shapes and raise errors of the same types with
the same words. What differs is in the numbers, where torchdiffeq's are at fault: a solve ends at t[-1] and evaluates
nothing beyond, adaptive methods have output times in between from dense output of their own order, tsit5 and gl4 have
orders 5 and 4, explicit_adams converges, implicit steps are solved to rounding by Newton's method, a state that is not
finite ends the solve, an event function that is zero at the start does not, and gradients reach the parameters of event
functions.

A tuple state is one flat tensor here, as it is there: norms, adjoint norms and `grad_fn` see it so.
"""

from pfode.compat.torchdiffeq.adjoint import odeint_adjoint
from pfode.compat.torchdiffeq.dense import odeint_dense
from pfode.compat.torchdiffeq.event import odeint_event
from pfode.compat.torchdiffeq.forward import odeint
from pfode.compat.torchdiffeq.names import METHODS as METHODS

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
