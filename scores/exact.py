"""Exact denoisers in closed form, on which solvers are tested and measured.

    D(x, t) = E[x_0 | x_t = x], the posterior mean where x_0 is Gaussian, from a mixture of Gaussians, or one of
    finitely many points with a Gaussian kernel around each.

All work on any process. States have the shape (batch, *shape); they are flattened to (batch, d) and computed in their
own dtype.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from pfode import noise
from pfode.denoiser import digest
from pfode.errors import UsageError
from pfode.process import EDM, Process, float64, need_process

__all__ = ["Empirical", "Gaussian", "GaussianMixture"]


class GaussianMixture:
    """Data x_0 ~ sum_k w_k N(mu_k, C_k): the exact denoiser, score, density and samples of a Gaussian mixture.

    Args:
        means: mu, shape (k, d), or (k, *shape).
        std: standard deviations: a number, (k,) for isotropic components, or (k, d) for diagonal ones.
        cov: instead of std: covariances, (d, d) for all components or (k, d, d).
        weights: w, shape (k,), positive; they are normalised, and equal when None.
        process: the noise process; `EDM()` when None.

    Raises:
        UsageError: shapes that do not fit, or a covariance that is not positive definite.
    """

    labels = None

    def __init__(
        self,
        means: Tensor | list[Any],
        std: float | Tensor | None = None,
        weights: Tensor | list[float] | None = None,
        process: Process | None = None,
        *,
        cov: Tensor | list[Any] | None = None,
    ):
        mu = float64(means)
        if mu.ndim < 2 or 0 in mu.shape or not mu.isfinite().all():
            got = f"{tuple(mu.shape)}" + ("" if mu.isfinite().all() else " with values that are not finite")
            raise UsageError(f"means: need shape (k, d), got {got}", "means=[[0.0, 0.0], [1.0, 1.0]]")
        if (std is None) == (cov is None):
            raise UsageError("need either std or cov", "std=0.3")
        self.process = EDM() if process is None else need_process(process)
        self.shape = tuple(mu.shape[1:])
        self.means = mu.flatten(1)  # (k, d)
        k, d = self.means.shape
        w = torch.ones(k, dtype=torch.float64, device="cpu") if weights is None else float64(weights)
        if w.shape != (k,) or not ((w > 0) & torch.isfinite(w)).all():
            raise UsageError(f"weights: need {k} positive numbers, got {w.tolist()}")
        self.weights = w / w.sum()
        variances, self.basis = _spectrum(std, cov, k, d)
        self.variances = variances.expand(k, d)  # eigenvalues of C_k
        if not ((self.variances > 0) & self.variances.isfinite()).all():
            raise UsageError("covariance: not positive definite, or not finite", "std=0.3")

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of means, variances, weights and the process."""
        parts = {"means": self.means, "variances": self.variances, "weights": self.weights}
        return digest(
            f"{type(self).__name__} {self.process}", parts | ({} if self.basis is None else {"basis": self.basis})
        )

    @functools.cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean, of the shape of a sample, and covariance (d, d) of the data; their variances alone beyond d = 1024."""
        mean = self.weights @ self.means
        apart = self.means - mean
        if len(mean) > 1024:
            variances = self.variances if self.basis is None else (self.basis**2 @ self.variances[..., None])[..., 0]
            return mean.reshape(self.shape), (self.weights @ (variances + apart**2)).reshape(self.shape)
        if self.basis is None:
            within = torch.diag(self.weights @ self.variances)
        else:
            basis = self.basis.expand(len(apart), -1, -1)
            within = torch.einsum("k,kij,kj,klj->il", self.weights, basis, self.variances, basis)
        return mean.reshape(self.shape), within + (self.weights[:, None] * apart).T @ apart

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """D(x, t) = sum_k p(k | x) (mu_k + alpha C_k (alpha^2 C_k + sigma^2)^-1 (x - alpha mu_k)).

        Args:
            x: (batch, *shape). t: a time of the process, 0-d or (batch,). cond: ignored.
        """
        flat, alpha, sigma = self._flatten(x, t)
        centred, total = self._components(flat, alpha, sigma)
        means = self.means.to(x) + self._rotate(alpha * self.variances.to(x) / total * centred, back=True)
        p = self._responsibility(centred, total)
        return (p[..., None] * means).sum(1).reshape(x.shape)

    def score(self, x: Tensor, t: float | Tensor) -> Tensor:
        """grad log p_t(x) = -sum_k p(k | x) (alpha^2 C_k + sigma^2)^-1 (x - alpha mu_k), of the shape of x."""
        centred, total = self._components(*self._flatten(x, t))
        p = self._responsibility(centred, total)
        return -(p[..., None] * self._rotate(centred / total, back=True)).sum(1).reshape(x.shape)

    def log_prob(self, x: Tensor, t: float | Tensor | None = None) -> Tensor:
        """log p_t(x) in nats, (batch,); the density of the data when t is None."""
        flat, alpha, sigma = self._flatten(x, self.process.t_data if t is None else t)
        return torch.logsumexp(self._log_joint(*self._components(flat, alpha, sigma)), 1)

    def modes(self, x: Tensor) -> Tensor:
        """The probability of each component given data x, (batch, k)."""
        return torch.softmax(self._log_joint(*self._components(*self._flatten(x, self.process.t_data))), 1)

    def sample(self, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """n samples of the data, (n, *shape); sample i depends on seed + i alone."""
        seeds = [seed + i for i in range(n)]
        z = noise.normal(seeds, 0, self.means.shape[1:], torch.float64)
        pick = torch.special.ndtr(noise.normal(seeds, 1, (), torch.float64))
        k = torch.searchsorted(self.weights.cumsum(0), pick).clamp_max(len(self.weights) - 1)
        scaled = self.variances[k].sqrt() * z
        if self.basis is not None:
            scaled = (self.basis[k if len(self.basis) > 1 else 0 * k] @ scaled[..., None])[..., 0]
        return (self.means[k] + scaled).reshape(n, *self.shape).to(dtype)

    def _flatten(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x as (batch, d), and alpha and sigma at t as (batch or 1, 1, 1).

        Raises:
            UsageError: samples of another shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise UsageError(f"x: need shape (batch, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, 1, 1)
        return x.flatten(1), self.process.alpha(t), self.process.sigma(t)

    def _components(self, flat: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """x - alpha mu_k in the eigenbasis and its variances, both (batch, k, d)."""
        centred = self._rotate(flat[:, None] - alpha * self.means.to(flat), back=False)
        return centred, alpha**2 * self.variances.to(flat) + sigma**2

    def _rotate(self, y: Tensor, back: bool) -> Tensor:
        """Into the eigenbasis of each component, or back from it: y is (batch, k, d)."""
        if self.basis is None:
            return y
        return torch.einsum("kij,bkj->bki" if back else "kji,bkj->bki", self.basis.to(y).expand(y.shape[1], -1, -1), y)

    def _log_joint(self, centred: Tensor, total: Tensor) -> Tensor:
        """log(w_k N(x; alpha mu_k, alpha^2 C_k + sigma^2)), (batch, k)."""
        d = centred.shape[-1]
        quadratic = (centred**2 / total + torch.log(total)).sum(-1)
        return torch.log(self.weights.to(centred)) - 0.5 * (quadratic + d * math.log(2 * math.pi))

    def _responsibility(self, centred: Tensor, total: Tensor) -> Tensor:
        """p(k | x), (batch, k)."""
        return torch.softmax(self._log_joint(centred, total), 1)


def _spectrum(std: Any, cov: Any, k: int, d: int) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues, broadcastable to (k, d), and eigenvectors (1 or k, d, d), None for the standard basis."""
    if std is not None:
        value = float64(std)
        if value.shape not in ((), (k,), (k, d)) or not (value > 0).all():
            shapes = f"a positive number, shape ({k},) or ({k}, {d})"
            raise UsageError(f"std: need {shapes}, got {tuple(value.shape)}", "std=0.3")
        return (value if value.ndim == 2 else value.reshape(-1, 1)) ** 2, None
    value = float64(cov)
    if value.shape not in ((d, d), (k, d, d)) or not torch.allclose(value, value.mT):
        shapes = f"symmetric, of shape ({d}, {d}) or ({k}, {d}, {d})"
        raise UsageError(f"cov: need it {shapes}, got {tuple(value.shape)}", "std= takes diagonal ones")
    return torch.linalg.eigh(value.reshape(-1, d, d))


class Gaussian(GaussianMixture):
    """Data x_0 ~ N(mean, cov), with the exact solution of its PF-ODE.

    Args:
        mean: (d,), or of the shape of one sample.
        cov: a variance, variances (d,), or a covariance (d, d).
        process: the noise process; `EDM()` when None.
    """

    def __init__(
        self, mean: Tensor | list[float], cov: float | Tensor | list[Any] = 1.0, process: Process | None = None
    ):
        mu = float64(mean)
        value = float64(cov)
        if value.ndim < 2:
            super().__init__(mu[None], std=value.sqrt().expand(1, mu.numel()), process=process)
        else:
            super().__init__(mu[None], cov=value, process=process)

    def flow(self, x: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        """The state at time s of the PF-ODE's solution that is x at time t.

        Along an eigendirection of variance c, with V(t) = alpha_t^2 c + sigma_t^2,
        x_s = alpha_s mu + sqrt(V(s)/V(t)) (x_t - alpha_t mu).
        """
        flat, alpha_t, sigma_t = self._flatten(x, t)
        _, alpha_s, sigma_s = self._flatten(x, s)
        centred, total = self._components(flat, alpha_t, sigma_t)
        growth = torch.sqrt((alpha_s**2 * self.variances.to(x) + sigma_s**2) / total)
        return (alpha_s * self.means.to(x) + self._rotate(growth * centred, back=True))[:, 0].reshape(x.shape)


class Empirical(GaussianMixture):
    """The ideal denoiser of a finite data set: data are its points plus Gaussian noise of a small standard deviation.

    The flow of a narrow kernel collapses onto the points; a width of 0.05 to 0.1 of data in [-1, 1] keeps it from that.

    Args:
        points: (n, *shape).
        std: of the kernel around each point.
        process: the noise process; `EDM()` when None.
    """

    def __init__(self, points: Tensor, std: float = 0.1, process: Process | None = None):
        super().__init__(points, std=std, process=process)

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """D(x, t) as in `GaussianMixture`, by two matrix products instead of an array (batch, n, d)."""
        flat, alpha, closeness, total = self._closeness(x, t)
        mean = torch.softmax(closeness, 1) @ self.means.to(x)
        return (mean + alpha * self.variances[0, 0].to(x) / total * (flat - alpha * mean)).reshape(x.shape)

    def log_prob(self, x: Tensor, t: float | Tensor | None = None) -> Tensor:
        """log p_t(x) in nats, (batch,); the density of the data when t is None."""
        flat, _, closeness, total = self._closeness(x, self.process.t_data if t is None else t)
        k, d = self.means.shape
        square = 0.5 * (flat**2).sum(1) / total[:, 0] + 0.5 * d * torch.log(2 * math.pi * total[:, 0]) + math.log(k)
        return torch.logsumexp(closeness, 1) - square

    def modes(self, x: Tensor) -> Tensor:
        """The probability of each point given data x, (batch, n)."""
        return torch.softmax(self._closeness(x, self.process.t_data)[2], 1)

    def _closeness(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x as (batch, d), alpha, the log joint density up to a constant per sample, (batch, n), and the variance."""
        flat, alpha, sigma = self._flatten(x, t)
        alpha, sigma, points = alpha[:, 0], sigma[:, 0], self.means.to(x)
        total = alpha**2 * self.variances[0, 0].to(x) + sigma**2
        return flat, alpha, (alpha * (flat @ points.T) - 0.5 * alpha**2 * (points**2).sum(1)) / total, total
