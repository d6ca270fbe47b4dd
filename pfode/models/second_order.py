"""Second-order neural ODEs (Norcliffe et al. 2020): positions whose acceleration is a network."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pfode.errors import UsageError
from pfode.models.gaussian import Forecast
from pfode.models.series.data import Series
from pfode.ode.solve import solve

__all__ = ["SecondOrderODE"]


class SecondOrderODE(torch.nn.Module):
    """x'' = f(x, x'), from positions alone: the velocity at the start is a function of the position there.

    Where a first-order ODE in the same space cannot let trajectories cross, this one does: it learns oscillations from
    what was seen of them.

    Args:
        acceleration: (position, velocity) joined, shape (..., 2 d) -> (..., d).
        velocity: position -> velocity at the start, (..., d) -> (..., d); None: learnt, the same for all.
        size: d, where `velocity` is None.
        options: of `pfode.solve`.

    Raises:
        UsageError: neither velocity nor size.
    """

    def __init__(
        self,
        acceleration: Callable[[Tensor], Tensor],
        velocity: Callable[[Tensor], Tensor] | None = None,
        size: int | None = None,
        **options: Any,
    ):
        super().__init__()
        if velocity is None and size is None:
            raise UsageError("velocity: need a function of the position, or the size of one that is learnt", "size=1")
        self.acceleration, self.velocity, self.options = acceleration, velocity, options
        self.start = (
            torch.nn.Parameter(torch.zeros(size, device=torch.get_default_device()))
            if velocity is None and size is not None
            else None
        )

    def field(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(x', x'') at (x, x')."""
        x, v = state
        return v, self.acceleration(torch.cat([x, v], -1))

    def trajectory(self, x0: Tensor, ts: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
        """Positions and velocities at times, shape (times, *x0.shape).

        Args:
            x0: positions at ts[0], shape (batch, d).
            ts: times, shape (times,), or of each sample, (batch, times), with steps of its own.
        """
        v0 = self.start.expand_as(x0) if self.velocity is None and self.start is not None else self.velocity(x0)  # type: ignore[misc]
        params = [p for p in self.parameters() if p.requires_grad]
        own = {"batch": "per-sample"} if isinstance(ts, Tensor) and ts.ndim > 1 else {}
        return solve(self.field, (x0, v0), ts, params=params, **{**self.options, **own}).ys

    def forward(self, x0: Tensor, ts: Tensor | Sequence[float]) -> Tensor:
        """Positions at times, shape (times, *x0.shape)."""
        return self.trajectory(x0, ts)[0]

    def errors(self, series: Series) -> tuple[Tensor, Tensor]:
        """Errors of the positions, and where there was one to compare with, like series.x.

        Raises:
            UsageError: a series whose first values are missing: a trajectory begins there.
        """
        missing = torch.isnan(series.x[:, 0])
        if bool(missing.any()):
            i, c = missing.nonzero()[0].tolist()
            raise UsageError(f"series {series.ids[i]!r}: {series.channels[c]!r} is missing at its first time")
        last = series.lengths[:, None].clamp(min=1) - 1
        ts = torch.where(torch.isnan(series.t), series.t.gather(1, last), series.t)
        x = self(series.x[:, 0], ts).movedim(0, 1)
        return torch.where(series.observed, series.x - x, 0.0), series.observed

    def loss(self, series: Series, generator: torch.Generator, progress: float) -> Tensor:
        """The mean square error of the positions."""
        error, seen = self.errors(series)
        return error.square().sum() / seen.sum().clamp(min=1)

    @torch.no_grad()
    def metrics(self, series: Series) -> dict[str, float]:
        """The mean square error of the positions."""
        error, seen = self.errors(series)
        return {"mse": float(error.square().sum() / seen.sum().clamp(min=1))}

    def forecast(self, series: Series, ts: Tensor) -> Forecast:
        """Positions at times from the first one of the series on; the spread is that of the errors so far."""
        ts = ts.expand(len(series), -1) if ts.ndim == 1 else ts
        start = torch.cat([series.t[:, :1], ts.to(series.t)], 1)
        mean = self(series.x[:, 0], start).movedim(0, 1)[:, 1:]
        error, seen = self.errors(series)
        spread = (error.square().sum((0, 1)) / seen.sum((0, 1)).clamp(min=1)).sqrt()
        return Forecast(ts, mean, spread.expand_as(mean))
