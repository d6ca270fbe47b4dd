"""A plan as free numbers, and how its end points depend on them.

Any deterministic plan is, with D_j the denoiser's output in row j,

    y_0 = c x_T,    y_{k+1} = r_k y_k + sum_{j <= k} b_kj D_j,    D_k = D(y_k, t_k)

(BNS, Shaul et al. 2024: every Runge-Kutta, multistep and exponential method is an instance.) A change of its numbers
moves the end point by a tangent that runs through the same rows. A number of row k disturbs nothing before row k, so
that all tangents of a plan cost about a third of as many runs as it has numbers, and no memory of a backward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pfode.errors import UsageError
from pfode.plans.rows import Sums, Terms, add
from pfode.plans.table import Plan
from pfode.plans.unrolled import matrix
from pfode.process import Process

__all__ = ["Call", "Numbers", "differences", "end", "lower", "tangents"]

Call = Callable[[Tensor, float], Tensor]  # (x, t) -> x0, x of any multiple of the batch, sample by sample
_FLOOR = 0.01  # standard deviation below which noise counts as none, where a difference is chosen
_STEPS = {torch.float32: 1e-2, torch.float64: 1e-4}  # of a difference, in units of the noise level


class Numbers:
    """The numbers of a plan of n rows as one vector: t (n), r (n), and b (n, n) by its lower triangle, row by row.

    Args:
        vector: shape (2 n + n (n + 1)/2,), or (..., that) for several.
        n: rows.
    """

    def __init__(self, vector: Tensor, n: int):
        self.vector, self.n = vector, n
        row, column = torch.tril_indices(n, n, device="cpu")
        self.t, self.r = vector[..., :n], vector[..., n : 2 * n]
        whole = vector.new_zeros(*vector.shape[:-1], n * n)
        self.b = whole.index_add(-1, row * n + column, vector[..., 2 * n :]).unflatten(-1, (n, n))

    @classmethod
    def of(cls, plan: Plan) -> "Numbers":
        """The numbers of a plan.

        Raises:
            UsageError: a plan that draws noise, or leaves the origin of its states before its last row.
        """
        if plan.stochastic:
            raise UsageError(f"plan {plan.name!r} draws noise: it has no end point of its own", "a deterministic one")
        states = matrix(plan)
        kept = states[:, 0]
        if not (kept[:-1].abs() > 0).all():
            raise UsageError(f"plan {plan.name!r} forgets x_T before its last row", "another recipe to start from")
        r = kept[1:] / kept[:-1]
        b = torch.tril(states[1:, 1:] - r[:, None] * states[:-1, 1:])
        return cls(torch.cat([plan.t, r, lower(b)]), plan.nfe)

    def plan(self, like: Plan, **about: Any) -> Plan:
        """The plan of these numbers, its nodes those of another one; `about`: name and meta. Gradients flow."""
        n = self.n
        age = torch.arange(n, device="cpu")[:, None] - torch.arange(n, device="cpu")
        b = torch.where(age >= 0, self.b.gather(1, age.clamp_min(0)), 0.0)
        return replace(
            like,
            prediction="x0",
            t=self.t,
            r=self.r,
            r_prev=torch.zeros(n, device="cpu"),
            b=b,
            c=torch.zeros(n, 0, device="cpu"),
            **about,
        )


def lower(square: Tensor) -> Tensor:
    """The lower triangle of a matrix, row by row."""
    row, column = torch.tril_indices(*square.shape, device="cpu")
    return square[row, column]


def end(numbers: Numbers, call: Call, y: Tensor) -> Tensor:
    """The end point from y_0, both of shape (batch, ...)."""
    sums: Sums = [None] * numbers.n
    for t, (state, output) in zip(numbers.t.tolist(), _rows(numbers, y), strict=True):
        add(sums, y, state)
        add(sums, call(y, t), output)
        y = _next(sums, y)
    return y


def tangents(
    numbers: Numbers, changes: Numbers, process: Process, call: Call, y: Tensor, batch: int
) -> tuple[Tensor, Tensor]:
    """The end points from y_0, shape (batch, ...), and the tangents to p changes of the numbers, shape (p, batch, ...).

    The denoiser is differentiated by differences, so that any callable will do: along each tangent by a hundredth
    (float64: a ten-thousandth) of the noise level. Tangents run through the same rows as states do: what a row adds to
    states to come it adds to their tangents, too, and beside it the changes of its own numbers.

    Args:
        changes: of shape (p, ...), of the numbers that `numbers` has.
        call: the denoiser. batch: of its calls, about.
    """
    n, p = numbers.n, len(changes.vector)
    small = _STEPS[y.dtype]
    sums: Sums = [None] * n
    moved_sums: Sums = [None] * n
    moved = y.new_zeros(p, *y.shape)
    live = torch.zeros(p, dtype=torch.bool, device="cpu")  # of which changes the tangent is not 0 yet
    for k, (state, output) in enumerate(_rows(numbers, y)):
        t = float(numbers.t[k])
        x0, move = call(y, t), torch.zeros_like(moved)
        some = live.nonzero().flatten()
        if len(some):
            level = small * max(float(process.sigma(t)), _FLOOR)
            size = moved[some].flatten(2).pow(2).mean(2).sqrt().clamp_min(1e-30)
            h = (level / size).reshape(*size.shape, *[1] * (y.ndim - 1))
            move[some] = (_called(call, torch.addcmul(y, h, moved[some]), t, batch) - x0) / h
        timed = changes.t[:, k]
        if timed.any():
            h = small * t * (-1 if t * (1 + small) > process.t_max else 1)
            move += torch.einsum("p,...->p...", timed.to(y), (call(y, t + h) - x0) / h)
        changed_state, changed_output = _terms(changes.r[:, k : k + 1], y, p), _terms(changes.b[:, k:, k], y, p)
        add(sums, y, state)
        add(sums, x0, output)
        for value, terms in ((moved, state), (y, changed_state), (move, output), (x0, changed_output)):
            add(moved_sums, value, terms)
        live |= (timed != 0) | (changes.r[:, k] != 0) | (changes.b[:, k] != 0).any(1)
        y, moved = _next(sums, y), _next(moved_sums, moved)
    return y, moved


def _rows(numbers: Numbers, y: Tensor) -> list[tuple[Terms, Terms]]:
    """What the state and the denoiser's output of every row add to the states to come."""
    r, b = numbers.r[None], numbers.b[None]
    return [(_terms(r[:, k : k + 1], y), _terms(b[:, k:, k], y)) for k in range(numbers.n)]


def _terms(factors: Tensor, y: Tensor, p: int | None = None) -> Terms:
    """Terms of factors, shape (p, rows): column j counts for the state after the next j rows.

    Each is 0-d or, for p changes of states y, of shape (p, 1, ...).
    """
    shape = () if p is None else (p, *[1] * y.ndim)
    columns = factors.to(y).unbind(1)
    return [(j, column.reshape(shape)) for j, column in enumerate(columns) if factors[:, j].any()]


def _next(sums: Sums, like: Tensor) -> Tensor:
    """The state that a row ends with; 0 where nothing was added."""
    state = sums.pop(0)
    sums.append(None)
    return torch.zeros_like(like) if state is None else state


def _called(call: Call, asked: Tensor, t: float, batch: int) -> Tensor:
    """The denoiser's outputs for several states of every sample, shape (p, batch, ...)."""
    found, many = torch.empty_like(asked), max(1, batch // asked.shape[1])
    for part, out in zip(asked.split(many), found.split(many), strict=True):
        out.copy_(call(part.flatten(0, 1), t).reshape(part.shape))
    return found


def differences(make: Callable[[Tensor], Numbers], theta: Tensor, h: float = 1e-5) -> Numbers:
    """How the numbers made from parameters change with each of them, by central differences on the host: (p, ...)."""
    rows: Sequence[Tensor] = [
        (make(theta + h * e).vector - make(theta - h * e).vector) / (2 * h)
        for e in torch.eye(len(theta), dtype=theta.dtype, device="cpu")
    ]
    return Numbers(torch.stack(rows), make(theta).n)
