"""Rules that are even in some function of the noise level: sigma/alpha, log-SNR, time, quantiles of a distribution."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from pfode.beta import beta_quantile
from pfode.errors import number
from pfode.grids.ends import clock, falling, line, log_snr_ends
from pfode.grids.rule import GRIDS, Grid, named, spelt
from pfode.process import Process, float64

__all__ = ["beta", "beta_sigma", "cosine", "karras", "log_snr", "polyexponential", "time"]


@named("karras")
def karras(rho: float = 7.0) -> Grid:
    """(sigma/alpha)^(1/rho) is uniform (Karras et al. 2022, eq. 5)."""
    rho = number("karras: rho", rho, 1e-3, 1e3)

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        ends = torch.exp(-0.5 * log_snr_ends(process, high, low))
        return process.time(-2 * rho * torch.log(line(ends ** (1 / rho), n)))

    return Grid(spelt("karras", [rho], [7.0]), place)


@named("polyexponential")
def polyexponential(rho: float = 1.0) -> Grid:
    """log(sigma/alpha) falls as u^rho with u uniform from 1 to 0 (k-diffusion); rho = 1 is `log-snr`."""
    rho = number("polyexponential: rho", rho, 1e-2, 1e2)

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        first, last = log_snr_ends(process, high, low).tolist()
        return process.time(last + (first - last) * falling(n) ** rho)

    return Grid(spelt("polyexponential", [rho], [1.0]), place)


@named("log-snr")
def log_snr() -> Grid:
    """The log-SNR is uniform (DPM-Solver); `exponential` in k-diffusion and diffusers."""

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        return process.time(line(log_snr_ends(process, high, low), n))

    return Grid("log-snr", place)


@named("cosine")
def cosine(std: float = 1.0) -> Grid:
    """arctan(sigma / (alpha std)) is uniform: the log-SNRs of the cosine schedule (Nichol & Dhariwal 2021).

    The optimal grid of Euler steps for Gaussian data of that standard deviation (Sabour et al. 2024, theorem 3.1).
    """
    std = number("cosine: std", std, 1e-3, 1e3)

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        ratios = torch.exp(-0.5 * process.log_snr(float64([high, low])))
        return process.time(-2 * torch.log(std * torch.tan(line(torch.atan(ratios / std), n))))

    return Grid(spelt("cosine", [std], [1.0]), place)


@named("time")
def time(power: float = 1.0) -> Grid:
    """The time of the process (before its shift, if it has one) is u^power with u uniform.

    time(7) is what diffusers' use_karras_sigmas lays on flows.
    """
    power = number("time: power", power, 1e-3, 1e3)

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        first = process.t_data if math.isfinite(process.t_data) else process.t_min
        ends = clock(process, high, low) - first
        return process.from_uniform_clock(first + line(ends ** (1 / power), n) ** power)

    return Grid({1.0: "time", 2.0: "time-quadratic"}.get(power, spelt("time", [power])), place, to_data=True)


GRIDS["time-quadratic"] = functools.partial(time, 2.0)


@named("beta")
def beta(a: float = 0.6, b: float = 0.6) -> Grid:
    """The time (before the shift) at equal quantiles of Beta(a, b): dense at both ends (Lee et al. 2024).

    diffusers' use_beta_sigmas on its flow schedulers.
    """
    quantiles = _beta_quantiles("beta", a, b)

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        first, last = clock(process, high, low).tolist()
        return process.from_uniform_clock(last + (first - last) * quantiles(n))

    return Grid(spelt("beta", [a, b], [0.6, 0.6]), place)


@named("beta-sigma")
def beta_sigma(a: float = 0.6, b: float = 0.6) -> Grid:
    """sigma/alpha at equal quantiles of Beta(a, b): diffusers' use_beta_sigmas on its VP schedulers."""
    quantiles = _beta_quantiles("beta-sigma", a, b)

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        first, last = torch.exp(-0.5 * log_snr_ends(process, high, low)).tolist()
        return process.time(-2 * torch.log(last + (first - last) * quantiles(n)))

    return Grid(spelt("beta-sigma", [a, b], [0.6, 0.6]), place)


def _beta_quantiles(name: str, a: float, b: float) -> Callable[[int], Tensor]:
    """n -> the quantiles of Beta(a, b) at n + 1 equidistant probabilities from 1 to 0."""
    a, b = number(f"{name}: a", a, 0.3, 30), number(f"{name}: b", b, 0.3, 30)

    def quantiles(n: int) -> Tensor:
        return torch.from_numpy(beta_quantile(falling(n).numpy(), a, b))

    return quantiles
