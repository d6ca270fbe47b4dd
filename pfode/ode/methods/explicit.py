"""Explicit Runge-Kutta methods: besides the field, a stage is one matrix-vector product and one copy."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pfode._torch import version
from pfode.ode.solver import Dense, OfTableau, Step, Time, clock, column
from pfode.ode.state import Field, Loan, changed
from pfode.tableau import Tableau

__all__ = ["RungeKutta"]


@dataclass(frozen=True, eq=False)
class _Weights:
    """A tableau on a device: `rows` are the weights of the stages (the first has none), of y1 and of the error.

    still, moving: per row 1 for y0, then no stages; 0 for y0, then the row; one after the other in one dimension.
        still + h moving gives all weights of a step.
    count: y0 and the stages.
    """

    rows: list[Tensor]
    nodes: tuple[float, ...]
    still: Tensor
    moving: Tensor
    count: int


@functools.lru_cache(256)
def _weights(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> _Weights:
    rows = [tableau.matrix[i, :i].tolist() for i in range(tableau.stages)] + [list(tableau.b), list(tableau.error)]
    made = [torch.tensor(row, dtype=torch.float64, device="cpu").to(device, dtype) for row in rows]
    none = made[0].new_zeros(1)
    moving = torch.cat([torch.cat([none, row]) for row in made])
    still = torch.cat([torch.cat([none + (row is not made[-1]), 0 * row]) for row in made])
    return _Weights(made, tuple(tableau.c[1:]), still, moving, tableau.stages + 1)


@functools.lru_cache(256)
def _extension(
    tableau: Tableau, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], tuple[float, ...], Tensor]:
    """Rows and nodes of the further stages, and the matrix of the polynomials b_i(theta) in the clock's dtype."""
    ext = tableau.extension
    rows = [torch.tensor(row, dtype=torch.float64, device="cpu").to(device, dtype) for row in ext.a]
    return rows, ext.c, torch.from_numpy(ext.p.copy()).to(device, clock(device))


@dataclass(frozen=True, eq=False)
class RungeKutta(OfTableau):
    """An explicit Runge-Kutta method; its carry is the derivative at the start of the step, if that is known.

    Args:
        tableau: explicit; methods whose last stage is the derivative at the end (FSAL) hand it on.
    """

    tableau: Tableau

    def init(self, field: Field, t: Time, y: Tensor, slope: Tensor | None = None) -> Tensor | None:
        if slope is None and self.tableau.fsal:
            return field(field.time(t), y).clone()  # fields may use one buffer for all their results
        return slope

    def step(self, field: Field, t0: Time, t1: Time, y0: Tensor, carry: Tensor | None) -> Step:
        tableau = self.tableau
        weights = _weights(tableau, y0.dtype, y0.device)
        slope = field(field.time(t0), y0).clone() if carry is None else carry
        h = t1 - t0
        if field.context.pure:
            stages: _Kept | _Lent = _Kept(field, weights, y0, h, slope)
        else:
            single = not isinstance(h, Tensor)
            stages = field.lend((self, single), lambda: _Lent(field, weights, y0, single))
            stages.start(y0, h, slope)
        y = stages.evaluate(field.times(t0, t1, weights.nodes))
        y1 = y if tableau.fsal else stages.combine(tableau.stages)
        error = stages.combine(tableau.stages + 1) if len(tableau.error) else None
        following = stages.slope(tableau.stages - 1) if tableau.fsal else None
        again = stages.slope(0) if carry is None and y0.ndim == 1 else None
        return Step(y1, error, _Interpolant(tableau, field, t0, t1, y0, stages), following, again)

    def dense(self, field: Field, t0: Time, t1: Time, y0: Tensor, slopes: list[Tensor]) -> Dense:
        """Dense output of a step of which these are the stages."""
        stages = _Kept(field, _weights(self.tableau, y0.dtype, y0.device), y0, t1 - t0, slopes[0])
        stages.slopes += slopes[1:]
        return _Interpolant(self.tableau, field, t0, t1, y0, stages)


@dataclass(frozen=True, eq=False, slots=True)
class _Interpolant:
    """Dense output of one step: the tableau's extension."""

    tableau: Tableau
    field: Field
    t0: Time
    t1: Time
    y0: Tensor
    stages: "_Kept | _Lent"

    def __call__(self, theta: Tensor) -> Tensor:
        y0, stages = self.y0, self.stages
        rows, nodes, p = _extension(self.tableau, y0.dtype, y0.device)
        if stages.further < len(rows):
            for t, row in zip(self.field.times(self.t0, self.t1, nodes), rows, strict=True):
                stages.extend(t, row)
        powers = theta[..., None] ** torch.arange(1, p.shape[1] + 1, dtype=p.dtype, device=p.device)
        weights = powers @ p.T  # they sum to theta, up to what the powers cancel
        weights = weights + (theta[..., None] - weights.sum(-1, keepdim=True)) / len(p)
        return stages.at(weights.to(y0.dtype))


class _Kept:
    """The stages k_i of one step, kept as they came, and their combinations: for gradients and transforms."""

    def __init__(self, field: Field, weights: _Weights, y0: Tensor, h: Time, first: Tensor):
        self.field, self.rows, self.y0, self.h, self.slopes = field, weights.rows, y0, h, [first]
        self.size = len(self.rows) - 2

    @property
    def further(self) -> int:
        """How many further stages there are, for dense output."""
        return len(self.slopes) - self.size

    def evaluate(self, times: Sequence[Tensor]) -> Tensor:
        """Evaluate the stages after the first; the state of the last one."""
        y = self.y0
        for i, t in enumerate(times, 1):
            y = self.combine(i)
            self._evaluate(t, y)
        return y

    def extend(self, t: Tensor, row: Tensor) -> None:
        """A further stage, for dense output."""
        self._evaluate(t, self._moved(row, 1))

    def _evaluate(self, t: Tensor, y: Tensor) -> None:
        self.slopes.append(self.field(t, y).clone())  # fields may use one buffer for all their results

    def slope(self, i: int) -> Tensor:
        """The derivative of stage i."""
        return self.slopes[i]

    def combine(self, row: int) -> Tensor:
        """y0 + h sum_i w_i k_i by a row of the weights; by the last, the error's, without y0 and without gradients."""
        if row > self.size:
            with torch.no_grad():
                return self._moved(self.rows[row], 0)
        return self._moved(self.rows[row], 1)

    def at(self, weights: Tensor) -> Tensor:
        """States between: y0 + h sum_i w_i k_i for weights of shape (m, stages) or (m, batch, stages)."""
        return _at(weights, torch.stack(self.slopes), self.y0, self.h)

    def _moved(self, weights: Tensor, beta: int) -> Tensor:
        matrix = torch.stack(self.slopes[: len(weights)]).reshape(len(weights), -1).T
        if self.y0.ndim == 1 and not isinstance(self.h, Tensor):  # one operation
            return torch.addmv(self.y0, matrix, weights, beta=beta, alpha=self.h)
        if self.y0.ndim == 1:  # the same numbers, with a gradient to h
            return torch.addmv(self.y0, matrix, weights * self.h, beta=beta)
        moved = torch.mv(matrix, weights).view(self.y0.shape) * column(self.h, self.y0)
        return self.y0 + moved if beta else moved


class _Lent:
    """The same, in memory that the next step writes over: y0 and, below it, the stages; h times the weights.

    With y0 as the first column, y0 + h sum_i w_i k_i is one product with the row (1, h w_1, ..., h w_i). Where every
    sample has its h (not `single`), y0 and h stand outside. States that only the field sees lie `inside` a Loan.
    """

    def __init__(self, field: Field, weights: _Weights, y0: Tensor, single: bool):
        n, counts, layout = weights.count, [len(row) + 1 for row in weights.rows], field.layout
        self.field, self.weights, self.single, self.y0, self.first = field, weights, single, y0, y0
        self.stack = y0.new_empty((n, *y0.shape))
        self.slots, self.parts = self.stack.unbind(), layout.parts(self.stack)
        columns, skip, self.rows = self.stack.view(n, -1).T, int(not single), weights.rows
        self.columns = [columns.narrow(1, skip, count - skip) for count in counts]
        self.inside: Loan | None = None
        if single:
            self.scaled = torch.empty_like(weights.moving)
            self.rows = self.scaled.split(counts)
            if layout.plain and n > 3:
                shape = (n - 3, *layout.shapes[0])
                self.inside = Loan(lambda: y0.new_empty(shape))
                self.places = list(zip(self.columns[1:-1], self.rows[1:-1], self.parts[2:], strict=False))

    def start(self, y0: Tensor, h: Time, first: Tensor) -> None:
        """Begin a step of size h at y0, whose first derivative is known."""
        self.h, self.slopes = h, list[Tensor]()
        if y0 is not self.y0 or first is not self.first:  # otherwise they lie there, from a step that was rejected
            self.slots[1].copy_(first)
            if self.single:
                self.slots[0].copy_(y0)
        self.y0, self.first = y0, first
        if isinstance(h, Tensor):
            self.scale = column(h, y0)
            return
        torch.add(self.weights.still, self.weights.moving, alpha=h, out=self.scaled)
        if self.inside:
            self.inside.take()

    @property
    def further(self) -> int:
        """How many further stages there are, for dense output."""
        return len(self.slopes)

    def evaluate(self, times: Sequence[Tensor]) -> Tensor:
        """Evaluate the stages after the first; the state of the last one."""
        field, mv, y, done = self.field, torch.mv, self.y0, 0
        if self.inside:
            f, args, put, inside = field.f, field.args, field.put, self.inside
            before = version(inside.stack) if field.counted else 0
            for (column, row, parts), flat, y, t in zip(self.places, inside.flat, inside.tensors, times, strict=False):
                mv(column, row, out=flat)
                put(parts, f(t, y, *args))
            done = len(inside.flat)
            field.calls += done
            if field.counted and version(inside.stack) != before + done:
                raise changed("the field")
        for i, t in enumerate(times[done:], done + 1):
            y = self.combine(i)
            field.fill(self.parts[i + 1], t, y)
        return y

    def extend(self, t: Tensor, row: Tensor) -> None:
        """A further stage, for dense output."""
        self.slopes.append(self.field(t, self.at(row[None])[0]).clone())

    def slope(self, i: int) -> Tensor:
        """The derivative of stage i; a copy where it must outlast the next step."""
        return self.slots[i + 1].clone() if self.field.context.lasting else self.slots[i + 1]

    def combine(self, row: int) -> Tensor:
        """y0 + h sum_i w_i k_i by a row of the weights; by the last, the error's, without y0."""
        moved = torch.mv(self.columns[row], self.rows[row])
        moved = moved if self.y0.ndim == 1 else moved.view(self.y0.shape)
        if self.single:
            return moved
        moved = moved * self.scale
        return self.y0 + moved if row < len(self.rows) - 1 else moved

    def at(self, weights: Tensor) -> Tensor:
        """States between, as in `_Kept`."""
        k = torch.cat([self.stack, torch.stack(self.slopes)]) if self.slopes else self.stack
        return _at(weights, k[1 : 1 + weights.shape[-1]], self.y0, self.h)


def _at(weights: Tensor, k: Tensor, y0: Tensor, h: Time) -> Tensor:
    """y0 + h sum_i w_i k_i for weights of shape (m, stages) or (m, batch, stages)."""
    if weights.ndim == 2:
        return y0 + column(h, y0) * (weights @ k.reshape(len(k), -1)).view(-1, *y0.shape)
    return y0 + column(h, y0) * torch.einsum("mbs,sbd->mbd", weights, k)
