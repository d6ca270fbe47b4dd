"""pfode: a diffusion sampling engine based on probability-flow ODEs."""

from typing import TYPE_CHECKING

from pfode.lazy import lazy

__version__ = "0.1.0"

__getattr__, __dir__ = lazy(
    __name__,
    {
        "": ["brownian", "cde", "errors", "flow", "grids", "noise", "ode", "samplers", "scores", "sde"],
        "errors": ["PfodeError"],
        "flow.elbo": ["elbo"],
        "flow.likelihood": ["log_likelihood"],
        "process": ["EDM", "VE", "VP", "Flow", "Process", "SubVP", "VPCosine", "VPDiscrete"],
        "cde": ["cdesolve"],
        "ode": ["solve"],
        "plans.executor": ["iterate", "run"],
        "plans.table": ["Plan"],
        "samplers": ["PFODEScheduler", "calibrate", "decode", "encode", "fit_plan", "make_plan", "sample"],
        "sde": ["sdesolve"],
        "scores": ["Denoiser", "from_pipeline", "load"],
    },
)

if TYPE_CHECKING:  # the same names for type checkers; tests/test_layers.py compares the lists
    from pfode import brownian as brownian
    from pfode import cde as cde
    from pfode import errors as errors
    from pfode import flow as flow
    from pfode import grids as grids
    from pfode import noise as noise
    from pfode import ode as ode
    from pfode import samplers as samplers
    from pfode import scores as scores
    from pfode import sde as sde
    from pfode.cde import cdesolve as cdesolve
    from pfode.errors import PfodeError as PfodeError
    from pfode.flow.elbo import elbo as elbo
    from pfode.flow.likelihood import log_likelihood as log_likelihood
    from pfode.ode import solve as solve
    from pfode.plans.executor import iterate as iterate
    from pfode.plans.executor import run as run
    from pfode.plans.table import Plan as Plan
    from pfode.process import EDM as EDM
    from pfode.process import VE as VE
    from pfode.process import VP as VP
    from pfode.process import Flow as Flow
    from pfode.process import Process as Process
    from pfode.process import SubVP as SubVP
    from pfode.process import VPCosine as VPCosine
    from pfode.process import VPDiscrete as VPDiscrete
    from pfode.samplers import PFODEScheduler as PFODEScheduler
    from pfode.samplers import calibrate as calibrate
    from pfode.samplers import decode as decode
    from pfode.samplers import encode as encode
    from pfode.samplers import fit_plan as fit_plan
    from pfode.samplers import make_plan as make_plan
    from pfode.samplers import sample as sample
    from pfode.scores import Denoiser as Denoiser
    from pfode.scores import from_pipeline as from_pipeline
    from pfode.scores import load as load
    from pfode.sde import sdesolve as sdesolve
