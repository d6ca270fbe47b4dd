"""Charts: coordinates in which the PF-ODE is d(x/m)/du = w(u) n, exactly (the table of idea B).

n is a prediction, m a scale, u a clock and w a known scalar weight. With v = log(sigma/alpha) every clock is a function
of v, and w du a density in v; a classical integrator applied to x/m in the clock u is a sampler.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pfode.errors import unknown
from pfode.process import Process

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
    """A row of the table: `clock` gives u from v; `density` is w du/dv as a function of v, None where w = 1."""

    name: str
    prediction: str
    scale: Callable[[float, float], float]
    clock: Callable[[Process, Array], Array]
    density: Callable[[Array], Array] | None = None

    def nodes(self, process: Process, times: Sequence[float]) -> list[Node]:
        """The points of a grid in this chart."""
        t = torch.tensor(list(times), dtype=torch.float64)
        alpha, sigma = process.alpha(t).numpy(), process.sigma(t).numpy()
        v = -0.5 * process.log_snr(t).numpy()
        with np.errstate(over="ignore"):
            u = self.clock(process, v)
        levels = zip(t.tolist(), alpha.tolist(), sigma.tolist(), v.tolist(), u.tolist(), strict=True)
        return [Node(t, a, s, v, self.scale(a, s), u) for t, a, s, v, u in levels]

    def integrate(self, process: Process, known: Sequence[Node], start: Node, stop: Node) -> list[float]:
        """Weights W_j = integral of w(u) l_j(u) du from start to stop, l_j the Lagrange basis on the known nodes.

        Exact to float64: 16-point Gauss-Legendre on panels of length <= 2 in v (one panel in u where w = 1).
        """
        u, g = self._rule(process, start, stop)
        points = [node.u for node in known]
        weights = []
        for j, here in enumerate(points):
            basis = g
            for k, other in enumerate(points):
                if k != j:
                    basis = basis * ((u - other) / (here - other))
            weights.append(float(basis.sum()))
        return weights

    def _rule(self, process: Process, start: Node, stop: Node) -> tuple[Array, Array]:
        if self.density is None:
            half = 0.5 * (stop.u - start.u)
            return start.u + half * (1 + _GAUSS_X), half * _GAUSS_W
        end = max(stop.v, start.v - _REACH)
        edges = np.linspace(start.v, end, max(1, math.ceil(abs(end - start.v) / _PANEL)) + 1)
        half = 0.5 * np.diff(edges)[:, None]
        v = (edges[:-1, None] + half * (1 + _GAUSS_X)).ravel()
        return self.clock(process, v), (half * _GAUSS_W).ravel() * self.density(v)


def _process_time(process: Process, v: Array) -> Array:
    return process.time(torch.from_numpy(np.asarray(-2 * v))).numpy()


CHARTS: dict[str, Chart] = {
    chart.name: chart
    for chart in (
        Chart("ddim", "eps", lambda a, s: a, lambda p, v: np.exp(v)),
        Chart("dpm", "eps", lambda a, s: a, lambda p, v: v, np.exp),
        Chart("dpm++", "x0", lambda a, s: s, lambda p, v: -v, lambda v: -np.exp(-v)),
        Chart("deis", "eps", lambda a, s: a, _process_time, np.exp),
        Chart("flow", "flow", lambda a, s: a + s, lambda p, v: 1 / (1 + np.exp(-v))),
        Chart("trig", "v", math.hypot, lambda p, v: np.arctan(np.exp(v))),
        Chart("dpm3", "v", math.hypot, lambda p, v: v, lambda v: 0.5 / np.cosh(v)),
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
