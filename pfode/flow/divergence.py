"""The trace of a Jacobian, exact or estimated with random signs (docs/design.md, idea F).

With random signs e, E[e^T J e] = tr J and E|J^T e|^2 = |J|_F^2 (Hutchinson 1990). For signs the variance of the first
is 2 (|S|_F^2 - sum S_ii^2), S the symmetric part of J: the diagonal adds none. For Gaussian vectors it is 2 |S|_F^2,
larger wherever the diagonal is what J mainly has, as with denoisers. Everything that needs a divergence uses this
function: likelihoods, continuous normalising flows, their regularisers, score matching.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode import noise
from pfode._torch import transformed
from pfode.denoiser import Denoiser, at, preconditioned
from pfode.errors import UsageError, integer, unknown
from pfode.process import float64

__all__ = [
    "MODES",
    "Divergence",
    "Exact",
    "Hutchinson",
    "Trace",
    "denoiser_divergence",
    "divergence",
    "find_trace",
    "signs",
]

MODES = ("reverse", "forward")
EXACT = 64  # elements of a sample up to which "auto" is exact
WORDS = ("auto", "exact", "hutchinson")


@dataclass(frozen=True)
class Exact:
    """The sum of the diagonal, by as many products with the Jacobian as a sample has elements.

    Args:
        block: products made at once, by torch.func.vmap. 1 works with every network and is quickest on a CPU but for
            small networks of large samples; more are for small batches on a GPU, and need as many times the memory.
        mode: "reverse" differentiates backwards off one graph; "forward" keeps no graph, evaluates the function anew
            for every block, and needs forward-mode derivatives of everything in it.

    Raises:
        UsageError: a block below 1, or an unknown mode.
    """

    block: int = 1
    mode: str = "reverse"

    def __post_init__(self) -> None:
        integer("block", self.block, 1)
        _need_mode(self.mode)

    def products(self, size: int) -> int:
        """Products with the Jacobian, of a sample of so many elements."""
        return size


@dataclass(frozen=True)
class Hutchinson:
    """The mean of e^T J e over random signs e.

    Args:
        probes: how many e.
        mode: as for `Exact`.

    Raises:
        UsageError: no probes, or an unknown mode.
    """

    probes: int = 1
    mode: str = "reverse"

    def __post_init__(self) -> None:
        integer("probes", self.probes, 1)
        _need_mode(self.mode)

    def products(self, size: int) -> int:
        """Products with the Jacobian, of a sample of so many elements."""
        return self.probes


Trace = Exact | Hutchinson
Function = Callable[[Tensor], Tensor]


def _need_mode(mode: object) -> None:
    if mode not in MODES:
        raise unknown("mode", mode, MODES)


def find_trace(how: str | Trace, size: int, probes: int = 4) -> Trace:
    """How a trace is found, from a word or a value.

    Args:
        how: "exact", "hutchinson", or "auto", exact up to 64 elements and estimated beyond; or a value, kept.
        size: elements of a sample.
        probes: of "hutchinson" and "auto".

    Raises:
        UsageError: neither a word nor a value, or no probes.
    """
    if isinstance(how, Exact | Hutchinson):
        return how
    if how not in WORDS:
        raise unknown("divergence", how, WORDS)
    estimated = Hutchinson(probes)
    return Exact() if how == "exact" or (how == "auto" and size <= EXACT) else estimated


class Divergence(NamedTuple):
    """What `divergence` returns.

    Fields:
        value: f(x), of the shape of x.
        traces: e^T J e of every probe, shape (probes, batch); the trace itself, shape (1, batch), where it is exact.
        squares: |e^T J|^2 of every probe, or |J|_F^2 where it is exact, shaped like traces; |J e|^2 in forward mode.
    """

    value: Tensor
    traces: Tensor
    squares: Tensor

    @property
    def trace(self) -> Tensor:
        """tr J, or its estimate, shape (batch,)."""
        return self.traces.mean(0)

    @property
    def square(self) -> Tensor:
        """|J|_F^2, or its estimate, shape (batch,)."""
        return self.squares.mean(0)


def signs(x: Tensor, probes: int, seeds: Sequence[int] | None = None, nodes: Sequence[int] | int = 0) -> Tensor:
    """Random signs e for x of shape (batch, ...), shape (probes, *x.shape).

    Args:
        seeds: one per sample: e of probe k depends on (seed, node, k) alone. None: drawn from torch's generator.
        nodes: the points of the samples' paths by number, one for all or one per sample.

    Raises:
        UsageError: seeds that cannot be, or of another number than the samples.
    """
    if seeds is None:
        return torch.empty((probes, *x.shape), dtype=x.dtype, device=x.device).bernoulli_().mul_(2).sub_(1)
    if len(seeds) != len(x):
        raise UsageError(f"seeds: need one for each of {len(x)} samples, got {len(seeds)}")
    numbers = [nodes] * len(x) if isinstance(nodes, int) else nodes
    return noise.signs(seeds, numbers, probes, x.shape[1:], x.dtype, x.device)


def divergence(f: Function, x: Tensor, how: Trace, vectors: Tensor | None = None) -> Divergence:
    """f(x) and the trace of its Jacobian, of every sample.

    Gradients flow to x and to what f is made of where the caller has them enabled; elsewhere nothing is kept.

    Args:
        f: x of shape (batch, ...) to the same shape; sample i of its output depends on sample i of x alone.
        how: `Exact()` or `Hutchinson(probes)`.
        vectors: the probes of `Hutchinson`, shape (probes, *x.shape); by default signs from torch's generator.

    Raises:
        UsageError: an output of another shape; vectors of another shape, or with `Exact`; a function that hides how it
            depends on x (it detaches x, or computes under no_grad).
    """
    exact = isinstance(how, Exact)
    if exact and vectors is not None:
        raise UsageError("vectors: the exact trace takes none", "Hutchinson(probes), or vectors=None")
    if vectors is not None and (vectors.shape[1:] != x.shape or not len(vectors)):
        got = tuple(vectors.shape)
        raise UsageError(f"vectors: need shape (probes, {', '.join(map(str, x.shape))}), got {got}", "signs(x, probes)")
    if not exact and vectors is None:
        vectors = signs(x, how.probes)
    block = how.block if exact else 1
    inside = how.mode == "forward" or block > 1 or transformed() is not None
    value, along = (_forward(f, x) if how.mode == "forward" else _pulled(f, x)) if inside else _reverse(f, x)
    traces, squares = [], []
    for rows in _units(x, block) if vectors is None else vectors.split(1):
        found, flat = along(rows), (*rows.shape[:2], math.prod(x.shape[1:]))
        traces.append((found * rows).reshape(flat).sum(2))
        squares.append(found.square().reshape(flat).sum(2))
    every = torch.cat(traces), torch.cat(squares)
    if exact:
        every = tuple(one.sum(0, keepdim=True) for one in every)
    return Divergence(value() if callable(value) else value, *every)


def denoiser_divergence(
    denoiser: Denoiser, x: Tensor, t: Tensor, how: Trace, vectors: Tensor | None = None, **cond: Any
) -> Divergence:
    """D(x, t) and the trace of dD/dx, of which only the network's own part is differentiated.

    As D = c_skip x + c_out F(c_in x), tr dD/dx = c_skip d + c_out c_in tr dF/dx: the first part is exact, and the
    probes' error comes from the second alone. `squares` are those of dF/dx.

    Args:
        denoiser: see `pfode.denoiser`; guidance that depends on the time is asked at t.
        x: states, shape (batch, ...). t: times, 0-d or (batch,).
        how, vectors: as for `divergence`.
        cond: passed on to the denoiser.

    Raises:
        UsageError: as for `divergence`.
    """
    inner = preconditioned(at(denoiser, t))
    kept = inner.precondition(float64(t))
    noise_level = kept.c_noise.to(x).reshape(-1) if kept.c_noise.ndim else kept.c_noise.to(x)
    c_in, c_skip, c_out = (c.to(x).reshape(-1) for c in (kept.c_in, kept.c_skip, kept.c_out))

    def column(c: Tensor) -> Tensor:
        return c.reshape(-1, *[1] * (x.ndim - 1))

    def network(scaled: Tensor) -> Tensor:
        return inner.network(scaled, noise_level, **cond).to(x.dtype)

    found = divergence(network, column(c_in) * x, how, vectors)
    traces = c_skip * math.prod(x.shape[1:]) + c_out * c_in * found.traces
    return Divergence(column(c_skip) * x + column(c_out) * found.value, traces, found.squares)


# ---- products with the Jacobian: functions of a block of vectors, shape (k, *x.shape)


Along = Callable[[Tensor], Tensor]


def _reverse(f: Function, x: Tensor) -> tuple[Tensor, Along]:
    """f(x) and v -> v^T J off one graph of torch.autograd."""
    record = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        start = x if record and x.requires_grad else (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        value = _checked(f(start), x)
        if not value.requires_grad:
            _need_constant(f, x, value)

    def along(rows: Tensor) -> Tensor:
        if not value.requires_grad:
            return torch.zeros_like(rows)
        pulled = []
        for row in rows:
            with torch.inference_mode(False):
                (one,) = torch.autograd.grad(
                    value, start, row, retain_graph=True, create_graph=record, allow_unused=True
                )
            if one is None:
                _need_constant(f, x, value)
            pulled.append(torch.zeros_like(row) if one is None else one)
        return torch.stack(pulled)

    return value if record else value.detach(), along


def _pulled(f: Function, x: Tensor) -> tuple[Tensor, Along]:
    """The same by torch.func, which other transforms can go through and which takes many vectors at once."""
    value, pullback, *_ = torch.func.vjp(lambda x: _checked(f(x), x), x)

    def along(rows: Tensor) -> Tensor:
        if len(rows) == 1:
            return pullback(rows[0])[0][None]
        return torch.func.vmap(pullback)(rows)[0]

    return value, along


def _forward(f: Function, x: Tensor) -> tuple[Callable[[], Tensor], Along]:
    """f(x), known after the first product, and v -> J v."""
    known: list[Tensor] = []

    def one(row: Tensor) -> tuple[Tensor, Tensor]:
        value, pushed, *_ = torch.func.jvp(lambda x: _checked(f(x), x), (x,), (row,))
        return value, pushed

    def along(rows: Tensor) -> Tensor:
        if len(rows) == 1:
            value, pushed = (found[None] for found in one(rows[0]))
        else:
            value, pushed = torch.func.vmap(one)(rows)
        known[:] = [value[0]]
        return pushed

    return lambda: known[0], along


def _units(x: Tensor, block: int) -> Iterator[Tensor]:
    """The unit vectors of one sample, the same for all, in blocks of shape (block, *x.shape)."""
    unit = torch.eye(math.prod(x.shape[1:]), dtype=x.dtype, device=x.device)
    for rows in unit.split(block):
        yield rows.view(len(rows), 1, *x.shape[1:]).expand(len(rows), *x.shape)


def _checked(value: Tensor, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != x.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"divergence: need f(x) of the shape of x, {tuple(x.shape)}, got {got}")
    return value


def _need_constant(f: Function, x: Tensor, value: Tensor) -> None:
    """Raise UsageError unless f gives the same elsewhere: what autograd sees no dependence in may still have one."""
    with torch.no_grad():
        elsewhere = f(x.detach() + 1)
    if not torch.equal(elsewhere, value.detach()):
        raise UsageError(
            "divergence: f(x) depends on x in a way that torch.autograd does not see",
            "no x.detach(), no torch.no_grad() and no NumPy inside of it",
        )
