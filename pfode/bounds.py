"""Keeping a denoiser's output within bounds: clipping and dynamic thresholding, as functions of tensors.

Both let NaN through and turn what is infinite into NaN: a bound must not hide that something went wrong.
"""

import math

import torch
from torch import Tensor

__all__ = ["clipped", "flat", "per_sample", "thresholded"]


def thresholded(x0: Tensor, quantile: float, limit: float = 1.0, most: float = math.inf) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): clamp(x0, -s, s) limit / s, each sample by itself.

    Args:
        x0: (batch, ...).
        quantile: s is this quantile of |x0|, linearly interpolated, within [limit, most].
        limit: what the data stay within.
        most: the largest s; diffusers' `sample_max_value`.
    """
    size = flat(x0.abs())
    position = quantile * (size.shape[1] - 1)
    below = math.floor(position)
    top = size.topk(size.shape[1] - below, dim=1).values  # torch.quantile takes 2^24 values at most
    s = torch.lerp(top[:, -1], top[:, max(-2, -top.shape[1])], position - below).clamp(limit, most)
    s = per_sample(s, x0)
    return _nan_kept(torch.clamp(x0, -s, s) * (limit / s), x0)


def clipped(x0: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """x0 within [low, high]."""
    return _nan_kept(x0.clamp(low, high), x0)


def _nan_kept(bounded: Tensor, x0: Tensor) -> Tensor:
    """`bounded`, and NaN where x0 is not finite."""
    return torch.where(torch.isfinite(x0), bounded, math.nan)


def flat(x: Tensor) -> Tensor:
    """(batch, ...) as (batch, d)."""
    return x.reshape(len(x), -1)


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """(batch,) in a shape that broadcasts against x, (batch, ...)."""
    return value.reshape(-1, *[1] * (x.ndim - 1))
