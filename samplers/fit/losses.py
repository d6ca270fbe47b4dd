"""What a fit minimises: the mean over samples of a loss of each sample's mean square end-point error.

A loss is a pair of functions (q, s, m): its value and its slope in q, where q is the mean square error of a sample,
shape (n,), s the square of the median error of all samples and m their mean square error. Adding one is adding an entry
to `LOSSES`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LOSSES", "PHASES", "Loss"]

Loss = tuple[Callable[[Tensor, float, float], Tensor], Callable[[Tensor, float, float], Tensor]]


def _power(p: float, soft: float) -> Loss:
    """(q + soft s)^p."""
    return lambda q, s, m: (q + soft * s) ** p, lambda q, s, m: p * (q + soft * s) ** (p - 1)


def _balanced(weight: float) -> Loss:
    """log(q + s/100) + weight q/m: few samples that land elsewhere count, but do not dominate."""
    return (
        lambda q, s, m: torch.log(q + 1e-2 * s) + weight * q / m,
        lambda q, s, m: 1 / (q + 1e-2 * s) + weight / m,
    )


LOSSES: dict[str, Loss] = {
    "l2": (lambda q, s, m: q, lambda q, s, m: torch.ones_like(q)),
    "l1": _power(0.5, 1e-4),
    "root": _power(0.25, 1e-3),
    "log": (lambda q, s, m: torch.log(q + 1e-2 * s), lambda q, s, m: 1 / (q + 1e-2 * s)),
    "geman-mcclure": (lambda q, s, m: q / (1 + q / (9 * s)), lambda q, s, m: (1 + q / (9 * s)) ** -2),
    "balanced": _balanced(3.0),
}
PHASES = {"balanced": ("log", "balanced")}  # one after another
