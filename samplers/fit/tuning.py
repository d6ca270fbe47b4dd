"""Tuned plans: a fitted plan's numbers, and the conditions its rows ask with, learnt by gradients through the calls.

A row asks the network at a time; the time reaches the network by its conditioning layers. Tuning adds to each of their
outputs an offset of the row's own, the weights untouched ("Three Creates All", arXiv 2603.22375: step-wise embeddings
of a frozen network). A plan of some tens of numbers becomes one of some thousands, so that noise is streamed: each
piece of it is integrated finely, used a few times, and dropped.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfode.denoiser import conditioning
from pfode.errors import NumericalError
from pfode.plans.executor import run
from pfode.plans.table import Plan
from pfode.samplers.fit.cache import Cache, broken
from pfode.samplers.fit.levenberg import Errors
from pfode.samplers.fit.losses import LOSSES
from pfode.samplers.fit.parameters import clock, clocked
from pfode.samplers.fit.samples import GROUP, STREAM, Group, Source, joined
from pfode.samplers.fit.tangents import Numbers
from pfode.samplers.fit.team import Team

__all__ = ["Tuning", "errors", "tune"]

PIECE = 8  # batches whose samples are drawn at once
VISITS = 4  # how often each is used
RATES = 2e-3, 2e-2  # of Adam: for the plan's numbers, for the offsets
WARMUP, CLIP = 0.1, 5.0  # share of the steps in which the rate rises; the longest gradient
BETAS, TINY = (0.9, 0.99), 1e-8  # of Adam


@dataclass(frozen=True)
class Tuning:
    """How a plan is tuned.

    Attributes:
        steps: of the optimiser. batch: samples in one of them.
        checkpoint: keep one call's memory for the gradients, at the price of a second call.
    """

    steps: int
    batch: int
    checkpoint: bool = False


class Conditions:
    """A plan with free numbers and free offsets of its rows' conditions, as one vector; zeros are the plan.

    Query times move in the `clock`, coefficients and offsets by what is added to them.

    Args:
        start: the plan. layers: the conditioning layers and their widths.
    """

    def __init__(self, start: Plan, layers: Mapping[str, int]):
        self.start, self.layers, self.base = start, layers, Numbers.of(start)
        self.sizes = [start.nfe * width for width in layers.values()]
        own = [start.tune.get(name, torch.zeros(start.nfe, width, device="cpu")) for name, width in layers.items()]
        self.begun = torch.cat([value.reshape(-1) for value in own]).double()
        numbers = self.base.vector
        self.size = len(numbers) + sum(self.sizes)
        self.rates = torch.cat([torch.full_like(numbers, RATES[0]), torch.full_like(self.begun, RATES[1])])

    def plan(self, theta: Tensor) -> Plan:
        """The plan of parameters, shape (size,), float64; gradients flow."""
        free, offsets = theta.split([len(self.base.vector), sum(self.sizes)])
        n, process, t = self.start.nfe, self.start.process, self.base.t
        u = clock(process, t)
        moved = (t + (clocked(process, u + free[:n]) - clocked(process, u))).clamp(process.t_min, process.t_max)
        numbers = Numbers(torch.cat([moved, self.base.vector[n:] + free[n:]]), n)
        parts = (self.begun + offsets).split(self.sizes)
        rows = {name: part.reshape(-1, width) for part, (name, width) in zip(parts, self.layers.items(), strict=True)}
        return numbers.plan(self.start, tune=rows)


@dataclass
class Adam:
    """The parameters and their optimiser (Kingma & Ba 2015), which goes on where it was left.

    Attributes:
        theta, mean, square: the parameters, and the moments of their gradients; shape (size,), float64.
        best: the best parameters so far on the samples that choose. done: steps.
    """

    theta: Tensor
    mean: Tensor
    square: Tensor
    best: Tensor
    done: int = 0

    @classmethod
    def new(cls, size: int) -> "Adam":
        """An optimiser before its first step, at the parameters 0, shape (size,)."""
        zeros = torch.zeros(size, dtype=torch.float64, device="cpu")
        return cls(zeros, zeros, zeros, zeros)

    def step(self, gradient: Tensor, rates: Tensor) -> None:
        """Take one step against the gradient, shape (size,), its length cut to `CLIP`; rates: one per parameter."""
        self.done += 1
        gradient = gradient * min(1.0, CLIP / max(float(gradient.norm()), 1e-30))
        first, second = BETAS
        self.mean = first * self.mean + (1 - first) * gradient
        self.square = second * self.square + (1 - second) * gradient.square()
        mean, square = self.mean / (1 - first**self.done), self.square / (1 - second**self.done)
        self.theta = self.theta - rates * mean / (square.sqrt() + TINY)

    def save(self, path: Any) -> None:
        """Keep it in a file of the cache; with None nothing is kept."""
        done = torch.tensor([self.done], dtype=torch.float64, device="cpu")
        kept = {"theta": self.theta, "mean": self.mean, "square": self.square, "best": self.best.clone(), "done": done}
        Cache.write(path, {name: value.contiguous().clone() for name, value in kept.items()})

    @classmethod
    def load(cls, path: Any, size: int) -> "Adam":
        """The state that was kept; a new one where none was.

        Raises:
            FileError: damaged, or of another fit.
        """
        found = Cache.read(path, dict.fromkeys(("theta", "mean", "square", "best"), (size,)) | {"done": (1,)})
        if found is None:
            return cls.new(size)
        done = found.pop("done").item()
        if not (done >= 0 and done % 1 == 0) or not all(value.isfinite().all() for value in found.values()):
            raise broken(path)
        return cls(**found, done=int(done))


def tune(
    plan: Plan,
    source: Source,
    checked: list[Group],
    tuning: Tuning,
    cache: Cache,
    say: Callable[[int, Errors, Errors], None],
) -> tuple[Plan, Errors]:
    """The plan tuned, and its errors on the samples that choose; on those it is never worse.

    Args:
        source: draws the noise that is fitted on.
        checked: samples that choose.
        cache: keeps where it is, so that it goes on there.
        say: called with the steps done and the errors of the best plan so far and of the plan at the start.

    Raises:
        UsageError: a denoiser without conditioning layers. NumericalError: no finite gradient.
    """
    team, free = Team(), Conditions(plan, conditioning(source.denoiser))
    start = errors(plan, checked, team, tuning.batch)
    usual = max(start.median**2, 1e-300), max(start.rms**2, 1e-300)
    kept = cache.path("tune", {**source.settings, **vars(tuning), "start": free.base.vector.tolist()})
    state = team.first(lambda: Adam.load(kept, free.size))
    best = errors(free.plan(state.best), checked, team, tuning.batch) if state.done else start
    many, each = PIECE * GROUP * math.ceil(tuning.batch / GROUP), PIECE * VISITS  # samples of a piece, its steps
    while True:
        say(state.done, best, start)
        if state.done >= tuning.steps:
            return free.plan(state.best), best
        piece = source.piece(STREAM, many, state.done // each, team)
        for step in range(state.done % each, each):
            if state.done >= tuning.steps:
                break
            gradient = _gradient(free, state.theta, _batch(piece, step, tuning.batch, team), usual, tuning, team)
            state.step(gradient, free.rates * _rate(state.done / tuning.steps))
        latest = errors(free.plan(state.theta), checked, team, tuning.batch)
        if latest.gain(start) < best.gain(start):
            best, state.best = latest, state.theta
        if team.rank == 0:
            state.save(kept)


def _rate(done: float) -> float:
    """The factor of the learning rates after this share of the steps: up in a line, down along a cosine."""
    rising = min(1.0, (done + 1e-3) / WARMUP)
    return rising * (0.5 + 0.5 * math.cos(math.pi * done))


def _batch(piece: Sequence[Group], step: int, batch: int, team: Team) -> Sequence[Group]:
    """This process's share of the samples of a step: every one comes up once in a visit, in another order."""
    draw = torch.Generator().manual_seed(step // PIECE)
    order = torch.randperm(len(piece), generator=draw, device="cpu").tolist()
    many = math.ceil(batch / GROUP)
    first = step % PIECE * many
    return [piece[i] for i in team.own(order[first : first + many])]


def errors(plan: Plan, groups: Sequence[Group], team: Team, batch: int) -> Errors:
    """The end-point errors of a plan on groups of samples, shared by the processes."""
    found = []
    with torch.no_grad():
        for group in joined(team.own(groups), batch):
            found.append(_apart(plan, group, False).cpu())
    return Errors(torch.cat(team.whole(found)))


def _apart(plan: Plan, group: Group, checkpoint: bool) -> Tensor:
    """The mean square end-point error of every sample of a group, float64, shape (batch,)."""
    ends = run(plan, group.denoiser, group.x, checkpoint=checkpoint, **group.cond)
    return (ends - group.target).double().flatten(1).square().mean(1)


def _gradient(
    free: Conditions,
    theta: Tensor,
    groups: Sequence[Group],
    usual: tuple[float, float],
    tuning: Tuning,
    team: Team,
) -> Tensor:
    """The gradient of the mean loss over the samples of all processes, shape (size,).

    Raises:
        NumericalError: it is not finite.
    """
    value = LOSSES["balanced"][0]
    gradient, count = torch.zeros_like(theta), torch.zeros(1, dtype=torch.float64, device="cpu")
    for group in joined(groups, tuning.batch):
        with torch.enable_grad():
            here = theta.detach().requires_grad_()
            loss = value(_apart(free.plan(here), group, tuning.checkpoint), *usual).sum()
            gradient += torch.autograd.grad(loss, here)[0]
        count += len(group)
    whole = team.total(torch.cat([gradient, count]))
    if not whole.isfinite().all():
        raise NumericalError("tune: a gradient through the calls is not finite", "check the network and its precision")
    return whole[:-1] / whole[-1]
