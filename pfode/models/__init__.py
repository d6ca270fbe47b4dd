"""Models made of differential equations: neural ODEs, their regularisers.

    NeuralODE           a layer: the state at the end of an ODE whose field is a network (neural_ode.py)
    AugmentedNeuralODE  the same with further dimensions that begin at zero
    VectorField         a network of the state, and of the time, as a field
    bound_spectral_norm every weight of a network kept to a spectral norm (spectral.py)

Layers take the options of `pfode.solve` and keep nothing between calls: what a solve cost is in what `run` returns.
"""

from pfode.models.neural_ode import AugmentedNeuralODE as AugmentedNeuralODE
from pfode.models.neural_ode import NeuralODE as NeuralODE
from pfode.models.neural_ode import Run as Run
from pfode.models.neural_ode import VectorField as VectorField
from pfode.models.spectral import bound_spectral_norm as bound_spectral_norm
