"""Problems with known solutions, and the grids on which orders are measured."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import scipy.integrate
import torch
from torch import Tensor

import pfode
from pfode.denoiser import Denoiser
from pfode.process import Process
from pfode.scores.exact import Gaussian, GaussianMixture

PROCESSES = {"VP": pfode.VP(), "EDM": pfode.EDM(), "Flow": pfode.Flow()}
ALL_PROCESSES = {
    **PROCESSES,
    "SubVP": pfode.SubVP(),
    "VPCosine": pfode.VPCosine(),
    "VE": pfode.VE(),
    "VPDiscrete": pfode.VPDiscrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)),
}


def zero_terminal_snr() -> pfode.VPDiscrete:
    """The usual linear betas, rescaled so that alpha is exactly 0 at the last index (Lin et al. 2024, algorithm 1)."""
    root = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return pfode.VPDiscrete(root**2)


def gaussian(process: Process) -> Gaussian:
    """Mean not 0, deviations not 1."""
    return Gaussian([0.3, -0.5, 1.2], torch.tensor([0.25, 0.64, 0.04], dtype=torch.float64), process=process)


def mixture(process: Process) -> GaussianMixture:
    return GaussianMixture([[0.9, -0.4], [-0.6, 0.8], [0.1, 0.3]], std=0.5, weights=[0.5, 0.3, 0.2], process=process)


def interior_grid(process: Process, n: int, high: float = 2.0, low: float = 0.25) -> list[float]:
    """n + 1 times between two interior levels of sigma/alpha, smoothly uneven in its logarithm."""
    u = np.linspace(0, 1, n + 1)
    v = math.log(high) + (math.log(low) - math.log(high)) * (u + 0.2 * u * (1 - u))
    return process.time(torch.from_numpy(-2 * v)).tolist()


def start(denoiser: GaussianMixture, t: float, n: int = 8) -> Tensor:
    """Noised data at time t."""
    x0 = denoiser.sample(n, seed=1)
    noise = pfode.noise.normal(range(n), 7, x0.shape[1:], torch.float64)
    return denoiser.process.alpha(t) * x0 + denoiser.process.sigma(t) * noise


def solution(denoiser: Denoiser, x: Tensor, times: Sequence[float]) -> list[Tensor]:
    """The PF-ODE's solution through x at times[0]: exact where the denoiser knows it, else DOP853 at 1e-13.

    d(x/alpha)/dv = (x - alpha D)/alpha with v = log(sigma/alpha), written here afresh and solved by SciPy.
    """
    if isinstance(denoiser, Gaussian):
        return [denoiser.flow(x, times[0], t) for t in times]
    process, shape = denoiser.process, x.shape
    v = [-0.5 * process.log_snr(t) for t in times]

    def field(v: float, y: np.ndarray) -> np.ndarray:
        t = process.time(-2 * v)
        state = torch.from_numpy(y).reshape(shape) * process.alpha(t)
        x0 = denoiser(state, torch.tensor(t, dtype=torch.float64))
        return ((state / process.alpha(t)) - x0).numpy().ravel()

    y = (x / process.alpha(times[0])).numpy().ravel()
    sol = scipy.integrate.solve_ivp(field, (v[0], v[-1]), y, "DOP853", t_eval=v, rtol=1e-13, atol=1e-14)
    assert sol.success, sol.message
    return [torch.from_numpy(sol.y[:, i]).reshape(shape) * process.alpha(t) for i, t in enumerate(times)]


@functools.cache
def finest(bed: str, process: str, n: int) -> tuple[Denoiser, list[float], list[Tensor]]:
    """A test bed, the finest interior grid and its solution there; grids of n / 2^k steps are slices of it."""
    denoiser = {"gaussian": gaussian, "mixture": mixture}[bed](PROCESSES[process])
    times = interior_grid(denoiser.process, n)
    return denoiser, times, solution(denoiser, start(denoiser, times[0]), times)


def rms(a: Tensor, b: Tensor) -> float:
    return (a - b).pow(2).mean().sqrt().item()
