"""Missing values, for all series and channels at once, and tridiagonal systems.

A series x has shape (*batch, length, channels), NaN where nothing was observed; its times t have shape (length,), or
(*batch, length) for times of each series.
"""

import torch
from torch import Tensor

__all__ = ["column", "fill_ends", "fill_forward", "fill_linear", "observed", "tridiagonal"]


def observed(x: Tensor) -> Tensor | None:
    """Where x holds numbers, a boolean tensor like x; None if it does everywhere."""
    seen = ~torch.isnan(x)
    return None if bool(seen.all()) else seen


def _before(seen: Tensor) -> Tensor:
    """Of each place the last observed one up to it, -1 where there is none: int64, like x."""
    place = torch.arange(seen.shape[-2], device=seen.device)[:, None]
    return torch.where(seen, place, -1).cummax(-2).values


def _after(seen: Tensor) -> Tensor:
    """Of each place the first observed one from it on, the length where there is none."""
    n = seen.shape[-2]
    place = torch.arange(n, device=seen.device)[:, None]
    return torch.where(seen, place, n).flip(-2).cummin(-2).values.flip(-2)


def fill_forward(x: Tensor, seen: Tensor | None = None) -> Tensor:
    """x with the last observed value carried on; NaN stays where none was observed yet.

    Args:
        x: shape (*batch, length, channels). seen: where it counts as observed; None: where it is not NaN.
    """
    seen = observed(x) if seen is None else seen
    return x if seen is None else x.gather(-2, _before(seen).clamp(min=0))


def fill_ends(x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """x with its first observed value carried back to the start and its last one on to the end, where it now counts as
    observed; channels without any are 0."""
    before, after, n = _before(seen), _after(seen), x.shape[-2]
    nothing, head, tail = after[..., :1, :] == n, before < 0, after == n
    source = torch.where(head, after, torch.where(tail, before, torch.arange(n, device=x.device)[:, None]))
    filled = torch.where(nothing, 0.0, x.gather(-2, source.clamp(0, n - 1)))
    return filled, seen | head | tail


def fill_linear(x: Tensor, t: Tensor) -> Tensor:
    """x with gaps on the line between their neighbours in time, and constant before the first observation and after the
    last; channels without any are 0.

    Args:
        x: shape (*batch, length, channels). t: shape (length,) or (*batch, length).
    """
    seen = observed(x)
    if seen is None:
        return x
    n = x.shape[-2]
    before, after = _before(seen), _after(seen)
    nothing, missing = after[..., :1, :] == n, ~seen
    left = torch.where(before < 0, after, before).clamp(max=n - 1)
    right = torch.where(after == n, left, after)
    here = column(t).expand(x.shape)
    t0, t1, x0, x1 = (a.gather(-2, at) for a in (here, x) for at in (left, right))
    gap = t1 - t0
    share = torch.where(gap > 0, here - t0, 0.0) / torch.where(gap > 0, gap, 1.0)
    x0, x1 = (torch.where(nothing, 0.0, value) for value in (x0, x1))
    return torch.where(missing, x0 + share * (x1 - x0), torch.where(missing, 0.0, x))


def column(t: Tensor) -> Tensor:
    """Times as a factor of values: a dimension for the channels."""
    return t[..., None]


def tridiagonal(b: Tensor, upper: Tensor, diagonal: Tensor, lower: Tensor) -> Tensor:
    """The solution of a tridiagonal system, by Gaussian elimination without pivots (Thomas): for dominant diagonals.

    Args:
        b: right-hand sides, shape (..., k). upper, lower: shape (..., k - 1). diagonal: shape (..., k).
    """
    k = b.shape[-1]
    rows, above, below = b.unbind(-1), upper.unbind(-1), lower.unbind(-1)
    pivots, sides = [diagonal[..., 0]], [rows[0]]
    for i, middle in enumerate(diagonal.unbind(-1)[1:], 1):
        w = below[i - 1] / pivots[-1]
        pivots.append(middle - w * above[i - 1])
        sides.append(rows[i] - w * sides[-1])
    found = [sides[-1] / pivots[-1]]
    for i in range(k - 2, -1, -1):
        found.append((sides[i] - above[i] * found[-1]) / pivots[i])
    return torch.stack(found[::-1], -1)
