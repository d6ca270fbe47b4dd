"""The rows of a plan as a scheduler applies them: one per call, on states at the network's scale."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pfode.errors import UsageError
from pfode.plans.rows import row_affine, used, weighed
from pfode.plans.table import Plan
from pfode.process import float64
from pfode.samplers.adapters.conventions import Convention


class Line(NamedTuple):
    """A row with the network's preconditioning in it: factors are 0-d tensors on the device, None where 0."""

    g: Tensor | None  # m = F + g x, up to a factor that is part of b
    r: Tensor | None
    back: Tensor | None  # of the state before
    b: tuple[tuple[int, Tensor], ...]  # (age, factor) of the predictions
    c: tuple[tuple[int, Tensor], ...]  # the same of the noises
    draws: bool  # whether its noise is used, here or later
    skip: Tensor  # D = skip x + out F
    out: Tensor


class Table:
    """The rows of a plan for a kind of network, in float64 on the host.

    Columns: g, r, r', skip, out, b, c of `Line`, for states at the network's scale (`Convention.scale`). Noise that a
    plan adds before its first call is taken to be in the state already: pipelines begin at the level of that call.

    Raises:
        UsageError: a plan that is not of the convention's process, or begins with a row that calls no network.
    """

    def __init__(self, plan: Plan, kind: Convention):
        if plan.init[1] == 0 and plan.init[0] != 1:
            raise UsageError(f"plan {plan.name!r}: its first step is made without a call", "afs=None")
        alpha, sigma = plan.alpha[:-1], plan.sigma[:-1]
        asked = asked_levels(plan)
        skip, out = kind.to_x0(*asked)
        if not torch.isfinite(torch.stack([skip, out])).all():
            at = plan.t[~torch.isfinite(skip + out)][0].item()
            problem = f"a network that predicts the noise says nothing about the data where alpha = 0 (t = {at:g})"
            raise UsageError(problem, "a network of another prediction_type, or nodes that start below that time")
        p, q = row_affine(plan.prediction, alpha, sigma)
        scale = float64(kind.scale(torch.cat([asked[1], plan.sigma[-1:]]))).clone()
        if plan.sigma[-1] == 0:
            scale[-1] = 1
        here, after = scale[:-1], scale[1:]
        self.ages, self.noise_ages = plan.b.shape[1] - 1, plan.c.shape[1] - 1
        b = weighed(plan.b, q * out) * after[:, None]
        back = plan.r_prev * after / torch.cat([here[:1], here[:-1]])
        g, r = (p + q * skip) / (q * out) / here, plan.r * after / here
        lone = ~used(plan.b, 1)
        r, g = torch.where(lone, r + b[:, 0] * g, r), torch.where(lone, 0.0, g)
        r = torch.where(r.abs() < 1e-13 * (plan.r * after / here).abs(), 0.0, r)
        columns = torch.stack([g, r, back, skip / here, out], 1)
        self.columns = torch.cat([columns, b, plan.c * after[:, None]], 1)
        self.alive = self.columns != 0
        self.draws = used(plan.c).tolist()
        self.pair = bool(self.alive[:, 2].any())

    def begins_at(self, i: int) -> bool:
        """Whether the rows from i on look back on nothing before it."""
        past = self.columns[i:, 5:]
        ages = torch.cat([torch.arange(self.ages + 1, device="cpu"), torch.arange(self.noise_ages + 1, device="cpu")])
        early = torch.arange(len(past), device="cpu")[:, None] < ages
        return not (past[early] != 0).any() and (i == 0 or not self.alive[i, 2])

    def line(self, k: int, factors: Sequence[Tensor], full: bool = False) -> Line:
        """Row k of these factors; full: as if none were 0, the same for every row."""
        alive = [True] * len(factors) if full else self.alive[k].tolist()
        g, r, back, skip, out, *rest = factors
        split = 6 + self.ages
        window = range(5, split)
        return Line(
            g if alive[0] else None,
            r if alive[1] else None,
            back if (self.pair if full else alive[2]) else None,
            tuple((j - 5, rest[j - 5]) for j in window if alive[j]),
            tuple((j - split, rest[j - 5]) for j in range(split, len(factors)) if alive[j]),
            bool(self.noise_ages >= 0) if full else self.draws[k],
            skip,
            out,
        )


def asked_levels(plan: Plan) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of the times that the network is told, which need not be the register's in a fitted plan."""
    apart, process = plan.t != plan.time[:-1], plan.process
    alpha = torch.where(apart, process.alpha(plan.t), plan.alpha[:-1])
    return alpha, torch.where(apart, process.sigma(plan.t), plan.sigma[:-1])
