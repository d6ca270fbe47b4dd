"""The law of the noisiest states, x_t at t_max, which a likelihood ends with.

Where alpha = 0 there it is N(0, sigma^2), exactly. Else it is taken to be normal,

    moments   N(alpha mu, alpha^2 C + sigma^2), mu and C the mean and the covariance of the data, where they are known
    mean      N(alpha mu, alpha^2 s^2 + sigma^2), mu = D(0, t_max), as x says next to nothing there, under the same
              conditions; s is the standard deviation that the denoiser declares, or 0
    plain     N(0, alpha^2 s^2 + sigma^2), as everyone has it

and what the plain one is off by is stated, tau^2 being its variance and c_i the eigenvalues of C (s^2 for "mean"):

    KL = sum_i (r_i - 1 - log r_i) / 2 + alpha^2 |mu|^2 / (2 tau^2),  r_i = (alpha^2 c_i + sigma^2) / tau^2

It is a mean over samples; the value of one is off by about sqrt(2 KL).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfode.denoiser import Denoiser
from pfode.errors import UsageError, unknown
from pfode.process import float64

__all__ = ["PRIORS", "Prior", "moments_for", "prior_at"]

PRIORS = ("auto", "moments", "mean", "plain")


@dataclass(frozen=True)
class Prior:
    """The law of the states at a time.

    Attributes:
        name: "exact", "moments", "mean" or "plain".
        log_prob: of states (n, ...), shape (n,).
        plain_kl: what N(0, alpha^2 s^2 + sigma^2) is off by, in nats: see this module.
    """

    name: str
    log_prob: Callable[[Tensor], Tensor]
    plain_kl: float = 0.0


def prior_at(denoiser: Denoiser, kind: str, t: float, mean: Callable[[], Tensor], conditional: bool = False) -> Prior:
    """The law of the states of a denoiser's process at time t.

    Args:
        kind: "moments", "mean", "plain", or "auto": moments where the denoiser has them, else its mean.
        mean: gives D(0, t) under the samples' conditions, shape (n, ...); called where it is needed.
        conditional: whether there are conditions: the moments are those of all data, which "auto" then does not take.

    Raises:
        UsageError: an unknown kind, or moments that the denoiser does not have or that do not fit its shape.
    """
    moments = moments_for(denoiser, kind)
    alpha, sigma = denoiser.process.alpha(t), denoiser.process.sigma(t)
    if alpha == 0:
        return Prior("exact", _isotropic(sigma))
    tau = math.hypot(alpha * (getattr(denoiser, "data_std", None) or 0.0), sigma)
    if moments is not None and (kind != "mean" and not (kind == "auto" and conditional)):
        law = _Normal.of(*moments).at(alpha, sigma)
        kl = law.divergence(tau)
        return Prior("plain", _isotropic(tau), kl) if kind == "plain" else Prior("moments", law.log_prob, kl)
    centre = alpha * mean()
    kl = 0.5 * (centre.detach().double() / tau).flatten(1).square().sum(1).mean().item()
    if kind == "plain":
        return Prior("plain", _isotropic(tau), kl)
    return Prior("mean", lambda x: _isotropic(tau)(x - centre), kl)


def moments_for(denoiser: Denoiser, kind: str) -> tuple[Any, Any] | None:
    """The moments of a denoiser's data, None where it has none.

    Raises:
        UsageError: an unknown kind of prior, or "moments" where there are none.
    """
    if kind not in PRIORS:
        raise unknown("prior", kind, PRIORS)
    moments = getattr(denoiser, "moments", None)
    if moments is None and kind == "moments":
        raise UsageError("prior='moments': this denoiser has no moments of its data", "prior='mean', or 'plain'")
    return moments


def _isotropic(std: float) -> Callable[[Tensor], Tensor]:
    def log_prob(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return -0.5 * (flat / std).square().sum(1) - flat.shape[1] * (math.log(std) + 0.5 * math.log(2 * math.pi))

    return log_prob


@dataclass(frozen=True)
class _Normal:
    """N(mean, Q diag(variances) Q^T), mean and variances of shape (d,); Q = 1 where it is None."""

    mean: Tensor
    variances: Tensor
    basis: Tensor | None

    @classmethod
    def of(cls, mean: Any, second: Any) -> "_Normal":
        """From a mean and a covariance (d, d), or variances of the shape of the mean."""
        mu, value = float64(mean), float64(second)
        if value.shape == mu.shape:
            law = cls(mu.flatten(), value.flatten(), None)
        elif value.shape == (mu.numel(), mu.numel()):
            law = cls(mu.flatten(), *torch.linalg.eigh(value))
        else:
            got = f"{tuple(mu.shape)} and {tuple(value.shape)}"
            raise UsageError(f"moments: need a mean and variances of one shape, or a covariance (d, d), got {got}")
        if not (law.mean.isfinite().all() and (law.variances >= -1e-9).all()):
            raise UsageError("moments: need a finite mean and variances of at least 0")
        return law

    def at(self, alpha: float, sigma: float) -> "_Normal":
        return _Normal(alpha * self.mean, alpha**2 * self.variances.clamp(min=0) + sigma**2, self.basis)

    def log_prob(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        if flat.shape[1] != len(self.mean):
            raise UsageError(f"moments: of {len(self.mean)} numbers, for samples of {flat.shape[1]}")
        centred, variances = flat - self.mean.to(flat), self.variances.to(flat)
        if self.basis is not None:
            centred = centred @ self.basis.to(flat)
        return -0.5 * (centred.square() / variances + variances.log() + math.log(2 * math.pi)).sum(1)

    def divergence(self, tau: float) -> float:
        """KL(this || N(0, tau^2))."""
        r = self.variances / tau**2
        return (0.5 * (r - 1 - r.log()).sum() + 0.5 * (self.mean / tau).square().sum()).item()
