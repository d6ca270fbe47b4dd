"""How a likelihood ends at t_min, the least noise at which a network is asked: as a density, or as a probability.

The path gives log p of the state x_t at t_min. Of data x that are densities, x_t = alpha x, and log p(x) = log p_t(x_t)
+ d log alpha is the density of the data with noise of sigma/alpha. Pictures have finitely many values, w apart; the
probability of one is bounded by states drawn from q(x_t | x) within its bin, of width alpha w around alpha x:

    log P(x) >= E log p_t(x_t) - log q(x_t | x)

    uniform     x_t = alpha (x + w (u - 1/2)), u uniform                                  -log q = d log(alpha w)
    truncated   x_t = alpha x + sigma u, u standard normal within |u| <= alpha w / 2 sigma   (Zheng et al. 2023)

The second needs no density between the values, but a network that knows the least noise: where that is far narrower
than a bin, levels that training hardly ever draws, the first is often the better bound; "auto" takes the second where
the noise reaches over a bin, alpha w / 2 sigma <= 3. With k draws the bound is
log mean_k p_t / q, which rises to log P(x) as k grows (Burda et al. 2016). In every element the k values of u are one
from each k-th part of its distribution, taken in an order of its own, by which the mean errs less.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pfode import noise
from pfode.errors import unknown
from pfode.process import Process

__all__ = ["ENDS", "dequantised", "settled_end"]

ENDS = ("none", "uniform", "truncated", "auto")
REACH = 3.0  # standard deviations of the noise to the edge of a bin
_ORDER = 2**40  # draw numbers of noise, far from those of plans
_DRAWS = _ORDER + 1


def settled_end(end: str, process: Process, width: float) -> str:
    """What "auto" is for bins of this width: see this module.

    Raises:
        UsageError: an unknown end.
    """
    if end not in ENDS:
        raise unknown("end", end, ENDS)
    if end != "auto":
        return end
    reach = process.alpha(process.t_min) * width / (2 * process.sigma(process.t_min))
    return "truncated" if reach <= REACH else "uniform"


def dequantised(
    x: Tensor, process: Process, end: str, width: float, seeds: Sequence[int], draw: int = 0, draws: int = 1
) -> tuple[Tensor, Tensor]:
    """States at t_min for data x, and -log q of them, shape (n,).

    Args:
        x: data, shape (n, ...). end: of `ENDS`, settled. width: w.
        seeds: one per sample. draw: by number, from 0, of so many `draws`.
    """
    alpha, sigma, d = process.alpha(process.t_min), process.sigma(process.t_min), math.prod(x.shape[1:])
    if end == "none":
        return alpha * x, x.new_zeros(len(x))
    u = _uniform(seeds, x.shape[1:], draw, draws)
    if end == "uniform":
        state = alpha * (x + width * (u - 0.5).to(x))
        return state, x.new_full((len(x),), d * math.log(alpha * width))
    reach = alpha * width / (2 * sigma)
    inside = math.erf(reach / math.sqrt(2))
    u = math.sqrt(2) * torch.special.erfinv((2 * u - 1) * inside)
    each = 0.5 * u.square().flatten(1).sum(1) + d * (math.log(sigma * inside) + 0.5 * math.log(2 * math.pi))
    return alpha * x + sigma * u.to(x), each.to(x)


def _uniform(seeds: Sequence[int], shape: Sequence[int], draw: int, draws: int) -> Tensor:
    """u in (0, 1), shape (n, *shape), float64 on the host: of all draws one in each part [j, j + 1) / draws."""
    u = torch.special.ndtr(noise.normal(seeds, _DRAWS + draw, shape, torch.float64))
    if draws == 1:
        return u
    strides = torch.tensor([g for g in range(1, draws + 1) if math.gcd(g, draws) == 1], device="cpu")
    pick = torch.special.ndtr(noise.normal(seeds, _ORDER, (2, *shape), torch.float64))
    stride = strides[(pick[:, 0] * len(strides)).long().clamp(max=len(strides) - 1)]
    first = (pick[:, 1] * draws).long().clamp(max=draws - 1)
    return ((first + draw * stride) % draws + u) / draws
