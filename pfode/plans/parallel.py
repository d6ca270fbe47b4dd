"""All rows of a plan at once: Picard iteration on its unrolled form, with Anderson acceleration.

Unrolled, the states of a plan are y_k = c_k + sum_{j<k} A_kj D_j with D_j = D(y_j, t_j): c is the plan run on a
denoiser of zeros, noise and all, and A is strictly lower triangular. A sweep evaluates many D_j in one call, each at
the latest guess of its y_j, and makes all y_k of them anew (Shih et al. 2023, "Parallel sampling of diffusion models").
Sweep s makes y_s from states that are final, so that n rows take at most n sweeps; a smooth trajectory takes far
fewer, in more calls altogether. Rows whose state changes by less than a tolerance are final, in every sample by itself.

Between sweeps the guesses are extrapolated: in row k by the combination of the last changes that would have made the
changes of the rows up to k least (triangular Anderson acceleration: Tang et al. 2024, "Accelerating parallel sampling
of diffusion models"). The first row that is not final is left as the sweep has it, which keeps the bound.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode.denoiser import Denoiser
from pfode.errors import UsageError, integer, number
from pfode.inpainting import Inpainted
from pfode.plans.executor import as_state, check_output, check_plan
from pfode.plans.table import Plan
from pfode.plans.unrolled import outputs, states

__all__ = ["Parallel", "Swept", "sweep"]

RIDGE = 1e-6  # of the least squares, relative to the mean square change


@dataclass(frozen=True)
class Parallel:
    """How to run a plan in sweeps over its rows.

    Args:
        tolerance: a row is final once its state changes by less than this share of hypot(alpha, sigma), root mean
            square; 0 for the states of the plan itself, which takes a sweep for each row.
        window: rows evaluated in one sweep from the first that is not final, None for all; fewer cost less memory.
        memory: changes that the extrapolation combines; 0 for plain Picard iteration.

    Raises:
        UsageError: a value out of range.
    """

    tolerance: float = 1e-3
    window: int | None = None
    memory: int = 2

    def __post_init__(self) -> None:
        number("tolerance", self.tolerance, 0)
        integer("memory", self.memory, 0, 20)
        if self.window is not None:
            integer("window", self.window, 1)


class Swept(NamedTuple):
    """Where the sweeps ended: x (batch, ...); and of every sample the sweeps it took and its denoiser calls."""

    x: Tensor
    sweeps: Tensor
    calls: Tensor


def sweep(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    seeds: Any = None,
    how: Parallel | None = None,
    *,
    brownian: bool = False,
    **cond: Any,
) -> Swept:
    """Run a plan from x, the state at its first time, in sweeps over its rows; arguments as for `pfode.run`.

    Args:
        how: tolerance, window and memory.

    Raises:
        UsageError: as `pfode.run`; a tuned plan, whose rows ask the network each in their own way.
    """
    how = Parallel() if how is None else how
    if plan.tune:
        problem = f"plan {plan.name!r} is tuned: its rows ask the network each in their own way, not all in one call"
        raise UsageError(problem, "fit_plan(..., tune=False), or leave parallel out")
    check_plan(plan, denoiser)
    x = as_state(x)
    given = states(plan, x, seeds, brownian=brownian)
    factors = outputs(plan).to(x)
    scale = torch.hypot(plan.alpha, plan.sigma).to(x)[:-1]
    return _Sweeps(given, factors, scale, plan.t.to(x.device), how).run(_asking(denoiser, cond))


def _asking(denoiser: Denoiser, cond: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function from states, their times and the samples they are of to the denoiser's outputs."""

    def ask(x: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        own = {key: value[sample] if isinstance(value, Tensor) and value.ndim else value for key, value in cond.items()}
        one = denoiser.only(sample) if isinstance(denoiser, Inpainted) else denoiser
        return check_output(one(x, t, **own), x)

    return ask


class _Sweeps:
    """The iteration.

    Args:
        given: c, (rows + 1, batch, ...). factors: A, (rows + 1, rows). scale: of the states, (rows,). times: (rows,).

    Attributes:
        y: the guesses, (rows, batch, ...). d: the latest outputs. first: of each sample, the first row not final.
    """

    def __init__(self, given: Tensor, factors: Tensor, scale: Tensor, times: Tensor, how: Parallel):
        self.given, self.factors, self.scale, self.times, self.how = given, factors, scale, times, how
        self.rows, self.batch = len(times), given.shape[1]
        self.y = given[:-1].clone()
        self.d = torch.zeros_like(self.y)
        self.row = torch.arange(self.rows, device=given.device)[:, None]
        self.first = torch.zeros(self.batch, dtype=torch.int64, device=given.device)
        self.changes: list[tuple[Tensor, Tensor]] = []  # of guesses, and of what sweeps made of them

    def run(self, ask: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Swept:
        sweeps, calls = (torch.zeros_like(self.first) for _ in range(2))
        before: tuple[Tensor, Tensor] | None = None
        window = self.rows if self.how.window is None else self.how.window
        while bool((self.first < self.rows).any()):
            last = (self.first + (1 if before is None else window)).clamp(max=self.rows)  # the first sweep: one row
            asked = (self.row >= self.first) & (self.row < last)
            row, sample = asked.nonzero().unbind(1)
            self.d[row, sample] = ask(self.y[row, sample], self.times[row], sample)
            sweeps += (self.first < self.rows).to(sweeps)
            calls += asked.sum(0)
            made = self._made(last)
            change = made - self.y
            self._advance(change, last)
            if before is not None and self.how.memory:
                self.changes = [*self.changes, (self.y - before[0], change - before[1])][-self.how.memory :]
            before = self.y, change
            self.y = self._extrapolated(made, change, last)
        return Swept(self.given[-1] + self._sum(self.factors[-1:], self.d)[0], sweeps, calls)

    def _sum(self, factors: Tensor, d: Tensor) -> Tensor:
        return (factors @ d.reshape(self.rows, -1)).reshape(len(factors), *d.shape[1:])

    def _shaped(self, value: Tensor) -> Tensor:
        """A value of each row and sample, to broadcast against the states."""
        return value.reshape(*value.shape, *[1] * (self.y.ndim - 2))

    def _made(self, last: Tensor) -> Tensor:
        """The states that the outputs make; rows beyond the last that was asked are given its output."""
        end = (last - 1).clamp(min=0)
        held = self.d[end, torch.arange(self.batch, device=end.device)]
        d = torch.where(self._shaped(self.row < last), self.d, held)
        return self.given[:-1] + self._sum(self.factors[:-1], d)

    def _advance(self, change: Tensor, last: Tensor) -> None:
        """Make the rows final that no longer change, as far as all before them are; one at least."""
        size = change.flatten(2).square().mean(2).sqrt() / self.scale[:, None]
        settled = ((size <= self.how.tolerance) | (self.row <= self.first)) & (self.row < last)
        reached = (settled | (self.row < self.first)).to(torch.int64).cumprod(0).sum(0)
        self.first = torch.where(self.first < self.rows, reached, self.first)

    def _extrapolated(self, made: Tensor, change: Tensor, last: Tensor) -> Tensor:
        """The next guesses: of the rows that are not final, extrapolated, but for the first of them."""
        final = self._shaped(self.row < self.first)
        plain = torch.where(final, self.y, made)
        if not self.changes:
            return plain
        free = self._shaped((self.row > self.first) & (self.row < last))
        moved, changed = (torch.stack(part) * free for part in zip(*self.changes, strict=True))
        flat = changed.flatten(3)
        gram = torch.einsum("akbx,ckbx->kbac", flat, flat).cumsum(0).double()
        right = torch.einsum("akbx,kbx->kba", flat, (change * free).flatten(2)).cumsum(0).double()
        ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(torch.float64).tiny
        eye = torch.eye(len(self.changes), dtype=torch.float64, device=gram.device)
        weights = torch.linalg.solve_ex(gram + ridge[..., None, None] * eye, right[..., None])[0][..., 0]
        weights = weights.nan_to_num(0.0, 0.0, 0.0).to(made)
        back = torch.einsum("kba,akbx->kbx", weights, (moved + changed).flatten(3)).reshape(made.shape)
        return plain - back * free
