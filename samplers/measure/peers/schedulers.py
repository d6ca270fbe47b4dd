"""Schedulers of diffusers, driven as its pipelines drive them."""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pfode.denoiser import Denoiser
from pfode.errors import UsageError, unknown
from pfode.process import EDM, VE, Flow, Process, VPCosine, VPDiscrete, float64
from pfode.samplers.measure.peers.moved import HIGHEST, Counted, Draw, Request, keyed, levels
from pfode.samplers.measure.peers.private import folder_of, private_copy

__all__ = ["Scheduler", "find", "run"]

INSTALL = "pip install diffusers"
STEPS = 1000  # of training, that a scheduler is configured with

PRECONDITIONED = ("edm_euler", "edm_dpmsolver_multistep", "cosine_dpmsolver_multistep")  # what the network says
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
        if self.name in PRECONDITIONED:
            return EDM(config.sigma_min, config.sigma_max)
        if self.name.startswith("flow_match") or config.get("use_flow_sigmas"):
            return Flow()
        if self.name == "ipndm" or (config.get("trained_betas") is not None and hasattr(self.inner, "sigmas")):
            return VPCosine(s=0, t_min=1e-6, t_max=1)  # every sigma/alpha has a time
        return VPDiscrete(self.inner.alphas_cumprod.double())

    def on(self, levels: Sequence[float]) -> "Scheduler":
        """Itself on these sigma/alpha, 0 the last, instead of its own.

        Raises:
            UsageError: it goes by timesteps of its own, or has stages between its sigmas.
        """
        given, inner = float64(levels), self.inner
        if self.name == "ipndm":
            inner.betas, inner.alphas = given / (1 + given**2).sqrt(), 1 / (1 + given**2).sqrt()
            inner.timesteps = (torch.atan2(inner.betas, inner.alphas) / torch.pi * 2)[:-1]
        elif not hasattr(inner, "sigmas") or len(inner.sigmas) != len(levels):
            raise UsageError(f"{type(inner).__name__} takes no grid but its own", "leave grid= out")
        else:
            inner.sigmas = given / (1 + given) if isinstance(self.process, Flow) else given
            inner.timesteps = torch.arange(len(levels) - 1, 0, -1, device="cpu").to(inner.timesteps.dtype)
        return self

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
        scaled = self.name not in PRECONDITIONED and getattr(inner, "init_noise_sigma", 1) != 1
        y = x * (inner.sigmas[self.first].double() ** 2 + 1).sqrt() if scaled else x

        def drawn(*_: Any, **__: Any) -> Tensor:
            return draw(counted.calls) if draw else torch.zeros_like(x)

        if hasattr(inner, "noise_sampler"):
            inner.noise_sampler = drawn
        if "generator" in inspect.signature(inner.step).parameters:
            options = {"generator": drawn, **options}  # see `_randn`
        for i, t in enumerate(inner.timesteps[self.first :], self.first):
            state = inner.scale_model_input(y, t) if hasattr(inner, "scale_model_input") else y
            output = self._output(counted, (state if scaled else y).double(), i)
            y = inner.step(output, t, y, **options, return_dict=False)[0]
        return y.double()

    def _output(self, denoiser: Denoiser, x: Tensor, i: int) -> Tensor:
        """What an exact network of the configured kind says in call i."""
        t = float64(self._time(i))
        x0, config = denoiser(x, t), self.inner.config
        kind = config.get("prediction_type", "v_prediction" if self.name == "ipndm" else "flow_prediction")
        if self.name in PRECONDITIONED:
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
        """The times of the process at sigmas of the scheduler."""
        process = self.process
        if isinstance(process, EDM | Flow):
            return sigmas.tolist()
        return process.time(-2 * torch.log(sigmas)).clamp(process.t_min, process.t_max).tolist()


@functools.cache
def _scheduler_module(name: str) -> ModuleType:
    """A copy of the module of one scheduler: without torchsde, a noise_sampler takes its place, and with our noise."""
    folder = folder_of("diffusers", INSTALL) / "schedulers"
    instead: dict[str, Any] = {"..utils.torch_utils": SimpleNamespace(randn_tensor=_randn)}
    if importlib.util.find_spec("torchsde") is None:
        instead["torchsde"] = ModuleType("torchsde")
        if name != "dpmsolver_sde":
            instead[".scheduling_dpmsolver_sde"] = _Later("dpmsolver_sde")
    return private_copy(folder / f"scheduling_{name}.py", "diffusers.schedulers", instead)


class _Later:
    """The copy of another scheduler's module, made when something of it is asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, key: str) -> Any:
        return getattr(_scheduler_module(self._name), key)


def _randn(shape: Sequence[int], generator: Any = None, **how: Any) -> Any:
    """diffusers' `randn_tensor` in our copies, which a function given as the generator takes the place of."""
    if callable(generator):
        return generator()
    theirs = importlib.import_module("diffusers.utils.torch_utils").randn_tensor
    return theirs(shape, generator=generator, **how)


def _is_scheduler(found: object, module: ModuleType) -> bool:
    """Whether something in a module is a scheduler defined there."""
    return isinstance(found, type) and found.__module__ == module.__name__ and hasattr(found, "set_timesteps")


def run(name: str, steps: int, request: Request) -> tuple[Tensor, int] | None:
    """x0 in float64 by so many steps of a scheduler, and the calls made; None where it makes more than are allowed.

    Raises:
        UsageError: an option that the scheduler does not take, or a grid.
    """
    module, process, given = find(name), request.denoiser.process, request.options
    accepted = inspect.signature(getattr(_scheduler_module(module), name).__init__).parameters
    strange = next((key for key in given if key not in accepted), None)
    if strange is not None:
        raise unknown(f"option of {name}", strange, [key for key in accepted if key != "self"])
    config: dict[str, Any] = {}
    if module in PRECONDITIONED:
        config["sigma_min"], config["sigma_max"] = levels(process, [process.t_min, process.t_max])
    elif "trained_betas" in accepted and module != "ipndm":
        config["trained_betas"] = _betas(process)
    if "clip_sample" in accepted:
        config["clip_sample"] = False
    with _quietly():
        scheduler = Scheduler(module, steps, **config | given)
        if len(scheduler.inner.timesteps) > request.nfe:
            return None
        stops = hasattr(scheduler.inner, "sigmas") and scheduler.inner.sigmas[-1] > 0  # never steps to sigma = 0
        if request.lay is not None:
            scheduler.on(levels(process, request.lay(steps + 1)[:-1] if stops else request.lay(steps)))
        elif hasattr(scheduler.inner, "sigmas"):
            scheduler.inner.sigmas = scheduler.inner.sigmas.double()
        moved = request.moved(scheduler.process)
        start = request.initial(scheduler.process.sigma(scheduler.times()[0]))
        draw = keyed(request.seeds, request.x.shape[1:], request.x.device)
        return scheduler.sample(moved, start, draw), moved.calls


@functools.lru_cache(8)
def _betas(process: Process) -> list[float]:
    """The betas of a thousand training steps over the range of a process, which a scheduler is configured with."""
    high = process.t_max if process.alpha(process.t_max) > 0 else process.time(-2 * math.log(HIGHEST))
    ends = float64([process.t_min, high])
    if isinstance(process, EDM | VE):
        low, high = torch.tensor(levels(process, ends.tolist()), device="cpu").log().tolist()
        level = torch.linspace(low, high, STEPS, dtype=torch.float64, device="cpu").exp()
    else:
        low, high = process.uniform_clock(ends).tolist()
        clock = torch.linspace(low, high, STEPS, dtype=torch.float64, device="cpu")
        level = float64(levels(process, process.from_uniform_clock(clock).tolist()))
    kept = 1 / (1 + level**2)
    return (1 - kept / torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), kept[:-1]])).tolist()


@functools.cache
def find(name: str) -> str:
    """The module, without scheduling_, that has a scheduler of this name."""
    found: dict[str, str] = {}
    for file in sorted((folder_of("diffusers", INSTALL) / "schedulers").glob("scheduling_*.py")):
        module = file.stem.removeprefix("scheduling_")
        names = re.findall(r"^class (\w+Scheduler)\(", file.read_text("utf-8"), re.M)
        found |= {one: module for one in names if "Inverse" not in one}  # those do not sample, they encode
    if name not in found:
        raise unknown("scheduler of diffusers", name, found)
    return found[name]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what diffusers' own defaults warn of; what the network warns of is heard."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array", DeprecationWarning)  # of a new NumPy
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"diffusers|pfode\.samplers\.measure\.peers")
        yield
