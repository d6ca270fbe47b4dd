"""The PF-ODE of a denoiser in the coordinates of a chart, as a field that `pfode.ode` integrates per sample."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pfode.chart import Array, Chart
from pfode.prediction import PREDICTIONS
from pfode.process import Process

__all__ = ["Equation"]

_APART = 2.0**-9  # of the levels that the slope of a clock is taken from


@dataclass(frozen=True)
class Equation:
    """d(x/m)/du = w(u) n of a chart, between two times of the process.

    Args:
        process: the noise process. chart: the coordinates y = x/m and the clock u.
        low, high: times outside which nothing is asked, however the clock rounds.
    """

    process: Process
    chart: Chart
    low: float
    high: float

    def field(self, x0: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """(u, y) -> dy/du, u of shape (batch,) and y of shape (batch, ...).

        Args:
            x0: the denoiser, of states x and times t of shape (batch,), which lie on the host in float64.
        """

        def slope(u: Tensor, y: Tensor) -> Tensor:
            t, (m, p, q) = self.levels(u, y)
            x = m * y
            return p * x + q * x0(x, t)

        return slope

    def times(self, u: Tensor) -> Tensor:
        """The process's times at values of the clock, on the host."""
        with np.errstate(divide="ignore"):  # alpha = 0
            v = self.chart.level(self.process, u.detach().cpu().double().numpy())
        return self.process.time(torch.from_numpy(-2 * v)).clamp(self.low, self.high)

    def levels(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """t of shape (batch,), and (m, p, q) shaped to go with y: x = m y and dy/du = p x + q D.

        The table of charts is NumPy's: this reads u back.
        """
        t = self.times(u)
        alpha, sigma, v = self.process.alpha(t), self.process.sigma(t), -0.5 * self.process.log_snr(t).numpy()
        m = torch.from_numpy(np.vectorize(self.chart.scale, otypes=[float])(alpha.numpy(), sigma.numpy()))
        w = torch.from_numpy(_weight(self.chart, self.process, v))
        p, q = PREDICTIONS[self.chart.prediction].of_x0(alpha, sigma)
        columns = torch.stack([m, w * p, w * q]).to(y.device, y.dtype).view(3, -1, *[1] * (y.ndim - 1))
        return t, columns


def _weight(chart: Chart, process: Process, v: Array) -> Array:
    """w at these levels; du/dv by differences of order 4, exact but for rounding where the clock is linear in v."""
    if chart.density is None:
        return np.ones_like(v)
    near, far = (chart.clock(process, v + k * _APART) - chart.clock(process, v - k * _APART) for k in (1, 2))
    return chart.density(v) * (12 * _APART) / (8 * near - far)
