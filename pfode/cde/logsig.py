"""Log-signatures of piecewise linear paths, and of windows of long series (Morrill et al. 2021, "Neural rough
differential equations for long time series": the log-ODE method).

The signature of a path of d channels is the series of its iterated integrals, an element of the tensor algebra: level
k has d^k numbers. That of a straight line with increment v is exp(v), that of two paths one after the other the product
of theirs (Chen). Its logarithm is a Lie element, given by its coefficients at the Lyndon words, of which there are few.
"""

import functools
import itertools

import torch
from torch import Tensor

from pfode.cde.filling import fill_linear
from pfode.cde.paths import series
from pfode.errors import UsageError, integer, number

__all__ = ["logsig_windows", "logsignature", "logsignature_channels", "lyndon_words", "windows"]

MOST_DEPTH = 4
_MOST_CHANNELS = 10_000  # of the deepest level, for each series and window


@functools.lru_cache(64)
def lyndon_words(channels: int, depth: int) -> tuple[tuple[int, ...], ...]:
    """The words of at most `depth` letters 0, 1, ... that are less than each of their own rotations: by length, then in
    the dictionary's order."""
    words = (word for n in range(1, depth + 1) for word in itertools.product(range(channels), repeat=n))
    return tuple(word for word in words if all(word < word[i:] + word[:i] for i in range(1, len(word))))


def logsignature_channels(channels: int, depth: int) -> int:
    """How many numbers the log-signature to a depth of a path of so many channels has."""
    return len(lyndon_words(*_sizes(channels, depth)))


def logsignature(x: Tensor, depth: int) -> Tensor:
    """The log-signature of the piecewise linear path through points, its coefficients at the Lyndon words.

    Args:
        x: shape (*batch, length, channels), without NaN.
        depth: 1 to 4.

    Returns:
        Shape (*batch, logsignature_channels(channels, depth)). The first `channels` of it are x's increment.

    Raises:
        UsageError: another depth, or more channels than the depth allows.
    """
    channels, depth = _sizes(x.shape[-1], depth)
    levels = [x.new_zeros(*x.shape[:-2], channels**k) for k in range(1, depth + 1)]
    for step in x.diff(dim=-2).unbind(-2):
        levels = _times_exp(levels, step)
    found = torch.cat(_log(levels), -1)
    return found[..., _places(channels, depth, x.device)]


def logsig_windows(x: Tensor, depth: int, window_length: float, t: Tensor | None = None) -> Tensor:
    """The series whose increments are the log-signatures of a series' windows: as long as there are windows, plus one.

    A neural CDE driven by the linear path through it takes one step for each window, and sees of what happens inside it
    as much as the depth says.

    Args:
        x: shape (*batch, length, channels), NaN where missing: the path is linear in between.
        depth: 1 to 4.
        window_length: how much time a window takes; the last one may take less.
        t: times, rising, shape (length,); None: 0, 1, 2, ...

    Returns:
        Shape (*batch, windows + 1, logsignature_channels(channels, depth)); it begins with x's first values and zeros.

    Raises:
        UsageError: as `logsignature` and `linear`; a window that is none; times of each series.
    """
    x, times = series(x, t)
    channels, depth = _sizes(x.shape[-1], depth)
    if times.ndim > 1:
        raise UsageError("t: windows need times that all series have in common", "one solve for each series")
    if number("window_length", window_length, 0.0) == 0:
        raise UsageError("window_length: need a positive number, got 0")
    x, edges = fill_linear(x, times), windows(times, window_length)
    starts, ends = edges[:-1], edges[1:]
    inside = (times > starts[:, None]) & (times < ends[:, None])
    most = int(inside.sum(1).max())
    order = torch.argsort((~inside).to(torch.int8), dim=1, stable=True)[:, :most]
    at = torch.where(inside.gather(1, order), times[order], ends[:, None])  # the end again: nothing moves
    at = torch.cat([starts[:, None], at, ends[:, None]], 1)
    place = (torch.searchsorted(times, at) - 1).clamp(0, len(times) - 2)
    share = ((at - times[place]) / (times[place + 1] - times[place]))[..., None]
    points = torch.lerp(x[..., place, :], x[..., place + 1, :], share.to(x.dtype))
    found = logsignature(points, depth)
    first = torch.nn.functional.pad(x[..., :1, :], (0, found.shape[-1] - channels))
    return torch.cat([first, found], -2).cumsum(-2)


def windows(times: Tensor, window_length: float) -> Tensor:
    """Where windows begin and end, in float64."""
    first, last = float(times[0]), float(times[-1])
    count = -int(-(last - first) / window_length // 1)
    count -= first + (count - 1) * window_length >= last - 1e-9 * (last - first)
    if count > 10 * len(times):
        raise UsageError(
            f"window_length: {window_length:g} makes {count} windows of {len(times)} observations",
            f"window_length={(last - first) / len(times) * 10:.3g}",
        )
    ends = [first + k * window_length for k in range(max(count, 1))] + [last]
    return torch.tensor(ends, dtype=torch.float64, device=times.device).to(times.dtype)


def _sizes(channels: int, depth: int) -> tuple[int, int]:
    depth = integer("depth", depth, 1, MOST_DEPTH)
    if channels**depth > _MOST_CHANNELS:
        raise UsageError(
            f"depth: {channels} channels to depth {depth} make {channels**depth} numbers", f"depth={max(1, depth - 1)}"
        )
    return channels, depth


@functools.lru_cache(64)
def _places(channels: int, depth: int, device: torch.device) -> Tensor:
    """Where the Lyndon words lie among the levels, one after the other."""
    offset, found = 0, []
    for k in range(1, depth + 1):
        for word in lyndon_words(channels, depth):
            if len(word) == k:
                found.append(offset + functools.reduce(lambda at, letter: at * channels + letter, word, 0))
        offset += channels**k
    return torch.tensor(found, device=device)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """The tensor product of two levels."""
    return (a[..., :, None] * b[..., None, :]).flatten(-2)


def _times_exp(levels: list[Tensor], v: Tensor) -> list[Tensor]:
    """1 + levels, times exp(v), in Horner's scheme: level n is v/1 (v/2 (... v/n + a_1 ...) + a_(n-1)) + a_n, with the
    products from the right."""
    made = []
    for n in range(1, len(levels) + 1):
        found = v / n
        for k in range(1, n):
            found = _outer(found + levels[k - 1], v / (n - k))
        made.append(found + levels[n - 1])
    return made


def _log(levels: list[Tensor]) -> list[Tensor]:
    """log(1 + a) = a - a^2/2 + a^3/3 - ..., to the depth of a."""
    depth, power, total = len(levels), list(levels), list(levels)
    for n in range(2, depth + 1):
        power = [
            sum((_outer(power[i - 1], levels[k - i - 1]) for i in range(n - 1, k)), torch.zeros_like(levels[k - 1]))
            if k >= n
            else torch.zeros_like(levels[k - 1])
            for k in range(1, depth + 1)
        ]
        total = [s + p * ((-1) ** (n + 1) / n) for s, p in zip(total, power, strict=True)]
    return total
