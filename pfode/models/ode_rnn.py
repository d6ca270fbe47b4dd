"""Recurrent networks whose state moves between the observations: ODE-RNN (Rubanova et al. 2019) and GRU-ODE-Bayes
(De Brouwer et al. 2019).

Every series has its own times. From one observation to the next s goes from 0 to 1 in all of them, and the field is
multiplied by how long that takes: a batch is one solve, and where a series has no more observations nothing moves.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pfode.errors import UsageError, integer
from pfode.models.gaussian import Forecast, divergence, log_density, merged
from pfode.models.series.data import Series
from pfode.models.tasks import Task
from pfode.ode.solve import solve

__all__ = ["GRUODE", "ODERNN", "GRUODEBayes", "Recurrence"]


class Recurrence(torch.nn.Module):
    """A hidden state that follows dh/dt = field(h) between observations and jumps at them.

    Args:
        field: h of shape (batch, hidden) -> dh/dt.
        hidden: its size.
        method: of `solve`. steps: how many it makes from one observation to the next.
    """

    def __init__(self, field: torch.nn.Module, hidden: int, method: str = "midpoint", steps: int = 1):
        super().__init__()
        self.field, self.hidden, self.method, self.steps = field, hidden, method, integer("steps", steps, 1)

    def forward(self, t: Tensor, jump: Callable[[int, Tensor], Tensor], backwards: bool = False) -> Tensor:
        """The states after each observation.

        Args:
            t: times, shape (batch, length), NaN where padded.
            jump: (index of the time, state) -> state after the observations there.
            backwards: from the last time to the first.

        Returns:
            Shape (length, batch, hidden), in the order of time.
        """
        last = (~torch.isnan(t)).sum(1, keepdim=True).clamp(min=1) - 1
        gaps = torch.where(torch.isnan(t), t.gather(1, last), t).diff(dim=1)
        h, states = t.new_zeros(len(t), self.hidden), []
        places = range(t.shape[1])
        for i in reversed(places) if backwards else places:
            if states:
                gap = -gaps[:, i] if backwards else gaps[:, i - 1]
                h = self.move(h, gap)
            h = jump(i, h)
            states.append(h)
        return torch.stack(states[::-1] if backwards else states)

    def move(self, h: Tensor, gap: Tensor) -> Tensor:
        """The state some time later (or, negative, earlier) of each sample, shape (batch,)."""
        options: Any = {"method": self.method, "step_size": 1 / self.steps, "adjoint": "direct"}
        return solve(self._slope, h, (0.0, 1.0), args=(gap[:, None],), **options).ys[-1]

    def _slope(self, s: Tensor, h: Tensor, gap: Tensor) -> Tensor:
        return self.field(h) * gap


class _Observe(torch.nn.Module):
    """A GRU cell that is given values and where there are any; without one the state stays."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.cell = torch.nn.GRUCell(2 * channels, hidden)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        missing = torch.isnan(x)
        seen = (~missing).to(h.dtype)
        after = self.cell(torch.cat([torch.where(missing, 0.0, x), seen], -1), h)
        return torch.where(missing.all(-1, keepdim=True), h, after)


class ODERNN(Task):
    """A recurrent network whose state follows an ODE between observations.

    Args:
        channels: of the series. outputs: classes, or numbers to predict.
        hidden, width: size of the state, and of the field's network.
        online: whether it predicts at each of a series' times.
        method, steps: how the ODE is solved from one observation to the next.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        hidden: int = 32,
        width: int = 64,
        online: bool = False,
        method: str = "midpoint",
        steps: int = 1,
    ):
        super().__init__(outputs, online)
        field = torch.nn.Sequential(torch.nn.Linear(hidden, width), torch.nn.Tanh(), torch.nn.Linear(width, hidden))
        self.recurrence = Recurrence(field, hidden, method, steps)
        self.observe = _Observe(integer("channels", channels, 1), hidden)
        self.readout = torch.nn.Linear(hidden, outputs)

    def states(self, t: Tensor, x: Tensor, backwards: bool = False) -> Tensor:
        """The states after each observation, shape (length, batch, hidden)."""
        return self.recurrence(t, lambda i, h: self.observe(x[:, i], h), backwards)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Predictions, shape (batch, outputs), or (batch, length, outputs) of an online model."""
        states = self.states(t, x)
        return self.readout(states.movedim(0, 1) if self.online else states[-1])


class GRUODE(torch.nn.Module):
    """dh/dt = (1 - z) (g - h): the GRU's update as a flow, which keeps h within [-1, 1] (De Brouwer et al. 2019).

    Args:
        hidden: the size of h.
    """

    def __init__(self, hidden: int):
        super().__init__()
        self.gates, self.candidate = torch.nn.Linear(hidden, 2 * hidden), torch.nn.Linear(hidden, hidden)

    def forward(self, h: Tensor) -> Tensor:
        r, z = torch.sigmoid(self.gates(h)).chunk(2, -1)
        return (1 - z) * (torch.tanh(self.candidate(r * h)) - h)


class GRUODEBayes(torch.nn.Module):
    """A Gaussian of the values at any time, which observations change: it filters, and forecasts with an uncertainty.

    The loss is the negative log density of each observation before the model has seen it, plus `mixing` times the
    divergence of what it says after from Bayes' rule with observations of noise `noise`.

    Args:
        channels: of the series.
        hidden, width: size of the state, and of the network from it to mean and standard deviation.
        mixing, noise: see above.
        method, steps: how the ODE is solved from one observation to the next.
    """

    def __init__(
        self,
        channels: int,
        *,
        hidden: int = 32,
        width: int = 32,
        mixing: float = 1.0,
        noise: float = 0.01,
        method: str = "midpoint",
        steps: int = 1,
    ):
        super().__init__()
        self.recurrence = Recurrence(GRUODE(hidden), hidden, method, steps)
        self.head = torch.nn.Sequential(
            torch.nn.Linear(hidden, width),
            torch.nn.ReLU(),
            torch.nn.Linear(width, 2 * integer("channels", channels, 1)),
        )
        self.cell = torch.nn.GRUCell(5 * channels, hidden)
        self.mixing, self.noise = mixing, noise

    def says(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation."""
        mean, log_std = self.head(h).chunk(2, -1)
        return mean, log_std.clamp(-5.0, 5.0)

    def filtered(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means and logarithms of standard deviations before and after the observations: (length, batch, channels)."""
        before = list[Tensor]()

        def jump(i: int, h: Tensor) -> Tensor:
            before.append(h)
            mean, log_std = self.says(h)
            missing = torch.isnan(x[:, i])
            value = torch.where(missing, mean, x[:, i])
            error = (value - mean) * torch.exp(-log_std)
            seen = (~missing).to(h.dtype)
            given = torch.cat([value * seen, mean * seen, log_std * seen, error * seen, seen], -1)
            return torch.where(missing.all(-1, keepdim=True), h, self.cell(given, h))

        after = self.recurrence(t, jump)
        return *self.says(torch.stack(before)), *self.says(after)

    def loss(self, series: Series, generator: torch.Generator, progress: float) -> Tensor:
        """See the class; the mean over the observations."""
        x, seen = series.x.movedim(1, 0), series.observed.movedim(1, 0)
        mean, log_std, mean_after, log_std_after = self.filtered(series.t, series.x)
        value = torch.where(seen, x, 0.0)
        surprise = -log_density(value, mean, log_std)
        # the product of two Gaussians: precisions add up
        precision, gain = torch.exp(-2 * log_std), self.noise**-2
        both = precision + gain
        bayes = (mean * precision + value * gain) / both
        update = divergence(bayes, -0.5 * both.log(), mean_after, log_std_after)
        return torch.where(seen, surprise + self.mixing * update, 0.0).sum() / seen.sum().clamp(min=1)

    @torch.no_grad()
    def metrics(self, series: Series) -> dict[str, float]:
        """Mean square error and mean log density of each observation, before it is seen."""
        x, seen = series.x.movedim(1, 0), series.observed.movedim(1, 0)
        mean, log_std, *_ = self.filtered(series.t, series.x)
        value, count = torch.where(seen, x, 0.0), seen.sum().clamp(min=1)
        error = torch.where(seen, (value - mean).square(), 0.0).sum() / count
        density = torch.where(seen, log_density(value, mean, log_std), 0.0).sum() / count
        return {"mse": float(error), "log_density": float(density)}

    def forecast(self, series: Series, ts: Tensor) -> Forecast:
        """What is expected at some times, of all that was observed up to each of them.

        Args:
            series: what was observed. ts: times, shape (times,) or (series, times).
        """
        ts = ts.expand(len(series), -1) if ts.ndim == 1 else ts
        if len(ts) != len(series):
            raise UsageError(f"ts: {len(ts)} rows of times for {len(series)} series", "one row for each series")
        t, x, place = merged(series.t, series.x, ts)
        *_, mean, log_std = self.filtered(t, x)
        at = place[..., None].expand(-1, -1, x.shape[-1])
        mean, log_std = (part.movedim(0, 1).gather(1, at) for part in (mean, log_std))
        return Forecast(ts, mean, log_std.exp())
