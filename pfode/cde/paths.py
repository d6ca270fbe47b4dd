"""Paths through data, as values: piecewise polynomials between knots (Kidger et al. 2020; Morrill et al. 2021).

A path X is given by polynomials of a parameter s between knots that all series of a batch share. Where all have the
same times, s is the time; where each has its own, or the path moves while time stands, s counts the pieces and `times`
says which time it is at the knots. A controlled differential equation has the same solution in either (it is invariant
to how its path is parametrised), so one batch is solved with one list of steps whatever its series' times are, and a
piece in which nothing moves, such as padding, changes nothing.
"""

import functools
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pfode.cde.filling import column, fill_ends, fill_forward, fill_linear, observed, tridiagonal
from pfode.errors import UsageError, integer
from pfode.tensors import readable

__all__ = ["Path", "hermite", "linear", "natural", "rectilinear", "series"]


@dataclass(frozen=True, eq=False)
class Path:
    """A piecewise polynomial path X of shape (*batch, channels), and its derivative.

    On the piece from knot i on, with u = s - knots[i],

        X = start[i] + sum_k rate[k][i] u^(k+1) / (k + 1),        dX/ds = sum_k rate[k][i] u^k.

    Attributes:
        knots: where pieces begin and end, of the parameter s, shape (n,), rising.
        start: shape (*batch, n - 1, channels).
        rate: one to three tensors like it: constant, linear and quadratic coefficients of the derivative.
        times: the time at the knots, shape (n,) or (*batch, n), never falling; None: s is the time.
        smooth: whether the derivative has no jumps at the knots.
        every: every how many knots is an observation of the series: 2 of a rectilinear path, else 1.
    """

    knots: Tensor
    start: Tensor
    rate: tuple[Tensor, ...]
    times: Tensor | None = None
    smooth: bool = False
    every: int = 1

    @property
    def channels(self) -> int:
        """How many numbers the path has at a time."""
        return self.start.shape[-1]

    @property
    def batch(self) -> torch.Size:
        """The shape of the batch of series."""
        return self.start.shape[:-2]

    @property
    def interval(self) -> Tensor:
        """First and last time, shape (2,), or (*batch, 2) where every series has its own."""
        return (self.knots if self.times is None else self.times)[..., [0, -1]]

    @property
    def observations(self) -> Tensor:
        """The parameter s at the observations, shape (length,)."""
        return self.knots[:: self.every]

    def to(self, *args: Any, **kwargs: Any) -> "Path":
        """The same on another device or in another dtype, as `Tensor.to`."""
        moved = {name: getattr(self, name).to(*args, **kwargs) for name in ("knots", "start")}
        times = None if self.times is None else self.times.to(*args, **kwargs)
        return replace(self, **moved, rate=tuple(r.to(*args, **kwargs) for r in self.rate), times=times)

    def evaluate(self, t: Tensor | float) -> Tensor:
        """X(t); beyond the ends the first and last pieces go on, or, where `times` are given, X stands still.

        Args:
            t: any shape; where every series has its own times of shape () or (*batch, ...).

        Returns:
            Shape (*batch, *t.shape, channels), the batch's dimensions once.
        """
        index, u = self._locate(t)
        found = self._pick(self.start, index)
        power = column(u)
        for k, rate in enumerate(self.rate, 1):
            found = found + self._pick(rate, index) * power / k
            power = power * column(u)
        return found

    def derivative(self, t: Tensor | float) -> Tensor:
        """dX/dt as `evaluate` has X; at a knot that of the piece on its left.

        Raises:
            UsageError: a path that moves while time stands (rectilinear) has no derivative in time.
        """
        if self.every > 1:
            raise UsageError("a rectilinear path has no derivative in time: its values jump", "path.increment(t0, t1)")
        index, u = self._locate(t, after=False)
        found = self._polynomial([self._pick(rate, index) for rate in self.rate], column(u))
        if self.times is None:
            return found
        gaps = self._gaps[..., index] if self.times.ndim == 1 else self._gaps.gather(-1, _rows(index, self.batch))
        gaps = gaps.reshape(index.shape if self.times.ndim == 1 else (*self.batch, *index.shape[len(self.batch) :]))
        return found / column(torch.where(gaps > 0, gaps, 1.0))

    def increment(self, t0: Tensor | float, t1: Tensor | float) -> Tensor:
        """X(t1) - X(t0), what the path drives an equation by between two times."""
        return self.evaluate(t1) - self.evaluate(t0)

    def slope(self, s: Tensor) -> Tensor:
        """dX/ds at a parameter of shape (), or one of each series, of shape (batch,): shape (*batch, channels). At a
        knot it is that of the piece on its left."""
        return self.drive(s)[1]

    def drive(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """What a solve asks for at a parameter: the time there, and dX/ds as `slope` has it.

        Where the derivative jumps, solves evaluate next to the knot, on one side of it or the other: the time is then
        the knot's.

        Args:
            s: shape (), or one of each series, shape (batch,).

        Returns:
            The time, shape (), or (*batch,) where every series has its own; the derivative, shape (*batch, channels).
        """
        if not s.ndim and not s.requires_grad and not self.knots.requires_grad and readable(s):
            return self._drive_at(s)
        knots = self.knots
        index = torch.bucketize(s.detach().contiguous(), knots.detach().contiguous()) - 1
        index = index.clamp(0, len(knots) - 2)
        first, end = knots[index], knots[index + 1]
        u = s - first
        if not self.smooth:
            near = torch.finfo(s.dtype).eps * (s.abs() + end - first)
            u = torch.where(u.abs() <= near, 0.0, torch.where((s - end).abs() <= near, end - first, u))
        if not s.ndim:
            rate = [r[..., index, :] for r in self.rate]
            t = first + u if self.times is None else self.times[..., index] + u * self._gaps[..., index]
            return t, self._polynomial(rate, u)
        each = torch.arange(len(s), device=s.device)
        rate = [r.movedim(-2, 1)[each, index] for r in self.rate]
        slope = self._polynomial(rate, u.reshape(-1, *[1] * (rate[0].ndim - 1)))
        if self.times is None:
            return first + u, slope
        if self.times.ndim == 1:
            return self.times[index] + u * self._gaps[index], slope
        start, gap = (a.movedim(-1, 1)[each, index] for a in (self.times, self._gaps))
        return start + u.reshape(-1, *[1] * (start.ndim - 1)) * gap, slope

    def _drive_at(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """The same at one parameter that can be read."""
        at, knots = float(s), self._floats
        i = max(min(bisect_left(knots, at) - 1, len(knots) - 2), 0)
        u, h = at - knots[i], knots[i + 1] - knots[i]
        if not self.smooth:
            near = torch.finfo(s.dtype).eps * (abs(at) + h)
            u = 0.0 if abs(u) <= near else h if abs(h - u) <= near else u
        slope = self._polynomial([r[..., i, :] for r in self.rate] if self._differentiable else self._pieces[i], u)
        if self.times is not None:
            return self.times[..., i] + u * self._gaps[..., i], slope
        if self.smooth or knots[i] + u == at:
            return s, slope
        return torch.full((), knots[i] + u, dtype=s.dtype, device=s.device), slope

    def parameter(self, t: Tensor, after: bool = True) -> Tensor:
        """The parameter s at times, after (or before) all that happens at them: shape (times,) or (*batch, times)."""
        if self.times is None:
            return t
        times = self.times.contiguous()
        index = (
            torch.searchsorted(times, t.to(times.dtype).contiguous(), right=after).sub(1).clamp(0, len(self.knots) - 2)
        )
        first, gap = (a[index] if a.ndim == 1 else a.gather(-1, index) for a in (times, self._gaps))
        share = torch.where(gap > 0, (t - first) / torch.where(gap > 0, gap, 1.0), 1.0)
        return self.knots[index] + share.clamp(0, 1)

    def _locate(self, t: Tensor | float, after: bool = True) -> tuple[Tensor, Tensor]:
        """The piece that a time lies in, and how far."""
        start = self.start
        t = torch.as_tensor(t, dtype=self.knots.dtype, device=start.device)
        if self.times is None:
            s = t
        elif self.times.ndim == 1:
            s = self.parameter(t.reshape(-1), after).reshape(t.shape)
        else:
            rows = _rows(t, self.batch)
            s = self.parameter(rows, after).reshape(t.shape if t.ndim else self.batch)
        index = (
            torch.bucketize(s.detach().contiguous(), self.knots.detach().contiguous())
            .sub(1)
            .clamp(0, len(self.knots) - 2)
        )
        return index, s - self.knots[index]

    def _pick(self, values: Tensor, index: Tensor) -> Tensor:
        """The pieces' values at indices, which each series has of its own where it has its own times."""
        if self.times is None or self.times.ndim == 1:
            return values[..., index, :]
        rows = _rows(index, self.batch)
        found = values.gather(-2, column(rows).expand(*rows.shape, values.shape[-1]))
        return found.reshape(*self.batch, *index.shape[len(self.batch) :], values.shape[-1])

    def _polynomial(self, rate: Any, u: Any) -> Tensor:
        """sum_k rate[k] u^k; u a number, or a tensor that broadcasts: the same numbers from either."""
        found = rate[-1]
        for r in rate[-2::-1]:
            found = r + found * u
        return found

    @functools.cached_property
    def _gaps(self) -> Tensor:
        assert self.times is not None
        return self.times.diff(dim=-1)

    @functools.cached_property
    def _floats(self) -> list[float]:
        return self.knots.tolist()

    @functools.cached_property
    def _differentiable(self) -> bool:
        return any(r.requires_grad for r in self.rate)

    @functools.cached_property
    def _pieces(self) -> list[tuple[Tensor, ...]]:
        """The rates piece by piece: of paths without gradients, whose parts can be kept."""
        return list(zip(*(r.detach().movedim(-2, 0).contiguous().unbind() for r in self.rate), strict=True))


def _rows(values: Tensor, batch: torch.Size) -> Tensor:
    """Something of shape () or (*batch, ...) as (*batch, m)."""
    if not values.ndim:
        return values.expand(*batch, 1)
    if values.shape[: len(batch)] != batch:
        raise UsageError(
            f"t: need shape () or {tuple(batch)} and more, as every series has its own times: {tuple(values.shape)}",
            "t[:, None], or one row of times for each series",
        )
    return values.reshape(*batch, -1)


def linear(x: Tensor, t: Any = None) -> Path:
    """Straight lines from observation to observation; gaps are on the lines between what was observed around them.

    Args:
        x: observations, shape (*batch, length, channels), NaN where missing. Gradients flow to it.
        t: times, rising, shape (length,), or (*batch, length) for times of each series, which may end in NaN
            (padding); None: 0, 1, 2, ...

    Raises:
        UsageError: no such series or times; row and entry are named.
    """
    x, t = series(x, t)
    x = fill_linear(x, t)
    return _path(x[..., :-1, :], (x.diff(dim=-2),), t, False)


def hermite(x: Tensor, t: Any = None) -> Path:
    """Cubic Hermite splines whose slope at an observation is that of the line from the one before (Morrill et al. 2021,
    "Neural controlled differential equations for online prediction tasks"): smooth, and what X does up to an
    observation depends on nothing after it, if there are no gaps. Arguments and errors as for `linear`."""
    x, t = series(x, t)
    x = fill_linear(x, t)
    slope = _over(x.diff(dim=-2), column(t.diff(dim=-1)))
    return _cubic(x, torch.cat([slope[..., :1, :], slope], -2), t)


def natural(x: Tensor, t: Any = None, *, flat_ends: bool = True) -> Path:
    """Natural cubic splines through what was observed: twice continuously differentiable, and each value depends on the
    whole series. Arguments and errors as for `linear`.

    Args:
        flat_ends: whether a channel has its first observation's value at all times before, and its last one's at all
            after; else only at the very ends of the series.
    """
    x, t = series(x, t)
    seen, rising = observed(x), t.diff(dim=-1) > 0
    if seen is not None:
        ends = torch.zeros_like(seen)
        ends[..., [0, -1], :] = True
        filled, full = fill_ends(x, seen)
        kept = full if flat_ends else seen | (full & ends)
        x = torch.where(kept, filled, 0.0)
        seen = kept
    if not bool(rising.all()):  # padding: the spline ends where time does
        ahead = torch.cat([torch.ones_like(rising[..., :1]), rising], -1)[..., None]
        x = fill_forward(x, seen) if seen is not None else x
        seen = ahead.expand(x.shape) if seen is None else seen & ahead
    if seen is None or bool(seen.all()):
        return _cubic(x, _natural_slopes(x.mT, t.diff(dim=-1)[..., None, :] if t.ndim > 1 else t.diff()).mT, t)
    return _natural_with_gaps(x, t, seen)


def rectilinear(x: Tensor, t: Any = None, *, time: int | None = None) -> Path:
    """Time moves to the next observation with the values as they were, then the values jump to it: the path up to a
    time depends on nothing later, whatever is missing. A missing value is the last one observed; 0 before the first.

    Args:
        x, t: as for `linear`.
        time: the channel that is the time, which moves with it; None: there is none.

    Raises:
        UsageError: as for `linear`; a channel that is none.
    """
    x, t = series(x, t)
    x = torch.nan_to_num(fill_forward(x), nan=0.0)
    twice = x.repeat_interleave(2, -2)
    if time is not None:
        time = integer("time", time, -x.shape[-1], x.shape[-1] - 1) % x.shape[-1]
        moved = torch.cat([twice[..., 1:, time], twice[..., -1:, time]], -1)
        here = torch.arange(x.shape[-1], device=x.device) == time
        twice = torch.where(here, moved[..., None], twice)
    corners = twice[..., :-1, :]
    times = t.repeat_interleave(2, -1)[..., 1:]
    knots = torch.arange(corners.shape[-2], dtype=x.dtype, device=x.device)
    return Path(knots, corners[..., :-1, :], (corners.diff(dim=-2),), times, False, 2)


def _path(start: Tensor, change: tuple[Tensor, ...], t: Tensor, smooth: bool) -> Path:
    """The path of pieces whose derivatives are given in units of the piece: u from 0 to 1."""
    if t.ndim > 1:
        knots = torch.arange(t.shape[-1], dtype=t.dtype, device=t.device)
        return Path(knots, start, change, t)
    h = column(t.diff())
    return Path(t, start, tuple(c / h ** (k + 1) for k, c in enumerate(change)), None, smooth)


def _cubic(x: Tensor, slope: Tensor, t: Tensor) -> Path:
    """The cubics with these values and slopes (in time) at the knots."""
    h, rise = column(t.diff(dim=-1)), x.diff(dim=-2)
    a, b = slope[..., :-1, :] * h, slope[..., 1:, :] * h
    return _path(x[..., :-1, :], (a, 2 * (3 * rise - 2 * a - b), 3 * (a + b - 2 * rise)), t, True)


def _over(rise: Tensor, h: Tensor) -> Tensor:
    """rise / h, 0 where h is (padding)."""
    return torch.where(h > 0, rise / torch.where(h > 0, h, 1.0), 0.0)


def _natural_slopes(x: Tensor, h: Tensor, live: Tensor | None = None) -> Tensor:
    """Slopes at the knots of natural splines: shape of x, (..., n), knots h apart, (n - 1,) or (..., n - 1).

    They solve k[i-1]/h[i-1] + 2 k[i] (1/h[i-1] + 1/h[i]) + k[i+1]/h[i] = 3 (d[i-1]/h[i-1]^2 + d[i]/h[i]^2) with
    d = diff(x), the terms outside left out: second derivatives that are continuous, and 0 at the ends.

    Args:
        live: which of the pieces there are, shape (..., n - 1); a knot without any has slope 0.
    """
    near = 1 / h if live is None else torch.where(live, 1 / torch.where(live, h, 1.0), 0.0)
    pull = 3 * x.diff(dim=-1) * near * near
    nothing = torch.zeros_like(pull[..., :1])
    none = torch.zeros_like(near[..., :1])
    diagonal = 2 * (torch.cat([near, none], -1) + torch.cat([none, near], -1))
    diagonal = diagonal if live is None else torch.where(diagonal > 0, diagonal, 1.0)
    sides = torch.cat([pull, nothing], -1) + torch.cat([nothing, pull], -1)
    return tridiagonal(sides, near, diagonal, near)


def _natural_with_gaps(x: Tensor, t: Tensor, seen: Tensor) -> Path:
    """Natural splines through the places that are `seen`, the first among them: all channels in one sweep, each with
    its own places moved to the front."""
    seen, x = seen.mT, x.mT  # (..., channels, length)
    n = x.shape[-1]
    order = torch.argsort((~seen).to(torch.int8), dim=-1, stable=True)
    count = seen.sum(-1, keepdim=True)
    here = (t if t.ndim == 1 else t[..., None, :]).expand(x.shape)
    values, times = x.gather(-1, order), here.gather(-1, order)
    live = torch.arange(1, n, device=x.device) < count
    slopes = _natural_slopes(values, times.diff(dim=-1), live)
    h = torch.where(live, times.diff(dim=-1), 1.0)
    rise, a, b = torch.where(live, values.diff(dim=-1), 0.0), slopes[..., :-1], slopes[..., 1:]
    a, b = (torch.where(live, s, 0.0) for s in (a, b))
    two_c, three_d = 2 * (3 * rise / h - 2 * a - b) / h, 3 * (a + b - 2 * rise / h) / h**2
    # of every interval of the grid the piece it lies in, begun again at the interval's start
    piece = (seen.cumsum(-1)[..., :-1] - 1).minimum((count - 2).clamp(min=0)).clamp(min=0)
    base, a, two_c, three_d, first = (p.gather(-1, piece) for p in (values, a, two_c, three_d, times))
    d = here[..., :-1] - first
    start = base + d * (a + d * (two_c / 2 + d * three_d / 3))
    parts = start, a + d * (two_c + d * three_d), two_c + 2 * d * three_d, three_d
    start, *rate = (p.mT for p in parts)
    h = column(t.diff(dim=-1))
    return _path(start, tuple(r * h ** (k + 1) for k, r in enumerate(rate)), t, True)


def series(x: Any, t: Any) -> tuple[Tensor, Tensor]:
    """A series and its times, checked: t of x's dtype and device, shape (length,) or (*batch, length), padding at the
    last time with nothing observed."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise UsageError(f"x: need a tensor of real numbers, got {got}", "x = torch.tensor(values).float()")
    if x.ndim < 2:
        raise UsageError(
            f"x: need shape (*batch, length, channels), got {tuple(x.shape)}", "x[:, None] for one channel"
        )
    if x.shape[-2] < 2 or not x.shape[-1]:
        raise UsageError(f"x: need two observations or more of one channel or more, got shape {tuple(x.shape)}")
    infinite = torch.isinf(x.detach())
    if bool(infinite.any()):
        raise UsageError(f"x: infinite at {_place(infinite)}", "NaN where a value is missing")
    if t is None:
        return x, torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    shapes = ((x.shape[-2],), x.shape[:-1])
    if t.shape not in shapes:
        need = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(map(torch.Size, shapes)))
        raise UsageError(f"t: need shape {need} for x of shape {tuple(x.shape)}, got {tuple(t.shape)}")
    if t.ndim == 1:
        _refuse_unordered(t, t.new_zeros(len(t), dtype=torch.bool))
        return x, t
    missing = torch.isnan(t)
    padding = missing.flip(-1).cummin(-1).values.flip(-1)
    if bool((missing & ~padding).any()):
        raise UsageError(f"t: NaN between times, at {_place(missing & ~padding)}", "NaN only after the last time")
    if bool(padding[..., 0].any()):
        raise UsageError(f"t: no times at all of series {_place(padding[..., 0])}", "leave series without times out")
    last = (~padding).sum(-1, keepdim=True) - 1
    t = torch.where(padding, t.gather(-1, last), t)
    x = torch.where(padding[..., None], torch.nan, x)
    _refuse_unordered(t, padding)
    return x, t


def _refuse_unordered(t: Tensor, padding: Tensor) -> None:
    """Raise UsageError unless times are finite and rise."""
    bad = ~torch.isfinite(t)
    if bool(bad.any()):
        raise UsageError(f"t: not finite at {_place(bad)}", "finite times")
    still = (t.diff(dim=-1) <= 0) & ~padding[..., 1:]
    if bool(still.any()):
        at = tuple(still.nonzero()[0].tolist())
        after = (*at[:-1], at[-1] + 1)
        raise UsageError(
            f"t: need times that rise, got {float(t[at]):.6g} and then {float(t[after]):.6g} at {_place(still)}",
            "sort them; one row for each time",
        )


def _place(found: Tensor) -> str:
    """Where the first one is, in words."""
    *batch, last = found.nonzero()[0].tolist() if found.ndim else [0]
    return f"series {', '.join(map(str, batch))}, entry {last}" if batch else f"entry {last}"
