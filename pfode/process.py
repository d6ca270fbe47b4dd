"""Noise processes: x_t = alpha(t) x_0 + sigma(t) eps (docs/design.md, idea A).

Each process gives alpha, sigma and the log-SNR `log(alpha^2 / sigma^2)` with its exact inverse, all without
cancellation over the whole range. Times are a float (computed in float64), a 0-d tensor, or shape (batch,).

Three times matter: `t_max` and `t_min` bound where a network may be evaluated; `t_data` is the time of clean data,
sigma(t_data) = 0, where nothing is evaluated but where a trajectory may end.
"""

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from pfode.errors import UsageError, number, unknown

__all__ = [
    "EDM",
    "PROCESSES",
    "VE",
    "VP",
    "Flow",
    "Process",
    "SubVP",
    "VPCosine",
    "VPDiscrete",
    "float64",
    "from_config",
    "need_process",
]

T = TypeVar("T", float, Tensor)


class Process(ABC):
    """A forward noising process. Two processes are equal when alpha and sigma are the same functions of t."""

    t_min: float
    t_max: float

    def alpha(self, t: T) -> T:
        """Scale of the data at time t."""
        return _apply(self._alpha, t)

    def sigma(self, t: T) -> T:
        """Standard deviation of the noise at time t."""
        return _apply(self._sigma, t)

    def log_snr(self, t: T) -> T:
        """log(alpha^2 / sigma^2) at time t; twice the lambda of DPM-Solver."""
        return _apply(self._log_snr, t)

    def time(self, log_snr: T) -> T:
        """The time at which the log-SNR has this value: the inverse of `log_snr`."""
        return _apply(self._time, log_snr)

    @property
    def t_data(self) -> float:
        """The time of clean data (sigma = 0)."""
        return 0.0

    def uniform_clock(self, t: Tensor) -> Tensor:
        """The clock in which the grid `time` is uniform: t itself, unless the process has a time shift."""
        return t

    def from_uniform_clock(self, clock: Tensor) -> Tensor:
        """Inverse of `uniform_clock`."""
        return clock

    def config(self) -> dict[str, Any]:
        """A JSON object from which `from_config` rebuilds the process."""
        return {"name": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _log_snr(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _time(self, log_snr: Tensor) -> Tensor: ...


def float64(value: Any) -> Tensor:
    """In float64: a tensor where it lies, anything else on the host, whatever torch's default device is."""
    return value.double() if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64, device="cpu")


def _apply(function: Callable[[Tensor], Tensor], t: T) -> T:
    if isinstance(t, Tensor):
        return function(t if t.is_floating_point() else t.double())
    return function(float64(t)).item()


def _check(condition: bool, message: str, hint: str) -> None:
    if not condition:
        raise UsageError(message, hint)


def _numbers(process: Process) -> None:
    """Every parameter of the process as a float."""
    for key, value in asdict(process).items():  # type: ignore[call-overload]
        object.__setattr__(process, key, number(f"{type(process).__name__}: {key}", value))


def _check_times(process: Process) -> None:
    name, low, high = type(process).__name__, process.t_min, process.t_max
    _check(0 < low < high <= 1, f"{name}: need 0 < t_min < t_max <= 1, got {low} and {high}", f"{name}(t_min=1e-3)")


@dataclass(frozen=True)
class _BetaProcess(Process):
    """Shared by VP and SubVP: B(t) = beta_min t + (beta_max - beta_min) t^2 / 2 and its inverse."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = field(default=1e-3, compare=False)
    t_max: float = field(default=1.0, compare=False)

    def __post_init__(self) -> None:
        _numbers(self)
        low, high = self.beta_min, self.beta_max
        name = type(self).__name__
        _check(
            0 < low <= high < math.inf,
            f"{name}: need 0 < beta_min <= beta_max, got {low}, {high}",
            f"{name}(0.1, 20.0)",
        )
        _check_times(self)

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def _integral_inverse(self, b: Tensor) -> Tensor:
        return 2 * b / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * b))

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))


@dataclass(frozen=True)
class VP(_BetaProcess):
    """Variance preserving with linear beta: alpha = exp(-B/2), sigma^2 = 1 - exp(-B) (Song et al. 2021, eq. 32-33)."""

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def _log_snr(self, t: Tensor) -> Tensor:
        return -torch.log(torch.expm1(self._integral(t)))

    def _time(self, log_snr: Tensor) -> Tensor:
        return self._integral_inverse(torch.nn.functional.softplus(-log_snr, threshold=60))


@dataclass(frozen=True)
class SubVP(_BetaProcess):
    """Sub-variance preserving: alpha = exp(-B/2), sigma = 1 - exp(-B) (Song et al. 2021, appendix B)."""

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._integral(t))

    def _log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(2 * torch.sinh(0.5 * self._integral(t)))

    def _time(self, log_snr: Tensor) -> Tensor:
        return self._integral_inverse(2 * torch.asinh(0.5 * torch.exp(-0.5 * log_snr)))


@dataclass(frozen=True)
class VPCosine(Process):
    """alpha = cos(theta(t)) / cos(theta(0)), theta(t) = (t+s)/(1+s) pi/2 (Nichol & Dhariwal 2021, eq. 17).

    The default t_max stops short of alpha = 0, as DPM-Solver does; `t_max=1.0` gives zero terminal SNR.
    """

    s: float = 0.008
    t_min: float = field(default=1e-3, compare=False)
    t_max: float = field(default=0.9946, compare=False)

    def __post_init__(self) -> None:
        _numbers(self)
        _check(0 <= self.s < 1, f"VPCosine: need 0 <= s < 1, got {self.s}", "VPCosine(s=0.008)")
        _check_times(self)

    @property
    def _theta0(self) -> float:
        return self.s / (1 + self.s) * math.pi / 2

    def _angle(self, t: Tensor) -> Tensor:
        """theta(t) - theta(0)."""
        return t / (1 + self.s) * (math.pi / 2)

    def _alpha(self, t: Tensor) -> Tensor:
        # cos(theta) as the sine of the distance to pi/2, exact where alpha vanishes at t = 1
        return torch.sin((1 - t) / (1 + self.s) * (math.pi / 2)) / math.cos(self._theta0)

    def _sigma(self, t: Tensor) -> Tensor:
        # sin^2 theta - sin^2 theta0 = sin(theta + theta0) sin(theta - theta0)
        d = self._angle(t)
        return torch.sqrt(torch.sin(d + 2 * self._theta0) * torch.sin(d)) / math.cos(self._theta0)

    def _log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log(self._alpha(t)) - torch.log(self._sigma(t)))

    def _time(self, log_snr: Tensor) -> Tensor:
        c2 = math.cos(self._theta0) ** 2
        p = c2 * torch.sigmoid(log_snr)  # cos^2 theta
        q = c2 * torch.sigmoid(-log_snr)  # sin^2 theta - sin^2 theta0
        # tan(d) solves (cos 2theta0 - q) T^2 + sin(2theta0) T - q = 0, of discriminant 4 p (1 - p), 1 - p = sin^2 theta
        root = torch.sqrt(p * (q + math.sin(self._theta0) ** 2))
        d = torch.atan2(2 * q, math.sin(2 * self._theta0) + 2 * root)
        return d * (1 + self.s) / (math.pi / 2)


@dataclass(frozen=True)
class VPDiscrete(Process):
    """A discrete VP schedule; t is the index 0 ... n-1 of `alphas_cumprod`, made continuous.

    Between indices log(alpha/sigma) is linear in t; next to clean data (t = -1) and to a last value alpha = 0, where it
    is infinite, the finite one of sigma/alpha and alpha/sigma is.
    """

    alphas_cumprod: tuple[float, ...]

    def __init__(self, alphas_cumprod: Tensor | list[float] | tuple[float, ...]):
        try:
            values = float64(alphas_cumprod).flatten().tolist()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UsageError(f"VPDiscrete: alphas_cumprod: need numbers, got {alphas_cumprod!r:.60}") from error
        falling = all(a > b for a, b in itertools.pairwise(values))
        _check(
            len(values) >= 2 and falling and values[-1] >= 0 and values[0] < 1,
            "VPDiscrete: alphas_cumprod must fall strictly within [0, 1)",
            "VPDiscrete(torch.cumprod(1 - betas, 0))",
        )
        object.__setattr__(self, "alphas_cumprod", tuple(values))

    def __repr__(self) -> str:
        values = self.alphas_cumprod
        return f"VPDiscrete({len(values)} alphas_cumprod, {values[0]:.6g} ... {values[-1]:.6g})"

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return 0.0

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return len(self.alphas_cumprod) - 1.0

    @property
    def t_data(self) -> float:
        return -1.0

    @functools.cached_property
    def _knots(self) -> Tensor:
        """log(alpha/sigma) at the indices."""
        a = float64(self.alphas_cumprod)
        return 0.5 * (torch.log(a) - torch.log1p(-a))

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sqrt(torch.sigmoid(self._log_snr(t)))

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(torch.sigmoid(-self._log_snr(t)))

    def _log_snr(self, t: Tensor) -> Tensor:
        knots = self._knots.to(t)
        last = len(knots) - 1
        i = t.detach().floor().clamp(0, last - 1).long()
        inner = torch.lerp(knots[i], knots[i + 1], t - i)
        inner = torch.where(t < 0, knots[0] - torch.log1p(t), inner)
        if self.alphas_cumprod[-1] == 0:
            inner = torch.where(t >= last - 1, knots[-2] + torch.log(last - t), inner)
        return 2 * inner

    def _time(self, log_snr: Tensor) -> Tensor:
        value = 0.5 * log_snr
        knots = self._knots.to(value)
        last = len(knots) - 1
        i = (last - torch.searchsorted(knots.flip(0).contiguous(), value.contiguous())).clamp(0, last - 1)
        inner = i + (value - knots[i]) / (knots[i + 1] - knots[i])
        inner = torch.where(value > knots[0], torch.expm1(knots[0] - value), inner)
        if self.alphas_cumprod[-1] == 0:
            inner = torch.where(value < knots[-2], last - torch.exp(value - knots[-2]), inner)
        return inner


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t, 0 <= t <= 1 (Song et al. 2021)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        _numbers(self)
        low, high = self.sigma_min, self.sigma_max
        _check(0 < low < high < math.inf, f"VE: need 0 < sigma_min < sigma_max, got {low}, {high}", "VE(0.01, 50.0)")

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return 0.0

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return 1.0

    @property
    def t_data(self) -> float:
        return -math.inf

    @property
    def _span(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self._span * t)

    def _log_snr(self, t: Tensor) -> Tensor:
        return -2 * (math.log(self.sigma_min) + self._span * t)

    def _time(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr - math.log(self.sigma_min)) / self._span


@dataclass(frozen=True)
class EDM(Process):
    """alpha = 1, sigma = t (Karras et al. 2022). t_min = sigma_min, t_max = sigma_max."""

    sigma_min: float = field(default=0.002, compare=False)
    sigma_max: float = field(default=80.0, compare=False)

    def __post_init__(self) -> None:
        _numbers(self)
        low, high = self.sigma_min, self.sigma_max
        _check(0 < low < high < math.inf, f"EDM: need 0 < sigma_min < sigma_max, got {low}, {high}", "EDM(0.002, 80.0)")

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return self.sigma_min

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return self.sigma_max

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return t

    def _log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(t)

    def _time(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-0.5 * log_snr)


@dataclass(frozen=True)
class Flow(Process):
    """Rectified flow, flow matching: alpha = 1 - t, sigma = t (Lipman et al. 2023; Liu et al. 2023).

    Args:
        shift: the grid `time` is uniform in u with t = shift u / (1 + (shift - 1) u) (Esser et al. 2024, eq. 23).
    """

    shift: float = field(default=1.0, compare=False)
    t_min: float = field(default=1e-3, compare=False)
    t_max: float = field(default=1.0, compare=False)

    def __post_init__(self) -> None:
        _numbers(self)
        _check(0 < self.shift < math.inf, f"Flow: need shift > 0, got {self.shift}", "Flow(shift=3.0)")
        _check_times(self)

    def uniform_clock(self, t: Tensor) -> Tensor:
        return t / (self.shift - (self.shift - 1) * t)

    def from_uniform_clock(self, clock: Tensor) -> Tensor:
        return self.shift * clock / (1 + (self.shift - 1) * clock)

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return t

    def _log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - torch.log(t))

    def _time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr)


PROCESSES: dict[str, type[Process]] = {c.__name__: c for c in (VP, VPCosine, VPDiscrete, SubVP, VE, EDM, Flow)}


def from_config(config: dict[str, Any]) -> Process:
    """Rebuild a process from `Process.config()`.

    Raises:
        UsageError: an unknown process or parameter, or a value out of range.
    """
    parameters = dict(config)
    name = parameters.pop("name", None)
    if name not in PROCESSES:
        raise unknown("process", name, PROCESSES)
    try:
        return PROCESSES[name](**parameters)
    except (TypeError, ValueError) as error:
        raise UsageError(f"process {name}: {error}") from error


def need_process(value: object) -> Process:
    """`value`, which must be a noise process.

    Raises:
        UsageError: it is none: a name, say, or a class instead of an instance; the hint says what to write.
    """
    if isinstance(value, Process):
        return value
    known = {name.casefold(): name for name in PROCESSES}
    if isinstance(value, type):
        name, got = value.__name__, f"the class {value.__name__}"
    else:
        name, got = (value if isinstance(value, str) else type(value).__name__), f"{value!r:.60}"
    name = known.get(name.casefold().removeprefix("pfode."), "")
    given = {"VPDiscrete": "alphas_cumprod", "VE": "sigma_min=..., sigma_max=..."}.get(name, "")
    raise UsageError(
        f"process: expected a noise process, got {got}",
        f"pfode.{name}({given})" if name else "one of " + ", ".join(f"pfode.{known}()" for known in PROCESSES),
    )
