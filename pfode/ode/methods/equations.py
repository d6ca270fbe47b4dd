"""The equations of one implicit Runge-Kutta step: their residuals, and what solves them once they are linearised.

    Stage     z = h f(t, base + gamma z), one stage by itself
    Stages    Z = h A F(y0 + Z), all stages at once, in the eigenvectors of A^-1 (Hairer & Wanner 1996, IV.8)
    Filter    x = error + gamma h J x, an error estimate that is bounded for stiff components

Each has `residual(z)`; `simplified(jacobian, factors)`, the inverse of its derivative with a Jacobian that is kept;
and `exact(z)`, the same with Jacobians made at z. `attach` gives a solution its derivatives by the implicit-function
theorem.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pfode.ode.methods.newton import Factors, Jacobian, Rows, factor, jacobian
from pfode.ode.state import Field
from pfode.tableau import Tableau

__all__ = ["Filter", "Spectrum", "Stage", "Stages", "attach", "mix", "spectrum"]


class Spectrum(NamedTuple):
    """A and A^-1 = sum of Re(column shift row), a term for each real eigenvalue and each pair of complex ones.

    `nodes` are powers of c: the inverse of their matrix makes polynomials through the stages.
    """

    a: Tensor
    back: Tensor
    shifts: tuple[complex, ...]
    columns: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    nodes: Tensor


@functools.lru_cache(256)
def spectrum(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> Spectrum:
    """The spectrum of a collocation method, worked out in float64."""
    a, c = tableau.matrix[1:, 1:], np.array(tableau.c[1:])
    back = np.linalg.inv(a)
    values, vectors = np.linalg.eig(back)
    shifts: list[complex] = []
    columns, rows = [], []

    def put(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x.copy()).to(device, dtype.to_complex() if np.iscomplexobj(x) else dtype)

    for value, column_, row in zip(values, vectors.T, np.linalg.inv(vectors), strict=True):
        if abs(value.imag) < 1e-9:
            scale = column_[abs(column_).argmax()]  # makes both real
            shifts.append(float(value.real))
            columns.append(put((column_ / scale).real))
            rows.append(put((row * scale).real))
        elif value.imag > 0:
            shifts.append(complex(value))
            columns.append(put(2 * column_))
            rows.append(put(row))
    powers = np.linalg.inv(c[:, None] ** np.arange(1, len(c) + 1))
    return Spectrum(put(a), put(back), tuple(shifts), tuple(columns), tuple(rows), torch.from_numpy(powers).to(device))


def mix(weights: Tensor, stages: Tensor) -> Tensor:
    """sum_j w_ij k_j for weights (i, j) and stages (j, ...): element by element, as a product of matrices would round
    otherwise in a batch than alone.
    """
    return (weights.view(*weights.shape, *[1] * (stages.ndim - 1)) * stages).sum(1)


class _Gate(torch.autograd.Function):
    """The identity, whose first gradient is known to vanish: it is made only if that is to be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.again = False

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor | None:
        ctx.again = ctx.again or torch.is_grad_enabled()
        return grads[0] if ctx.again else None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].view_as(tangents[0])


def attach(system: "Stage | Stages | Filter", z: Tensor) -> Tensor:
    """A solution z of a system, with its first and second derivatives with respect to all that the system knows."""
    residual = system.residual(z)
    if not residual.requires_grad and torch.autograd.forward_ad.unpack_dual(residual).tangent is None:
        return z
    with torch.no_grad():
        inverse = system.exact(z)
    z = _Gate.apply(z - inverse(residual))
    return z - inverse(system.residual(z))


@dataclass(frozen=True)
class Stage:
    """z = h f(t, base + gamma z)."""

    field: Field
    t: Tensor
    base: Tensor
    h: Any
    gamma: float

    def residual(self, z: Tensor) -> Tensor:
        """The equation's two sides, subtracted: z - h f(t, base + gamma z), like y."""
        return z - self.h * self.field(self.t, self.base + self.gamma * z)

    def simplified(self, jacobian: Jacobian, factors: Sequence[Factors]) -> Callable[[Tensor], Tensor]:
        """r -> the inverse of the derivative 1 - gamma h J times r, with factors of 1 / gamma - h J."""
        return self._inverse(jacobian.rows, factors[0])

    def exact(self, z: Tensor) -> Callable[[Tensor], Tensor]:
        """The same with the Jacobian at base + gamma z."""
        made = jacobian(self.field, self.t.detach(), (self.base + self.gamma * z).detach())
        return self._inverse(made.rows, made.factors(1 / self.gamma, _number(self.h)))

    def _inverse(self, rows: Rows, factors: Factors) -> Callable[[Tensor], Tensor]:
        return lambda r: rows.unpack(factors.solve(rows.pack(r)) / self.gamma)


@dataclass(frozen=True)
class Stages:
    """Z = h A F(y0 + Z), Z of shape (stages, *y.shape)."""

    field: Field
    times: Sequence[Tensor]
    y0: Tensor
    h: Any
    spectrum: Spectrum

    def residual(self, z: Tensor) -> Tensor:
        """Z - h A F(y0 + Z), shape (stages, *y.shape)."""
        slopes = torch.stack([self.field(t, self.y0 + y).clone() for t, y in zip(self.times, z, strict=True)])
        return z - self.h * mix(self.spectrum.a, slopes)

    def simplified(self, jacobian: Jacobian, factors: Sequence[Factors]) -> Callable[[Tensor], Tensor]:
        """R -> (1 - h A J)^-1 R with one J for all stages, by the real and complex shifts of A^-1."""
        rows, (_, back, shifts, columns, across, _) = jacobian.rows, self.spectrum

        def inverse(r: Tensor) -> Tensor:
            x = mix(back, rows.pack(r))
            parts = []
            for solver, column_, row in zip(factors[: len(shifts)], columns, across, strict=True):
                part = column_[:, None, None] * solver.solve(mix(row[None], x)[0])
                parts.append(part.real if part.is_complex() else part)
            return rows.unpack(sum(parts[1:], parts[0]))

        return inverse

    def exact(self, z: Tensor) -> Callable[[Tensor], Tensor]:
        """The same with a Jacobian of its own for every stage: coupled systems of stages times m unknowns."""
        at = [(t.detach(), (self.y0 + y).detach()) for t, y in zip(self.times, z, strict=True)]
        made = [jacobian(self.field, *point) for point in at]
        least = min(each.rows.number for each in made)
        made = [j if j.rows.number == least else jacobian(self.field, *p, least) for j, p in zip(made, at, strict=True)]
        rows, s = made[0].rows, len(z)
        a, h = self.spectrum.a, _number(self.h)
        blocks = torch.stack([each.blocks for each in made])  # (stages, rows, m, m)
        m = blocks.shape[-1]
        coupled = torch.einsum("ij,jrxy->rixjy", a, blocks).reshape(-1, s * m, s * m)
        h = h[..., None] if isinstance(h, Tensor) else h
        factors = factor(torch.eye(s * m, dtype=a.dtype, device=a.device) - h * coupled)

        def inverse(r: Tensor) -> Tensor:
            flat = rows.pack(r).movedim(0, 1).flatten(1)  # (rows, stages m)
            return rows.unpack(factors.solve(flat).unflatten(1, (s, m)).movedim(1, 0))

        return inverse


@dataclass(frozen=True)
class Filter:
    """x = error + gamma h J x with the Jacobian at (t, y0)."""

    field: Field
    t: Tensor
    y0: Tensor
    h: Any
    error: Tensor
    shift: float

    def residual(self, x: Tensor) -> Tensor:
        """x - gamma h J x - error, J x by forward differentiation."""
        moved = torch.func.jvp(lambda y: self.field(self.t, y), (self.y0,), (x,))[1]
        return x - self.h / self.shift * moved - self.error

    def exact(self, z: Tensor) -> Callable[[Tensor], Tensor]:
        """r -> (1 - gamma h J)^-1 r with the Jacobian at (t, y0), whatever z."""
        made = jacobian(self.field, self.t.detach(), self.y0)
        factors = made.factors(self.shift, _number(self.h))
        return lambda r: made.rows.unpack(factors.solve(made.rows.pack(r)) * self.shift)


def _number(h: Any) -> Any:
    """A step size without its graph: a float or of shape (rows, 1)."""
    if isinstance(h, Tensor):
        return h.detach() if h.ndim else float(h.detach())
    return h
