"""The evidence lower bound of a denoiser, without a path: an integral over noise levels (Kingma et al. 2021).

With x_t = alpha x + sigma eps at the level v = log(sigma/alpha), and the states at the two ends as in likelihood.py,

    log p(x) >= - KL(q(x_1 | x) || p(x_1)) - int_{v_0}^{v_1} E |x - D(x_t, t)|^2 e^(-2 v) dv + end

The end is E log P(x | x_0) for data in bins, P(x | x_0) proportional to q(x_0 | x) over the values that an element can
have. For densities, and with uniform dequantisation, it is - d/2 log(2 pi e sigma_0^2) + d log alpha_0, the entropy of
the noise that x_0 has: the bound is then on E log p of data with the noise of t_min. For the exact denoiser nothing is
lost between the ends: the derivative of the divergence by the level is the error of the denoiser (Guo, Shamai & Verdu
2005; Kong et al. 2023).
One sample's bound needs hundreds of levels for a nat; the mean over a data set does with few.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pfode import noise
from pfode.denoiser import Denoiser
from pfode.errors import integer
from pfode.flow.dequantise import dequantised
from pfode.flow.likelihood import Likelihood, joined, law_at
from pfode.flow.prior import moments_for
from pfode.flow.subject import Subject, subject
from pfode.plans.executor import check_output

__all__ = ["elbo"]

HIGHEST = 7.0  # level at which the integral ends where t_max has alpha = 0: what is beyond is below 1e-6 per element
_LEVELS = 2**41  # draw numbers of the noise, far from those of plans


def elbo(
    denoiser: Denoiser,
    x: Tensor,
    *,
    levels: int = 64,
    seeds: Sequence[int] | None = None,
    end: str = "truncated",
    bins: int | None = None,
    prior: str = "auto",
    label: Any = None,
    guidance: float | None = None,
    batch: int | None = None,
    throw: bool = True,
    **cond: Any,
) -> Likelihood:
    """A lower bound of log p(x) of every sample, by denoising it at stratified noise levels.

    The noise depends on a sample's seed alone: bounds under several labels share it, and differ by less than each errs.
    Gradients flow where the caller has them enabled: minus the mean is the loss of variational diffusion models.

    Args:
        x: data as `sample` gives them, shape (n, ...), pictures in [-1, 1].
        levels: denoiser calls per sample, two in each of levels / 2 strata, from which `stderr` is made.
        seeds, bins, prior, label, guidance, batch, throw, cond: as for `log_likelihood`.
        end: "truncated": the bound above, of data in bins; "uniform": of the density of x + w (u - 1/2), plus d log w;
            "auto" and "none" as for `log_likelihood`.

    Returns:
        a `Likelihood` whose parts are "prior", "diffusion" and "end"; z is x at t_max, with its noise.

    Raises:
        UsageError: anything that cannot be carried out as written. NumericalError: with throw.
    """
    of = subject(
        denoiser, x, seeds=seeds, end=end, bins=bins, label=label, guidance=guidance, batch=batch, cond=cond
    )  # fmt: skip
    moments_for(of.denoiser, prior)
    strata = integer("levels", levels, 2, 2**20) // 2
    return joined([_batch(part, strata, prior) for part in of.batches()], of, throw)


def _batch(of: Subject, strata: int, kind: str) -> Likelihood:
    process, n, d = of.denoiser.process, len(of.x), of.dimensions
    ending = _end(of)
    if of.end == "uniform":
        of = replace(of, x=dequantised(of.x, process, "uniform", of.width, of.seeds)[0] / process.alpha(process.t_min))
    x = of.x
    low, high = (-0.5 * process.log_snr(t) for t in (process.t_min, process.t_max))
    last = min(high, HIGHEST)
    total, variance = x.new_zeros(n), x.new_zeros(n)
    for k in range(strata):
        two = [_level(of, 2 * k + j, low + (last - low) * k / strata, (last - low) / strata) for j in (0, 1)]
        total = total + 0.5 * (last - low) / strata * (two[0] + two[1])
        variance = variance + (0.5 * (last - low) / strata * (two[0] - two[1]).detach()) ** 2
    t = min(process.time(-2 * last), process.t_max)
    law, calls = law_at(of, kind, t)
    eps = noise.normal(of.seeds, _LEVELS, x.shape[1:], x.dtype).to(x)
    state = process.alpha(t) * x + process.sigma(t) * eps
    chance = -0.5 * eps.square().flatten(1).sum(1) - d * (math.log(process.sigma(t)) + 0.5 * math.log(2 * math.pi))
    parts = {"prior": law.log_prob(state) - chance, "diffusion": -total, "end": ending}
    nats = sum(parts.values(), x.new_zeros(n))
    lost = (~torch.isfinite(nats.detach())).nonzero().flatten().tolist()
    each = torch.full((n,), 2 * strata + calls, dtype=torch.int64, device="cpu")
    return Likelihood(
        nats=nats, stderr=variance.sqrt(), parts=parts, z=state, nfe=each,
        products=torch.zeros_like(each), steps=torch.zeros_like(each),
        failed=dict.fromkeys(lost, "its value is not finite"), end=of.end, width=of.width, prior=law.name,
        plain_kl=law.plain_kl,
    )  # fmt: skip


def _level(of: Subject, draw: int, left: float, width: float) -> Tensor:
    """|x - D|^2 e^(-2 v) at a level v of its own for every sample, uniform in [left, left + width], shape (n,)."""
    process, x = of.denoiser.process, of.x
    v = left + width * torch.special.ndtr(noise.normal(of.seeds, _LEVELS + 1 + 2 * draw, (), torch.float64))
    t = process.time(-2 * v).clamp(process.t_min, process.t_max)
    alpha, sigma, shape = process.alpha(t), process.sigma(t), (-1, *[1] * (x.ndim - 1))
    eps = noise.normal(of.seeds, _LEVELS + 2 + 2 * draw, x.shape[1:], torch.float64)
    state = alpha.to(x).view(shape) * x + (sigma.view(shape) * eps).to(x)
    error = x - check_output(of.denoiser(state.clone(), t.to(x), **of.cond), state)
    return error.square().flatten(1).sum(1) * torch.exp(-2 * v).to(x)


def _end(of: Subject) -> Tensor:
    """The last part: E log P(x | x_0) for data in bins, minus an entropy for densities, shape (n,)."""
    process, x, d = of.denoiser.process, of.x, of.dimensions
    alpha, sigma = process.alpha(process.t_min), process.sigma(process.t_min)
    if of.end != "truncated":
        wide = math.log(of.width) if of.width else 0.0
        return x.new_full((len(x),), d * (wide + math.log(alpha / sigma) - 0.5 * math.log(2 * math.pi * math.e)))
    eps = noise.normal(of.seeds, _LEVELS - 1, x.shape[1:], torch.float64).to(x)
    apart = alpha * of.width / sigma  # of the values, in units of the noise
    reach = min(math.ceil(12 / apart) + 1, round(2 / of.width))  # values beyond have no share
    others = []
    for k in range(-reach, reach + 1):
        value = x + k * of.width
        known = (value > -1 - 0.5 * of.width) & (value < 1 + 0.5 * of.width)
        others.append(torch.where(known | (k == 0), -0.5 * (eps - k * apart).square(), -math.inf))
    share = -0.5 * eps.square() - torch.logsumexp(torch.stack(others), 0)
    return share.flatten(1).sum(1)
