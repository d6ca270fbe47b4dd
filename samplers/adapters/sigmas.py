"""k-diffusion's schedules of sigmas, and its small formulas about them."""

from typing import Any

import torch
from torch import Tensor

from pfode import grids
from pfode.errors import integer
from pfode.process import EDM, VP

__all__ = [
    "append_zero",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "to_d",
]


def append_zero(x: Tensor) -> Tensor:
    """x with a 0 at its end."""
    return torch.cat([x, x.new_zeros(1)])


def _placed(rule: grids.Grid, n: int, low: float, high: float, device: torch.device | str) -> Tensor:
    nodes = grids.times(EDM(low, high), rule, integer("n", n, 1)) if n > 1 else [high, 0.0]
    return torch.tensor(nodes, dtype=torch.float32, device=device)


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu"
) -> Tensor:
    """The schedule of Karras et al. 2022, eq. 5: n sigmas and 0."""
    return _placed(grids.karras(rho), n, sigma_min, sigma_max, device)


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
    """n sigmas uniform in their logarithm, and 0."""
    return _placed(grids.log_snr(), n, sigma_min, sigma_max, device)


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """n sigmas, their logarithm a power of a uniform ramp, and 0."""
    return _placed(grids.polyexponential(rho), n, sigma_min, sigma_max, device)


def get_sigmas_vp(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: torch.device | str = "cpu"
) -> Tensor:
    """sigma/alpha of a VP process with linear beta at n uniform times from 1 to eps_s, and 0."""
    t = torch.linspace(1, eps_s, n, dtype=torch.float64, device="cpu")
    ratios = torch.exp(-0.5 * VP(beta_min, beta_min + beta_d).log_snr(t))
    return append_zero(ratios.to(device, torch.float32))


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """dx/dsigma: (x - denoised) / sigma."""
    return (x - denoised) / sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def get_ancestral_step(sigma_from: Any, sigma_to: Any, eta: float = 1.0) -> tuple[Any, Any]:
    """(sigma_down, sigma_up): the level to step down to, and the noise to add there."""
    if not eta:
        return sigma_to, 0.0
    up = min(sigma_to, eta * sigma_to * (1 - (sigma_to / sigma_from) ** 2) ** 0.5)
    return (sigma_to**2 - up**2) ** 0.5, up
