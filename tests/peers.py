"""Peers to compare with: loaded without what they drag in, and driven as their own pipelines drive them."""

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import pfode
from pfode.denoiser import Denoiser
from pfode.process import Process


@functools.cache
def k_diffusion_sampling() -> ModuleType:
    """k_diffusion/sampling.py alone: the package itself imports torchvision, clip and more, none of which it needs.

    `odeint` (log_likelihood) and torchsde (Brownian trees, where no noise_sampler is given) are stand-ins and fail when
    used.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("k-diffusion: pip install --no-deps k-diffusion==0.1.1")
    utils = ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]  # type: ignore[attr-defined]
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    package.utils = utils  # type: ignore[attr-defined]
    odeint = ModuleType("torchdiffeq")
    odeint.odeint = None  # type: ignore[attr-defined]
    stand_ins = {
        "k_diffusion": package,
        "k_diffusion.utils": utils,
        "torchdiffeq": odeint,
        "torchsde": ModuleType("torchsde"),
    }
    with mock.patch.dict(sys.modules, stand_ins):
        return importlib.import_module("k_diffusion.sampling")


class Counted:
    """A denoiser that counts its calls: the key of the keyed noise.

    Row k of a plan draws the noise (seed, k + 1), and a sampler that draws after its evaluations has made k + 1 calls
    by then.
    """

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.process, self.calls = denoiser, denoiser.process, 0

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.calls += 1
        return self.denoiser(x, t, **cond)


Draw = Callable[[int], Tensor]  # number of calls so far -> noise of the state's shape
EDM = ("edm_euler", "edm_dpmsolver_multistep", "cosine_dpmsolver_multistep")  # want the preconditioned network's output
STAGED = {  # have stages between their sigmas: the sigma of an odd call
    "k_dpm_2_discrete": lambda inner, i: inner.sigmas_interpol[i],
    "k_dpm_2_ancestral_discrete": lambda inner, i: inner.sigmas_interpol[i - 1],
    "dpmsolver_sde": lambda inner, i: inner.mid_point_sigma,
}


class Scheduler:
    """A scheduler of diffusers with its timesteps set, and what a pipeline must know of it.

    Args:
        name: of its module, without scheduling_.
        steps: num_inference_steps.
        first: the step to begin with.
        double: work out its coefficients in float64, from its float32 sigmas.
        config: of the scheduler.
    """

    def __init__(self, name: str, steps: int, first: int = 0, double: bool = False, **config: Any):
        self.name, self.first = name, first
        self.module = _scheduler_module(name)
        (kind,) = (found for found in vars(self.module).values() if _is_scheduler(found, self.module))
        self.inner = kind(**config)
        self.inner.set_timesteps(steps)
        if not hasattr(self.inner, "set_begin_index"):
            assert first == 0
        else:
            self.inner.set_begin_index(first)  # or a first timestep that is there twice would be skipped
        if double:
            self.inner.sigmas = self.inner.sigmas.double()

    @functools.cached_property
    def process(self) -> Process:
        """The process that its numbers belong to."""
        config = self.inner.config
        if self.name in EDM:
            return pfode.EDM(config.sigma_min, config.sigma_max)
        if self.name.startswith("flow_match") or config.get("use_flow_sigmas"):
            return pfode.Flow()
        if self.name == "ipndm":
            return pfode.VPCosine(s=0, t_min=1e-6, t_max=1)
        return pfode.VPDiscrete(self.inner.alphas_cumprod.double())

    def times(self, every: int = 1) -> list[float]:
        """The times of its nodes, or of every so many and of sigma = 0; a sigma repeated in a row counts once."""
        if not hasattr(self.inner, "sigmas"):  # DDIM, DDPM, PNDM: steps by timesteps alone
            timesteps = self.inner._timesteps[::-1] if self.name == "pndm" else self.inner.timesteps.double()
            return [*map(float, timesteps[self.first :]), self.process.t_data]
        sigmas = torch.unique_consecutive(self.inner.sigmas[self.first :].double())
        if sigmas[-1] > 0:
            return self._times_of(sigmas)[::every]
        return [*self._times_of(sigmas[:-1])[::every], self.process.t_data]

    def sample(self, denoiser: Denoiser, x: Tensor, draw: Draw | None = None, **options: Any) -> Tensor:
        """Its loop from x, the state of the process at the first time; `options` are those of its `step`.

        Returns the last state, at sigma = 0 or of a scheduler whose state is that of the process.
        """
        counted, inner = Counted(denoiser), self.inner
        scaled = self.name not in EDM and getattr(inner, "init_noise_sigma", 1) != 1
        y = x * (inner.sigmas[self.first].double() ** 2 + 1).sqrt() if scaled else x
        with self._noise(lambda: draw(counted.calls) if draw else torch.zeros_like(x)):
            for i, t in enumerate(inner.timesteps[self.first :], self.first):
                state = inner.scale_model_input(y, t) if hasattr(inner, "scale_model_input") else y
                output = self._output(counted, (state if scaled else y).double(), i)
                y = inner.step(output, t, y, **options, return_dict=False)[0]
        return y.double()

    def _output(self, denoiser: Denoiser, x: Tensor, i: int) -> Tensor:
        """What an exact network of the configured kind says in call i."""
        t = torch.tensor(self._time(i), dtype=torch.float64)
        x0, config = denoiser(x, t), self.inner.config
        kind = config.get("prediction_type", "v_prediction" if self.name == "ipndm" else "flow_prediction")
        if self.name in EDM:
            data, total = config.sigma_data, (t**2 + config.sigma_data**2).sqrt()
            out = (total * x0 - data**2 / total * x) / (t * data)
            return out if kind == "epsilon" else -out
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        eps = (x - alpha * x0) / sigma
        v = alpha * eps - sigma * x0
        return {"sample": x0, "epsilon": eps, "v_prediction": v, "flow_prediction": eps - x0}[kind]

    def _time(self, i: int) -> float:
        """The time of call i: of the scheduler's own sigma, which its timestep may only be near to."""
        if not hasattr(self.inner, "sigmas"):
            return float(self.inner.timesteps[i])
        sigma = STAGED[self.name](self.inner, i) if self.name in STAGED and i % 2 else self.inner.sigmas[i]
        return self._times_of(sigma.double().reshape(1))[0]

    def _times_of(self, sigmas: Tensor) -> list[float]:
        process = self.process
        if isinstance(process, pfode.EDM | pfode.Flow):
            return sigmas.tolist()
        return process.time(-2 * torch.log(sigmas)).clamp(process.t_min, process.t_max).tolist()

    def _noise(self, draw: Callable[[], Tensor]) -> contextlib.AbstractContextManager[Any]:
        """Every noise it draws is this."""

        def drawn(*_: Any, **__: Any) -> Tensor:
            return draw()

        if hasattr(self.inner, "noise_sampler"):
            self.inner.noise_sampler = drawn
        if hasattr(self.module, "randn_tensor"):
            return mock.patch.object(self.module, "randn_tensor", drawn)
        return contextlib.nullcontext()


def keyed(seeds: Sequence[int], shape: Sequence[int]) -> Draw:
    """The noise of a plan's rows."""
    return lambda calls: pfode.noise.normal(seeds, calls, shape, torch.float64)


@functools.cache
def _scheduler_module(name: str) -> ModuleType:
    """The module of one scheduler alone, without torchsde (of which a noise_sampler takes the place)."""
    importlib.import_module("diffusers.schedulers.scheduling_utils")  # looks which packages there are
    absent = "torchsde" not in sys.modules
    sys.modules.setdefault("torchsde", ModuleType("torchsde"))
    try:
        return importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
    finally:
        if absent:
            del sys.modules["torchsde"]


def _is_scheduler(found: Any, module: ModuleType) -> bool:
    return isinstance(found, type) and found.__module__ == module.__name__ and hasattr(found, "set_timesteps")
