"""What a scheduler config of diffusers says: the process, how pipeline and network talk about it, where the nodes lie.

Every state is kept at the scale at which the network takes it: VP and flow states as they are, EDM's times
c_in = 1/sqrt(sigma^2 + sigma_data^2). Then no pipeline has to scale anything, whichever of its ways it goes by.
"""

import functools
import importlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfode import grids
from pfode.compat import schedules
from pfode.compat.schedules import OWN, PREDICTION_TYPES
from pfode.errors import UsageError, integer, number, unknown
from pfode.prediction import PREDICTIONS, Coefficient, Pair
from pfode.process import EDM, Flow, Process, VPDiscrete
from pfode.samplers import auto

Config = Mapping[str, Any]
Levels = Sequence[float] | np.ndarray | Tensor
LIKE_DDIM = ("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "PNDM", "LMSDiscrete", "EulerDiscrete")
LIKE_DDIM += ("EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")
LIKE_DDIM += ("LCM", "TCD")
LIKE_DPM = ("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "SASolver", "UniPCMultistep")
LIKE_FLOW = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "LTXEulerAncestralRF")
LIKE_EDM = ("EDMEuler", "EDMDPMSolverMultistep")
HURRIED = ("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "EDMDPMSolverMultistep")
KNOWN = {f"{name}Scheduler" for name in (*LIKE_DDIM, *LIKE_DPM, *LIKE_FLOW, *LIKE_EDM)}
SAMPLER_KEYS = {  # of shipped configs: they say which sampler was used there, for which `sampler` stands here
    *("solver_order", "solver_type", "algorithm_type", "predict_x0", "disable_corrector", "solver_p", "euler_at_final"),
    *("predictor_order", "corrector_order", "tau_func", "skip_prk_steps", "stochastic_sampling", "noise_sampler_seed"),
    *("original_inference_steps", "timestep_scaling", "eta", "s_noise", "interpolation_type", "upscale_mode"),
}
MEANING_KEYS = {"scale_factors": None, "quantization_config": None}  # others, and the value at which they do nothing
LEARNED = ("learned", "learned_range")
_FLOW_MIN = 1e-3
_FEW = 15  # the number of steps below which some heed lower_order_final


def translated(config: Config, own: set[str]) -> dict[str, Any]:
    """A config of one of diffusers' schedulers as one of ours; ours as it is.

    Where its file names no value, what its own class stands for is taken: ours are others. A key that does nothing in
    that class, left by the one before it, does nothing here.

    Args:
        own: the keys that ours has.

    Raises:
        UsageError: a scheduler whose models are of another kind, or a key whose meaning is not known here.
    """
    found, name = dict(config), config.get("_class_name")
    name = name if isinstance(name, str) else _guessed(config)
    if name in (None, OWN):
        return {key: value for key, value in found.items() if key in own or key not in SAMPLER_KEYS}
    if name not in KNOWN:
        problem = f"{name}: its models are no denoisers of a process that pfode has, or its pipelines need that class"
        raise UsageError(problem, "supported: " + ", ".join(sorted(KNOWN)))
    found.pop("_use_default_values", None)
    found["_class_name"] = name
    parameters = _parameters(name)
    taken = set(parameters) or own
    for key in [key for key in found if not key.startswith("_")]:
        if key not in own | SAMPLER_KEYS | set(MEANING_KEYS) or (
            key in MEANING_KEYS and found[key] != MEANING_KEYS[key]
        ):
            raise UsageError(f"{name}: {key} = {found[key]!r:.60} has no meaning here", f"leave {key} out")
        if key not in taken:
            del found[key]  # of another scheduler before it
    found = {key: value for key, value in parameters.items() if key in own} | found
    kind = name.removesuffix("Scheduler")
    if kind in LIKE_FLOW:
        found |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    if kind in LIKE_DPM:
        found["spacing_drop"] = 1
    if kind in HURRIED and found.get("lower_order_final") is True:
        found["lower_order_final"] = _FEW
    return found


def _guessed(config: Config) -> str | None:
    """The class of a config that was never saved, which bears no name then: the one whose keys it has."""
    if "sampler" in config:
        return OWN
    keys = frozenset(key for key in config if not key.startswith("_"))
    return _classes().get(keys)


@functools.cache
def _classes() -> dict[frozenset[str], str]:
    """The schedulers known here by the keys of their configs; of two that have the same, either."""
    return {frozenset(_parameters(name)): name for name in sorted(KNOWN, reverse=True)}


@functools.cache
def _parameters(name: str) -> dict[str, Any]:
    """The keys of a scheduler of diffusers and their defaults; none of one that wants a package that is not there."""
    made = getattr(importlib.import_module("diffusers.schedulers"), name)
    taken = list(inspect.signature(made.__init__).parameters.values())[1:]
    return {} if hasattr(made, "_backends") else {p.name: p.default for p in taken}


class Convention(ABC):
    """A process, as a kind of pipeline and its network see it.

    Levels are those of the state at the network's scale: x = alpha x_0 + sigma noise, both times `scale`.
    """

    process: Any  # VPDiscrete, Flow or EDM

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """What the network is told at a time of the process."""

    @abstractmethod
    def time(self, timestep: Tensor) -> Tensor:
        """The inverse of `timestep`."""

    @abstractmethod
    def to_x0(self, alpha: Tensor, sigma: Tensor) -> Pair:
        """(c_skip, c_out) of D = c_skip x + c_out F, x at the scale of the process."""

    @abstractmethod
    def at_level(self, sigmas: Tensor) -> Tensor:
        """Times at what diffusers calls sigma."""

    @abstractmethod
    def sigma(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What diffusers calls sigma, at these levels of the process."""

    def scale(self, sigma: Coefficient) -> Coefficient:
        """What a state of the process is multiplied by."""
        return 0 * sigma + 1

    def levels(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at what the network is told, wherever that lies."""
        exact = timestep.float() if timestep.device.type == "mps" else timestep.double()
        t = self.time(exact)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        scale = self.scale(sigma)
        return scale * alpha, scale * sigma


@dataclass(frozen=True)
class Discrete(Convention):
    """A table of betas; the network is told the index."""

    process: VPDiscrete
    prediction: str

    def timestep(self, t: Tensor) -> Tensor:
        return t

    def time(self, timestep: Tensor) -> Tensor:
        return timestep.clamp(-1, self.process.t_max)

    def to_x0(self, alpha: Tensor, sigma: Tensor) -> Pair:
        return PREDICTIONS[self.prediction].to_x0(alpha, sigma)

    def at_level(self, sigmas: Tensor) -> Tensor:
        return self.process.time(-2 * torch.log(sigmas))

    def sigma(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / alpha


@dataclass(frozen=True)
class Straight(Convention):
    """A flow; the network is told num_train_timesteps t. inverted: of 1 - t, and its output points to data."""

    process: Flow
    prediction: str
    train: int
    inverted: bool = False

    def timestep(self, t: Tensor) -> Tensor:
        return self.train * ((1 - t) if self.inverted else t)

    def time(self, timestep: Tensor) -> Tensor:
        t = timestep / self.train
        return ((1 - t) if self.inverted else t).clamp(0, 1)

    def to_x0(self, alpha: Tensor, sigma: Tensor) -> Pair:
        skip, out = PREDICTIONS[self.prediction].to_x0(alpha, sigma)
        return skip, -out if self.inverted else out

    def at_level(self, sigmas: Tensor) -> Tensor:
        return sigmas

    def sigma(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha if self.inverted else sigma


@dataclass(frozen=True)
class Scaled(Convention):
    """EDM's preconditioning (Karras et al. 2022, table 1) around a network of output F or, with `negated`, -F.

    The network is told log(sigma)/4.
    """

    process: EDM
    data: float
    negated: bool = False

    def timestep(self, t: Tensor) -> Tensor:
        return 0.25 * torch.log(t)

    def time(self, timestep: Tensor) -> Tensor:
        return torch.exp(4 * timestep)

    def scale(self, sigma: Coefficient) -> Coefficient:
        return (sigma**2 + self.data**2) ** -0.5

    def to_x0(self, alpha: Tensor, sigma: Tensor) -> Pair:
        scale = self.scale(sigma)
        out = sigma * self.data * scale
        return (self.data * scale) ** 2, -out if self.negated else out

    def at_level(self, sigmas: Tensor) -> Tensor:
        return sigmas

    def sigma(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma


def betas(config: Config) -> Tensor:
    """The betas of a config of ours, shape (num_train_timesteps,), or as many as it has trained ones: as in diffusers a
    config may hold those that `nodes` refuses.
    """
    trained = _list(config["trained_betas"])
    count = config["num_train_timesteps"] if trained is None else len(trained)
    return schedules.betas(OWN, {**config, "trained_betas": trained, "num_train_timesteps": count})


def convention(config: Config) -> Convention:
    """The kind of models that a config is for.

    Raises:
        UsageError: a prediction type that this kind has not.
    """
    kind = config["prediction_type"]
    if kind not in PREDICTION_TYPES:
        raise unknown("prediction_type", kind, PREDICTION_TYPES)
    continuous = config["timestep_type"] == "continuous"
    if config["sigma_data"] is not None or continuous:
        allowed = ("v_prediction",) if config["sigma_data"] is None else ("epsilon", "v_prediction")
        if kind not in allowed:
            raise UsageError(f"prediction_type {kind!r}: models told log(sigma)/4 have {' or '.join(allowed)}")
        low, high = config["sigma_min"] or 0.002, config["sigma_max"] or (700.0 if continuous else 80.0)
        data = 1.0 if config["sigma_data"] is None else number("sigma_data", config["sigma_data"], 1e-6)
        return Scaled(EDM(low, high), data, kind == "v_prediction")
    if config["use_flow_sigmas"]:
        train = integer("num_train_timesteps", config["num_train_timesteps"], 1)
        return Straight(Flow(t_min=_FLOW_MIN), PREDICTION_TYPES[kind], train, bool(config["invert_sigmas"]))
    if kind == "flow_prediction":
        raise UsageError("prediction_type 'flow_prediction' needs a flow", "use_flow_sigmas=True")
    return Discrete(VPDiscrete(torch.cumprod(1 - betas(config), 0).double()), PREDICTION_TYPES[kind])


def nodes(
    config: Config,
    kind: Convention,
    steps: int | None,
    timesteps: Levels | None = None,
    sigmas: Levels | None = None,
    mu: float | None = None,
) -> tuple[Process, list[float]]:
    """The times of a plan's nodes, noise first, and the process, of which the ends may have to be wider.

    With final_sigmas_type "zero" the last is clean data, and no other has sigma = 0; with "sigma_min" there is a node
    at the least level, which is no node twice.

    Args:
        steps: between nodes, where nothing is given. timesteps: what the network is to be told at the nodes.
        sigmas: the levels there; of flows before their shift. A 0 at the end may be there or not.
        mu: of a dynamic shift.

    Raises:
        UsageError: a config, or given nodes, that make no falling times.
    """
    if config["final_sigmas_type"] not in ("zero", "sigma_min"):
        raise unknown("final_sigmas_type", config["final_sigmas_type"], ("zero", "sigma_min"))
    count, trained = config["num_train_timesteps"], config["trained_betas"]
    if isinstance(kind, Discrete) and trained is not None and len(trained) != count:
        problem = f"trained_betas: {len(trained)} values for num_train_timesteps = {count}"
        raise UsageError(problem, f"num_train_timesteps={len(trained)}")
    if isinstance(kind, Straight):
        made, final = _flow_times(config, kind, steps, _list(timesteps), _list(sigmas), mu)
    elif timesteps is not None or sigmas is not None:
        final = config["final_sigmas_type"] == "zero"
        made = _given(kind, _list(timesteps), _list(sigmas))
    else:
        return kind.process, _placed(config, kind, integer("num_inference_steps", steps, 1, grids.MAX_STEPS))
    process, data = kind.process, kind.process.t_data
    if isinstance(process, Flow | EDM):
        process = _reaching(process, min(made), max(made))
    if final:
        made.append(data)
    elif isinstance(kind, Discrete) and made[-1] > process.t_min:
        made.append(process.t_min)
    return process, grids.times(process, made, 0)


def unasked(sigmas: Levels | None) -> bool:
    """Whether sigmas are the even ones that pipelines of flows pass where nobody asked for any."""
    if sigmas is None:
        return False
    n = len(sigmas)
    return bool(np.allclose(np.asarray(sigmas, dtype=float), np.linspace(1, 1 / n, n), atol=1e-6))


def _list(values: Levels | None) -> list[float] | None:
    if values is None:
        return None
    return torch.as_tensor(np.asarray(values) if not isinstance(values, Tensor) else values).double().tolist()


def _given(kind: Convention, timesteps: list[float] | None, sigmas: list[float] | None) -> list[float]:
    """Times of given nodes but for clean data."""
    if timesteps is not None and sigmas is not None:
        raise UsageError("timesteps and sigmas exclude each other", "give one of them")
    if timesteps is not None:
        told = torch.tensor(timesteps, dtype=torch.float64)
        t = kind.time(told)
        if not torch.allclose(kind.timestep(t), told):
            raise UsageError(f"timesteps: {timesteps!r:.80} leave the range of {kind.process}", "those of its training")
        return t.tolist()
    assert sigmas is not None
    levels = torch.tensor(sigmas[:-1] if len(sigmas) > 1 and sigmas[-1] == 0 else sigmas, dtype=torch.float64)
    if not (levels > 0).all():
        raise UsageError(f"sigmas: only the last may be 0, got {sigmas!r:.80}", "falling, positive ones")
    return _snapped(kind.process, kind.at_level(levels)).tolist()


def _snapped(process: Process, t: Tensor) -> Tensor:
    """Ends that float32 has moved outside are put back."""
    near = 1e-4 * max(1.0, abs(process.t_max)) if isinstance(process, VPDiscrete) else 0.0
    inside = t.clamp(process.t_min, process.t_max)
    return torch.where((t - inside).abs() <= near, inside, t)


def _reaching(process: Flow | EDM, low: float, high: float) -> Process:
    """The same process with ends that hold these times."""
    if isinstance(process, EDM):
        least, most = min(process.sigma_min, low), max(process.sigma_max, high)
        return process if (least, most) == (process.sigma_min, process.sigma_max) else EDM(least, most)
    return process if process.t_min <= low or low <= 0 else Flow(t_min=low)


def _placed(config: Config, kind: Convention, n: int) -> list[float]:
    """The grid of a config whose process is no flow."""
    process = kind.process
    flags = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "log-snr", "use_beta_sigmas": "beta-sigma"}
    flags["use_lu_lambdas"] = "log-snr"
    wanted = [grid for flag, grid in flags.items() if config[flag]]
    if len(wanted) > 1:
        raise UsageError(f"more than one of {', '.join(flags)} is set", "set one of them")
    final = "denoise" if config["final_sigmas_type"] == "zero" else "stop"
    drop = integer("spacing_drop", config["spacing_drop"], 0, 1)
    spacings = {
        "leading": lambda: grids.leading(config["steps_offset"], drop),
        "linspace": lambda: grids.linspace(drop),
        "trailing": grids.trailing,
    }
    spaced = False
    if config["grid"] is not None:
        rule: Any = config["grid"]
        rule = auto.choose(process, n, True).grid if rule == "auto" else rule
    elif isinstance(kind, Scaled):
        names = {"karras": f"karras({config['rho']})", "exponential": "log-snr"}
        if config["sigma_schedule"] not in names:
            raise unknown("sigma_schedule", config["sigma_schedule"], names)
        rule = wanted[0] if wanted else names[config["sigma_schedule"]]
    elif wanted:
        rule = wanted[0]
    else:
        spacing = config["timestep_spacing"]
        if spacing not in spacings:
            raise unknown("timestep_spacing", spacing, spacings)
        rule, spaced = spacings[spacing](), True
        final = final if config["set_alpha_to_one"] else "stop"
    high, low = (None if isinstance(kind, Scaled) else config[f"sigma_{end}"] for end in ("max", "min"))
    start, stop = (None if s is None else _time(kind, s) for s in (high, low))
    if config["lambda_min_clipped"] is not None and math.isfinite(config["lambda_min_clipped"]):
        start = min(start or process.t_max, process.time(2.0 * config["lambda_min_clipped"]))
    if stop is None and final == "stop" and spaced:
        inner = grids.times(process, rule, n, "denoise", start)[:-1]
        if inner[-1] > process.t_min:
            return [*inner, process.t_min]
    if stop is None:
        return grids.times(process, rule, n, final, start)
    if final == "stop":
        return grids.times(process, rule, n, final, start, stop)
    inner = grids.times(process, rule, n - 1, "stop", start, stop) if n > 1 else [start or process.t_max]
    return [*inner, process.t_data]


def _time(kind: Convention, sigma: float) -> float:
    t = kind.at_level(torch.tensor([number("sigma", sigma, 1e-12)], dtype=torch.float64))
    return _snapped(kind.process, t).item()


def shift(config: Config, mu: float | None) -> float:
    """The factor of sigma/alpha on a flow's grid: e^mu or mu where it is dynamic, else the config's.

    Raises:
        UsageError: a dynamic shift without mu, or two static ones that differ.
    """
    if config["use_dynamic_shifting"]:
        if mu is None:
            raise UsageError("use_dynamic_shifting: the shift depends on the image, mu is missing", "mu=1.15")
        if config["time_shift_type"] not in ("exponential", "linear"):
            raise unknown("time_shift_type", config["time_shift_type"], ("exponential", "linear"))
        return math.exp(number("mu", mu)) if config["time_shift_type"] == "exponential" else number("mu", mu, 1e-6)
    chosen = {float(config[key]) for key in ("shift", "flow_shift")} - {1.0}
    if len(chosen) > 1:
        raise UsageError(f"shift and flow_shift differ: {sorted(chosen)}", "set one of them")
    return chosen.pop() if chosen else 1.0


def _flow_times(
    config: Config,
    kind: Straight,
    steps: int | None,
    timesteps: list[float] | None,
    sigmas: list[float] | None,
    mu: float | None,
) -> tuple[list[float], bool]:
    """The times but for clean data, and whether that follows: shift, then shift_terminal, then the sigma schedule."""
    final = config["final_sigmas_type"] == "zero"
    if timesteps is not None:
        return _given(kind, timesteps, sigmas), final
    factor = shift(config, mu)
    if sigmas is not None and config["grid"] is not None and unasked(sigmas):
        steps, sigmas = len(sigmas), None
    if sigmas is not None:
        u = np.array(_given(kind, None, sigmas))
    else:
        n = integer("num_inference_steps", steps, 1, grids.MAX_STEPS)
        u = np.linspace(1, 1 / n, n) if final else np.linspace(1, 1 / kind.train, n + 1)
    t = factor * u / (1 + (factor - 1) * u)
    if config["grid"] is not None and sigmas is None:
        rule = auto.choose(kind.process, len(u), True).grid if config["grid"] == "auto" else config["grid"]
        placed = grids.times(Flow(factor, _FLOW_MIN), rule, steps, "denoise" if final else "stop")  # type: ignore[arg-type]
        t = np.array(placed[:-1] if final else placed)
    if config["shift_terminal"]:
        end = number("shift_terminal", config["shift_terminal"], 0, 1)
        t = 1 - (1 - t) * ((1 - end) / (1 - t[-1])) if len(t) > 1 else t
    if config["grid"] is None:
        t = _respaced(config, t)
    return t.tolist(), final


def _respaced(config: Config, t: np.ndarray) -> np.ndarray:
    """As many times between the first and the last, by use_karras_sigmas, use_exponential_sigmas or use_beta_sigmas."""
    first, last, ramp = config["sigma_max"] or t[0], config["sigma_min"] or t[-1], np.linspace(0, 1, len(t))
    if config["use_karras_sigmas"]:
        return (first ** (1 / 7) + ramp * (last ** (1 / 7) - first ** (1 / 7))) ** 7
    if config["use_exponential_sigmas"]:
        return np.exp(math.log(first) + ramp * (math.log(last) - math.log(first)))
    if config["use_beta_sigmas"]:
        from scipy import special  # here, as it is slow to import

        return last + special.betaincinv(0.6, 0.6, 1 - ramp) * (first - last)
    return t
