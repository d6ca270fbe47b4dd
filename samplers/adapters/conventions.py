"""What a scheduler config of diffusers says of a network: its process, and how pipeline and network talk about it.

Every state is kept at the scale at which the network takes it: VP and flow states as they are, EDM's times
c_in = 1/sqrt(sigma^2 + sigma_data^2). Then no pipeline has to scale anything, whichever of its ways it goes by.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfode.compat import schedules
from pfode.compat.schedules import OWN, PREDICTION_TYPES
from pfode.errors import UsageError, integer, number, unknown
from pfode.prediction import PREDICTIONS, Coefficient, Pair
from pfode.process import EDM, Flow, VPDiscrete

__all__ = [
    "FLOW_MIN",
    "Config",
    "Convention",
    "Discrete",
    "Levels",
    "Scaled",
    "Straight",
    "as_list",
    "betas",
    "convention",
]

Config = Mapping[str, Any]
Levels = Sequence[float] | np.ndarray | Tensor
FLOW_MIN = 1e-3  # the least time of a flow that a network is asked at


class Convention(ABC):
    """A process, as a kind of pipeline and its network see it.

    Levels are those of the state at the network's scale: x = alpha x_0 + sigma noise, both times `scale`.
    """

    process: Any  # VPDiscrete, Flow or EDM
    counts = True  # whether the network's time counts training steps, and others round it to a whole number

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """The time in the network's own units, at a time of the process."""

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
        """(alpha, sigma) at a time in the network's units, wherever that lies."""
        exact = timestep.float() if timestep.device.type == "mps" else timestep.double()
        t = self.time(exact)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        scale = self.scale(sigma)
        return scale * alpha, scale * sigma


@dataclass(frozen=True)
class Discrete(Convention):
    """A table of betas; the network is given the index."""

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
    """A flow; the network is given num_train_timesteps t. inverted: of 1 - t, and its output points to data."""

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

    The network is given log(sigma)/4.
    """

    process: EDM
    data: float
    negated: bool = False
    counts = False

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
    trained = as_list(config["trained_betas"])
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
            raise UsageError(
                f"prediction_type {kind!r}: models that are given log(sigma)/4 have {' or '.join(allowed)}"
            )
        low, high = config["sigma_min"] or 0.002, config["sigma_max"] or (700.0 if continuous else 80.0)
        data = 1.0 if config["sigma_data"] is None else number("sigma_data", config["sigma_data"], 1e-6)
        return Scaled(EDM(low, high), data, kind == "v_prediction")
    if config["use_flow_sigmas"]:
        train = integer("num_train_timesteps", config["num_train_timesteps"], 1)
        return Straight(Flow(t_min=FLOW_MIN), PREDICTION_TYPES[kind], train, bool(config["invert_sigmas"]))
    if kind == "flow_prediction":
        raise UsageError("prediction_type 'flow_prediction' needs a flow", "use_flow_sigmas=True")
    return Discrete(VPDiscrete(torch.cumprod(1 - betas(config), 0).double()), PREDICTION_TYPES[kind])


def as_list(values: Levels | None) -> list[float] | None:
    if values is None:
        return None
    return (
        (values if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values, dtype=np.float64)))
        .double()
        .tolist()
    )
