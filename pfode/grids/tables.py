"""Schedules that were published as numbers: a table of sigma/alpha and its name, `TABLES`, make a rule each."""

import functools

import numpy as np
import torch
from torch import Tensor

from pfode.grids.ends import log_snr_ends
from pfode.grids.rule import GRIDS, Grid
from pfode.process import Process

__all__ = ["TABLES", "ays"]

# Sabour et al. 2024, table 3: sigma/alpha of ten steps, the last entry (0 in diffusers' AysSchedules) standing for data
TABLES = {
    "ays-sd": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays-sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays-svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def ays(name: str) -> Grid:
    """Align Your Steps: the published table of a model, log-linear in sigma/alpha between its entries.

    Where the range of the process differs from the table's, the table is cut, or continued by its outermost slopes.
    """
    logs = np.log(TABLES[name])
    far = 100  # intervals by which the table is continued
    logs = np.array([logs[0] + far * (logs[0] - logs[1]), *logs, logs[-1] + far * (logs[-1] - logs[-2])])
    knots = np.array([-far, *range(len(TABLES[name])), len(TABLES[name]) - 1 + far], dtype=np.float64)

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        ends = -0.5 * log_snr_ends(process, high, low).numpy()
        first, last = np.interp(-ends, -logs, knots)
        first = first if abs(first) > 1e-4 else 0.0  # the table has five digits
        last = last if np.isfinite(ends[1]) else max(knots[-2], first + 1)
        return process.time(-2 * torch.from_numpy(np.interp(np.linspace(first, last, n + 1), knots, logs)))

    return Grid(name, place, to_data=True)


GRIDS.update({name: functools.partial(ays, name) for name in TABLES})
