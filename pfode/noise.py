"""Keyed noise: (sample seed, draw number) -> the same numbers on every machine, device, batch and order of drawing.

Philox4x64 (Salmon et al. 2011) on the host, keyed by the pair; numbers are made in float64 and rounded to the dtype
asked for, so that a float32 run and a float64 run see the same noise.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pfode.errors import integer

INITIAL = 0  # draw number of the initial noise; row k of a plan draws number k + 1


def normal(
    seeds: Sequence[int],
    draw: int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise of shape (len(seeds), *shape); row i depends on (seeds[i], draw) alone."""
    out = np.empty((len(seeds), math.prod(shape)))
    source = np.random.Philox(key=0)
    generator, state = np.random.Generator(source), source.state
    for row, seed in zip(out, seeds, strict=True):  # a new key in the fresh state: quicker than a new generator
        state["state"]["key"] = np.array([seed, draw], dtype=np.uint64)
        source.state = state
        generator.standard_normal(out=row)
    return torch.from_numpy(out).reshape(len(seeds), *shape).to(device=device, dtype=dtype)


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds as a list.

    Raises:
        UsageError: a seed that is no integer in [0, 2^64).
    """
    return [integer("seed", seed, 0, 2**64 - 1) for seed in seeds]
