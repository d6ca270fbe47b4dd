"""Spectral norm as an option of fields: it bounds their Lipschitz constant, and with it the stiffness of their ODE."""

from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from pfode.errors import UsageError, number

__all__ = ["bound_spectral_norm"]

AnyModule = TypeVar("AnyModule", bound=torch.nn.Module)


class _Bounded(torch.nn.Module):
    """W min(1, bound / |W|_2), W as a matrix of its outputs."""

    def __init__(self, bound: float):
        super().__init__()
        self.bound = bound

    def forward(self, weight: Tensor) -> Tensor:
        size = torch.linalg.matrix_norm(weight.flatten(1), 2)
        return weight * (self.bound / size.clamp(min=self.bound))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def bound_spectral_norm(network: AnyModule, bound: float = 1.0) -> AnyModule:
    """Keep every weight of a network, in place, to a spectral norm of at most `bound` (Miyato et al. 2018).

    The norm is exact, not a power iteration that goes on from call to call: within a solve, and when an adjoint takes
    steps again, the field has to be the same function. Kernels of convolutions count as matrices of their outputs.

    Args:
        network: a module with weights of two or more dimensions.
        bound: above 0.

    Raises:
        UsageError: no such weights, or a bound that is none.
    """
    if number("bound", bound, 0.0) == 0:
        raise UsageError("bound: need a number above 0, got 0", "bound=1.0")
    weights = [(module, getattr(module, "weight", None)) for module in network.modules()]
    found = [module for module, weight in weights if isinstance(weight, Tensor) and weight.ndim > 1]
    if not found:
        raise UsageError(f"{type(network).__name__} has no weight matrices", "a network of Linear or Conv layers")
    for module in found:
        parametrize.register_parametrization(module, "weight", _Bounded(bound))
    return network
