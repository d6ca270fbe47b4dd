"""How good samples are: against the converged end points of the same noise, and against samples of the truth.

Everything is worked out in float64 on the host, whatever it is given, and nothing here is random but what has a `seed`.
An `Estimate` carries a percentile bootstrap interval of 95 % over the samples (Efron & Tibshirani 1993, chapter 13).
"""

import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pfode.errors import FileError, UsageError, integer, number
from pfode.files import read_file
from pfode.process import float64

__all__ = [
    "EndPoint",
    "Estimate",
    "Features",
    "end_point",
    "energy_distance",
    "frechet_distance",
    "inception",
    "kernel_distance",
    "mode_distance",
    "precision_recall",
    "sliced_wasserstein",
    "typical_distance",
]

RESAMPLES = 200
LEVEL = 0.95
TYPICAL = 2048  # samples whose pairs make the typical distance
MAX_PAIRS = 2**26  # that a metric of all pairs looks at
LARGEST = 1e100  # whose powers float64 still holds
FLIPPED = 0.5  # of the typical distance between two converged end points
MAX_NETWORK = 2**31  # bytes of a TorchScript file
Features = Callable[[Tensor], Tensor]


class Estimate(NamedTuple):
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float


class EndPoint(NamedTuple):
    """Distance of samples from the converged end points of the same noise.

    rms: root of the mean square over samples and coordinates. median: over samples, of their own root mean square.
    psnr: 20 log10(peak / rms), in dB. flipped: share of samples that landed elsewhere, see `end_point`.
    """

    rms: Estimate
    median: Estimate
    psnr: float
    flipped: Estimate


def end_point(x: Tensor, converged: Tensor, peak: float | None = None, seed: int = 0) -> EndPoint:
    """Compare end points, both of shape (n, ...).

    A sample is *flipped* where it lies farther from its converged end point than half the typical distance between two
    converged end points, which is the median over all pairs: it has landed in another mode, or became another picture.

    Args:
        peak: of the signal, for the PSNR; the span of the converged values when None.

    Raises:
        UsageError: shapes that differ, or fewer than two samples.
    """
    a, b = _flat(x), _flat(converged)
    if a.shape != b.shape or len(a) < 2 or a.shape[1] == 0:
        raise UsageError(f"end_point: need two equal shapes (n, ...), n > 1, got {tuple(a.shape)}, {tuple(b.shape)}")
    if peak is not None:
        peak = number("peak", peak, 1e-300)
    square = (a - b).pow(2).mean(1)
    own = square.sqrt()
    far = own * math.sqrt(a.shape[1]) > FLIPPED * typical_distance(b)
    drawn = _resampled(len(a), seed)
    rms = _estimate(square.mean().sqrt(), square[drawn].mean(1).sqrt())
    span = float(b.max() - b.min()) if peak is None else peak
    psnr = 20 * math.log10(span / rms.value) if rms.value > 0 and span > 0 else math.inf
    shares = far.double()
    return EndPoint(
        rms,
        _estimate(own.quantile(0.5), torch.from_numpy(np.quantile(own[drawn].numpy(), 0.5, axis=1))),
        psnr,
        _estimate(shares.mean(), shares[drawn].mean(1)),
    )


def typical_distance(x: Tensor) -> float:
    """The median distance between two different ones of the samples x, shape (n, ...), of the first 2,048 at most.

    Raises:
        UsageError: fewer than two samples.
    """
    a = _flat(x)
    if len(a) < 2:
        raise UsageError(f"need two samples or more, got shape {tuple(x.shape)}")
    return torch.pdist(a[:TYPICAL]).median().item()


# ---- two sets of samples


def energy_distance(x: Tensor, y: Tensor, seed: int = 0) -> Estimate:
    """sqrt(2 E|X - Y| - E|X - X'| - E|Y - Y'|), the V-statistic (Szekely & Rizzo 2013); 0 only where the laws agree.

    Two sets of n of one law come to about sqrt(E|X - X'| (1/n + 1/m)): compare with that floor, not with 0. In one
    dimension it is `scipy.stats.energy_distance`.
    """
    a, b = _pair(x, y, True)
    n, m = len(a), len(b)
    between, first, second = torch.cdist(a, b), torch.cdist(a, a), torch.cdist(b, b)
    value = 2 * between.mean() - first.mean() - second.mean()
    v, w = _weights(n, seed), _weights(m, seed + 1)
    within = (v @ first * v).sum(1) * (n / (n - 1)), (w @ second * w).sum(1) * (m / (m - 1))  # a point drawn twice
    drawn = 2 * (v @ between * w).sum(1) - within[0] - within[1]
    return _estimate(value.clamp_min(0).sqrt(), drawn.clamp_min(0).sqrt())


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 64, p: float = 2, seed: int = 0) -> Estimate:
    """(mean over directions of W_p^p)^(1/p) of the samples' shadows on them (Bonneel et al. 2015).

    Args:
        projections: directions, uniform on the sphere by `seed`; in one dimension one is enough, and the value is W_p.
    """
    a, b = _pair(x, y)
    p, seed = number("p", p, 1, 100), integer("seed", seed, 0, 2**63 - 2)
    projections = integer("projections", projections, 1, 2**16)
    draw = torch.Generator().manual_seed(seed)
    d = a.shape[1]
    ways = torch.randn(d, projections if d > 1 else 1, generator=draw, dtype=torch.float64, device="cpu")
    ways = ways / torch.linalg.vector_norm(ways, dim=0)
    first, second = (a @ ways).T.contiguous(), (b @ ways).T.contiguous()  # (directions, n)

    def distance(u: Tensor, v: Tensor) -> Tensor:
        return _wasserstein(_sorted(u), _sorted(v), p).mean(-1) ** (1 / p)

    value = distance(first, second)
    draws = zip(_resampled(len(a), seed, 50), _resampled(len(b), seed + 1, 50), strict=True)
    return _estimate(value, torch.stack([distance(first[:, i], second[:, j]) for i, j in draws]))


def _wasserstein(u: Tensor, v: Tensor, p: float) -> Tensor:
    """W_p^p between sorted samples along the last dimension: the integral of |difference of quantile functions|^p."""
    n, m = u.shape[-1], v.shape[-1]
    if n == m:
        return (u - v).abs().pow(p).mean(-1)
    ends = torch.unique(
        torch.cat([torch.arange(1, n + 1, device="cpu") * m, torch.arange(1, m + 1, device="cpu") * n])
    )  # of n m
    widths = torch.diff(ends, prepend=torch.zeros(1, dtype=ends.dtype, device="cpu")).double() / (n * m)
    i, j = (ends - 1) // m, (ends - 1) // n
    return ((u[..., i] - v[..., j]).abs().pow(p) * widths).sum(-1)


def frechet_distance(x: Tensor, y: Tensor, features: Features | None = None) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of means and (unbiased) covariances in features: FID for Inception's.

    Heusel et al. 2017, eq. 6. The trace is that of the symmetric (C^(1/2) C' C^(1/2))^(1/2).
    """
    a, b = _pair(_in(features, x), _in(features, y))
    root = _root(_covariance(a))
    cross = torch.linalg.eigvalsh(root @ _covariance(b) @ root).clamp_min(0).sqrt().sum()
    spread = torch.trace(_covariance(a)) + torch.trace(_covariance(b))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + spread - 2 * cross)


def kernel_distance(x: Tensor, y: Tensor, features: Features | None = None) -> float:
    """KID: the unbiased squared MMD under the kernel (a.b/d + 1)^3 (Binkowski et al. 2018); may fall below 0."""
    a, b = _pair(_in(features, x), _in(features, y), True)
    n, m, d = len(a), len(b), a.shape[1]

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / d + 1) ** 3

    first, second = kernel(a, a), kernel(b, b)
    within = (first.sum() - first.trace()) / (n * (n - 1)) + (second.sum() - second.trace()) / (m * (m - 1))
    return float(within - 2 * kernel(a, b).mean())


def precision_recall(x: Tensor, y: Tensor, features: Features | None = None, k: int = 3) -> tuple[float, float]:
    """Share of samples x within the balls around the truth y that reach to the k-th neighbour, and the other way round.

    Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1).
    """
    a, b = _pair(_in(features, x), _in(features, y), True)
    k = integer("k", k, 1, min(len(a), len(b)) - 1)
    between = torch.cdist(a, b)

    def radii(z: Tensor) -> Tensor:
        return torch.cdist(z, z).kthvalue(k + 1, 1).values  # the nearest is the point itself

    precision = (between <= radii(b)).any(1)
    recall = (between <= radii(a)[:, None]).any(0)
    return precision.double().mean().item(), recall.double().mean().item()


def mode_distance(modes: Tensor, weights: Tensor) -> float:
    """Total variation between how samples fall to the modes, shape (n, k) of probabilities, and the weights, (k,).

    Raises:
        UsageError: other shapes.
    """
    if not isinstance(modes, Tensor) or not isinstance(weights, Tensor):
        raise UsageError(f"need tensors, got {type(modes).__name__} and {type(weights).__name__}")
    if modes.ndim != 2 or len(modes) == 0 or weights.shape != modes.shape[1:]:
        raise UsageError(f"need shapes (n, k) and (k,), got {tuple(modes.shape)} and {tuple(weights.shape)}")
    return 0.5 * (modes.double().mean(0) - weights.double()).abs().sum().item()


# ---- features


def inception(path: str | Path, batch: int = 64) -> Features:
    """The features of FID: of the Inception network in a TorchScript file, such as NVIDIA's inception-2015-12-05.pt.

    Its call is `network(pictures, return_features=True)` with pictures of 0 ... 255, shape (n, 3, h, w). Ours, in
    [-1, 1], are rounded to 8 bits and, where grey, taken three times.

    Raises:
        FileError: no TorchScript file.
    """
    hint = "a TorchScript file: inception-2015-12-05.pt, that EDM and StyleGAN3 use"
    try:
        raw = read_file(path, MAX_NETWORK, "a network")
    except FileError as error:
        raise FileError(error.message, hint) from error
    try:
        with warnings.catch_warnings():  # torch would have networks exported otherwise; this one is what it is
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(io.BytesIO(raw), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise FileError(f"{path}: no TorchScript network: {str(error).splitlines()[0]:.100}", hint) from error

    def features(x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise UsageError(f"inception: need pictures of shape (n, 1 or 3, h, w), got {tuple(x.shape)}")
        pixels = (x.float().clamp(-1, 1) * 127.5 + 127.5).round().expand(-1, 3, -1, -1)
        with torch.no_grad():
            return torch.cat([network(part, return_features=True) for part in pixels.split(batch)])

    return features


def _in(features: Features | None, x: Tensor) -> Tensor:
    """Samples in features, where there are any."""
    return x if features is None else features(x)


# ---- small things


def _flat(x: Tensor) -> Tensor:
    """Samples of shape (n, ...) as float64 on the host, shape (n, d).

    Raises:
        UsageError: no real tensor of two dimensions or more, or values that are not finite or beyond 1e100.
    """
    if not isinstance(x, Tensor) or x.is_complex() or x.ndim < 2:
        got = f"{x.dtype}, {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UsageError(f"samples: need a real tensor of shape (n, ...), got {got}")
    flat = x.detach().to("cpu", torch.float64).flatten(1)
    lost = int((~(flat.abs() <= LARGEST)).any(1).sum())
    if lost:
        raise UsageError(f"samples: {lost} of {len(flat)} are not finite, or beyond {LARGEST:g}", "leave them out")
    return flat


def _pair(x: Tensor, y: Tensor, pairs: bool = False) -> tuple[Tensor, Tensor]:
    """Two sets of samples, flat; `pairs`: whether all pairs of them are looked at."""
    a, b = _flat(x), _flat(y)
    if pairs and max(len(a), len(b)) ** 2 > MAX_PAIRS:
        most = math.isqrt(MAX_PAIRS)
        raise UsageError(f"{len(a)} and {len(b)} samples: at most {most}, for all their pairs", f"x[:{most}]")
    if a.shape[1] != b.shape[1] or a.shape[1] == 0 or min(len(a), len(b)) < 2:
        raise UsageError(
            f"need two sets of two samples or more, of one shape, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return a, b


def _sorted(x: Tensor) -> Tensor:
    """Along the last dimension: NumPy's is several times as quick as that of torch."""
    return torch.from_numpy(np.sort(x.numpy(), -1))


def _covariance(x: Tensor) -> Tensor:
    """The unbiased covariance of samples, shape (n, d) -> (d, d)."""
    return torch.cov(x.T).reshape(x.shape[1], x.shape[1])


def _root(symmetric: Tensor) -> Tensor:
    """The symmetric square root of a positive matrix."""
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def _resampled(n: int, seed: int, count: int = RESAMPLES) -> Tensor:
    """Indices of bootstrap samples, shape (count, n)."""
    seed = integer("seed", seed, 0, 2**64)
    return torch.from_numpy(np.random.default_rng(seed).integers(n, size=(count, n)))


def _weights(n: int, seed: int) -> Tensor:
    """How often, over n, each of n is in a bootstrap sample, shape (RESAMPLES, n)."""
    seed = integer("seed", seed, 0, 2**64)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return torch.from_numpy(counts / n)


def rounded(value: float) -> float:
    """To five significant digits, as results are kept."""
    return float(f"{value:.5g}")


def triple(estimate: Estimate) -> list[float]:
    """A value and the ends of its interval, rounded."""
    return [rounded(value) for value in estimate]


def _estimate(value: Tensor | float, drawn: Tensor) -> Estimate:
    """A value with the interval of its bootstrap samples, shape (RESAMPLES,)."""
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(drawn.double(), float64([tail, 1 - tail])).tolist()
    return Estimate(float(value), min(low, float(value)), max(high, float(value)))
