"""Networks of users: what is none is refused with the remedy; their dtype is found; their weights are hashed once."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import nn

import pfode
from pfode.errors import UsageError
from pfode.introspection import compute_dtype, stamp
from pfode.scores import Empirical, Gaussian, GaussianMixture
from pfode.scores import denoiser as denoisers
from pfode.scores.denoiser import Denoiser


class Net(nn.Module):
    """A small network with an embedding of time, as users write them; it minds the dtype of both of its inputs."""

    def __init__(self):
        super().__init__()
        self.time, self.body = nn.Linear(1, 4), nn.Linear(2, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x, t, label=None):
        return self.last(torch.tanh(self.body(x) + self.time(t[:, None])))


torch.manual_seed(0)
NET = Net().requires_grad_(False)
BRAIN = Net().bfloat16().requires_grad_(False)


class Holder:
    """A callable object around a network."""

    def __init__(self, net: Any):
        self.net: Any = net

    def __call__(self, x, t):
        return self.net(x, t)

    def method(self, x, t):
        return self.net(x, t)


def through_a_global(x, t):
    return NET(x, t)


def through_another(x, t):
    return through_a_global(x, t)


def closing_over(net):
    return lambda x, t: net(x, t)


WAYS = {
    "module": NET, "forward": NET.forward, "lambda": closing_over(NET), "global": through_a_global,
    "function of a function": through_another, "partial": functools.partial(NET), "object": Holder(NET),
    "method": Holder(NET).method, "partial of a lambda": functools.partial(closing_over(NET)),
    "compiled": torch.compile(NET, backend="eager"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("network", WAYS.values(), ids=WAYS)
def test_the_dtype_of_a_network_is_found_however_it_is_wrapped(network, dtype):
    den = Denoiser(network, pfode.EDM(), "edm", shape=(2,))
    assert den.dtype == torch.float32
    found = pfode.sample(den, n=3, steps=4, dtype=dtype, sampler="heun")
    wanted = pfode.sample(Denoiser(NET, pfode.EDM(), "edm", shape=(2,)), n=3, steps=4, dtype=dtype, sampler="heun")
    assert found.x.dtype == dtype
    assert torch.equal(found.x, wanted.x)


def test_a_network_in_float64_runs_from_float32_states():
    den = Denoiser(Net().double(), pfode.VP(), "eps", shape=(2,))
    assert pfode.sample(den, n=2, steps=3, dtype=torch.float32).x.dtype == torch.float32
    half = Denoiser(BRAIN, pfode.VP(), "eps", shape=(2,))  # its own time embedding takes bfloat16 alone
    seen = []
    half.net = lambda x, t, **cond: seen.append((x.dtype, t.dtype)) or x
    half(torch.ones(2, 2), torch.tensor(0.5))
    assert seen == [(torch.bfloat16, torch.float32)]


class OwnDenoiser(nn.Module):
    """A denoiser of a user's own, without pfode's classes."""

    def __init__(self):
        super().__init__()
        self.net, self.process = NET, pfode.EDM()

    def forward(self, x, t):
        return self.net(x, t.expand(len(x)))


class Holding:
    """The same as an object that holds a module."""

    def __init__(self):
        self.inner, self.process = OwnDenoiser(), pfode.EDM()

    def __call__(self, x, t):
        return self.inner(x, t)


class InTwoTypes(OwnDenoiser):
    """One that casts by itself, and keeps the precision of the state."""

    def forward(self, x, t):
        return 0.5 * x + 1e-9 * super().forward(x.float(), t.float()).to(x.dtype)


@pytest.mark.parametrize("sampler", ["heun", "dpm++2m", "er-sde"])
@pytest.mark.parametrize("kind", [OwnDenoiser, Holding])
def test_denoisers_of_users_in_float32_run_from_float64_states(kind, sampler):
    how = {"n": 2, "steps": 4, "shape": (2,), "sampler": sampler, "seed": 1}
    double, single = (pfode.sample(kind(), dtype=dtype, **how).x for dtype in (torch.float64, torch.float32))
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-3, atol=1e-4)


def test_denoisers_that_cast_by_themselves_keep_their_precision():
    x = torch.tensor([[1 / 3, 1.0]], dtype=torch.float64)
    plan = pfode.make_plan("ddim", process=pfode.EDM(), steps=1)
    assert torch.allclose(pfode.run(plan, InTwoTypes(), x), 0.5 * x, rtol=0, atol=1e-8)
    assert not torch.equal(pfode.run(plan, InTwoTypes(), x), pfode.run(plan, InTwoTypes(), x.float()).double())


def test_other_errors_of_a_denoiser_pass():
    class Broken(OwnDenoiser):
        def forward(self, x, t):
            raise RuntimeError("out of paper")

    with pytest.raises(RuntimeError, match="out of paper"):
        pfode.sample(Broken(), n=1, steps=1, shape=(2,), dtype=torch.float64)


def test_functions_without_a_network_get_the_state_as_it_is():
    seen = []
    den = Denoiser(lambda x, t: seen.append((x.dtype, t.dtype)) or x, pfode.VP(), "v", shape=(2,))
    for dtype in (torch.float32, torch.float64):
        pfode.sample(den, n=1, steps=1, dtype=dtype, sampler="ddim")
        assert set(seen) == {(dtype, dtype)}
        seen.clear()


def test_networks_that_disagree_say_nothing():
    brain = BRAIN
    assert compute_dtype(lambda x, t: NET(x, t) + brain(x, t)) is None
    assert compute_dtype(brain) == torch.bfloat16
    assert compute_dtype(len) is None
    loop = Holder(None)
    loop.net = loop
    assert compute_dtype(loop) is None


def test_eight_bit_weights():
    net = Net()
    for name, value in list(net.named_parameters()):
        owner, last = name.rsplit(".", 1)
        setattr(net.get_submodule(owner), last, nn.Parameter(value.detach().to(torch.float8_e4m3fn), False))
    with pytest.raises(UsageError, match=r"float8_e4m3fn, in which nothing is computed"):
        Denoiser(net, pfode.VP())
    net.last = nn.Linear(4, 2).bfloat16()  # norms and the like stay wider
    assert Denoiser(net, pfode.VP()).dtype == torch.bfloat16
    net.last = nn.Linear(4, 2).to(torch.float8_e4m3fn)
    net.__dict__["dtype"] = torch.float16  # as models of diffusers say it, with casts of their own in every layer
    assert Denoiser(net, pfode.VP()).dtype == torch.float16


def test_weights_on_the_meta_device():
    with torch.device("meta"):
        net = Net()
    den = Denoiser(net, pfode.VP(), "eps", shape=(2,))
    with pytest.raises(UsageError, match="on the meta device: its weights hold no numbers"):
        pfode.sample(den, n=1, steps=2, device="cpu")


@pytest.mark.parametrize(
    ("process", "hint"),
    [
        ("flow", "pfode.Flow()"),
        ("EDM", "pfode.EDM()"),
        ("pfode.VP", "pfode.VP()"),
        ("vpdiscrete", "pfode.VPDiscrete(alphas_cumprod)"),
        (pfode.EDM, "pfode.EDM()"),
        (pfode.VE, "pfode.VE(sigma_min=..., sigma_max=...)"),
        ("eps", "one of pfode"),
        (None, "one of pfode"),
        (7, "one of pfode"),
        (Denoiser, "one of pfode"),
        ({"name": "EDM"}, "one of pfode"),
    ],
)
def test_what_is_no_process_is_refused_where_it_is_given(process, hint):
    wrong: Any = process
    given: Any = "?" if process is None else process  # None is the default of the exact ones
    for make in (
        lambda: Denoiser(NET, wrong),
        lambda: GaussianMixture(torch.zeros(2, 2), std=0.3, process=given),
        lambda: Gaussian([0.0], 1.0, process=given),
        lambda: Empirical(torch.zeros(2, 2), process=given),
    ):
        with pytest.raises(UsageError, match="process: expected a noise process, got") as caught:
            make()
        assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": Net}, "the class Net"),
        ({"network": "net"}, "got 'net'"),
        ({"network": None}, "got None"),
        ({"prediction": pfode.EDM()}, "unknown prediction"),
        ({"prediction": ["eps"]}, "unknown prediction"),
        ({"sigma_data": "1"}, "sigma_data: need a positive number"),
        ({"sigma_data": 1e308}, "sigma_data: need a positive number up to 1e30"),
        ({"time_scale": torch.ones(2)}, "time_scale: need a positive number"),
        ({"shape": 2}, "shape: expected the sides"),
        ({"shape": "22"}, "shape: expected the sides"),
        ({"shape": (2, 0)}, "shape: need an integer of at least 1"),
        ({"shape": (2.5,)}, "shape: need an integer"),
        ({"labels": "cat"}, "labels: expected the names"),
        ({"labels": [1, 2]}, "labels: expected the names"),
    ],
)
def test_other_bad_arguments(change, message):
    with pytest.raises(UsageError, match=message):
        Denoiser(**{"network": NET, "process": pfode.VP(), **change})


# ---- the fingerprint


@pytest.fixture
def hashed(monkeypatch):
    """How often weights were hashed."""
    count = []
    digest = denoisers.digest_of
    monkeypatch.setattr(denoisers, "digest_of", lambda *args: count.append(1) or digest(*args))
    return count


def test_weights_are_hashed_once_and_again_when_they_changed(hashed):
    den = Denoiser(Net(), pfode.VP(), "eps", shape=(2,))
    first = den.fingerprint
    assert [den.fingerprint for _ in range(5)] == [first] * 5
    assert len(hashed) == 1
    with torch.no_grad():
        den.net.body.weight[0, 0] += 1
    second = den.fingerprint
    assert second != first
    den.net.body.weight.data[0, 0] -= 2  # which torch does not count as a change
    third = den.fingerprint
    assert third not in (first, second)
    den.net.body.weight = nn.Parameter(den.net.body.weight.detach() + 1)
    assert den.fingerprint not in (first, second, third)
    with torch.no_grad():
        den.net.body.weight.copy_(den.net.body.weight.flip(0))
    assert len({den.fingerprint, first, second, third}) == 4
    assert len(hashed) == 5
    assert Denoiser(den.net, pfode.VP(), "eps").fingerprint == den.fingerprint


def test_a_digest_that_was_known_holds_until_the_weights_change(hashed):
    den = pfode.load("digits")
    known = den.digest
    assert den.fingerprint == known
    assert den.to(dtype=torch.bfloat16).fingerprint == known
    assert not hashed
    with torch.no_grad():
        next(den.net.parameters()).mul_(2)
    assert den.fingerprint != known
    assert len(hashed) == 1
    assert pfode.load("digits").fingerprint == known


def test_runs_of_a_fitted_plan_do_not_hash_again(hashed):
    den = Denoiser(Net(), pfode.VP(), "eps", shape=(2,))
    plan = pfode.make_plan("ddim", process=den.process, steps=3)
    fitted = dataclasses.replace(plan, meta={"fitted": {"model": den.fingerprint}})
    assert fitted.fitted_to == den.fingerprint
    for _ in range(3):
        pfode.run(fitted, den, torch.ones(1, 2))
    assert den.fingerprint
    assert len(hashed) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_stamp_sees_every_element(dtype):
    net = nn.Linear(5, 3).to(dtype)
    net.register_buffer("flags", torch.tensor([True, False, True]))
    net.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)
    before = stamp(net)
    assert before == stamp(net)
    for value in net.state_dict(keep_vars=True).values():
        for i in range(value.numel()):
            flat = value.data.reshape(-1) if value.is_contiguous() else value.data.T.reshape(-1)
            old = flat[i].item()
            flat[i] = (not old) if value.dtype == torch.bool else old + 1
            assert stamp(net) != before
            flat[i] = old
    assert stamp(net) is not None
    assert stamp(nn.Linear(2, 2, device="meta")) is None
