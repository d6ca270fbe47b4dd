"""Styles: vectors that a network is told besides the class, and new ones mixed from those of its training."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pfode.errors import UsageError

__all__ = ["bank_of", "mixed"]

MOST = 512  # styles that a model keeps
MIXED = 3  # of them in a new one
SPREAD = 1.2  # of the Dirichlet distribution of the shares
_KEY = 0x5354594C45  # the last counter word: no noise of a sample is drawn there


def bank_of(styles: Tensor) -> Tensor:
    """The styles that a model keeps, float32 (k, numbers): the different ones, sorted, at most 512 evenly spaced."""
    rows = torch.unique(styles, dim=0)
    return rows if len(rows) <= MOST else rows[(torch.arange(MOST, device="cpu") * len(rows) + len(rows) // 2) // MOST]


def mixed(bank: Tensor, seeds: Sequence[int]) -> Tensor:
    """A new style for every seed, float32 (len(seeds), numbers) on the bank's device: a mean of three of the bank.

    Their shares are drawn from a Dirichlet distribution; row i depends on the bank and on seeds[i] alone.

    Raises:
        UsageError: an empty bank.
    """
    if len(bank) == 0:
        raise UsageError("this network keeps no styles to mix new ones from", "give style=")
    known = bank.to("cpu", torch.float64)
    rows = []
    for seed in seeds:
        generator = np.random.Generator(
            np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=[0, 0, 0, _KEY])
        )
        chosen = torch.from_numpy(generator.integers(len(known), size=MIXED))
        shares = torch.from_numpy(generator.dirichlet([SPREAD] * MIXED))
        rows.append(shares @ known[chosen])
    return torch.stack(rows).to(bank.device, torch.float32) if rows else bank.new_zeros((0, bank.shape[1]))
