"""Equality with the published algorithm and with the peers' own code, on the same denoiser, grid and noise.

One test per peer lists its pairs. What has no pair, and why, is in test_peer_defects.py.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import pfode
from pfode import iterate, run
from pfode.plans.table import Plan
from pfode.samplers import CATALOGUE, Recipe, make_plan
from tests import peers, problems

SEEDS = list(range(4))


def bed() -> tuple[problems.GaussianMixture, torch.Tensor]:
    denoiser = problems.mixture(pfode.EDM())
    return denoiser, 80 * pfode.noise.normal(SEEDS, 0, (2,), torch.float64)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def karras(steps: int) -> torch.Tensor:
    """Equation 5 of Karras et al. 2022, with the 0 appended."""
    i = torch.arange(steps, dtype=torch.float64)
    sigmas = (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


def edm_heun(denoiser, x, sigmas):
    """Algorithm 1 of Karras et al. 2022, from the formulas."""
    for t0, t1 in itertools.pairwise(sigmas):
        d = (x - denoiser(x, t0)) / t0
        euler = x + (t1 - t0) * d
        if t1 == 0:
            x = euler
        else:
            x = x + (t1 - t0) * 0.5 * (d + (euler - denoiser(euler, t1)) / t1)
    return x


@pytest.mark.parametrize("steps", [2, 5, 18])
def test_heun_is_edms_algorithm(steps):
    denoiser, x = bed()
    ours = run(make_plan("heun", denoiser.process, steps, grid="karras"), denoiser, x)
    assert relative(ours, edm_heun(denoiser, x, karras(steps))) < 1e-12


CHURN = {"s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}  # Karras et al. 2022, table 5, ImageNet

K_DIFFUSION: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [  # ours, its options, theirs, its options
    ("euler", {}, "euler", {}),
    ("ddim", {}, "euler", {}),
    ("dpm-1", {}, "euler", {}),
    ("heun", {}, "heun", {}),
    ("dpm2", {}, "dpm_2", {}),
    ("dpm-2s", {}, "dpm_2", {}),
    ("euler", {"churn": 30.0, **CHURN}, "euler", {"s_churn": 30.0, **CHURN}),
    ("heun", {"churn": 5.0}, "heun", {"s_churn": 5.0, "s_tmax": 79.0}),
    ("edm", {"churn": 40.0, **CHURN}, "heun", {"s_churn": 40.0, **CHURN}),
    ("dpm2", {"churn": 30.0, **CHURN}, "dpm_2", {"s_churn": 30.0, **CHURN}),
    ("ddpm", {}, "euler_ancestral", {}),
    ("ddim", {"eta": 1.0}, "euler_ancestral", {}),
    *[("euler-a", {"eta": eta}, "euler_ancestral", {"eta": eta}) for eta in (0.0, 0.5, 1.0, 1.5)],
    *[("dpm2-a", {"eta": eta}, "dpm_2_ancestral", {"eta": eta}) for eta in (0.0, 0.5, 1.0)],
    *[("dpm++2s-a", {"eta": eta}, "dpmpp_2s_ancestral", {"eta": eta}) for eta in (0.0, 0.5, 1.0)],
    ("dpm++2s", {}, "dpmpp_2s_ancestral", {"eta": 0.0}),
    *[("dpm++sde", {"eta": eta}, "dpmpp_sde", {"eta": eta}) for eta in (0.0, 0.5, 1.0)],
    ("dpm++2m", {}, "dpmpp_2m", {}),
    *[("dpm++2m-sde", {"eta": eta}, "dpmpp_2m_sde", {"eta": eta}) for eta in (0.0, 0.5, 1.0)],
    *[
        ("dpm++2m-sde-heun", {"eta": eta}, "dpmpp_2m_sde", {"eta": eta, "solver_type": "heun"})
        for eta in (0.0, 0.5, 1.0)
    ],
    ("dpm++2m-heun", {}, "dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun"}),
    ("res-2m", {}, "dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun"}),
    *[("dpm++3m-sde", {"eta": eta}, "dpmpp_3m_sde", {"eta": eta}) for eta in (0.0, 0.5, 1.0)],
    ("lms", {}, "lms", {}),
    *[(f"exp-ab{k}", {"chart": "ddim"}, "lms", {"order": k}) for k in (1, 2, 3, 4)],
    *[(f"deis-rhoab{k}", {}, "lms", {"order": k + 1}) for k in (1, 2, 3)],
    *[(f"ipndm-v{k}", {"chart": "ddim"}, "lms", {"order": k}) for k in (1, 2, 3, 4)],
]


@pytest.mark.parametrize("steps", [3, 5, 20])
@pytest.mark.parametrize(
    ("ours", "options", "theirs", "their_options"),
    [
        pytest.param(*row, id="-".join([row[0], row[2], *(f"{k}={v}" for k, v in row[3].items())]))
        for row in K_DIFFUSION
    ],
)
def test_k_diffusion(ours, options, theirs, their_options, steps):
    """On float64 sigmas, with the same noise."""
    denoiser, x = bed()
    sigmas = karras(steps)
    plan = make_plan(ours, denoiser.process, grid=sigmas, **options)
    expected = k_diffusion(theirs, denoiser, plan, x, sigmas, **their_options)
    assert relative(run(plan, denoiser, x, seeds=SEEDS), expected) < 1e-10


def k_diffusion(name: str, denoiser, plan: Plan, x: torch.Tensor, *grid: Any, **options: Any) -> torch.Tensor:
    """A sampler of k-diffusion with the noise of a plan's rows."""
    sampler = getattr(peers.k_diffusion_sampling(), f"sample_{name}")
    counted = peers.Counted(denoiser)

    def draw(*_: Any) -> torch.Tensor:  # before the first call: churn, the plan's initial row
        return pfode.noise.normal(SEEDS, counted.calls or plan.nfe + 1, x.shape[1:], torch.float64)

    if "noise_sampler" in sampler.__wrapped__.__code__.co_varnames:
        options["noise_sampler"] = draw
    with mock.patch.object(torch, "randn_like", draw):
        return sampler(counted, x, *grid, disable=True, **options)


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64_by_default")  # in which k-diffusion makes its grid
@pytest.mark.parametrize("nfe", [3, 4, 5, 6, 14])
def test_k_diffusion_dpm_fast(nfe):
    """Steps of dpm-3s, dpm-2s and dpm-1 that make nfe calls, uniform in the logarithm of sigma, which ends above 0."""
    denoiser, x = bed()
    orders = [3] * (nfe // 3 - 1) + [2, 1] if nfe % 3 == 0 else [3] * (nfe // 3) + [nfe % 3]
    logs = torch.linspace(np.log(80), np.log(0.02), len(orders) + 1, dtype=torch.float64)
    ours = x
    for order, ends in zip(orders, itertools.pairwise(logs.exp().tolist()), strict=True):
        name = {1: "dpm-1", 2: "dpm-2s", 3: "dpm-3s"}[order]
        ours = run(make_plan(name, denoiser.process, grid=ends), denoiser, ours)
    theirs = peers.k_diffusion_sampling().sample_dpm_fast(denoiser, x, 0.02, 80.0, nfe, disable=True)
    assert relative(ours, theirs) < 1e-10


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("order", [2, 3])
def test_k_diffusion_dpm_adaptive(order):
    """dpm-2s and dpm-3s on the steps it accepts."""
    denoiser, x = bed()
    times = [80.0]

    def accepted(info: dict[str, Any]) -> None:
        if info["n_accept"] == len(times):
            times.append(info["t"].neg().exp().item())

    sampler = peers.k_diffusion_sampling().sample_dpm_adaptive
    theirs = sampler(denoiser, x, 0.02, 80.0, callback=accepted, disable=True, order=order)
    plan = make_plan(f"dpm-{order}s", denoiser.process, grid=times)
    assert plan.steps > 5
    assert relative(run(plan, denoiser, x), theirs) < 1e-10


@dataclass(frozen=True)
class Pair:
    """A recipe and a scheduler of diffusers, with the options of each."""

    ours: str | Recipe
    theirs: str
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    every: int = 1  # which of its sigmas are nodes
    steps: Sequence[int] = (4, 10, 25)

    def __str__(self) -> str:
        told = {k: v for k, v in (self.config | self.step).items() if not callable(v) and not isinstance(v, list)}
        own = self.ours if isinstance(self.ours, str) else self.ours.name
        return "-".join([own, self.theirs, *(f"{k}={v}" for k, v in told.items())])


def lowered(ours: str, theirs: str, config: dict[str, Any], options: dict[str, Any] | None = None) -> list[Pair]:
    """With lower orders at the end and without; diffusers ignores the wish for them from 15 steps on."""
    options = options or {}
    low = Pair(
        ours, theirs, {**config, "lower_order_final": True}, {**options, "lower_order_final": True}, steps=(4, 10)
    )
    return [low, Pair(ours, theirs, {**config, "lower_order_final": False}, options)]


def sa_solver(predictor: int, corrector: int) -> list[Pair]:
    """SA-Solver with orders counted as in the paper, where the corrector's includes the new node."""
    made = []
    for lower, tau in itertools.product((True, False) if predictor > 1 else (False,), (0.0, 0.6, 1.0)):
        theirs = {
            "predictor_order": predictor,
            "corrector_order": corrector,
            "lower_order_final": lower,
            "double": True,
        }
        orders = {"predictor": predictor, "corrector": corrector}
        everywhere = {**orders, "tau": tau, "between": (0.0, 1e9), "lower_order_final": lower}
        made.append(
            Pair("sa-solver", "sasolver", {**theirs, "tau_func": functools.partial(constantly, tau)}, everywhere)
        )
    return made


def constantly(tau: float, t: float) -> float:
    return tau


def unipc(order: int, solver_type: str, lower_order_final: bool = True, **config: Any) -> Pair:
    """UniPC, or UniP where every corrector is off, on eps where predict_x0 is."""
    name = f"unip{'' if 'disable_corrector' in config else 'c'}{order}{'-bh1' if solver_type == 'bh1' else ''}"
    theirs = {"solver_order": order, "solver_type": solver_type, "lower_order_final": lower_order_final, **config}
    ours = {
        "lower_order_final": lower_order_final and order > 1,
        "chart": None if config.get("predict_x0", True) else "dpm",
    }
    return Pair(name, "unipc_multistep", theirs, ours)


KARRAS = {"use_karras_sigmas": True}
WITHIN = {"between": (0.721, 25.74), "lower_order_final": True}  # t = 200 ... 800 of the linear betas, both included
TO_SIGMA_MIN = {"final_sigmas_type": "sigma_min", "double": True}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SHIFTED = {**FLOW, "flow_shift": 3.0}
ODD = (5, 11, 25)  # then the pairs of sigmas of a singlestep method leave the last one for the step to 0
EXPONENTIAL = {"use_exponential_sigmas": True}  # so that a step's inner sigma is half-way, as r1 = 1/2 has it
EPS = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
MULTI, SINGLE, EDM_MULTI = "dpmsolver_multistep", "dpmsolver_singlestep", "edm_dpmsolver_multistep"
UNCLIPPED = {"clip_sample": False}

DIFFUSERS: list[Pair] = [
    Pair("ddim", "ddim", UNCLIPPED),
    Pair("ddim", "ddim", {**UNCLIPPED, "timestep_spacing": "trailing"}),
    *[Pair("ddim", "ddim", UNCLIPPED, {"eta": eta}, {"eta": eta}) for eta in (0.5, 1.0)],
    Pair("ddpm", "ddim", UNCLIPPED, step={"eta": 1.0}),
    Pair("ddim", "ddim_parallel", UNCLIPPED),
    Pair("ddpm", "ddpm", UNCLIPPED),
    Pair("ddpm", "ddpm_parallel", UNCLIPPED),
    Pair("ddpm", "ddpm", {**UNCLIPPED, "timestep_spacing": "linspace"}),
    Pair("euler", "euler_discrete"),
    Pair("euler", "euler_discrete", {**KARRAS, "prediction_type": "v_prediction"}),
    Pair("euler", "euler_discrete", {"timestep_spacing": "trailing", "prediction_type": "sample"}),
    Pair("euler", "euler_discrete", {"use_beta_sigmas": True}, steps=(10, 25)),
    Pair("euler-a", "euler_ancestral_discrete"),
    Pair("euler-a", "euler_ancestral_discrete", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    Pair("heun", "heun_discrete"),
    Pair("heun", "heun_discrete", KARRAS),
    Pair("dpm2", "k_dpm_2_discrete"),
    Pair("dpm2", "k_dpm_2_discrete", KARRAS),
    Pair("dpm2-a", "k_dpm_2_ancestral_discrete"),
    Pair("dpm2-a", "k_dpm_2_ancestral_discrete", KARRAS),
    Pair("lms", "lms_discrete", steps=(4, 10)),
    *[Pair(f"exp-ab{k}", "lms_discrete", KARRAS, {"chart": "ddim"}, {"order": k}, steps=(4, 10)) for k in (1, 2, 3, 4)],
    Pair("pndm", "pndm", {"set_alpha_to_one": True}),
    Pair("ipndm4", "ipndm", {"first": 1}, {"chart": "ddim"}),
    Pair("dpm-1", "deis_multistep", {"solver_order": 1}),
    *lowered("exp-ab2", "deis_multistep", {"solver_order": 2}, {"chart": "dpm"}),
    *lowered("exp-ab3", "deis_multistep", {"solver_order": 3, "double": True}, {"chart": "dpm"}),
    *[Pair("ddim", MULTI, {"solver_order": 1, **sigmas}) for sigmas in (KARRAS, SHIFTED)],
    *[
        pair
        for sigmas in (KARRAS, {"use_lu_lambdas": True}, SHIFTED, {"prediction_type": "v_prediction"})
        for pair in [
            *lowered("dpm++2m", MULTI, sigmas),
            *lowered("dpm++2m-heun", MULTI, {"solver_type": "heun", **sigmas}),
            *lowered("dpm++3m", MULTI, {"solver_order": 3, **sigmas}),
        ]
    ],
    Pair("dpm-1", MULTI, {"solver_order": 1, **EPS}),
    *lowered("dpm-2m", MULTI, EPS),
    *lowered("exp-ab2", MULTI, {"solver_type": "heun", **EPS}, {"chart": "dpm"}),
    *lowered("dpm-3m", MULTI, {"solver_order": 3, **EPS}),
    Pair("ddpm", MULTI, {"solver_order": 1, **SDE}),
    *[
        pair
        for sigmas in (KARRAS, SHIFTED)
        for pair in [
            *lowered("dpm++2m-sde", MULTI, {**SDE, **sigmas}),
            *lowered("dpm++2m-sde-heun", MULTI, {"solver_type": "heun", **SDE, **sigmas}),
        ]
    ],
    Pair("dpm++2m", f"{MULTI}_inverse", {"lower_order_final": False, "double": True}),
    Pair("dpm++3m", f"{MULTI}_inverse", {"solver_order": 3, "lower_order_final": False, "double": True}),
    Pair("dpm-2m", f"{MULTI}_inverse", {"lower_order_final": False, "algorithm_type": "dpmsolver"}),
    Pair("ddim", SINGLE, {"solver_order": 1, **KARRAS}),
    Pair("dpm++2s", SINGLE, EXPONENTIAL, every=2, steps=ODD),
    Pair("res-2s", SINGLE, {"solver_type": "heun", **EXPONENTIAL}, every=2, steps=ODD),
    Pair("dpm-2s", SINGLE, {**EPS, **EXPONENTIAL, "double": True}, every=2, steps=ODD),
    Pair("dpm++sde", SINGLE, {**SDE, **EXPONENTIAL}, every=2, steps=ODD),
    Pair("dpm++sde", "dpmsolver_sde"),
    Pair("dpm++sde", "dpmsolver_sde", KARRAS),
    *[unipc(k, "bh2", **sigmas, double=k > 3) for k in (1, 2, 3, 4, 5) for sigmas in (KARRAS, SHIFTED)],
    *[unipc(k, "bh1", **TO_SIGMA_MIN) for k in (1, 2, 3, 4, 5)],
    *[unipc(k, bh, **TO_SIGMA_MIN, lower_order_final=False) for k in (2, 3, 4, 5) for bh in ("bh2", "bh1")],
    *[unipc(k, bh, **TO_SIGMA_MIN, predict_x0=False) for k in (1, 2, 3) for bh in ("bh2", "bh1")],
    *[unipc(k, bh, **TO_SIGMA_MIN, disable_corrector=[*range(25)]) for k in (1, 2, 3, 4, 5) for bh in ("bh2", "bh1")],
    *[pair for p, c in ((1, 2), (2, 2), (2, 3), (3, 2), (3, 3), (3, 4)) for pair in sa_solver(p, c)],
    *[
        Pair(name, "sasolver", {"predictor_order": p, "corrector_order": c, "double": True}, WITHIN)
        for name, p, c in (("sa-solver", 3, 4), ("sa-solver2", 2, 2))
    ],
    Pair("euler", "edm_euler"),
    Pair("euler", "edm_euler", {"sigma_schedule": "exponential", "prediction_type": "v_prediction"}),
    *lowered("dpm++2m", EDM_MULTI, {}),
    *lowered("dpm++2m-heun", EDM_MULTI, {"solver_type": "heun"}),
    *lowered("dpm++3m", EDM_MULTI, {"solver_order": 3}),
    *lowered("dpm++2m-sde", EDM_MULTI, SDE),
    *lowered("dpm++2m-sde-heun", EDM_MULTI, {"solver_type": "heun", **SDE}),
    *lowered("dpm++2m-sde", "cosine_dpmsolver_multistep", {}),
    *lowered("dpm++2m-sde-heun", "cosine_dpmsolver_multistep", {"solver_type": "heun"}),
    Pair("euler", "flow_match_euler_discrete", {"shift": 3.0}),
    Pair("euler-a", "flow_match_euler_discrete", {"stochastic_sampling": True}, {"eta": 1e6}),  # all noise is fresh
    Pair("heun", "flow_match_heun_discrete", {}, {"chart": "flow"}),
    Pair("heun", "flow_match_heun_discrete", {"shift": 3.0}, {"chart": "flow"}),
]


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers under numpy 2
@pytest.mark.filterwarnings("ignore:`?algorithm_type:FutureWarning")  # a deprecated, but right one
@pytest.mark.parametrize("pair", DIFFUSERS, ids=str)
def test_diffusers(pair):
    """On its own sigmas (kept in float32), with the same noise."""
    for steps in pair.steps:
        scheduler = peers.Scheduler(pair.theirs, steps, **pair.config)
        denoiser = problems.mixture(scheduler.process)
        plan = make_plan(pair.ours, scheduler.process, grid=scheduler.times(pair.every), **pair.options)
        x = plan.sigma[0].item() * pfode.noise.normal(SEEDS, 0, (2,), torch.float64)
        theirs = scheduler.sample(denoiser, x, peers.keyed(SEEDS, (2,)), **pair.step)
        assert relative(run(plan, denoiser, x, seeds=SEEDS), theirs) < 1e-5


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize("steps", [4, 10, 25])
def test_diffusers_plms(steps):
    """PNDM with skip_prk_steps, which is in no paper: iPNDM from the end of one step of Heun's method."""
    scheduler = peers.Scheduler("pndm", steps, skip_prk_steps=True, set_alpha_to_one=True)
    denoiser, times = problems.mixture(scheduler.process), scheduler.times()
    x = pfode.noise.normal(SEEDS, 0, (2,), torch.float64)
    begun = run(make_plan("heun", scheduler.process, grid=times[:2]), denoiser, x)
    points = iterate(make_plan("ipndm4", scheduler.process, grid=times), denoiser, x)
    point = next(points)
    point = points.send(begun)
    for later in points:
        point = later
    assert relative(point.x, scheduler.sample(denoiser, x)) < 1e-5


NO_COUNTERPART = {  # in k-diffusion 0.1.1 or diffusers 0.42
    "bdia": "neither has it",
    "edict": "neither has it",
    "o-belm": "neither has it",
    "deis-tab1": "diffusers' polynomials are in the logarithm of s: exp-ab2 in the chart dpm",
    "deis-tab2": "exp-ab3 in the chart dpm",
    "deis-tab3": "diffusers ends at order 3",
    "dpm-3s": "in test_k_diffusion_dpm_fast; diffusers has another third order, see test_peer_defects.py",
    "dpm++3m-exact": "both halve the curvature",
    "dpm++3s": "diffusers has another third order, see test_peer_defects.py",
    "ddpm-pc": "k-diffusion has no corrector; diffusers' takes its step from the norms of a batch",
    "exp-rk4": "neither has it",
    "langevin": "neither has it",
    "er-sde-1": "neither has it",
    "er-sde-2": "neither has it",
    "er-sde-3": "neither has it",
    "ipndm1": "diffusers has order 4 alone",
    "ipndm2": "diffusers has order 4 alone",
    "ipndm3": "diffusers has order 4 alone",
    "res-3m": "neither has it: dpm++3m-exact",
    "res-3s": "neither has it",
    "rk4": "neither has it",
}


def test_every_recipe_has_a_pair_or_a_reason():
    listed = {row[0] for row in K_DIFFUSION} | {pair.ours for pair in DIFFUSERS if isinstance(pair.ours, str)}
    assert listed | set(NO_COUNTERPART) == set(CATALOGUE)
    assert not listed & set(NO_COUNTERPART)


def test_ipndm_constant_weights_by_hand():
    """Four rows of iPNDM on a given grid, from the formula x += (s' - s) sum_j w_j d_j."""
    denoiser, x = bed()
    sigmas = [80.0, 30.0, 9.0, 2.0, 0.3]
    weights = [[1.0], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    y, past = x, []
    for s0, s1, w in zip(sigmas, sigmas[1:], weights, strict=False):
        past.insert(0, (y - denoiser(y, torch.tensor(s0, dtype=torch.float64))) / s0)
        y = y + (s1 - s0) * sum(a * d for a, d in zip(w, past, strict=False))
    ours = run(make_plan("ipndm4", denoiser.process, grid=sigmas), denoiser, x)
    assert relative(ours, y) < 1e-13


def test_ddpm_is_the_posterior():
    """One row of ddpm against q(x_s | x_t, x_0) of a VP process (Ho et al. 2020, eq. 6-7)."""
    process = pfode.VP()
    t, s = 0.7, 0.5
    a_t, a_s = process.alpha(t) ** 2, process.alpha(s) ** 2
    plan = make_plan("ddpm", process, grid=[t, s])
    beta = 1 - a_t / a_s
    mean_x0, mean_x = np.sqrt(a_s) * beta / (1 - a_t), np.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t)
    x = torch.tensor([[1.7]], dtype=torch.float64)

    class Constant:
        def __init__(self):
            self.process = process

        def __call__(self, x, t, **cond):
            return torch.full_like(x, 0.4)

    noise = pfode.noise.normal([5], 1, (1,), torch.float64)
    expected = mean_x0 * 0.4 + mean_x * x + np.sqrt(beta * (1 - a_s) / (1 - a_t)) * noise
    assert torch.allclose(run(plan, Constant(), x, seeds=[5]), expected, rtol=1e-13)
