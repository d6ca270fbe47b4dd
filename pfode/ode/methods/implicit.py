"""Implicit Runge-Kutta methods: every step solves its stages by Newton's method.

The unknowns are increments, h times derivatives (one stage after the other) or Y - y0 (all stages at once), so that
nothing is divided by h and a step of size 0 stays where it is. A Jacobian, and on equal steps its factors, are kept for
as long as the iteration converges quickly with them. Collocation methods are solved in the eigenvectors of A^-1: a
real or complex system of the state's size for each, instead of one of `stages` times that size (Hairer & Wanner 1996,
IV.8).

Gradients follow from the implicit-function theorem: the equations are solved without a graph, then one Newton step
with the exact Jacobian, as a number, and the residual, with its graph, has the derivatives of the solution. A second
one has its second derivatives, too.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pfode.ode.methods.equations import Filter, Stage, Stages, attach, mix, spectrum
from pfode.ode.methods.implicit_tables import IMPLICIT, KVAERNO5, RADAU5
from pfode.ode.methods.newton import Found, Jacobian, Rows, damped, jacobian, newton, tolerance
from pfode.ode.solver import Dense, OfTableau, Step, Time, clock, column
from pfode.ode.state import Field, leaves, rebuild
from pfode.tableau import Tableau

__all__ = ["ImplicitRungeKutta", "implicit_solvers"]

_SIMPLIFIED = 8  # iterations with a Jacobian that is kept
_EXACT = 24  # with one of their own, where a fixed step would fail otherwise
_STRICT = 0.01  # of Newton's tolerance, where stages are solved one by one: each takes over the errors of those before
# it, on a slow manifold all to the same side (Van der Pol's: 686 steps, and 660 tolerances off without this)
_SLOW = 1e-3  # a rate of convergence from which a Jacobian is not kept


class _Weights(NamedTuple):
    """A tableau on a device: b, the error's weights, and the nodes after the first in the clock's dtype."""

    b: Tensor
    error: Tensor | None
    nodes: Tensor


@functools.lru_cache(256)
def _weights(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> _Weights:
    b = torch.tensor(tableau.b, dtype=torch.float64, device="cpu").to(device, dtype)
    error = (
        torch.tensor(tableau.error, dtype=torch.float64, device="cpu").to(device, dtype) if len(tableau.error) else None
    )
    return _Weights(b, error, torch.tensor(tableau.c[1:], dtype=clock(device), device=device))


@functools.lru_cache(256)
def _extension(tableau: Tableau, device: torch.device) -> tuple[tuple[tuple[float, ...], ...], Tensor, Tensor]:
    """Rows and nodes of further stages, and the matrix of the polynomials b_i(theta)."""
    ext = tableau.extension
    kind = {"dtype": clock(device), "device": device}
    return ext.a, torch.tensor(ext.c, **kind), torch.from_numpy(ext.p.copy()).to(**kind)


@functools.lru_cache(256)
def _guess(tableau: Tableau, stage: int) -> tuple[tuple[int, float], ...]:
    """A stage's derivative extrapolated from those before it: the latest three at different nodes."""
    used: dict[float, int] = {}
    for j in reversed(range(stage)):
        if len(used) < 3:
            used.setdefault(round(tableau.c[j], 12), j)
    at = tableau.c[stage]
    return tuple(
        (j, math.prod((at - other) / (node - other) for other in used if other != node)) for node, j in used.items()
    )


class Carry(NamedTuple):
    """What a step knows from those before it; () where there is nothing.

    Fields:
        slope: the derivative at the start of the step.
        blocks: those of the last Jacobian.
        stale: whether it is to be made anew, shape () or (batch,).
        size: the last step size, shape () or (batch,); 0 at the start.
        past: its increments Y - y0 of stages that are solved at once, stages last: a guess for the next ones.
        factors: in joint steps, for the next one if it is of the same size.
    """

    slope: Any
    blocks: Any
    stale: Tensor
    size: Tensor
    past: Any
    factors: Any


@dataclass(frozen=True, eq=False)
class ImplicitRungeKutta(OfTableau):
    """An implicit Runge-Kutta method.

    Args:
        tableau: its first stage explicit; the others are solved one by one, with the same diagonal entry, or, where one
            of them needs a later one, all at once.
        inner: for a tableau with nodes beyond the step: the method for steps whose nodes would lie beyond the solve or
            a jump.
    """

    tableau: Tableau
    inner: "ImplicitRungeKutta | None" = None

    @functools.cached_property
    def sequential(self) -> bool:
        """Whether the stages are solved one by one."""
        return not np.triu(self.tableau.matrix, 1).any()

    @functools.cached_property
    def filter(self) -> float:
        """1 / gamma: error estimates are multiplied by (1 - gamma h J)^-1, or 0: they are not.

        This bounds them for stiff components (Hosea & Shampine 1996; Hairer & Wanner 1996, IV.8.20), as is not needed
        where the embedded method is a stage. gamma is the real eigenvalue of A, or the mean size of complex ones.
        """
        a, error = self.tableau.matrix, np.array(self.tableau.error)
        if not len(error) or (abs(a - (np.array(self.tableau.b) - error)).max(1) < 1e-12).any():
            return 0.0
        if self.sequential:
            return float(1 / a[-1, -1])
        values = np.linalg.eigvals(np.linalg.inv(a[1:, 1:]))
        real = values.real[abs(values.imag) < 1e-9]
        return float(real[0] if len(real) else abs(np.prod(values)) ** (1 / len(values)))

    def init(self, field: Field, t: Time, y: Tensor, slope: Tensor | None = None) -> Carry:
        if slope is None and self.tableau.fsal:
            slope = field(field.time(t), y).clone()  # fields may use one buffer for all their results
        known: Any = slope if self.tableau.fsal else ()
        blocks: Any = ()
        past: Any = ()
        batch, device = (), torch.device("cpu")
        if field.layout.per_sample:
            batch, device = (len(y),), y.device
            m = Rows(field.layout, len(y)).pack(y.detach()).shape[-1]
            blocks = torch.zeros((len(y), m, m), dtype=field.layout.real, device=device)
        if not self.sequential:
            past = torch.zeros((*y.shape, self.tableau.stages - 1), dtype=y.dtype, device=y.device)
        stale = torch.ones(batch, dtype=torch.bool, device=device)
        return Carry(known, blocks, stale, stale.to(clock(device)) * 0, past, ())

    def step(self, field: Field, t0: Time, t1: Time, y0: Tensor, carry: Carry | None) -> Step:
        carry = self.init(field, t0, y0) if carry is None else carry
        if self.inner is None:
            return self._step(field, t0, t1, y0, carry)
        over = _over(field.context.edges, t0, t1, max(self.tableau.c))
        if not isinstance(over, Tensor):
            return self._inner(field, t0, t1, y0, carry) if over else self._step(field, t0, t1, y0, carry)
        if not bool(over.any()):
            return self._step(field, t0, t1, y0, carry)
        far = self._step(field, t0, torch.where(over, t0, t1), y0, carry)  # a sample takes one of the two steps
        near = self._inner(field, t0, torch.where(over, t1, t0), y0, carry)
        return _either(over, near, far, carry)

    def _inner(self, field: Field, t0: Time, t1: Time, y0: Tensor, carry: Carry) -> Step:
        """A step of the inner method, that takes no guess from this method's carry and leaves it none."""
        assert self.inner is not None
        step = self.inner._step(field, t0, t1, y0, carry._replace(size=carry.size * 0, factors=()))
        return step._replace(carry=step.carry._replace(past=(), factors=()))

    def _step(self, field: Field, t0: Time, t1: Time, y0: Tensor, carry: Carry) -> Step:
        calls, made = field.calls, field.jacobians
        weights = _weights(self.tableau, field.layout.real, y0.device)
        times = field.times(t0, t1, weights.nodes)
        slope = field(field.time(t0), y0).clone() if isinstance(carry.slope, tuple) else carry.slope
        h: Any = column(t1 - t0, y0)
        common = field.calls - calls
        with torch.no_grad():
            solve = _Solve(self, field, t0, t1, y0, slope, times, carry)
            found, k = solve.run()
            error = None if weights.error is None else solve.error(weights.error, k)
        if torch.is_grad_enabled():
            calls, further = field.calls, field.jacobians
            k = solve.attached(y0, h, slope, times, k)
            common, solve.jacobians = common + field.calls - calls, solve.jacobians + field.jacobians - further
        y1 = y0 + mix(weights.b[None], k)[0]
        again = None
        if solve.batching.any(solve.fresh):
            again = carry._replace(blocks=solve.jacobian.blocks, stale=torch.zeros_like(carry.stale), factors=())
        dense, ok = self._dense(field, t0, t1, y0, h, k, solve), torch.as_tensor(found.ok, device=y0.device)
        step = Step(y1, error, dense, solve.following(found, slope, h, k), again, ok)
        if field.layout.per_sample:
            return step._replace(
                jacobians=solve.jacobians, iterations=found.iterations, nfe=found.nfe + solve.nfe + common
            )
        return step._replace(jacobians=field.jacobians - made, iterations=found.iterations)

    def _dense(self, field: Field, t0: Time, t1: Time, y0: Tensor, h: Any, k: Tensor, solve: "_Solve") -> Dense:
        """The tableau's extension. What the derivative at the start adds to the other stages is a multiple of the error
        estimate, and is filtered as that is: it would be large for stiff components.
        """
        weights = _weights(self.tableau, field.layout.real, y0.device).error

        def dense(theta: Tensor) -> Tensor:
            rows, nodes, p = _extension(self.tableau, y0.device)
            stages = list(k)
            for row, t in zip(rows, field.times(t0, t1, nodes) if rows else (), strict=True):
                stages.append(field(t, y0 + sum(w * z for w, z in zip(row, stages, strict=False) if w)) * h)
            powers = theta[..., None] ** torch.arange(1, p.shape[1] + 1, dtype=p.dtype, device=p.device)
            at = (powers @ p.T).to(field.layout.real)
            if self.filter and weights is not None and weights[0]:
                share = at[..., :1] / weights[0]
                at = torch.cat([at - share * weights, share], -1)
                stages.append(_filtered(self, field, field.time(t0), y0, h, mix(weights[None], k)[0], solve))
            at = at.to(y0.dtype)
            if theta.ndim == 1:
                return y0 + mix(at, torch.stack(stages))
            return y0 + torch.einsum("mbs,sbd->mbd", at, torch.stack(stages))

        return dense


def _filtered(
    solver: ImplicitRungeKutta, field: Field, t: Tensor, y0: Tensor, h: Any, error: Tensor, solve: "_Solve"
) -> Tensor:
    """(1 - gamma h J)^-1 error, J at the start of the step; where gradients are wanted, with them."""
    if not torch.is_grad_enabled():
        return solve.filtered(error)
    system = Filter(field, t, y0, h, error, solver.filter)
    with torch.no_grad():
        x = system.exact(error)(error.detach())
    return attach(system, x)


def _over(edges: Any, t0: Time, t1: Time, most: float) -> Any:
    """Whether an edge lies beyond the middle of a step, but before its node `most`; where times are of shape (batch,),
    for each sample."""
    if isinstance(t1, Tensor) and t1.ndim:
        size = (t1 - t0).detach()
        edges = edges if edges.ndim == 2 else edges[:, None]
        at = (edges - t0) / torch.where(size == 0, 1, size)
        return ((at > 0.5) & (at < most) & (size != 0)).any(0)
    start, end = (float(t.detach()) if isinstance(t, Tensor) else t for t in (t0, t1))
    return any(0.5 < (float(edge) - start) / (end - start) < most for edge in edges)


def _either(mask: Tensor, a: Step, b: Step, carry: Carry) -> Step:
    """Samples of one step or of another, both begun with the same carry."""

    def pick(x: Any, y: Any) -> Any:
        return torch.where(mask.view(-1, *[1] * (x.ndim - 1)), x, y) if isinstance(x, Tensor) else x

    def both(x: Any, y: Any) -> Any:
        return rebuild(x, map(pick, leaves(x), leaves(y)))

    again = (step.again or carry._replace(factors=()) for step in (a, b))
    facts = ((s.y1, s.error, s.carry, s.ok, s.jacobians, s.iterations, s.nfe) for s in (a, b))
    y1, error, following, ok, jacobians, iterations, nfe = both(*facts)
    return Step(
        y1,
        error,
        lambda theta: torch.where(mask[:, None], a.dense(theta), b.dense(theta)),
        following,
        both(*again),
        ok,
        jacobians,
        iterations,
        nfe,
    )


def implicit_solvers() -> dict[str, ImplicitRungeKutta]:
    """The methods of implicit_tables by name; Radau's 5 helps where a node of Kvaerno's 5 would lie beyond the end."""
    made = {tableau.name: ImplicitRungeKutta(tableau) for tableau in IMPLICIT}
    return {**made, KVAERNO5.name: ImplicitRungeKutta(KVAERNO5, made[RADAU5.name])}


class _Solve:
    """One step's equations, without gradients, and the same with them."""

    def __init__(
        self,
        solver: ImplicitRungeKutta,
        field: Field,
        t0: Time,
        t1: Time,
        y0: Tensor,
        slope: Tensor,
        times: Sequence[Tensor],
        carry: Carry,
    ):
        self.tableau, self.solver, self.field, self.carry, self.t0 = solver.tableau, solver, field, carry, t0
        self.y0, self.slope, self.times = y0.detach(), slope.detach(), [t.detach() for t in times]
        size = (t1 - t0).detach() if isinstance(t1, Tensor) else t1 - t0
        self.each = isinstance(size, Tensor) and size.ndim > 0
        self.size: Any = size if self.each else float(size)
        self.h: Any = column(self.size, self.y0)
        self.jacobian: Any = None
        self.tol = tolerance(field, self.y0, _STRICT if solver.sequential else 1.0)
        self.batching = self.tol.batching
        self.nfe = self.jacobians = self.batching.fill(0, carry.stale)  # beyond those of `Found`
        self.fresh: Any = self.nfe != 0  # whether the Jacobian was made in this step
        if solver.sequential:
            self.shifts: tuple[complex, ...] = (float(1 / self.tableau.matrix[-1, -1]),)
        else:
            self.spectrum = spectrum(self.tableau, field.layout.real, y0.device)
            self.shifts = self.spectrum.shifts
        near = [i for i, shift in enumerate(self.shifts) if abs(shift - solver.filter) < 1e-9]
        self.filter = near[0] if near else len(self.shifts)  # which of the shifts it is
        if solver.filter and not near:
            self.shifts = (*self.shifts, solver.filter)

    def run(self) -> tuple[Found, Tensor]:
        """The increments h k_i of all stages, shape (stages, *y.shape), and how they were found."""
        carry, batching = self.carry, self.batching
        stale = batching.read(carry.stale)
        if isinstance(carry.blocks, tuple) or batching.any(stale):
            self.renew(stale)
        else:
            self.jacobian = Jacobian(self.rows(carry.blocks), carry.blocks)
            if carry.factors and abs(self.size / float(carry.size.max()) - 1) < 1e-6:
                self.factors = carry.factors
            else:
                self.factorise()
        found, k = self.attempt(_SIMPLIFIED)
        old = batching.no(found.ok | self.fresh)
        if batching.any(old):
            self.renew(old)
            found, k = self.better(old, found, k, *self.attempt(_SIMPLIFIED))
        failed = batching.no(found.ok)
        if self.field.context.tolerance is None and batching.any(failed):
            found, k = self.better(failed, found, k, *self.attempt(_EXACT, exact=True))
        self.jacobians = self.jacobians + found.jacobians
        return found, k

    def rows(self, blocks: Tensor) -> Rows:
        """The rows that blocks of shape (rows, m, m) belong to."""
        return Rows(self.field.layout, len(blocks))

    def renew(self, wanted: Any) -> None:
        """Make the Jacobian at the start of the step, for the state or for the samples that want it."""
        known: Any = self.jacobian.blocks if self.jacobian else self.carry.blocks
        calls = self.field.calls
        most = None if isinstance(known, tuple) else len(known)
        made = jacobian(self.field, self.field.time(self.t0).detach(), self.y0, most)
        if self.batching.per_sample:
            merged = torch.where(wanted[:, None, None], made.blocks, torch.as_tensor(known, device=made.blocks.device))
            made = made._replace(blocks=merged)
            self.nfe = self.nfe + wanted * (self.field.calls - calls)
        self.jacobian, self.fresh, self.jacobians = made, self.fresh | wanted, self.jacobians + wanted
        self.factorise()

    def factorise(self) -> None:
        """Make the factors of shift - h J for the shifts of the method and of the error filter."""
        self.factors = tuple(self.jacobian.factors(shift, self.h) for shift in self.shifts)

    def better(self, which: Any, first: Found, k: Tensor, second: Found, other: Tensor) -> tuple[Found, Tensor]:
        """A second attempt where the first one failed (`which`)."""
        where = self.batching.where
        return Found(
            second.z,
            where(which, second.ok, first.ok),
            first.iterations + which * second.iterations,
            where(which, second.rate, first.rate),
            first.nfe + which * second.nfe,
            first.jacobians + which * second.jacobians,
        ), self.rowwise(which, other, k)

    def rowwise(self, which: Any, a: Tensor, b: Tensor) -> Tensor:
        """Of states of shape (..., n) or (..., batch, d): those of a where the condition holds, else of b."""
        return self.batching.where(which[:, None] if self.batching.per_sample else which, a, b)

    def attempt(self, most: int, exact: bool = False) -> tuple[Found, Tensor]:
        """Solve all stages from their guesses."""
        field = self.field

        def solved(system: Stage | Stages, z: Tensor) -> Found:
            if exact:
                return damped(system.residual, system.exact, z, self.jacobian.rows, self.tol, most, field)
            inverse = system.simplified(self.jacobian, self.factors)
            return newton(lambda z: -inverse(system.residual(z)), z, self.tol, most, lambda: field.calls)

        if not self.solver.sequential:
            stages = Stages(field, self.times, self.y0, self.h, self.spectrum)
            found = solved(stages, self.guess())
            return found, torch.cat([(self.slope * self.h)[None], mix(self.spectrum.back, found.z)])
        found, k = None, [self.slope * self.h]
        for i in range(1, self.tableau.stages):
            guess = torch.stack([w * k[j] for j, w in _guess(self.tableau, i)]).sum(0)
            this = solved(self.stage(i, self.y0, self.h, self.times, k), guess)
            if found is not None:  # a stage after one that failed is neither used nor counted
                alive, slower = found.ok, found.ok & (this.rate > found.rate)
                this = Found(
                    self.rowwise(alive, this.z, k[-1]),
                    alive & this.ok,
                    found.iterations + alive * this.iterations,
                    self.batching.where(slower, this.rate, found.rate),
                    found.nfe + alive * this.nfe,
                    found.jacobians + alive * this.jacobians,
                )
            found = this
            k.append(found.z)
            if not self.batching.any(found.ok):
                k += [found.z] * (self.tableau.stages - len(k))
                break
        assert found is not None
        return found, torch.stack(k)

    def stage(self, i: int, y0: Tensor, h: Any, times: Sequence[Tensor], k: list[Tensor]) -> "Stage":
        """The equation of stage i, from the increments k of those before it."""
        row = self.tableau.matrix[i]
        base = y0 + sum(float(w) * z for w, z in zip(row, k, strict=False) if w)
        return Stage(self.field, times[i - 1], base, h, float(row[i]))

    def guess(self) -> Tensor:
        """Stages at once: the last step's polynomial, beyond its end; in the first step a straight line."""
        carry, spectrum = self.carry, self.spectrum
        c = torch.tensor(self.tableau.c[1:], dtype=spectrum.nodes.dtype, device=self.y0.device)
        line = c.to(self.y0.dtype).view(-1, *[1] * self.y0.ndim) * (self.slope * self.h)
        known = carry.size != 0
        if not bool(known.any()):
            return line
        ratio = self.size / torch.where(known, carry.size, 1)
        degrees = torch.arange(1, len(c) + 1, dtype=c.dtype, device=c.device)
        ahead = (1 + ratio.to(c.device)[..., None] * c)[..., None] ** degrees - 1
        moved = carry.past @ (ahead @ spectrum.nodes).mT.to(carry.past.dtype)
        return torch.where(known[:, None] if known.ndim else known.to(c.device), moved.movedim(-1, 0), line)

    def error(self, weights: Tensor, k: Tensor) -> Tensor:
        """The estimate of the local error, filtered; where it is too large once more, with the slope it leads to."""
        raw = mix(weights[None], k)[0]
        if not self.solver.filter:
            return raw
        error = self.filtered(raw)
        large = self.batching.read(self.tol.size(error, error)) > 1
        if self.field.context.tolerance is not None and self.batching.any(large):
            slope = self.field(self.field.time(self.t0).detach(), self.y0 - error)
            self.nfe = self.nfe + large
            again = self.filtered(raw + weights[0] * (slope * self.h - k[0]))
            error = self.rowwise(large, again, error)
        return error

    def filtered(self, error: Tensor) -> Tensor:
        """(1 - gamma h J)^-1 error with the factors of this step."""
        lu, rows = self.factors[self.filter], self.jacobian.rows
        return rows.unpack(lu.solve(rows.pack(error)) * self.solver.filter)

    def attached(self, y0: Tensor, h: Any, slope: Tensor, times: Sequence[Tensor], k: Tensor) -> Tensor:
        """The same increments with their derivatives."""
        if not self.solver.sequential:
            stages = Stages(self.field, times, y0, h, self.spectrum)
            z = attach(stages, mix(self.spectrum.a, k[1:]))
            return torch.cat([(slope * h)[None], mix(self.spectrum.back, z)])
        made = [slope * h]
        for i in range(1, self.tableau.stages):
            made.append(attach(self.stage(i, y0, h, times, made), k[i]))
        return torch.stack(made)

    def following(self, found: Found, slope: Tensor, h: Any, k: Tensor) -> Carry:
        """The carry after this step. A Jacobian with which the iteration was slow is made anew."""
        last: Any = ()
        if self.tableau.fsal:
            still = self.h == 0
            last = torch.where(still, slope, k[-1] / torch.where(still, 1, h)) if self.each else k[-1] / h
        past: Any = ()
        if not self.solver.sequential:
            past = mix(self.spectrum.a, k[1:].detach()).movedim(0, -1)
        solves = self.tableau.stages - 1 if self.solver.sequential else 1
        slow = (found.iterations > 2 * solves) & (found.rate > _SLOW)
        old = self.carry
        slow = torch.as_tensor(slow, device=old.stale.device)
        size = self.size if self.each else torch.full_like(old.size, self.size)
        factors = () if self.each else self.factors
        return Carry(last, self.jacobian.blocks, slow, size, past, factors)
