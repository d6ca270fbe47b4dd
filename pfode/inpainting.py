"""Inpainting: a denoiser that knows a part of the data draws the rest to it.

Where the data x0 are known, D(x, t) = x0 whatever x is. On the PF-ODE such a part moves on x_t = alpha x0 + sigma eps
with the eps that it started with: what pipelines do by replacing the known part after each step, without stepping in.
Methods on eps, x0 or eps - x0 (the charts ddim, dpm, dpm++, flow) follow that line exactly, others to their order. The
rest is drawn by the network, which sees both parts at the right noise.
"""

from typing import Any

import torch
from torch import Tensor

from pfode.denoiser import Denoiser, at, fingerprint
from pfode.errors import UsageError

__all__ = ["Inpainted", "share_drawn"]


class Inpainted:
    """D'(x, t) = (1 - mask) data + mask D(x, t), under the wrapped denoiser's preconditioning in `D`.

    Args:
        denoiser: the wrapped one.
        data: the known x0, shape of the states it will see.
        mask: of the shape of data: 0 where x0 is known, 1 where it is drawn; in between a mean of both.
    """

    def __init__(self, denoiser: Denoiser, data: Tensor, mask: Tensor):
        self.denoiser, self.data, self.mask = denoiser, data, mask
        self.process = denoiser.process
        self.evals: int = getattr(denoiser, "evals", 1)

    @property
    def fingerprint(self) -> str | None:
        """That of the wrapped denoiser: a plan fitted to it serves here, too."""
        return fingerprint(self.denoiser)

    def at(self, t: Any) -> "Inpainted":
        """What stands in for this one at time t; see `pfode.denoiser.at`."""
        there = at(self.denoiser, t)
        return self if there is self.denoiser else Inpainted(there, self.data, self.mask)

    def only(self, samples: Tensor) -> "Inpainted":
        """The same for some samples, by their numbers (m,)."""
        return Inpainted(self.denoiser, self.data[samples], self.mask[samples])

    def ended(self, x: Tensor, alpha: float) -> Tensor:
        """The states x at sigma = 0, where what is known is alpha x0, whatever was rounded on the way."""
        return torch.where(self.mask == 0, alpha * self.data, x)

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """D'(x, t), of the shape and dtype of x."""
        drawn = self.denoiser(x, t, **cond).to(x.dtype)
        # where mask is 0 the network does not matter, be it infinite
        return torch.where(self.mask == 0, self.data, torch.lerp(self.data, drawn, self.mask))


def share_drawn(mask: Any, shape: tuple[int, ...], n: int) -> Tensor:
    """A mask for n samples of a shape, float32 (n, *shape), checked.

    Args:
        mask: a tensor of numbers from 0 to 1, or of booleans, that `shape` or `(n, *shape)` broadcasts: (height, width)
            for pictures.

    Raises:
        UsageError: something else.
    """
    hint = "a tensor of 0 (kept) to 1 (drawn) of shape (height, width)"
    if not isinstance(mask, Tensor) or mask.layout != torch.strided or mask.is_complex():
        raise UsageError(f"mask: need a dense tensor, got {type(mask).__name__}", hint)
    try:
        found = mask.float().broadcast_to(n, *shape)
    except RuntimeError as error:
        problem = f"mask: shape {tuple(mask.shape)} does not fit samples of shape {shape}"
        raise UsageError(problem, hint) from error
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        problem = "mask: has values outside of 0 to 1"
        raise UsageError(problem, "mask=picture / 255" if float(mask.nan_to_num().max()) > 1 else hint)
    return found
