"""Inpainting: what is known stays, the rest is drawn to it, whatever the sampler."""

import math
from typing import Any

import pytest
import torch

import pfode
from pfode import noise
from pfode.errors import UsageError
from pfode.scores import Gaussian, GaussianMixture

SHAPE = (1, 6, 6)
MASK = torch.zeros(6, 6)
MASK[:, 3:] = 1
SAMPLERS = [
    "ddim",
    "heun",
    "dpm++2m",
    "unipc3",
    "ipndm3",
    "res-2s",
    "euler-a",
    "ddpm",
    "sa-solver",
    "dpm++2m-sde",
    "rk45",
]
SAMPLERS += ["dpm-adaptive"]


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def network(process: pfode.Process) -> Any:
    """A denoiser that mixes all pixels."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(36, 36, generator=generator) / 6
    return pfode.scores.Denoiser(
        lambda x, t: (x.flatten(1) @ weight).tanh().reshape(x.shape) + 0.1 * t[:, None, None, None] / process.t_max,
        process,
        "eps",
        shape=SHAPE,
    )


@pytest.mark.parametrize("process", [pfode.VP(), pfode.EDM(), pfode.Flow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_known_stays(process, sampler):
    if isinstance(process, pfode.Flow):
        process = pfode.Flow(shift=2.0)
    prediction = "flow" if isinstance(process, pfode.Flow) else "eps"
    den = network(process)
    den = pfode.scores.Denoiser(den.net, process, prediction, shape=SHAPE)
    init = pictures(3)
    out = pfode.sample(den, n=3, sampler=sampler, init=init, mask=MASK, seed=5)
    assert torch.equal(out.x[..., :3], init[..., :3])
    assert ((out.x[..., 3:] - init[..., 3:]).abs() > 1e-2).float().mean() > 0.8


def test_the_known_part_moves_on_its_line():
    """x_t = alpha x0 + sigma eps with the eps of the seed, at every node, and the network sees it so."""
    den, init = network(pfode.VP()), pictures(2)
    plan = pfode.make_plan("dpm++2m", den.process, 7)
    out = pfode.sample(den, seeds=[3, 9], init=init, mask=MASK, plan=plan, trajectory=True)
    eps = noise.normal([3, 9], noise.INITIAL, SHAPE, torch.float32, torch.device("cpu"))
    for t, x in zip(out.times.tolist(), out.trajectory, strict=True):
        line = den.process.alpha(t) * init + den.process.sigma(t) * eps
        torch.testing.assert_close(x[..., :3], line[..., :3], rtol=0, atol=2e-5)


def test_it_is_the_replacement_of_pipelines():
    """For ddim: the state of the known part replaced after each step by the noised data."""
    den, init = network(pfode.VP()), pictures(2)
    plan = pfode.make_plan("ddim", den.process, 6, start=0.7)
    eps = noise.normal([3, 9], noise.INITIAL, SHAPE, torch.float32, torch.device("cpu"))

    def replace(point: Any) -> torch.Tensor:
        t = point.t if point.step < point.steps else 0.0
        return torch.where(MASK == 1, point.x, den.process.alpha(t) * init + den.process.sigma(t) * eps)

    wanted = pfode.sample(den, seeds=[3, 9], init=init, plan=plan, callback=replace).x
    got = pfode.sample(den, seeds=[3, 9], init=init, mask=MASK, plan=plan).x
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)


def test_the_rest_is_drawn_to_what_is_known():
    """Of a Gaussian whose halves are nearly equal the drawn half comes out near the kept one."""
    covariance = 0.25 * (torch.ones(2, 2) + 1e-2 * torch.eye(2))
    den = Gaussian(torch.zeros(2), covariance.double(), process=pfode.EDM())
    init = torch.tensor([[0.8, 0.0]]).expand(64, 2)
    x = pfode.sample(den, n=64, steps=40, sampler="heun", init=init, mask=torch.tensor([0.0, 1.0])).x
    assert float(x[:, 1].mean()) > 0.4
    plain = pfode.sample(den, n=64, steps=40, sampler="heun").x
    assert abs(float(plain[:, 1].mean())) < 0.25


def test_the_ends_of_a_mask():
    den, init = network(pfode.EDM()), pictures(2)
    options: dict[str, Any] = {"n": 2, "steps": 4, "sampler": "heun", "seed": 5}
    whole = pfode.sample(den, init=init, mask=torch.ones(()), **options).x
    torch.testing.assert_close(whole, pfode.sample(den, **options).x, rtol=1e-4, atol=1e-4)
    other = pfode.sample(den, init=-init, mask=torch.ones(6, 6), **options).x
    assert torch.equal(whole, other)  # what is drawn anew is not looked at
    none = pfode.sample(den, init=init, mask=torch.zeros(6, 6), **options).x
    assert torch.equal(none, init)
    begun = pfode.sample(den, init=init, mask=MASK, strength=0.4, **options).x
    seen = pfode.sample(den, init=-init * MASK + init * (1 - MASK), mask=MASK, strength=0.4, **options).x
    assert not torch.equal(begun, seen)  # at a lower strength it is begun from


def test_each_sample_its_own_in_any_batch():
    den = network(pfode.VP())
    init = pictures(5)
    masks = (torch.rand(5, 1, 6, 6, generator=torch.Generator().manual_seed(4)) > 0.5).expand(5, *SHAPE)
    options: dict[str, Any] = {"steps": 5, "sampler": "euler-a"}
    whole = pfode.sample(den, n=5, init=init, mask=masks, **options).x
    parts = pfode.sample(den, n=5, init=init, mask=masks, batch=2, **options).x
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-4)
    for i in (4, 1):
        one = pfode.sample(den, seeds=[i], init=init[i], mask=masks[i : i + 1], **options).x
        torch.testing.assert_close(one[0], whole[i], rtol=0, atol=2e-4)
    assert torch.equal(init, pictures(5))


def test_classes_and_guidance():
    means = torch.stack([torch.full((36,), -0.5), torch.full((36,), 0.5)]).reshape(2, *SHAPE)
    exact = GaussianMixture(means, std=0.2, process=pfode.EDM())
    init = pictures(2)
    out = pfode.sample(exact, n=2, steps=8, sampler="dpm++2m", init=init, mask=MASK, dtype=torch.float64)
    assert out.x.dtype == torch.float64
    torch.testing.assert_close(out.x[..., :3].float(), init[..., :3], rtol=0, atol=1e-6)
    net = pfode.load("digits")
    digit = torch.zeros(1, 8, 8)
    mask = torch.ones(8, 8)
    mask[:, :4] = 0
    drawn = pfode.sample(net, n=10, steps=6, init=digit, mask=mask, label="all", guidance=2.0)
    assert drawn.evals == 2 * drawn.nfe
    assert torch.equal(drawn.x[..., :4], torch.zeros(10, 1, 8, 4))
    assert len({tuple(x.flatten().tolist()) for x in drawn.x}) == 10


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": MASK}, "mask: says where init= is drawn anew"),
        ({"init": pictures(1)[0], "mask": torch.zeros(5, 6)}, r"mask: shape \(5, 6\) does not fit samples of shape"),
        ({"init": pictures(1)[0], "mask": MASK * 255}, "mask: has values outside of 0 to 1"),
        ({"init": pictures(1)[0], "mask": MASK / 0}, "mask: has values outside of 0 to 1"),
        ({"init": pictures(1)[0], "mask": "left"}, "mask: need a dense tensor, got str"),
        ({"init": pictures(1)[0], "mask": torch.zeros(3, 1, 6, 6)}, "does not fit samples"),
    ],
)
def test_what_cannot_be(given, message):
    with pytest.raises(UsageError, match=message):
        pfode.sample(network(pfode.EDM()), n=2, steps=2, **given)


def test_data_that_is_not_finite_is_found():
    init = pictures(2)
    init[1, 0, 0, 0] = math.nan
    out = pfode.sample(network(pfode.VP()), n=2, steps=3, sampler="ddim", init=init, mask=MASK, nan="flag")
    assert [flaw.index for flaw in out.bad] == [1]
