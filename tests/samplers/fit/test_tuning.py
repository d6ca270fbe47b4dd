"""Tuned plans: what tuning reaches, that it repeats, resumes and is shared between processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pfode
from pfode.errors import FileError, UsageError
from pfode.samplers import fit_plan
from pfode.samplers.fit.tuning import Conditions
from pfode.scores.denoiser import Denoiser
from tests.scores import small

ROOT = Path(__file__).parents[3]
QUICK = {
    "n": 16, "active": 16, "check": 32, "teacher": 12, "iterations": 1, "start": "dpm++2m", "tune": True,
    "tune_steps": 24, "tune_batch": 16,
}  # fmt: skip


def net() -> Denoiser:
    return small.denoiser()


@pytest.fixture(scope="module")
def tuned() -> pfode.Plan:
    return fit_plan(net(), 3, **QUICK)


def test_it_is_better_on_noise_that_was_not_fitted_on(tuned):
    said = tuned.meta["fitted"]["validation"]
    assert said["rms"] < 0.9 * said["plain rms"]
    assert said["median"] < 0.9 * said["plain median"]
    denoiser = net()
    plain = fit_plan(denoiser, 3, **{**QUICK, "tune": False})
    x = 80 * torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    label = torch.arange(64) % 3
    fine = pfode.run(pfode.make_plan("exp-ab3", denoiser.process, 40, grid="karras"), denoiser, x, label=label)
    far = [(pfode.run(plan, denoiser, x, label=label) - fine).square().mean().sqrt() for plan in (plain, tuned)]
    assert far[1] < 0.95 * far[0]


def test_what_it_says_of_itself(tuned, tmp_path):
    assert (tuned.name, tuned.nfe, tuned.fitted_to) == ("tuned-3", 3, net().fingerprint)
    assert set(tuned.tune) == set(net().conditioning)
    assert tuned.meta["fitted"]["settings"]["tune_steps"] == 24
    assert pfode.Plan.load(tuned.save(tmp_path / "plan.safetensors")) == tuned


def test_the_same_call_gives_the_same_plan(tuned):
    assert fit_plan(net(), 3, **QUICK) == tuned


def test_one_call_in_memory_gives_the_same_plan(tuned):
    again = fit_plan(net(), 3, **QUICK, checkpoint=True)
    assert all(torch.allclose(again.tune[name], value, atol=2e-3) for name, value in tuned.tune.items())


def test_the_weights_stay_and_get_no_gradient():
    denoiser = net()
    denoiser.net.requires_grad_(True)
    before = denoiser.fingerprint
    fit_plan(denoiser, 3, **{**QUICK, "tune_steps": 2})
    assert denoiser.fingerprint == before
    assert all(parameter.grad is None for parameter in denoiser.net.parameters())


class Stop(Exception):
    """Raised by a callback."""


@pytest.mark.parametrize("when", [1, 24])
def test_stopped_and_started_again(tmp_path, monkeypatch, when):
    monkeypatch.setattr("pfode.samplers.fit.tuning.PIECE", 2)  # it serves 8 steps
    whole = fit_plan(net(), 3, **QUICK)
    told = []

    def stop(progress):
        told.append(progress.stage)
        if progress.stage == "tune" and progress.done >= when:
            raise Stop

    with pytest.raises(Stop):
        fit_plan(net(), 3, **QUICK, cache=tmp_path, callback=stop)
    rest = []
    again = fit_plan(net(), 3, **QUICK, cache=tmp_path, callback=rest.append)
    assert again == whole
    assert next(progress.done for progress in rest if progress.stage == "tune") >= 8
    assert {"teacher", "fit", "tune"} >= set(told) > {"fit"}


def test_damaged_caches(tmp_path):
    fit_plan(net(), 3, **QUICK, cache=tmp_path)
    (kept,) = tmp_path.glob("tune-*")
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.raises(FileError, match=kept.name):
        fit_plan(net(), 3, **QUICK, cache=tmp_path)


def test_zeros_are_the_plan_that_is_tuned():
    start = pfode.make_plan("dpm++2m", pfode.EDM(), nfe=4)
    free = Conditions(start, {"noise.2": 32})
    same = free.plan(torch.zeros(free.size, dtype=torch.float64))
    x = 80 * torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(pfode.run(same, net(), x), pfode.run(start, net(), x), atol=1e-5)
    assert torch.equal(same.t, start.t)


@pytest.mark.parametrize("process", [pfode.VP(), pfode.Flow(), pfode.VE(0.01, 20.0)], ids=["VP", "Flow", "VE"])
def test_other_processes(process):
    denoiser = small.denoiser(process, {"VP": "eps", "Flow": "flow", "VE": "ve"}[type(process).__name__])
    said = fit_plan(denoiser, 3, **{**QUICK, "tune_steps": 32, "start": "auto"}).meta["fitted"]["validation"]
    assert said["rms"] <= said["plain rms"]
    assert said["median"] <= said["plain median"]


def test_a_range_of_guidance():
    said = fit_plan(net(), 3, **QUICK, guidance=(1.0, 3.0), label="ant").meta["fitted"]["validation"]
    assert said["rms"] < said["plain rms"]


WRONG = [
    ({"tune": 1}, "tune: got 1"),
    ({"checkpoint": "yes"}, "checkpoint: got 'yes'"),
    ({"tune_steps": 0}, "tune_steps"),
    ({"tune_steps": 2.5}, "tune_steps"),
    ({"tune_batch": 0}, "tune_batch"),
    ({"tune_batch": "64"}, "tune_batch"),
    ({"features": lambda x: x}, "tune: errors are measured in the samples themselves"),
]


@pytest.mark.parametrize(("options", "what"), WRONG)
def test_wrong_calls(options, what):
    with pytest.raises(UsageError, match=what):
        fit_plan(net(), 3, **{**QUICK, **options})


def test_denoisers_that_cannot_be_tuned():
    exact = pfode.scores.Gaussian([0.0] * 4, 0.5, process=pfode.EDM())
    with pytest.raises(UsageError, match="nothing to tune"):
        fit_plan(exact, 3, **QUICK)
    with pytest.raises(UsageError, match="a torch module"):
        fit_plan(Denoiser(lambda x, t: x, pfode.EDM(), "edm", shape=(4,)), 3, **QUICK)
    without = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4))
    blind = Denoiser(Blind(without), pfode.EDM(), "edm", shape=(4,))
    with pytest.raises(UsageError, match="nothing to tune"):
        fit_plan(blind, 3, **QUICK)


class Blind(torch.nn.Module):
    """A network that does not look at the time."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, c_noise):
        return self.inner(x)


SHARED = """
import json, sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
from tests.samplers.fit.test_tuning import QUICK, net
from pfode.samplers import fit_plan
plan = fit_plan(net(), 3, **QUICK)
plan.save(out + str(rank) + ".safetensors")
dist.destroy_process_group()
"""


def test_two_processes_give_the_plan_of_one(tuned, tmp_path):
    script = SHARED.format(root=str(ROOT))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), str(tmp_path / "plan")], cwd=ROOT, env=environment,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    plans = [pfode.Plan.load(tmp_path / f"plan{rank}.safetensors") for rank in range(2)]
    assert plans[0] == plans[1]
    assert all(torch.allclose(plans[0].tune[name], value, atol=2e-3) for name, value in tuned.tune.items())
    assert torch.allclose(plans[0].t, tuned.t, rtol=1e-3)
