"""What a network is trained on: objectives as values, each a loss of a batch.

    Denoising      F against its target (the default); weighted by the likelihood where asked
    FlowMatching   the velocity of an interpolant between coupled points of source and data
    Sliced         score matching without a target, by random projections of the score's Jacobian
    Implicit       the same with its exact trace
    MaximumLikelihood  the negative log-likelihood of a continuous normalising flow

Sliced, implicit and denoising score matching have the same minimiser, and here the same weights of the noise levels:
their expectations differ by a constant.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pfode import noise
from pfode.denoiser import Preconditioning
from pfode.errors import UsageError, integer, number, unknown
from pfode.flow.cnf import CNF
from pfode.flow.divergence import Exact, Hutchinson, Trace, divergence, find_trace, signs
from pfode.process import Flow
from pfode.scores.denoiser import Denoiser
from pfode.scores.training.coupling import Coupling, Independent, coupling, described
from pfode.scores.training.interpolants import INTERPOLANTS, interpolate

__all__ = [
    "OBJECTIVES",
    "Denoising",
    "Example",
    "FlowMatching",
    "Implicit",
    "MaximumLikelihood",
    "Objective",
    "Problem",
    "Sliced",
    "VelocityField",
    "objective",
    "problem",
]

EXTRA = 3  # draw number of the noise of interpolants that have some
WEIGHTINGS = ("network", "likelihood")


class Example(NamedTuple):
    """What a loss is made from: a batch, or this process's share of it.

    Args:
        x0: data, (n, *shape), float64.
        noise: of the same shape: standard normal, or the coupled points of another source.
        t: times of the process, (n,), float64.
        label: int64 (n,), or None.
        seeds: one per example, for what else is random.
        slope: d log(sigma/alpha) / dq at the quantile q that t was drawn by, (n,); 0 where t is cut off.
        style: (n, numbers), a row of NaN where it is hidden; or None.
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    label: Tensor | None
    seeds: list[int]
    slope: Tensor
    style: Tensor | None = None

    def cond(self, device: torch.device) -> dict[str, Tensor]:
        """What the network is told besides x and the time, on its device."""
        given = {"label": self.label, "style": self.style}
        return {key: value.to(device) for key, value in given.items() if value is not None}

    def part(self, chosen: list[int]) -> "Example":
        """The examples of these numbers."""
        label, style = (None if one is None else one[chosen] for one in (self.label, self.style))
        seeds = [self.seeds[i] for i in chosen]
        return Example(self.x0[chosen], self.noise[chosen], self.t[chosen], label, seeds, self.slope[chosen], style)


class Problem(NamedTuple):
    """What the network is asked and what it should answer, in float64.

    Args:
        x: noisy pictures x_t = alpha x_0 + sigma noise, (batch, *shape).
        c: the preconditioning at their times.
        target: what F(c_in x, c_noise) should be, of the shape of x.
    """

    x: Tensor
    c: Preconditioning
    target: Tensor


def problem(den: Denoiser, x0: Tensor, noise: Tensor, t: Tensor) -> Problem:
    """The regression of denoising score matching (Vincent 2011; Karras et al. 2022, eq. 8): F against its target.

    Args:
        den: how the network is preconditioned.
        x0: pictures. noise: standard normal, of their shape. t: (batch,) times of the process.
    """
    alpha, sigma = (wide(value, x0) for value in (den.process.alpha(t), den.process.sigma(t)))
    return Problem(alpha * x0 + sigma * noise, den.precondition(t), den.target(x0, noise, alpha, sigma))


@dataclass(frozen=True)
class Objective:
    """A loss of a batch.

    Attributes:
        coupling: of the points of the source with those of the data.
        alone: whether it asks the network more often than once a loss, which several processes cannot.
        signed: whether a loss may be negative.
    """

    coupling: Coupling = field(default_factory=Independent, kw_only=True)
    alone: ClassVar[bool] = False
    signed: ClassVar[bool] = False

    def loss(self, den: Denoiser, example: Example, device: torch.device) -> Tensor:
        """Losses of any shape that begins with the batch; their mean is minimised.

        Args:
            den: the denoiser in training; its network is `den.net`.
            example: the batch, on the CPU.
            device: of the network.
        """
        raise NotImplementedError

    def check(self, den: Denoiser) -> None:
        """Raise UsageError where the objective cannot train this denoiser."""

    def config(self) -> dict[str, Any]:
        """A JSON object from which `objective` makes the value again."""
        values = {key: value for key, value in asdict(self).items() if key != "coupling"}
        return {"name": name_of(self), **values, "coupling": described(self.coupling)}


@dataclass(frozen=True)
class Denoising(Objective):
    """Denoising score matching: the mean square of F minus its target.

    Args:
        weighting: "network", the weights that the preconditioning brings, or "likelihood": the mean of the loss is then
            1/d int E|D - x_0|^2 e^(-2v) dv, v = log(sigma/alpha): the diffusion part of the negative evidence lower
            bound, in nats per dimension, whatever distribution the noise levels are drawn from (Song et al. 2021,
            theorem 1; Kingma et al. 2021, eq. 13).

    Raises:
        UsageError: another weighting.
    """

    weighting: str = "network"

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise unknown("weighting", self.weighting, WEIGHTINGS)

    def loss(self, den: Denoiser, example: Example, device: torch.device) -> Tensor:
        x, c, target = problem(den, example.x0, example.noise, example.t)
        out = ask(den, wide(c.c_in, x) * x, c.c_noise, example.cond(device), device)
        square = (out.float() - target.float().to(device)).square()
        if self.weighting == "network":
            return square
        ratio = den.process.sigma(example.t) / den.process.alpha(example.t)
        weight = example.slope * (c.c_out / ratio).square()
        return square * wide(weight.float().to(device), square)


@dataclass(frozen=True)
class FlowMatching(Objective):
    """Flow matching: the network's velocity against that of an interpolant a x_0 + b x_1 + g e (Albergo et al. 2023).

    x_0 is the data, at t = 0, and x_1 the source, at t = 1: Gaussian noise, or another data set. Where the source is
    Gaussian and the interpolant linear, the model is the denoiser of the process `Flow`; else it is a velocity field,
    of which the ODE is the right one (every deterministic sampler, `encode`, likelihoods), but no reverse SDE.

    Args:
        coupling: `Assignment()` gives straighter paths: OT-CFM (Tong et al. 2024).
        interpolant: "linear", "trigonometric" (variance-preserving), "bridge" (a Schrodinger bridge's, with `std`), or
            one that you added to `INTERPOLANTS`.
        std: of the noise on the way, for "bridge".

    Raises:
        UsageError: an unknown interpolant, or a negative std.
    """

    coupling: Coupling = field(default_factory=Independent)
    interpolant: str = "linear"
    std: float = 0.5

    def __post_init__(self) -> None:
        if self.interpolant not in INTERPOLANTS:
            raise unknown("interpolant", self.interpolant, INTERPOLANTS)
        number("std", self.std, 0, 1e6)

    def check(self, den: Denoiser) -> None:
        need_velocity(self, den)

    def loss(self, den: Denoiser, example: Example, device: torch.device) -> Tensor:
        extra = noise.normal(example.seeds, EXTRA, example.x0.shape[1:], torch.float64)
        kind = INTERPOLANTS[self.interpolant](self.std)
        x, velocity = interpolate(kind, example.t, example.x0, example.noise, extra)
        out = ask(den, x, example.t, example.cond(device), device)
        return (out.float() - velocity.float().to(device)).square()


@dataclass(frozen=True)
class Implicit(Objective):
    """Implicit score matching (Hyvarinen 2005): E|s|^2/2 + tr grad s, with the exact trace: for few dimensions.

    No noise is compared with: what is learnt is the score of the data at every noise level, from noisy data alone.
    """

    alone: ClassVar[bool] = True
    signed: ClassVar[bool] = True
    probes: ClassVar[int | None] = None

    def loss(self, den: Denoiser, example: Example, device: torch.device) -> Tensor:
        alpha, sigma = den.process.alpha(example.t), den.process.sigma(example.t)
        x = wide(alpha, example.x0) * example.x0 + wide(sigma, example.x0) * example.noise
        c = den.precondition(example.t)
        d = math.prod(x.shape[1:])
        c_noise, scaled = c.c_noise.float().to(device), (wide(c.c_in, x) * x).float().to(device)
        extra = example.cond(device)
        how: Trace = Exact() if self.probes is None else Hutchinson(self.probes)
        vectors = None if self.probes is None else signs(scaled, self.probes, example.seeds)
        found = divergence(lambda y: den.net(y, c_noise, **extra).to(y.dtype), scaled, how, vectors)
        pull = ((c.c_skip - 1 / alpha) / c.c_out).float().to(device)  # |alpha D - x|^2 / (alpha c_out)^2
        square = (found.value + wide(pull, x) * x.float().to(device)).square().flatten(1).mean(1)
        factor = (2 * sigma**2 * c.c_in / (alpha * c.c_out) / d).float().to(device)
        constant = (2 * sigma**2 / (alpha * c.c_out**2) * (c.c_skip - 1 / alpha)).float().to(device)
        return square + factor * found.trace + constant


@dataclass(frozen=True)
class Sliced(Implicit):
    """Sliced score matching with reduced variance (Song et al. 2019, eq. 8): the trace by random signs.

    Args:
        probes: projections per example.

    Raises:
        UsageError: no probes.
    """

    probes: int = 1  # type: ignore[misc]

    def __post_init__(self) -> None:
        integer("probes", self.probes, 1, 10_000)


class VelocityField(torch.nn.Module):
    """The field dx/dt of a denoiser whose network's output is a velocity.

    Args:
        den: prediction "flow" on the process Flow.
    """

    def __init__(self, den: Denoiser):
        super().__init__()
        self.network = den.net

    def forward(self, t: Tensor, y: Tensor, label: Tensor | None = None) -> Tensor:
        extra = {} if label is None else {"label": label}
        return self.network(y, t.to(y.dtype).reshape(-1).expand(len(y)), **extra)


@dataclass(frozen=True)
class MaximumLikelihood(Objective):
    """The negative log-likelihood of a continuous normalising flow, in nats per dimension (Grathwohl et al. 2019).

    The data are taken to standard normal noise, t from 0 to 1; the model samples as one of flow matching does.

    Args:
        kinetic, jacobian: weights of int |f|^2 dt and int |df/dx|_F^2 dt (RNODE: Finlay et al. 2020), per dimension.
        trace: "auto" (exact up to 64 dimensions), "exact" or "hutchinson".
        rtol, atol: of the adaptive steps. step: of fixed steps of rk4 instead; 0: adaptive.

    Raises:
        UsageError: negative weights, tolerances or steps.
    """

    kinetic: float = 0.0
    jacobian: float = 0.0
    trace: str = "auto"
    rtol: float = 1e-4
    atol: float = 1e-5
    step: float = 0.0
    alone: ClassVar[bool] = True
    signed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, high in (("kinetic", 1e6), ("jacobian", 1e6), ("rtol", 1.0), ("atol", 1.0), ("step", 1.0)):
            number(name, getattr(self, name), 0, high)
        find_trace(self.trace, 1)

    def check(self, den: Denoiser) -> None:
        need_velocity(self, den)

    def loss(self, den: Denoiser, example: Example, device: torch.device) -> Tensor:
        if example.style is not None:
            raise UsageError("objective likelihood: trains without styles", "--objective flow, or data without styles")
        x = example.x0.float().to(device)
        label = None if example.label is None else example.label.to(device)
        how: dict[str, Any] = {"method": "rk4", "step_size": self.step} if self.step else {}
        flow = CNF(
            VelocityField(den), x.shape[1:], trace=self.trace, kinetic=self.kinetic > 0, jacobian=self.jacobian > 0,
            rtol=self.rtol, atol=self.atol, **how,
        )  # fmt: skip
        found = flow.run(x, label, seeds=example.seeds)
        whole = self.kinetic * found.kinetic + self.jacobian * found.jacobian - found.log_prob
        return whole / math.prod(x.shape[1:])


OBJECTIVES: dict[str, type[Any]] = {
    "denoising": Denoising, "flow": FlowMatching, "sliced": Sliced, "implicit": Implicit,
    "likelihood": MaximumLikelihood,
}  # fmt: skip


def objective(config: dict[str, Any]) -> Objective:
    """The objective that `Objective.config` said.

    Raises:
        UsageError: an unknown name, field or value.
    """
    name = config.get("name")
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    given = {key: value for key, value in config.items() if key != "name"}
    if isinstance(given.get("coupling"), dict):
        given["coupling"] = coupling(given["coupling"])
    try:
        return OBJECTIVES[str(name)](**given)
    except TypeError as error:
        raise UsageError(f"objective {name}: {error}", f"{name} alone has its usual values") from error


def name_of(value: Objective) -> str:
    """The name of an objective.

    Raises:
        UsageError: it is none of `OBJECTIVES`.
    """
    for name, kind in OBJECTIVES.items():
        if type(value) is kind:
            return name
    raise UsageError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {type(value).__name__}")


def need_velocity(value: Objective, den: Denoiser) -> None:
    """Raise UsageError unless a network's output is a velocity: prediction "flow" on the process Flow, unshifted."""
    if den.prediction != "flow" or den.process != Flow():
        got = f"prediction {den.prediction!r} on {den.process}"
        raise UsageError(
            f"objective {name_of(value)}: trains velocities, got {got}", "--process flow --prediction flow"
        )


def ask(den: Denoiser, x: Tensor, c_noise: Tensor, cond: dict[str, Tensor], device: torch.device) -> Tensor:
    """F in float32, of inputs in float64."""
    return den.net(x.float().to(device), c_noise.float().to(device), **cond)


def wide(value: Tensor, x: Tensor) -> Tensor:
    """(batch,) shaped to broadcast against x."""
    return value.reshape(-1, *[1] * (x.ndim - 1))
