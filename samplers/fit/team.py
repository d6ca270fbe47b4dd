"""The processes that share a fit: those of a `torch.distributed` group, or this one alone."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

__all__ = ["Team"]

T = TypeVar("T")


class Team:
    """This process among those that share the work; alone where no group of processes was made."""

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if several else 0
        self.count = dist.get_world_size() if several else 1

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of a list: every count-th."""
        return items[self.rank :: self.count]

    def whole(self, mine: Sequence[T]) -> list[T]:
        """The list again, of the shares that all processes made of it."""
        if self.count == 1:
            return list(mine)
        shares: list[Any] = [None] * self.count
        dist.all_gather_object(shares, list(mine))
        longest = len(shares[0])
        return [share[i] for i in range(longest) for share in shares if i < len(share)]

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.count == 1:
            return value
        shared = value.cuda() if dist.get_backend() == "nccl" else value.clone()
        dist.all_reduce(shared)
        return shared.to(value)

    def first(self, act: Callable[[], T]) -> T:
        """What the first process makes, in every process.

        Raises:
            Exception: what it raised there, in all of them.
        """
        if self.count == 1:
            return act()
        made: list[Any] = [None]
        if self.rank == 0:
            try:
                made = [act()]
            except Exception as error:
                made = [error]
        dist.broadcast_object_list(made)
        if isinstance(made[0], Exception):
            raise made[0]
        return made[0]
