"""Samplers of k-diffusion, on the sigmas that they are given."""

import functools
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pfode import grids, noise
from pfode.denoiser import Denoiser
from pfode.errors import unknown
from pfode.process import EDM, float64
from pfode.samplers.measure.peers.moved import Counted, Lay, Moved, levels
from pfode.samplers.measure.peers.private import folder_of, private_copy

__all__ = ["find", "k_diffusion_sampling", "run"]

INSTALL = "pip install --no-deps k-diffusion==0.1.1"


@functools.cache
def k_diffusion_sampling() -> ModuleType:
    """A copy of k_diffusion/sampling.py alone: the package itself imports torchvision, clip and more.

    `odeint` (log_likelihood) and torchsde (Brownian trees, where no noise_sampler is given) are stand-ins and fail when
    used.

    Raises:
        MissingError: the package is not installed.
    """
    return _copy()


def _copy() -> ModuleType:
    folder = folder_of("k_diffusion", INSTALL)
    utils = SimpleNamespace(append_dims=lambda x, n: x[(...,) + (None,) * (n - x.ndim)])
    instead = {
        ".": SimpleNamespace(utils=utils),
        "torchdiffeq": SimpleNamespace(odeint=None),
        "torchsde": ModuleType("torchsde"),
    }
    return private_copy(folder / "sampling.py", "k_diffusion", instead)


class _Torch:
    """torch, whose randn_like is another."""

    def __init__(self, randn_like: Callable[..., Tensor]):
        self.randn_like = randn_like

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def run(
    name: str,
    denoiser: Denoiser,
    x: Tensor,
    seeds: Sequence[int],
    nfe: int,
    steps: int,
    lay: Lay | None,
    cond: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Tensor, int] | None:
    find(name)
    process = denoiser.process
    times = grids.times(process, "karras", steps) if lay is None else lay(steps)
    sigmas = float64(levels(process, times))
    if _calls(name, steps) > nfe:
        return None
    counted = Counted(Moved(denoiser, EDM(), x.dtype, **cond))

    def drawn(*_: Any, **__: Any) -> Tensor:  # before the first call: churn
        return noise.normal(seeds, counted.calls or steps + 1, x.shape[1:], torch.float64, x.device)

    module = _copy()  # of this run alone: its noise is ours
    module.__dict__["torch"] = _Torch(drawn)
    sampler = getattr(module, name)
    if "noise_sampler" in inspect.signature(sampler).parameters:
        options = {**options, "noise_sampler": drawn}
    start = x.double() / process.sigma(process.t_max) * sigmas[0]
    return sampler(counted, start, sigmas, disable=True, **options), counted.calls


def find(name: str) -> None:
    """Look for a sampler.

    Raises:
        UsageError: there is none of this name that takes sigmas. MissingError: the package is not installed.
    """
    module = k_diffusion_sampling()
    known = [key for key, found in vars(module).items() if key.startswith("sample_") and _on_sigmas(found)]
    if name not in known:
        raise unknown("sampler of k-diffusion", name, known)


def _on_sigmas(found: Any) -> bool:
    return list(inspect.signature(found).parameters)[:3] == ["model", "x", "sigmas"]


@functools.cache
def _calls(name: str, steps: int) -> int:
    """How often a sampler of k-diffusion calls its model: of zero, to see."""
    calls = 0

    def zero(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros_like(x)

    sampler = getattr(k_diffusion_sampling(), name)
    options: dict[str, Any] = {}
    if "noise_sampler" in inspect.signature(sampler).parameters:
        options["noise_sampler"] = lambda *_: torch.zeros(1, 1, dtype=torch.float64, device="cpu")
    sigmas = float64(grids.times(EDM(), "karras", steps))
    sampler(zero, torch.ones(1, 1, dtype=torch.float64, device="cpu"), sigmas, disable=True, **options)
    return calls
