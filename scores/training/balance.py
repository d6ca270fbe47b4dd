"""Noise levels that count alike: each level's loss is divided by its running mean.

High noise has a loss that no network can lower, low noise one that is small and still shows as grain. Karras et al.
2024 (EDM2, section 2.2, after Kendall et al. 2018) learn the logarithm of the expected loss beside the network and
divide by it; here it is the running mean over strata of the levels, which needs no network and is kept in checkpoints.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pfode.scores.training.batches import Batch

__all__ = ["Balance"]

STRATA = 16
RATE = 0.02  # of the running means, per step


class Balance:
    """The running mean loss of every stratum of the noise levels, and the weights that follow from it.

    A batch is stratified over the quantiles of the levels (see `Batch.draw`): picture i of every batch lies in stratum
    i * strata // batch, stratum 0 being that of the smallest quantiles.

    Args:
        batch: pictures per step.
    """

    def __init__(self, batch: int):
        self.strata = min(STRATA, batch)
        self.of = torch.arange(batch, device="cpu") * self.strata // batch
        self.count = torch.bincount(self.of, minlength=self.strata).to(torch.float64)
        self.mean = torch.ones(self.strata, dtype=torch.float64, device="cpu")  # a new network answers 0

    def weights(self, indices: range) -> Tensor:
        """Of these pictures of a batch: one over the running means, 1 on average over the strata; float64 (n,)."""
        inverse = 1 / self.mean.clamp(min=1e-12)
        return (inverse / inverse.mean())[self.of[indices.start : indices.stop]]

    def sums(self, indices: range, losses: Tensor) -> Tensor:
        """The losses (n,) of these pictures summed by stratum: (strata,), on the device of the losses."""
        of = self.of[indices.start : indices.stop].to(losses.device)
        return torch.zeros(self.strata, dtype=losses.dtype, device=losses.device).index_add_(0, of, losses)

    def update(self, sums: Tensor) -> None:
        """Take in the sums over a whole batch."""
        self.mean += RATE * (sums.to("cpu", torch.float64) / self.count - self.mean)

    def table(self, batch: "Batch") -> list[dict[str, float]]:
        """The means by noise level: {"from", "to": sigma/alpha, "loss"} of each stratum, from low noise to high."""
        ends = batch.times(torch.arange(self.strata + 1, dtype=torch.float64) / self.strata)
        ratios = (batch.process.sigma(ends) / batch.process.alpha(ends)).tolist()
        rows = zip(ratios, ratios[1:], self.mean.tolist(), strict=False)
        return [{"from": float(f"{a:.3g}"), "to": float(f"{b:.3g}"), "loss": float(f"{m:.3g}")} for a, b, m in rows]
