"""Energies: gradients are scores, differences are log-ratios, sums are products; MALA samples them exactly."""

import math

import pytest
import torch

import pfode
from pfode.denoiser import energy
from pfode.errors import UsageError
from pfode.samplers import mala
from pfode.scores import Denoiser, EnergyDenoiser, EnergySum, Gaussian, GaussianMixture, energy_denoiser, load, save
from pfode.scores.networks.mlp import MLPConfig, Potential

PROCESSES = [pfode.EDM(), pfode.VP(), pfode.Flow()]
MIXTURE = {"means": [[1.0, 0.0], [-0.5, 0.8]], "std": 0.4, "weights": [1.0, 2.0]}


def times(process: pfode.Process) -> torch.Tensor:
    return torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64).clamp(process.t_min, process.t_max)


def exact_potential(mixture: GaussianMixture, prediction: str) -> EnergyDenoiser:
    """The psi whose energy is -log p_t of a mixture, up to a constant of x."""
    process = mixture.process
    made = EnergyDenoiser(lambda x, t: x[:, 0], process, prediction)

    def psi(scaled: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        t = (4 * c_noise).exp() if prediction == "edm" else c_noise  # of EDM: c_noise = log(sigma)/4
        c = made.precondition(t)
        alpha, sigma = process.alpha(t), process.sigma(t)
        x = scaled / c.c_in[:, None]
        rest = -mixture.log_prob(x, t) - (1 - alpha * c.c_skip) / (2 * sigma**2) * x.square().sum(1)
        return rest * sigma**2 * c.c_in / (alpha * c.c_out)

    return EnergyDenoiser(psi, process, prediction)


@pytest.mark.parametrize(("process", "prediction"), [(pfode.EDM(), "edm"), (pfode.VP(), "eps"), (pfode.Flow(), "flow")])
def test_a_perfect_potential_is_the_exact_denoiser(process, prediction):
    mixture = GaussianMixture(**MIXTURE, process=process)
    den, t = exact_potential(mixture, prediction), times(process)
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(den(x, t), mixture(x, t), atol=1e-10)
    assert torch.allclose(den.energy(x, t), -mixture.log_prob(x, t), atol=1e-10)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow", "edm"])
def test_the_score_is_minus_the_gradient_of_the_energy(process, prediction):
    torch.manual_seed(0)
    den = EnergyDenoiser(MLPConfig(potential=True).make(), process, prediction)
    x = torch.randn(3, 2).requires_grad_()
    t = times(process)
    (slope,) = torch.autograd.grad(den.energy(x, t).sum(), x)
    alpha, sigma = (level.float()[:, None] for level in (process.alpha(t), process.sigma(t)))
    assert torch.allclose((alpha * den(x, t) - x) / sigma**2, -slope, rtol=1e-4, atol=1e-4)


def test_the_jacobian_is_symmetric_and_no_grad_is_no_trouble():
    torch.manual_seed(0)
    den = EnergyDenoiser(MLPConfig(dims=3, potential=True).make(), pfode.EDM())
    jacobian = torch.autograd.functional.jacobian(lambda x: den(x[None], torch.tensor(0.5))[0], torch.randn(3))
    assert torch.allclose(jacobian, jacobian.T, atol=1e-6)
    assert pfode.sample(den, n=2, steps=3, shape=(3,)).x.isfinite().all()


def test_any_scalar_of_a_picture_is_an_energy():
    den = EnergyDenoiser(lambda x, t: (x**4).flatten(1).mean(1, keepdim=True), pfode.EDM(), shape=(1, 4, 4))
    x = torch.randn(2, 1, 4, 4)
    assert den.energy(x, 0.5).shape == (2,)
    assert torch.equal(den.log_density(x), -den.energy(x, 0.002))
    assert den(x, torch.tensor(0.5)).shape == x.shape


def test_a_saved_energy_comes_back(tmp_path):
    torch.manual_seed(0)
    den = EnergyDenoiser(MLPConfig(potential=True).make(), pfode.EDM(), shape=(2,))
    again = energy_denoiser(load(save(den, tmp_path / "e.safetensors", card={}, dtype=torch.float32)))
    x = torch.randn(4, 2)
    assert torch.allclose(again.energy(x, 0.3), den.energy(x, 0.3))


def product() -> tuple[EnergySum, torch.Tensor, torch.Tensor]:
    """Of two Gaussians: precisions add up, and means weighted by them."""
    process = pfode.EDM(sigma_min=0.05)
    one, two = Gaussian([1.0, 0.0], [0.5, 1.0], process), Gaussian([-1.0, 1.0], [1.0, 0.25], process)
    level = process.t_min**2
    precisions = [1 / (torch.tensor(v, dtype=torch.float64) + level) for v in ([0.5, 1.0], [1.0, 0.25])]
    means = [torch.tensor(m, dtype=torch.float64) for m in ([1.0, 0.0], [-1.0, 1.0])]
    variance = 1 / (precisions[0] + precisions[1])
    return EnergySum([one, two]), variance * (precisions[0] * means[0] + precisions[1] * means[1]), variance


def test_a_sum_of_energies_is_the_product_and_mala_samples_it():
    both, mean, variance = product()
    x = torch.randn(2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = both.process.t_min
    expected = -((x - mean).square() / (2 * variance)).sum(1)
    found = -energy(both, x, t)
    assert torch.allclose(found - found[0], expected - expected[0], atol=1e-9)
    chain = mala(both, x, steps=60, size=0.1)
    assert 0.8 < float(chain.accepted.mean()) < 1
    error = (variance / 2000).sqrt()
    assert ((chain.x.mean(0) - mean).abs() < 4 * error).all()
    assert ((chain.x.var(0) / variance - 1).abs() < 4 * math.sqrt(2 / 2000)).all()


def test_weights_are_powers():
    one = Gaussian([0.0, 0.0], 1.0)
    half = EnergySum([one, one], [1.5, -0.5])
    x = torch.randn(4, 2, dtype=torch.float64)
    assert torch.allclose(half(x, torch.tensor(0.7)), one(x, torch.tensor(0.7)))
    assert torch.allclose(half.energy(x, 0.7), -one.log_prob(x, 0.7))


def test_mala_accepts_as_its_formula_says():
    """Of N(0, 1) and h: E min(1, p(x') q(x|x') / (p(x) q(x'|x))), by quadrature, and the moments of a coarse step."""
    den, h = Gaussian([0.0], 1.0, pfode.EDM(sigma_min=1e-6)), 0.8
    axis = torch.linspace(-7, 7, 1201, dtype=torch.float64)
    x, y = axis[:, None], axis[None]

    def log_q(a, b):  # b from a
        return -((b - (1 - h) * a) ** 2) / (4 * h)

    log_p = [-0.5 * x**2, -0.5 * y**2]
    weight = (log_p[0] + log_q(x, y)).exp()
    ratio = (log_p[1] + log_q(y, x) - log_p[0] - log_q(x, y)).clamp_max(0).exp()
    expected = float((weight * ratio).sum() / weight.sum())
    start = pfode.noise.normal(range(3000), 0, (1,), torch.float64)
    chain = mala(den, start, steps=20, size=h)
    assert float(chain.accepted.mean()) == pytest.approx(expected, abs=0.01)
    assert float(chain.x.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / 3000))


def test_chains_are_keyed_and_apart():
    mixture = GaussianMixture(**MIXTURE)
    x = torch.randn(5, 2, dtype=torch.float64)
    whole = mala(mixture, x, 0.2, 10, 0.02, seed=3, trajectory=True)
    alone = mala(mixture, x[4:], 0.2, 10, 0.02, seeds=[7])
    assert torch.allclose(alone.x[0], whole.x[4], atol=1e-12)
    assert len(whole.trajectory) == 10
    assert torch.equal(whole.trajectory[-1], whole.x)
    assert torch.allclose(whole.energy, -mixture.log_prob(whole.x, 0.2))
    assert torch.equal(mala(mixture, x, 0.2, 0).x, x)
    nowhere = mala(mixture, torch.full((2, 2), 1e3, dtype=torch.float64), 0.2, 3, 1e4)
    assert nowhere.x.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EnergyDenoiser(MLPConfig, pfode.EDM()), "network"),  # type: ignore[arg-type]
        (lambda: EnergyDenoiser(lambda x, t: x, pfode.EDM())(torch.zeros(3, 2), torch.tensor(0.5)), "one number"),
        (lambda: energy_denoiser(Denoiser(lambda x, t: x, pfode.EDM(), "edm")), "no gradient of a scalar"),
        (lambda: EnergySum([]), "0 parts"),
        (lambda: EnergySum([Gaussian([0.0], 1.0)], [1.0, 2.0]), "2 weights"),
        (lambda: EnergySum([Gaussian([0.0], 1.0), Gaussian([0.0], 1.0, pfode.VP())]), "different processes"),
        (lambda: EnergySum([Gaussian([0.0], 1.0)], [math.nan]), "weight"),
        (lambda: mala(Denoiser(lambda x, t: x, pfode.EDM(), "edm"), torch.zeros(2, 2)), "has none"),
        (lambda: mala(Gaussian([0.0], 1.0), torch.zeros(2, 1), steps=-1), "steps"),
        (lambda: mala(Gaussian([0.0], 1.0), torch.zeros(2, 1), size=-0.1), "size"),
        (lambda: mala(Gaussian([0.0], 1.0), torch.zeros(2, 1), t=1e9), "t:"),
        (lambda: mala(Gaussian([0.0], 1.0), torch.zeros(2, 1), seeds=[1]), "seeds"),
        (lambda: Potential(torch.nn.Linear(2, 2)).architecture(), "potentials of pfode"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()
