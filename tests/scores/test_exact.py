"""The exact denoisers against definitions that know nothing of their algebra."""

import math

import pytest
import scipy.stats
import torch

import pfode
from pfode.errors import UsageError
from pfode.scores import Empirical, Gaussian, GaussianMixture
from tests import problems

D = 3
EYE = torch.eye(D, dtype=torch.float64)


def spd(seed: int) -> torch.Tensor:
    a = torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / D + 0.1 * torch.eye(D, dtype=torch.float64)


MEANS = torch.tensor([[1.0, 0.0, -1.0], [-1.0, 0.5, 0.3]], dtype=torch.float64)
COVS = {
    "isotropic": torch.stack([0.25 * EYE, 0.25 * EYE]),
    "one std each": torch.stack([0.25 * EYE, 0.49 * EYE]),
    "diagonal": torch.diag_embed(torch.tensor([[0.1, 0.5, 1.0], [0.3, 0.2, 0.9]], dtype=torch.float64)),
    "full": torch.stack([spd(0), spd(1)]),
    "shared full": torch.stack([spd(2), spd(2)]),
}


def build(kind: str, process: pfode.Process) -> GaussianMixture:
    cov = COVS[kind]
    given = {
        "isotropic": {"std": 0.5},
        "one std each": {"std": torch.tensor([0.5, 0.7], dtype=torch.float64)},
        "diagonal": {"std": torch.diagonal(cov, dim1=1, dim2=2).sqrt()},
        "full": {"cov": cov},
        "shared full": {"cov": cov[0]},
    }[kind]
    return GaussianMixture(MEANS, weights=[0.3, 0.7], process=process, **given)


@pytest.mark.parametrize("kind", COVS)
@pytest.mark.parametrize("process", problems.ALL_PROCESSES.values(), ids=problems.ALL_PROCESSES)
def test_density_score_and_denoiser(kind, process):
    gmm = build(kind, process)
    t = process.time(torch.tensor([0.7, -1.0, 2.0], dtype=torch.float64))
    x = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    for i in range(3):
        alpha, sigma = process.alpha(t[i]).item(), process.sigma(t[i]).item()
        parts = [
            w * scipy.stats.multivariate_normal(alpha * m, alpha**2 * c + sigma**2 * EYE).pdf(x[i].detach())
            for w, m, c in zip((0.3, 0.7), MEANS, COVS[kind], strict=True)
        ]
        assert gmm.log_prob(x, t)[i].exp().item() == pytest.approx(sum(parts), rel=1e-9)
    (gradient,) = torch.autograd.grad(gmm.log_prob(x, t).sum(), x)
    assert torch.allclose(gmm.score(x, t), gradient, rtol=1e-9, atol=1e-10)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    assert torch.allclose(gmm(x, t), (x + sigma**2 * gradient) / alpha, rtol=1e-9, atol=1e-10)  # Tweedie


@pytest.mark.parametrize("kind", COVS)
def test_samples_have_the_mixture_s_moments(kind):
    gmm = build(kind, pfode.EDM())
    x = gmm.sample(40_000, seed=1)
    mean = torch.tensor([0.3, 0.7], dtype=torch.float64) @ MEANS
    spread = MEANS - mean
    parts = [w * (c + torch.outer(s, s)) for w, c, s in zip((0.3, 0.7), COVS[kind], spread, strict=True)]
    cov = torch.stack(parts).sum(0)
    assert torch.allclose(x.mean(0), mean, atol=0.03)
    assert torch.allclose(torch.cov(x.T), cov, atol=0.05)
    assert torch.equal(gmm.sample(5, seed=3), gmm.sample(10, seed=1)[2:7])


@pytest.mark.parametrize("process", problems.ALL_PROCESSES.values(), ids=problems.ALL_PROCESSES)
def test_gaussian_flow_solves_its_ode(process):
    g = Gaussian([0.3, -0.5, 1.2], spd(4), process=process)
    high, low = process.time(-2.5), process.time(3.0)
    x = problems.start(g, high)
    field = problems.solution
    mixture_only = GaussianMixture(g.means, cov=spd(4), process=process)  # the same law, without its flow
    times = torch.linspace(high, low, 4, dtype=torch.float64).tolist()
    for t, state in zip(times, field(mixture_only, x, times), strict=True):
        tolerance = 1e-6 if isinstance(process, pfode.VPDiscrete) else 1e-9  # its log-SNR has kinks
        assert problems.rms(g.flow(x, high, t), state) < tolerance
    assert torch.allclose(g.flow(g.flow(x, high, low), low, high), x, rtol=1e-11)


def test_a_covariance_is_never_taken_for_variances():
    """As many components as dimensions: shapes alone would not tell."""
    cov = [[1.0, 0.5], [0.5, 1.0]]
    gmm = GaussianMixture([[0.0, 0.0], [0.0, 0.0]], cov=cov)
    assert torch.allclose(torch.cov(gmm.sample(40_000).T), torch.tensor(cov, dtype=torch.float64), atol=0.03)
    with pytest.raises(UsageError, match="symmetric"):
        GaussianMixture([[0.0, 0.0]], cov=[[1.0, 0.5], [0.1, 1.0]])


def test_score_is_finite_at_the_data():
    gmm = build("full", pfode.Flow())
    x = torch.randn(4, D, dtype=torch.float64)
    assert torch.allclose(gmm.score(x, 0.0), gmm.score(x, 1e-9), rtol=1e-6)


def test_gaussian_flow_reaches_the_data():
    g = Gaussian([0.3, -0.5, 1.2], [0.25, 0.64, 0.04], process=pfode.Flow())
    x = pfode.noise.normal(range(20_000), 0, (3,), torch.float64)
    end = g.flow(x, 1.0, 0.0)
    assert torch.allclose(end.std(0), torch.tensor([0.5, 0.8, 0.2], dtype=torch.float64), atol=0.02)
    assert torch.allclose(end.mean(0), g.means[0], atol=0.02)


def test_empirical_is_the_mixture_of_kernels():
    points = torch.randn(50, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for process in problems.ALL_PROCESSES.values():
        t = process.time(torch.tensor([1.0, -0.5, 4.0], dtype=torch.float64))
        x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
        same = GaussianMixture(points, std=0.1, process=process)
        assert torch.allclose(Empirical(points, 0.1, process)(x, t), same(x, t), rtol=1e-8, atol=1e-9)
    sharp = Empirical(points, std=1e-6)
    assert torch.allclose(sharp(points[7:8] + 0.01, torch.tensor(0.01, dtype=torch.float64)), points[7:8], atol=1e-3)


def test_float32_in_float32_out():
    gmm = build("full", pfode.EDM())
    x = torch.randn(4, D)
    assert gmm(x, torch.tensor(0.5)).dtype == torch.float32
    assert torch.allclose(gmm(x, torch.tensor(0.5)).double(), gmm(x.double(), torch.tensor(0.5)), atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianMixture([0.0, 1.0], std=1.0),
        lambda: GaussianMixture([[0.0, 1.0]]),
        lambda: GaussianMixture(torch.zeros(0, 2), std=1.0),
        lambda: GaussianMixture(torch.zeros(2, 0), std=1.0),
        lambda: GaussianMixture([[0.0, math.nan]], std=1.0),
        lambda: GaussianMixture([[0.0, 1.0]], std=math.inf),
        lambda: Gaussian([0.0, 1.0], [[math.nan, 0.0], [0.0, 1.0]]),
        lambda: GaussianMixture([[0.0, 1.0]], std=1.0, cov=torch.eye(2)),
        lambda: GaussianMixture([[0.0, 1.0]], std=0.0),
        lambda: GaussianMixture([[0.0, 1.0]], std=torch.ones(3)),
        lambda: GaussianMixture([[0.0, 1.0]], std=1.0, weights=[0.5, 0.5]),
        lambda: GaussianMixture([[0.0, 1.0]], std=1.0, weights=[-1.0]),
        lambda: GaussianMixture([[0.0, 1.0], [1.0, 0.0]], std=1.0, weights=[float("inf"), 1.0]),
        lambda: GaussianMixture([[0.0, 1.0, 2.0]], cov=torch.eye(2)),
        lambda: Gaussian([0.0, 1.0], -torch.eye(2)),
        lambda: Gaussian([0.0, 1.0], 1.0)(torch.zeros(1, 3), torch.tensor(1.0)),
    ],
)
def test_bad_input_is_refused(make):
    with pytest.raises(UsageError):
        make()
