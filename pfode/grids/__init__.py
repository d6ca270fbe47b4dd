"""Time grids: where the nodes of a plan lie.

A `Grid` places n + 1 points between two times of a process. `times` adds the ends, for every rule alike: with
final = "denoise" the last node is clean data (sigma = 0, never evaluated), with final = "stop" it is t_min. `rising`
gives the grid of an encoding, from t_min up. A tensor is used exactly as given. Names carry parameters: "karras(5)".

A rule is registered by its name (`named`, in rule.py): those even in some function of the noise level in levels.py,
those on training steps in steps.py, published tables in tables.py, shifts in shift.py, optimised ones in
optimised.py. nodes.py lays them between the ends of a process.
"""

from pfode.grids.levels import beta, beta_sigma, cosine, karras, log_snr, polyexponential, time
from pfode.grids.nodes import MAX_STEPS, ROUNDING, end_time, rising, times
from pfode.grids.optimised import dm_nonuniform, dm_objective
from pfode.grids.rule import GRIDS, Grid, grid
from pfode.grids.shift import flow_shift, shifted
from pfode.grids.steps import leading, linspace, trailing
from pfode.grids.tables import ays

__all__ = [
    "GRIDS",
    "MAX_STEPS",
    "ROUNDING",
    "Grid",
    "ays",
    "beta",
    "beta_sigma",
    "cosine",
    "dm_nonuniform",
    "dm_objective",
    "end_time",
    "flow_shift",
    "grid",
    "karras",
    "leading",
    "linspace",
    "log_snr",
    "polyexponential",
    "rising",
    "shifted",
    "time",
    "times",
    "trailing",
]
