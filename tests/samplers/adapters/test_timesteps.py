"""Which row a pipeline means by a timestep: the tensor itself or any copy, in order, again, further on or back."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pfode
from pfode.errors import UsageError
from pfode.samplers import PFODEScheduler, make_plan
from tests.samplers.adapters.test_scheduler import KINDS, bed, network, planned, relative, unit

COPIES: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda t: t,
    "clone": lambda t: t.clone(),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "int64": lambda t: t.long(),
    "number": lambda t: t.item(),
    "whole number": lambda t: int(t),
    "list": lambda t: [t.item()],
    "array": lambda t: t.numpy().copy(),
    "numpy number": lambda t: np.float32(t.item()),
    "one dimension": lambda t: t.clone()[None],
    "of every sample": lambda t: t.repeat(4),
    "expanded": lambda t: t.expand(4),
    "by arithmetic": lambda t: float(np.float32(t.item() / 3) * np.float32(3)),
}
ORDERS: dict[str, Sequence[int]] = {  # of the steps: where they go on and where not
    "in order": range(8),
    "from the middle": [5, 6, 7],
    "skipping": [0, 1, 4, 5, 6, 7],
    "jumping back": [0, 1, 2, 3, 1, 2, 3, 4],
    "the same twice": [0, 1, 2, 2, 3],
    "beginning again": [0, 1, 2, 0, 1, 2, 3],
    "over and over": [*range(8), *range(8)],
}


def in_order(scheduler: PFODEScheduler, order: Sequence[int], copied: Callable[[Tensor], Any]) -> Tensor:
    """The state after these steps of a pipeline."""
    call, y = network(scheduler, bed(scheduler)), unit()
    for i in order:
        for t in scheduler.timesteps[i * scheduler.order : (i + 1) * scheduler.order]:
            y = scheduler.step(call(y, t), copied(t), y, return_dict=False)[0]
    return y


def expected(scheduler: PFODEScheduler, order: Sequence[int]) -> Tensor:
    """The same by pfode's own loop: each stretch is the beginning of a plan over the nodes that are left."""
    y, i, denoiser = unit(), 0, bed(scheduler)
    while i < len(order):
        n = next((j for j in range(1, len(order) - i) if order[i + j] != order[i] + j), len(order) - i)
        plan = make_plan(scheduler.config["sampler"], denoiser.process, grid=planned(scheduler).times[order[i] :])
        for point, _ in zip(pfode.iterate(plan, denoiser, y), range(n), strict=False):
            y = point.x
        i += n
    return y


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize(("kind", "name"), [("VP", "unipc3"), ("Flow", "dpm++2m")])
def test_copies_of_timesteps_are_what_they_are_copies_of(kind, name, copy, order):
    scheduler = PFODEScheduler(sampler=name, **KINDS[kind])
    scheduler.set_timesteps(8)
    got = in_order(scheduler, ORDERS[order], COPIES[copy])
    assert relative(got, expected(scheduler, ORDERS[order])) < 2e-6


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("copy", ["clone", "number", "bfloat16"])
@pytest.mark.parametrize("name", ["dpm++2s", "ddim", "o-belm"])
def test_with_inner_stages_and_without_memory_too(name, copy, order):
    scheduler = PFODEScheduler(sampler=name)
    scheduler.set_timesteps(8)
    if name == "o-belm" and order != "in order":  # what a restart of it means is its own affair: the same for all
        assert torch.equal(*(in_order(scheduler, ORDERS[order], COPIES[c]) for c in ("itself", copy)))
        return
    assert relative(in_order(scheduler, ORDERS[order], COPIES[copy]), expected(scheduler, ORDERS[order])) < 2e-6


def test_told_twice_in_one_step_is_the_next_call():
    """The calls of Heun's steps are told the same timestep: a copy means the call that is next."""
    scheduler, made = PFODEScheduler(sampler="heun", grid="karras"), []
    scheduler.set_timesteps(6)
    assert scheduler.timesteps[1] == scheduler.timesteps[2]
    for copied in (COPIES["itself"], COPIES["clone"]):
        call, y = network(scheduler, bed(scheduler)), unit()
        for t in scheduler.timesteps:
            y = scheduler.step(call(y, t), copied(t), y, return_dict=False)[0]
        made.append(y)
    assert torch.equal(*made)


@pytest.mark.parametrize("name", ["unipc3", "dpm++2m", "ddim", "dpm++2s"])
def test_a_first_timestep_between_two_others_begins_just_there(name):
    scheduler = PFODEScheduler(sampler=name)
    scheduler.set_timesteps(8)
    call, denoiser, x = network(scheduler, bed(scheduler)), bed(scheduler), unit()
    order, y = scheduler.order, x
    after = scheduler.timesteps[3 * order :: order]
    between = float(torch.lerp(after[0], after[1], 0.7))
    plan = make_plan(name, denoiser.process, grid=[between, *planned(scheduler).times[4:].tolist()])
    for i, t in enumerate(plan.t.tolist()):
        own = scheduler.timesteps[3 * order + i] if i else t
        y = scheduler.step(call(y, torch.tensor(t)), own, y).prev_sample
        assert scheduler.timesteps[3 * order : 3 * order + i + 1].tolist() == pytest.approx(plan.t[: i + 1].tolist())
    assert relative(y, pfode.run(plan, denoiser, x)) < 2e-6


def test_old_inner_stages_are_refused_where_a_run_began_between_two_steps():
    scheduler = PFODEScheduler(sampler="dpm++2s")
    scheduler.set_timesteps(8)
    before = scheduler.timesteps
    x = scheduler.step(unit(), 536.5, unit()).prev_sample
    with pytest.raises(UsageError, match="none of the scheduler's"):
        scheduler.step(unit(), before[7], x)


@pytest.mark.parametrize(
    ("timestep", "words"),
    [
        (torch.tensor([949.0, 949.0, 899.0, 899.0]), "samples at different timesteps"),
        ([949.0, 100.0], "samples at different timesteps"),
        (432.1, "432.1 is none of the scheduler's"),
        (torch.tensor(433), "433 is none of the scheduler's"),
        (math.nan, "finite number"),
        ("949", "need a number"),
        (None, "need a number"),
        (True, "need a number"),
        ([], "need a number"),
        (1j, "need a number"),
    ],
)
def test_what_is_no_timestep_of_the_run_is_refused(timestep, words):
    scheduler = PFODEScheduler(sampler="dpm++2m")
    scheduler.set_timesteps(20)
    x = scheduler.step(unit(), scheduler.timesteps[0], unit()).prev_sample
    with pytest.raises(UsageError, match=words):
        scheduler.step(unit(), timestep, x)


def test_nothing_of_a_vector_of_ones_own_timesteps_is_taken_for_the_first():
    scheduler = PFODEScheduler()
    scheduler.set_timesteps(8)
    with pytest.raises(UsageError, match="samples at different timesteps"):
        scheduler.step(unit(), scheduler.timesteps[2:6], unit())


@pytest.mark.parametrize("first", [-7.0, 1200.0])
def test_a_first_timestep_beyond_the_training_is_refused(first):
    scheduler = PFODEScheduler()
    scheduler.set_timesteps(8)
    with pytest.raises(UsageError, match="outside those that the network was trained for"):
        scheduler.step(unit(), first, unit())


def test_a_rounding_that_fits_several_timesteps_is_refused_where_it_matters():
    """bfloat16 has 8 bits: in order the next one is meant, out of order there is no telling."""
    scheduler = PFODEScheduler(sampler="dpm++2m")
    scheduler.set_timesteps(500)
    y = unit()
    for t in scheduler.timesteps[:5]:
        y = scheduler.step(0.1 * y, t.bfloat16(), y).prev_sample
    assert scheduler.step_index == 5
    with pytest.raises(UsageError, match="may be any of"):
        scheduler.step(y, scheduler.timesteps[50].bfloat16(), y)


def test_a_saved_plan_begins_at_its_own_timesteps_only(tmp_path):
    process = pfode.VPDiscrete(PFODEScheduler().alphas_cumprod.double())
    scheduler = PFODEScheduler(sampler=str(make_plan("ddim", process, 5).save(tmp_path / "five.safetensors")))
    scheduler.set_timesteps()
    with pytest.raises(UsageError, match="between its nodes"):
        scheduler.step(unit(), 700.3, unit())
    assert scheduler.step(unit(), scheduler.timesteps[2].clone(), unit()).prev_sample is not None
    assert scheduler.step_index == 3
