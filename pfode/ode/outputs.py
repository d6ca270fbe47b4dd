"""Output times: which of them a step passes, and the states there by its dense output."""

import math
from typing import Any

import torch
from torch import Tensor

from pfode.ode.batching import Batching
from pfode.ode.records import Attempt

__all__ = ["JointOutputs", "PerSampleOutputs", "outputs"]


class JointOutputs:
    """States at the output times of a joint solve, a block per step that passes some.

    Args:
        ts: output times of the clock's dtype, shape (times,); the first is the start.
        sign: direction.
    """

    def __init__(self, ts: Tensor, sign: float):
        self.ts, self.sign, self.floats = ts, sign, ts.tolist()
        self.blocks: list[Tensor] = []
        self.done = 0

    def start(self, y: Tensor) -> None:
        """The states at the start, also where its time is repeated."""
        self.done = self.floats.count(self.floats[0])
        self.blocks.append(y.expand(self.done, *y.shape))

    @property
    def next(self) -> float:
        """The next output time."""
        return self.floats[min(self.done, len(self.floats) - 1)]

    def add(self, attempt: Attempt) -> bool:
        """Evaluate the dense output of an accepted step wherever it passes output times; whether it did."""
        first, times, sign = self.done, self.floats, self.sign
        while self.done < len(times) and (times[self.done] - attempt.t1) * sign <= 0:
            self.done += 1
        inner = self.done
        while inner > first and times[inner - 1] == attempt.t1:
            inner -= 1
        if inner > first:
            self.blocks.append(attempt.step.dense((self.ts[first:inner] - attempt.u0) / (attempt.u1 - attempt.u0)))
        if self.done > inner:
            self.blocks.append(attempt.y.expand(self.done - inner, *attempt.y.shape))
        return inner > first

    def result(self) -> Tensor:
        """Shape (times, *y.shape); NaN at times that were not reached."""
        missing = len(self.floats) - self.done
        if missing:
            like = self.blocks[0]
            self.blocks.append(torch.full_like(like, math.nan).expand(missing, *like.shape[1:]))
        return torch.cat(self.blocks)


class PerSampleOutputs:
    """The same where every sample is at its own time.

    Args:
        ts: shape (times,) or (times, batch).
        sign: direction, 1.0, -1.0 or shape (batch,).
        batch: number of samples.
    """

    def __init__(self, ts: Tensor, sign: Any, batch: int):
        self.ts = ts if ts.ndim == 2 else ts[:, None].expand(-1, batch)
        self.sign = sign
        self.next = torch.ones(batch, dtype=torch.int64, device=ts.device)
        self.source = torch.full(self.ts.shape, -1, dtype=torch.int64, device=ts.device)
        self.blocks: list[Tensor] = []

    def start(self, y: Tensor) -> None:
        """The states at the start, also where its time is repeated."""
        self.blocks.append(y[None])
        same = self.ts == self.ts[0]
        self.source = torch.where(same, 0, self.source)
        self.next = same.sum(0)

    def passed(self, t1: Tensor) -> Tensor:
        """How many further output times every sample has passed at t1, shape (batch,)."""
        beyond = ((self.ts - t1) * self.sign <= 0).sum(0)
        return (beyond - self.next).clamp(min=0)

    def between(self, t1: Tensor) -> Tensor:
        """How many of these lie before t1."""
        beyond = ((self.ts - t1) * self.sign < 0).sum(0)
        return (beyond - self.next).clamp(min=0)

    def add(self, attempt: Attempt, most: int, between: int = 1) -> Tensor | None:
        """Evaluate where samples passed output times; which of them used dense output, shape (batch,), or None.

        Args:
            most: how many one of them passed at most; between: ... before the end of its step.
        """
        if not most:
            return None
        steps = torch.arange(most, device=self.ts.device)[:, None]
        index = (self.next + steps).clamp(max=len(self.ts) - 1)
        valid = (steps < self.passed(attempt.t1)) & attempt.accepted
        times = self.ts.gather(0, index)
        span = attempt.u1 - attempt.u0
        theta = torch.where(valid, (times - attempt.u0) / torch.where(span == 0, 1.0, span), 0.0)
        at_end = (times == attempt.t1) | ~valid
        values = attempt.y.expand(most, *attempt.y.shape)
        if between:  # else dense output would be evaluated in vain
            values = torch.where(at_end[..., None], values, attempt.step.dense(theta))
        rows = sum(len(block) for block in self.blocks) + steps.expand_as(index)
        self.source.scatter_(0, torch.where(valid, index, 0), torch.where(valid, rows, 0))
        self.blocks.append(values)
        self.next = self.next + valid.sum(0)
        return ~at_end.all(0) if between else None

    def result(self) -> Tensor:
        """Shape (times, batch, d); NaN at times that were not reached."""
        values = torch.cat(self.blocks)
        index = self.source.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1])
        return torch.where((self.source >= 0)[..., None], values.gather(0, index), math.nan)


def outputs(ts: Tensor, sign: Any, batching: Batching, batch: int) -> JointOutputs | PerSampleOutputs:
    """The outputs of these batching."""
    return PerSampleOutputs(ts, sign, batch) if batching.per_sample else JointOutputs(ts, sign)
