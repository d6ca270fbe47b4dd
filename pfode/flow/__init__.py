"""Densities along ODEs: traces of Jacobians, likelihoods, continuous normalising flows.

divergence      the trace of a Jacobian, exact or estimated (divergence.py)
log_likelihood  log p(x) of data under any denoiser, along its PF-ODE (likelihood.py)
elbo            a lower bound of it without a path (elbo.py)
CNF             continuous normalising flows (cnf.py)
"""

from pfode.flow.cnf import CNF as CNF
from pfode.flow.divergence import Divergence as Divergence
from pfode.flow.divergence import Exact as Exact
from pfode.flow.divergence import Hutchinson as Hutchinson
from pfode.flow.divergence import denoiser_divergence as denoiser_divergence
from pfode.flow.divergence import divergence as divergence
from pfode.flow.divergence import find_trace as find_trace
from pfode.flow.divergence import signs as signs
from pfode.flow.elbo import elbo as elbo
from pfode.flow.likelihood import Likelihood as Likelihood
from pfode.flow.likelihood import log_likelihood as log_likelihood
