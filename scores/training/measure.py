"""What a training run should know of its data before it starts: how large the values are, which noise levels decide."""

import math
from typing import NamedTuple

import torch

from pfode.scores.training.dataset import Data
from pfode.scores.training.points import Points

__all__ = ["Measured", "measure"]

SAMPLE = 2048  # pictures, evenly spaced over the data
POWER = 0.55  # of a component's variance in its weight
NARROW, WIDE = 1.0, 1.3  # bounds of the deviation of the levels


class Measured(NamedTuple):
    """Numbers of a `TrainConfig`.

    Args:
        sigma_data: standard deviation of all values, of pictures in [-1, 1].
        level_mean, level_std: of log(sigma/alpha), for the levels "lognormal".
    """

    sigma_data: float
    level_mean: float
    level_std: float


def measure(data: Data | Points) -> Measured:
    """The standard deviation of data, and the noise levels at which their contents are decided.

    A principal component of standard deviation s is decided where the noise is about s: the best linear denoiser
    restores it by s^2/(s^2 + sigma^2). So log(sigma/alpha) has the mean of the components' log s, and their deviation
    within 1 and 1.3, each component weighted by s^1.1: by s^2 the mean colours alone would count, and by 1 the many
    components that nobody sees. Measured on at most 2048 pictures.
    """
    step = max(1, len(data) // SAMPLE)
    rows = data.take(list(range(0, len(data), step))[:SAMPLE]).flatten(1)
    sigma_data = float(rows.std(correction=0))
    if sigma_data < 1e-3:  # one plain colour: nothing to be decided
        return Measured(0.5, -1.2, 1.2)
    rows = rows - rows.mean(0)
    gram = rows.T @ rows if rows.shape[1] <= len(rows) else rows @ rows.T
    variances = torch.linalg.eigvalsh(gram / len(rows))
    variances = variances[variances > 1e-10 * variances.max()]
    logs, weights = 0.5 * variances.log(), variances**POWER
    mean = float((weights * logs).sum() / weights.sum())
    std = math.sqrt(float((weights * (logs - mean) ** 2).sum() / weights.sum()))
    return Measured(round(sigma_data, 3), round(mean, 2), round(min(max(std, NARROW), WIDE), 2))
