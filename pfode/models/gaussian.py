"""Gaussians with diagonal covariance, as networks say them: mean and logarithm of the standard deviation."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Forecast", "divergence", "log_density", "merged"]


@dataclass(frozen=True)
class Forecast:
    """A prediction with its uncertainty, at some times.

    Attributes:
        t: times, shape (series, times).
        mean, std: shape (series, times, channels); mean - 2 std to mean + 2 std is a band of about 95 %.
    """

    t: Tensor
    mean: Tensor
    std: Tensor


def log_density(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(x; mean, std^2), element by element."""
    return -0.5 * ((x - mean) * torch.exp(-log_std)).square() - log_std - 0.5 * math.log(2 * math.pi)


def divergence(mean: Tensor, log_std: Tensor, other_mean: Tensor, other_log_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) | N(other mean, other std^2)), element by element."""
    ratio = 2 * (log_std - other_log_std)
    return 0.5 * (((mean - other_mean) * torch.exp(-other_log_std)).square() + ratio.exp() - ratio - 1)


def merged(t: Tensor, x: Tensor, ts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Series with further times, at which nothing is observed.

    Args:
        t, x: as of Series. ts: further times, shape (series, times).

    Returns:
        Times, sorted, and values; where each of the further times is among them, shape (series, times). A further time
        that is one of the observations comes after it.
    """
    every = torch.cat([t, ts.to(t)], 1)
    order = torch.argsort(torch.nan_to_num(every, nan=math.inf), dim=1, stable=True)
    missing = x.new_full((len(x), ts.shape[1], x.shape[2]), math.nan)
    values = torch.cat([x, missing], 1).gather(1, order[..., None].expand(-1, -1, x.shape[2]))
    place = torch.argsort(order, dim=1)[:, t.shape[1] :]
    return every.gather(1, order), values, place
