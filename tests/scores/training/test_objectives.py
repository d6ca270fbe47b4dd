"""Objectives: what they agree on, what they learn, and what is refused."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import pfode
from pfode.errors import UsageError
from pfode.scores import Denoiser, load
from pfode.scores.networks.mlp import MLPConfig
from pfode.scores.toys import law
from pfode.scores.training.batches import Batch
from pfode.scores.training.config import TrainConfig
from pfode.scores.training.coupling import Assignment, Entropic, Given
from pfode.scores.training.interpolants import INTERPOLANTS, interpolate
from pfode.scores.training.objectives import Denoising, Example, FlowMatching, Implicit, Objective, Sliced, objective
from pfode.scores.training.points import Points, points_of
from pfode.scores.training.trainer import Trainer

CPU = torch.device("cpu")
NETWORK = MLPConfig(width=16, depth=2)
CONFIG = TrainConfig(network=NETWORK, process=pfode.EDM().config(), steps=8, batch=32, warmup=0, rate=3e-3, drop=0.0)
FLOW = replace(CONFIG, process=pfode.Flow().config(), prediction="flow", levels="uniform")


class Linear(torch.nn.Module):
    """F = x A + c_noise b: few parameters, so that gradients can be compared."""

    def __init__(self, d: int = 2):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = torch.nn.Parameter(0.3 * torch.randn(d, d, generator=generator))
        self.b = torch.nn.Parameter(torch.randn(d, generator=generator))

    def forward(self, x, c_noise):
        return torch.tanh(x @ self.a) + c_noise[:, None] * self.b


def example(process: pfode.Process, n: int = 60_000, data: Any = None) -> Example:
    config = replace(CONFIG, process=process.config(), levels="", prediction="", batch=n)
    x0 = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.5 + 0.3
    batch = Batch(config, points_of(x0 if data is None else data))
    quantiles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    e = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return Example(x0, e, batch.times(quantiles), None, list(range(n)), batch._slopes(quantiles))


def gradient(value: Objective, process: pfode.Process, prediction: str, ex: Example, weight: torch.Tensor) -> Any:
    network = Linear()
    loss = value.loss(Denoiser(network, process, prediction), ex, CPU)
    (loss.reshape(len(weight), -1).mean(1) * weight).sum().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize(("process", "prediction"), [(pfode.EDM(), "edm"), (pfode.VP(), "eps"), (pfode.VP(), "v")])
def test_implicit_and_denoising_score_matching_pull_alike(process, prediction):
    """Their gradients have the same mean over the noise, here by Gauss-Hermite quadrature: integration by parts."""
    ex = example(process, 40)
    places, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(24))
    e, weight = torch.cartesian_prod(places, places), torch.cartesian_prod(weights, weights).prod(1)
    x0, t = (part.repeat_interleave(len(e), 0) for part in (ex.x0, ex.t))
    every = Example(x0, e.repeat(40, 1), t, None, list(range(len(t))), torch.ones_like(t))
    weight = (weight / weight.sum()).repeat(40).float()
    wanted = gradient(Denoising(), process, prediction, every, weight)
    found = gradient(Implicit(), process, prediction, every, weight)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3


def test_sliced_is_implicit_on_average():
    process = pfode.EDM()
    ex = example(process, 2000)
    den = Denoiser(Linear(), process, "edm")
    exact = Implicit().loss(den, ex, CPU)
    many = Sliced(probes=64).loss(den, ex, CPU)
    assert exact.shape == many.shape == (2000,)
    assert abs(float((many - exact).detach().mean())) < 4 * float((many - exact).detach().std()) / math.sqrt(2000)
    alone = Example(ex.x0[:5], ex.noise[:5], ex.t[:5], None, ex.seeds[:5], ex.slope[:5])
    assert torch.allclose(Sliced().loss(den, alone, CPU), Sliced().loss(den, ex, CPU)[:5], rtol=1e-4, atol=1e-4)


def test_flow_matching_with_noise_is_denoising_on_the_flow_process():
    process = pfode.Flow()
    ex = example(process, 500)
    den = Denoiser(Linear(), process, "flow")
    assert torch.allclose(FlowMatching().loss(den, ex, CPU), Denoising().loss(den, ex, CPU), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("levels", ["lognormal", "uniform"])
def test_likelihood_weighting_is_an_integral_whatever_the_levels(levels):
    """Of Gaussian data of variance c and its exact denoiser, int c/(c + e^2v) dv = [v - log(c + e^2v)/2]."""
    process, n, variance = pfode.VP(), 100_000, 0.25
    config = replace(CONFIG, process=process.config(), levels=levels, prediction="x0", batch=2**16, level_mean=0.0)
    config = replace(config, level_std=2.5)
    quantiles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    batch = Batch(config, points_of("moons"))
    t = batch.times(quantiles)
    generator = torch.Generator().manual_seed(0)
    x0, e = (torch.randn(n, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    x0 *= math.sqrt(variance)
    gauss = pfode.scores.Gaussian([0.0, 0.0], variance, process)
    den = Denoiser(lambda x, c_noise: gauss(x.double(), c_noise.double()), process, "x0")
    loss = Denoising("likelihood").loss(den, Example(x0, e, t, None, [], batch._slopes(quantiles)), CPU)
    ends = [-0.5 * process.log_snr(time) for time in (float(t.min()), float(t.max()))]
    low, high = (v - 0.5 * math.log(variance + math.exp(2 * v)) for v in ends)
    assert float(loss.mean()) == pytest.approx(high - low, rel=0.03)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_velocities_are_slopes_and_ends_are_the_points(name):
    kind = INTERPOLANTS[name](0.4)
    generator = torch.Generator().manual_seed(0)
    x0, x1, e = (torch.randn(9, 2, dtype=torch.float64, generator=generator) for _ in range(3))
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    _, velocity = interpolate(kind, t, x0, x1, e)
    ahead, behind = (interpolate(kind, t + h, x0, x1, e)[0] for h in (1e-6, -1e-6))
    assert torch.allclose(velocity, (ahead - behind) / 2e-6, atol=1e-7)
    for end, point in ((0.0, x0), (1.0, x1)):
        assert torch.allclose(interpolate(kind, torch.full((9,), end).double(), x0, x1, e)[0], point, atol=0.02)


@pytest.mark.parametrize("coupling", [Assignment(), Entropic()])
def test_a_coupled_batch_is_the_same_in_parts(coupling):
    config = replace(FLOW, objective=FlowMatching(coupling), batch=24)
    whole = Batch(config, points_of("moons")).example(5, range(24))
    parts = Batch(config, points_of("moons"))
    assert torch.equal(torch.cat([parts.example(5, range(i, i + 8)).noise for i in (16, 0, 8)]).sort(0)[0],
                       whole.noise.sort(0)[0])  # fmt: skip
    assert torch.equal(parts.example(5, range(8, 16)).noise, whole.noise[8:16])
    plain = Batch(replace(config, objective=FlowMatching()), points_of("moons")).example(5, range(24))
    assert torch.equal(plain.x0, whole.x0)
    assert torch.equal(plain.noise.sort(0)[0], whole.noise.sort(0)[0])
    assert (plain.x0 - plain.noise).square().sum() > (whole.x0 - whole.noise).square().sum()


def test_sources_and_pairs():
    moons, eight = law("moons"), points_of("8gaussians")
    drawn = Batch(FLOW, Points(None, moons, source=eight)).example(3, range(32))
    assert float(eight.law.log_prob(drawn.noise).min()) > -15  # type: ignore[union-attr]
    few = torch.arange(20.0).reshape(10, 2)
    batch = Batch(replace(FLOW, objective=FlowMatching(Given())), Points(few, pairs=few + 100))
    paired = batch.example(2, range(32))
    assert torch.equal(paired.noise - paired.x0, torch.full((32, 2), 100.0).double())
    drawn = Batch(FLOW, Points(few, source=Points(few + 100))).example(2, range(32))
    assert len(drawn.noise.unique(dim=0)) > 5
    assert len((drawn.noise - drawn.x0).unique(dim=0)) > 5


def train(config: TrainConfig, data: Any, folder: Any = None, stop: int | None = None, **options: Any) -> Any:
    trainer = Trainer(config, data, folder, device="cpu", **options)
    losses = []
    for record in trainer.run():
        losses.append(record.loss)
        if record.step == stop:
            break
    return trainer, losses


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, objective=Sliced()),
        replace(CONFIG, objective=Implicit(), network=replace(NETWORK, potential=True)),
        replace(FLOW, objective=FlowMatching(Assignment())),
        replace(FLOW, objective=FlowMatching(Entropic(1.0, 5), "bridge")),
    ],
    ids=["denoising", "sliced", "implicit-energy", "ot-cfm", "bridge"],
)
def test_points_are_trained_on_resumed_and_saved(config, tmp_path):
    data = points_of("moons")
    whole, losses = train(config, data)
    train(config, data, tmp_path, stop=5, save_every=3)
    again, rest = train(config, data, tmp_path, resume=True, save_every=3)
    assert rest == losses[3:]
    assert all(torch.equal(a, b) for a, b in zip(whole.net.parameters(), again.net.parameters(), strict=True))
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    den = load(again.export(tmp_path / "model.safetensors", {}))
    x = pfode.sample(den, n=5, steps=4).x
    assert x.shape == (5, 2)
    assert x.isfinite().all()


def test_the_default_objective_leaves_no_trace_in_configurations():
    assert "objective" not in CONFIG.to_json()
    assert TrainConfig.from_json(CONFIG.to_json()).objective == Denoising()


def test_another_objective_is_another_run(tmp_path):
    train(replace(FLOW, steps=2), points_of("moons"), tmp_path)
    with pytest.raises(UsageError, match="objective was None, now"):
        train(replace(FLOW, steps=2, objective=FlowMatching()), points_of("moons"), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: objective({"name": "gan"}), "unknown objective"),
        (lambda: objective({"name": "sliced", "probe": 3}), "sliced"),
        (lambda: objective({"name": "flow", "coupling": {"name": "emd"}}), "unknown coupling"),
        (lambda: Sliced(probes=0), "probes"),
        (lambda: Sliced(probes=1.5), "probes"),  # type: ignore[arg-type]
        (lambda: Denoising("snr"), "unknown weighting"),
        (lambda: FlowMatching(interpolant="cubic"), "unknown interpolant"),
        (lambda: FlowMatching(std=-1.0), "std"),
        (lambda: Entropic(reg=0.0), "reg"),
        (lambda: Entropic(sweeps=0), "sweeps"),
        (lambda: replace(CONFIG, objective="flow"), "objective"),
        (lambda: Trainer(replace(CONFIG, objective=FlowMatching()), points_of("moons"), device="cpu"), "velocities"),
        (lambda: Trainer(replace(CONFIG, flip=("*",)), points_of("moons"), device="cpu"), "mirror"),
        (lambda: Trainer(CONFIG, points_of("twonorm"), device="cpu"), "does not fit"),
        (lambda: points_of("moon"), "unknown law"),
        (lambda: points_of(3), "points"),  # type: ignore[arg-type]
        (lambda: points_of(torch.zeros(3)), "values"),
        (lambda: points_of(torch.zeros(3, 2, dtype=torch.int64)), "values"),
        (lambda: points_of(torch.zeros(3, 2) / 0), "not finite"),
        (lambda: Points(None), "either"),
        (lambda: Points(torch.zeros(3, 2), pairs=torch.zeros(4, 2)), "pairs"),
        (lambda: Points(torch.zeros(3, 2), source=points_of("twonorm")), "source"),
        (lambda: MLPConfig(width=0), "width"),
        (lambda: MLPConfig(activation="relu6"), "activation"),
        (lambda: MLPConfig.from_json({"name": "MLP", "wide": 3}), "unknown network field"),
        (lambda: MLPConfig.from_json({"name": "MLP", "depth": "3"}), "depth"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()
