"""Samplers of k-diffusion, on the sigmas that they are given."""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pfode import grids, noise
from pfode.errors import unknown
from pfode.process import EDM, float64
from pfode.samplers.measure.peers.moved import Request, levels
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
    """A new copy of the module."""
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


def run(name: str, steps: int, request: Request) -> tuple[Tensor, int] | None:
    """x0 in float64 by so many steps of a sampler, and the calls made; None where it makes more than are allowed."""
    find(name)
    process, x = request.denoiser.process, request.x
    times = grids.times(process, "karras", steps) if request.lay is None else request.lay(steps)
    sigmas = float64(levels(process, times))
    if _calls(name, steps) > request.nfe:
        return None
    moved = request.moved(EDM())

    def drawn(*_: Any, **__: Any) -> Tensor:  # before the first call: churn
        return noise.normal(request.seeds, moved.calls or steps + 1, x.shape[1:], torch.float64, x.device)

    module, options = _copy(), dict(request.options)  # a copy of this run alone: its noise is ours
    module.__dict__["torch"] = _Torch(drawn)
    sampler = getattr(module, name)
    if "noise_sampler" in inspect.signature(sampler).parameters:
        options["noise_sampler"] = drawn
    return sampler(moved, request.initial(sigmas[0]), sigmas, disable=True, **options), moved.calls


def find(name: str) -> None:
    """Look for a sampler.

    Raises:
        UsageError: there is none of this name that takes sigmas. MissingError: the package is not installed.
    """
    module = k_diffusion_sampling()
    known = [key for key, found in vars(module).items() if key.startswith("sample_") and _on_sigmas(found)]
    if name not in known:
        raise unknown("sampler of k-diffusion", name, known)


def _on_sigmas(found: Callable[..., object]) -> bool:
    """Whether a function of the module is a sampler on given sigmas."""
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
