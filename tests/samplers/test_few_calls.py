"""Every recipe with 1 to 5 calls, from the exact ends, on the shipped networks in bf16, unguided and strongly guided.

The measure is the distance to the converged picture of the same noise (for recipes that add noise of their own, the
length of the picture). One call gives the denoiser's output at the first time, whatever the recipe: without guidance
fewer than five may not make it worse, five must make it better; with guidance 14 none may make it three times worse.
"""

import functools
import queue
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import pfode
from pfode import run
from pfode.denoiser import Denoiser, Preconditioned, Preconditioning, preconditioned
from pfode.plans.table import Plan
from pfode.samplers import CATALOGUE, make_plan

NETWORKS = {
    "digits": "ays-svd",
    "digits-vp": "time-quadratic",
    "digits-flow": "time",
}  # EDM, VP (eps), flow; their grids
SEEDS = range(4)
NFE = range(1, 6)
# Where sigma/alpha begins at 80 or 152, two or three steps to nothing span factors of a hundred, over which inner
# stages in s or log s extrapolate: of the noise there was at first a good part stays, or is magnified. Those of the
# first line are sound in the chart flow.
MENDED_BY_FLOW = {"heun", "edm", "dpm2", "rk4", "edict"}
LONG_STEPS = MENDED_BY_FLOW | {"dpm2-a", "dpm-2s", "dpm-3s", "pndm", "bdia"}


@functools.cache
def plans(name: str) -> tuple[list[tuple[str, int, bool, int]], list[Plan]]:
    """(recipe, calls, whether its steps are too long for it, number of the plan) of all, and the plans that differ."""
    process, cases, different = pfode.load(name).process, [], []
    for recipe in CATALOGUE:
        long = recipe in LONG_STEPS and name != "digits-flow"
        for chart in (None, "flow") if long and recipe in MENDED_BY_FLOW else (None,):
            for nfe in NFE:
                if nfe < make_plan(recipe, process, steps=1, chart=chart, grid=NETWORKS[name]).nfe:
                    continue
                plan = make_plan(recipe, process, nfe=nfe, chart=chart, grid=NETWORKS[name])
                assert plan.nfe <= nfe
                k = next((k for k, other in enumerate(different) if other.nfe == plan.nfe and other == plan), None)
                if k is None:
                    k = len(different)
                    different.append(plan)
                cases.append((recipe, nfe, long and chart is None, k))
    return cases, different


def drawn(denoiser: Denoiser, plan: Plan) -> Tensor:
    t, _, sigma = plan.first.tolist()
    assert t == denoiser.process.t_max
    x = sigma * pfode.noise.normal(SEEDS, pfode.noise.INITIAL, (1, 8, 8))
    with torch.no_grad():
        return run(plan, denoiser, x, SEEDS, label=torch.arange(len(SEEDS)))


class Shared(Preconditioned):
    """A network that waits until every thread has called it, then serves them all in one batch."""

    def __init__(self, inner: Preconditioned):
        self.inner, self.process, self.evals = inner, inner.process, 1
        self.asked: queue.SimpleQueue[tuple[Tensor, Tensor, Tensor, Future[Tensor]] | None] = queue.SimpleQueue()

    def precondition(self, t: Tensor) -> Preconditioning:
        return self.inner.precondition(t)

    def network(self, x: Tensor, c_noise: Tensor, **cond: Any) -> Tensor:
        answer: Future[Tensor] = Future()
        self.asked.put((x, c_noise.expand(len(x)), cond["label"], answer))
        return answer.result()

    def serve(self, callers: int) -> None:
        """Until all have said that they are done, by None."""
        while callers:
            waiting = [self.asked.get() for _ in range(callers)]
            calls = [call for call in waiting if call is not None]
            callers = len(calls)
            if calls:
                x, c_noise, label = (torch.cat(part) for part in list(zip(*calls, strict=True))[:3])
                try:
                    with torch.no_grad():
                        out = self.inner.network(x, c_noise, label=label)
                    for call, part in zip(calls, out.split(len(SEEDS)), strict=True):
                        call[3].set_result(part)
                except Exception as error:
                    for call in calls:
                        call[3].set_exception(error)


def all_drawn(denoiser: Denoiser, plans: list[Plan]) -> list[Tensor]:
    """What `drawn` gives for each, the calls of all in one batch."""
    shared = Shared(preconditioned(denoiser))

    def one(plan: Plan) -> Tensor:
        try:
            return drawn(shared, plan)
        finally:
            shared.asked.put(None)

    with ThreadPoolExecutor(len(plans)) as pool:
        pictures = [pool.submit(one, plan) for plan in plans]
        shared.serve(len(plans))
        return [picture.result() for picture in pictures]


def length(x: Tensor) -> float:
    return x.pow(2).mean().sqrt().item()


@pytest.mark.parametrize("guidance", [1.0, 14.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_few_calls(name, guidance):
    net = pfode.load(name)
    half = net.to(dtype=torch.bfloat16)
    if guidance != 1:
        net, half = net.guided(guidance), half.guided(guidance)
    process = net.process
    converged = drawn(net, make_plan("exp-ab2", process, 60, grid=NETWORKS[name]))
    once = drawn(net, make_plan("ddim", process, 1, grid=NETWORKS[name]))
    alone, longest = length(once - converged), max(length(once), length(converged))
    cases, different = plans(name)
    pictures = all_drawn(half, different)
    wrong = {}
    for recipe, nfe, long, k in cases:
        x = pictures[k]
        if long:
            error, bound = length(x), 8 * process.sigma(process.t_max) / process.alpha(process.t_max)
        elif CATALOGUE[recipe].stochastic and guidance == 1:
            error, bound = length(x), 1.1 * longest if nfe < 5 else 1.3 * length(converged)
        else:
            # a strong guidance bends the trajectories: at 14 the high orders go astray, but not out of bounds
            factor = 3.0 if guidance != 1 else 1.05 if nfe < 5 else 0.8
            error, bound = length(x - converged), factor * alone
        if not error <= bound:  # NaN neither
            wrong[recipe, nfe] = f"{error:.3g} > {bound:.3g}"
    assert not wrong
