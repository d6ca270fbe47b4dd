"""What a network predicts, as affine functions of the state x and the denoiser D (docs/design.md, idea A).

Coefficients are plain arithmetic in alpha and sigma, so both may be floats or tensors of one shape.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pfode.errors import unknown

__all__ = [
    "PREDICTIONS",
    "Coefficient",
    "Pair",
    "Prediction",
    "prediction",
]

Coefficient = Any  # a float or a tensor of the shape of alpha and sigma
Pair = tuple[Coefficient, Coefficient]


@dataclass(frozen=True)
class Prediction:
    """One row of the table: out = p x + q D and D = c x + d out, with (p, q) = of_x0(alpha, sigma), (c, d) = to_x0.

    `singular`: at alpha = 0 it says nothing about the data, so that D cannot be had from it there.
    """

    of_x0: Callable[[Coefficient, Coefficient], Pair]
    to_x0: Callable[[Coefficient, Coefficient], Pair]
    singular: bool = False


def _one(a: Coefficient, s: Coefficient) -> Pair:
    return 0 * a, 0 * a + 1


PREDICTIONS: dict[str, Prediction] = {
    "x0": Prediction(_one, _one),
    "eps": Prediction(lambda a, s: (1 / s, -a / s), lambda a, s: (1 / a, -s / a), singular=True),
    "score": Prediction(lambda a, s: (-1 / s**2, a / s**2), lambda a, s: (1 / a, s**2 / a), singular=True),
    "v": Prediction(
        lambda a, s: (a / (s * _hypot(a, s)), -_hypot(a, s) / s),
        lambda a, s: (a / _hypot(a, s) ** 2, -s / _hypot(a, s)),
    ),
    "flow": Prediction(lambda a, s: (1 / s, -(a + s) / s), lambda a, s: (1 / (a + s), -s / (a + s))),
}


def _hypot(a: Coefficient, s: Coefficient) -> Coefficient:
    return (a**2 + s**2) ** 0.5


def prediction(name: str) -> Prediction:
    """Look a prediction up.

    Raises:
        UsageError: unknown name.
    """
    if name not in PREDICTIONS:
        raise unknown("prediction", name, PREDICTIONS)
    return PREDICTIONS[name]
