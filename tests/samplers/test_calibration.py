"""Calibration: the best of a shortlist by a denoiser's own samples."""

import math

import pytest
import torch

import pfode
from pfode import noise
from pfode.errors import NumericalError, UsageError
from pfode.samplers import auto
from pfode.samplers.calibration import SHORTLIST, calibrate, calibration_calls
from pfode.samplers.catalogue import make_plan
from pfode.scores.denoiser import Denoiser
from pfode.scores.exact import GaussianMixture
from pfode.scores.io.save import save
from tests.scores import small

PROCESSES = [pfode.EDM(), pfode.VP(), pfode.Flow(), pfode.VE(0.01, 20.0), pfode.VPCosine()]
NAMES = [type(process).__name__ for process in PROCESSES]


def bed(process=None) -> GaussianMixture:
    return GaussianMixture(
        [[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87], [0.0, 0.0]], std=0.2, process=process or pfode.EDM()
    )


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
@pytest.mark.parametrize("nfe", [1, 2, 3, 6, 12])
def test_it_takes_the_least_error_and_says_what_it_tried(process, nfe):
    plan = calibrate(bed(process), nfe)
    tried = plan.meta["calibrated"]["tried"]
    assert plan.nfe == nfe
    least = min(tried.values(), key=lambda errors: errors[0] * errors[1])
    assert tried[f"{plan.meta['sampler']}@{plan.meta['chart']} {plan.meta['grid']}"] == least
    assert len(tried) >= (8 if nfe > 2 else 3)


def test_it_is_not_behind_auto_on_fresh_noise():
    denoiser = bed(pfode.Flow())
    x = noise.normal(range(512), 0, denoiser.shape, torch.float64)
    fine = pfode.run(make_plan("exp-ab3", denoiser.process, 200, grid="karras"), denoiser, x)

    def error(plan):
        return (pfode.run(plan, denoiser, x) - fine).square().mean().sqrt()

    for nfe in (4, 6, 8):
        calibrated = error(calibrate(denoiser, nfe, n=128, dtype=torch.float64))
        assert calibrated <= 1.05 * error(make_plan("auto", denoiser.process, nfe=nfe))


@pytest.mark.parametrize("kind", SHORTLIST)
def test_every_choice_of_the_shortlist_can_be_made(kind):
    process = {"alpha = 1": pfode.EDM(), "VP": pfode.VP(), "Flow": pfode.Flow()}[kind[0]]
    assert auto.family(process) == kind[0]
    assert len(set(SHORTLIST[kind])) == 8
    for choice in SHORTLIST[kind]:
        made = make_plan(choice.sampler, process, nfe=6, grid=choice.grid, chart=choice.chart)
        assert made.nfe == 6


class Counted:
    """A denoiser that counts samples times calls."""

    def __init__(self):
        self.inner, self.calls = bed(), 0
        self.process, self.shape = self.inner.process, self.inner.shape

    def __call__(self, x, t, **cond):
        self.calls += len(x)
        return self.inner(x, t, **cond)


@pytest.mark.parametrize("nfe", [6, 20])
def test_it_costs_what_it_says(nfe):
    counted = Counted()
    calibrate(counted, nfe)
    at_most = calibration_calls(nfe)
    assert at_most - 16 * nfe <= counted.calls <= at_most


def test_the_same_call_gives_the_same_plan_whatever_the_batch():
    plans = [calibrate(small.denoiser(), 4, batch=batch) for batch in (1, 5, 64)]
    assert plans[0] == plans[1] == plans[2]


def test_guided_networks_have_a_shortlist_of_their_own():
    tried = calibrate(small.denoiser(), 4, guidance=2.0).meta["calibrated"]["tried"]
    own = {f"{choice.sampler}@{choice.chart} {choice.grid}" for choice in SHORTLIST["alpha = 1", True]}
    assert own <= tried.keys()


def test_auto_takes_what_lies_beside_the_model(tmp_path):
    file = save(small.denoiser(), tmp_path / "net.safetensors", card={})
    net = pfode.load(file)
    assert len(net.plans) == 0
    plan = calibrate(net, 7)
    plan.save(tmp_path / "net.calibrated-7.safetensors")
    net = pfode.load(file)
    assert net.plans[7] == plan
    drawn = pfode.sample(net, n=2, nfe=7, label=0).x
    assert torch.equal(drawn, pfode.sample(net, n=2, plan=plan, label=0).x)
    assert not torch.equal(drawn, pfode.sample(net, n=2, nfe=7, label=0, fitted=False).x) or plan == make_plan(
        "auto", net.process, nfe=7
    )


def test_a_network_that_is_never_finite():
    broken = Denoiser(lambda x, t: x * math.nan, pfode.EDM(), "edm", shape=(4,))
    with pytest.raises(NumericalError):
        calibrate(broken, 4)


WRONG = [
    ({"nfe": 0}, "nfe"), ({"nfe": 2.5}, "nfe"), ({"nfe": 4, "n": 0}, "n"), ({"nfe": 4, "label": "dog"}, "dog"),
    ({"nfe": 4, "callback": 3}, "callback"), ({"nfe": 4, "seed": -1}, "seed"), ({"nfe": 4, "batch": 0}, "batch"),
    ({"nfe": 4, "guidance": "much"}, "guidance"), ({"nfe": 4, "shape": (0,)}, "shape"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "what"), WRONG)
def test_wrong_calls(options, what):
    with pytest.raises(UsageError, match=what):
        calibrate(small.denoiser(), **options)
