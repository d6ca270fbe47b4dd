"""Searched grids: the nodes that serve a denoiser best, found by dynamic programming over those of a teacher (GITS)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfode import defaults
from pfode.denoiser import Denoiser
from pfode.errors import UsageError, integer, number, unknown
from pfode.grids import Grid
from pfode.plans.table import Plan
from pfode.samplers.catalogue import make_plan
from pfode.samplers.request import Beginning, Keep, Place
from pfode.samplers.sampling import batches
from pfode.samplers.settle import prepared

__all__ = ["Jumps", "gits", "measure_jumps"]

METRICS = ("l2", "dev")
MAX_NODES, MAX_TRAJECTORIES = 2001, 2**20


@dataclass(frozen=True, eq=False)
class Jumps:
    """What an Euler jump from one node of a teacher to another costs.

    Args:
        times: of the nodes, falling, shape (m,).
        cost: of the jump from node i to node j, shape (m, m); infinite unless j > i.
    """

    times: Tensor
    cost: Tensor

    def grid(self, steps: int, coefficient: float = 1.15) -> Tensor:
        """The times, shape (steps + 1,), of the cheapest path from the first node to the last: a `grid=`.

        Bellman's recursion V_k(j) = min_i cost(j, i) + coefficient V_{k-1}(i) (Chen et al. 2024, GITS).

        Args:
            coefficient: above 1, late errors weigh more (the paper: 1.15 for pixels, 0.8 to 1.2 for latents).

        Raises:
            UsageError: more steps than the teacher's, or a coefficient that is not positive.
        """
        steps = integer("steps", steps, 1, len(self.times) - 1)
        coefficient = number("coefficient", coefficient, 1e-3, 1e3)
        value = torch.full_like(self.times, torch.inf)
        value[-1] = 0.0
        choices = []
        for _ in range(steps):
            value, choice = (self.cost + coefficient * value).min(1)
            choices.append(choice.tolist())
        path = [0]
        for choice in reversed(choices):
            path.append(choice[path[-1]])
        return self.times[path]


def measure_jumps(
    denoiser: Denoiser,
    n: int = 64,
    *,
    seed: int = 0,
    teacher: str = "ipndm3",
    grid: str | Grid | Tensor | Sequence[float] = "karras",
    nodes: int = 61,
    final: str = "denoise",
    metric: str = "l2",
    label: int | str | Sequence[int | str] | Tensor | None = None,
    shape: Sequence[int] | None = None,
    batch: int = defaults.BATCH,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Jumps:
    """Run a teacher once and cost every jump between its nodes: one pass serves every number of steps.

    A jump goes from the teacher's state along its prediction there, as DDIM does; lengths are those of x/alpha, where
    the PF-ODE's trajectories are regular whatever the process (Chen et al. 2024).

    Args:
        n: trajectories. seed: of the first.
        teacher: a deterministic recipe of one call per step. grid, nodes, final: where its nodes lie.
        metric: "l2", the distance to the teacher's state, or "dev", by how much the distance to the chord of the
            trajectory exceeds the teacher's.
        label, shape, batch, dtype, device: as for `pfode.sample`.

    Raises:
        UsageError: an unknown metric, sizes that cannot be made, or a teacher that is stochastic or makes several
            calls per step.
    """
    denoiser = prepared(denoiser, None)
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    n, seed = integer("n", n, 1, MAX_TRAJECTORIES), integer("seed", seed, 0, 2**64 - 1 - MAX_TRAJECTORIES)
    steps = integer("nodes", nodes, 3, MAX_NODES) - 1 if isinstance(grid, str | Grid) else None
    plan = make_plan(teacher, denoiser.process, steps, grid=grid, final=final)
    if plan.stochastic or plan.nfe != plan.steps:
        raise UsageError(f"teacher {teacher!r} is not deterministic with one call per step", 'teacher="ipndm3"')
    seeds = range(seed, seed + n)
    total = torch.zeros(plan.nfe + 1, plan.nfe + 1, dtype=torch.float64, device="cpu")
    place = Place(integer("batch", batch, 1), dtype, device)
    for part in batches(denoiser, plan, seeds, Beginning(shape=shape, label=label), place, Keep(trajectory=True)):
        total += _costs(plan, torch.stack(part.trajectory).flatten(2), part.preview, metric)
    unreachable = torch.ones_like(total, dtype=torch.bool).tril()
    return Jumps(plan.times, (total / n).masked_fill(unreachable, torch.inf))


def gits(denoiser: Denoiser, steps: int, *, coefficient: float = 1.15, **options: Any) -> Tensor:
    """The times of a grid of `steps` steps searched for this denoiser (Chen et al. 2024): `measure_jumps(...).grid`.

    For several numbers of steps call `measure_jumps` once.

    Args:
        denoiser, options: as for `measure_jumps`.
        steps, coefficient: as for `Jumps.grid`.

    Returns:
        Times of the denoiser's process, shape (steps + 1,), to be given as `grid=`.
    """
    return measure_jumps(denoiser, **options).grid(steps, coefficient)


def _costs(plan: Plan, states: Tensor, predictions: Sequence[Tensor], metric: str) -> Tensor:
    """The sum over a batch of every jump's cost, shape (m, m); `states` has shape (m, batch, d)."""
    alpha, sigma = plan.alpha.to(states), plan.sigma.to(states)
    last = states[-1] / alpha[-1]
    chord = states[0] - alpha[0] * last  # a multiple of x_0/alpha_0 - last, also where alpha_0 = 0
    chord = chord / torch.linalg.vector_norm(chord, dim=1, keepdim=True)

    def off_chord(z: Tensor) -> Tensor:
        way = z - last
        return torch.linalg.vector_norm(way - (way * chord).sum(-1, keepdim=True) * chord, dim=-1)

    total = torch.zeros(len(states), len(states), dtype=torch.float64, device="cpu")
    for i, x0 in enumerate(predictions):
        keep = (sigma[i + 1 :] / sigma[i])[:, None, None]
        a = alpha[i + 1 :, None, None]
        jumped = (keep * states[i] + (a - alpha[i] * keep) * x0.flatten(1)) / a
        reached = states[i + 1 :] / a
        if metric == "l2":
            cost = torch.linalg.vector_norm(jumped - reached, dim=-1)
        else:
            cost = off_chord(jumped) - off_chord(reached)
        total[i, i + 1 :] = cost.sum(1).double().cpu()
    return total
