"""Peers: driven on any process they are our recipes, and nothing outside of our copies of them is changed."""

import importlib
import math
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import pfode
from pfode import grids
from pfode.errors import DenoiserError, UsageError
from pfode.samplers import make_plan
from pfode.samplers.measure import peers
from pfode.samplers.measure.peers.private import private_copy
from tests import problems


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize("process", problems.PROCESSES.values(), ids=problems.PROCESSES)
@pytest.mark.parametrize(
    ("peer", "options", "ours", "chart"),
    [
        ("diffusers:DPMSolverMultistepScheduler", {}, "dpm++2m", "dpm++"),
        ("diffusers:UniPCMultistepScheduler", {}, "unipc2", "dpm++"),
        ("diffusers:IPNDMScheduler", {}, "ipndm4", "ddim"),
        ("diffusers:FlowMatchEulerDiscreteScheduler", {}, "euler", "ddim"),
        ("k-diffusion:sample_dpmpp_2m", {}, "dpm++2m", "dpm++"),
        ("k-diffusion:sample_heun", {}, "heun", "ddim"),
        ("k-diffusion:sample_lms", {"order": 2}, "exp-ab2", "ddim"),
    ],
)
def test_a_peer_on_any_process_is_our_recipe(process, peer, options, ours, chart):
    """On the same times; where a flow begins with alpha = 0 ours from the first level that the peer can begin at."""
    denoiser = problems.mixture(process)
    x = process.sigma(process.t_max) * pfode.noise.normal(range(8), 0, (2,), torch.float64)
    high = min(process.t_max, process.time(-2 * math.log(peers.HIGHEST)))

    def lay(steps: int) -> list[float]:
        nodes = grids.times(process, "log-snr" if process.alpha(process.t_max) else "time", steps)
        return [high, *nodes[1:]]

    drawn, calls = peers.draw(peer, denoiser, x, range(8), 9, lay, **options)
    steps = (calls + 1) // 2 if "heun" in peer else calls
    plan = make_plan(ours, process, grid=lay(steps), chart=chart)
    assert plan.nfe == calls
    start = x * (process.sigma(high) / process.sigma(process.t_max))
    expected = pfode.run(plan, denoiser, start, seeds=range(8))
    assert (drawn - expected).abs().max() < 2e-4 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_a_schedulers_own_grid_spans_the_process():
    """Karras' sigmas by diffusers' own code, between the ends of the process: our grid of the same name."""
    denoiser = problems.mixture(pfode.EDM())
    x = 80 * pfode.noise.normal(range(8), 0, (2,), torch.float64)
    name = "diffusers:DPMSolverMultistepScheduler"
    drawn, calls = peers.draw(name, denoiser, x, range(8), 10, use_karras_sigmas=True)
    expected = pfode.run(make_plan("dpm++2m", denoiser.process, 10, grid="karras"), denoiser, x)
    assert calls == 10
    assert (drawn - expected).abs().max() < 5e-3 * expected.abs().max()  # it keeps its betas in float32


@pytest.mark.parametrize(
    ("peer", "options", "match"),
    [
        ("nobody:X", {}, "unknown package"),
        ("diffusers:DPMSolverMultistep", {}, "unknown scheduler.*"),
        ("diffusers:DPMSolverMultistepScheduler", {"ordr": 2}, "unknown option"),
        ("diffusers:DPMSolverMultistepScheduler", {"solver_order": 7, "algorithm_type": "x"}, "with 4 calls"),
        ("k-diffusion:sample_dpm_fast", {}, "unknown sampler"),
        ("k-diffusion:sample_heun", {"order": 3}, "with 4 calls"),
    ],
)
def test_peers_that_cannot(peer, options, match):
    denoiser = problems.mixture(pfode.EDM())
    with pytest.raises(UsageError, match=match):
        peers.draw(peer, denoiser, torch.zeros(2, 2), range(2), 4, **options)


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_ddim_scheduler_has_a_grid_of_its_own():
    denoiser = problems.mixture(pfode.VP())
    with pytest.raises(UsageError, match="no grid but its own"):
        peers.draw("diffusers:DDIMScheduler", denoiser, torch.zeros(2, 2), range(2), 4, lambda n: [1.0, 0.0])


# ---- nothing global


def test_a_copy_gets_other_modules_and_leaves_the_rest(tmp_path, monkeypatch):
    """k-diffusion first imported numpy.fft, was forgotten with it, and diffusers could not import that again."""
    (tmp_path / "part_of_it.py").touch()
    source = "import math, stood_for\nfrom . import near\nimport part_of_it\nfound = math.pi, stood_for, near\n"
    (tmp_path / "peer_of_it.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    near, stand_in = object(), SimpleNamespace()
    instead = {"stood_for": stand_in, ".": SimpleNamespace(near=near)}
    made = private_copy(tmp_path / "peer_of_it.py", "theirs", instead)
    assert made.found == (math.pi, stand_in, near)
    assert sys.modules.pop("part_of_it", None) is made.part_of_it
    assert not {"stood_for", "peer_of_it", "theirs"} & set(sys.modules)
    assert importlib.import_module("math").pi == math.pi


@pytest.mark.parametrize(
    ("peer", "module"),
    [
        ("diffusers:EulerAncestralDiscreteScheduler", "diffusers.schedulers.scheduling_euler_ancestral_discrete"),
        ("diffusers:DDPMScheduler", "diffusers.schedulers.scheduling_ddpm"),
        ("diffusers:SASolverScheduler", "diffusers.schedulers.scheduling_sasolver"),
        ("diffusers:DPMSolverSDEScheduler", None),
        ("diffusers:CosineDPMSolverMultistepScheduler", None),
        ("k-diffusion:sample_euler_ancestral", None),
        ("k-diffusion:sample_dpmpp_2m_sde", None),
    ],
)
def test_while_a_peer_draws_nothing_outside_is_changed(peer, module):
    """torch, diffusers, k-diffusion, the modules and the filters of warnings: as before, as the network sees them."""
    theirs = None if module is None else importlib.import_module(module)
    before = (torch.randn_like, torch.randn, theirs and theirs.randn_tensor, [*warnings.filters])
    names = {name for name in sys.modules if "torchsde" in name or "k_diffusion" in name or "torchdiffeq" in name}
    calls = []

    class Watching:
        process, shape = pfode.EDM(), (2,)

        def __call__(self, x, t, **cond):
            calls.append((torch.randn_like, torch.randn, theirs and theirs.randn_tensor))
            found = {n for n in sys.modules if "torchsde" in n or "k_diffusion" in n or "torchdiffeq" in n}
            assert found == names
            assert torch.randn_like(x).shape == x.shape
            return 0.5 * x / (1 + t**2)

    draws = [peers.draw(peer, Watching(), 80 * torch.ones(3, 2), range(3), 6)[0] for _ in range(2)]
    assert torch.equal(*draws)  # its noise is the keyed one
    assert len(calls) >= 2 * 3
    assert {call == before[:3] for call in calls} == {True}
    assert warnings.filters == before[3]


def test_noise_of_peers_does_not_touch_the_global_generator():
    denoiser = problems.mixture(pfode.EDM())
    state = torch.get_rng_state()
    for peer in ("k-diffusion:sample_euler_ancestral", "diffusers:EulerAncestralDiscreteScheduler"):
        peers.draw(peer, denoiser, 80 * torch.ones(3, 2), range(3), 6)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_denoiser_is_given_its_own_precision():
    seen = set()

    class Single:
        process, shape = pfode.EDM(), (2,)

        def __call__(self, x, t, **cond):
            seen.add(x.dtype)
            return 0.1 * x

    for peer in ("k-diffusion:sample_heun", "diffusers:HeunDiscreteScheduler"):
        found, _ = peers.draw(peer, Single(), torch.ones(3, 2), range(3), 6)
        assert found.dtype == torch.float64
    assert seen == {torch.float32}


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, KeyError])
def test_an_error_of_the_network_is_no_fault_of_the_peer(kind):
    class Raising:
        process, shape = pfode.EDM(), (2,)

        def __call__(self, x, t, **cond):
            raise kind("mine")

    with pytest.raises(DenoiserError, match=f"the denoiser raised {kind.__name__}: '?mine"):
        peers.draw("k-diffusion:sample_heun", Raising(), torch.ones(3, 2), range(3), 6)
