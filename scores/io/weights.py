"""Giving a network the tensors of a file: exactly those that it has, each checked first."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from pfode.errors import FileError
from pfode.tensors import FLOATS, NAMES

__all__ = ["fill"]


def fill(network: nn.Module, tensors: Mapping[str, Tensor], where: Callable[[str], Path], uniform: bool = True) -> None:
    """Give a network exactly its tensors.

    Args:
        network: its parameters may be on the meta device.
        tensors: by the names of its state dict.
        where: the file of a tensor, for messages.
        uniform: refuse a tensor whose dtype is another than that of most.

    Raises:
        FileError: a tensor is missing, unknown, of another shape or dtype, or not finite.
    """
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for name in sorted(set(expected) ^ set(tensors)):
        what = "missing" if name in expected else "unknown"
        raise FileError(f"{where(name)}: tensor {name!r} is {what}", "the file is of another model, or damaged")
    found = [tensors[name].dtype for name in expected]
    usual = max(set(found), key=found.count)
    for name, shape in expected.items():
        value = tensors[name]
        dtype = NAMES.get(value.dtype, str(value.dtype))
        if tuple(value.shape) != shape:
            raise FileError(f"{where(name)}: tensor {name!r}: shape {list(value.shape)}, expected {list(shape)}")
        if dtype not in FLOATS:
            raise FileError(f"{where(name)}: tensor {name!r}: dtype {dtype}, expected one of {', '.join(FLOATS)}")
        if uniform and value.dtype != usual:
            raise FileError(f"{where(name)}: tensor {name!r}: dtype {dtype}, the others have {NAMES.get(usual, usual)}")
        if not value.isfinite().all():
            raise FileError(f"{where(name)}: tensor {name!r}: not finite", "the training diverged, or it is damaged")
    network.load_state_dict(dict(tensors), assign=True)
