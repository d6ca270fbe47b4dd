"""Guided denoisers under solvers, on two classes whose denoisers are known: limits, CFG++, and forwards counted."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import pfode
from pfode import iterate, make_plan, run
from pfode.errors import UsageError
from pfode.process import Process
from pfode.scores import wrapping
from pfode.scores.denoiser import Denoiser
from pfode.scores.exact import GaussianMixture
from pfode.scores.guidance import cfg_plus_plus
from pfode.scores.guidance import guide as typed_guide
from tests import problems

MEANS = [[-0.9, -0.4, 0.1], [-0.6, 0.8, 0.5], [0.7, 0.2, -0.3], [0.3, -1.0, 0.4]]
DEVIATIONS = torch.tensor([0.5, 0.5, 0.4, 0.4])
CLASSES = slice(0, 2), slice(2, 4), slice(0, 4)  # components of left, right, and no class


def guide(*args: Any, **options: Any) -> Any:
    return typed_guide(*args, **options)


class Labelled:
    """A mixture of two classes, each a mixture."""

    labels = ("left", "right")

    def __init__(self, process: Process):
        self.process, self.shape = process, (3,)
        self.parts = [GaussianMixture(MEANS[part], DEVIATIONS[part], process=process) for part in CLASSES]
        self.sizes: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | int | None = None) -> Tensor:
        self.sizes.append(len(x))
        index = torch.as_tensor(2 if label is None else label).expand(len(x))
        return torch.stack([part(x, t) for part in self.parts])[index, torch.arange(len(x))]


def as_network(exact: Labelled) -> Denoiser:
    """The same as a network: it predicts v, from an input of unit variance."""
    process = exact.process

    def network(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        alpha, sigma = (level(t)[:, None] for level in (process.alpha, process.sigma))
        r = torch.hypot(alpha, sigma)
        x = x if isinstance(process, pfode.VP) else r * x
        x0 = exact(x, t, label)
        return (alpha * (x - alpha * x0) / sigma - sigma * x0) / r

    return Denoiser(network, process, "v", shape=exact.shape, labels=exact.labels)


class Field:
    """The denoiser that guidance should come to, from those of left, right and no class."""

    def __init__(self, process: Process, rule: Callable[[Tensor, Tensor, Tensor], Tensor]):
        self.process, self.rule, self.exact = process, rule, Labelled(process)

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.rule(*(part(x, t) for part in self.exact.parts))


def apg(d: Tensor, other: Tensor, away: Tensor) -> Tensor:
    """Sadat et al. 2025, algorithm 1, at w = 3, eta = 0.25, r = 0.4."""
    update = d - away
    update = update * (0.4 / update.norm(dim=1, keepdim=True)).clamp_max(1)
    along = d / d.norm(dim=1, keepdim=True)
    parallel = (update * along).sum(1, keepdim=True) * along
    return d + 2.0 * (update - parallel + 0.25 * parallel)


def spread(d: Tensor, other: Tensor, away: Tensor) -> Tensor:
    """Lin et al. 2024, algorithm 2, at w = 3, phi = 0.7."""
    guided = 3 * d - 2 * away
    return 0.7 * guided * d.std(1, keepdim=True) / guided.std(1, keepdim=True) + 0.3 * guided


Rule = Callable[[Tensor, Tensor, Tensor], Tensor]
RULES: dict[str, tuple[Callable[[Any], Any], Rule]] = {
    "cfg": (lambda den: guide(as_network(den), 3.0, label=0), lambda d, other, away: 3 * d - 2 * away),
    "bare": (lambda den: guide(den, 3.0, label=0), lambda d, other, away: 3 * d - 2 * away),
    "negative": (
        lambda den: guide(as_network(den), 1.5, label="left", negative="right"),
        lambda d, other, away: 1.5 * d - 0.5 * other,
    ),
    "autoguidance": (
        lambda den: guide(guide(as_network(den), 1.0, label=0), 3.0, weak=guide(den, 1.0, label=1)),
        lambda d, other, away: 3 * d - 2 * other,
    ),
    "rescaled": (lambda den: guide(den, 3.0, label=0, rescale=0.7), spread),
    "projected": (lambda den: guide(as_network(den), 3.0, label=0, eta=0.25, norm=0.4), apg),
    "clipped": (
        lambda den: wrapping.clip(guide(as_network(den), 3.0, label=0), -0.8, 0.5),
        lambda d, other, away: (3 * d - 2 * away).clamp(-0.8, 0.5),
    ),
    "thresholded": (
        lambda den: wrapping.threshold(guide(as_network(den), 3.0, label=0), 0.9, 0.7),
        lambda d, other, away: wrapping.thresholded(3 * d - 2 * away, 0.9, 0.7),
    ),
}


@pytest.mark.parametrize(
    ("rule", "process"), [*((rule, "VP") for rule in RULES), ("cfg", "EDM"), ("projected", "EDM"), ("cfg", "Flow")]
)
def test_every_rule_is_an_ode_that_solvers_converge_to(rule, process):
    """heun on the guided network against DOP853 on the formula."""
    wrap, formula = RULES[rule]
    exact = Labelled(problems.PROCESSES[process])
    guided = wrap(exact)
    times = problems.interior_grid(exact.process, 64)
    x = problems.start(exact.parts[2], times[0], 4)
    _, truth = problems.solution(Field(exact.process, formula), x, [times[0], times[-1]])
    errors = [problems.rms(run(make_plan("heun", exact.process, grid=times[::k]), guided, x), truth) for k in (4, 1)]
    assert errors[1] < 1e-3
    assert errors[0] > 11 * errors[1]  # order 2: 16


def test_an_interval_is_an_ode_in_pieces():
    exact = Labelled(pfode.VP())
    process = exact.process
    times = problems.interior_grid(process, 256)
    ends = [times[0], process.time(-2 * torch.log(torch.tensor(1.3)).item()), process.time(0.0), times[-1]]
    x = problems.start(exact.parts[2], times[0])
    truth = x
    for (first, last), w in zip(itertools.pairwise(ends), (1.0, 4.0, 1.0), strict=True):
        field = Field(process, lambda d, other, away, w=w: w * d + (1 - w) * away)
        _, truth = problems.solution(field, truth, [first, last])
    guided = guide(as_network(exact), 4.0, label=0, interval=(1.0, 1.3))
    errors = [problems.rms(run(make_plan("heun", process, grid=times[::k]), guided, x), truth) for k in (16, 4, 1)]
    assert errors[2] < 1e-2
    assert errors[0] > 8 * errors[2]


WRAPS: dict[str, tuple[Callable[[Any, Any], Any], int]] = {  # and the forwards of one call beside the guided ones
    "alone": (lambda guided, den: guided, 0),
    "clipped": (lambda guided, den: wrapping.clip(guided), 0),
    "autoguided": (lambda guided, den: guide(guided, 2.0, weak=den), 1),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_forwards_are_counted_where_they_are_made(wrap):
    exact = Labelled(pfode.EDM())
    wrapped, beside = WRAPS[wrap]
    guided = wrapped(guide(exact, 3.0, label=0, interval=(0.3, 20.0)), exact)
    out = pfode.sample(guided, n=4, steps=12)
    assert isinstance(out.plan, pfode.Plan)
    inside = int(((out.plan.t > 0.3) & (out.plan.t <= 20.0)).sum())
    assert 0 < inside < out.nfe
    assert out.evals == (1 + beside) * out.nfe + inside
    assert sum(exact.sizes) == 4 * out.evals
    several = pfode.sample(guided, n=4, steps=12, batch=3, trajectory=True)
    assert several.evals == out.evals
    torch.testing.assert_close(several.x, out.x)


PROCESSES = {**problems.PROCESSES, "VPDiscrete to alpha = 0": problems.zero_terminal_snr()}


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_cfg_plus_plus_is_its_own_algorithm(name, process):
    """Chung et al. 2025, algorithm 2: the clean estimate is guided, the noise put back is the unconditional one."""
    exact, lam, seeds = Labelled(PROCESSES[process]), 0.6, [5, 6, 7]
    plan = make_plan(name, exact.process, 8)
    x = y = float(plan.sigma[0]) * pfode.noise.normal(seeds, 0, (3,), torch.float64)
    for k in range(plan.nfe):
        d, away = (exact(y, plan.t[k], label) for label in (0, 2))
        (alpha, sigma), (alpha_next, sigma_next) = ((plan.alpha[i], plan.sigma[i]) for i in (k, k + 1))
        c = plan.c[k, 0] if plan.stochastic else torch.tensor(0.0, dtype=torch.float64)
        fresh = pfode.noise.normal(seeds, k + 1, (3,), torch.float64)
        noise = (y - alpha * away) / sigma
        y = alpha_next * torch.lerp(away, d, lam) + (sigma_next**2 - c**2).clamp_min(0).sqrt() * noise + c * fresh
    for den in (exact, as_network(exact)):
        guided = guide(den, cfg_plus_plus(lam, plan), label=0)
        torch.testing.assert_close(run(plan, guided, x, seeds), y, rtol=1e-12, atol=1e-12)


def test_cfg_plus_plus_weighs_by_the_step():
    plan = make_plan("ddim", pfode.EDM(), 6)
    weights = torch.stack([cfg_plus_plus(0.5, plan)(t) for t in plan.t])
    torch.testing.assert_close(weights, 0.5 / (1 - plan.sigma[1:] / plan.sigma[:-1]))
    assert torch.equal(cfg_plus_plus(0.5, plan)(plan.t), weights)


def test_cfg_plus_plus_belongs_to_a_plan_of_first_order():
    process = pfode.EDM()
    first = make_plan("ddim", process, 6)
    node, step = first.node.clone(), first.step.clone()
    node[3], step[3:] = False, step[3:] - 1
    for plan in (make_plan("dpm++2m", process, 6), make_plan("heun", process, 6), replace(first, node=node, step=step)):
        with pytest.raises(UsageError, match="first-order plan towards the data"):
            cfg_plus_plus(0.5, plan)
    with pytest.raises(UsageError, match="towards the data"):
        cfg_plus_plus(0.5, make_plan("ddim", process, grid=[0.1, 1.0, 10.0]))
    with pytest.raises(UsageError, match="lam"):
        cfg_plus_plus(-0.5, first)
    guided = guide(Labelled(process), cfg_plus_plus(0.5, first), label=0)
    with pytest.raises(UsageError, match="belongs to a plan without the time"):
        run(make_plan("ddim", process, 7), guided, torch.zeros(1, 3))


def test_bounds_act_before_the_history():
    exact = Labelled(pfode.EDM())
    bounded = wrapping.clip(guide(exact, 8.0, label=0), -1.0, 1.0)
    plan = make_plan("dpm++2m", exact.process, 8)
    x = 80.0 * pfode.noise.normal(range(4), 0, (3,), torch.float64)
    points = list(iterate(plan, bounded, x))
    assert all(point.x0.abs().max() <= 1 for point in points)
    states = [x, *(point.x for point in points)]
    by_hand = [guide(exact, 8.0)(y, t, label=0).clamp(-1, 1) for y, t in zip(states, plan.t, strict=False)]
    for point, x0 in zip(points, by_hand, strict=True):
        torch.testing.assert_close(point.x0, x0)
