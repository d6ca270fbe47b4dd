"""The optimiser of a fit: Levenberg-Marquardt steps on a loss of the samples' end-point errors.

A plan has tens of numbers, each of which is felt at the end point by its tangent (`tangents`). Per iteration one pass
gives the tangents of some samples, whose squared errors are then known as quadratic functions of the numbers. A loss
that is robust to the few samples that land elsewhere is minimised over those functions exactly, by reweighting them,
and of several dampings the step is taken that lowers the loss of those samples most.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pfode.errors import UsageError
from pfode.process import float64
from pfode.samplers.fit.cache import Cache, broken
from pfode.samplers.fit.losses import LOSSES
from pfode.samplers.fit.parameters import Parameters
from pfode.samplers.fit.samples import Group
from pfode.samplers.fit.tangents import Numbers, differences, end, tangents

__all__ = ["Errors", "Objective", "State"]

MEMORY = 2**27  # bytes that the tangents may take
DAMPED, DAMPING = 0.3, 8.0  # the first damping; the factor between those that are tried
TRIES = 6  # dampings per iteration
REWEIGHTINGS = 8  # of the samples, for a step


@dataclass
class State:
    """A fit between two iterations.

    Attributes:
        theta, best: the parameters now, and the best so far on the samples that choose; shape (size,), float64.
        damping: of the next step. done: iterations. phase: of the loss.
        stale: iterations of this phase without a gain. failed: whether no damping lowered the loss.
        mark: the lowest value so far of what a phase looks at.
    """

    theta: Tensor
    best: Tensor
    damping: float = DAMPED
    done: int = 0
    stale: int = 0
    failed: int = 0
    phase: int = 0
    mark: float = math.inf

    def save(self, path: Path | None) -> None:
        """Keep it in a file of the cache; with None nothing is kept."""
        rest = [self.damping, self.mark, self.done, self.stale, self.failed, self.phase]
        kept = {"theta": self.theta, "best": self.best.clone(), "rest": float64(rest)}
        Cache.write(path, kept)

    @classmethod
    def load(cls, path: Path | None, size: int, phases: int) -> "State":
        """The state that was kept; that of zeros where none was.

        Raises:
            FileError: damaged, or of another fit.
        """
        found = Cache.read(path, {"theta": (size,), "best": (size,), "rest": (6,)})
        if found is None:
            zeros = torch.zeros(size, dtype=torch.float64, device="cpu")
            return cls(zeros, zeros)
        damping, mark, *counts = found["rest"].tolist()
        sound = damping > 0 and not math.isnan(mark) and all(math.isfinite(c) and c >= 0 == c % 1 for c in counts)
        if not sound or counts[-1] >= phases:
            raise broken(path)
        done, stale, failed, phase = map(int, counts)
        return cls(found["theta"], found["best"], damping, done, stale, failed, phase, mark)


class Errors:
    """Mean square end-point errors per sample, float64, shape (n,)."""

    def __init__(self, each: Tensor):
        self.each = each

    @property
    def rms(self) -> float:
        """Root of the mean over samples."""
        return self.each.mean().sqrt().item()

    @property
    def median(self) -> float:
        """Median over samples of their root mean square errors."""
        return self.each.sqrt().median().item()

    def gain(self, start: "Errors") -> float:
        """The logarithms of both ratios to the start's, added; infinite where one of them is worse."""
        ratios = [new / max(old, 1e-300) for new, old in ((self.rms, start.rms), (self.median, start.median))]
        sound = all(ratio <= 1 for ratio in ratios)
        return sum(math.log(max(ratio, 1e-300)) for ratio in ratios) if sound else math.inf


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss of a plan's parameters on groups of samples, and a step that lowers it.

    Args:
        parameters: of the plan.
        phases: the losses, one after another.
        features: (batch, *shape) -> (batch, ...), in which errors are measured; None: as they are.
        batch: samples per denoiser call.
    """

    parameters: Parameters
    phases: tuple[str, ...]
    features: Callable[[Tensor], Tensor] | None
    batch: int

    def errors(self, numbers: Numbers, groups: Sequence[Group]) -> Errors:
        """Of a plan's end points; in the features, where there are any."""
        each = []
        for group in groups:
            y = end(numbers, group.call, self._first(group))
            apart = self._seen(y) - self._seen(group.target)
            each.append(apart.double().flatten(1).pow(2).mean(1))
        return Errors(torch.cat(each).cpu())

    def quadratics(self, theta: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Tensor, Tensor]:
        """The errors q + 2 g.d + d.H d of every sample after a step d: shapes (n,), (n, size), (n, size, size)."""
        numbers = self.parameters.numbers(theta)
        change = differences(self.parameters.numbers, theta)
        whole = len(numbers.vector)
        own = self.parameters.size < whole
        wanted = change if own else Numbers(torch.eye(whole, dtype=torch.float64, device="cpu"), numbers.n)
        found: list[tuple[Tensor, ...]] = []
        for group in groups:
            each = group.x[0].numel() * group.x.element_size() * len(wanted.vector) * (numbers.n + 2)
            for part in group.part(max(1, int(MEMORY // each))):
                y, moved = tangents(
                    numbers, wanted, self.parameters.start.process, part.call, self._first(part), self.batch
                )
                apart, moved = self._apart(part, y, moved)
                d = apart.shape[1]
                found.append(
                    (apart.pow(2).mean(1), (moved @ apart[..., None])[..., 0] / d, moved @ moved.transpose(1, 2) / d)
                )
        q, g, h = (torch.cat(values).cpu() for values in zip(*found, strict=True))
        if own:
            return q, g, h
        a = change.vector
        return q, g @ a.T, a @ h @ a.T

    def _first(self, group: Group) -> Tensor:
        """The state that the plan starts from, shape (batch, ...)."""
        return float(self.parameters.start.init[0]) * group.x

    def _seen(self, x: Tensor) -> Tensor:
        """Samples as errors see them, shape (batch, ...)."""
        if self.features is None:
            return x
        found = self.features(x)
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(x) or found.numel() == 0:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(f"features: need a tensor of shape ({len(x)}, ...), got {got}", "x.flatten(1), say")
        return found

    def _apart(self, part: Group, y: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """Errors, (batch, d), and their tangents, (batch, p, d), in float64."""
        if self.features is not None:
            here, size = self._seen(y), moved.flatten(2).pow(2).mean(2).sqrt().clamp_min(1e-30)
            level = 1e-2 * part.target.pow(2).mean().sqrt()
            h = (level / size).reshape(*size.shape, *[1] * (y.ndim - 1))
            moved = torch.stack([(self._seen(y + h[i] * move) - here) for i, move in enumerate(moved)])
            moved, y = moved / h.reshape(*size.shape, *[1] * (here.ndim - 1)), here
        apart = y - self._seen(part.target)
        return apart.double().flatten(1), moved.double().flatten(2).transpose(0, 1)

    def iterate(self, state: State, groups: Sequence[Group]) -> None:
        """One Levenberg-Marquardt step on some groups: of several dampings the one with the least loss of theirs."""
        value, slope = LOSSES[self.phases[state.phase]]
        q, g, h = self.quadratics(state.theta, groups)
        usual = max(q.sqrt().median().item() ** 2, 1e-300), max(q.mean().item(), 1e-300)
        diagonal = (slope(q, *usual)[:, None] * h.diagonal(dim1=1, dim2=2)).mean(0)
        diagonal = diagonal.clamp_min(1e-9 * float(diagonal.max()) + 1e-300)

        def attempt(damping: float) -> tuple[float, Tensor]:
            step = _minimised(q, g, h, lambda each: slope(each, *usual), damping * diagonal)
            try:
                numbers = self.parameters.numbers(state.theta + step)
            except UsageError:  # two of its times have become one
                return math.inf, step
            found = value(self.errors(numbers, groups).each, *usual).mean().item()
            return found if math.isfinite(found) else math.inf, step

        least, damping = value(q, *usual).mean().item(), state.damping
        found, step = attempt(damping)
        factor = 1 / DAMPING if found < least else DAMPING
        better = found < least
        for _ in range(TRIES):
            if better and factor > 1:
                break
            tried, other = attempt(factor * damping)
            if better and tried >= found:
                break
            damping, found, step = factor * damping, tried, other
            better = found < least
        state.damping, state.failed = min(max(damping, 1e-9), 1e6), 0 if better else state.failed + 1
        if better:
            state.theta = state.theta + step


def _after(q: Tensor, g: Tensor, h: Tensor, step: Tensor) -> Tensor:
    """The errors after a step, as the quadratic functions have them."""
    return (q + 2 * (g @ step) + ((h @ step) @ step)).clamp_min(0)


def _minimised(q: Tensor, g: Tensor, h: Tensor, slope: Callable[[Tensor], Tensor], ridge: Tensor) -> Tensor:
    """The step that minimises the mean loss of the quadratic functions, by reweighting them."""
    step = torch.zeros_like(ridge)
    for _ in range(REWEIGHTINGS):
        weight = slope(_after(q, g, h, step))
        matrix = torch.einsum("n,npq->pq", weight, h) / len(q) + torch.diag(ridge)
        step = -torch.linalg.solve(matrix, (weight[:, None] * g).mean(0))
    return step
