"""k-diffusion's functions: its signatures, callbacks and numbers, and code written for it."""

import inspect
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pfode
from pfode.errors import UsageError
from pfode.samplers import CATALOGUE, kdiffusion, make_plan
from tests import peers, problems

THEIRS = [
    *("euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms", "dpmpp_2s_ancestral", "dpmpp_sde"),
    *("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde"),
]
GRID = (12, 0.02, 80.0)


def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
    assert sigma.shape == x.shape[:1]
    return problems.mixture(pfode.EDM())(x, sigma)


def start(n: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return 80 * pfode.noise.normal(range(n), 0, (2,), dtype)


@pytest.mark.parametrize("name", [*THEIRS, "dpm_fast", "dpm_adaptive"])
def test_signatures_are_those_of_k_diffusion(name):
    ours, theirs = (
        [(p.name, p.default, p.kind) for p in inspect.signature(getattr(module, f"sample_{name}")).parameters.values()]
        for module in (kdiffusion, peers.k_diffusion_sampling())
    )
    assert ours == theirs


def random_noise(x: Tensor) -> Any:
    return lambda *_: torch.randn_like(x)


CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in THEIRS),
    *((name, {"s_churn": 5.0, "s_noise": 1.01}) for name in ("euler", "heun", "dpm_2")),
    ("heun", {"s_churn": 40.0, "s_tmax": 60.0}),
    *((name, {"eta": 0.6, "s_noise": 0.9}) for name in THEIRS if "ancestral" in name or "sde" in name),
    *(("dpmpp_sde", {"r": r}) for r in (0.3, 0.7)),
    ("dpmpp_2m_sde", {"solver_type": "heun"}),
    *(("lms", {"order": order}) for order in (1, 2, 3)),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_numbers_and_callbacks_are_those_of_k_diffusion(name, options):
    """With the same seed of torch where both draw at every step; what the callback is told, too."""
    x, sigmas = start(), kdiffusion.get_sigmas_karras(*GRID)
    seen: list[list[dict[str, Any]]] = [[], []]
    made = []
    for module, told in zip((kdiffusion, peers.k_diffusion_sampling()), seen, strict=True):
        sampler = getattr(module, f"sample_{name}")
        if "noise_sampler" in inspect.signature(sampler).parameters:
            options = {**options, "noise_sampler": random_noise(x)}
        torch.manual_seed(0)
        if options.get("s_tmax"):  # there k-diffusion draws without using it, and we do not
            torch.randn_like(x) if module is kdiffusion else None
        made.append(sampler(model, x, sigmas, disable=True, callback=told.append, **options))
    assert (made[0] - made[1]).abs().max() < 1e-5
    assert [list(info) for info in seen[0]] == [list(info) for info in seen[1]]
    for ours, theirs in zip(*seen, strict=True):
        assert ours["i"] == theirs["i"]
        for key in ("x", "sigma", "sigma_hat", "denoised"):
            assert torch.allclose(ours[key], theirs[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpm_2_ancestral"])
def test_noise_samplers_are_asked_for_the_same_intervals(name):
    asked: list[list[tuple[float, float]]] = [[], []]
    for module, record in zip((kdiffusion, peers.k_diffusion_sampling()), asked, strict=True):

        def draw(sigma: Tensor, sigma_next: Tensor, record: list[Any] = record) -> Tensor:
            record.append((float(sigma), float(sigma_next)))
            return torch.zeros(4, 2)

        sigmas = kdiffusion.get_sigmas_karras(*GRID)
        getattr(module, f"sample_{name}")(model, start(), sigmas, disable=True, noise_sampler=draw)
    assert asked[0] == [pytest.approx(pair, rel=2e-6) for pair in asked[1]]


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_recipe_is_there(name):
    denoiser, x = problems.mixture(pfode.EDM()), start(dtype=torch.float64)
    sigmas = kdiffusion.get_sigmas_karras(6, 0.02, 80.0).double()
    function = getattr(kdiffusion, "sample_" + name.replace("++", "pp").replace("-", "_"))
    assert function.__name__ in dir(kdiffusion)
    options: dict[str, Any] = {"s_churn": 0.0} if "s_churn" in inspect.signature(function).parameters else {}
    same: dict[str, Any] = {"churn": 0.0} if options else {}
    noise = {}
    if "noise_sampler" in inspect.signature(function).parameters:
        noise = {"noise_sampler": lambda *_: 0.5 * torch.ones_like(x)}
    ours = function(model, x, sigmas, disable=True, **options, **noise)
    plan = make_plan(name, pfode.EDM(sigmas[-2].item(), sigmas[0].item()), grid=sigmas, **same)
    expected = pfode.run(plan, denoiser, x, lambda k: 0.5 * torch.ones_like(x))
    assert torch.allclose(ours, expected, rtol=1e-12)


def test_schedules_are_those_of_k_diffusion():
    theirs = peers.k_diffusion_sampling()
    for name in ("get_sigmas_karras", "get_sigmas_exponential", "get_sigmas_polyexponential"):
        for n in (1, 2, 10):
            ours, expected = (getattr(module, name)(n, 0.02, 80.0) for module in (kdiffusion, theirs))
            assert torch.allclose(ours, expected, rtol=2e-6)
            assert ours.dtype == torch.float32
    assert torch.allclose(kdiffusion.get_sigmas_vp(10), theirs.get_sigmas_vp(10), rtol=1e-3)  # they cancel
    x, sigma = torch.randn(3, 2), torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(kdiffusion.to_d(x, sigma, 0 * x), theirs.to_d(x, sigma, 0 * x))
    for eta in (0.0, 0.5, 1.0, 2.0):
        assert kdiffusion.get_ancestral_step(3.0, 1.0, eta) == pytest.approx(theirs.get_ancestral_step(3.0, 1.0, eta))


def test_k_diffusion_code_runs_with_a_changed_import():
    """As sample.py of its users: guidance by a wrapper, options by the signature, previews by the callback."""
    K = kdiffusion

    class CFGDenoiser:
        """ComfyUI's and the web UIs' way: conditional and unconditional in one batch, a mask for inpainting."""

        def __init__(self, inner: Any):
            self.inner, self.steps = inner, 0
            self.mask, self.init = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.25])

        def __call__(self, x, sigma, uncond, cond, cond_scale):
            x_in, sigma_in = torch.cat([x] * 2), torch.cat([sigma] * 2)
            un, co = self.inner(x_in, sigma_in, cond=torch.cat([uncond, cond])).chunk(2)
            self.steps += 1
            denoised = un + (co - un) * cond_scale
            return self.mask * denoised + (1 - self.mask) * self.init

    def inner(x, sigma, cond):
        return model(x, sigma) + cond

    sigmas = K.get_sigmas_karras(n=8, sigma_min=0.03, sigma_max=14.6, rho=7.0, device="cpu")
    x = torch.randn(3, 2) * sigmas[0]
    extra = {"cond": torch.full((3, 1), 0.1), "uncond": torch.zeros(3, 1), "cond_scale": 2.0}
    for name in ("sample_euler_ancestral", "sample_dpmpp_2m", "sample_dpmpp_2m_sde", "sample_heun"):
        wrapped, previews, torch_seeds = CFGDenoiser(inner), [], torch.get_rng_state()
        function = getattr(K, name)
        taken = inspect.signature(function).parameters
        options = {k: v for k, v in {"eta": 0.8, "s_churn": 1.0, "s_noise": 1.0}.items() if k in taken}
        out = function(wrapped, x, sigmas=sigmas, extra_args=extra, callback=previews.append, disable=True, **options)
        assert [info["i"] for info in previews] == [*range(8)]
        assert all(torch.equal(info["sigma"], sigmas[info["i"]]) for info in previews)
        assert torch.allclose(out[:, 1], torch.tensor(0.25), atol=1e-5)
        assert wrapped.steps == (15 if name == "sample_heun" else 8)
        torch.set_rng_state(torch_seeds)


def test_noise_comes_from_the_modules_own_torch(monkeypatch):
    """Web UIs put their own `torch` into the module, to draw every picture's noise by its own seed."""

    class Hijack:
        def __getattr__(self, name):
            return (lambda x: torch.full_like(x, 0.5)) if name == "randn_like" else getattr(torch, name)

    sigmas = kdiffusion.get_sigmas_karras(5, 0.1, 10.0)
    wanted = kdiffusion.sample_euler_ancestral(
        model, start(), sigmas, disable=True, noise_sampler=lambda *_: torch.full((4, 2), 0.5)
    )
    monkeypatch.setattr(kdiffusion, "torch", Hijack())
    assert torch.equal(kdiffusion.sample_euler_ancestral(model, start(), sigmas, disable=True), wanted)


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "sa_solver"])
def test_a_seed_makes_sdes_repeatable_whatever_the_batch(name):
    sampler, sigmas = getattr(kdiffusion, f"sample_{name}"), kdiffusion.get_sigmas_karras(6, 0.1, 10.0)
    batch = sampler(model, start(), sigmas, extra_args={"seed": 3}, disable=True)
    alone = sampler(model, start()[:1], sigmas, extra_args={"seed": 3}, disable=True)
    other = sampler(model, start()[:1], sigmas, extra_args={"seed": 4}, disable=True)
    assert torch.allclose(batch[:1], alone, rtol=1e-6)
    assert (alone - other).abs().max() > 1e-3


NOISY: list[tuple[str, dict[str, Any]]] = [  # every sampler of k-diffusion that draws, and one of each of our kinds
    *((name, {}) for name in THEIRS if "ancestral" in name or "sde" in name),
    *((name, {"s_churn": 10.0}) for name in ("euler", "heun", "dpm_2")),
    *((name, {}) for name in ("ddpm", "sa_solver", "er_sde_3", "dpmpp2m_sde_heun")),
]


def drawn(name: str, x: Tensor, seed: Any, **options: Any) -> Tensor:
    extra = {} if seed is None else {"seed": seed}
    sigmas = kdiffusion.get_sigmas_karras(6, 0.1, 10.0)
    return getattr(kdiffusion, f"sample_{name}")(model, x, sigmas, extra_args=extra, disable=True, **options)


@pytest.mark.parametrize(("name", "options"), NOISY, ids=str)
def test_a_seed_is_heeded_by_every_sampler_that_draws(name, options):
    """`extra_args["seed"]`: one, or one per sample, as an integer, a list or a tensor; whatever torch's generator."""
    first = drawn(name, start(), 3, **options)
    torch.manual_seed(1)
    torch.randn(7)
    for same in (3, [3, 4, 5, 6], (3, 4, 5, 6), range(3, 7), torch.arange(3, 7), np.arange(3, 7), np.int64(3)):
        assert torch.equal(drawn(name, start(), same, **options), first)
    assert torch.equal(drawn(name, start(), torch.tensor(3), **options), first)
    permuted = drawn(name, start()[[2, 0]], [5, 3], **options)
    assert torch.allclose(permuted, first[[2, 0]], rtol=1e-6)
    assert (drawn(name, start(), 4, **options) - first).abs().max() > 1e-3
    assert (drawn(name, start(), None, **options) - drawn(name, start(), None, **options)).abs().max() > 1e-3


def test_dpm_fast_heeds_a_seed():
    made = [
        kdiffusion.sample_dpm_fast(model, start(), 0.02, 80.0, 9, extra_args={"seed": s}, disable=True, eta=0.7)
        for s in (3, 3, 4)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("name", ["euler_ancestral", "ddpm"])
def test_the_noise_of_a_seed_is_that_of_sample(name):
    """The same keys as in `pfode.sample`: (seed of the sample, number of the call)."""
    sigmas = kdiffusion.get_sigmas_karras(6, 0.1, 10.0).double()
    x, seeds = start(dtype=torch.float64) / 8, [9, 2, 4, 7]
    ours = getattr(kdiffusion, f"sample_{name}")(model, x, sigmas, extra_args={"seed": seeds}, disable=True)
    plan = make_plan(name, pfode.EDM(sigmas[-2].item(), sigmas[0].item()), grid=sigmas)
    assert torch.allclose(ours, pfode.run(plan, problems.mixture(pfode.EDM()), x, seeds), rtol=1e-12)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde"])
@pytest.mark.parametrize(
    ("seed", "words"),
    [
        ([1, 2], "2 of them for 4 samples"),
        (-1, "seed"),
        (1.5, "seed"),
        (2**64, "seed"),
        ("abcd", "seed"),
        (True, "seed"),
    ],
)
def test_seeds_that_are_none_are_refused(name, seed, words):
    with pytest.raises(UsageError, match=words):
        drawn(name, start(), seed)


def test_brownian_noise_is_one_path():
    x = torch.zeros(2, 3, dtype=torch.float64)
    tree = kdiffusion.BrownianTreeNoiseSampler(x, 0.1, 10.0, seed=[5, 6], transform=lambda sigma: sigma.log())
    clock = [torch.tensor(s, dtype=torch.float64) for s in (5.0, 2.0, 0.5)]
    parts = [tree(a, b) * (a.log() - b.log()).sqrt() for a, b in itertools.pairwise(clock)]
    whole = tree(clock[0], clock[2]) * (clock[0].log() - clock[2].log()).sqrt()
    assert torch.allclose(parts[0] + parts[1], whole, atol=1e-4)
    first, both = (kdiffusion.BrownianTreeNoiseSampler(x[:n], 0.1, 10.0, seed=5)(1.0, 0.5) for n in (1, 2))
    assert torch.equal(first, both[:1])
    with pytest.raises(UsageError, match="1 of them for 2 samples"):
        kdiffusion.BrownianTreeNoiseSampler(x, 0.1, 10.0, seed=[5])


def test_half_precision_is_kept_at_the_model_only():
    """The model and the caller see float16, the state between is float32: nearer to float64 than k-diffusion is."""
    x, sigmas, seen = start(8), kdiffusion.get_sigmas_karras(20, 0.02, 80.0), set()

    def half(x, sigma):
        seen.update((x.dtype, sigma.dtype))
        return model(x.double(), sigma.double()).to(x.dtype)

    exact = kdiffusion.sample_dpmpp_2m(half, x.double(), sigmas.double(), disable=True)
    seen.clear()
    ours = kdiffusion.sample_dpmpp_2m(half, x.half(), sigmas, disable=True)
    assert seen == {torch.float16}
    assert ours.dtype == torch.float16
    theirs = peers.k_diffusion_sampling().sample_dpmpp_2m(half, x.half(), sigmas, disable=True)
    errors = [(y.double() - exact).pow(2).mean() for y in (ours, theirs)]
    assert errors[0] < 0.5 * errors[1]


def one_buffer() -> Any:
    kept: list[Tensor] = []

    def call(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        out = model(x, sigma)
        kept.extend([] if kept else [torch.empty_like(out)])
        return kept[0].copy_(out)

    return call


def in_place(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
    return x.copy_(model(x.clone(), sigma))


@pytest.mark.parametrize(
    "name", [n for n in dir(kdiffusion) if n.startswith("sample_") and not n.startswith("sample_dpm_")]
)
@pytest.mark.parametrize("kind", ["one buffer", "in place"])
def test_models_may_use_their_memory_again(name, kind):
    """As replayed CUDA graphs do, and networks whose first layer works in place; the callback sees x as it was."""
    function, sigmas, made = getattr(kdiffusion, name), kdiffusion.get_sigmas_karras(6, 0.1, 10.0).double(), []
    options = {"s_churn": 10.0} if "s_churn" in inspect.signature(function).parameters else {}
    for call in (model, one_buffer() if kind == "one buffer" else in_place):
        seen: list[Tensor] = []
        x = start(dtype=torch.float64)
        show = lambda info, seen=seen: seen.extend([info["x"].clone(), info["denoised"].clone()])  # noqa: E731
        out = function(call, x, sigmas, extra_args={"seed": 3}, disable=True, callback=show, **options)
        assert torch.equal(x, start(dtype=torch.float64))
        made.append(torch.stack([out, *seen]))
    assert torch.allclose(*made, rtol=1e-9)


def test_nothing_is_drawn_where_nothing_is_used():
    before = torch.get_rng_state()
    for name in ("euler", "heun", "dpm_2", "dpmpp_2m"):
        getattr(kdiffusion, f"sample_{name}")(model, start(), kdiffusion.get_sigmas_karras(*GRID), disable=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_2m", "euler"])
def test_one_step_is_the_denoised_x(name):
    out = getattr(kdiffusion, f"sample_{name}")(model, start(), torch.tensor([80.0, 0.0]), disable=True)
    assert torch.allclose(out, model(start(), torch.full((4,), 80.0)), atol=1e-5)


def test_sigmas_that_come_twice_cost_one_call():
    calls, infos = [], []

    def counted(x, sigma):
        calls.append(sigma[0].item())
        return model(x, sigma)

    sigmas = torch.tensor([10.0, 3.0, 3.0, 1.0, 0.0])
    out = kdiffusion.sample_dpmpp_2m(counted, start(), sigmas, disable=True, callback=infos.append)
    assert calls == [10.0, 3.0, 1.0]
    assert [info["i"] for info in infos] == [0, 1, 3]
    assert torch.equal(out, kdiffusion.sample_dpmpp_2m(model, start(), sigmas[[0, 1, 3, 4]], disable=True))


def test_noise_can_be_taken_back():
    """Rising sigmas lead from data to noise, as k-diffusion's Euler does."""
    sigmas = kdiffusion.get_sigmas_exponential(20, 0.1, 10.0)[:-1].flip(0)
    x = start() / 80
    theirs = peers.k_diffusion_sampling().sample_euler(model, x, sigmas, disable=True)
    assert torch.allclose(kdiffusion.sample_euler(model, x, sigmas, disable=True), theirs, rtol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("n", [1, 2, 3, 6, 12, 13])
def test_dpm_fast(n, eta):
    made, told = [], []
    for module in (kdiffusion, peers.k_diffusion_sampling()):
        torch.manual_seed(0)
        told.append([])
        made.append(
            module.sample_dpm_fast(model, start(), 0.02, 80.0, n, disable=True, eta=eta, callback=told[-1].append)
        )
    assert torch.allclose(*made, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(*told, strict=True):
        assert set(ours) == set(theirs)
        assert float(ours["t"]) == pytest.approx(float(theirs["t"]), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("order", [2, 3])
def test_dpm_adaptive(order):
    """A sample by itself takes k-diffusion's steps; its batch mates do not change it."""
    x, infos = start(), []
    alone, info = kdiffusion.sample_dpm_adaptive(
        model, x[:1], 0.02, 80.0, disable=True, order=order, return_info=True, callback=infos.append
    )
    sampler = peers.k_diffusion_sampling().sample_dpm_adaptive
    theirs, their_info = sampler(model, x[:1], 0.02, 80.0, disable=True, order=order, return_info=True)
    assert torch.allclose(alone, theirs, atol=1e-3)
    assert info == their_info
    assert {"x", "i", "sigma", "sigma_hat", "denoised"} <= set(infos[0])
    assert torch.allclose(kdiffusion.sample_dpm_adaptive(model, x, 0.02, 80.0, disable=True, order=order)[:1], alone)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kdiffusion.sample_dpm_adaptive(model, start(), 0.02, 80.0, eta=1.0), "eta = 1.0 is not supported"),
        (lambda: kdiffusion.sample_dpm_adaptive(model, start(), 0.02, 80.0, order=4), "order: got 4"),
        (lambda: kdiffusion.sample_dpm_fast(model, start(), 0.0, 80.0, 5), "0 < sigma_min"),
        (lambda: kdiffusion.sample_dpmpp_2m_sde(model, start(), torch.tensor([3.0, 0.0]), solver_type="x"), "'x'"),
        (lambda: kdiffusion.sample_lms(model, start(), torch.tensor([3.0, 0.0]), order=9), "order"),
        (lambda: kdiffusion.sample_euler(model, start(), torch.tensor([3.0, 5.0, 0.0]), disable=True), "fall strictly"),
    ],
)
def test_what_is_not_there_is_refused(call, words):
    with pytest.raises(UsageError, match=words):
        call()


def test_unknown_names_and_options_are_as_anywhere_in_python():
    with pytest.raises(AttributeError, match="sample_dpmpp_9m"):
        kdiffusion.sample_dpmpp_9m  # noqa: B018
    with pytest.raises(AttributeError, match="nothing"):
        kdiffusion.nothing  # noqa: B018
    with pytest.raises(TypeError, match="etaa"):
        kdiffusion.sample_euler_ancestral(model, start(), torch.tensor([3.0, 0.0]), etaa=1.0)
