"""What refines guidance (rescaling, projection, thresholding, clipping): formulas, peers, precision and wrapping."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pfode
from pfode.errors import NumericalError, UsageError
from pfode.scores import mixing, wrapping
from pfode.scores.denoiser import Denoiser
from pfode.scores.guidance import guide as typed_guide
from tests.scores.small import NAMES, denoiser, network

DRAW = torch.Generator().manual_seed(3)
X, AWAY, TOWARDS = (torch.randn(4, 3, 8, 8, generator=DRAW, dtype=torch.float64) for _ in range(3))
T = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rescale": {"rescale": 0.7},
    "projected": {"eta": 0.0},
    "short": {"norm": 2.0},
    "all": {"eta": 0.3, "norm": 2.0, "rescale": 0.5, "interval": (0.2, 5.0), "negative": 1},
}


def guide(*args: Any, **options: Any) -> Any:
    return typed_guide(*args, **options)


class Given:
    """Predetermined outputs: away from 1, towards 0."""

    process, labels = pfode.VP(), ("there",)

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return torch.where(
            label[:, None, None, None] == 0, TOWARDS[: len(x) // 2].repeat(2, 1, 1, 1), AWAY.repeat(2, 1, 1, 1)
        )


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def test_projection_drops_what_is_parallel_and_keeps_the_rest():
    update = guide(Given(), 2.0, eta=0.0)(X, T[0], label=0) - TOWARDS
    whole = TOWARDS - AWAY
    assert dot(update, TOWARDS).abs().max() < 1e-12
    torch.testing.assert_close(dot(update, whole), dot(update, update))
    half = guide(Given(), 2.0, eta=0.5)(X, T[0], label=0) - TOWARDS
    torch.testing.assert_close(half, (update + whole) / 2)


def test_long_updates_are_shortened_and_short_ones_left():
    length = (TOWARDS - AWAY).flatten(1).norm(dim=1)
    norm = length.median().item()
    update = guide(Given(), 2.0, norm=norm)(X, T[0], label=0) - TOWARDS
    torch.testing.assert_close(update.flatten(1).norm(dim=1), length.clamp_max(norm))
    assert (length < norm).any()
    assert (length > norm).any()


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "edm"])
def test_projection_is_one_of_x0_whatever_the_network_predicts(prediction):
    """The network's output is guided so that D is, when asked one time for all, one time each, and by its network."""
    den = denoiser(pfode.VP(), prediction).to(dtype=torch.float64)
    guided = guide(den, 5.0, label=2, eta=0.2, norm=1.5)
    x = X[:, :1]
    away, towards = den(x, T), den(x, T, label=2)
    expected = towards + 4.0 * mixing.projected(towards - away, towards, 0.2, 1.5)
    assert not torch.allclose(expected, guide(den, 5.0, label=2)(x, T))
    torch.testing.assert_close(guided(x, T), expected)
    for i, t in enumerate(T):
        torch.testing.assert_close(guided(x, t)[i], expected[i])
        c = den.precondition(t)
        out = guided.at(float(t)).network(c.c_in * x, c.c_noise)
        torch.testing.assert_close((c.c_skip * x + c.c_out * out)[i], expected[i])


def test_rescaling_is_one_of_what_the_network_returns():
    den = denoiser(pfode.VP(), "v").to(dtype=torch.float64)
    x = X[:, :1]
    given, guided = (guide(den, w, label=2).network(x, T) for w in (1.0, 6.0))
    full = guide(den, 6.0, label=2, rescale=1.0).network(x, T)
    torch.testing.assert_close(full.flatten(1).std(1), given.flatten(1).std(1))
    part = guide(den, 6.0, label=2, rescale=0.3).network(x, T)
    torch.testing.assert_close(part, 0.7 * guided + 0.3 * full)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers under numpy 2
@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("scale", [0.5, 3.0, 14.0])
def test_diffusers_guiders(scale, rescale):
    """Its projected guidance is the paper's in the "original formulation", where its scale is less by one."""
    from diffusers.guiders.adaptive_projected_guidance import AdaptiveProjectedGuidance
    from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance

    theirs = ClassifierFreeGuidance(guidance_scale=scale, guidance_rescale=rescale)
    ours = guide(Given(), scale, rescale=rescale)
    torch.testing.assert_close(ours(X, T[0], label=0), theirs.forward(TOWARDS, AWAY).pred, rtol=1e-12, atol=1e-12)
    for eta, norm in ((0.0, 15.0), (1.0, 2.5), (-0.5, 100.0)):
        theirs = AdaptiveProjectedGuidance(
            guidance_scale=scale - 1,
            adaptive_projected_guidance_rescale=norm,
            eta=eta,
            guidance_rescale=rescale,
            use_original_formulation=True,
        )
        ours = guide(Given(), scale, eta=eta, norm=norm, rescale=rescale)
        torch.testing.assert_close(ours(X, T[0], label=0), theirs.forward(TOWARDS, AWAY).pred, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
def test_thresholding_is_imagen_s(quantile):
    """As diffusers' DDPM does where its sample_max_value does not bind, and as the paper's two lines of NumPy."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    x0 = X * torch.tensor([0.1, 1.0, 3.0, 30.0], dtype=X.dtype).reshape(-1, 1, 1, 1)
    ours = wrapping.thresholded(x0, quantile, 1.0)
    theirs = DDPMScheduler(dynamic_thresholding_ratio=quantile, sample_max_value=1e9)._threshold_sample(x0)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    s = np.maximum(np.percentile(np.abs(x0.numpy()), 100 * quantile, axis=(1, 2, 3), keepdims=True), 1.0)
    np.testing.assert_allclose(ours.numpy(), np.clip(x0.numpy(), -s, s) / s, rtol=1e-12)
    torch.testing.assert_close(wrapping.thresholded(2 * x0, quantile, 2.0), 2 * ours)


def test_wrappers_bound_x0():
    den = denoiser().to(dtype=torch.float64)
    x, t = X[:, :1] * 5, torch.tensor(0.5)
    x0 = den(x, t, label=1)
    assert x0.abs().max() > 2
    assert torch.equal(wrapping.clip(den, -0.5, 2.0)(x, t, label=1), x0.clamp(-0.5, 2.0))
    bounded = wrapping.threshold(den, 0.9, 1.0)(x, t, label=1)
    assert torch.equal(bounded, wrapping.thresholded(x0, 0.9, 1.0))
    assert bounded.abs().max() <= 1


@pytest.mark.parametrize("bound", [wrapping.threshold, wrapping.clip])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_bounds_do_not_hide_what_is_not_finite(bound, value):
    class Broken:
        process, shape = pfode.EDM(), (1, 8, 8)

        def __call__(self, x, t):
            x0 = torch.zeros_like(x)
            x0[1, 0, 3, 3] = value
            return x0

    with pytest.raises(NumericalError, match="sample 1"):
        pfode.sample(bound(Broken()), n=3, steps=2)


def test_bounds_that_are_none():
    den = denoiser()
    for problem, call in (
        ("low < high", lambda: wrapping.clip(den, 1.0, 1.0)),
        ("high", lambda: wrapping.clip(den, 0.0, math.nan)),
        ("limit", lambda: wrapping.threshold(den, 0.9, 0.0)),
        ("quantile: need a number of at least 0 and at most 1", lambda: wrapping.threshold(den, 99.5)),
    ):
        with pytest.raises(UsageError, match=problem):
            call()


def test_single_numbers_and_constants_are_no_division_by_zero():
    def net(x, c_noise, label):
        return torch.where(label == 0, 2.0, 0.0)[:, None].expand_as(x).clone()

    den = Denoiser(net, pfode.VP(), "x0", labels=("a",))
    for options in KINDS.values():
        for width in (1, 5):
            x0 = guide(den, 3.0, label=0, **{**options, "negative": None})(torch.ones(2, width), torch.tensor(0.5))
            assert torch.isfinite(x0).all()
    assert torch.equal(mixing.projected(torch.zeros(2, 3), torch.zeros(2, 3), 0.0, 1.0), torch.zeros(2, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_at_guidance_14(dtype, kind):
    half = denoiser(pfode.EDM(), "edm").to(dtype=dtype)
    exact: Any = guide(half.to(dtype=torch.float64), 14.0, label=2, **KINDS[kind])
    guided: Any = wrapping.threshold(guide(half, 14.0, label=2, **KINDS[kind]))
    assert guided.dtype == dtype
    x = X[:, :1].float()
    before = x.clone()
    for t in (torch.tensor(0.002), torch.tensor(0.5), torch.tensor(80.0), T * 80):
        x0 = guided.denoiser(x, t)
        assert x0.dtype == torch.float32
        assert torch.isfinite(x0).all()
        assert torch.isfinite(guided(x, t)).all()
    assert torch.equal(x, before)
    error = (guided.denoiser(x, torch.tensor(0.5)) - exact(x.double(), torch.tensor(0.5))).abs().max()
    assert error < 14 * 3 * torch.finfo(dtype).eps * 10


def test_half_precision_outputs_are_mixed_in_the_precision_of_x():
    outputs = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)  # neighbours
    den = Denoiser(lambda x, c_noise, label: outputs[label, None].expand_as(x), pfode.VP(), "x0", labels=("a",))
    x0 = guide(den, 3.3, label=0)(torch.zeros(2, 5), T[:2])
    torch.testing.assert_close(x0, torch.full((2, 5), 1.0078125 - 3.3 * 0.0078125))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [T, torch.tensor(0.5), 0.5], ids=["per sample", "one time", "number"])
def test_it_compiles_whole(kind, t):
    def net(x, c_noise, label):
        return torch.tanh(x + 0.1 * (label + c_noise)[:, None, None, None])

    guided = wrapping.clip(guide(Denoiser(net, pfode.VP(), "eps", labels=NAMES), 3.0, label=2, **KINDS[kind]))
    torch.compiler.reset()  # or the cases count as one function compiled again and again
    compiled = torch.compile(lambda x, t: guided(x, t), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, t), guided(X, t))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_back_from_the_device(kind):
    """On the device "meta", where tensors have no values to read."""

    def net(x, c_noise, label):
        return torch.tanh(x + label[:, None, None, None])

    den, weak = (Denoiser(net, pfode.VP(), prediction, labels=NAMES) for prediction in ("eps", "v"))
    refined = {key: value for key, value in KINDS[kind].items() if key != "negative"}
    x, label = torch.empty(4, 1, 8, 8, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    for guided in (guide(den, 3.0, **KINDS[kind]), guide(den, 3.0, weak=weak, **refined)):
        for bound in (lambda d: d, wrapping.clip, wrapping.threshold):
            out = pfode.run(pfode.make_plan("dpm++2m", den.process, 6), bound(guided), x, label=label)
            assert (out.shape, out.device.type) == (x.shape, "meta")
            assert bound(guided)(x, torch.empty((), device="meta"), label=label).shape == x.shape


@pytest.mark.parametrize(
    "wrap", [wrapping.clip, wrapping.threshold, lambda d: guide(d, 2.0, label=1, interval=(0.1, 1.0))]
)
def test_wrappers_carry_the_attributes(wrap, monkeypatch):
    den = denoiser()
    outer: Any = wrap(den)
    assert (outer.labels, outer.shape, outer.process, outer.device) == (den.labels, den.shape, den.process, den.device)
    assert outer.label_index("cat") == 2
    double = outer.to(dtype=torch.float64)
    assert double.dtype == torch.float64
    assert outer.dtype == torch.float32
    x, t = X[:, :1], torch.tensor(0.5)
    assert torch.equal(double(x, t, label=1), wrap(den.to(dtype=torch.float64))(x, t, label=1))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda net: "compiled")
        assert outer.compiled().denoiser.net == "compiled"


def test_a_scale_given_to_sample_goes_under_the_bounds():
    den = denoiser()
    bounded: Any = wrapping.clip(den)
    assert bounded.evals == 1
    assert bounded.guided(2.0).evals == 2
    x = X[:, :1].float() * 4
    expected = guide(den, 2.0)(x, torch.tensor(0.5), label=1).clamp(-1, 1)
    assert torch.equal(bounded.guided(2.0)(x, torch.tensor(0.5), label=1), expected)
    assert bounded.at(0.5).evals == 1
    lone: Any = wrapping.clip(pfode.scores.Gaussian([0.0, 0.0]))
    assert lone.guided(1) is lone
    assert lone.to("cpu").process == lone.process
    for call in (lambda: lone.guided(2.0), lone.compiled, lambda: lone.label_index("a")):
        with pytest.raises(UsageError, match="has no"):
            call()


def test_autoguidance_is_refined_on_x0():
    den = denoiser().to(dtype=torch.float64)
    weak = Denoiser(network(), pfode.EDM(), "edm", sigma_data=0.7, shape=den.shape, labels=NAMES).to(
        dtype=torch.float64
    )
    x = X[:, :1]
    away, towards = weak(x, T, label=1), den(x, T, label=1)
    expected = towards + 2.0 * mixing.projected(towards - away, towards, 0.0, 0.5)
    torch.testing.assert_close(guide(den, 3.0, weak=weak, eta=0.0, norm=0.5)(x, T, label=1), expected)
    rescaled = mixing.rescaled(torch.lerp(away, towards, 3.0), towards, 0.7)
    torch.testing.assert_close(guide(den, 3.0, weak=weak, rescale=0.7)(x, T, label=1), rescaled)
