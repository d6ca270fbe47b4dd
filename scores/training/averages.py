"""Averages of the weights over a run, by a power of the step (Karras et al. 2024, section 3.1)."""

import math

from torch import Tensor, nn

from pfode._torch import lerp_all_

__all__ = ["average", "ema_power"]


def ema_power(width: float) -> float:
    """The exponent g of the average with weights ~ step^g whose standard deviation is `width` of the run.

    With a = g + 1: width^2 = a / ((a + 1)^2 (a + 2)) (Karras et al. 2024, appendix C): the largest root of
    a cubic in a, found by bisection of the falling right-hand side.
    """
    low, high = 1.0, 1e9
    for _ in range(200):
        a = math.sqrt(low * high)
        low, high = (a, high) if a / ((a + 1) ** 2 * (a + 2)) > width**2 else (low, a)
    return low - 1


def average(ema: dict[float, dict[str, Tensor]], net: nn.Module, step: int) -> None:
    """Take the weights after a step from 0 into the averages, by their widths, in place.

    With t = step + 1 the average a becomes beta a + (1 - beta) weights, where beta = (1 - 1/t)^(g + 1) and g the
    exponent of its width (Karras et al. 2024, section 3.1).
    """
    weights = [p.detach() for p in net.parameters()]
    for width, averaged in ema.items():
        keep = (1 - 1 / (step + 1)) ** (ema_power(width) + 1)
        lerp_all_(list(averaged.values()), weights, 1 - keep)
