"""Charts: coordinates in which the PF-ODE is d(x/m)/du = w(u) n, exactly (docs/design.md, idea B).

n is a prediction, m a scale, u a clock and w a known scalar weight. With v = log(sigma/alpha) every clock is a function
of v, and w du a density in v; a classical integrator applied to x/m in the clock u is a sampler.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pfode.errors import unknown
from pfode.process import Process, float64

__all__ = [
    "CHARTS",
    "Array",
    "Chart",
    "Node",
    "chart",
    "er_sde",
    "lagrange",
    "sde",
]

Array = NDArray[np.float64]

_GAUSS_X, _GAUSS_W = np.polynomial.legendre.leggauss(16)
_PANEL = 2.0  # longest panel in v
_REACH = 40.0  # e^-40 is below float64: an integral down to sigma = 0 starts there


@dataclass(frozen=True)
class Node:
    """A point of a trajectory in a chart: time, level (alpha, sigma), v = log(sigma/alpha), scale m, clock u."""

    t: float
    alpha: float
    sigma: float
    v: float
    m: float
    u: float

    @property
    def regular(self) -> bool:
        """Whether the chart holds here: it may not where alpha = 0 or sigma = 0."""
        return math.isfinite(self.u) and self.m > 0


@dataclass(frozen=True)
class Chart:
    """A row of the table: `clock` gives u from v, `level` v from u; `density` is w du/dv of v, None where w = 1."""

    name: str
    prediction: str
    scale: Callable[[float, float], float]
    clock: Callable[[Process, Array], Array]
    level: Callable[[Process, Array], Array]
    density: Callable[[Array], Array] | None = None

    def nodes(self, process: Process, times: Sequence[float]) -> list[Node]:
        """The points of a grid in this chart."""
        t = float64(list(times))
        alpha, sigma = process.alpha(t).numpy(), process.sigma(t).numpy()
        v = -0.5 * process.log_snr(t).numpy()
        with np.errstate(over="ignore"):
            u = self.clock(process, v)
        levels = zip(t.tolist(), alpha.tolist(), sigma.tolist(), v.tolist(), u.tolist(), strict=True)
        return [Node(t, a, s, v, self.scale(a, s), u) for t, a, s, v, u in levels]

    def at(self, process: Process, u: Sequence[float]) -> list[Node]:
        """The points at these values of the clock."""
        return self.nodes(process, process.time(torch.from_numpy(-2 * self.level(process, np.array(u)))).tolist())

    def weight(self, process: Process, node: Node) -> float:
        """w at a node where the chart holds."""
        if self.density is None:
            return 1.0
        v = np.array([node.v])
        step = 1e-6  # du/dv by a central difference: only the clock t has no simpler form, and needs no more digits
        slope = (self.clock(process, v + step) - self.clock(process, v - step)) / (2 * step)
        return float((self.density(v) / slope)[0])

    def integrate(self, process: Process, known: Sequence[Node], start: Node, stop: Node) -> list[float]:
        """Weights W_j = integral of w(u) l_j(u) du from start to stop, l_j the Lagrange basis on the known nodes.

        Exact to float64: 16-point Gauss-Legendre on panels of length <= 2 in v (one panel in u where w = 1).
        """
        u, g = self._rule(process, start, stop)
        return [float(g @ basis) for basis in lagrange([node.u for node in known], u)]

    def moments(self, process: Process, start: Node, stop: Node, n: int) -> list[float]:
        """Integrals of w(u) (u - u_start)^q du from start to stop, q = 0 ... n - 1."""
        u, g = self._rule(process, start, stop)
        return [float(g @ (u - start.u) ** q) for q in range(n)]

    def _rule(self, process: Process, start: Node, stop: Node) -> tuple[Array, Array]:
        if self.density is None:
            half = 0.5 * (stop.u - start.u)
            return start.u + half * (1 + _GAUSS_X), half * _GAUSS_W
        end = max(stop.v, start.v - _REACH)
        edges = np.linspace(start.v, end, max(1, math.ceil(abs(end - start.v) / _PANEL)) + 1)
        half = 0.5 * np.diff(edges)[:, None]
        v = (edges[:-1, None] + half * (1 + _GAUSS_X)).ravel()
        return self.clock(process, v), (half * _GAUSS_W).ravel() * self.density(v)


def lagrange(points: Sequence[float], u: Array) -> list[Array]:
    """The values at u of the Lagrange basis on these points."""
    basis = []
    for j, here in enumerate(points):
        value = np.ones_like(u)
        for k, other in enumerate(points):
            if k != j:
                value = value * ((u - other) / (here - other))
        basis.append(value)
    return basis


class _Fitted(NamedTuple):
    """The linear-beta VP process whose sigma/alpha spans that of a process with alpha = 1."""

    low: float  # beta_min
    slope: float  # beta_max - beta_min


@functools.cache
def _fitted(s_min: float, s_max: float, first: float = 1e-3) -> _Fitted:
    """beta_d and beta_min of Karras et al. 2022, table 1 (VP column): s = s_min at t = first, s = s_max at t = 1."""
    slope = 2 * (math.log1p(s_min**2) / first - math.log1p(s_max**2)) / (first - 1)
    return _Fitted(math.log1p(s_max**2) - 0.5 * slope, slope)


def _deis_clock(process: Process, v: Array) -> Array:
    """The time of the process; where alpha = 1 (EDM, VE), that of the VP process fitted to its noise levels."""
    if process.alpha(process.t_max) != 1:
        return process.time(torch.from_numpy(np.asarray(-2 * v))).numpy()
    low, slope = _fitted(process.sigma(process.t_min), process.sigma(process.t_max))
    integral = np.logaddexp(0, 2 * v)  # log(1 + s^2)
    return (np.sqrt(low**2 + 2 * slope * integral) - low) / slope


def _deis_level(process: Process, u: Array) -> Array:
    if process.alpha(process.t_max) != 1:
        return -0.5 * process.log_snr(torch.from_numpy(np.asarray(u))).numpy()
    low, slope = _fitted(process.sigma(process.t_min), process.sigma(process.t_max))
    return 0.5 * np.log(np.expm1(u * (low + 0.5 * slope * u)))


def sde(eta: float) -> Chart:
    """The chart of a reverse SDE with noise level eta: x0 against alpha s^(1 + eta), clock log(1/s), s = sigma/alpha.

    There the SDE is d(x/m) = w D du + noise, and from s_0 to s_1 the noise left from before is (s_1/s_0)^eta of s_1
    (eta = 0 is the PF-ODE in the chart dpm++, eta = 1 the usual reverse SDE; eta = tau^2 of SA-Solver).
    """
    power = 1 + eta

    def scale(alpha: float, sigma: float) -> float:
        return alpha * (sigma / alpha) ** power if alpha else math.inf

    return Chart(f"sde({eta:g})", "x0", scale, _minus, _minus, lambda v: -power * np.exp(np.minimum(-power * v, 700.0)))


def er_sde() -> Chart:
    """The chart of ER-SDE-Solvers (Cui et al. 2023): x0 against alpha phi(s), clock s, phi(s) = s (e^(s^0.3) + 10)."""

    def phi(s: Array) -> Array:
        return s * (np.exp(np.minimum(s**0.3, 300.0)) + 10)

    def scale(alpha: float, sigma: float) -> float:
        return alpha * float(phi(np.asarray(sigma / alpha))) if alpha else math.inf

    def density(v: Array) -> Array:
        root = np.exp(0.3 * v)
        grown = np.exp(np.minimum(root, 300.0))
        return -(1 + 0.3 * root * grown / (grown + 10)) / phi(np.exp(v))

    return Chart("er-sde", "x0", scale, _exp, _log, density)


def _exp(process: Process, v: Array) -> Array:
    return np.exp(v)


def _log(process: Process, u: Array) -> Array:
    return np.log(u)


def _same(process: Process, v: Array) -> Array:
    return v


def _minus(process: Process, v: Array) -> Array:
    return -v


def _logit(process: Process, u: Array) -> Array:
    return np.log(u) - np.log1p(-u)


def _sigmoid(process: Process, v: Array) -> Array:
    return 1 / (1 + np.exp(-v))


CHARTS: dict[str, Chart] = {
    chart.name: chart
    for chart in (
        Chart("ddim", "eps", lambda a, s: a, _exp, _log),
        Chart("dpm", "eps", lambda a, s: a, _same, _same, np.exp),
        Chart("dpm++", "x0", lambda a, s: s, _minus, _minus, lambda v: -np.exp(-v)),
        Chart("deis", "eps", lambda a, s: a, _deis_clock, _deis_level, np.exp),
        Chart("flow", "flow", lambda a, s: a + s, _sigmoid, _logit),
        Chart("trig", "v", math.hypot, lambda p, v: np.arctan(np.exp(v)), lambda p, u: np.log(np.tan(u))),
        Chart("dpm3", "v", math.hypot, _same, _same, lambda v: 0.5 / np.cosh(v)),
    )
}


def chart(name: str) -> Chart:
    """Look a chart up.

    Raises:
        UsageError: unknown name.
    """
    if name not in CHARTS:
        raise unknown("chart", name, CHARTS)
    return CHARTS[name]
