"""Densities along ODEs: traces of Jacobians, likelihoods, continuous normalising flows.

divergence  the trace of a Jacobian, exact or estimated (divergence.py)
CNF         continuous normalising flows (cnf.py)
"""

from pfode.flow.cnf import CNF as CNF
from pfode.flow.divergence import Divergence as Divergence
from pfode.flow.divergence import Exact as Exact
from pfode.flow.divergence import Hutchinson as Hutchinson
from pfode.flow.divergence import denoiser_divergence as denoiser_divergence
from pfode.flow.divergence import divergence as divergence
from pfode.flow.divergence import find_trace as find_trace
from pfode.flow.divergence import signs as signs
