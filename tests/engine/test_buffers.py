"""Denoisers that reuse their output, or work in place on what they are given: results as if they did neither."""

from typing import Any

import pytest
import torch

import pfode
from pfode.denoiser import Preconditioned, Preconditioning
from pfode.plans.executor import find_failures, iterate, run
from pfode.samplers import CATALOGUE, make_adaptive, make_plan
from tests import problems

SEEDS = [3, 9]


def plain(x, t):
    return torch.tanh(x / (1 + t.reshape(-1, *[1] * (x.ndim - 1)))) * 0.7


class Network(Preconditioned):
    """A denoiser around a function of (x, t): a bare one, or one that shows its network, scaled input or not."""

    def __init__(self, process, function, c_in=1.0):
        self.process, self.function, self.c_in = process, function, c_in

    def precondition(self, t):
        one = torch.ones_like(t)
        return Preconditioning(self.c_in * one, t, 0.3 / (1 + t), 1 - 0.1 * one)

    def network(self, x, c_noise, **cond):
        return self.function(x, c_noise)


class Bare:
    def __init__(self, process, function):
        self.process, self.function = process, function

    def __call__(self, x, t, **cond):
        return self.function(x, t)


def one_buffer():
    buffer = []

    def function(x, t):
        buffer[:] = buffer or [torch.empty_like(x)]
        return buffer[0].copy_(plain(x, t))

    return function


def two_buffers():
    buffers = []

    def function(x, t):
        buffers[:] = buffers or [torch.empty_like(x) for _ in range(2)]
        buffers.reverse()
        return buffers[0].copy_(plain(x, t))

    return function


def view_of_a_bigger_buffer():
    buffer = []

    def function(x, t):
        buffer[:] = buffer or [torch.empty(2 * len(x), *x.shape[1:], dtype=x.dtype)]
        buffer[0].normal_()
        return buffer[0][len(x) :].copy_(plain(x, t))

    return function


def in_place():
    """The output is the input's own memory."""
    return lambda x, t: x.copy_(plain(x, t))


def spoils_its_input():
    def function(x, t):
        out = plain(x, t)
        x.fill_(torch.nan)
        t.data.fill_(torch.nan) if t.ndim == 0 else None
        return out

    return function


def only_later():
    """Eager at first, as graphs and engines are while they warm up; one buffer and the input's memory from then on."""
    calls, buffer = [], []

    def function(x, t):
        calls.append(1)
        out = plain(x, t)
        if len(calls) < 4:
            return out
        x.zero_()
        buffer[:] = buffer or [torch.empty_like(x)]
        return buffer[0].copy_(out)

    return function


KINDS = [one_buffer, two_buffers, view_of_a_bigger_buffer, in_place, spoils_its_input, only_later]
PICKED = ["ddim", "dpm++2m", "dpm++3m", "exp-ab4", "unipc3", "heun", "res-3s", "er-sde-3", "dpm++2m-sde", "dpm++3m-sde"]


def denoisers(process, function):
    yield Bare(process, function())
    yield Network(process, function())
    yield Network(process, function(), 0.5)
    yield pfode.scores.clip(Bare(process, function()), -50, 50)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("process", [pfode.EDM(), pfode.Flow()])
def test_every_recipe_runs_as_with_fresh_tensors(kind, process):
    names = CATALOGUE if kind in (one_buffer, spoils_its_input) else PICKED
    t = process.t_max
    x = process.sigma(t) * torch.randn(2, 3, dtype=torch.float64)
    for name in names:
        plan = make_plan(name, process, 7, grid="log-snr")
        for theirs, ours in zip(denoisers(process, kind), denoisers(process, lambda: plain), strict=True):
            kept = x.clone()
            end = run(plan, theirs, kept, SEEDS)
            assert torch.equal(end, run(plan, ours, x, SEEDS)), name
            assert torch.equal(kept, x), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dpm++3m", "heun", "dpm++2m-sde"])
def test_points_keep_their_values(kind, name):
    process, x = pfode.EDM(), 80 * torch.randn(2, 3)
    plan = make_plan(name, process, 6)
    for theirs, ours in zip(denoisers(process, kind), denoisers(process, lambda: plain), strict=True):
        points, expected = list(iterate(plan, theirs, x, SEEDS)), list(iterate(plan, ours, x, SEEDS))
        for point, right in zip(points, expected, strict=True):
            assert torch.equal(point.x, right.x)
            assert torch.equal(point.x0, right.x0)
        assert find_failures(plan, theirs, x, SEEDS) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_states_sent_back_stay_the_callers(kind):
    process, x = pfode.EDM(), 80 * torch.randn(2, 3)
    plan, mask = make_plan("dpm++3m", process, 6), torch.full((2, 3), 0.5)

    def ends(function):
        points, sent, end = iterate(plan, Bare(process, function()), x), None, x
        for _ in range(plan.steps):
            point = points.send(sent)
            sent, end = mask if point.step == 3 else None, point.x
        return end

    assert torch.equal(ends(kind), ends(lambda: plain))
    assert torch.equal(mask, torch.full((2, 3), 0.5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", ["rk45", "dpm-adaptive", "dpm++2m", "er-sde-3"])
def test_sample_with_its_trajectory(kind, sampler):
    process, seen = pfode.EDM(), []
    keep = {} if sampler in ("rk45", "dpm-adaptive") else {"trajectory": True, "callback": lambda p: seen.append(p.x)}
    theirs, ours = (
        pfode.sample(Bare(process, one()), n=2, shape=(3,), sampler=sampler, **keep) for one in (kind, lambda: plain)
    )
    assert torch.equal(theirs.x, ours.x)
    for a, b in zip(theirs.trajectory + theirs.preview, ours.trajectory + ours.preview, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("process", [pfode.EDM(), pfode.Flow()])
def test_encode_and_decode(kind, process):
    x = torch.randn(2, 3)
    cases: list[dict[str, Any]] = [
        {"sampler": "dpm++2m", "steps": 6},
        {"sampler": "o-belm", "steps": 6},
        {"sampler": "rk45"},
    ]
    for options in cases:
        kept = x.clone()
        theirs, ours = (pfode.encode(Bare(process, one()), kept, **options) for one in (kind, lambda: plain))
        assert torch.equal(kept, x)
        for a, b in zip(theirs, ours, strict=True):
            assert torch.equal(a, b)
        back, right = (pfode.decode(Bare(process, one()), ours, **options) for one in (kind, lambda: plain))
        assert torch.equal(back, right)


def test_an_adaptive_run_leaves_x_alone():
    x = torch.randn(2, 3)
    kept = x.clone()
    adaptive = make_adaptive("rk45", pfode.Flow(), chart="dpm++")
    end = adaptive.run(Bare(pfode.Flow(), spoils_its_input()), kept).x
    assert torch.equal(kept, x)
    assert torch.equal(end, adaptive.run(Bare(pfode.Flow(), plain), x).x)


def test_gradients_by_checkpoints_of_a_network_in_place():
    plan = make_plan("dpm++2m", pfode.EDM(), 4)
    found = []
    for function in (in_place(), plain):
        x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        end = run(plan, Bare(pfode.EDM(), function), x, checkpoint=True)
        found.append(torch.autograd.grad(end.sum(), x)[0])
    assert torch.equal(*found)


def test_no_state_is_copied_where_the_network_is_given_another_tensor():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.number += func.overloadpacket.__name__ == "clone" and args[0].shape == (2, 3)
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 3)
    for denoiser, allowed in ((Network(pfode.EDM(), plain, 0.5), 0), (problems.gaussian(pfode.EDM()), 1)):
        plan = make_plan("dpm++2m", denoiser.process, 8)
        with Copies() as copies:
            run(plan, denoiser, x)
        assert copies.number <= allowed


@pytest.mark.parametrize("kind", KINDS)
def test_autoguidance_by_networks_that_share_a_buffer(kind):
    """The weaker network is called after the other, on the same x."""
    process, x, t = pfode.EDM(), torch.randn(2, 3), torch.tensor(2.0)
    shared, weaker = kind(), lambda x, t: 0.5 * plain(x, t)
    strong = Bare(process, shared)
    weak = Bare(process, lambda x, t: shared(x, t).mul_(0.5))
    right = pfode.scores.guide(Bare(process, plain), 2.0, weak=Bare(process, weaker))
    assert torch.allclose(pfode.scores.guide(strong, 2.0, weak=weak)(x.clone(), t.clone()), right(x, t))
