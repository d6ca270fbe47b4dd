"""Keyed noise: (sample seed, draw number) -> the same numbers on every machine, device, batch and order of drawing.

Philox4x64 (Salmon et al. 2011) on the host, keyed by the pair; numbers are made in float64 and rounded to the dtype
asked for, so that a float32 run and a float64 run see the same noise.

Three kinds: `normal` is fresh for every draw number; `brownian` gives increments of one Brownian path per seed, so that
plans of different steps follow the same path; `signs` are the random signs with which traces are estimated.
"""

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pfode.errors import UsageError, integer, number, shortened

__all__ = [
    "AREA",
    "INITIAL",
    "LEVY",
    "PATH",
    "brownian",
    "check_seeds",
    "normal",
    "rows",
    "signs",
]

INITIAL = 0  # draw number of the initial noise; row k of a plan draws number k + 1
DEPTH = 20  # a Brownian path is known at the multiples of 2^-DEPTH
_FRESH, _TREE, _LEAF, _SIGNS, PATH, AREA, LEVY = range(7)  # the last counter word: draws of different kinds never meet


def normal(
    seeds: Sequence[int],
    draw: int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise of shape (len(seeds), *shape); row i depends on (seeds[i], draw) alone.

    Raises:
        UsageError: seeds, a draw number or a shape that cannot be.
    """
    sides = [integer("shape", side, 0) for side in shape]
    return _tensor(_keyed(seeds, draw, math.prod(sides)), sides, dtype, device)


def signs(
    seeds: Sequence[int],
    nodes: Sequence[int],
    probes: int,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Independent signs, -1 or 1 with probability 1/2 each, shape (probes, len(seeds), *shape).

    Entry (k, i) depends on (seeds[i], nodes[i], k) alone: nodes number the points of a sample's path.

    Raises:
        UsageError: seeds or nodes that cannot be, or another number of nodes than of seeds.
    """
    size = math.prod(shape)
    try:
        bits = _bits(seeds, nodes, probes, size)
    except (TypeError, ValueError, OverflowError) as error:
        given = f"seeds {shortened(seeds)}, nodes {shortened(nodes)}"
        raise UsageError(f"signs: {given}: {error}", "as many nodes as seeds, each from 0 to 2**64 - 1") from error
    values = torch.from_numpy(bits).to(device=device, dtype=dtype).mul_(2).sub_(1)
    return values.view(probes, len(seeds), *shape)


def brownian(
    seeds: Sequence[int],
    start: float,
    stop: float,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ends: dict[int, NDArray[np.float64]] | None = None,
) -> Tensor:
    """(W(stop) - W(start)) / sqrt(|stop - start|), W a standard Brownian motion on [0, 1]: standard normal noise.

    W is keyed by the seed alone: increments over adjacent intervals add up, whatever is asked for and in which order.
    It is Levy's construction (Karatzas & Shreve 1991, section 2.3), evaluated at the nodes on the way to an end only:
    W(t) = t Z + sum over levels l of 2^(-l/2 - 1) hat(2^l t) Z_(l, floor(2^l t)), hat(s) = 1 - |2 (s mod 1) - 1|.
    Times are rounded to multiples of 2^-20, so an interval of length d has a correlation of at least 1 - 2^-20/d with
    the one rounded to; one that is rounded to nothing draws noise of its own.

    Args:
        start, stop: within [0, 1], in either order.
        shape: of one sample; the result has shape (len(seeds), *shape).
        ends: kept by the caller between calls with the same seeds and shape: what is known of W at the last two ends,
            so that intervals in sequence cost one end each.

    Raises:
        UsageError: times outside [0, 1], or one given twice.
    """
    start, stop = number("start", start, 0, 1), number("stop", stop, 0, 1)
    if start == stop:
        raise UsageError(f"brownian: need an interval, got {start!r} twice")
    size, ends = math.prod(shape), {} if ends is None else ends
    a, b = (round(t * 2**DEPTH) for t in (start, stop))
    if a == b:
        leaf = int(np.float64(min(start, stop)).view(np.uint64)), int(np.float64(max(start, stop)).view(np.uint64))
        increment = math.copysign(1, stop - start) * _keyed(seeds, leaf[0], size, _LEAF, leaf[1])
    else:
        known = {t: ends[t] if t in ends else _path(seeds, t, size) for t in (a, b)}
        ends.clear()
        ends.update(known)
        increment = (known[b] - known[a]) * math.sqrt(2**DEPTH / abs(b - a))
    return _tensor(increment, shape, dtype, device)


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds as a list.

    Raises:
        UsageError: a seed that is no integer in [0, 2^64).
    """
    return [integer("seed", seed, 0, 2**64 - 1) for seed in seeds]


def _path(seeds: Sequence[int], t: int, size: int) -> NDArray[np.float64]:
    """W(t 2^-DEPTH), shape (len(seeds), size): the linear term, and one hat function per level."""
    w = t / 2**DEPTH * _keyed(seeds, 0, size, _TREE)
    for level in range(DEPTH):
        index, rest = divmod(t, 2 ** (DEPTH - level))
        if rest:
            hat = 1 - abs(rest / 2 ** (DEPTH - level - 1) - 1)
            w += 2 ** (-level / 2 - 1) * hat * _keyed(seeds, 2**level + index, size, _TREE)
    return w


def _keyed(seeds: Sequence[int], word: int, size: int, kind: int = _FRESH, more: int = 0) -> NDArray[np.float64]:
    """Standard normal numbers of shape (len(seeds), size), keyed by (seed, word) and (more, kind)."""
    try:
        return _drawn(seeds, word, size, kind, more)
    except (TypeError, ValueError, OverflowError) as error:  # not checked before: this is called for every row
        given = f"seeds {shortened(seeds)}, draw {shortened(word)}, {shortened(size)} numbers each"
        raise UsageError(
            f"noise: {given}: {error}", "seeds and draw from 0 to 2**64 - 1, sizes of at least 1"
        ) from error


def _drawn(seeds: Sequence[int], word: int, size: int, kind: int, more: int) -> NDArray[np.float64]:
    return rows(seeds, [word] * len(seeds), (size,), kind, more)


def rows(
    seeds: Sequence[int], words: Sequence[int], shape: Sequence[int], kind: int, more: int = 0
) -> NDArray[np.float64]:
    """Standard normal numbers of shape (len(seeds), *shape): row i is keyed by (seeds[i], words[i]), (more, kind)."""
    out = np.empty((len(seeds), *shape))
    source, generator, state = _generator()
    state["state"]["counter"] = np.array([0, 0, more, kind], dtype=np.uint64)
    for row, seed, word in zip(out, seeds, words, strict=True):  # a new key in the fresh state: quicker than a new one
        state["state"]["key"] = np.array([seed, word], dtype=np.uint64)
        source.state = state
        generator.standard_normal(out=row)
    return out


_own = threading.local()


def _generator() -> tuple[np.random.Philox, np.random.Generator, Any]:
    """This thread's generator, its source and the source's fresh state, a new copy to be written in."""
    if not hasattr(_own, "made"):
        source = np.random.Philox(key=0)
        _own.made = source, np.random.Generator(source), source.state
    source, generator, fresh = _own.made
    return source, generator, {**fresh, "state": dict(fresh["state"])}


def _bits(seeds: Sequence[int], nodes: Sequence[int], probes: int, size: int) -> NDArray[np.uint8]:
    """Random bits of shape (probes, len(seeds), size), keyed by (seed, node) and (probe, kind)."""
    out = np.empty((probes, len(seeds), size), dtype=np.uint8)
    source = np.random.Philox(key=0)
    state, words = source.state, -(-size // 64)
    for i, (seed, node) in enumerate(zip(seeds, nodes, strict=True)):
        state["state"]["key"] = np.array([seed, node], dtype=np.uint64)
        for k in range(probes):
            state["state"]["counter"] = np.array([0, 0, k, _SIGNS], dtype=np.uint64)
            source.state = state
            raw = source.random_raw(words).astype("<u8")
            out[k, i] = np.unpackbits(raw.view(np.uint8), bitorder="little", count=size)
    return out


def _tensor(
    values: NDArray[np.float64], shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    return torch.from_numpy(values.reshape(len(values), *shape)).to(device=device, dtype=dtype)
