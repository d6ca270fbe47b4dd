"""The loss of a denoiser on pictures, with draws that are always the same: for pictures that were held out."""

from dataclasses import replace

import torch

from pfode.scores.denoiser import Denoiser
from pfode.scores.training.batches import Batch
from pfode.scores.training.config import TrainConfig
from pfode.scores.training.dataset import Data
from pfode.scores.training.points import Points

__all__ = ["mean_loss"]

DRAWS = 256  # pictures, with repetition where there are fewer; noise levels are stratified over them
PART = 64  # at a time
SEED = 1_000_003  # far from those that people train with


def mean_loss(den: Denoiser, config: TrainConfig, data: Data | Points, device: torch.device) -> float:
    """The loss of the objective on 256 draws of pictures, noise and levels, each level counting as it is.

    Args:
        den: with the averaged weights, in evaluation mode.
        config: of the run: noise levels, mirrored classes; classes and styles are not hidden.
        data: the pictures.
        device: of the network.
    """
    batch = Batch(replace(config, seed=SEED, batch=DRAWS, accum=1, drop=0.0), data)
    total = 0.0
    with torch.no_grad():
        for start in range(0, DRAWS, PART):
            indices = range(start, start + PART)
            losses = config.objective.loss(den, batch.example(0, indices), device)
            total += float(losses.float().mean()) * PART / DRAWS
    return total
