"""Likelihoods along the PF-ODE: exact values, what they must not depend on, ends, priors, gradients, refusals."""

import math

import pytest
import torch
from torch import Tensor, nn

import pfode
from pfode.errors import NumericalError, UsageError
from pfode.flow import Exact, Hutchinson
from pfode.scores import Denoiser, Empirical, Gaussian, GaussianMixture, guide

f64 = torch.float64
PROCESSES = [pfode.Flow(), pfode.EDM(), pfode.VP(), pfode.VPCosine(), pfode.SubVP(), pfode.VE()]


def eight(process=None) -> GaussianMixture:
    """Eight Gaussians on a circle."""
    k = torch.arange(8, dtype=f64) * (math.pi / 4)
    return GaussianMixture(2 * torch.stack([k.cos(), k.sin()], 1), 0.2, process=process or pfode.Flow())


def exact(net: GaussianMixture, x: Tensor) -> Tensor:
    """log p of data with the noise of t_min."""
    p = net.process
    alpha = p.alpha(p.t_min)
    return net.log_prob(alpha * x, p.t_min) + x[0].numel() * math.log(alpha)


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_a_mixture_to_1e_5_nats(process):
    net = eight(process)
    x = net.sample(16, seed=5)
    found = pfode.log_likelihood(net, x)
    assert rms(found.nats - exact(net, x)) < 1e-5
    assert found.products.double().mean() / 2 <= 60
    assert (found.nfe - found.products // 2).double().mean() <= 190
    assert torch.equal(found.stderr, torch.zeros(16, dtype=f64))
    assert torch.allclose(found.bits_per_dim, -found.nats / (2 * math.log(2)))
    assert found.prior == ("exact" if process.alpha(process.t_max) == 0 else "moments")
    assert (found.end, found.width, found.failed, len(found)) == ("none", 0.0, {}, 16)


def test_to_1e_8_nats():
    net = eight()
    x = net.sample(8, seed=5)
    assert rms(pfode.log_likelihood(net, x, rtol=1e-8).nats - exact(net, x)) < 1e-8


def test_correlated_gaussian_with_a_covariance_for_its_prior():
    a = torch.randn(5, 5, dtype=f64, generator=torch.Generator().manual_seed(1))
    net = Gaussian([0.5, -1, 0, 2, 0.1], a @ a.T / 5 + 0.05 * torch.eye(5, dtype=f64), process=pfode.EDM())
    mean, cov = net.moments
    x = net.sample(20_000)
    assert torch.allclose(x.mean(0), mean, atol=0.05)
    assert torch.allclose(x.T.cov(), cov, atol=0.1)
    assert rms(pfode.log_likelihood(net, x[:8]).nats - exact(net, x[:8])) < 1e-5
    plain = pfode.log_likelihood(net, x[:8], prior="plain")
    assert 1e-5 < rms(plain.nats - exact(net, x[:8])) < 0.1
    law = torch.distributions.MultivariateNormal(mean, cov + 6400 * torch.eye(5, dtype=f64))
    other = torch.distributions.MultivariateNormal(torch.zeros(5, dtype=f64), 6400 * torch.eye(5, dtype=f64))
    assert plain.plain_kl == pytest.approx(torch.distributions.kl_divergence(law, other).item(), rel=1e-6)
    assert plain.prior == "plain"
    mean = pfode.log_likelihood(net, x[:8], prior="mean")
    assert rms(mean.nats - exact(net, x[:8])) < 0.2 * rms(plain.nats - exact(net, x[:8]))
    assert mean.plain_kl == pytest.approx(plain.plain_kl, rel=0.2)


def test_three_processes_agree():
    """Of one mixture, with the same noise at t_min: sigma/alpha = 0.01."""
    made = [
        eight(pfode.EDM(sigma_min=0.01)),
        eight(pfode.Flow(t_min=0.01 / 1.01)),
        eight(pfode.VP(t_min=pfode.VP().time(-2 * math.log(0.01)))),
    ]
    x = made[0].sample(16, seed=2)
    nats = [pfode.log_likelihood(net, x, rtol=1e-7).nats for net in made]
    for other in nats[1:]:
        assert rms(other - nats[0]) < 1e-6


def test_parts_add_up_and_z_is_what_encode_gives():
    net = eight(pfode.EDM())
    x = net.sample(4, seed=1)
    for found in (
        pfode.log_likelihood(net, x, divergence="hutchinson"),
        pfode.log_likelihood(net, x, end="uniform", bins=9, draws=3),
    ):
        assert list(found.parts) == ["prior", "linear", "trace", "dequantisation"]
        assert torch.equal(sum(found.parts.values(), torch.zeros(4, dtype=f64)), found.nats)
    found = pfode.log_likelihood(net, x)
    assert torch.allclose(found.z, pfode.encode(net, x, sampler="dopri8", rtol=1e-9), rtol=1e-5)  # type: ignore[arg-type]
    assert found.parts["linear"][0] == pytest.approx(2 * math.log(80 / 0.002))
    law = torch.distributions.MultivariateNormal(net.moments[0], net.moments[1] + 6400 * torch.eye(2, dtype=f64))
    assert torch.allclose(found.parts["prior"], law.log_prob(found.z))


# ---- what the value must not depend on


def likelihood(net, x: Tensor, seeds=None, **options):
    return pfode.log_likelihood(net, x, seeds=seeds, divergence=Hutchinson(2), end="uniform", bins=17, **options)


@pytest.mark.parametrize("seeds", [None, list(range(100, 124))])
def test_alone_in_a_batch_and_in_reverse_order(seeds):
    net = eight()
    x = net.sample(24, seed=3)
    some = [0, 17]
    whole = likelihood(net, x, seeds)
    small = likelihood(net, x, seeds, batch=7)
    back = likelihood(net, x.flip(0), seeds and seeds[::-1])
    assert (whole.nats - small.nats).abs().max() < 1e-10
    assert (whole.nats - back.nats.flip(0)).abs().max() < 1e-10
    assert torch.equal(whole.products, back.products.flip(0))
    for i in some:
        alone = likelihood(net, x[i : i + 1], seeds and seeds[i : i + 1])
        assert abs(alone.nats[0] - whole.nats[i]) < 1e-10
        assert abs(alone.stderr[0] - whole.stderr[i]) < 1e-10


def test_seeds_matter_and_default_to_the_samples_own():
    net = eight()
    x = net.sample(3, seed=3)
    twice = likelihood(net, torch.cat([x, x]))
    assert torch.allclose(twice.nats[:3], twice.nats[3:], rtol=1e-10)
    assert not torch.allclose(likelihood(net, x, [0, 1, 2]).nats, twice.nats[:3], rtol=1e-6)
    assert torch.allclose(likelihood(net, x.float()).nats, twice.nats[:3], atol=1e-5) is False  # other numbers
    same = likelihood(net, x.float().double())
    assert torch.allclose(likelihood(net, x.float()).nats, same.nats, rtol=1e-12)


def test_the_stated_standard_error_is_honest():
    """Of 400 runs with other seeds |z| <= 2 in 95 %, and the mean is the exact value."""
    a = torch.randn(6, 6, dtype=f64, generator=torch.Generator().manual_seed(1))
    net = Gaussian(torch.zeros(6, dtype=f64), a @ a.T / 6 + 0.05 * torch.eye(6, dtype=f64), process=pfode.Flow())
    x = net.sample(1).expand(400, 6)
    found = pfode.log_likelihood(net, x, divergence="hutchinson", probes=4, seeds=range(400), rtol=1e-4)
    true = pfode.log_likelihood(net, x[:1], rtol=1e-4).nats
    z = (found.nats - true) / found.stderr
    assert 0.92 < (z.abs() <= 2).double().mean() < 0.98
    assert abs(z.mean()) < 4 / 20
    one = pfode.log_likelihood(net, x[:2], divergence=Hutchinson(1), seeds=[0, 1], rtol=1e-3)
    assert one.stderr.isnan().all()
    assert one.nats.isfinite().all()


# ---- ends


def grid(levels: int) -> Tensor:
    """All states of two pixels."""
    values = torch.linspace(-1, 1, levels, dtype=f64)
    return torch.cartesian_prod(values, values)


def test_the_states_of_two_pixels_have_a_total_probability_of_1():
    net = GaussianMixture([[0.1, 0.05], [-0.15, -0.1]], torch.tensor([0.22, 0.18]), process=pfode.Flow())
    x, width = grid(17), 2 / 16
    found = pfode.log_likelihood(net, x, end="uniform", bins=17, draws=16, rtol=1e-2, batch=289, seeds=range(289))
    assert found.width == width
    assert found.nats.exp().sum() == pytest.approx(1, abs=1e-3)
    inside = torch.linspace(-0.5, 0.5, 21, dtype=f64)[:-1] + 0.025
    fine = (x[:, None] + width * torch.cartesian_prod(inside, inside)).reshape(-1, 2)
    bins = net.log_prob(fine).exp().reshape(289, -1).mean(1) * width**2
    likely = bins > 1e-3
    gap = found.nats[likely] - bins[likely].log()
    assert gap.abs().max() < 0.1
    assert gap.mean() == pytest.approx(0, abs=5e-3)


def test_truncated_dequantisation_of_data_on_a_lattice():
    """Points with hardly any width: the probability of a value is its share, whatever the draw."""
    points = torch.tensor([[-1.0, -0.5], [0.5, 1.0], [0.5, 1.0], [0.0, 0.0]], dtype=f64)
    net = Empirical(points, 1e-5, pfode.EDM(sigma_min=0.01))
    found = pfode.log_likelihood(net, points, bins=5, rtol=1e-6, seeds=range(4))
    assert found.end == "truncated"
    assert torch.allclose(found.nats.exp(), torch.tensor([0.25, 0.5, 0.5, 0.25], dtype=f64), rtol=2e-3)
    assert torch.allclose(found.bits_per_dim * 2, -found.nats / math.log(2))


def test_bins_are_the_denoisers_own():
    net = eight()
    net.bins = 17  # type: ignore[attr-defined]
    x = grid(17)[:2]
    assert pfode.log_likelihood(net, x, end="uniform").width == 2 / 16
    assert pfode.log_likelihood(net, x, end="uniform", bins=256).width == 2 / 255
    assert pfode.log_likelihood(net, x, end="none").width == 0
    assert [pfode.log_likelihood(net, x, end="auto", bins=k, rtol=1e-2).end for k in (9, 2000)] == [
        "uniform",
        "truncated",
    ]


# ---- plans


def test_along_a_plan_the_error_falls_with_its_steps():
    net = eight(pfode.EDM())
    x = net.sample(8, seed=4)
    errors = []
    for steps in (20, 40, 80):
        times = pfode.make_plan("heun", net.process, steps, grid="karras", final="stop").times.flip(0)
        plan = pfode.make_plan("heun", net.process, grid=times)
        found = pfode.log_likelihood(net, x, plan=plan)
        errors.append(rms(found.nats - exact(net, x)))
        assert (found.nfe == plan.nfe + steps + 1).all()
        assert (found.steps == steps).all()
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.02
    with pytest.raises(UsageError, match="need one from t_min"):
        pfode.log_likelihood(net, x, plan=pfode.make_plan("heun", net.process, 5))


# ---- gradients


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, x: Tensor, c_noise: Tensor, shift: Tensor | None = None) -> Tensor:
        out = self.net(torch.cat([x, c_noise.reshape(-1, 1).to(x).expand(len(x), 1)], 1))
        return out if shift is None else out + shift * x


def test_gradients_to_x_to_parameters_and_to_conditions():
    network = Small()
    net = Denoiser(network, pfode.EDM(sigma_min=0.1, sigma_max=5.0), "edm", shape=(2,))
    x = torch.tensor([[0.3, -0.2], [0.8, 0.1]], dtype=f64, requires_grad=True)
    shift = torch.tensor([[0.1], [0.2]], dtype=f64, requires_grad=True)
    weight = next(network.parameters())

    def nats() -> Tensor:
        return pfode.log_likelihood(net, x, rtol=1e-8, shift=shift).nats.sum()

    slopes = torch.autograd.grad(nats(), [x, shift, weight])
    for value, slope, index in ((x, slopes[0], (0, 1)), (shift, slopes[1], (1, 0)), (weight, slopes[2], (3, 2))):
        sides = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                value[index] += step
                sides.append(nats().item())
        with torch.no_grad():
            value[index] += 1e-5
        assert slope[index].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=2e-5)


def test_gradients_of_a_density_are_its_score_and_flow_along_plans():
    net = eight(pfode.EDM(sigma_min=0.02))
    x = net.sample(2, seed=4).requires_grad_()
    (slope,) = torch.autograd.grad(pfode.log_likelihood(net, x).nats.sum(), x)
    assert torch.allclose(slope, net.score(x.detach(), 0.02), rtol=1e-3, atol=1e-3)
    times = pfode.make_plan("heun", net.process, 60, grid="karras", final="stop").times.flip(0)
    plan = pfode.make_plan("heun", net.process, grid=times)
    (along,) = torch.autograd.grad(pfode.log_likelihood(net, x, plan=plan).nats.sum(), x)
    assert torch.allclose(along, slope, rtol=0.1, atol=0.1)


def test_nothing_is_recorded_where_nothing_asks_for_it():
    net = eight()
    assert not pfode.log_likelihood(net, net.sample(2), rtol=1e-2).nats.requires_grad
    x = net.sample(2).requires_grad_()
    with torch.no_grad():
        assert not pfode.log_likelihood(net, x, rtol=1e-2).nats.requires_grad
    with torch.inference_mode():
        inside = pfode.log_likelihood(net, net.sample(2), rtol=1e-2).nats
    assert torch.allclose(inside, pfode.log_likelihood(net, net.sample(2), rtol=1e-2).nats)


# ---- classes, guidance, users' own


def labelled() -> Denoiser:
    class Two(nn.Module):
        """Two classes of points at -1 and 1, width 0.5, in two dimensions."""

        def forward(self, x, c_noise, label):
            s2 = torch.exp(8 * c_noise).reshape(-1, 1).to(x)
            y = x / torch.rsqrt(s2 + 0.25)
            centre = (2.0 * label - 1).reshape(-1, 1).to(x) * (label < 2).reshape(-1, 1)
            d = centre + 0.25 / (0.25 + s2) * (y - centre)
            skip, out = 0.25 / (s2 + 0.25), (s2 * 0.25 / (s2 + 0.25)).sqrt()
            return (d - skip * y) / out

    return Denoiser(Two(), pfode.EDM(), "edm", shape=(2,), labels=["low", "high"])


def test_labels_and_guidance():
    net = labelled()
    x = torch.tensor([[0.9, 1.1], [-0.8, -1.0]])
    law = torch.distributions.Normal(torch.tensor([[1.0], [-1.0]], dtype=f64), 0.5)
    right = pfode.log_likelihood(net, x, label=["high", "low"], rtol=1e-6)
    assert torch.allclose(right.nats, law.log_prob(x).sum(1), atol=1e-4)
    assert right.prior == "mean"
    assert right.plain_kl == pytest.approx(2 / (2 * (6400 + 0.25)), rel=1e-3)
    turned = pfode.log_likelihood(net, x.flip(0), label=["low", "high"], rtol=1e-6)
    assert torch.allclose(turned.nats.flip(0), right.nats, atol=1e-10)
    wrong = pfode.log_likelihood(net, x, label=["low", "high"])
    assert (wrong.nats < right.nats - 5).all()
    double = pfode.log_likelihood(net, x, label=["high", "low"], guidance=1.5)
    inside = pfode.log_likelihood(guide(net, 1.5), x, label=["high", "low"])
    assert torch.equal(double.nats, inside.nats)
    assert not torch.allclose(double.nats, right.nats, atol=1e-2)


def test_a_bare_function_is_enough():
    class Mine:
        process = pfode.Flow()

        def __call__(self, x, t, **cond):
            alpha, sigma = self.process.alpha(t), self.process.sigma(t)
            r = (alpha / (alpha**2 + sigma**2)).reshape(-1, 1, 1)
            return r * x

    x = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0))
    found = pfode.log_likelihood(Mine(), x, rtol=1e-6)
    var = 1 + (1e-3 / 0.999) ** 2
    want = torch.distributions.Normal(0.0, math.sqrt(var)).log_prob(x.double()).flatten(1).sum(1)
    assert torch.allclose(found.nats, want, atol=1e-5)
    assert found.z.shape == x.shape
    assert pfode.log_likelihood(Mine(), x, divergence=Exact(block=2), method="tsit5", rtol=1e-4).nats.isfinite().all()


def test_what_fails_says_so():
    net = eight()
    x = net.sample(3)
    x[1, 0] = math.nan
    with pytest.raises(NumericalError, match="sample 1: "):
        pfode.log_likelihood(net, x)
    kept = pfode.log_likelihood(net, x, throw=False)
    assert kept.nats.isnan().tolist() == [False, True, False]
    assert list(kept.failed) == [1]
    with pytest.raises(NumericalError, match=r"sample 0 \(and 2 more\): stopped at t = .*max_steps were not enough"):
        pfode.log_likelihood(net, net.sample(3), max_steps=3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"x": [[0.0, 0.0]]}, "x: need a floating-point tensor"),
        ({"x": torch.zeros(2, 2, dtype=torch.uint8)}, "x: need a floating-point tensor"),
        ({"x": torch.zeros(0, 2)}, "x: need a floating-point tensor"),
        ({"x": torch.zeros(2)}, "x: need a floating-point tensor"),
        ({"x": torch.zeros(2, 3)}, r"samples of shape \(2,\), got \(3,\)"),
        ({"x": torch.full((2, 2), 255.0), "bins": 256}, r"pictures lie in \[-1, 1\], got values up to 255"),
        ({"denoiser": 3}, "denoiser: need a callable"),
        ({"end": "truncate"}, "unknown end 'truncate'\nhint: did you mean 'truncated'"),
        ({"bins": 1}, "bins: need an integer from 2 to 65536, got 1"),
        ({"bins": 2.5}, "bins: need an integer"),
        ({"draws": 0}, "draws: need an integer"),
        ({"rtol": 0}, "rtol: need a number of at least 1e-12"),
        ({"rtol": "small"}, "rtol: need a number"),
        ({"rtol": math.nan}, "rtol: need a number"),
        ({"divergence": "approximate"}, "unknown divergence 'approximate'"),
        ({"divergence": 4}, "unknown divergence 4"),
        ({"divergence": "hutchinson", "probes": 0}, "probes: need an integer of at least 1"),
        ({"prior": "normal"}, "unknown prior 'normal'"),
        ({"prior": "moments", "denoiser": labelled()}, "has no moments"),
        ({"seeds": [1]}, "seeds: need one for each of 2 samples, got 1"),
        ({"seeds": [1, -1]}, "seed: need an integer"),
        ({"seeds": "ab"}, "seeds: need integers, got 'ab'"),
        ({"seeds": 7}, "seeds: need integers, got 7"),
        ({"label": "middle", "denoiser": labelled()}, "unknown label 'middle'"),
        ({"label": "high", "denoiser": labelled(), "guidance": math.inf}, "guidance: need a number"),
        ({"guidance": 2.0}, "has no .guided"),
        ({"method": "dopri6"}, "unknown .*'dopri6'"),
        ({"method": "rk4"}, "method: rk4 estimates no error"),
        ({"batch": 0}, "batch: need an integer"),
        ({"max_steps": 0}, "max_steps: need an integer"),
        ({"plan": "heun"}, "plan: need a Plan, got 'heun'"),
        ({"adjoint": "exact", "x": torch.zeros(2, 2, requires_grad=True)}, "unknown adjoint 'exact'"),
    ],
)
def test_malformed_calls(options, says):
    given = {"denoiser": eight(), "x": torch.zeros(2, 2), **options}
    if isinstance(given["denoiser"], GaussianMixture):
        given["denoiser"].shape = (2,)
    with pytest.raises(UsageError, match=says):
        pfode.log_likelihood(given.pop("denoiser"), given.pop("x"), **given)


def test_no_transforms():
    net = eight()
    with pytest.raises(UsageError, match=r"cannot run inside torch.func"):
        torch.func.grad(lambda x: pfode.log_likelihood(net, x[None]).nats[0])(torch.zeros(2))
