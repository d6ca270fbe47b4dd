"""The two batching modes of the loop: one step size for the whole state, or one for each sample.

They differ in the arithmetic of times, errors and decisions: Python's floats, read from the device once per attempted
step (`Joint`), or tensors of shape (batch,) that stay there (`PerSample`).
"""

from typing import Any

import torch
from torch import Tensor

from pfode.ode.state import leaves, rebuild

__all__ = ["Batching", "Joint", "PerSample"]


class Joint:
    """One step size for the state: floats and booleans."""

    per_sample = False

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """a where the condition holds, else b."""
        return a if condition else b

    def low(self, a: Any, b: Any) -> Any:
        """The smaller of two numbers."""
        return min(a, b)

    def high(self, a: Any, b: Any) -> Any:
        """The larger of two numbers."""
        return max(a, b)

    def no(self, a: Any) -> Any:
        """Whether a condition does not hold."""
        return not a

    def sure(self, a: Any) -> bool:
        """Whether a condition is known to hold, without reading anything back."""
        return a

    def any(self, a: Any) -> bool:
        """Whether a condition holds for the state, or for a sample: a read-back per sample."""
        return a

    def read(self, a: Tensor) -> Any:
        """A tensor of shape () or (batch,) as the mode has numbers: a read-back in joint mode."""
        return a.item()

    def count(self, total: Any, counted: Any, work: Any) -> Any:
        """A total with the work of an attempt added where that is counted."""
        return total + counted * work

    def fill(self, value: Any, like: Any) -> Any:
        """A number in the shape of `like`: here as it is."""
        return value

    def pick(self, table: Any, at: Any) -> Any:
        """The entry of a table of stops at an index, which each sample has of its own in per-sample mode."""
        return table[at]

    def merge(self, condition: Any, new: Any, old: Any) -> Any:
        """A tree of tensors: the new one where the condition holds, else the old one."""
        return new if condition else old


class PerSample:
    """One step size per sample: tensors of shape (batch,)."""

    per_sample = True

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """Of each sample a where the condition holds, else b; one of the two may be a number."""
        return torch.where(condition, a, b) if isinstance(a, Tensor) else b.masked_fill(condition, a)

    def low(self, a: Any, b: Any) -> Any:
        """The smaller one of each number and a number b."""
        return a.clamp(max=b)

    def high(self, a: Any, b: Any) -> Any:
        """The larger one of each number and a number b."""
        return a.clamp(min=b)

    def no(self, a: Any) -> Any:
        """Whether a condition does not hold, for each sample."""
        return ~a

    def sure(self, a: Any) -> bool:
        """False: what holds for the samples is not known without reading it back."""
        return False

    def any(self, a: Any) -> bool:
        """Whether a condition holds for any sample: a read-back."""
        return bool(a.any())

    def read(self, a: Tensor) -> Any:
        """The numbers of all samples, which stay on the device."""
        return a

    def count(self, total: Any, counted: Any, work: Any) -> Any:
        """A total of each sample, with the work of an attempt added where that is counted."""
        if isinstance(work, Tensor):
            return total + counted * work
        return torch.add(total, counted, alpha=work) if work else total

    def fill(self, value: Any, like: Any) -> Any:
        """A number for every sample, shape (batch,): whole ones as int64, others of the dtype of `like`."""
        return torch.full(
            like.shape, value, device=like.device, dtype=torch.int64 if type(value) is int else like.dtype
        )

    def pick(self, table: Any, at: Any) -> Any:
        """The entry of a table, shape (stops,) or (stops, batch), at the index of each sample."""
        return table[at] if table.ndim == 1 else table.gather(0, at[None])[0]

    def merge(self, condition: Any, new: Any, old: Any) -> Any:
        """Samples of `new` where the condition holds, else of `old`; None, a carry not known, stays None."""
        if new is None or old is None:
            return None
        if isinstance(new, Tensor):
            return torch.where(condition.view(-1, *[1] * (new.ndim - 1)), new, old)
        parts = [self.merge(condition, a, b) for a, b in zip(leaves(new), leaves(old), strict=True)]
        return rebuild(new, iter(parts))


Batching = Joint | PerSample
