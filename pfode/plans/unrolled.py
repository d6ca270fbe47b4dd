"""A plan as linear algebra: its states as combinations of x_T, of the denoiser's outputs and of the noises.

All functions run the plan itself, on vectors of coefficients instead of samples.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pfode.plans.executor import run
from pfode.plans.table import Plan
from pfode.process import Process

__all__ = [
    "matrix",
    "outputs",
    "spread",
    "states",
]


class _Linear:
    """A denoiser of coefficients, shape (1, size); it keeps the states that it is asked about."""

    def __init__(self, process: Process, output: Callable[[int, Tensor], Tensor]):
        self.process, self.output = process, output
        self.asked: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.asked.append(x)
        return self.output(len(self.asked) - 1, x)

    def tuned(self, offsets: Mapping[str, Tensor]) -> "_Linear":
        """Itself: its outputs are given, whatever it is asked with."""
        return self


def matrix(plan: Plan) -> Tensor:
    """The states of a plan that draws no noise, in x_T and the denoiser's outputs D_0, D_1, ...

    Returns:
        shape (nfe + 1, nfe + 1), lower triangular but for its first column: row k is y_k.
    """
    unit = torch.eye(plan.nfe + 1, dtype=torch.float64, device="cpu")
    denoiser = _Linear(plan.process, lambda k, x: unit[k + 1 : k + 2])
    end = run(plan, denoiser, unit[:1])
    return torch.cat([*denoiser.asked, end])


def outputs(plan: Plan) -> Tensor:
    """The factors of the denoiser's outputs in the states of any plan, shape (nfe + 1, nfe): row k is of y_k."""
    unit = torch.eye(plan.nfe, dtype=torch.float64, device="cpu")
    denoiser = _Linear(plan.process, lambda k, x: unit[k : k + 1])
    end = run(plan, denoiser, torch.zeros_like(unit[:1]), lambda k: torch.zeros_like(unit[:1]))
    return torch.cat([*denoiser.asked, end])


def states(plan: Plan, x: Tensor, seeds: Any = None, *, brownian: bool = False) -> Tensor:
    """The states of a plan for a denoiser that returns zeros, from x with the noise of the seeds.

    Returns:
        shape (nfe + 1, *x.shape).
    """
    denoiser = _Linear(plan.process, lambda k, x: torch.zeros_like(x))
    end = run(plan, denoiser, x, seeds, brownian=brownian)
    return torch.stack([*denoiser.asked, end])


def spread(plan: Plan, std: float = 0.5) -> float:
    """The deviation of a plan's end points on Gaussian data of mean 0 and deviation std, over what it would be exactly.

    About 1 for a sound plan; far above where its steps are so long that errors grow from one to the next. The rows are
    linear then: the end point is a combination of x_T and of the noises, without sampling, on the host.
    """
    alpha, sigma = plan.process.alpha(plan.t), plan.process.sigma(plan.t)
    gain = (alpha * std**2 / (alpha**2 * std**2 + sigma**2)).tolist()  # D = gain x
    unit = torch.eye(plan.nfe + 2, dtype=torch.float64, device="cpu")  # the noise of row k, of the init row, x_T
    end = run(plan, _Linear(plan.process, lambda k, x: gain[k] * x), unit[-1:], lambda k: unit[k : k + 1])

    def variance(alpha: float, sigma: float) -> float:
        return (alpha * std) ** 2 + sigma**2

    *drawn, first = end[0].square().tolist()
    total = first * variance(*plan.first[1:].tolist()) + sum(drawn)
    return math.sqrt(total / variance(plan.alpha[-1].item(), plan.sigma[-1].item()))
