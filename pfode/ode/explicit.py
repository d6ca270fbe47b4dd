"""Explicit Runge-Kutta methods: a step is two tensor operations per stage besides the field."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode.ode.solver import Dense, Step, Time, clock, column
from pfode.ode.state import Field
from pfode.ode.tableau import Tableau


class _Weights(NamedTuple):
    """A tableau on a device. `nodes` are those of the stages after the first."""

    a: list[Tensor]
    b: Tensor
    error: Tensor | None
    nodes: Tensor


@functools.lru_cache(256)
def _weights(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> _Weights:
    def put(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(device, dtype)

    rows = [put(tableau.matrix[i, :i].tolist()) for i in range(tableau.stages)]
    error = put(list(tableau.error)) if len(tableau.error) else None
    nodes = torch.tensor(tableau.c[1:], dtype=clock(device), device=device)
    return _Weights(rows, put(list(tableau.b)), error, nodes)


@functools.lru_cache(256)
def _extension(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows and nodes of the further stages, and the matrix of the polynomials b_i(theta) in the clock's dtype."""
    ext = tableau.extension
    rows = [torch.tensor(row, dtype=torch.float64).to(device, dtype) for row in ext.a]
    kind = {"dtype": clock(device), "device": device}
    return rows, torch.tensor(ext.c, **kind), torch.from_numpy(ext.p.copy()).to(**kind)


@dataclass(frozen=True, eq=False)
class RungeKutta:
    """An explicit Runge-Kutta method; its carry is the derivative at the start of the step, if that is known.

    Args:
        tableau: explicit; methods whose last stage is the derivative at the end (FSAL) hand it on.
    """

    tableau: Tableau

    @property
    def name(self) -> str:
        return self.tableau.name

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def error_order(self) -> int:
        return self.tableau.error_order if len(self.tableau.error) else 0

    def init(self, field: Field, t: Time, y: Tensor, slope: Tensor | None = None) -> Tensor | None:
        if slope is None and self.tableau.fsal:
            return field(field.time(t), y).clone()  # fields may use one buffer for all their results
        return slope

    def step(self, field: Field, t0: Time, t1: Time, y0: Tensor, carry: Tensor | None) -> Step:
        tableau = self.tableau
        weights = _weights(tableau, y0.dtype, y0.device)
        h = t1 - t0
        times = field.times(t0, t1, weights.nodes) if tableau.stages > 1 else ()
        slope = field(field.time(t0), y0) if carry is None else carry
        stages = _Stages(field, y0, h, tableau.stages, slope)
        y = y0
        for count, t in enumerate(times, 1):
            y = stages.combine(weights.a[count], count)
            slope = stages.append(field(t, y))
        y1 = y if tableau.fsal else stages.combine(weights.b, tableau.stages)
        error = None if weights.error is None else stages.combine(weights.error, tableau.stages, beta=0)
        following = slope if tableau.fsal else None
        again = stages.first if carry is None and y0.ndim == 1 else None
        return Step(y1, error, self._dense(field, t0, t1, y0, stages), following, again)

    def _dense(self, field: Field, t0: Time, t1: Time, y0: Tensor, stages: "_Stages") -> Dense:
        def dense(theta: Tensor) -> Tensor:
            rows, nodes, p = _extension(self.tableau, y0.dtype, y0.device)
            missing = rows[stages.count - self.tableau.stages :]
            if missing:
                for t, row in zip(field.times(t0, t1, nodes), missing, strict=True):
                    stages.append(field(t, stages.combine(row, stages.count)))
            powers = theta[..., None] ** torch.arange(1, p.shape[1] + 1, dtype=p.dtype, device=p.device)
            return stages.at((powers @ p.T).to(y0.dtype))

        return dense


class _Stages:
    """The stages k_i of one step and their combinations y0 + h sum_i w_i k_i.

    They lie in the field's scratch memory; for pure fields they are kept as they came and stacked when needed. Further
    stages of dense output are kept beside the scratch.
    """

    def __init__(self, field: Field, y0: Tensor, h: Time, size: int, first: Tensor):
        self.y0, self.h, self.size, self.pure = y0, h, size, field.pure
        self.kept: list[Tensor] = []
        if not self.pure:
            self.slots, self.heads = field.scratch(y0, size)
        self.count = 0
        self.append(first)
        self.first = first if self.pure else self.slots[0]

    def append(self, slope: Tensor) -> Tensor:
        """Add a stage; returns it as a tensor that outlives the step."""
        count, self.count = self.count, self.count + 1
        if self.pure or count >= self.size:
            self.kept.append(slope if slope.requires_grad else slope.clone())
            return self.kept[-1]
        self.slots[count].copy_(slope)
        return slope.clone() if self.count == self.size else slope

    def matrix(self, count: int) -> Tensor:
        """The first stages as columns, shape (n, count) with n the number of elements of y."""
        if not self.pure and count <= self.size:
            return self.heads[count]
        kept = torch.stack(self.kept[:count] if self.pure else [*self.slots, *self.kept[: count - self.size]])
        return kept.reshape(count, -1).T

    def combine(self, weights: Tensor, count: int, beta: int = 1) -> Tensor:
        """beta y0 + h sum_i w_i k_i over the first `count` stages."""
        matrix = self.matrix(count)
        if self.y0.ndim == 1 and not isinstance(self.h, Tensor):  # one operation
            return torch.addmv(self.y0, matrix, weights, beta=beta, alpha=self.h)
        moved = torch.mv(matrix, weights).view(self.y0.shape) * column(self.h, self.y0)
        return self.y0 + moved if beta else moved

    def at(self, weights: Tensor) -> Tensor:
        """y0 + h sum_i w_i k_i for weights of shape (m, stages) or (m, batch, stages)."""
        matrix = self.matrix(self.count)
        if weights.ndim == 2:
            return self.y0 + self.h * (weights @ matrix.T).view(-1, *self.y0.shape)
        k = matrix.T.reshape(self.count, *self.y0.shape)
        return self.y0 + column(self.h, self.y0) * torch.einsum("mbs,sbd->mbd", weights, k)
