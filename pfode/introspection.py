"""What can be found out about a network that pfode did not write: its dtype, and whether its weights changed."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from pfode._torch import in_place_changes
from pfode.errors import UsageError

__all__ = ["Stamp", "compute_dtype", "modules", "stamp"]

DEPTH = 4  # of functions that name functions, in which modules are looked for
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


def compute_dtype(network: object) -> torch.dtype | None:
    """The dtype that a network takes: that of its first floating-point parameter of 16 bits or more.

    For something else that can be called, of the modules that it holds or names (an object's attributes, the arguments
    of a `functools.partial`, what a function closes over), where these agree.

    Returns:
        None where no dtype is known: the network then gets the dtype of the state.

    Raises:
        UsageError: all its weights have 8 bits, in which nothing is computed.
    """
    found: set[torch.dtype] = set()
    for module in modules(network):
        floats = [p.dtype for p in module.parameters() if p.is_floating_point()]
        wide = next((dtype for dtype in floats if dtype.itemsize > 1), None)
        own = getattr(module, "dtype", None)  # of diffusers' models that keep 8 bits and compute in more
        if wide is None and isinstance(own, torch.dtype) and own.is_floating_point and own.itemsize > 1:
            wide = own
        if floats and wide is None:
            raise UsageError(
                f"network: its weights are {floats[0]}, in which nothing is computed", "network.to(torch.bfloat16)"
            )
        found |= set() if wide is None else {wide}
    return found.pop() if len(found) == 1 else None


def modules(network: object) -> list[nn.Module]:
    """The torch modules that something callable is or holds, down to functions named by functions."""
    found: list[nn.Module] = []
    left, seen = [(network, 0)], set()
    while left:
        value, depth = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append(value)
        elif depth < DEPTH:
            left += [(inner, depth + 1) for inner in _held(value)]
    return found


def _held(value: object) -> list[Any]:
    """What a callable stands on."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if inspect.ismethod(value):
        return [value.__self__]
    if inspect.isfunction(value):
        try:
            names = inspect.getclosurevars(value)
        except ValueError:  # a name that it closes over has no value yet
            return []
        return [inner for inner in (*names.nonlocals.values(), *names.globals.values()) if callable(inner)]
    return [] if isinstance(value, type) or not callable(value) else [*getattr(value, "__dict__", {}).values()]


Stamp = tuple[tuple[str, int, int, int], ...]


def stamp(network: nn.Module) -> Stamp | None:
    """What changes when the weights do: place, version and sum of the bits of each; a few per cent of hashing them.

    Returns:
        None where a weight has none of these (on the meta device, in a dtype of its own): it counts as changed.
    """
    names, places, sums = [], [], []
    for name, value in network.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or value.is_meta:
            return None
        data = value.detach()
        try:
            width = 8 if data.is_contiguous() and data.numel() * data.itemsize % 8 == 0 else data.itemsize
            bits = data.reshape(-1).view(INTEGERS[width]) if width == 8 else data.view(INTEGERS[width])
            sums.append(bits.sum(dtype=torch.int64))
            places.append((data.data_ptr(), in_place_changes(value) or 0))
        except (RuntimeError, KeyError, NotImplementedError):
            return None
        names.append(name)
    totals = [total.item() for total in sums]
    return tuple((name, *place, int(total)) for name, place, total in zip(names, places, totals, strict=True))
