"""Models of series: invariance to padding and company, causality, what they learn, forecasts."""

import math
from typing import Any

import pytest
import torch

from pfode import solve
from pfode.errors import UsageError
from pfode.models import ODERNN, GRUODEBayes, LatentODE, NeuralCDE, SecondOrderODE
from pfode.models.gaussian import divergence, log_density, merged
from pfode.models.series import Series, Trainer, Training

NAN = math.nan


def circles(count=16, times=12, seed=0, noise=0.02):
    """Points that go round a circle one way or the other, at times of their own; some values missing."""
    draw = torch.Generator().manual_seed(seed)
    t = torch.rand(count, times, generator=draw, dtype=torch.float64).sort(1).values
    label = torch.arange(count) % 2
    phase = torch.rand(count, 1, generator=draw, dtype=torch.float64) * 6.28
    angle = phase + 5 * t * (2 * label[:, None] - 1)
    x = torch.stack([angle.cos(), angle.sin()], -1)
    x = x + noise * torch.randn(x.shape, generator=draw, dtype=torch.float64)
    x[torch.rand(x.shape, generator=draw) < 0.2] = NAN
    return Series(t, x, label)


def made(name):
    torch.manual_seed(0)
    model = {
        "cde": lambda: NeuralCDE(2, 2, hidden=6, width=8),
        "natural": lambda: NeuralCDE(2, 2, hidden=6, width=8, path="natural", method="dopri5", batch="per-sample"),
        "online": lambda: NeuralCDE(2, 2, hidden=6, width=8, online=True),
        "odernn": lambda: ODERNN(2, 2, hidden=6, width=8),
        "odernn-online": lambda: ODERNN(2, 2, hidden=6, width=8, online=True),
        "bayes": lambda: GRUODEBayes(2, hidden=6),
        "latent": lambda: LatentODE(2, latent=3, hidden=6, width=8),
        "latent-rnn": lambda: LatentODE(2, latent=3, hidden=6, width=8, encoder="rnn", noise=0.1),
        "poisson": lambda: LatentODE(2, latent=3, hidden=6, width=8, likelihood="poisson", kl=0.0),
    }[name]()
    return model.double()


NAMES = ("cde", "natural", "online", "odernn", "odernn-online", "bayes", "latent", "latent-rnn", "poisson")


@pytest.mark.parametrize("name", NAMES)
def test_padding_never_enters_a_loss_and_all_parameters_get_a_gradient(name):
    model, data = made(name), circles()
    data.t[3, 7:], data.x[3, 7:] = NAN, NAN
    longer = Series(
        torch.cat([data.t, torch.full((16, 5), NAN)], 1),
        torch.cat([data.x, torch.full((16, 5, 2), NAN)], 1),
        data.label,
    )
    one, two = (model.loss(series, torch.Generator().manual_seed(0), 0.5) for series in (data, longer))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    one.backward()
    for weights in model.parameters():
        assert not weights.requires_grad or (weights.grad is not None and bool(torch.isfinite(weights.grad).all()))


@pytest.mark.parametrize("name", ["cde", "natural", "online", "odernn", "odernn-online"])
def test_a_series_is_predicted_the_same_alone(name):
    model, data = made(name), circles()
    data.t[3, 7:], data.x[3, 7:] = NAN, NAN
    alone = data[[3]]
    with torch.no_grad():
        together, found = model(data.t, data.x)[3], model(alone.t, alone.x)[0]
    torch.testing.assert_close(together[: len(found)] if model.online else together, found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["online", "odernn-online"])
def test_the_future_never_changes_an_online_prediction(name):
    model, data = made(name), circles()
    changed = data.x.clone()
    changed[:, 8:] = torch.where(torch.isnan(changed[:, 8:]), 3.0, NAN)
    with torch.no_grad():
        one, two = model(data.t, data.x), model(data.t, changed)
    assert torch.equal(one[:, :8], two[:, :8])
    assert not torch.equal(one[:, 8:], two[:, 8:])


def test_an_online_model_fed_by_observations_is_the_batch_bit_for_bit():
    model, data = made("online").float(), circles().to(torch.float32)
    t = data.t[0].expand(16, -1)
    with torch.no_grad():
        whole = model(t, data.x)
        stream = model.stream()
        each = [stream.observe(t[0, i], data.x[:, i]) for i in range(t.shape[1])]
    assert torch.equal(torch.stack(each, 1), whole)


def test_series_of_one_observation_and_without_any():
    data = circles(4)
    data.t[0, 1:], data.x[0, 1:], data.x[1] = NAN, NAN, NAN
    for name in NAMES:
        model = made(name)
        assert bool(torch.isfinite(model.loss(data, torch.Generator().manual_seed(0), 1.0)))
        assert all(map(math.isfinite, model.metrics(data).values()))
        one = data[[0]]
        assert bool(torch.isfinite(model.loss(one, torch.Generator().manual_seed(0), 1.0)))


@pytest.mark.parametrize(("name", "epochs", "accuracy"), [("cde", 10, 0.9), ("online", 10, 0.7), ("odernn", 25, 0.7)])
def test_classifiers_learn(name, epochs, accuracy):
    data, test = circles(48, 8), circles(32, 8, seed=1)
    trainer = Trainer(made(name), data, Training(epochs=epochs, batch=16, rate=0.03))
    losses = [record.loss for record in trainer.run()]
    assert losses[-1] < 0.8 * losses[0]
    assert trainer.evaluate(test)["accuracy"] > accuracy


def test_a_gaussian_is_learnt_by_the_filter():
    data = circles(32, 8)
    trainer = Trainer(made("bayes"), data, Training(epochs=15, batch=16, rate=0.03))
    first = trainer.evaluate(data)
    for _ in trainer.run():
        pass
    assert trainer.evaluate(data)["log_density"] > first["log_density"] + 0.3


def test_forecasts_know_what_was_before_them_only():
    model, data = made("bayes"), circles(4)
    ts = torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=torch.float64)
    with torch.no_grad():
        whole, past = model.forecast(data, ts), model.forecast(data.until(0.5), ts)
    assert whole.mean.shape == whole.std.shape == (4, 4, 2)
    torch.testing.assert_close(whole.mean[:, :2], past.mean[:, :2])
    assert float((whole.mean[:, 2:] - past.mean[:, 2:]).abs().max()) > 1e-4
    t, x, place = merged(data.t, data.x, ts.expand(4, -1))
    assert torch.equal(t.gather(1, place), ts.expand(4, -1))
    assert bool(torch.isnan(x.gather(1, place[..., None].expand(-1, -1, 2))).all())
    assert int((~torch.isnan(x)).sum()) == int(data.observed.sum())


def test_a_latent_ode_is_the_solution_at_each_series_own_times():
    """Its values at own times are those of the plain solve, and a forecast's band has the noise in it."""
    model, data = made("latent"), circles(4)
    model.options.update(rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        z, _ = model.encode(data)
        found, *_ = model.decode(z, data.t)
        for i in range(4):
            ts = torch.cat([torch.zeros(1, dtype=torch.float64), data.t[i]])
            alone = solve(lambda _, z: 10.0 * model.field(z), z[i : i + 1], ts, rtol=1e-9, atol=1e-10).ys[1:, 0]
            torch.testing.assert_close(found[i], model.decoder(alone), rtol=1e-6, atol=1e-7)
        band = model.forecast(data, torch.linspace(0, 2, 5, dtype=torch.float64), samples=16)
        assert torch.equal(band.mean, model.forecast(data, band.t, samples=16).mean)
    assert band.mean.shape == (4, 5, 2)
    assert bool((band.std >= model.log_noise.exp() * 0.999).all())


def test_a_latent_ode_learns():
    data = circles(16, 8)
    trainer = Trainer(made("latent-rnn"), data, Training(epochs=30, batch=16, rate=0.03))
    first = trainer.evaluate(data)["mse"]
    for _ in trainer.run():
        pass
    assert trainer.evaluate(data)["mse"] < 0.8 * first


def test_the_poisson_likelihood_of_a_constant_intensity():
    """log L = sum log(rate) - rate T of each channel: with a field that stands still it is known."""
    model, data = made("poisson"), circles(5)
    with torch.no_grad():
        for network in (model.field, model.intensity):
            for weights in network.parameters():
                weights.zero_()
        model.intensity[-1].bias.copy_(torch.tensor([0.3, -0.2]))
        z = torch.zeros(5, 3, dtype=torch.float64)
        found = model.log_likelihood(data, z)
        values = log_density(data.x, model.decoder(z)[:, None], model.log_noise).nan_to_num(0.0).sum((1, 2))
    rates, seen = torch.tensor([0.3, -0.2], dtype=torch.float64), data.observed.sum(1).double()
    expected = values + seen @ rates - data.t[:, -1] * rates.exp().sum()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_divergences_and_densities_are_torchs():
    draw = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    one, two = (torch.distributions.Normal(draw[i], draw[i + 1].exp()) for i in (0, 2))
    expected = torch.distributions.kl_divergence(one, two)
    torch.testing.assert_close(divergence(draw[0], draw[1], draw[2], draw[3]), expected)
    torch.testing.assert_close(log_density(draw[2], draw[0], draw[1]), one.log_prob(draw[2]))


def test_a_second_order_model_learns_an_oscillation_that_a_first_order_one_cannot():
    """x'' = -x from positions alone: below 1e-6, where a first-order model with more parameters stays above 1e-2."""
    ts = torch.linspace(0, 6, 31, dtype=torch.float64)
    x0 = torch.tensor([[1.0], [0.5], [-0.8]], dtype=torch.float64)
    target = x0 * torch.cos(ts)[:, None, None]
    torch.manual_seed(0)
    options: Any = {"method": "rk4", "adjoint": "direct"}  # a step from each time to the next
    second = SecondOrderODE(torch.nn.Linear(2, 1).double(), torch.nn.Linear(1, 1).double(), **options)

    class First(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layers = torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
            self.network = torch.nn.Sequential(*layers).double()

        def forward(self, x0, ts):
            return solve(lambda t, x: self.network(x), x0, ts, **options).ys

    reached = {}
    for name, model, most in (("second", second, 40), ("first", First(), 15)):
        optimiser = torch.optim.LBFGS(
            model.parameters(), max_iter=most, line_search_fn="strong_wolfe", tolerance_grad=1e-9
        )

        def closure():
            optimiser.zero_grad()  # noqa: B023
            loss = (model(x0, ts) - target).square().mean()  # noqa: B023
            loss.backward()
            return loss.detach()

        optimiser.step(closure)
        reached[name] = float(closure())
    assert reached["second"] < 1e-6
    assert reached["first"] > 1e-2


def test_a_second_order_model_of_series():
    draw = torch.Generator().manual_seed(0)
    t = torch.rand(6, 8, generator=draw, dtype=torch.float64).sort(1).values * 3
    t[2, 5:] = NAN
    x0 = torch.randn(6, 1, generator=draw, dtype=torch.float64)
    data = Series(t, (x0 * torch.cos(t - t[:, :1]))[..., None])
    spring = torch.nn.Linear(2, 1)
    model = SecondOrderODE(spring, size=1).double()
    with torch.no_grad():
        spring.weight.copy_(torch.tensor([[-1.0, 0.0]]))
        spring.bias.zero_()
    assert model.metrics(data)["mse"] < 1e-10
    ahead = model.forecast(data, torch.tensor([4.0], dtype=torch.float64))
    torch.testing.assert_close(ahead.mean[:, 0, 0], x0[:, 0] * torch.cos(4.0 - t[:, 0]), rtol=1e-4, atol=1e-4)
    data.x[1, 0] = NAN
    with pytest.raises(UsageError, match="series '1': '0' is missing at its first time"):
        model.metrics(data)


DATA = circles(4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NeuralCDE(2, 2, path="cubic"), "unknown path 'cubic'"),
        (lambda: NeuralCDE(2, 2, path="natural", online=True), "make a natural path look ahead"),
        (lambda: NeuralCDE(0, 2), "channels: need an integer of at least 1"),
        (lambda: NeuralCDE(2, 0), "outputs: need an integer of at least 1"),
        (lambda: NeuralCDE(2, 2).stream(), "this model predicts at the end of a series"),
        (lambda: ODERNN(2, 2, steps=0), "steps: need an integer of at least 1"),
        (lambda: LatentODE(2, encoder="gru"), "unknown encoder 'gru'"),
        (lambda: LatentODE(2, likelihood="t"), "unknown likelihood 't'"),
        (lambda: LatentODE(2, kl=2.0), "kl: need a number of at least 0 and at most 1"),
        (lambda: LatentODE(2, noise=0.0), "noise: need a number of at least 1e-06"),
        (lambda: LatentODE(2, t0=0.5).double().metrics(DATA), "before t0 = 0.5"),
        (lambda: LatentODE(2).double().forecast(DATA, torch.tensor([-1.0])), "need 4 rows of times from t0 = 0 on"),
        (lambda: GRUODEBayes(2).double().forecast(DATA, torch.zeros(3, 2)), "3 rows of times for 4 series"),
        (lambda: ODERNN(2, 2).double().metrics(Series(DATA.t, DATA.x)), "the series have no labels"),
        (lambda: ODERNN(2, 1).double().metrics(DATA), "2 classes, and a model of 1 outputs"),
        (lambda: SecondOrderODE(torch.nn.Linear(2, 1)), "need a function of the position, or the size"),
    ],
)
def test_malformed_models_are_one_clear_error(make, words):
    with pytest.raises(UsageError, match=words):
        make()
