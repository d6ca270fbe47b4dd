"""Tensors in safetensors files: dtypes by the format's names; written with the digest that `Header.verify` checks."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from pfode.files import content_digest, write_atomic

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
DTYPES = FLOATS | {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def raw(value: Tensor) -> bytes:
    """The bytes of a tensor, in the order of its elements."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def write_tensors(path: str | PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write contiguous tensors as one safetensors file, whole or not at all; the digest goes into its metadata.

    Raises:
        WriteError: see `write_atomic`.
    """
    contents = {name: (NAMES[value.dtype], tuple(value.shape), raw(value)) for name, value in tensors.items()}
    sealed = {"format": "pt", **metadata}
    sealed["pfode.digest"] = content_digest(sealed, contents)
    return write_atomic(path, safetensors.torch.save(dict(tensors), sealed))
