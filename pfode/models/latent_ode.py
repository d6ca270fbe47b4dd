"""Latent ODEs (Chen et al. 2018; Rubanova et al. 2019): a distribution of initial states, from which an ODE leads to
all values at all times.

Every series is decoded at its own times, with its own steps: its values come from the dense output of a solve, so that
a batch costs what its series cost, not what the union of their times does.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pfode.errors import UsageError, integer, number, unknown
from pfode.models.gaussian import Forecast, divergence, log_density
from pfode.models.ode_rnn import ODERNN
from pfode.models.series.data import Series
from pfode.ode.solve import solve

__all__ = ["LatentODE"]

ENCODERS = ("ode-rnn", "rnn")
LIKELIHOODS = ("gaussian", "poisson")


class LatentODE(torch.nn.Module):
    """z(t0) ~ q(z | series), dz/dt = speed f(z), x(t) ~ N(g(z(t)), noise^2); trained by the evidence's lower bound.

    The encoder goes through the series from its end to t0. With likelihood="poisson" the times of a channel's
    observations, too, are explained: as those of a Poisson process whose intensity is a function of z.

    Args:
        channels: of the series.
        latent: the size of z. hidden: of the encoder's state. width: of the networks in between.
        encoder: "ode-rnn", or "rnn", whose state does not move between the observations but is given their times.
        noise: standard deviation of an observation, in the units of the series; None: learnt, for each channel.
        likelihood: "gaussian" or "poisson".
        kl: the share of the training within which the divergence's weight rises from 0 to 1.
        grow: the share of the training within which what is to be explained grows from the first fifth of the time to
            all of it: solutions are learnt from their beginnings on, or oscillations are not learnt at all.
        t0: where z begins, at or before the first time of any series.
        speed: dz/dt is this many times what its network says, so that of times from 0 to 1 it learns oscillations soon.
        context: the encoder sees what was observed up to this time, to learn to extrapolate; None: everything.
        method, rtol, atol: of `solve`, with steps of each sample.

    Raises:
        UsageError: unknown names, numbers out of range.
    """

    def __init__(
        self,
        channels: int,
        *,
        latent: int = 8,
        hidden: int = 32,
        width: int = 64,
        encoder: str = "ode-rnn",
        noise: float | None = None,
        likelihood: str = "gaussian",
        kl: float = 0.5,
        grow: float = 0.5,
        t0: float = 0.0,
        speed: float = 10.0,
        context: float | None = None,
        method: str = "dopri5",
        rtol: float = 1e-3,
        atol: float = 1e-4,
    ):
        super().__init__()
        if encoder not in ENCODERS:
            raise unknown("encoder", encoder, ENCODERS)
        if likelihood not in LIKELIHOODS:
            raise unknown("likelihood", likelihood, LIKELIHOODS)
        self.channels, self.latent = integer("channels", channels, 1), integer("latent", latent, 1)
        self.kl, self.t0, self.context = number("kl", kl, 0.0, 1.0), number("t0", t0), context
        self.speed, self.grow = number("speed", speed, 1e-6), number("grow", grow, 0.0, 1.0)
        self.options: Any = {"method": method, "rtol": rtol, "atol": atol, "batch": "per-sample"}
        self.timed = encoder == "rnn"  # a state that does not move must be told the time
        self.encoder = ODERNN(channels + self.timed, 2 * latent, hidden=hidden, width=width)
        if self.timed:
            self.encoder.recurrence.field = _Still()
        self.field = _network(latent, latent, width)
        self.decoder = _network(latent, channels, width)
        self.intensity = _network(latent, channels, width) if likelihood == "poisson" else None
        start = math.log(0.1 if noise is None else number("noise", noise, 1e-6))
        level = torch.full((channels,), start, device=torch.get_default_device())  # as the networks lie
        self.log_noise = torch.nn.Parameter(level, requires_grad=noise is None)

    def encode(self, series: Series) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation of z at t0, shape (series, latent).

        Raises:
            UsageError: a series that begins before t0.
        """
        series = series if self.context is None else series.until(self.context)
        early = series.t < self.t0 - 1e-6
        if bool(early.any()):
            i, j = early.nonzero()[0].tolist()
            raise UsageError(f"series {series.ids[i]!r} begins at {float(series.t[i, j]):g}, before t0 = {self.t0:g}")
        start, x = series.t.new_full((len(series), 1), self.t0), series.x
        if self.timed:
            x = torch.cat([series.t[..., None] - self.t0, x], -1)
        x = torch.cat([torch.full_like(x[:, :1], math.nan), x], 1)  # at t0 itself nothing is observed
        states = self.encoder.states(torch.cat([start, series.t], 1), x, backwards=True)
        mean, log_std = self.encoder.readout(states[0]).chunk(2, -1)
        return mean, log_std.clamp(-6.0, 3.0)

    def decode(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Values, and of a Poisson process its intensities and their integrals from t0 on: (series, times, channels).

        Args:
            z: at t0, shape (series, latent). t: times, rising, shape (series, times); NaN, of padding, are taken as the
                last one.
        """
        last = (~torch.isnan(t)).sum(1, keepdim=True).clamp(min=1) - 1
        t = torch.where(torch.isnan(t), t.gather(1, last), t).nan_to_num(self.t0)
        ts = torch.cat([t.new_full((len(t), 1), self.t0), t.clamp(min=self.t0)], 1)
        if self.intensity is None:
            states = solve(
                lambda _, z: self.speed * self.field(z), z, ts, params=tuple(self.field.parameters()), **self.options
            )
            return self.decoder(states.ys[1:]).movedim(0, 1), None, None
        intensity = self.intensity
        both = solve(
            lambda _, state: (self.speed * self.field(state[0]), intensity(state[0]).exp()),
            (z, z.new_zeros(len(z), self.channels)),
            ts,
            params=(*self.field.parameters(), *intensity.parameters()),
            **self.options,
        ).ys
        path, total = (part[1:].movedim(0, 1) for part in both)
        return self.decoder(path), intensity(path).exp(), total

    def loss(self, series: Series, generator: torch.Generator, progress: float) -> Tensor:
        """The negative lower bound of the evidence by one draw of z, for each observation."""
        mean, log_std = self.encode(series)
        drawn = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=generator.device).to(mean.device)
        if progress < self.grow:
            last = float(series.t.nan_to_num(nan=-math.inf).max())
            series = series.until(self.t0 + (last - self.t0) * (0.2 + 0.8 * progress / self.grow))
        likelihood = self.log_likelihood(series, mean + log_std.exp() * drawn)
        kl = divergence(mean, log_std, torch.zeros_like(mean), torch.zeros_like(mean)).sum()
        weight = 1.0 if self.kl == 0 else min(1.0, progress / self.kl)
        return (weight * kl - likelihood.sum()) / series.observed.sum().clamp(min=1)

    def log_likelihood(self, series: Series, z: Tensor) -> Tensor:
        """log p(series | z) of each, shape (series,)."""
        found, intensity, total = self.decode(z, series.t)
        seen = series.observed
        density = log_density(torch.where(seen, series.x, 0.0), found, self.log_noise)
        if intensity is not None and total is not None:
            density = density + intensity.log()
        terms = torch.where(seen, density, 0.0).sum((1, 2))
        return terms if total is None else terms - total[:, -1].sum(-1)

    @torch.no_grad()
    def metrics(self, series: Series) -> dict[str, float]:
        """Mean square error of the values that the mean of z leads to; after `context` alone if the model has one."""
        mean, _ = self.encode(series)
        found, *_ = self.decode(mean, series.t)
        seen = series.observed
        error = torch.where(seen, series.x - found, 0.0).square()
        figures = {"mse": float(error.sum() / seen.sum().clamp(min=1))}
        if self.context is not None:
            later = seen & (series.t > self.context)[..., None]
            figures["extrapolation_mse"] = float(torch.where(later, error, 0.0).sum() / later.sum().clamp(min=1))
        return figures

    def forecast(self, series: Series, ts: Tensor, samples: int = 64, seed: int = 0) -> Forecast:
        """Values at some times, between the observations or beyond them, with their standard deviation: that of the
        paths of several z, and of an observation.

        Args:
            series: what was observed. ts: times, rising, shape (times,) or (series, times). samples: draws of z.
            seed: of these.

        Raises:
            UsageError: times before t0, or not as many rows as series.
        """
        ts = ts.expand(len(series), -1) if ts.ndim == 1 else ts
        if len(ts) != len(series) or bool((ts < self.t0).any()):
            raise UsageError(f"ts: need {len(series)} rows of times from t0 = {self.t0:g} on, got {tuple(ts.shape)}")
        mean, log_std = self.encode(series)
        shape = (integer("samples", samples, 1), *mean.shape)
        drawn = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=mean.dtype, device="cpu")
        z = (mean + log_std.exp() * drawn.to(mean.device)).flatten(0, 1)
        paths, *_ = self.decode(z, ts.repeat(samples, 1).to(mean))
        paths = paths.unflatten(0, shape[:2])
        spread = paths.var(0, unbiased=False) + torch.exp(2 * self.log_noise)
        return Forecast(ts, paths.mean(0), spread.sqrt())


class _Still(torch.nn.Module):
    """A state that does not move."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)


def _network(inputs: int, outputs: int, width: int) -> torch.nn.Sequential:
    layers = torch.nn.Linear(inputs, width), torch.nn.Tanh(), torch.nn.Linear(width, outputs)
    return torch.nn.Sequential(*layers)
