"""The algebra of guidance, its costs, and what it passes on."""

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


@pytest.fixture
def sizes(den):
    """The batch sizes of the forwards of `den`, as they come."""
    sizes = []
    handle = den.net.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    yield sizes
    handle.remove()


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


@pytest.mark.parametrize(
    ("scale", "options", "passes"),
    [
        (2.0, {}, 2),
        (2.0, {"negative": 1}, 2),
        (1.0, {}, 1),
        (1.0, {"rescale": 0.7, "eta": 0.0, "norm": 1.0, "negative": 1}, 1),
        (0.0, {}, 1),
        (0.0, {"negative": 1}, 1),
        (0.0, {"rescale": 0.7}, 2),
        (0.0, {"norm": 1.0}, 2),
        (2.0, {"interval": (0.3, 0.5)}, 2),
        (2.0, {"interval": (0.5, 9.0)}, 1),
        (lambda t: t / T[1], {"eta": 0.0}, 1),
    ],
)
def test_one_forward_of_no_more_than_is_needed(den, sizes, scale, options, passes):
    guided = guide(den, scale, label=2, **options)
    guided(X, T[1])
    assert sizes == [passes * len(X)]
    assert guided.at(0.4).evals == passes
    assert guided.evals >= passes


def test_other_conditions_reach_both_halves():
    def net(x, c_noise, label, bias, gain):
        return gain * x + bias[:, None, None, None] + label[:, None, None, None]

    guided = guide(Denoiser(net, pfode.VP(), "x0", labels=NAMES), 2.0)
    bias = torch.arange(4.0)
    expected = 3.0 * X + bias[:, None, None, None] + (3 + 2.0 * (1 - 3))
    torch.testing.assert_close(guided(X, torch.tensor(0.5), label=1, bias=bias, gain=3.0), expected)


NEGATIVES: dict[str, Any] = {
    "name": "bee",
    "number": 1,
    "each": torch.tensor([1, 1, 0, 2]),
    "names": ["bee", "bee", "ant", "cat"],
}


@pytest.mark.parametrize("kind", NEGATIVES)
def test_away_from_another_class(den, kind):
    negative = NEGATIVES[kind]
    away = den(X, T, label=torch.tensor([1, 1, 0, 2] if kind in ("each", "names") else [1] * 4))
    towards = den(X, T, label=LABEL)
    guided = guide(den, 3.0, negative=negative)(X, T, label=LABEL)
    torch.testing.assert_close(guided, away + 3.0 * (towards - away))
    assert torch.equal(guide(den, 3.0, negative={"label": negative})(X, T, label=LABEL), guided)
    torch.testing.assert_close(guide(den, 0.0, negative=negative)(X, T), away)


def test_away_from_the_null_class_is_classifier_free(den):
    assert torch.equal(guide(den, 3.0, negative=len(NAMES))(X, T, label=LABEL), guide(den, 3.0)(X, T, label=LABEL))


def context_network(x, c_noise, context, gain, label=None):
    shift = context.mean((1, 2)) + (0 if label is None else label)
    return torch.as_tensor(gain, dtype=x.dtype).reshape(-1, 1, 1, 1) * x + shift[:, None, None, None]


@pytest.mark.parametrize(("labels", "cond"), [(None, {}), (NAMES, {"label": LABEL})], ids=["no classes", "classes"])
def test_other_conditions_may_differ_and_the_class_stays(labels, cond):
    bare = Denoiser(context_network, pfode.VP(), "x0", labels=labels)
    context, null = torch.rand(4, 5, 2, dtype=X.dtype), torch.zeros(1, 5, 2, dtype=X.dtype)
    given = bare(X, T[0], context=context, gain=2.0, **cond)
    for gain in (3.0, torch.tensor(3.0), torch.full((4,), 3.0)):
        away = bare(X, T[0], context=null.expand(4, 5, 2), gain=3.0, **cond)
        guided = guide(bare, 2.5, negative={"context": null, "gain": gain})
        torch.testing.assert_close(guided(X, T[0], context=context, gain=2.0, **cond), away + 2.5 * (given - away))
    with pytest.raises(UsageError, match="context to guide towards"):
        guided(X, T[0], gain=2.0, **cond)


@pytest.mark.parametrize(
    ("context", "problem"), [(torch.zeros(1, 7, 2), "one shape"), (torch.zeros(3, 5, 2), "got 3 for 4"), ("no", "'no'")]
)
def test_conditions_that_do_not_fit_together(context, problem):
    guided = guide(Denoiser(context_network, pfode.VP(), "x0"), 2.5, negative={"context": context})
    with pytest.raises(UsageError, match=problem):
        guided(X, T[0], context=torch.zeros(4, 5, 2), gain=1.0)


def test_any_denoiser_with_classes_can_be_guided(den):
    class Wrapped:
        process, labels = den.process, den.labels

        def __call__(self, x, t, label=None):
            return den(x, t, label=label)

    torch.testing.assert_close(guide(Wrapped(), 2.5)(X, T, label=LABEL), guide(den, 2.5)(X, T, label=LABEL))


def test_the_scale_may_be_a_function_of_the_time(den):
    guided = guide(den, lambda t: 1 + t**2)
    for i, t in enumerate(T):
        expected = guide(den, 1 + float(t) ** 2)(X, t, label=LABEL)
        torch.testing.assert_close(guided(X, t, label=LABEL), expected)
        torch.testing.assert_close(guided.at(float(t))(X, t, label=LABEL), expected)
        torch.testing.assert_close(guided(X, T, label=LABEL)[i], expected[i])
    assert guided.evals == 2


def test_the_interval_is_open_below_and_closed_above(den):
    full, alone = guide(den, 3.0), den
    guided = guide(den, 3.0, interval=(0.4, 1.0))
    for t, wanted in ((0.1, alone), (0.4, alone), (0.41, full), (1.0, full), (1.01, alone)):
        x0 = guided(X, torch.tensor(t), label=LABEL)
        torch.testing.assert_close(x0, wanted(X, torch.tensor(t), label=LABEL))
    expected = torch.where(
        torch.tensor([False, False, True, False])[:, None, None, None],
        full(X, T, label=LABEL),
        alone(X, T, label=LABEL),
    )
    torch.testing.assert_close(guided(X, T, label=LABEL), expected)


def test_the_interval_is_one_of_sigma_over_alpha():
    process = pfode.VP()
    guided = guide(denoiser(process, "eps"), 3.0, interval=(0.5, 2.0))
    times = [process.time(-2 * math.log(level)) for level in (0.4, 0.6, 1.9, 2.1)]
    assert [guided.at(t).scale for t in times] == [1, 3, 3, 1]


def test_networks_are_not_told_the_time(den):
    for options in ({"interval": (0.1, 1.0)}, {"eta": 0.0}):
        with pytest.raises(UsageError, match="depends on the time"):
            guide(den, 2.0, **options).network(X, T, label=LABEL)


@pytest.mark.parametrize("value", [math.nan, torch.zeros(3)], ids=["nan", "shape"])
def test_schedules_are_checked(den, value):
    with pytest.raises(UsageError, match="scale"):
        guide(den, lambda t: value)(X, T[0], label=LABEL)


def test_it_carries_the_attributes(den):
    guided = guide(den, 2.0, label=1)
    assert (guided.labels, guided.shape, guided.process) == (den.labels, den.shape, den.process)
    assert guided.to(dtype=torch.float32).dtype == torch.float32
    assert guided.label_index("cat") == 2
    assert guided.guided(3.0).scale == 3.0
    assert guided.guided(3.0).denoiser is den
    assert guided.guided(1.0)(X, T).equal(den(X, T, label=1))


def test_another_scale_keeps_the_rest(den):
    options: dict[str, Any] = {"negative": 0, "interval": (0.3, 5.0), "rescale": 0.5, "eta": 0.5, "norm": 0.1}
    again = guide(den, 2.0, label=1, **options).guided(4.0)
    expected = guide(den, 4.0, label=1, **options)(X, T)
    assert torch.equal(again(X, T), expected)
    for key in options:
        less = {other: value for other, value in options.items() if other != key}
        assert not torch.allclose(guide(den, 4.0, label=1, **less)(X, T), expected)


@pytest.mark.parametrize("scale", [math.nan, math.inf, "2", None, True])
def test_scales_are_finite(den, scale):
    with pytest.raises(UsageError, match="finite"):
        guide(den, scale)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"interval": 3.0}, "interval: need two numbers"),
        ({"interval": (2.0, 1.0)}, "interval: need 0 <= low < high"),
        ({"interval": (-1.0, 1.0)}, "interval"),
        ({"interval": (0.0, math.nan)}, "interval"),
        ({"rescale": 1.5}, "rescale: need a number of at least 0 and at most 1"),
        ({"eta": math.inf}, "eta"),
        ({"norm": 0.0}, "norm"),
        ({"norm": math.nan}, "norm"),
        ({"negative": 4}, "label: need an integer from 0 to 3, got 4"),
        ({"negative": -1}, "label: need an integer from 0 to 3, got -1"),
        ({"negative": "dog"}, "unknown label"),
        ({"negative": {}}, "no condition"),
        ({"label": -1}, "label"),
        ({"weak": 0, "negative": 1}, "no negative of its own"),
    ],
)
def test_options_out_of_range(den, options, problem):
    with pytest.raises(UsageError, match=problem):
        guide(den, 2.0, **options)


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


def test_autoguidance_calls_only_what_it_needs(den):
    weak = Denoiser(network(), pfode.EDM(), "edm", sigma_data=0.7, shape=den.shape, labels=NAMES)
    guided = guide(den, 2.5, weak=weak, interval=(0.3, 5.0))
    assert [guided.at(t).evals for t in (0.1, 0.4, 9.0)] == [1, 2, 1]
    assert torch.equal(guided(X, T[0], label=LABEL), den(X, T[0], label=LABEL))
    torch.testing.assert_close(guided(X, T[1], label=LABEL), guide(den, 2.5, weak=weak)(X, T[1], label=LABEL))
    torch.testing.assert_close(guided(X, T, label=LABEL)[3], den(X, T, label=LABEL)[3])
    free = guide(den, 0.0, weak=weak)
    assert free.evals == 1
    assert torch.equal(free(X, T, label=LABEL), weak(X, T, label=LABEL))


def test_guidance_over_guidance(den):
    """Autoguidance of a guided denoiser, and classifier-free guidance of an autoguided one."""
    weak = Denoiser(network(), pfode.EDM(), "edm", sigma_data=0.7, shape=den.shape, labels=NAMES)
    inner = guide(den, lambda t: 1 + t)
    over = guide(inner, 3.0, weak=weak)
    assert over.evals == 3
    expected = torch.lerp(weak(X, T, label=LABEL), inner(X, T, label=LABEL), 3.0)
    torch.testing.assert_close(over(X, T, label=LABEL), expected)
    torch.testing.assert_close(over.at(0.4)(X, T[1], label=LABEL), over(X, T[1], label=LABEL))
    auto = guide(den, lambda t: 1 + t, weak=weak)
    twice = guide(auto, 2.0)
    assert twice.evals == 4
    expected = 2.0 * auto(X, T, label=LABEL) - auto(X, T)
    torch.testing.assert_close(twice(X, T, label=LABEL), expected)
    twofold = guide(inner, 2.0, label=1)
    torch.testing.assert_close(twofold(X, T), 2.0 * inner(X, T, label=1) - inner(X, T, label=3))
    torch.testing.assert_close(twofold(X, T[2]), 2.0 * inner(X, T[2], label=1) - inner(X, T[2], label=3))


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
