"""The processes that share a run, as `accelerate launch` starts them: each one's part of the work, and agreement."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from pfode.errors import PfodeError

if TYPE_CHECKING:
    import torch

__all__ = ["Share", "launched"]


@dataclass(frozen=True)
class Share:
    """This process's part of the work: one of those of `accelerate launch`, or all of it."""

    rank: int = 0
    count: int = 1
    device: "torch.device | None" = None

    @classmethod
    def find(cls, device: "torch.device") -> "Share":
        """The part by the environment, which `accelerate launch` sets."""
        if not launched():
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu")
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        """Leave the group of processes: its threads must not outlive the interpreter."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()

    def agree(self, act: Callable[[], None]) -> None:
        """Do something in every process, and wait for all; the first one raises the error of any, the others end."""
        mine: PfodeError | None = None
        try:
            act()
        except PfodeError as error:
            if self.count == 1:
                raise
            mine = error
        if self.count == 1:
            return
        from accelerate.utils import gather_object

        errors: Sequence[PfodeError] = [error for error in gather_object([mine]) if error is not None]
        if errors:
            raise errors[0] if self.first else click.exceptions.Exit(errors[0].code)


def launched() -> bool:
    """Whether this is one of several processes that `accelerate launch` started."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1") and "LOCAL_RANK" in os.environ
