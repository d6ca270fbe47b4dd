"""What a run survives and what it reports: NaN anywhere, no memory, batches one by one."""

import math
from typing import Any

import pytest
import torch

import pfode
from pfode.errors import MemoryLimitError, NumericalError
from pfode.plans.executor import Failure
from pfode.samplers.request import Beginning, Keep, Place
from pfode.samplers.sampling import batches
from tests import problems

MIX = problems.mixture(pfode.EDM())
SAMPLES, STEPS = 8, 10


class Sick:
    """The exact denoiser, but its evaluation number `row` of every `period` has `value` at a sample."""

    process, shape = MIX.process, MIX.shape

    def __init__(self, sample: int, row: int, period: int | float, value: float = math.nan):
        self.sample, self.row, self.period, self.value = sample, row, period, value
        self.calls = 0

    def __call__(self, x: torch.Tensor, t: torch.Tensor, **cond: Any) -> torch.Tensor:
        out = MIX(x, t)
        if self.calls % self.period == self.row:
            out[self.sample, 1] = self.value
        self.calls += 1
        return out


@pytest.mark.parametrize("name", ["dpm++2m", "heun", "ipndm4", "euler-a"])
def test_nan_is_reported_wherever_it_comes(name):
    """Every sample and every evaluation of every step: named where raised, alone where flagged."""
    plan = pfode.make_plan(name, MIX.process, STEPS)
    clean = pfode.sample(MIX, SAMPLES, plan=plan).x
    assert set(plan.step.tolist()) == set(range(STEPS))
    for sample in range(SAMPLES):
        others = [i for i in range(SAMPLES) if i != sample]
        for row in range(plan.nfe):
            step, t = int(plan.step[row]) + 1, float(plan.t[row])
            value = (math.nan, math.inf)[(sample + row) % 2]
            with pytest.raises(NumericalError) as raised:
                pfode.sample(Sick(sample, row, plan.nfe, value), SAMPLES, plan=plan)
            named = f"sample {sample} is not finite after step {step} of {STEPS}, t = {t:.6g}"
            assert raised.value.message == named
            out = pfode.sample(Sick(sample, row, plan.nfe, value), SAMPLES, plan=plan, nan="flag")
            assert out.bad == [Failure(sample, step, t)]
            assert not torch.isfinite(out.x[sample]).all()
            assert torch.equal(out.x[others], clean[others])


def test_a_failure_that_does_not_come_again():
    """A replay is sound: the end is named, or the node where a callback or a trajectory saw it."""
    plan = pfode.make_plan("dpm++2m", MIX.process, STEPS)
    options: dict[str, Any] = {"n": SAMPLES, "plan": plan, "nan": "flag"}
    assert pfode.sample(Sick(3, 4, math.inf), **options).bad == [Failure(3, STEPS, float(plan.t[-1]))]
    seen = [Failure(3, 5, float(plan.t[4]))]
    assert pfode.sample(Sick(3, 4, math.inf), **options, trajectory=True).bad == seen
    assert pfode.sample(Sick(3, 4, math.inf), **options, callback=lambda point: None).bad == seen


def test_a_callback_that_spoils_or_heals():
    plan = pfode.make_plan("heun", MIX.process, 4)
    spoil = pfode.sample(
        MIX,
        2,
        plan=plan,
        nan="flag",
        callback=lambda p: p.x * torch.tensor([[1.0], [math.nan if p.step == 2 else 1.0]]),
    )
    assert [(bad.index, bad.step) for bad in spoil.bad] == [(1, 2)]
    heal = pfode.sample(Sick(1, 2, math.inf), 2, plan=plan, callback=lambda p: p.x.nan_to_num(0.0))
    assert torch.isfinite(heal.x).all()
    assert heal.bad == []


def test_indices_count_through_all_batches():
    out = pfode.sample(Sick(1, 0, STEPS), 8, STEPS, sampler="ddim", batch=3, nan="flag")
    assert [(bad.index, bad.step) for bad in out.bad] == [(1, 1), (4, 1), (7, 1)]
    with pytest.raises(NumericalError, match="sample 4 is not finite after step 1 of 10"):
        pfode.sample(Sick(1, STEPS, math.inf), 8, STEPS, sampler="ddim", batch=3, trajectory=True)


class Small:
    """Runs out of memory above so many samples."""

    process, shape = MIX.process, MIX.shape

    def __init__(self, most: int, error: BaseException):
        self.most, self.error, self.sizes = most, error, []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, **cond: Any) -> torch.Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise self.error
        return MIX(x, t)


ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried ..."),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{error}"[:30])
@pytest.mark.parametrize("name", ["dpm++2m", "euler-a"])
def test_the_batch_halves_where_memory_ends(error, name):
    small = Small(3, error)
    out = pfode.sample(small, 21, 5, name, batch=16)
    assert small.sizes[:3] == [16, 8, 4]
    assert set(small.sizes[3:]) == {2, 1}
    assert out.stats["batch"] == 2
    assert out.seeds == list(range(21))
    assert torch.equal(out.x, pfode.sample(MIX, 21, 5, name).x)
    with pytest.raises(MemoryLimitError, match=r"out of memory at a single sample of shape \(2,\)"):
        pfode.sample(Small(0, error), 5)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="broken"):
        pfode.sample(Small(0, RuntimeError("broken")), 5)


@pytest.mark.parametrize("name", ["dpm++2m", "ddpm"])
def test_batches_are_parts_of_the_whole(name):
    plan = pfode.make_plan(name, MIX.process, 6)
    parts = batches(MIX, plan, list(range(7, 17)), Beginning(), Place(4), Keep())
    first = next(parts)
    assert torch.is_grad_enabled()
    found = [first, *parts]
    assert [part.seeds for part in found] == [[7, 8, 9, 10], [11, 12, 13, 14], [15, 16]]
    assert torch.equal(torch.cat([part.x for part in found]), pfode.sample(MIX, 10, plan=plan, seed=7, batch=4).x)
