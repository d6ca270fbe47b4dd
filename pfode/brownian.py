"""Brownian paths keyed by seeds: the increments of any interval, whatever else was asked for and in which order.

A path over [t0, t1] is a binary tree. Its root is the whole interval; level l halves the 2^(l-1) intervals of the level
above it at their middles, and what happens there is drawn conditionally on what the parent did (Levy's construction;
with areas see `_halve`). A middle is keyed by (sample seed, its number): it is the same for any batch, order of
queries, grid, device and number of threads. Many middles of a level are drawn from one key, a block, since setting a
key takes longer than drawing a few numbers; how many depends on the shape of a sample alone.

One block per level is kept, so a walk along the path, in either direction, draws every block once, in memory that does
not grow.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pfode import noise
from pfode.errors import UsageError, integer, number, unknown

__all__ = ["Brownian"]

Floats = NDArray[np.float64]
_ROWS = 32  # middles of a block at most,
_NUMBERS = 1024  # and about so many numbers of a sample
_DENSE = 12  # the levels that are drawn in blocks; walks of up to 2^12 steps, below it middles are drawn singly


class Brownian:
    """A Brownian motion per seed, on [t0, t1], as increments: W(tb) - W(ta), and with `area` the space-time area H too.

    H = (1/h) int_ta^tb (W(s) - W(ta)) ds - (W(tb) - W(ta)) / 2 is the mean of the path's deviation from its chord, h =
    tb - ta; it is independent of W, of variance h / 12 (Foster, Lyons & Oberhauser 2020, definition 3.5).

    Times are rounded to multiples of 2^-24 of the unit of the tree, |t1 - t0| or `unit`: an interval shorter than half
    of that has the increment 0.

    Args:
        seeds: one per sample, from 0 to 2^64 - 1.
        shape: of one sample.
        t0, t1: the ends of the path, in either order.
        area: give (W, H) rather than W. A path with areas has other increments than one without.
        step: a size of step for which the walk t0, t0 + step, ... is to be quick: the tree's unit is then the power of
            two times it that covers [t0, t1]. Sizes that differ by a power of two see the same path.
        whole: the increment over [t0, t1] and its area or None, given in place of drawn ones: a path that meets them.
        dtype, device: of the increments. They are made in float64 and rounded, so all dtypes see the same path.

    Raises:
        UsageError: arguments that cannot be.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int],
        t0: float = 0.0,
        t1: float = 1.0,
        area: bool = False,
        *,
        step: float | None = None,
        whole: Any = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if isinstance(seeds, int) or not isinstance(seeds, Iterable):
            raise UsageError(f"seeds: need one per sample, got {seeds!r:.60}", "seeds=range(16)")
        self.seeds = noise.check_seeds(seeds.tolist() if isinstance(seeds, Tensor) else list(seeds))
        self.sample = tuple(integer("shape", side, 0) for side in shape)
        self.t0, self.t1, self.area = number("t0", t0), number("t1", t1), bool(area)
        if self.t0 == self.t1:
            raise UsageError(f"brownian: need an interval, got t0 = t1 = {self.t0:g}", "t0=0.0, t1=1.0")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise UsageError(f"dtype: need a floating-point dtype, got {dtype}", "dtype=torch.float32")
        self.dtype, self.device = dtype, torch.device(device)
        self.unit = abs(self.t1 - self.t0)
        if step is not None:
            step = number("step", step, 0.0)
            if step == 0:
                raise UsageError("step: need a positive number, got 0", "step=0.01")
            self.unit = step * 2.0 ** math.ceil(math.log2(self.unit / step * (1 - 1e-9)))
        if whole is not None and step is not None:
            raise UsageError("step and whole: the unit of the tree must be the whole interval", "leave step out")
        self.single_sample = False
        rows = max(1, min(_ROWS, _NUMBERS // max(1, math.prod(self.sample))))
        self._tree = _Tree(self.seeds, math.prod(self.sample), 1 << (rows.bit_length() - 1), self.area)
        if whole is not None:
            sign = 1 if self.t1 > self.t0 else -1
            parts = [None if x is None else x.detach().cpu().double().numpy() for x in whole]
            self._tree.pin(*(None if x is None else x / (sign * math.sqrt(self.unit)) for x in parts))

    @classmethod
    def single(
        cls, entropy: int, shape: Sequence[int], t0: float = 0.0, t1: float = 1.0, area: bool = False, **options: Any
    ) -> "Brownian":
        """A path of tensors of this shape keyed by one number as a whole: no sample of it has a seed of its own.

        Args:
            entropy: the key; t0, t1, area, options: as above.

        Raises:
            UsageError: arguments that cannot be.
        """
        made = cls([entropy], shape, t0, t1, area, **options)
        made.single_sample = True
        return made

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an increment."""
        return self.sample if self.single_sample else (len(self.seeds), *self.sample)

    def __repr__(self) -> str:
        kind = ", area=True" if self.area else ""
        return f"Brownian({len(self.seeds)} seeds, {self.sample}, t0={self.t0:g}, t1={self.t1:g}{kind})"

    def increment(self, ta: float | Tensor, tb: float | Tensor) -> Any:
        """W(tb) - W(ta), of `shape`; with areas the pair (W, H). From tb to ta W is the negative and H the same.

        Args:
            ta, tb: times between t0 and t1, in either order; or tensors of shape (samples,), each sample its own.

        Raises:
            UsageError: times beyond the path's ends, or of another shape.
        """
        if any(isinstance(t, Tensor) and t.ndim for t in (ta, tb)):
            a, b = self._nodes(ta), self._nodes(tb)
        else:
            a, b = self._node(float(ta)), self._node(float(tb))
        w, h = self._tree.increment(a, b)
        root = math.sqrt(self.unit) if self.t1 > self.t0 else -math.sqrt(self.unit)
        w = self._tensor(w, root)
        return (w, self._tensor(h, root)) if h is not None else w

    def levy_area(self, ta: float | Tensor, tb: float | Tensor, how: str = "foster") -> Tensor:
        """An approximation of the Levy areas of an interval, antisymmetric, of shape (*shape, channels).

        Given W and H it is A = H W^T - W H^T + noise, whose scale is h / sqrt(12) ("davie", Davie 2014), or sqrt(h/10
        (h/10 + H_i^2 + H_j^2)), for the variance that A has given H ("foster", Foster, Lyons & Oberhauser 2020). The
        noise is keyed by the interval: areas of the parts of an interval do not add up to its own.

        Args:
            ta, tb: its ends, as for `increment`; how: "davie" or "foster".

        Raises:
            UsageError: a path without areas, or an unknown way.
        """
        if not self.area or not self.shape:
            raise UsageError("brownian: Levy areas need area=True and channels", "Brownian(..., area=True)")
        if how not in ("davie", "foster"):
            raise unknown("way to approximate Levy areas", how, ("davie", "foster"))
        w, h = (x.double() for x in self.increment(ta, tb))
        m, a, b = self.shape[-1], self._nodes(ta), self._nodes(tb)
        words = (np.minimum(a, b) * (2 * _FINEST) + np.maximum(a, b)).tolist()
        drawn = noise.rows(self.seeds, words, (math.prod(self.sample) * m,), noise.LEVY)
        free = torch.from_numpy(drawn).to(self.device).reshape(*self.shape, m)
        size = torch.from_numpy(abs(b - a) / _FINEST * self.unit).to(self.device)
        size = size[0] if self.single_sample else size.reshape(-1, *[1] * len(self.shape))
        scale = size / math.sqrt(12)
        if how == "foster":
            squares = h.square()
            scale = (size / 10 * (size / 10 + squares[..., :, None] + squares[..., None, :])).sqrt()
        made = h[..., :, None] * w[..., None, :] - w[..., :, None] * h[..., None, :] + scale * free.triu(1)
        return torch.sub(made.triu(1), made.triu(1).mT).to(self.dtype)

    def _tensor(self, values: Floats, factor: float) -> Tensor:
        if factor != 1:
            values *= factor
        return torch.from_numpy(values.reshape(self.shape)).to(device=self.device, dtype=self.dtype)

    def _node(self, t: float) -> int:
        """A time as a multiple of the tree's finest interval."""
        share = (t - self.t0) / (self.t1 - self.t0)
        if not -1e-6 <= share <= 1 + 1e-6:
            raise UsageError(f"brownian: t = {t:g} is beyond the path's ends {self.t0:g} and {self.t1:g}")
        return min(max(round(abs(t - self.t0) / self.unit * _FINEST), 0), _FINEST) if share > 0 else 0

    def _nodes(self, t: float | Tensor) -> NDArray[np.int64]:
        """The same of every sample."""
        times = torch.as_tensor(t, dtype=torch.float64, device="cpu" if not isinstance(t, Tensor) else None).detach()
        if times.ndim > 1 or (times.ndim == 1 and (self.single_sample or len(times) != len(self.seeds))):
            given = tuple(times.shape)
            raise UsageError(f"brownian: need one time, or one for each of {len(self.seeds)} seeds, got shape {given}")
        values = times.cpu().numpy()
        share = (values - self.t0) / (self.t1 - self.t0)
        if not ((share >= -1e-6) & (share <= 1 + 1e-6)).all():
            raise UsageError(f"brownian: times beyond the path's ends {self.t0:g} and {self.t1:g}: {times!r:.60}")
        nodes = np.rint(np.clip(share, 0, 1) * (abs(self.t1 - self.t0) / self.unit * _FINEST)).astype(np.int64)
        return np.broadcast_to(nodes, (len(self.seeds),))


_DEPTH = 24
_FINEST = 2**_DEPTH


class _Tree:
    """Paths on [0, 1], one per seed: at nodes k 2^-24, W(t) and its integral I(t) from 0.

    Args:
        seeds: of the samples; size: numbers of one.
        rows: middles in a block, a power of two.
        area: whether the integral is kept too.

    A block of level l holds the path at the ends and middles of `rows` neighbouring intervals of level l - 1, an array
    of shape (parts, 2 rows + 1, samples, size), parts 1 or 2. Where all samples are asked for the same nodes, the
    number of the block that is kept of a level is an int, otherwise each sample has its own.
    """

    def __init__(self, seeds: list[int], size: int, rows: int, area: bool):
        self.seeds, self.size, self.rows, self.parts = seeds, size, rows, 2 if area else 1
        self.kind = noise.AREA if area else noise.PATH
        self.blocks: list[Floats] = [self._root()]
        self.numbers: list[Any] = [0]  # of the block that is kept of each level: an int, or an array, of each sample
        self.ends: dict[int, Floats] = {}

    def increment(self, a: Any, b: Any) -> tuple[Floats, Floats | None]:
        """W and, with areas, H between two nodes, ints or arrays of one of each sample; shape (samples, size)."""
        if isinstance(a, int):
            start, stop = self.ends.get(a), self.ends.get(b)
            start = self._at(a) if start is None else start
            stop = self._at(b) if stop is None else stop
            self.ends = {**dict(list(self.ends.items())[-2:]), a: start, b: stop}  # of the last two intervals
            h: Any = (b - a) / _FINEST
        else:
            start, stop = self._at_each(a), self._at_each(b)
            h = ((b - a) / _FINEST)[:, None]
        w = stop[0] - start[0]
        if self.parts == 1:
            return w, None
        rise = stop[1] - start[1] - h * start[0]
        return w, rise / np.where(h == 0, 1.0, h) - 0.5 * w

    def _root(self) -> Floats:
        """Level 0: the ends of [0, 1]."""
        drawn = noise.rows(self.seeds, [0] * len(self.seeds), (self.parts, self.size), self.kind)
        block = np.zeros((self.parts, 2, len(self.seeds), self.size))
        block[0, 1] = drawn[:, 0]
        if self.parts == 2:  # int W = W/2 + H
            block[1, 1] = 0.5 * drawn[:, 0] + drawn[:, 1] / math.sqrt(12)
        return block

    def pin(self, w: Floats | None, h: Floats | None) -> None:
        """Set the increment of the whole, and its area, each broadcast to (samples, size)."""
        root, shape = self.blocks[0], (len(self.seeds), self.size)
        area = root[1, 1] - 0.5 * root[0, 1] if self.parts == 2 else None
        if w is not None:
            root[0, 1] = np.broadcast_to(w.reshape(-1, self.size), shape)
        if area is not None:
            area = area if h is None else np.broadcast_to(h.reshape(-1, self.size), shape)
            root[1, 1] = 0.5 * root[0, 1] + area

    def _rows(self, level: int) -> int:
        """How many middles a block of a level has."""
        return min(1 << (level - 1), self.rows if level <= _DENSE else 1)

    def _place(self, level: int, node: Any) -> tuple[Any, Any]:
        """In which block of a level a node lies, and at which of its points."""
        if level == 0:
            return node * 0, node // _FINEST
        rows, fine = self._rows(level), node >> (_DEPTH - level)
        number = (fine >> 1) // rows
        return number, fine - number * (2 * rows)

    def _at(self, node: int) -> Floats:
        """The path of all samples at one node, shape (parts, samples, size)."""
        level = _level(node)
        places = [self._place(k, node)[0] for k in range(level + 1)]
        known = level
        while known >= len(self.numbers) or not _same(self.numbers[known], places[known]):
            known -= 1
        for k in range(known + 1, level + 1):
            self._store(k, places[k], self._block(k, places[k], slice(None)), slice(None))
        return self.blocks[level][:, self._place(level, node)[1]].copy()

    def _at_each(self, nodes: NDArray[np.int64]) -> Floats:
        """The path of each sample at a node of its own, shape (parts, samples, size)."""
        levels = np.array([_level(node) for node in nodes.tolist()])
        deepest, every = int(levels.max()), np.arange(len(nodes))
        places = [self._place(k, nodes)[0] for k in range(deepest + 1)]
        known = np.zeros_like(levels)
        for k in range(1, min(deepest + 1, len(self.numbers))):
            known = np.where((self.numbers[k] == places[k]) & (k <= levels), k, known)
        out = np.empty((self.parts, len(nodes), self.size))
        for k in range(deepest + 1):
            stale = every[(known < k) & (k <= levels)]
            if len(stale):
                self._store(k, places[k][stale], self._block(k, places[k][stale], stale), stale)
            here = every[levels == k]
            if len(here):
                out[:, here] = self.blocks[k][:, self._place(k, nodes[here])[1], here]
        return out

    def _store(self, level: int, number: Any, block: Floats, rows: Any) -> None:
        """Keep a block of a level, of all samples or some."""
        if level == len(self.blocks):
            self.blocks.append(np.empty((*block.shape[:2], len(self.seeds), self.size)))
            self.numbers.append(np.full(len(self.seeds), -1, dtype=np.int64))
        if isinstance(rows, slice):
            self.blocks[level], self.numbers[level] = block, number
            return
        if not isinstance(self.numbers[level], np.ndarray):
            self.numbers[level] = np.full(len(self.seeds), self.numbers[level], dtype=np.int64)
        self.blocks[level][:, :, rows] = block
        self.numbers[level][rows] = number

    def _block(self, level: int, number: Any, rows: Any) -> Floats:
        """A block of a level, of some samples, from the block that is kept of the level above."""
        count = self._rows(level)
        joint = isinstance(rows, slice)
        seeds = self.seeds if joint else [self.seeds[i] for i in rows.tolist()]
        words = [(1 << (level - 1)) + number * count] * len(seeds) if joint else None
        words = ((1 << (level - 1)) + number * count).tolist() if words is None else words
        drawn = noise.rows(seeds, words, (self.parts, count, self.size), self.kind)
        first = number * count - self._above(level, number) * 2 * self._rows(level - 1) if level > 1 else number * 0
        if joint:
            ends = self.blocks[level - 1][:, first : first + count + 1]
        else:
            ends = self.blocks[level - 1][:, first + np.arange(count + 1)[:, None], rows]
        block = np.empty((self.parts, 2 * count + 1, len(seeds), self.size))
        block[:, ::2] = ends
        _halve(block, drawn, 2.0**-level)
        return block

    def _above(self, level: int, number: Any) -> Any:
        """The number of the block above a block."""
        return number * self._rows(level) // (2 * self._rows(level - 1))


def _halve(block: Floats, drawn: Floats, half: float) -> None:
    """Fill in the path at the middles of intervals of length 2 half, given that at their ends.

    Without areas, W(middle) - W(start) = w/2 + sqrt(half/2) z. With them, let d be the difference of the halves'
    increments and s the sum of their areas. As H = s/2 + d/4 with var d = 2 half and var s = half/6, given H the mean
    of d is 3 H and its variance half/2; the difference of the areas is independent of all that, of variance half/6.

    Args:
        block: shape (parts, 2 rows + 1, samples, size), its even points known.
        drawn: standard normal, shape (samples, parts, rows, size), used up.
    """
    path, drawn = block[0], drawn.transpose(1, 2, 0, 3)
    start, stop, middle = path[:-1:2], path[2::2], path[1::2]
    drawn[0] *= math.sqrt(half / 2)
    if len(block) == 1:
        np.add(start, stop, out=middle)
        middle *= 0.5
        middle += drawn[0]
        return
    before, after, between = block[1, :-1:2], block[1, 2::2], block[1, 1::2]
    w = stop - start
    h = (after - before) / (2 * half)
    h -= start
    h -= 0.5 * w
    d = 3 * h
    d += drawn[0]
    w += d
    w *= 0.5  # of the first half
    np.add(start, w, out=middle)
    drawn[1] *= math.sqrt(half / 24)
    h -= 0.25 * d
    h += drawn[1]  # the area of the first half
    w *= 0.5
    h += w
    h += start
    h *= half
    np.add(before, h, out=between)


def _level(node: int) -> int:
    """At which level of the tree a node is a middle; 0: an end."""
    return 0 if node in (0, _FINEST) else _DEPTH - ((node & -node).bit_length() - 1)


def _same(a: Any, b: Any) -> bool:
    """Whether the block that is kept is wanted, for all samples."""
    return bool((a == b).all()) if isinstance(a, np.ndarray) else a == b
