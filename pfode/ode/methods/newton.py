"""Newton's method for implicit steps: Jacobians of the field, block by block, and the iteration.

A field often acts on rows of the state: on samples, or on single elements. Its Jacobian then is block diagonal, costs
as many products as a block has columns, and is factored block by block. In per-sample mode the samples are the rows, as
is promised; in joint mode `jacobian` finds the rows itself, and proves them for every Jacobian by one more product with
a vector that has no zero entry. Blocks are real: a complex element counts as two real ones, so that fields need not be
holomorphic.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vmap

from pfode.ode.batching import Batching, Joint, PerSample
from pfode.ode.state import Field, Layout

__all__ = ["Factors", "Found", "Jacobian", "Rows", "Tolerance", "damped", "factor", "jacobian", "newton", "tolerance"]

_HALVINGS = 12  # of a correction
_CHUNK = 2**24  # elements of the products that are made at once


class Rows(NamedTuple):
    """How flat states lie in rows: (..., n) or (..., batch, d) as real numbers of shape (..., number, m)."""

    layout: Layout
    number: int

    def pack(self, y: Tensor) -> Tensor:
        """A flat state of shape (..., n) or (..., batch, d) as real rows of shape (..., number, m)."""
        if not self.layout.per_sample:
            parts = [p.reshape(*p.shape[:-1], self.number, -1) for p in y.split(self.layout.sizes, -1)]
            y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return torch.view_as_real(y).flatten(-2) if y.is_complex() else y

    def unpack(self, x: Tensor) -> Tensor:
        """Real rows of shape (..., number, m) as the flat state that they were packed from."""
        if self.layout.dtype.is_complex:
            x = x.unflatten(-1, (-1, 2))
            x = torch.complex(x[..., 0], x[..., 1])
        if self.layout.per_sample:
            return x
        parts = x.split([size // self.number for size in self.layout.sizes], -1)
        flat = [p.reshape(*p.shape[:-2], -1) for p in parts]
        return flat[0] if len(flat) == 1 else torch.cat(flat, -1)


def _candidates(layout: Layout) -> list[int]:
    """Numbers of rows that a field may act on, most first; the last one is the whole state as one row."""
    if layout.per_sample:
        return [layout.batch]
    counts, count = [1], 1
    for sizes in zip(*layout.shapes, strict=False):
        if len(set(sizes)) > 1:
            break
        count *= sizes[0]
        counts.append(count)
    return sorted(set(counts), reverse=True)


class Factors(NamedTuple):
    """LU factors of matrices of shape (rows, m, m); numbers are kept as they are."""

    lu: Tensor
    pivots: Tensor

    def solve(self, r: Tensor) -> Tensor:
        """M^-1 r for r of shape (rows, m); not finite where M is singular."""
        if self.lu.shape[-1] == 1:
            return r / self.lu[..., 0]
        return torch.linalg.lu_solve(self.lu, self.pivots, r[..., None])[..., 0]


def factor(matrices: Tensor) -> Factors:
    """LU factors of matrices of shape (rows, m, m), pivoted; numbers (m = 1) are kept as they are."""
    if matrices.shape[-1] == 1:
        return Factors(matrices, torch.ones_like(matrices[..., 0], dtype=torch.int32))
    return Factors(*torch.linalg.lu_factor_ex(matrices)[:2])


class Jacobian(NamedTuple):
    """df/dy as blocks of shape (rows, m, m)."""

    rows: Rows
    blocks: Tensor

    def factors(self, shift: complex, h: Any) -> Factors:
        """Those of shift - h J; h is a float or of shape (rows, 1)."""
        blocks = self.blocks if isinstance(shift, float) else self.blocks.to(self.blocks.dtype.to_complex())
        h = h[..., None] if isinstance(h, Tensor) else h
        return factor(torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device) * shift - h * blocks)


def jacobian(field: Field, t: Tensor, y: Tensor, most: int | None = None) -> Jacobian:
    """The Jacobian of the field at (t, y), without gradients.

    By forward mode; where the field does not allow it by reverse mode, and by differences where it allows neither.

    Args:
        most: the number of rows there are at most, from an earlier Jacobian.
    """
    y = y.detach()
    field.jacobians += 1
    counts = [count for count in _candidates(field.layout) if most is None or count <= most]
    while True:
        rows = Rows(field.layout, counts[0])
        x = rows.pack(y)
        try:
            differentiate = _MODES[field.jacobian_mode]
            blocks, seen, meant = differentiate(lambda x, rows=rows: rows.pack(field(t, rows.unpack(x))), x)
        except Exception:
            if field.jacobian_mode == len(_MODES) - 1:
                raise
            field.jacobian_mode += 1
            continue
        if len(counts) == 1:
            return Jacobian(rows, blocks)
        exact = torch.finfo(x.dtype).eps ** (1 / 3 if field.jacobian_mode == len(_MODES) - 1 else 2 / 3)
        if bool((seen - meant).abs().amax() <= exact * meant.abs().amax()):
            return Jacobian(rows, blocks)
        counts.pop(0)


Product = tuple[Tensor, Tensor, Tensor]  # the blocks if the rows are right; a product as it is, and by these blocks


def _probe(x: Tensor) -> Tensor:
    """A vector without zeros or pattern, like x."""
    golden = (math.sqrt(5) - 1) / 2
    values = torch.arange(1, x.numel() + 1, dtype=torch.float64, device="cpu") * golden % 1 + 0.5
    return values.to(x.device, x.dtype).view(x.shape)


@functools.cache
def _forward_mode() -> None:
    """Let torch load what its forward mode needs: that warns of torch's own use of TorchScript."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        vmap(lambda v: jvp(torch.tanh, (v,), (v,))[1])(torch.zeros(1, device="cpu"))


def _forward(g: Callable[[Tensor], Tensor], x: Tensor) -> Product:
    _forward_mode()
    m = x.shape[1]
    probe = _probe(x)
    columns = torch.eye(m, dtype=x.dtype, device=x.device)[:, None].expand(m, *x.shape)
    at_once = max(1, _CHUNK // x.numel())
    with torch.no_grad():
        made = vmap(lambda v: jvp(g, (x,), (v,))[1], chunk_size=at_once)(torch.cat([columns, probe[None]]))
    blocks = made[:-1].movedim(0, -1)
    return blocks, made[-1], (blocks @ probe[..., None])[..., 0]


def _reverse(g: Callable[[Tensor], Tensor], x: Tensor) -> Product:
    probe = _probe(x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = g(x)
        if not out.requires_grad:
            raise RuntimeError("the field's result does not depend on the state by operations with derivatives")
        sums = [*out.sum(0), (out * probe).sum()]
        made = [torch.autograd.grad(s, x, retain_graph=True, materialize_grads=True)[0] for s in sums]
    blocks = torch.stack(made[:-1], 1)
    return blocks, made[-1], (blocks.mT @ probe[..., None])[..., 0]


def _differences(g: Callable[[Tensor], Tensor], x: Tensor) -> Product:
    probe = _probe(x)
    small = torch.finfo(x.dtype).eps ** 0.5 * x.abs().clamp(min=1e-5)
    columns = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    with torch.no_grad():
        here = g(x).clone()  # fields may use one buffer for all their results
        made = [(g(x + small * c) - here) / (small * c).sum(1, keepdim=True) for c in columns]
        blocks = torch.stack(made, -1)
        seen = g(x + small * probe) - here
    return blocks, seen, (blocks @ (small * probe)[..., None])[..., 0]


_MODES = (_forward, _reverse, _differences)


class Found(NamedTuple):
    """What Newton's iteration came to, for the state or each sample: all but z are numbers or have shape (batch,).

    Fields:
        z: the unknown.
        ok: whether it solves the equations to the tolerance.
        iterations: how many it took.
        rate: the last ratio of two corrections.
        nfe, jacobians: what it needed.
    """

    z: Tensor
    ok: Any
    iterations: Any
    rate: Any
    nfe: Any
    jacobians: Any = 0


class Tolerance(NamedTuple):
    """When corrections are small enough.

    Fields:
        size: (correction, unknown) -> its size, shape () or (batch,).
        goal: of the sizes of all corrections to come, a float or shape (batch,).
        floor: corrections of this size that fall no more are rounding errors.
        batching: the arithmetic of sizes, that of numbers or of shape (batch,).
    """

    size: Callable[[Tensor, Tensor], Tensor]
    goal: Any
    floor: float
    batching: Batching


def tolerance(field: Field, y0: Tensor, part: float = 1.0) -> Tolerance:
    """That of Hairer & Wanner 1996, IV.8, times `part`: a share of the error that a step may make; on fixed grids, of
    rounding.

    Sizes are root mean squares in units of the tolerance, or the largest in units of rounding; in per-sample mode per
    sample.
    """
    real, batching = torch.finfo(field.layout.real), PerSample() if field.layout.per_sample else Joint()
    over = (-1,) if field.layout.per_sample else tuple(range(-y0.ndim, 0))

    def within(x: Tensor) -> tuple[int, ...]:  # all dimensions but the batch
        return tuple(i for i in range(x.ndim) if not field.layout.per_sample or i != x.ndim - 2)

    if field.context.tolerance is None:
        start = y0.abs().amax(over)

        def units(d: Tensor, z: Tensor) -> Tensor:
            most = (start + z.abs().amax(within(z))) * real.eps + real.tiny
            return d.abs().amax(within(d)) / most

        return Tolerance(units, 4.0, 30.0, batching)
    rtol, atol = field.context.tolerance
    scale = y0.abs() * rtol + atol
    least = rtol.double() if isinstance(rtol, Tensor) else torch.tensor(rtol, dtype=torch.float64, device="cpu")
    least = (least.amin(-1) if field.layout.per_sample and least.ndim else least.min()).clamp(min=100 * real.eps)
    goal = (part * (least**0.5).clamp(max=0.03)).clamp(min=2 * real.eps / least)

    def size(d: Tensor, z: Tensor) -> Tensor:
        squares = (d.abs() / scale).square()
        if not field.layout.per_sample:
            return squares.mean().sqrt()
        squares = squares.mean(-1)  # first this, so that a sample's sum is rounded as it is alone
        return (squares.mean(0) if squares.ndim > 1 else squares).sqrt()

    return Tolerance(size, goal if goal.ndim else float(goal), 0.0, batching)


def newton(change: Callable[[Tensor], Tensor], z: Tensor, tol: Tolerance, most: int, calls: Callable[[], int]) -> Found:
    """Add `change(z)` to z until what is still to come is small; samples stop one by one, converged or hopeless.

    With rate the ratio of two corrections, rate / (1 - rate) of the last one is still to come. `calls` says how often
    the field was evaluated so far.
    """
    batching, where, no = tol.batching, tol.batching.where, tol.batching.no
    active: Any = True
    previous = ok = iterations = rate = nfe = None
    for k in range(most):
        before = calls()
        d = change(z)
        size = batching.read(tol.size(d, z))
        if k == 0:
            iterations = nfe = batching.fill(0, size)
            rate, ok, active = batching.fill(0.0, size), iterations != 0, iterations == 0
            done, lost = size <= 1e-2 * tol.goal, no(size < math.inf)
        else:
            rate = where(active, size / previous, rate)
            falls = rate < 1
            ratio = where(falls, rate, batching.fill(0.0, rate))
            left = ratio / (1 - ratio) * size
            done = falls & (left <= tol.goal) | (rate > 0.5) & (size <= tol.floor)
            lost = no(done) & (no(falls) | (left * ratio ** (most - 1 - k) > tol.goal))
        z = torch.where(active[:, None], z + d, z) if batching.per_sample else z + d
        iterations, nfe = iterations + active, batching.count(nfe, active, calls() - before)
        ok, active, previous = ok | active & done, active & no(done | lost), size
        if not batching.any(active):
            break
    return Found(z, ok, iterations, rate, nfe)


def damped(
    residual: Callable[[Tensor], Tensor],
    exact: Callable[[Tensor], Callable[[Tensor], Tensor]],
    z: Tensor,
    rows: Rows,
    tol: Tolerance,
    most: int,
    field: Field,
) -> Found:
    """Newton's method with a Jacobian of its own for every iteration, from any guess; samples stop one by one.

    Corrections are halved, row by row, until the next one with the same Jacobian is smaller (the natural monotonicity
    test of Deuflhard 2004, 3.3).
    """

    def length(d: Tensor) -> Tensor:
        each = torch.linalg.vector_norm(rows.pack(d), dim=-1)  # first this, as in `tolerance`
        return each if each.ndim == 1 else torch.linalg.vector_norm(each, dim=0)

    previous = ok = iterations = nfe = jacobians = torch.empty(0, device="cpu")
    for k in range(most):
        calls, made = field.calls, field.jacobians
        inverse = exact(z)
        d = -inverse(residual(z))
        size = tol.size(d, z)
        if k == 0:
            ok, previous = torch.zeros_like(size, dtype=torch.bool), torch.full_like(size, math.inf)
            iterations = nfe = jacobians = torch.zeros_like(size, dtype=torch.int64)
        active = ~ok
        iterations = iterations + active
        nfe, jacobians = nfe + active * (field.calls - calls), jacobians + active * (field.jacobians - made)
        ok = ok | (size <= tol.goal) | (size <= 10 * tol.floor) & (size > 0.5 * previous)
        previous, before = size, length(d)
        part, trial, trying = torch.ones_like(before), z, active
        for _ in range(_HALVINGS):
            calls = field.calls
            share = rows.unpack(part[:, None].expand_as(rows.pack(d)[..., :, :]))
            trial = z + (share.real if share.is_complex() else share) * d
            good = (length(inverse(residual(trial))) <= (1 - part / 4) * before) | (before == 0) | ok
            nfe = nfe + trying * (field.calls - calls)
            trying = trying & ~(good if ok.ndim else good.all())
            if not bool(trying.any()):
                break
            part = torch.where(good, part, part / 2)
        z = torch.where(active[:, None] if active.ndim else active, trial, z)
        if bool(ok.all()):
            break
    read = tol.batching.read
    return Found(z, read(ok), read(iterations), read(torch.zeros_like(previous)), read(nfe), read(jacobians))
