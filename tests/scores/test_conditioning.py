"""Conditioning layers found by tracing, and offsets added to their outputs."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import pfode
from pfode.denoiser import conditioning, tuned
from pfode.errors import UsageError
from pfode.plans.table import Plan
from pfode.plans.unrolled import matrix
from pfode.scores.conditioning import find_layers
from pfode.scores.denoiser import Denoiser
from pfode.scores.guidance import guide
from tests.scores import small, tiny

GRID = pfode.make_plan("dpm++2m", pfode.EDM(), nfe=4)


def offsets(denoiser, nfe=4, size=0.3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: size * torch.randn(nfe, width, generator=draw) for name, width in conditioning(denoiser).items()}


def with_offsets(denoiser, plan: Plan = GRID, size=0.3) -> Plan:
    return dataclasses.replace(plan, tune=offsets(denoiser, plan.nfe, size))


def noise(n=4) -> torch.Tensor:
    return 80 * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def test_the_layers_of_the_unet_are_its_embedding_and_every_block():
    net = small.denoiser()
    blocks = {name for name, module in net.net.named_modules() if name.endswith("embed")}
    assert set(net.conditioning) == blocks | {"noise.0", "noise.2"}
    assert all(net.net.get_submodule(name).out_features == width for name, width in net.conditioning.items())


def test_layers_that_see_x_or_only_the_class_are_none_of_them():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.both, self.kind, self.same = (nn.Linear(2, 2) for _ in range(4))

        def forward(self, x, c_noise, label=None):
            time = self.time(torch.stack([c_noise, c_noise**2], 1))
            fixed = self.same(torch.ones(len(x), 2)) + self.kind(torch.zeros(len(x), 2))
            return self.both(x + time) + fixed

    net = Denoiser(Net(), pfode.EDM(), "edm", shape=(2,))
    assert net.conditioning == {"time": 2}
    once = Net()
    once.again = once.time  # a layer by two names, called once
    assert find_layers(once, once, (2,)) == {"time": 2}


@pytest.mark.parametrize("name", ["unet", "latent_unet", "dit", "sd3", "flux"])
def test_networks_of_diffusers(name):
    made = getattr(tiny, name)(*([None] if name in ("sd3", "flux") else []))
    net = getattr(made, "transformer", made)
    words, pooled = tiny.words(0).expand(2, -1, -1), torch.ones(2, tiny.POOLED)
    given = {
        "unet": lambda x, t: net(x, t),
        "latent_unet": lambda x, t: net(x, t, words),
        "dit": lambda x, t: net(x, t, class_labels=torch.zeros(2, dtype=torch.long)),
        "sd3": lambda x, t: net(x, words, pooled, t),
        "flux": lambda x, t: net(
            x.flatten(2).transpose(1, 2), words, pooled, t, torch.zeros(x[0, 0].numel(), 3), torch.zeros(5, 3),
            torch.ones(2),
        ),
    }  # fmt: skip
    found = find_layers(net, given[name], {"unet": (3, 8, 8), "flux": (16, 2, 2)}.get(name, (4, 8, 8)))
    ends = {"unet": "time_emb_proj", "latent_unet": "time_emb_proj"}.get(name, "norm1.linear")
    modulation = {key for key, _ in net.named_modules() if key.endswith(ends)}
    assert modulation
    assert modulation <= found.keys()


def test_offsets_of_zero_change_no_bit_and_others_do():
    net, x = small.denoiser(), noise()
    before = copy.deepcopy(net.net.state_dict())
    plain = pfode.run(GRID, net, x)
    assert torch.equal(pfode.run(with_offsets(net, size=0.0), net, x), plain)
    assert (pfode.run(with_offsets(net), net, x) - plain).abs().max() > 0.01
    assert torch.equal(pfode.run(GRID, net, x), plain)
    assert all(torch.equal(value, before[name]) for name, value in net.net.state_dict().items())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in net.net.modules())


def test_an_offset_is_a_change_of_the_layers_bias():
    net, x = small.denoiser(), noise()
    plan = with_offsets(net, pfode.make_plan("dpm++2m", net.process, nfe=1))
    moved = small.denoiser()
    for name, value in plan.tune.items():
        moved.net.get_submodule(name).bias.data += value[0]
    assert torch.allclose(pfode.run(plan, net, x), pfode.run(dataclasses.replace(plan, tune={}), moved, x), atol=1e-5)


def test_every_row_has_its_own():
    net, x = small.denoiser(), noise(2)
    plan = with_offsets(net)
    last = {name: torch.cat([value[:-1] * 0, value[-1:]]) for name, value in plan.tune.items()}
    points = [list(pfode.iterate(dataclasses.replace(GRID, tune=tune), net, x)) for tune in ({}, last)]
    same = [torch.equal(a.x, b.x) for a, b in zip(*points, strict=True)]
    assert same == [True, True, True, False]


def test_a_sample_alone_and_in_a_batch():
    net, x = small.denoiser(), noise(5)
    plan = with_offsets(net)
    whole = pfode.run(plan, net, x)
    assert all(torch.allclose(pfode.run(plan, net, x[i : i + 1])[0], whole[i], atol=1e-5) for i in range(5))


def test_guided_both_halves_are_asked_alike():
    net, x, label = small.denoiser(), noise(3), torch.arange(3)
    plan = with_offsets(net)
    guided = pfode.run(plan, guide(net, 2.0), x, label=label)
    one = {name: value[0] for name, value in plan.tune.items()}
    there: Any = tuned(guide(net, 2.0), one)
    assert there.conditioning == net.conditioning
    assert (guided - pfode.run(GRID, guide(net, 2.0), x, label=label)).abs().max() > 0.01
    t = torch.tensor(3.0)
    d = tuned(net, one)
    by_hand = d(x, t) + 2 * (d(x, t, label=label) - d(x, t))
    assert torch.allclose(there(x, t, label=label), by_hand, atol=1e-4)


def test_a_weaker_sibling_is_asked_as_it_is():
    net, weak, x = small.denoiser(), small.denoiser(), noise(2)
    t, one = torch.tensor(3.0), {name: value[0] for name, value in offsets(small.denoiser()).items()}
    there = tuned(guide(net, 2.0, weak=weak), one)
    assert torch.allclose(there(x, t), weak(x, t) + 2 * (tuned(net, one)(x, t) - weak(x, t)), atol=1e-4)


def test_clipped_and_other_wrappers_pass_them_on():
    net, x = small.denoiser(), noise(2)
    plan = with_offsets(net)
    found = pfode.run(plan, pfode.scores.clip(net), x)
    assert (found - pfode.run(GRID, pfode.scores.clip(net), x)).abs().max() > 0.01


def test_new_weights_are_seen():
    net, x = small.denoiser(), noise(2)
    plan = with_offsets(net)
    before = pfode.run(plan, net, x)
    net.net.last.weight = nn.Parameter(2 * net.net.last.weight)
    after = pfode.run(plan, net, x)
    fresh = Denoiser(net.net, net.process, "edm", shape=(1, 8, 8), labels=small.NAMES)
    assert not torch.equal(before, after)
    assert torch.equal(after, pfode.run(plan, fresh, x))


def test_it_compiles_to_one_graph_for_all_rows():
    net, x = small.denoiser(), noise(2)
    plan = with_offsets(net)
    graphs = []

    def counting(module, inputs):
        graphs.append(module)
        return module

    one = tuned(net, {name: value[0] for name, value in plan.tune.items()}).net.tunable
    compiled = torch.compile(one, backend=counting, fullgraph=True)
    for k in range(plan.nfe):
        row = {name: value[k] for name, value in plan.tune.items()}
        c_noise = torch.full((2,), 0.1 * k)
        assert torch.allclose(compiled(row, x, c_noise), one(row, x, c_noise), atol=1e-5)
    assert len(graphs) == 1


def test_gradients_reach_the_offsets_and_not_the_weights():
    net, x = small.denoiser(), noise(2)
    net.net.requires_grad_(True)
    tune = {name: value.requires_grad_() for name, value in offsets(net).items()}
    plan = dataclasses.replace(GRID, tune=tune)
    found = torch.autograd.grad(pfode.run(plan, net, x).square().sum(), list(tune.values()))
    assert all(value.isfinite().all() and value.any() for value in found)
    kept = torch.autograd.grad(pfode.run(plan, net, x, checkpoint=True).square().sum(), list(tune.values()))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, kept, strict=True))
    assert all(parameter.grad is None for parameter in net.net.parameters())


def test_the_exactly_invertible_stay_so():
    net, x = small.denoiser(), 0.5 * noise(2) / 80
    plain = pfode.make_plan("o-belm", net.process, nfe=6, final="stop")
    plan = with_offsets(net, plain, size=0.05)
    z = pfode.encode(net, x, plan=plan)
    assert (pfode.decode(net, z, plan=plan) - x).abs().max() < 1e-9
    assert (pfode.decode(net, z, plan=plain) - x).abs().max() > 1e-3


def test_it_is_kept_and_shown(tmp_path):
    net = small.denoiser()
    plan = with_offsets(net)
    again = Plan.load(plan.save(tmp_path / "tuned.safetensors"))
    assert again == plan
    assert again != GRID
    assert again != dataclasses.replace(plan, tune={**plan.tune, "noise.2": plan.tune["noise.2"] + 1e-6})
    numbers = sum(value.numel() for value in plan.tune.values())
    assert f"tuned: {numbers:,} offsets in {len(plan.tune)} layers" in str(again)
    assert "tuned" not in str(GRID)


BROKEN = {
    "a list": [torch.zeros(4, 2)],
    "a number as name": {3: torch.zeros(4, 2)},
    "no name": {"": torch.zeros(4, 2)},
    "a line break": {"a\nb": torch.zeros(4, 2)},
    "three rows": {"noise.2": torch.zeros(3, 32)},
    "five rows": {"noise.2": torch.zeros(5, 32)},
    "no width": {"noise.2": torch.zeros(4, 0)},
    "one dimension": {"noise.2": torch.zeros(4)},
    "three dimensions": {"noise.2": torch.zeros(4, 2, 32)},
    "integers": {"noise.2": torch.zeros(4, 32, dtype=torch.long)},
    "complex": {"noise.2": torch.zeros(4, 32, dtype=torch.complex64)},
    "NaN": {"noise.2": torch.full((4, 32), torch.nan)},
    "infinity": {"noise.2": torch.full((4, 32), torch.inf)},
    "beyond float32": {"noise.2": torch.full((4, 32), 1e300, dtype=torch.float64)},
    "a name for offsets": {"noise.2": "zeros"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_offsets(name):
    with pytest.raises(UsageError, match="tune"):
        dataclasses.replace(GRID, tune=BROKEN[name])


@pytest.mark.parametrize(
    ("tune", "what"),
    [
        ({"absent": torch.zeros(4, 32)}, "no conditioning layer 'absent'"),
        ({"first": torch.zeros(4, 8)}, "no conditioning layer 'first'"),
        ({"noise.2": torch.zeros(4, 31)}, "need 32 offsets"),
    ],
)
def test_offsets_of_another_network(tune, what):
    with pytest.raises(UsageError, match=what):
        pfode.run(dataclasses.replace(GRID, tune=tune), small.denoiser(), noise(1))


def test_denoisers_without_such_layers():
    plan = with_offsets(small.denoiser())
    exact = pfode.scores.Gaussian([0.0] * 64, 0.5, process=pfode.EDM())
    with pytest.raises(UsageError, match="Gaussian has no conditioning layers"):
        pfode.run(plan, exact, noise(1).flatten(1))
    function = Denoiser(lambda x, t: x, pfode.EDM(), "edm", shape=(1, 8, 8))
    with pytest.raises(UsageError, match="needs a torch module"):
        pfode.run(plan, function, noise(1))
    unknown = Denoiser(small.network(), pfode.EDM(), "edm", labels=small.NAMES)
    with pytest.raises(UsageError, match="the shape of a sample"):
        pfode.run(plan, unknown, noise(1))


def test_another_model_is_refused():
    net, other = small.denoiser(), small.denoiser()
    other.net.last.weight.data += 1
    fitted = {"fitted": {"model": net.fingerprint}}
    plan = dataclasses.replace(with_offsets(net), meta=fitted)
    pfode.run(plan, net, noise(1))
    with pytest.raises(UsageError, match="tuned to another model"):
        pfode.run(plan, other, noise(1))


def test_sample_takes_it_and_unrolled_it_is_what_it_was_without():
    net = small.denoiser()
    plan = with_offsets(net)
    drawn = pfode.sample(net, n=3, plan=plan, seed=1)
    assert (drawn.nfe, drawn.evals) == (4, 4)
    assert not torch.equal(drawn.x, pfode.sample(net, n=3, plan=GRID, seed=1).x)
    assert torch.equal(matrix(plan), matrix(GRID))
