"""Fitted plans: tangents of end points, what a fit reaches, that it repeats, resumes and never loses."""

import json
import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import pfode
from pfode import noise
from pfode.errors import OtherModelWarning, UsageError
from pfode.plans.executor import run
from pfode.plans.table import Plan
from pfode.samplers import fit_plan, make_plan
from pfode.samplers.fit.losses import LOSSES
from pfode.samplers.fit.parameters import DyWeight, General, clock, clocked
from pfode.samplers.fit.starts import STARTS
from pfode.samplers.fit.tangents import Numbers, differences, end, tangents
from pfode.scores.exact import GaussianMixture
from tests import problems
from tests.scores import small

RECIPES = ["ddim", "dpm++3m", "unipc3", "ipndm3", "heun", "dpm-3s", "deis-tab3", "o-belm"]


def bed(process: pfode.Process) -> GaussianMixture:
    """Three clusters on a circle and one inside."""
    return GaussianMixture([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87], [0.0, 0.0]], std=0.2, process=process)


def noises(denoiser: GaussianMixture, n: int, first: int = 0) -> torch.Tensor:
    process = denoiser.process
    return process.sigma(process.t_max) * noise.normal(range(first, first + n), 0, denoiser.shape, torch.float64)


def errors(plan: Plan, denoiser: GaussianMixture, n: int = 256) -> tuple[float, float]:
    """Root mean square and median on noise that no fit has seen."""
    x = noises(denoiser, n, 10**6)
    fine = run(make_plan("exp-ab3", denoiser.process, 150, grid="karras"), denoiser, x)
    each = (run(plan, denoiser, x) - fine).pow(2).mean(1)
    return each.mean().sqrt().item(), each.sqrt().median().item()


def quick(denoiser: GaussianMixture, nfe: int = 4, **options) -> Plan:
    options = {"n": 64, "active": 64, "check": 64, "teacher": 40, "iterations": 6, "dtype": torch.float64, **options}
    return fit_plan(denoiser, nfe, **options)


@pytest.mark.parametrize("process", [pfode.EDM(), pfode.VP(), pfode.Flow()], ids=["EDM", "VP", "Flow"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_plan_is_its_numbers(name, process):
    denoiser = bed(process)
    plan = make_plan(name, process, nfe=6)
    x = noises(denoiser, 4)
    again = Numbers.of(plan).plan(plan)
    assert again.prediction == "x0"
    assert (run(again, denoiser, x) - run(plan, denoiser, x)).abs().max() < 1e-9


def test_afs_keeps_its_free_step():
    denoiser = bed(pfode.EDM())
    plan = make_plan("ipndm3", denoiser.process, 6, grid="karras", afs=0.7)
    x = noises(denoiser, 4)
    assert (run(Numbers.of(plan).plan(plan), denoiser, x) - run(plan, denoiser, x)).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["euler-a", "edm"])
def test_noise_has_no_numbers(name):
    with pytest.raises(UsageError, match="draws noise"):
        Numbers.of(make_plan(name, pfode.EDM(), 4))


@pytest.mark.parametrize("process", [pfode.EDM(), pfode.Flow()], ids=["EDM", "Flow"])
def test_tangents_and_gradients(process):
    """Every number of a plan: the tangent, autograd through the executor, and a central difference agree."""
    denoiser = bed(process)
    plan = make_plan("unipc2", process, 4)
    numbers, x = Numbers.of(plan), noises(denoiser, 6)
    count = len(numbers.vector)
    h = torch.cat([1e-5 * plan.t, torch.full((count - plan.nfe,), 1e-6, dtype=torch.float64)])
    h[0] = -h[0]  # no later than t_max

    def call(x: torch.Tensor, t: float) -> torch.Tensor:
        return denoiser(x, torch.tensor(t, dtype=torch.float64))

    unit = torch.eye(count, dtype=torch.float64)
    y, moved = tangents(numbers, Numbers(unit, plan.nfe), process, call, x, 64)
    assert torch.allclose(y, run(plan, denoiser, x), atol=1e-9)
    free = Numbers(numbers.vector.clone().requires_grad_(), plan.nfe)
    run(free.plan(plan), denoiser, x).square().sum().backward()
    gradient, found = (2 * y * moved).flatten(1).sum(1), free.vector.grad
    assert found is not None
    assert torch.allclose(gradient, found, rtol=2e-2, atol=2e-2 * float(gradient.abs().median()))
    for i in range(0, count, 3):
        ahead = end(Numbers(numbers.vector + h[i] * unit[i], plan.nfe), call, x)
        slope = (ahead - y) / h[i] if i == 0 else (
            ahead - end(Numbers(numbers.vector - h[i] * unit[i], plan.nfe), call, x)) / (2 * h[i])  # fmt: skip
        assert torch.allclose(slope.mul(2 * y).sum(), found[i], rtol=2e-3, atol=1e-6), i


@pytest.mark.parametrize("process", [pfode.EDM(), pfode.VP(), pfode.Flow(), problems.zero_terminal_snr()])
def test_the_clock(process):
    t = torch.linspace(process.t_min, process.t_max, 9, dtype=torch.float64)
    assert torch.allclose(clocked(process, clock(process, t)), t, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_slopes_of_losses(loss):
    value, slope = LOSSES[loss]
    q = torch.logspace(-6, 1, 20, dtype=torch.float64, requires_grad=True)
    value(q, 1e-3, 2e-2).sum().backward()
    assert q.grad is not None
    assert torch.allclose(slope(q.detach(), 1e-3, 2e-2), q.grad)


@pytest.mark.parametrize("process", [pfode.EDM(), pfode.VP(), pfode.Flow()], ids=["EDM", "VP", "Flow"])
def test_a_fit_beats_its_start(process):
    """On noise that it has not seen; the start is what auto takes by hand."""
    denoiser = bed(process)
    plan = quick(denoiser, 5, iterations=10)
    hand, ours = errors(make_plan("auto", process, nfe=5), denoiser), errors(plan, denoiser)
    assert plan.nfe == 5
    assert ours[0] < 0.7 * hand[0], (ours, hand)
    assert ours[1] < 0.25 * hand[1], (ours, hand)


def test_parameterisations():
    """Each beats its start; times alone keep the recipe's coefficients, the minimal one starts from ipndm3."""
    denoiser = bed(pfode.EDM())
    hand = errors(make_plan("auto", denoiser.process, nfe=5), denoiser)
    timed = quick(denoiser, 5, time_only=True)
    light = quick(denoiser, 5, parameterisation="dyweight", grid="karras", iterations=10)
    assert errors(timed, denoiser)[1] < 0.5 * hand[1]
    start = timed.meta["fitted"]["start"]
    again = make_plan(start["sampler"], denoiser.process, grid=timed.times, chart=start["chart"])
    assert torch.allclose(Numbers.of(again).vector[5:], Numbers.of(timed).vector[5:], atol=1e-9)
    assert not torch.allclose(timed.t, timed.time[:-1])
    begin = errors(make_plan("ipndm3", denoiser.process, 5, grid="karras"), denoiser)
    assert errors(light, denoiser)[1] < 0.3 * begin[1]


def test_dyweight_wants_its_own_start():
    with pytest.raises(UsageError, match="not ipndm3"):
        DyWeight(make_plan("dpm++2m", pfode.EDM(), 4))
    with pytest.raises(UsageError, match="infinite"):
        DyWeight(make_plan("ipndm3", pfode.Flow(), 4))


def test_zeros_are_the_start():
    for family in (
        General(make_plan("unipc3", pfode.VP(), 6), None),
        General(make_plan("heun", pfode.Flow(), 3), lambda times: make_plan("heun", pfode.Flow(), grid=times)),
        DyWeight(make_plan("ipndm3", pfode.VP(), 6, grid="log-snr")),
    ):
        zeros = torch.zeros(family.size, dtype=torch.float64)
        assert torch.allclose(family.numbers(zeros).vector, Numbers.of(family.start).vector, atol=1e-9)
        assert differences(family.numbers, zeros).vector.abs().sum(1).all()


def test_the_seed_makes_the_plan(tmp_path):
    denoiser = bed(pfode.EDM())
    plan = quick(denoiser)
    assert quick(denoiser, cache=tmp_path) == plan
    assert quick(denoiser, seed=1) != plan
    plan.save(tmp_path / "four.safetensors")
    again = Plan.load(tmp_path / "four.safetensors")
    assert again == plan
    assert again.meta == json.loads(json.dumps(plan.meta))
    assert again.meta["fitted"]["model"] == denoiser.fingerprint
    assert again.meta["fitted"]["settings"]["seed"] == 0


class Stop(Exception):
    pass


@pytest.mark.parametrize("last", ["teacher", "fit"])
def test_an_interrupted_fit_continues(tmp_path, last):
    """To the same plan; what is in the cache is not computed again."""
    denoiser = bed(pfode.EDM())
    whole = quick(denoiser, loss="balanced", iterations=8)
    stages = []

    def stop(progress):
        if progress.stage == last and progress.done >= 3:
            raise Stop

    def watch(progress):
        stages.append((progress.stage, progress.done))

    with pytest.raises(Stop):
        quick(denoiser, loss="balanced", iterations=8, cache=tmp_path, callback=stop)
    assert quick(denoiser, loss="balanced", iterations=8, cache=tmp_path, callback=watch) == whole
    if last == "fit":
        assert stages[0] == ("fit", 3)
    stages.clear()
    assert quick(denoiser, loss="balanced", iterations=8, cache=tmp_path, callback=watch) == whole
    assert len(stages) == 1


@pytest.mark.parametrize("options", [{"n": 1, "active": 1, "loss": "l2"}, {"iterations": 1}, {"start": "exp-ab4"}])
def test_never_worse_than_the_start(options):
    denoiser = bed(pfode.EDM())
    plan = quick(denoiser, 5, **options)
    found = plan.meta["fitted"]["validation"]
    assert found["rms"] <= found["start rms"]
    assert found["median"] <= found["start median"]


def test_a_step_that_joins_two_times_is_not_taken():
    denoiser = bed(pfode.EDM())
    family = General(
        make_plan("ddim", denoiser.process, 3), lambda times: make_plan("ddim", denoiser.process, grid=times)
    )
    far = torch.zeros(family.size, dtype=torch.float64)
    far[0] = -1e4
    with pytest.raises(UsageError, match="must fall strictly"):
        family.numbers(far)
    plan = fit_plan(small.denoiser(), 2, n=32, active=32, check=16, teacher=6, iterations=1, start="ddim")
    found = plan.meta["fitted"]["validation"]
    assert found["rms"] <= found["start rms"]


def test_of_several_starts_the_best():
    denoiser = bed(pfode.EDM())
    starts = [make_plan(name, denoiser.process, 4, grid="karras") for name in ("ddim", "ipndm3", "dpm++2m")]
    plan = quick(denoiser, start=starts, iterations=1, loss="l2")
    best = min(starts, key=lambda start: errors(start, denoiser)[0])
    assert plan.meta["fitted"]["start"]["name"] == best.name
    auto = quick(denoiser, iterations=1).meta["fitted"]["validation"]
    for name in ("unipc2@flow", "ipndm3@trig"):
        one = quick(denoiser, start=name, grid=STARTS[name][0], iterations=1).meta["fitted"]["validation"]
        assert auto["start median"] < 1.2 * one["start median"]


def test_a_fitted_plan_is_a_start():
    denoiser = bed(pfode.EDM())
    first = quick(denoiser, iterations=3)
    second = quick(denoiser, start=first)
    assert second.meta["fitted"]["validation"]["start median"] == first.meta["fitted"]["validation"]["median"]
    assert errors(second, denoiser)[1] < errors(first, denoiser)[1]


def test_features():
    """Errors count in them: here the distance from the origin, where the plan is to end."""
    denoiser = bed(pfode.EDM())
    begin = make_plan("ddim", denoiser.process, 3, grid="karras")
    plan = quick(denoiser, 3, start=begin, features=lambda x: x.square().sum(1, keepdim=True))
    found = plan.meta["fitted"]["validation"]
    assert found["median"] < 0.5 * found["start median"]
    x = noises(denoiser, 64, 10**6)
    fine = run(make_plan("exp-ab3", denoiser.process, 150, grid="karras"), denoiser, x)
    new, old = ((run(p, denoiser, x).norm(dim=1) - fine.norm(dim=1)).abs().median() for p in (plan, begin))
    assert new < 0.5 * old


def test_labels_and_a_range_of_scales():
    """A group has one scale; the classes come in turn."""
    net = small.denoiser()
    options: dict[str, Any] = {"n": 32, "check": 16, "active": 32, "teacher": 6, "iterations": 1, "start": "ddim"}
    plain = fit_plan(net, 2, **options)
    guided = fit_plan(net, 2, guidance=(1.0, 3.0), label=["ant", 2], **options)
    assert plain != guided
    assert guided.meta["fitted"]["settings"]["guidance"] == (1.0, 3.0)
    assert guided.meta["fitted"]["model"] == net.fingerprint
    pfode.sample(net.guided(2.0), 3, plan=guided, label="bee")


def test_another_model_is_remarked():
    plan = quick(bed(pfode.EDM()), 3, iterations=1)
    x = noises(bed(pfode.EDM()), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(plan, bed(pfode.EDM()), x)
        run(plan, nameless(), x)
    with pytest.warns(OtherModelWarning, match="another model"):
        run(plan, GaussianMixture([[0.0, 1.0]], std=0.5, process=pfode.EDM()), x)


def nameless():
    class Bare:
        process = pfode.EDM()

        def __call__(self, x, t, **cond):
            return 0.5 * x

    return Bare()


def test_fingerprints():
    net = small.denoiser()
    same = [net.to(dtype=torch.float64), net.guided(2.0), small.denoiser()]
    assert {other.fingerprint for other in same} == {net.fingerprint}
    other = small.denoiser()
    with torch.no_grad():
        next(other.net.parameters()).add_(1.0)
    assert other.fingerprint != net.fingerprint
    assert small.denoiser(pfode.VP()).fingerprint != net.fingerprint
    assert pfode.scores.Denoiser(lambda x, t: x, pfode.EDM(), "x0").fingerprint is None


def test_auto_takes_a_fitted_plan():
    """Where it has just the calls asked for, and nothing else is settled."""
    net = small.denoiser()
    plan = replace(make_plan("dpm++2m", net.process, 4), name="mine")
    net.plans = {4: plan}
    assert pfode.sample(net, 1, nfe=4).plan is plan
    assert pfode.sample(net, 1, steps=4).plan is plan
    assert pfode.sample(net.to(dtype=torch.float64), 1, nfe=4).plan is plan
    options: dict[str, Any]
    for options in ({"nfe": 5}, {"nfe": 4, "fitted": False}, {"nfe": 4, "grid": "karras"}, {"steps": 4, "start": 10.0},
                    {"nfe": 4, "sampler": "auto", "chart": "flow"}, {"nfe": 4, "guidance": 2.0, "label": 0},
                    {"steps": 4, "final": "stop"}):  # fmt: skip
        assert pfode.sample(net, 1, init=torch.zeros(1, 8, 8), **options).plan.name != "mine"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"loss": "huber"}, "unknown loss"),
        ({"parameterisation": "bns"}, "unknown parameterisation"),
        ({"parameterisation": "dyweight", "time_only": True}, "another parameterisation"),
        ({"start": []}, "got none"),
        ({"start": "heun"}, "makes 3 calls, not 4"),
        ({"start": "euler-a"}, "draws noise"),
        ({"start": make_plan("ddim", pfode.VP(), 4)}, "was made for"),
        ({"start": make_plan("ddim", pfode.EDM(), 4), "grid": "karras"}, "its own grid"),
        ({"n": 0}, "n: need an integer"),
        ({"guidance": (3.0, 1.0)}, "is empty"),
        ({"features": lambda x: x, "cache": "x"}, "no fingerprint"),
    ],
)
def test_bad_input(options, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=problem):
        quick(bed(pfode.EDM()), **options)
    assert not list(tmp_path.iterdir())


def test_a_cache_needs_a_fingerprint(tmp_path):
    with pytest.raises(UsageError, match="no fingerprint"):
        fit_plan(nameless(), 3, shape=(2,), cache=tmp_path)


def test_a_teacher_that_fails_is_named():
    class Broken(GaussianMixture):
        def __call__(self, x, t, **cond):
            return super().__call__(x, t) * math.nan

    with pytest.raises(pfode.errors.NumericalError, match="fine solution"):
        quick(Broken([[0.0, 0.0]], std=0.5, process=pfode.EDM()))


def test_the_shipped_plans():
    """`avatars` has them, auto takes them, and they beat what auto takes by hand."""
    net = pfode.load("avatars")
    assert set(net.plans) == {3, 4, 5, 6, 8, 10}
    for nfe, plan in net.plans.items():
        found = plan.meta["fitted"]["validation"]
        assert plan.nfe == nfe
        assert found["rms"] < found["start rms"]
        assert found["median"] < found["start median"]
    options = {"n": 4, "label": [0, 1, 2, 3], "seed": 300}
    fine = pfode.sample(net, nfe=16, sampler="exp-ab3", grid="karras", **options).x
    ours, hand = (pfode.sample(net, nfe=4, fitted=fitted, **options) for fitted in (True, False))
    assert ours.plan.name == "fitted-4"
    assert problems.rms(ours.x, fine) < 0.9 * problems.rms(hand.x, fine)


class Rude:
    """A mixture that writes over its input and returns one buffer again and again."""

    def __init__(self, inner: GaussianMixture):
        self.inner, self.process, self.shape, self.buffers = inner, inner.process, inner.shape, {}

    def __call__(self, x: torch.Tensor, t: torch.Tensor, **cond: Any) -> torch.Tensor:
        x0 = self.inner(x, t)
        x.fill_(torch.nan)
        return self.buffers.setdefault(tuple(x.shape), torch.empty_like(x)).copy_(x0)


def test_a_denoiser_that_writes_over_its_input_and_output_is_fitted_alike():
    denoiser = bed(pfode.EDM())
    assert quick(Rude(denoiser), 3, iterations=2) == quick(denoiser, 3, iterations=2)  # type: ignore[arg-type]
