"""Tensors in safetensors files: dtypes by the format's names; written with the digest that `Header.verify` checks."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pfode._torch import is_transformed
from pfode.errors import FileError, UsageError
from pfode.files import write_atomic
from pfode.header import Digest, Header, content_digest, pack, read_header

__all__ = ["DTYPES", "FLOATS", "NAMES", "raw", "read_tensors", "readable", "transformed", "write_tensors"]

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
DTYPES = FLOATS | {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):  # torch >= 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def raw(value: Tensor) -> bytes:
    """The bytes of a tensor, in the order of its elements.

    Raises:
        UsageError: it is on the meta device and has no bytes.
    """
    if value.is_meta:
        raise UsageError("a tensor on the meta device holds no numbers", "fill it first: load_state_dict(...)")
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def write_tensors(path: str | PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write tensors as one safetensors file, whole or not at all; the digest goes into its metadata.

    The same tensors and metadata make the same file, byte for byte.

    Raises:
        UsageError: a tensor of a dtype that the format does not have, or on the meta device.
        WriteError: see `write_atomic`.
    """
    for name, value in tensors.items():
        if value.dtype not in NAMES:
            raise UsageError(f"{name}: a safetensors file has no {value.dtype}", "another dtype")
    contents = {name: (NAMES[value.dtype], tuple(value.shape), raw(value)) for name, value in tensors.items()}
    sealed = {"format": "pt", **metadata}
    sealed = {key: text.encode("utf-8", "replace").decode() for key, text in sealed.items()}  # of file names, say
    sealed["pfode.digest"] = content_digest(sealed, contents)
    return write_atomic(path, pack(sealed, contents))


def read_tensors(header: Header, verify: bool = True) -> dict[str, Tensor]:
    """All tensors of a safetensors file, read once, one by one.

    Args:
        header: of the file, by `read_header`.
        verify: compare the digest that pfode wrote with what was read; files of others have none.

    Raises:
        FileError: the file cannot be read, was cut since, or its content does not match its digest.
    """
    digest = Digest(header.metadata)
    found: dict[str, Tensor] = {}
    for name, entry, data in header.tensors():
        if verify:
            digest.add(name, entry.dtype, entry.shape, data)
        if entry.dtype not in DTYPES:
            raise FileError(f"{header.path}: tensor {name!r:.80}: dtype {entry.dtype}, which this torch does not have")
        dtype = DTYPES[entry.dtype]
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")
        found[name] = flat.reshape(entry.shape)
    if verify:
        header.compare(digest.hexdigest)
    return found


def read_sealed(path: str | PathLike[str], kind: str, hint: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file of `write_tensors`, its digest compared with what it holds.

    Args:
        kind: what the file says it is, its "pfode.kind". hint: what to do where it is not sound.

    Raises:
        FileError: it cannot be read, is not as it was written, or of another kind.
    """
    try:
        header = read_header(path)
        found = header.metadata.get("pfode.kind")
        if found != kind:
            raise FileError(f"{header.path}: is {found!r:.60}, not {kind!r}")
        return read_tensors(header), dict(header.metadata)
    except FileError as error:
        raise FileError(error.message, hint or error.hint) from error


def transformed(x: Tensor) -> bool:
    """Whether x is being differentiated or mapped by torch.func, or is a dual number of forward-mode differentiation.

    There its values cannot be looked at (vmap), only the plain memory format exists, and fused attention has no
    derivative. Asking costs about a microsecond; under torch.compile the answer is no.
    """
    if torch.compiler.is_compiling():
        return False
    return is_transformed(x) or forward_ad.unpack_dual(x).tangent is not None


def readable(value: Tensor) -> bool:
    """Whether the values of a tensor can be looked at without waiting for a device, and at all."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed(value)
