"""Numbers between the two ends of a grid, and the ends themselves as rules have them."""

import math

import torch
from torch import Tensor

from pfode.process import Process, float64

__all__ = ["clock", "falling", "line", "log_snr_ends"]

_RATIO_OF_PURE_NOISE = 80.0  # sigma/alpha (EDM's sigma_max) that stands for alpha = 0 where a finite log-SNR is needed


def falling(n: int) -> Tensor:
    """n + 1 equidistant numbers from 1 to 0."""
    return torch.linspace(1, 0, n + 1, dtype=torch.float64, device="cpu")


def line(ends: Tensor, n: int) -> Tensor:
    """n + 1 equidistant numbers from the first end to the last."""
    return torch.linspace(ends[0].item(), ends[1].item(), n + 1, dtype=torch.float64, device="cpu")


def clock(process: Process, high: float, low: float) -> Tensor:
    """Both ends before the shift of the process."""
    return process.uniform_clock(float64([high, low]))


def log_snr_ends(process: Process, high: float, low: float) -> Tensor:
    """log-SNR at both ends; where it is not finite at the first, that of 80, or of 4 times the last end's ratio."""
    ends = process.log_snr(float64([high, low]))
    if torch.isinf(ends[0]):
        ends[0] = min(-2 * math.log(_RATIO_OF_PURE_NOISE), ends[1].item() - 2 * math.log(4))
    return ends
