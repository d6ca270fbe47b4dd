"""Denoising score matching: the pictures and the noise of every step, and what the network should say of them.

Every random number is a function of (seed, position), where position counts the training pictures: the order of the
data, noise levels, noise, hidden classes and mirror images.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pfode.denoiser import Preconditioning
from pfode.process import from_config
from pfode.scores.denoiser import Denoiser
from pfode.scores.training.config import TrainConfig
from pfode.scores.training.dataset import Data
from pfode.scores.training.levels import LEVELS

__all__ = ["Batch", "Problem", "problem", "unseen_classes"]


class Batch:
    """The pictures and the noise of every step: a function of (config, data, step) and of nothing else.

    Args:
        config: seed, batch, noise levels, share of hidden classes, mirrored classes.
        data: the pictures.
    """

    def __init__(self, config: TrainConfig, data: Data):
        self.config = config
        self.data = data
        self.process = from_config(config.process)
        mirrored = ["*" in config.flip or name in config.flip for name in data.names] or ["*" in config.flip]
        self.mirrored = torch.tensor(mirrored)
        self.order = (-1, np.empty(0, dtype=np.int64))

    def draw(self, step: int, indices: range) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Pictures of the batch of a step.

        Args:
            step: from 0.
            indices: which pictures of the batch, from 0 to batch - 1.

        Returns:
            x0 in [-1, 1] and the noise, (n, channels, size, size); t, (n,); all float64. And the labels, int64 (n,),
            where len(names) hides a class; None for data without classes.
        """
        config, data = self.config, self.data
        chosen, clock, dropped, mirror, noise = [], [], [], [], []
        for i in indices:
            position = step * config.batch + i
            generator = np.random.Generator(np.random.Philox(key=config.seed, counter=[0, 0, 0, position]))
            u = generator.random(3)
            chosen.append(self._chosen(position))
            clock.append((i + u[0]) / config.batch)  # stratified over the batch
            dropped.append(u[1] < config.drop)
            mirror.append(u[2] < 0.5)
            noise.append(generator.standard_normal(data.shape))
        index = torch.tensor(chosen)
        x0 = data.images[index].to(torch.float64) / 127.5 - 1
        labels = None if data.labels is None else data.labels[index]
        mirrored = self.mirrored[0 if labels is None else labels] & torch.tensor(mirror)
        x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        if labels is not None:
            labels = torch.where(torch.tensor(dropped), len(data.names), labels)
        return x0, torch.from_numpy(np.stack(noise)), self.times(torch.tensor(clock, dtype=torch.float64)), labels

    def times(self, quantiles: Tensor) -> Tensor:
        """Times of the process at quantiles in [0, 1) of the distribution of noise levels, of their shape."""
        config = self.config
        inner = quantiles.clamp(1e-12, 1 - 1e-12)  # a normal distribution has no ends
        return LEVELS[config.levels](self.process, inner, config.level_mean, config.level_std)

    def _chosen(self, position: int) -> int:
        """The picture at a position: every epoch is a new permutation of the data."""
        epoch, within = divmod(position, len(self.data))
        if self.order[0] != epoch:
            key = np.random.Philox(key=self.config.seed, counter=[0, 0, 1, epoch])
            self.order = (epoch, np.random.Generator(key).permutation(len(self.data)))
        return int(self.order[1][within])


class Problem(NamedTuple):
    """What the network is asked and what it should answer, in float64.

    Args:
        x: noisy pictures x_t = alpha x_0 + sigma noise, (batch, channels, size, size).
        c: the preconditioning at their times.
        target: what F(c_in x, c_noise) should be, of the shape of x.
    """

    x: Tensor
    c: Preconditioning
    target: Tensor


def problem(den: Denoiser, x0: Tensor, noise: Tensor, t: Tensor) -> Problem:
    """The regression of denoising score matching (Vincent 2011; Karras et al. 2022, eq. 8): F against its target.

    Args:
        den: how the network is preconditioned.
        x0: pictures. noise: standard normal, of their shape. t: (batch,) times of the process.
    """
    alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in (den.process.alpha(t), den.process.sigma(t)))
    return Problem(alpha * x0 + sigma * noise, den.precondition(t), den.target(x0, noise, alpha, sigma))


def unseen_classes(config: TrainConfig, data: Data) -> list[int]:
    """The classes that a network trained so never sees, by number; len(data.names) for no class."""
    if data.labels is None:
        return []
    shown = set() if config.drop == 1 else set(data.labels.unique().tolist())
    if config.drop > 0:
        shown.add(len(data.names))
    return [index for index in range(len(data.names) + 1) if index not in shown]
