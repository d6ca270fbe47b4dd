"""torchcde.misc: what its own modules and users call from there."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pfode.cde import filling
from pfode.errors import UsageError

__all__ = ["CheckError", "cheap_stack", "forward_fill", "need", "tridiagonal_solve", "validate_input_path"]


class CheckError(UsageError, AssertionError):
    """A wrong argument, where torchcde asserts."""


def need(condition: bool, message: str) -> None:
    if not condition:
        raise CheckError(message)


def cheap_stack(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """torch.stack."""
    return tensors[0].unsqueeze(dim) if len(tensors) == 1 else torch.stack(list(tensors), dim)


def tridiagonal_solve(b: Tensor, A_upper: Tensor, A_diagonal: Tensor, A_lower: Tensor) -> Tensor:
    """The solution x of A x = b for a tridiagonal A of shape (k, k), given by its diagonals; b has shape (..., k)."""
    return filling.tridiagonal(b, A_upper, A_diagonal, A_lower)


def validate_input_path(x: Tensor, t: Tensor | None) -> Tensor:
    """The times of a path, 0, 1, ... if none are given, checked in torchcde's words."""
    if not x.is_floating_point():
        raise UsageError("X must both be floating point.")
    if x.ndim < 2:
        raise UsageError(
            "X must have at least two dimensions, corresponding to time and channels. It instead has shape "
            f"{tuple(x.shape)}."
        )
    if t is None:
        t = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)
    if not t.is_floating_point():
        raise UsageError("t must both be floating point.")
    if t.ndim != 1:
        raise UsageError(f"t must be one dimensional. It instead has shape {tuple(t.shape)}.")
    if bool((t.detach().diff() <= 0).any()):
        raise UsageError("t must be monotonically increasing.")
    if x.shape[-2] != len(t):
        raise UsageError(
            f"The time dimension of X must equal the length of t. X has shape {tuple(x.shape)} and t has shape "
            f"{tuple(t.shape)}, corresponding to time dimensions of {x.shape[-2]} and {len(t)} respectively."
        )
    if len(t) < 2:
        raise UsageError(
            f"Must have a time dimension of size at least 2. It instead has shape {tuple(t.shape)}, corresponding to a "
            f"time dimension of size {len(t)}."
        )
    return t


def forward_fill(x: Tensor, fill_index: int = -2) -> Tensor:
    """x with the last value that is not NaN carried on along a dimension."""
    need(isinstance(x, Tensor) and x.ndim >= 2, "x must be a tensor of two dimensions or more")
    return filling.fill_forward(x.movedim(fill_index, -1)[..., None])[..., 0].movedim(-1, fill_index)
