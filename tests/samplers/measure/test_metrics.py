"""Metrics against SciPy, against formulas on Gaussians, and what must hold of any."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from pfode.errors import FileError, UsageError
from pfode.samplers.measure import metrics


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_energy_distance_is_scipys_in_one_dimension():
    a, b = normal(120, 1), 0.5 * normal(90, 1, 1) + 0.3
    expected = scipy.stats.energy_distance(a[:, 0].numpy(), b[:, 0].numpy())
    assert metrics.energy_distance(a, b).value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(80, 80), (80, 50), (7, 31)])
def test_wasserstein_is_scipys_in_one_dimension(n, m):
    a, b = normal(n, 1), 0.5 * normal(m, 1, 1) + 0.3
    expected = scipy.stats.wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy())
    assert metrics.sliced_wasserstein(a, b, p=1).value == pytest.approx(expected, rel=1e-10)


def test_sliced_wasserstein_of_a_shift():
    """W_2 of a shadow is the shadow of the shift, whose mean square over directions is |shift|^2 / d."""
    a, shift = normal(50, 3), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = metrics.sliced_wasserstein(a, a + shift, projections=4000).value
    assert found == pytest.approx(shift.norm().item() / math.sqrt(3), rel=0.03)


def test_frechet_distance_is_heusels_formula():
    a, b = normal(400, 6), normal(300, 6, 1) @ torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64)) + 0.2
    m, c = a.mean(0).numpy() - b.mean(0).numpy(), [np.cov(z.numpy(), rowvar=False) for z in (a, b)]
    expected = m @ m + np.trace(c[0] + c[1] - 2 * np.real(scipy.linalg.sqrtm(c[0] @ c[1])))
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_with_fewer_samples_than_features():
    """The covariances are singular: no imaginary parts, no infinities."""
    assert metrics.frechet_distance(normal(10, 30), normal(10, 30, 1)) > 0


def test_kernel_distance_is_unbiased_and_by_the_definition():
    a, b = normal(7, 3), normal(5, 3, 1)

    def kernel(u, v):
        return float((u @ v / 3 + 1) ** 3)

    def mean(us, vs, apart):
        terms = [kernel(u, v) for i, u in enumerate(us) for j, v in enumerate(vs) if not (apart and i == j)]
        return sum(terms) / len(terms)

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert metrics.kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)
    several = [metrics.kernel_distance(normal(40, 3, 2 * k), normal(40, 3, 2 * k + 1)) for k in range(100)]
    assert abs(np.mean(several)) < 4 * np.std(several) / 10


def test_precision_and_recall_know_what_is_missing():
    """Samples of one of two far clusters are precise and recall half; of a third one neither."""
    truth = torch.cat([normal(100, 2), normal(100, 2, 1) + 50])
    precision, recall = metrics.precision_recall(normal(200, 2, 2), truth)
    assert precision > 0.9
    assert 0.4 < recall < 0.51
    assert metrics.precision_recall(normal(200, 2, 2) - 50, truth) == (0, 0)
    assert metrics.precision_recall(truth, truth) == (1, 1)


def test_features_are_used():
    a, b = normal(50, 4), normal(50, 4, 1)
    first = metrics.frechet_distance(a[:, :2], b[:, :2])
    assert metrics.frechet_distance(a, b, lambda x: x[:, :2]) == pytest.approx(first, rel=1e-12)


def test_end_point_of_known_errors():
    """Two of ten samples swap places far apart, the others are off by a known amount."""
    converged = torch.arange(10.0, dtype=torch.float64)[:, None].expand(-1, 4)
    x = converged + 0.01
    x[[0, 9]] = converged[[9, 0]]
    found = metrics.end_point(x, converged, peak=2.0)
    rms = math.sqrt((8 * 0.01**2 + 2 * 81) / 10)
    assert found.rms.value == pytest.approx(rms, rel=1e-12)
    assert found.median.value == pytest.approx(0.01, rel=1e-9)
    assert found.psnr == pytest.approx(20 * math.log10(2 / rms), rel=1e-12)
    assert found.flipped.value == 0.2
    assert found.flipped.low < 0.2 < found.flipped.high
    assert metrics.end_point(converged, converged).rms.value == 0


def test_typical_distance_and_the_half_of_it():
    """Flipped means farther than half the median distance between two converged end points."""
    converged = normal(60, 5)
    pairs = [(a - b).norm().item() for i, a in enumerate(converged) for b in converged[:i]]
    half = metrics.typical_distance(converged) / 2
    assert half == pytest.approx(np.median(pairs) / 2, rel=0.01)
    away = torch.zeros(60, 5, dtype=torch.float64)
    away[:20, 0], away[20:, 0] = 1.01 * half, 0.99 * half
    assert metrics.end_point(converged + away, converged).flipped.value == pytest.approx(1 / 3)


@pytest.mark.parametrize("metric", [metrics.energy_distance, metrics.sliced_wasserstein])
def test_intervals_cover_and_shrink(metric):
    """95 % intervals from other draws hold the value of a large run, and six times the samples narrow them."""
    shift = torch.tensor([0.8, 0.0], dtype=torch.float64)
    large = metric(normal(1500, 2), normal(1500, 2, 1) + shift).value
    few = [metric(normal(200, 2, 10 + k), normal(200, 2, 50 + k) + shift) for k in range(20)]
    assert sum(e.low <= large <= e.high for e in few) >= 16
    assert all(e.low <= e.value <= e.high for e in few)
    many = metric(normal(1200, 2, 5), normal(1200, 2, 6) + shift)
    assert many.high - many.low < 0.6 * (few[0].high - few[0].low)


def test_the_same_again():
    a, b = normal(60, 3), normal(60, 3, 1)
    assert metrics.energy_distance(a, b) == metrics.energy_distance(a, b)
    assert metrics.sliced_wasserstein(a, b) == metrics.sliced_wasserstein(a, b)


def test_mode_distance():
    modes = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    assert metrics.mode_distance(modes, torch.tensor([0.25, 0.75])) == pytest.approx(0.375)


class Stub(torch.nn.Module):
    """Stands in for Inception: the mean colour, so that what is fed to it can be seen."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return x.mean(dim=(2, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_inception_is_fed_bytes_in_three_channels(tmp_path):
    torch.jit.script(Stub()).save(str(tmp_path / "net.pt"))
    features = metrics.inception(tmp_path / "net.pt", batch=2)
    grey = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 4, 4)
    assert features(grey).tolist() == [[0.0] * 3, [128.0] * 3, [255.0] * 3]
    with pytest.raises(UsageError, match="pictures"):
        features(torch.zeros(2, 5))
    (tmp_path / "other.pt").write_bytes(b"not a network")
    with pytest.raises(FileError, match="TorchScript"):
        metrics.inception(tmp_path / "other.pt")


def test_shapes_that_do_not_fit():
    with pytest.raises(UsageError, match="one shape"):
        metrics.energy_distance(normal(5, 2), normal(5, 3))
    with pytest.raises(UsageError, match="n > 1"):
        metrics.end_point(normal(5, 2), normal(4, 2))
