"""Models made of differential equations: neural ODEs, their regularisers.

    NeuralODE           a layer: the state at the end of an ODE whose field is a network (neural_ode.py)
    AugmentedNeuralODE  the same with further dimensions that begin at zero
    VectorField         a network of the state, and of the time, as a field
    bound_spectral_norm every weight of a network kept to a spectral norm (spectral.py)
    SecondOrderODE      an acceleration that is a network, learnt from positions (second_order.py)

and of irregular time series (series/ has their data and their trainer):

    NeuralCDE           a hidden state driven by the path through a series; online, too (neural_cde.py)
    ODERNN, GRUODEBayes recurrent networks whose state moves between the observations (ode_rnn.py)
    LatentODE           an ODE from a distribution of initial states; interpolates and forecasts (latent_ode.py)

Layers take the options of `pfode.solve` and keep nothing between calls: what a solve cost is in what `run` returns.
"""

from pfode.models.gaussian import Forecast as Forecast
from pfode.models.latent_ode import LatentODE as LatentODE
from pfode.models.neural_cde import NeuralCDE as NeuralCDE
from pfode.models.neural_ode import AugmentedNeuralODE as AugmentedNeuralODE
from pfode.models.neural_ode import NeuralODE as NeuralODE
from pfode.models.neural_ode import Run as Run
from pfode.models.neural_ode import VectorField as VectorField
from pfode.models.ode_rnn import ODERNN as ODERNN
from pfode.models.ode_rnn import GRUODEBayes as GRUODEBayes
from pfode.models.second_order import SecondOrderODE as SecondOrderODE
from pfode.models.spectral import bound_spectral_norm as bound_spectral_norm
