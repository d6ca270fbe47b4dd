"""The algebra of classifier-free guidance."""

import math
from typing import Any

import pytest
import torch

import pfode
from pfode.denoiser import Preconditioned
from pfode.errors import UsageError
from pfode.scores import guidance
from pfode.scores.denoiser import Denoiser
from tests.scores.small import NAMES, denoiser, network

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
T = torch.tensor([0.1, 0.4, 1.0, 9.0], dtype=torch.float64)
LABEL = torch.tensor([0, 1, 2, 1])


def guide(*args: Any, **options: Any) -> Any:
    return guidance.guide(*args, **options)


@pytest.fixture(scope="module")
def den():
    return denoiser().to(dtype=torch.float64)


@pytest.mark.parametrize("scale", [-1.0, 0.3, 1.5, 4.0])
@pytest.mark.parametrize("t", [T, T[1]], ids=["per sample", "one time"])
def test_the_guided_denoiser_is_the_affine_combination(den, scale, t):
    guided: Any = guide(den, scale)
    with_label, without = den(X, t, label=LABEL), den(X, t)
    torch.testing.assert_close(guided(X, t, label=LABEL), without + scale * (with_label - without))
    assert guided.evals == 2
    assert isinstance(guided, Preconditioned)


def test_scale_one_is_the_denoiser_itself(den):
    assert guide(den, 1.0) is den
    assert den.guided(1) is den
    fixed = guide(den, 1.0, label=2)
    assert fixed.evals == 1
    assert torch.equal(fixed(X, T), den(X, T, label=2))


def test_scale_zero_is_unconditional_at_the_cost_of_one(den):
    free = guide(den, 0.0)
    assert free.evals == 1
    assert torch.equal(free(X, T, label=LABEL), den(X, T))
    assert torch.equal(free(X, T), den(X, T))


def test_the_label_may_be_fixed_and_overridden(den):
    fixed = guide(den, 2.0, label="bee")
    assert torch.equal(fixed(X, T), guide(den, 2.0)(X, T, label=1))
    assert torch.equal(fixed(X, T, label=0), guide(den, 2.0)(X, T, label=0))


def test_guiding_towards_no_class_changes_nothing(den):
    torch.testing.assert_close(guide(den, 3.0)(X, T, label=len(NAMES)), den(X, T))


def test_one_forward_of_twice_the_batch():
    sizes = []
    net = network()
    net.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    guide(Denoiser(net, pfode.EDM(), "edm", labels=NAMES), 2.0)(X.float(), T, label=1)
    assert sizes == [2 * len(X)]


def test_other_conditions_reach_both_halves():
    def net(x, c_noise, label, bias, gain):
        return gain * x + bias[:, None, None, None] + label[:, None, None, None]

    guided = guide(Denoiser(net, pfode.VP(), "x0", labels=NAMES), 2.0)
    bias = torch.arange(4.0)
    expected = 3.0 * X + bias[:, None, None, None] + (3 + 2.0 * (1 - 3))
    torch.testing.assert_close(guided(X, torch.tensor(0.5), label=1, bias=bias, gain=3.0), expected)


def test_any_denoiser_with_classes_can_be_guided(den):
    class Wrapped:
        process, labels = den.process, den.labels

        def __call__(self, x, t, label=None):
            return den(x, t, label=label)

    torch.testing.assert_close(guide(Wrapped(), 2.5)(X, T, label=LABEL), guide(den, 2.5)(X, T, label=LABEL))


def test_it_carries_the_attributes(den):
    guided = guide(den, 2.0, label=1)
    assert (guided.labels, guided.shape, guided.process) == (den.labels, den.shape, den.process)
    assert guided.to(dtype=torch.float32).dtype == torch.float32
    assert guided.label_index("cat") == 2
    assert guided.guided(3.0).scale == 3.0
    assert guided.guided(3.0).denoiser is den


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_scales_are_finite(den, scale):
    with pytest.raises(UsageError, match="finite"):
        guide(den, scale)


def test_errors(den):
    with pytest.raises(UsageError, match="no labels"):
        guide(Denoiser(network(), pfode.EDM(), "edm"), 2.0)
    with pytest.raises(UsageError, match="needs a class"):
        guide(den, 2.0)(X, T)
    with pytest.raises(UsageError, match="unknown label"):
        guide(den, 2.0, label="dog")
    with pytest.raises(UsageError, match="out of range"):
        guide(den, 2.0)(X, T, label=7)


def test_autoguidance_leads_away_from_the_weak_one(den):
    weak = Denoiser(network(), pfode.EDM(), "edm", sigma_data=0.7, shape=den.shape, labels=NAMES)
    both = den(X, T, label=LABEL), weak(X, T, label=LABEL)
    guided = guide(den, 2.5, weak=weak)
    torch.testing.assert_close(guided(X, T, label=LABEL), both[1] + 2.5 * (both[0] - both[1]))
    assert guided.evals == 2
    assert guide(den, 1, weak=weak) is den
    out = pfode.sample(guided, n=2, steps=3, label=1)
    assert (out.nfe, out.evals) == (3, 6)
    assert torch.isfinite(out.x).all()


def test_the_weak_one_must_be_a_sibling(den):
    for weak in (
        Denoiser(network(), pfode.VP(), "eps", shape=den.shape, labels=NAMES),
        Denoiser(network(), pfode.EDM(), "edm", shape=(3, 8, 8), labels=NAMES),
        Denoiser(network(), pfode.EDM(), "edm", shape=den.shape),
    ):
        with pytest.raises(UsageError, match="weak denoiser"):
            guide(den, 2.0, weak=weak)
    with pytest.raises(UsageError, match="no label of its own"):
        guide(den, 2.0, label=1, weak=den)
