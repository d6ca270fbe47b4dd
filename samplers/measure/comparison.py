"""The metrics of a benchmark: what each is called, what it says, and how samples are compared with true ones.

Adding a metric is adding a function to `metrics` and an entry to `DISTRIBUTION`; results, tables and the report follow.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfode.denoiser import Denoiser
from pfode.errors import DenoiserError, PfodeError
from pfode.samplers.measure import metrics
from pfode.samplers.measure.metrics import Estimate, rounded, triple
from pfode.samplers.measure.problem import Problem

__all__ = ["DISTRIBUTION", "END_POINT", "Comparison", "Metric", "compared", "features_of"]

PAIRS = 2048  # samples that metrics of all pairs look at
NEIGHBOURS = 3  # of precision and recall


@dataclass(frozen=True)
class Comparison:
    """Samples beside true ones.

    Args:
        x, truth: shape (n, *shape) and (m, *shape).
        features, true_features: of both, shape (n, d) and (m, d), or the samples themselves.
        denoiser: that the samples were drawn with.
    """

    x: Tensor
    truth: Tensor
    features: Tensor
    true_features: Tensor
    denoiser: Denoiser

    @functools.cached_property
    def precision_recall(self) -> tuple[float, float] | tuple[None, None]:
        """None where there are too few samples for it."""
        a, b = self.features[:PAIRS], self.true_features[:PAIRS]
        return (None, None) if min(len(a), len(b)) <= NEIGHBOURS else metrics.precision_recall(a, b, k=NEIGHBOURS)

    def modes(self) -> float | None:
        """None where the denoiser has no modes, or more than a tenth of the samples."""
        modes, weights = getattr(self.denoiser, "modes", None), getattr(self.denoiser, "weights", None)
        if modes is None or weights is None or not 1 < len(weights) <= len(self.x) / 10:
            return None
        return metrics.mode_distance(modes(self.x), weights)

    def log_prob(self) -> float | None:
        """None where the denoiser has no density."""
        log_prob = getattr(self.denoiser, "log_prob", None)
        return None if log_prob is None else log_prob(self.x).mean().item()


@dataclass(frozen=True)
class Metric:
    """A metric of a benchmark.

    Args:
        title: at the head of its table. about: a sentence without its full stop.
        value: of a comparison with the truth, or None where it has none; not of end points.
    """

    title: str
    about: str
    value: Callable[[Comparison], float | Estimate | None] = lambda comparison: None


END_POINT = {  # `metrics.end_point`
    "rms": Metric("RMS error", "root mean square distance of the end points from the converged ones"),
    "median": Metric("median error", "median over samples of their own root mean square distance"),
    "flipped": Metric(
        "flipped",
        "share of samples farther from their converged end point than half the median distance between two of those: "
        "landed in another mode, or another picture",
    ),
    "psnr": Metric("PSNR, dB", "of the end points, the peak being 2 for pictures and the span of the data otherwise"),
}
DISTRIBUTION = {
    "energy": Metric(
        "energy distance",
        "between the samples and as many held-out true ones, sqrt of the V-statistic",
        lambda c: metrics.energy_distance(c.x[:PAIRS], c.truth[:PAIRS]),
    ),
    "sliced": Metric(
        "sliced Wasserstein",
        "W2 between the samples and the true ones, over 64 directions",
        lambda c: metrics.sliced_wasserstein(c.x[:PAIRS], c.truth[:PAIRS]),
    ),
    "frechet": Metric(
        "Frechet distance",
        "between Gaussians fitted to the features of the samples and of the true ones",
        lambda c: metrics.frechet_distance(c.features, c.true_features),
    ),
    "kid": Metric(
        "kernel distance",
        "KID: unbiased squared MMD of the cubic kernel, in features",
        lambda c: metrics.kernel_distance(c.features[:PAIRS], c.true_features[:PAIRS]),
    ),
    "precision": Metric(
        "precision",
        "share of samples within the manifold of the true ones, 3 nearest neighbours",
        lambda c: c.precision_recall[0],
    ),
    "recall": Metric(
        "recall",
        "share of true samples within the manifold of the samples, 3 nearest neighbours",
        lambda c: c.precision_recall[1],
    ),
    "modes": Metric(
        "mode weights",
        "total variation between how samples fall to the modes and the modes' weights",
        Comparison.modes,
    ),
    "log_prob": Metric("log-density", "mean exact log-density of the samples, in nats", Comparison.log_prob),
}


def compared(problem: Problem, x: Tensor, truth: Tensor, true_features: Tensor) -> dict[str, Any]:
    """Every distribution metric that a problem has, as JSON."""
    comparison = Comparison(x, truth, features_of(problem, x), true_features, problem.denoiser)
    found: dict[str, Any] = {}
    for key, metric in DISTRIBUTION.items():
        value = metric.value(comparison)
        if value is not None:
            found[key] = triple(value) if isinstance(value, Estimate) else rounded(value)
    return found


def features_of(problem: Problem, x: Tensor) -> Tensor:
    """Samples in the problem's features, shape (n, d).

    Raises:
        UsageError: features of another shape, or none that are numbers.
    """
    if problem.features is None:
        return x
    try:
        found = problem.features(x)
    except (PfodeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise DenoiserError.of(error, "the function of features") from error
    real = isinstance(found, Tensor) and not found.is_complex()
    if not real or found.ndim != 2 or len(found) != len(x) or found.shape[1] == 0:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise DenoiserError(f"features: need a tensor of shape ({len(x)}, d), got {got}", "x.flatten(1), say")
    if not torch.isfinite(found).all():
        raise DenoiserError("features: they are not finite", "a function whose values are, or leave features out")
    return found
