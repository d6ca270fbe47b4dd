"""Quantiles of the beta distribution, which some grids of noise levels are made of."""

import math

import numpy as np

__all__ = ["beta_cdf", "beta_quantile"]

_TERMS = 32  # of the continued fraction: it has converged to rounding at 28 for 0.3 <= a, b <= 30


def beta_cdf(x: np.ndarray, a: float, b: float) -> np.ndarray:
    """The regularised incomplete beta function I_x(a, b): the distribution function of Beta(a, b).

    The continued fraction DLMF 8.17.22, evaluated from its end, at x or, by I_x(a, b) = 1 - I_{1-x}(b, a), at 1 - x,
    whichever is on the side where it converges quickly, x < (a + 1) / (a + b + 2).

    Args:
        x: between 0 and 1, float64, of any shape.
        a, b: positive.
    """
    swap = x > (a + 1) / (a + b + 2)
    y = np.where(swap, 1 - x, x)
    p, q = np.where(swap, b, a), np.where(swap, a, b)
    fraction = np.ones_like(y)
    for m in range(_TERMS, 0, -1):
        even = m * (q - m) * y / ((p + 2 * m - 1) * (p + 2 * m))
        odd = -(p + m - 1) * (p + q + m - 1) * y / ((p + 2 * m - 2) * (p + 2 * m - 1))
        fraction = 1 + odd / (1 + even / fraction)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    with np.errstate(divide="ignore"):
        front = np.exp(p * np.log(y) + q * np.log1p(-y) - log_beta) / p
    tail = front / fraction
    return np.where(swap, 1 - tail, tail)


def beta_quantile(probability: np.ndarray, a: float, b: float) -> np.ndarray:
    """The x with I_x(a, b) = probability, by Newton's method in a bracket that is halved where a step would leave it.

    Args:
        probability: between 0 and 1, float64, of any shape.
        a, b: positive.
    """
    inside = (probability > 0) & (probability < 1)
    low, high = np.zeros_like(probability), np.ones_like(probability)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    rising = (probability * a * math.exp(log_beta)) ** (1 / a)  # the leading terms at either end
    falling = 1 - ((1 - probability) * b * math.exp(log_beta)) ** (1 / b)
    x = np.clip(np.where(rising < 0.5, rising, falling), 1e-300, 1 - 1e-16)
    for _ in range(100):
        error = beta_cdf(x, a, b) - probability
        low, high = np.where(error < 0, x, low), np.where(error < 0, high, x)
        with np.errstate(all="ignore"):  # where the density underflows, the bracket is halved
            newton = x - error / np.exp((a - 1) * np.log(x) + (b - 1) * np.log1p(-x) - log_beta)
        better = np.where((newton >= low) & (newton <= high), newton, 0.5 * (low + high))
        moved = inside & (np.abs(better - x) > 4e-15 * x)
        x = np.where(inside, better, x)
        if not moved.any():
            break
    return np.where(inside, x, np.where(probability < 1, 0.0, 1.0))
