"""Preconditioning: D is exact whenever F is, for every prediction and process."""

import math

import pytest
import torch
from torch import nn

import pfode
from pfode.errors import UsageError
from pfode.prediction import PREDICTIONS
from pfode.scores.denoiser import Denoiser
from tests import problems
from tests.scores.small import NAMES, denoiser, network

ALL = ["edm", "ve", *PREDICTIONS]


def levels(process: pfode.Process, n: int = 7) -> torch.Tensor:
    return torch.linspace(process.t_min, process.t_max, n + 2, dtype=torch.float64)[1:-1]


@pytest.mark.parametrize("prediction", ALL)
@pytest.mark.parametrize("process", problems.ALL_PROCESSES.values(), ids=list(problems.ALL_PROCESSES))
def test_d_is_exact_when_f_is(process, prediction):
    t = levels(process)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    x0, noise = torch.randn(2, len(t), 5, dtype=torch.float64)
    x = alpha * x0 + sigma * noise
    plain = Denoiser(lambda x, t: x, process, prediction)
    target = plain.target(x0, noise, alpha, sigma)
    exact = Denoiser(lambda x, t: target, process, prediction)
    torch.testing.assert_close(exact(x, t), x0, rtol=1e-8, atol=1e-8)
    c = exact.precondition(t)
    by_definition = (x0 - c.c_skip[:, None] * x) / c.c_out[:, None]
    torch.testing.assert_close(target, by_definition, rtol=1e-6, atol=1e-6 * float(target.abs().max()))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("process", problems.ALL_PROCESSES.values(), ids=list(problems.ALL_PROCESSES))
def test_predictions_are_the_rows_of_the_table(process, prediction):
    t = levels(process)
    alpha, sigma = process.alpha(t), process.sigma(t)
    x, out = torch.randn(2, len(t), dtype=torch.float64)
    c, d = PREDICTIONS[prediction].to_x0(alpha, sigma)
    den = Denoiser(lambda x, t: out[:, None], process, prediction, time_scale=1000.0)
    torch.testing.assert_close(den(x[:, None], t)[:, 0], c * x + d * out)
    assert torch.equal(den.precondition(t).c_noise, 1000 * t)


@pytest.mark.parametrize("process", problems.ALL_PROCESSES.values(), ids=list(problems.ALL_PROCESSES))
def test_edm_inputs_and_targets_have_unit_variance(process):
    t, s = levels(process), 0.7
    alpha, sigma = process.alpha(t), process.sigma(t)
    den = Denoiser(lambda x, t: x, process, "edm", sigma_data=s)
    c = den.precondition(t)
    ones = torch.ones_like(t)
    torch.testing.assert_close(c.c_in**2 * (alpha**2 * s**2 + sigma**2), ones)
    # target = p x0 + q noise, with Var = p^2 s^2 + q^2
    p = den.target(ones, 0 * ones, alpha, sigma)
    q = den.target(0 * ones, ones, alpha, sigma)
    torch.testing.assert_close(p**2 * s**2 + q**2, ones)
    # c_skip is the best linear denoiser: F then sees no multiple of x
    torch.testing.assert_close(c.c_skip, alpha * s**2 / (alpha**2 * s**2 + sigma**2))
    torch.testing.assert_close(c.c_noise, torch.log(sigma / alpha) / 4)


def test_edm_preconditioning_on_edm_is_karras_table_1():
    sigma, s = torch.tensor([0.01, 0.5, 80.0], dtype=torch.float64), 0.5
    c = Denoiser(lambda x, t: x, pfode.EDM(), "edm").precondition(sigma)
    torch.testing.assert_close(c.c_skip, s**2 / (sigma**2 + s**2))
    torch.testing.assert_close(c.c_out, sigma * s / (s**2 + sigma**2).sqrt())
    torch.testing.assert_close(c.c_in, 1 / (sigma**2 + s**2).sqrt())


@pytest.mark.parametrize("prediction", ["x0", "eps", "score", "v"])
def test_inputs_are_scaled_where_the_process_is_not(prediction):
    for process in problems.ALL_PROCESSES.values():
        t = levels(process)
        hypot = torch.hypot(process.alpha(t), process.sigma(t))
        c_in = Denoiser(lambda x, t: x, process, prediction).precondition(t).c_in
        torch.testing.assert_close(c_in, 1 / hypot)
        if isinstance(process, pfode.VP | pfode.VPCosine | pfode.VPDiscrete):
            assert (c_in == 1).all()
    assert (Denoiser(lambda x, t: x, pfode.Flow(), "flow").precondition(levels(pfode.Flow())).c_in == 1).all()


@pytest.mark.parametrize("prediction", ALL)
def test_no_signal(prediction):
    den = Denoiser(lambda x, t: x, pfode.Flow(), prediction)
    x, t = torch.ones(2, 3), torch.tensor(1.0, dtype=torch.float64)
    if prediction in ("edm", "ve", "eps", "score"):
        with pytest.raises(UsageError, match=r"alpha = 0"):
            den(x, t)
    else:
        assert den(x, t).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_network_sees_its_own_dtype_and_the_state_keeps_its(dtype):
    seen = []

    class Probe(nn.Linear):
        def forward(self, input, t):  # type: ignore[override]
            seen.append((input.dtype, t.dtype, tuple(t.shape)))
            return super().forward(input)

    den = Denoiser(Probe(3, 3), pfode.VP(), "v").to(dtype=dtype)
    for state in (torch.float32, torch.float64):
        assert den(torch.randn(2, 3, dtype=state), torch.tensor(0.5)).dtype == state
    time = torch.float64 if dtype == torch.float64 else torch.float32
    assert seen == [(dtype, time, (2,)), (dtype, time, (2,))]
    assert den.dtype == dtype


def test_to_leaves_the_original_alone():
    den = denoiser()
    half = den.to("cpu", torch.bfloat16)
    assert (den.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert next(den.net.parameters()).dtype == torch.float32
    assert (half.labels, half.shape, half.process) == (den.labels, den.shape, den.process)
    assert den.to("cpu") is den
    assert den.device == torch.device("cpu")
    function = Denoiser(lambda x, t: x, pfode.VP())
    assert function.to("cpu", torch.float16) is function
    assert function.dtype is None


def test_half_precision_networks_stay_close():
    den, x, t = denoiser(), torch.randn(4, 1, 8, 8), torch.tensor(0.5)
    torch.testing.assert_close(den.to(dtype=torch.bfloat16)(x, t, label=1), den(x, t, label=1), rtol=0.05, atol=0.05)


def test_labels_may_be_given_in_every_form():
    den, x, t = denoiser(), torch.randn(2, 1, 8, 8), torch.tensor(0.5)
    expected = den(x, t, label=torch.tensor([1, 1]))
    for label in (1, torch.tensor(1), torch.tensor([1, 1], dtype=torch.int32), den.label_index("bee")):
        assert torch.equal(den(x, t, label=label), expected)
    assert torch.equal(den(x, t), den(x, t, label=3))


@pytest.mark.parametrize("label", [-1, 4, 10**9, torch.tensor([0, 4]), torch.tensor([-1, 0]), torch.tensor(17)])
def test_labels_out_of_range(label):
    with pytest.raises(UsageError, match=r"out of range\nhint: 0 to 2: ant, bee, cat"):
        denoiser()(torch.randn(2, 1, 8, 8), torch.tensor(0.5), label=label)


@pytest.mark.parametrize("label", [torch.tensor([0.0, 1.0]), torch.tensor([0, 1, 2]), torch.tensor([[0], [1]])])
def test_labels_of_the_wrong_kind(label):
    with pytest.raises(UsageError, match="expected integers of shape"):
        denoiser()(torch.randn(2, 1, 8, 8), torch.tensor(0.5), label=label)


def test_label_names():
    den = denoiser()
    assert [den.label_index(name) for name in ("ant", "BEE", "2", 1)] == [0, 1, 2, 1]
    for name in ("dog", "3", -1, ""):
        with pytest.raises(UsageError, match="unknown label"):
            den.label_index(name)
    with pytest.raises(UsageError, match="did you mean 'bee'"):
        den.label_index("beee")
    with pytest.raises(UsageError, match="unconditional"):
        Denoiser(network(), pfode.EDM(), "edm").label_index("bee")


def test_digits_are_named_not_numbered():
    names = tuple("1234567890")
    assert Denoiser(network(), pfode.EDM(), labels=names).label_index("0") == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": "epsilon"}, "unknown prediction"),
        ({"sigma_data": 0.0}, "positive"),
        ({"sigma_data": math.nan}, "positive"),
        ({"time_scale": -1.0}, "positive"),
    ],
)
def test_bad_construction(change, message):
    with pytest.raises(UsageError, match=message):
        Denoiser(lambda x, t: x, pfode.VP(), **change)


def test_it_samples():
    den = denoiser()
    out = pfode.sample(den, n=3, steps=4, label=[0, 1, 2], guidance=2.0)
    assert out.x.shape == (3, 1, 8, 8)
    assert out.evals == 2 * out.nfe
    assert den.labels == NAMES


def test_coefficients_of_the_last_times_are_kept_while_nothing_changes(monkeypatch):
    den = Denoiser(lambda x, t: x, pfode.EDM(), "edm")
    computed = []
    plain = Denoiser._precondition
    monkeypatch.setattr(Denoiser, "_precondition", lambda self, t: computed.append(1) or plain(self, t))
    t = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert den.precondition(t) is den.precondition(t)
    assert len(computed) == 1
    t.mul_(2)
    for change in ({}, {"sigma_data": 1.5}, {"process": pfode.VE(0.01, 50.0)}, {"prediction": "ve"}):
        for name, value in change.items():
            setattr(den, name, value)
        for ours, fresh in zip(den.precondition(t), plain(den, t), strict=True):
            assert torch.equal(ours, fresh)
    den.precondition(t.clone())
    assert len(computed) == 6
    with torch.inference_mode():
        kept = den.precondition(torch.ones(2, dtype=torch.float64))
    assert torch.isfinite(kept.c_in).all()
