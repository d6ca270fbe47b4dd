"""The data and the noise of every training step.

Every random number is a function of (seed, position), where position counts the training pictures: the order of the
data, noise levels, noise, hidden classes, mirror images, and the points of a source that is not noise.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfode.process import from_config
from pfode.scores.training.config import TrainConfig
from pfode.scores.training.dataset import Data
from pfode.scores.training.levels import LEVELS
from pfode.scores.training.objectives import Example
from pfode.scores.training.points import ENDLESS, Points

__all__ = ["Batch", "unseen_classes"]

SOURCE = 2**41  # where a source that is a law begins in its stream: beyond every point of the data
SEEDED = 2**20 + 7  # points of a law between the starts of two runs
JITTER = 0.1  # noise added to style vectors, in their standard deviations: networks are asked for styles between theirs
STEP = 1e-6  # of the difference quotient of log(sigma/alpha) in the quantile


class Batch:
    """The pictures and the noise of every step: a function of (config, data, step) and of nothing else.

    Args:
        config: seed, batch, noise levels, share of hidden classes, mirrored classes.
        data: the pictures, or points.
    """

    def __init__(self, config: TrainConfig, data: Data | Points):
        self.config = config
        self.data = data
        self.process = from_config(config.process)
        mirrored = ["*" in config.flip or name in config.flip for name in data.names] or ["*" in config.flip]
        self.mirrored = torch.tensor(mirrored)
        self.spread = 0 if data.styles is None else data.styles.std(dim=0, correction=0)
        self.order = (-1, np.empty(0, dtype=np.int64))
        self.coupled: tuple[int, Any] = (-1, None)  # the whole example of a step, where its parts are asked for

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
        u, noise = self._numbers(step, indices)
        chosen = [self._chosen(step * config.batch + i) for i in indices]
        x0 = data.take(chosen)
        labels = None if data.labels is None else data.labels[torch.tensor(chosen)]
        mirrored = self.mirrored[0 if labels is None else labels] & (u[:, 2] < 0.5)
        if mirrored.any():
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        if labels is not None:
            labels = torch.where(u[:, 1] < config.drop, len(data.names), labels)
        self.quantiles = (torch.tensor(list(indices), dtype=torch.float64) + u[:, 0]) / config.batch  # stratified
        return x0, self._source(step, indices, chosen, noise), self.times(self.quantiles), labels

    def example(self, step: int, indices: range) -> Example:
        """The same with the points of the source coupled with the data, as the objective wants them."""
        config, joint = self.config, self.config.objective.coupling.joint
        every = range(config.batch)
        if joint and len(indices) < config.batch:  # a part of a batch whose points belong together
            if self.coupled[0] != step:
                self.coupled = (step, self.example(step, every))
            return self.coupled[1].part(list(indices))
        x0, noise, t, labels = self.draw(step, indices)
        quantiles = self.quantiles
        if joint:
            noise = noise[config.objective.coupling.order(x0, noise, labels, (config.seed + (step << 32)) % 2**64)]
        seeds = [(config.seed * 0x9E3779B97F4A7C15 + step * config.batch + i) % 2**64 for i in indices]
        return Example(x0, noise, t, labels, seeds, self._slopes(quantiles), self.styles(step, indices))

    def _numbers(self, step: int, indices: range) -> tuple[Tensor, np.ndarray]:
        """Uniform numbers, (n, 3), and noise: of pictures by a generator for each, of points by one for each step."""
        config, shape = self.config, self.data.shape
        if isinstance(self.data, Points):
            generator = np.random.Generator(np.random.Philox(key=config.seed, counter=[0, 0, 4, step]))
            every = generator.random((config.batch, 3)), generator.standard_normal((config.batch, *shape))
            chosen = list(indices)
            return torch.from_numpy(every[0][chosen]), every[1][chosen]
        uniforms, noise = [], []
        for i in indices:
            counter = [0, 0, 0, step * config.batch + i]
            generator = np.random.Generator(np.random.Philox(key=config.seed, counter=counter))
            uniforms.append(generator.random(3))
            noise.append(generator.standard_normal(shape))
        return torch.from_numpy(np.stack(uniforms)), np.stack(noise)

    def _source(self, step: int, indices: range, chosen: list[int], noise: np.ndarray) -> Tensor:
        """What t = 1 holds for these positions: noise, points of another set, or the ones that go with the data."""
        data = self.data
        if isinstance(data, Points) and data.pairs is not None:
            return data.pairs[chosen].double()
        source = data.source if isinstance(data, Points) else None
        if source is None:
            return torch.from_numpy(noise)
        positions = [step * self.config.batch + i for i in indices]
        if source.law is not None:
            return source.take([SOURCE + position for position in positions])
        random = (np.random.Philox(key=self.config.seed, counter=[0, 0, 3, position]) for position in positions)
        return source.take([int(np.random.Generator(key).integers(len(source))) for key in random])

    def _slopes(self, quantiles: Tensor) -> Tensor:
        """d log(sigma/alpha) / dq, by a difference quotient; 0 where the times are cut off at the process's ends."""
        low, high = (quantiles - STEP).clamp_min(1e-9), (quantiles + STEP).clamp_max(1 - 1e-9)
        logs = [-0.5 * self.process.log_snr(self.times(q)) for q in (low, high)]
        return ((logs[1] - logs[0]) / (high - low)).abs().nan_to_num(0.0, 0.0, 0.0)

    def styles(self, step: int, indices: range) -> Tensor | None:
        """Style vectors of the pictures that `draw` gives, with a little noise; a row of NaN hides one.

        Returns:
            float32 (n, styles); None for data without styles.
        """
        config, found = self.config, self.data.styles
        if found is None:
            return None
        rows = []
        for i in indices:
            position = step * config.batch + i
            generator = np.random.Generator(np.random.Philox(key=config.seed, counter=[0, 0, 2, position]))
            hidden, jitter = generator.random() < config.drop, generator.standard_normal(found.shape[1])
            noise = JITTER * self.spread * torch.from_numpy(jitter).float()
            rows.append(found[self._chosen(position)] + noise + (torch.nan if hidden else 0.0))
        return torch.stack(rows)

    def times(self, quantiles: Tensor) -> Tensor:
        """Times of the process at quantiles in [0, 1) of the distribution of noise levels, of their shape."""
        config = self.config
        inner = quantiles.clamp(1e-12, 1 - 1e-12)  # a normal distribution has no ends
        return LEVELS[config.levels](self.process, inner, config.level_mean, config.level_std)

    def _chosen(self, position: int) -> int:
        """The picture at a position: every epoch is a new permutation of the data; a law's points come in order."""
        if len(self.data) == ENDLESS:
            return (position + self.config.seed * SEEDED) % ENDLESS
        epoch, within = divmod(position, len(self.data))
        if self.order[0] != epoch:
            key = np.random.Philox(key=self.config.seed, counter=[0, 0, 1, epoch])
            self.order = (epoch, np.random.Generator(key).permutation(len(self.data)))
        return int(self.order[1][within])


def unseen_classes(config: TrainConfig, data: Data | Points) -> list[int]:
    """The classes that a network trained so never sees, by number; len(data.names) for no class."""
    if data.labels is None:
        return []
    shown = set() if config.drop == 1 else set(data.labels.unique().tolist())
    if config.drop > 0:
        shown.add(len(data.names))
    return [index for index in range(len(data.names) + 1) if index not in shown]
