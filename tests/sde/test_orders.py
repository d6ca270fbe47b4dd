"""Orders of convergence of every method for every kind of noise that it takes, on one path for all step sizes."""

import functools
import math

import numpy as np
import pytest
import torch

from pfode.brownian import Brownian
from pfode.sde import SDE, methods_for, sdesolve
from pfode.sde.registry import method_for
from tests.sde import problems

PATHS = 256
COUNTS = (16, 32, 64, 128)
FINE = {"ito": {"diagonal": "srid2", "scalar": "srid2", "additive": "shark", "general": "euler"}}
FINE["stratonovich"] = {"diagonal": "slow-rk", "scalar": "slow-rk", "additive": "shark", "general": "spark"}
KINDS = [(c, n) for c in ("ito", "stratonovich") for n in problems.NOISES]
CASES = [(c, n, m) for c, n in KINDS for m in methods_for(n, c)]


def path(noise: str) -> Brownian:
    return Brownian(range(PATHS), (problems.CHANNELS[noise],), 0, 1, area=True, dtype=torch.float64)


def end(calculus: str, noise: str, method: str, steps: int, bm: Brownian) -> torch.Tensor:
    y0 = torch.full((PATHS, 2), 0.5, dtype=torch.float64)
    sde = problems.equation(noise, calculus)
    return sdesolve(sde, y0, [0, 1], brownian=bm, method=method, step_size=1 / steps, adjoint="direct").ys[-1]


@functools.cache
def reference(calculus: str, noise: str) -> torch.Tensor:
    return end(calculus, noise, FINE[calculus][noise], 2048 if noise == "general" else 1024, path(noise))


def slope(errors: list[float], counts=COUNTS) -> float:
    return float(np.polyfit(np.log([1 / n for n in counts]), np.log(errors), 1)[0])


@pytest.mark.parametrize(("calculus", "noise", "method"), CASES)
def test_strong_order(calculus, noise, method):
    bm, exact = path(noise), reference(calculus, noise)
    with torch.no_grad():
        wrong = [end(calculus, noise, method, n, bm) - exact for n in COUNTS]
    found = slope([float(e.square().sum(-1).mean().sqrt()) for e in wrong])
    claimed = method_for(method, noise, calculus, False).strong[noise]
    assert found == pytest.approx(claimed, abs=0.15)


class Quadrature:
    """A driver whose samples are the nodes of Gauss-Hermite quadrature in W and H: means of one step are exact."""

    area = True

    def __init__(self, n: int = 12):
        x, w = np.polynomial.hermite_e.hermegauss(n)
        self.w, self.h = (torch.from_numpy(a.flatten().copy()) for a in np.meshgrid(x, x))
        self.weights = torch.from_numpy(np.outer(w, w).flatten() / w.sum() ** 2)

    def increment(self, ta, tb):
        root = math.sqrt(abs(tb - ta))
        return self.w[:, None] * root, self.h[:, None] * root / math.sqrt(12)


@pytest.mark.parametrize(("calculus", "noise", "method"), [case for case in CASES if case[2] != "log-ode"])
def test_weak_order(calculus, noise, method):
    """The mean square after one step of dy = a y dt + b y dW (or + b dW), by quadrature: its error is O(h^(p + 1))."""
    a, b, driver = -0.8, 0.9, Quadrature()
    matrix = noise in ("scalar", "general")

    def g(t, y):
        part = b * (torch.ones_like(y) if noise == "additive" else y)
        return part[..., None] if matrix else part

    errors, sizes = [], [0.1 * 2**-k for k in range(4)]
    for h in sizes:
        sde = SDE(lambda t, y: a * y, g, noise, calculus)
        y0 = torch.ones(len(driver.w), 1, dtype=torch.float64)
        y = sdesolve(sde, y0, [0, h], brownian=driver, method=method, step_size=h, adjoint="direct").ys[-1][:, 0]
        rate = 2 * a + (b * b if calculus == "ito" else 2 * b * b) * (noise != "additive")
        exact = math.exp(rate * h) + (b * b * math.expm1(2 * a * h) / (2 * a) if noise == "additive" else 0)
        errors.append(abs(float(driver.weights @ y.square()) - exact))
    claimed = method_for(method, noise, calculus, False).weak
    assert slope(errors, [1 / h for h in sizes]) - 1 >= claimed - 0.15
