"""torch.autocast around a solve: it casts what the caller's functions do, never the solver's own arithmetic."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["Casting", "autocast_off", "casting"]


class Casting:
    """A function of the caller's, called inside of torch.autocast.

    Args:
        f: the function.
        kind: type of the device, such as "cpu".
        dtype: that is cast to.
    """

    def __init__(self, f: Callable[..., Any], kind: str, dtype: torch.dtype):
        self.f, self.kind, self.dtype = f, kind, dtype

    def __call__(self, *args: Any) -> Any:
        with torch.autocast(self.kind, self.dtype):
            return self.f(*args)


def casting(device: torch.device) -> Callable[[Callable[..., Any]], Casting] | None:
    """What makes functions keep the autocast that is on for a device; None where it is off."""
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        return None
    return functools.partial(Casting, kind=kind, dtype=torch.get_autocast_dtype(kind))


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """A stretch without autocast for a device; nothing where it is off already."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
