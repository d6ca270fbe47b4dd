"""The rows of a plan as a scheduler applies them: one per call, on states at the network's scale."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pfode.denoiser import Preconditioning
from pfode.errors import UsageError
from pfode.plans.rows import Row, fold
from pfode.plans.table import Plan
from pfode.process import float64
from pfode.samplers.adapters.conventions import Convention

__all__ = ["Table", "asked_levels"]


class Table:
    """The rows of a plan for a kind of network, in float64 on the host, for states at its scale (`Convention.scale`).

    Noise that a plan adds before its first call is taken to be in the state already: pipelines begin at the level of
    that call.

    Attributes:
        columns: the factors of every row side by side, see `Folded.columns`.
        window: how many states a row adds to.

    Raises:
        UsageError: a plan that is not of the convention's process, or begins with a row that calls no network.
    """

    def __init__(self, plan: Plan, kind: Convention):
        if plan.init[1] == 0 and plan.init[0] != 1:
            raise UsageError(f"plan {plan.name!r}: its first step is made without a call", "afs=None")
        asked = asked_levels(plan)
        skip, out = kind.to_x0(*asked)
        if not torch.isfinite(torch.stack([skip, out])).all():
            at = plan.t[~torch.isfinite(skip + out)][0].item()
            problem = f"a network that predicts the noise says nothing about the data where alpha = 0 (t = {at:g})"
            raise UsageError(problem, "a network of another prediction_type, or nodes that start below that time")
        scale = float64(kind.scale(torch.cat([asked[1], plan.sigma[-1:]]))).clone()
        if plan.sigma[-1] == 0:
            scale[-1] = 1
        pre = Preconditioning(torch.ones_like(out), plan.t, skip / scale[:-1], out)
        self._folded = fold(plan, pre, scale, stages=False)
        self._parts, self.columns, self.window = self._folded.parts, self._folded.columns, self._folded.window
        used = torch.tensor(self._parts, device="cpu")
        self._every = used.any(0).tolist()
        self._ahead = used[:, 4:].unflatten(1, (3, self.window)).any(1)  # [k, j]: row k adds to the state after k + j

    def begins_at(self, i: int) -> bool:
        """Whether the rows from i on look back on nothing before it."""
        before = range(max(0, i - self.window), i)
        return not any(self._ahead[k, i - k :].any() for k in before)

    def row(self, k: int, factors: Sequence[Tensor], full: bool = False) -> Row:
        """Row k of these factors; full: the same for every row, with what any of them needs."""
        folded = self._folded
        draws = any(folded.draws) if full else folded.draws[k]
        return folded.row(factors, self._every if full else self._parts[k], draws)


def asked_levels(plan: Plan) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of the times that the network is given, which need not be the state's in a fitted plan."""
    apart, process = plan.t != plan.time[:-1], plan.process
    alpha = torch.where(apart, process.alpha(plan.t), plan.alpha[:-1])
    return alpha, torch.where(apart, process.sigma(plan.t), plan.sigma[:-1])
