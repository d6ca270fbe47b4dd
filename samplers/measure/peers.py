"""Peers to compare with: loaded without what they drag in, and driven as their own pipelines drive them.

`draw` runs a sampler of diffusers or of k-diffusion on a denoiser of any process, from the same noise to the same end
as a plan; `Scheduler` is a scheduler of diffusers on the process that its own numbers belong to.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pfode import grids, noise
from pfode.denoiser import Denoiser, at
from pfode.errors import MissingError, UsageError, unknown
from pfode.process import EDM, VE, Flow, Process, VPCosine, VPDiscrete


@functools.cache
def k_diffusion_sampling() -> ModuleType:
    """k_diffusion/sampling.py alone: the package itself imports torchvision, clip and more, none of which it needs.

    `odeint` (log_likelihood) and torchsde (Brownian trees, where no noise_sampler is given) are stand-ins and fail when
    used.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        raise MissingError("the package k-diffusion is not installed", "pip install --no-deps k-diffusion==0.1.1")
    utils = ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]  # type: ignore[attr-defined]
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    package.utils = utils  # type: ignore[attr-defined]
    odeint = ModuleType("torchdiffeq")
    odeint.odeint = None  # type: ignore[attr-defined]
    of_theirs = {"k_diffusion": package, "k_diffusion.utils": utils, "k_diffusion.sampling": None}
    with _stand_ins({**of_theirs, "torchdiffeq": odeint, "torchsde": ModuleType("torchsde")}):
        return importlib.import_module("k_diffusion.sampling")


@contextlib.contextmanager
def _stand_ins(modules: Mapping[str, ModuleType | None]) -> Iterator[None]:
    """Modules in the place of others, None for one that is to be imported anew. What else is imported meanwhile stays:
    a part of numpy or scipy that were forgotten could not be imported a second time.
    """
    before = {name: sys.modules.pop(name, None) for name in modules}
    sys.modules.update({name: module for name, module in modules.items() if module is not None})
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


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
        given, inner = torch.tensor(levels, dtype=torch.float64), self.inner
        if self.name == "ipndm":
            inner.betas, inner.alphas = given / (1 + given**2).sqrt(), 1 / (1 + given**2).sqrt()
            inner.timesteps = (torch.atan2(inner.betas, inner.alphas) / torch.pi * 2)[:-1]
        elif not hasattr(inner, "sigmas") or len(inner.sigmas) != len(levels):
            raise UsageError(f"{type(inner).__name__} takes no grid but its own", "leave grid= out")
        else:
            inner.sigmas = given / (1 + given) if isinstance(self.process, Flow) else given
            inner.timesteps = torch.arange(len(levels) - 1, 0, -1).to(inner.timesteps.dtype)
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
        process = self.process
        if isinstance(process, EDM | Flow):
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
    return lambda calls: noise.normal(seeds, calls, shape, torch.float64)


@functools.cache
def _scheduler_module(name: str) -> ModuleType:
    """The module of one scheduler alone, without torchsde (of which a noise_sampler takes the place)."""
    importlib.import_module("diffusers.schedulers.scheduling_utils")  # looks which packages there are
    with _stand_ins({} if "torchsde" in sys.modules else {"torchsde": ModuleType("torchsde")}):
        return importlib.import_module(f"diffusers.schedulers.scheduling_{name}")


def _is_scheduler(found: Any, module: ModuleType) -> bool:
    return isinstance(found, type) and found.__module__ == module.__name__ and hasattr(found, "set_timesteps")


# ---- on any denoiser


class Moved:
    """A denoiser on another process: D depends on x/alpha and sigma/alpha alone.

    A level beyond those it knows is taken for its last one.
    """

    def __init__(self, inner: Denoiser, process: Process, **cond: Any):
        self.inner, self.process, self.cond = inner, process, cond

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        process = self.inner.process
        t = t[0] if t.ndim else t  # k-diffusion gives one per sample, all the same
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        own = process.time(-2 * torch.log(sigma / alpha)).clamp(process.t_min, process.t_max)
        scale = torch.hypot(process.alpha(own), process.sigma(own)) / torch.hypot(alpha, sigma)
        return at(self.inner, float(own))(scale * x, own, **self.cond, **cond)


HIGHEST = 999.0  # sigma/alpha where a process begins with alpha = 0: the first of diffusers' flow sigmas
STEPS = 1000  # of the training that a scheduler is told of
Lay = Callable[[int], Sequence[float]]  # steps -> the times of their nodes on the denoiser's process


def draw(
    peer: str,
    denoiser: Denoiser,
    x: Tensor,
    seeds: Sequence[int],
    nfe: int,
    lay: Lay | None = None,
    cond: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Tensor, int]:
    """What a peer draws with as many steps as fit in nfe calls.

    Args:
        peer: "diffusers:CLASS" or "k-diffusion:sample_NAME".
        x: sigma times noise, the state at the first time of the denoiser's process.
        seeds: of the samples, for what noise the peer draws.
        lay: a grid instead of the peer's own; k-diffusion's is `get_sigmas_karras`. The scheduler's own grids see
            thousand training steps from one end of the process to the other: uniform in its time, of a process with
            alpha = 1 in log sigma.
        options: of the scheduler's configuration, or of the function.

    Returns:
        x0 in float64, and the number of calls made.

    Raises:
        UsageError: no such peer, an option it does not take, or a number of calls it cannot do with.
        MissingError: its package is not installed.
    """
    package, _, name = peer.partition(":")
    if package not in DRIVERS:
        raise unknown("package", package, DRIVERS)
    try:
        for steps in range(nfe, 0, -1):
            drawn = DRIVERS[package](name, denoiser, x, seeds, nfe, steps, lay, cond or {}, options)
            if drawn is not None:
                return drawn
    except (TypeError, ValueError, IndexError, AssertionError, ZeroDivisionError, NotImplementedError) as error:
        if isinstance(error, UsageError):
            raise
        words = "; ".join(str(error).split("\n")[:1]) or type(error).__name__
        raise UsageError(f"{peer} with {nfe} calls and {options or 'no options'}: {words}", "other options") from error
    raise UsageError(f"{peer}: no number of steps makes at most {nfe} calls", "a larger --nfe")


def find(peer: str) -> None:
    """Look for a peer.

    Raises:
        UsageError: there is none. MissingError: its package is not installed.
    """
    package, _, name = peer.partition(":")
    if package not in DRIVERS:
        raise unknown("package", package, DRIVERS)
    (_module_of if package == "diffusers" else _k_diffusion_with)(name)


def _k_diffusion_with(name: str) -> ModuleType:
    """k-diffusion's module of samplers, which has this one."""
    module = k_diffusion_sampling()
    known = [key for key, found in vars(module).items() if key.startswith("sample_") and _on_sigmas(found)]
    if name not in known:
        raise unknown("sampler of k-diffusion", name, known)
    return module


def _diffusers(
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
    module = _module_of(name)
    accepted = inspect.signature(getattr(_scheduler_module(module), name).__init__).parameters
    strange = next((key for key in options if key not in accepted), None)
    if strange is not None:
        raise unknown(f"option of {name}", strange, [key for key in accepted if key != "self"])
    process = denoiser.process
    config: dict[str, Any] = dict(options)
    if module in PRECONDITIONED:
        low, high = _levels(process, [process.t_min, process.t_max])
        config = {"sigma_min": low, "sigma_max": high} | config
    elif "trained_betas" in accepted and module != "ipndm":
        config = {"trained_betas": _betas(process)} | config
    if "clip_sample" in accepted:
        config = {"clip_sample": False} | config
    with _quietly():
        scheduler = Scheduler(module, steps, **config)
        if len(scheduler.inner.timesteps) > nfe:
            return None
        stops = hasattr(scheduler.inner, "sigmas") and scheduler.inner.sigmas[-1] > 0  # never steps to sigma = 0
        if lay is not None:
            scheduler.on(_levels(process, lay(steps + 1)[:-1] if stops else lay(steps)))
        elif hasattr(scheduler.inner, "sigmas"):
            scheduler.inner.sigmas = scheduler.inner.sigmas.double()
        first = scheduler.process.sigma(scheduler.times()[0])
        moved = Counted(Moved(denoiser, scheduler.process, **cond))
        start = x.double() / process.sigma(process.t_max) * first
        return scheduler.sample(moved, start, keyed(seeds, x.shape[1:])), moved.calls


def _k_diffusion(
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
    module, process = _k_diffusion_with(name), denoiser.process
    times = grids.times(process, "karras", steps) if lay is None else lay(steps)
    sigmas = torch.tensor(_levels(process, times), dtype=torch.float64)
    if _calls(name, steps) > nfe:
        return None
    counted = Counted(Moved(denoiser, EDM(), **cond))

    def drawn(*_: Any, **__: Any) -> Tensor:  # before the first call: churn
        return noise.normal(seeds, counted.calls or steps + 1, x.shape[1:], torch.float64, x.device)

    sampler = getattr(module, name)
    if "noise_sampler" in inspect.signature(sampler).parameters:
        options = {**options, "noise_sampler": drawn}
    with mock.patch.object(torch, "randn_like", drawn):
        start = x.double() / process.sigma(process.t_max) * sigmas[0]
        return sampler(counted, start, sigmas, disable=True, **options), counted.calls


DRIVERS = {"diffusers": _diffusers, "k-diffusion": _k_diffusion}


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
        options["noise_sampler"] = lambda *_: torch.zeros(1, 1, dtype=torch.float64)
    sigmas = torch.tensor(grids.times(EDM(), "karras", steps), dtype=torch.float64)
    sampler(zero, torch.ones(1, 1, dtype=torch.float64), sigmas, disable=True, **options)
    return calls


def _levels(process: Process, times: Sequence[float]) -> list[float]:
    """sigma/alpha at times, 0 at that of clean data."""
    return [
        0.0
        if t == process.t_data
        else min(HIGHEST, process.sigma(t) / process.alpha(t))
        if process.alpha(t) > 0
        else HIGHEST
        for t in times
    ]


@functools.lru_cache(8)
def _betas(process: Process) -> list[float]:
    """Of the thousand training steps that a scheduler is told of."""
    high = process.t_max if process.alpha(process.t_max) > 0 else process.time(-2 * math.log(HIGHEST))
    ends = torch.tensor([process.t_min, high], dtype=torch.float64)
    if isinstance(process, EDM | VE):
        low, high = torch.tensor(_levels(process, ends.tolist())).log().tolist()
        level = torch.linspace(low, high, STEPS, dtype=torch.float64).exp()
    else:
        low, high = process.uniform_clock(ends).tolist()
        clock = torch.linspace(low, high, STEPS, dtype=torch.float64)
        level = torch.tensor(_levels(process, process.from_uniform_clock(clock).tolist()), dtype=torch.float64)
    kept = 1 / (1 + level**2)
    return (1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])).tolist()


@functools.cache
def _module_of(name: str) -> str:
    """The module, without scheduling_, that has a scheduler of this name."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None or not spec.submodule_search_locations:
        raise MissingError("the package diffusers is not installed", "pip install diffusers")
    found: dict[str, str] = {}
    for folder in spec.submodule_search_locations:
        for file in Path(folder, "schedulers").glob("scheduling_*.py"):
            module = file.stem.removeprefix("scheduling_")
            found |= dict.fromkeys(re.findall(r"^class (\w+Scheduler)\(", file.read_text("utf-8"), re.M), module)
    if name not in found:
        raise unknown("scheduler of diffusers", name, found)
    return found[name]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """What diffusers warns of when its own defaults meet a new NumPy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
