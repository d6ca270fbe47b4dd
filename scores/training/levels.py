"""How noise levels are drawn while training: distributions of the time of the process, by name.

Each is a function from quantiles in (0, 1), float64 of any shape, to times of that shape. A new one is a function here
and a line in `LEVELS`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pfode.process import EDM, VE, Flow, Process

__all__ = ["LEVELS", "usual_levels"]


def lognormal(process: Process, quantiles: Tensor, mean: float, std: float) -> Tensor:
    """log(sigma/alpha) ~ N(mean, std^2) (Karras et al. 2022, section 5), cut off at the ends of the process."""
    ratio = torch.exp(mean + std * torch.special.ndtri(quantiles))
    return process.time(-2 * torch.log(ratio)).clamp(process.t_min, process.t_max)


def uniform(process: Process, quantiles: Tensor, mean: float, std: float) -> Tensor:
    """Times uniform from t_min to t_max; mean and std are not used."""
    return process.t_min + (process.t_max - process.t_min) * quantiles


def logit_normal(process: Process, quantiles: Tensor, mean: float, std: float) -> Tensor:
    """t = 1/(1 + e^-z), z ~ N(0, 1) (Esser et al. 2024, section 3.1), for times within [0, 1]; cut off at the ends."""
    return torch.sigmoid(torch.special.ndtri(quantiles)).clamp(process.t_min, process.t_max)


LEVELS: dict[str, Callable[[Process, Tensor, float, float], Tensor]] = {
    "lognormal": lognormal, "uniform": uniform, "logit-normal": logit_normal,
}  # fmt: skip


def usual_levels(process: Process) -> str:
    """The distribution that a process is usually trained with."""
    return "lognormal" if isinstance(process, EDM | VE) else "logit-normal" if isinstance(process, Flow) else "uniform"
