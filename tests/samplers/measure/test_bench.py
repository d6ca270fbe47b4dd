"""The bench: what it compares, that it goes on, refuses, chooses on other noise; peers driven on any process."""

import importlib
import json
import math
import sys
import warnings
from types import ModuleType

import pytest
import torch

import pfode
from pfode import grids
from pfode.errors import PfodeError, UsageError
from pfode.samplers import make_plan
from pfode.samplers.measure import bench, metrics, peers
from pfode.samplers.measure.bench import Bed, Folder, Measurer, Sampler
from pfode.scores.beds import bed
from tests import problems

SMALL = {"n": 24, "validation": 12}
NAMES = ["auto", "dpm++2m?grid=karras/cosine", "diffusers:UniPCMultistepScheduler?grid=ays-svd"]


def small(name: str = "mixture-4", **options) -> Bed:
    return Bed(name, bed(name), **{**SMALL, **options})


# ---- peers


def test_what_a_peer_imports_stays_and_stand_ins_go(tmp_path, monkeypatch):
    """k-diffusion first imported numpy.fft, was forgotten with it, and diffusers could not import that again."""
    (tmp_path / "peer_of_it.py").write_text("import stood_for, part_of_it")
    (tmp_path / "part_of_it.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    stand_in = ModuleType("stood_for")
    with peers._stand_ins({"stood_for": stand_in, "peer_of_it": None}):
        found = importlib.import_module("peer_of_it")
    assert found.stood_for is stand_in
    assert sys.modules.pop("part_of_it", None) is found.part_of_it
    assert not {"stood_for", "peer_of_it"} & set(sys.modules)


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize("process", problems.PROCESSES.values(), ids=problems.PROCESSES)
@pytest.mark.parametrize(
    ("peer", "options", "ours", "chart"),
    [
        ("diffusers:DPMSolverMultistepScheduler", {}, "dpm++2m", "dpm++"),
        ("diffusers:UniPCMultistepScheduler", {}, "unipc2", "dpm++"),
        ("diffusers:IPNDMScheduler", {}, "ipndm4", "ddim"),
        ("diffusers:FlowMatchEulerDiscreteScheduler", {}, "euler", "ddim"),
        ("k-diffusion:sample_dpmpp_2m", {}, "dpm++2m", "dpm++"),
        ("k-diffusion:sample_heun", {}, "heun", "ddim"),
        ("k-diffusion:sample_lms", {"order": 2}, "exp-ab2", "ddim"),
    ],
)
def test_a_peer_on_any_process_is_our_recipe(process, peer, options, ours, chart):
    """On the same times; where a flow begins with alpha = 0 ours from the first level that the peer can begin at."""
    denoiser = problems.mixture(process)
    x = process.sigma(process.t_max) * pfode.noise.normal(range(8), 0, (2,), torch.float64)
    high = min(process.t_max, process.time(-2 * math.log(peers.HIGHEST)))

    def lay(steps: int) -> list[float]:
        nodes = grids.times(process, "log-snr" if process.alpha(process.t_max) else "time", steps)
        return [high, *nodes[1:]]

    drawn, calls = peers.draw(peer, denoiser, x, range(8), 9, lay, **options)
    steps = (calls + 1) // 2 if "heun" in peer else calls
    plan = make_plan(ours, process, grid=lay(steps), chart=chart)
    assert plan.nfe == calls
    start = x * (process.sigma(high) / process.sigma(process.t_max))
    expected = pfode.run(plan, denoiser, start, seeds=range(8))
    assert (drawn - expected).abs().max() < 2e-4 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_a_schedulers_own_grid_spans_the_process():
    """Karras' sigmas by diffusers' own code, between the ends of the process: our grid of the same name."""
    denoiser = problems.mixture(pfode.EDM())
    x = 80 * pfode.noise.normal(range(8), 0, (2,), torch.float64)
    name = "diffusers:DPMSolverMultistepScheduler"
    drawn, calls = peers.draw(name, denoiser, x, range(8), 10, use_karras_sigmas=True)
    expected = pfode.run(make_plan("dpm++2m", denoiser.process, 10, grid="karras"), denoiser, x)
    assert calls == 10
    assert (drawn - expected).abs().max() < 5e-3 * expected.abs().max()  # it keeps its betas in float32


@pytest.mark.parametrize(
    ("peer", "options", "match"),
    [
        ("nobody:X", {}, "unknown package"),
        ("diffusers:DPMSolverMultistep", {}, "unknown scheduler.*"),
        ("diffusers:DPMSolverMultistepScheduler", {"ordr": 2}, "unknown option"),
        ("diffusers:DPMSolverMultistepScheduler", {"solver_order": 7, "algorithm_type": "x"}, "with 4 calls"),
        ("k-diffusion:sample_dpm_fast", {}, "unknown sampler"),
        ("k-diffusion:sample_heun", {"order": 3}, "with 4 calls"),
    ],
)
def test_peers_that_cannot(peer, options, match):
    denoiser = problems.mixture(pfode.EDM())
    with pytest.raises(UsageError, match=match):
        peers.draw(peer, denoiser, torch.zeros(2, 2), range(2), 4, **options)


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_ddim_scheduler_has_a_grid_of_its_own():
    denoiser = problems.mixture(pfode.VP())
    with pytest.raises(UsageError, match="no grid but its own"):
        peers.draw("diffusers:DDIMScheduler", denoiser, torch.zeros(2, 2), range(2), 4, lambda n: [1.0, 0.0])


# ---- texts


def test_texts():
    parsed = Sampler.parse("unipc2?chart=dpm++/flow&grid=best/time(7)&lower_order_final=true")
    (first, *_, last) = parsed.alternatives(pfode.EDM())
    assert len(parsed.alternatives(pfode.EDM())) == 2 * 6
    assert first == {"chart": "dpm++", "grid": "karras", "lower_order_final": True}
    assert last == {"chart": "flow", "grid": "time(7)", "lower_order_final": True}
    assert Sampler.parse("ddim").alternatives(pfode.VP()) == [{}]
    kinds = {
        "auto": "catalogue",
        "six.safetensors": "plan",
        "plans/": "plans",
        "fitted": "fitted",
        "diffusers:A?x=1": "peer",
    }
    assert {text: Sampler.parse(text).kind for text in kinds} == kinds


def test_a_folder_named_like_a_recipe_is_not_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("heun", "auto", "mine"):
        (tmp_path / name).mkdir()
    kinds = {"heun": "catalogue", "auto": "catalogue", "./heun": "plans", "mine": "plans"}
    assert {text: Sampler.parse(text).kind for text in kinds} == kinds


@pytest.mark.parametrize("text", ["no.safetensors", "none/", "empty"])
def test_plans_that_are_not_there_are_said_before_anything_is_measured(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PfodeError, match=r"cannot be read|no plan files"):
        bench.bench([(small(), ["ddim", text])], tmp_path / "out", [4])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["dpm++9m", "ddim?", "ddim?grid", "ddim?grid=", "ddim?a=1&a=2", "x.safetensors?grid=time"]
)
def test_texts_that_say_nothing(text):
    with pytest.raises(UsageError):
        Sampler.parse(text)


@pytest.mark.parametrize("process", problems.PROCESSES.values(), ids=problems.PROCESSES)
def test_every_grid_of_best_is_one(process):
    for (options,) in ([one] for one in Sampler.parse("ddim?grid=best").alternatives(process)):
        assert make_plan("ddim", process, nfe=4, **options).nfe == 4


# ---- what is measured


@pytest.mark.parametrize("process", problems.PROCESSES)
def test_the_teacher_is_the_solution_and_knows_its_error(process):
    denoiser = problems.mixture(problems.PROCESSES[process])
    subject = Bed("mixture", denoiser, n=6, validation=3)
    found, how = bench.teacher(subject)
    p = denoiser.process
    x = p.sigma(p.t_max) * pfode.noise.normal(subject.seeds(), 0, (2,), torch.float64)
    top = p.t_max if p.alpha(p.t_max) > 0 else p.time(-2 * math.log(1e5))
    exact = problems.solution(denoiser, x * (p.sigma(top) / p.sigma(p.t_max)), [top, 1e-7])[-1]
    assert (found - exact).pow(2).mean().sqrt() < 1.5 * how["error"] + 1e-6
    assert 0 < how["error"] < 1e-3


def test_the_teacher_of_a_gaussian_is_exact():
    subject = small("gaussian-4")
    found, how = bench.teacher(subject)
    fine = subject.run(make_plan("unipc3", subject.denoiser.process, 300, grid="karras", chart="flow"), subject.seeds())
    assert how["error"] == 0
    assert (found - fine).abs().max() < 1e-4


def test_a_cell_by_hand(tmp_path):
    subject = small()
    measurer = Measurer(subject, tmp_path)
    cell = measurer.cell(Sampler.parse("dpm++2m?grid=karras"), 5)
    plan = make_plan("dpm++2m", subject.denoiser.process, nfe=5, grid="karras")
    x = 80 * pfode.noise.normal(subject.seeds(), 0, (4,), torch.float64)
    drawn, truth = pfode.run(plan, subject.denoiser, x), subject.denoiser.sample(24, seed=bench.TRUTH)  # type: ignore[attr-defined]
    rms = (drawn - measurer.converged()[0]).pow(2).mean().sqrt().item()
    assert cell["rms"][0] == pytest.approx(rms, rel=1e-4)
    assert cell["energy"][0] == pytest.approx(metrics.energy_distance(drawn, truth).value, rel=1e-4)
    assert cell["log_prob"] == pytest.approx(subject.denoiser.log_prob(drawn).mean().item(), rel=1e-4)  # type: ignore[attr-defined]
    assert (cell["nfe"], cell["evals"]) == (5, 5)


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_the_best_is_chosen_on_other_noise():
    subject = small()
    assert not set(subject.seeds()) & set(subject.seeds(True))
    asked: list[set[int]] = []

    class Watched(Measurer):
        def ways(self, sampler, nfe):
            def watched(way):
                def draw(seeds):
                    asked.append({*seeds})
                    return way.draw(seeds)

                return bench.Way(way.words, draw)

            return [watched(way) for way in super().ways(sampler, nfe)]

    cell = Watched(subject).cell(Sampler.parse("diffusers:DPMSolverMultistepScheduler?solver_order=2/3&grid=best"), 6)
    assert len(cell["tried"]) == 10
    assert cell["chosen"] == min(cell["tried"], key=lambda words: cell["tried"][words])
    assert asked == 10 * [{*subject.seeds(True)}] + [{*subject.seeds()}]


def test_a_searched_grid_is_gits_own():
    subject = small()
    (way,) = Measurer(subject).ways(Sampler.parse("ipndm2?grid=gits"), 5)
    found, calls = way.draw(subject.seeds())
    jumps = pfode.samplers.measure_jumps(subject.denoiser, 12, seed=subject.seeds(True)[0], dtype=torch.float64)
    plan = make_plan("ipndm2", subject.denoiser.process, grid=jumps.grid(5))
    assert calls == 5
    assert torch.equal(found, subject.run(plan, subject.seeds()))


def test_plans_of_a_file_a_folder_and_a_denoiser(tmp_path):
    subject = small()
    plans = {k: make_plan("unipc2", pfode.EDM(), nfe=k, grid="karras") for k in (4, 6)}
    for k, plan in plans.items():
        plan.save(tmp_path / f"{k}.safetensors")
    make_plan("unipc2", pfode.VP(), nfe=4).save(tmp_path / "other.safetensors")
    measurer = Measurer(subject)
    expected = measurer.cell(Sampler.parse("unipc2?grid=karras"), 4)
    subject.denoiser.plans = plans  # type: ignore[attr-defined]
    for text in (f"{tmp_path}/4.safetensors", f"{tmp_path}", "fitted"):
        assert measurer.cell(Sampler.parse(text), 4)["rms"] == expected["rms"]
        assert "no plan of 5 calls" in measurer.cell(Sampler.parse(text), 5)["skipped"]


def test_evaluations_count_both_halves_of_guidance():
    subject = small("digits@2", n=4, validation=4, teacher=32)
    measurer = Measurer(subject)
    assert measurer.cell(Sampler.parse("ddim"), 6)["nfe"] == 3
    assert "no whole number" in measurer.cell(Sampler.parse("ddim"), 5)["skipped"]


def test_what_is_not_finite_is_no_figure():
    class Bad:
        process, shape = pfode.EDM(), (2,)

        def __call__(self, x, t, **cond):
            return torch.where(t < 1, torch.nan, 0.0) + 0 * x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cell = Measurer(Bed("bad", Bad(), n=4, teacher=0)).cell(Sampler.parse("ddim"), 4)
    assert "not finite" in cell["skipped"]


# ---- the folder


def run(out, names=tuple(NAMES), evals=(3, 5), stop: int | None = None, **options) -> dict:
    def progress(done: int, total: int, what: str) -> None:
        seen.append(what)
        if done == stop:
            raise KeyboardInterrupt

    seen: list[str] = []
    overwrite = options.pop("overwrite", False)
    result = bench.bench([(small(**options), names)], out, evals, overwrite=overwrite, progress=progress)
    return result | {"seen": [what for what in seen if what]}


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_interrupted_it_goes_on_to_the_same_bytes(tmp_path):
    whole = run(tmp_path / "whole")
    assert len(whole["cells"]) == 6
    assert not [cell for cell in whole["cells"] if "skipped" in cell]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop=3)
    with (tmp_path / "parts" / bench.LINES).open("ab") as file:
        file.write(b'{"bed": "mixture-4", "sampl')  # torn by a kill
        file.write(b"\n")
    again = run(tmp_path / "parts")
    assert len(again["seen"]) == 3
    assert (tmp_path / "parts" / bench.RESULTS).read_bytes() == (tmp_path / "whole" / bench.RESULTS).read_bytes()
    assert run(tmp_path / "parts")["seen"] == []
    (tmp_path / "parts" / bench.LINES).unlink()  # results.json alone, as it is committed
    assert len(run(tmp_path / "parts", evals=(3, 4, 5))["seen"]) == 3


def test_other_settings_are_refused(tmp_path):
    run(tmp_path, names=["ddim"])
    before = (tmp_path / bench.RESULTS).read_bytes()
    with pytest.raises(UsageError, match="n is 24 there, 23 here"):
        run(tmp_path, names=["ddim"], n=23)
    assert (tmp_path / bench.RESULTS).read_bytes() == before
    assert run(tmp_path, names=["ddim"], n=23, overwrite=True)["beds"]["mixture-4"]["n"] == 23
    (tmp_path / bench.RESULTS).write_text("[]")
    with pytest.raises(pfode.errors.FileError, match="not a benchmark"):
        run(tmp_path, names=["ddim"])


def test_the_results_say_everything(tmp_path):
    result = run(tmp_path, names=["ddim"])
    found = json.loads((tmp_path / bench.RESULTS).read_text())
    assert found["pfode"] == pfode.__version__
    assert {"torch", "numpy", "diffusers"} <= set(found["versions"])
    settings = found["beds"]["mixture-4"]
    assert (settings["n"], settings["seed"], settings["validation"]) == (24, bench.SEED, 12)
    assert settings["floor"]["teacher"]["error"] > 0
    assert settings["floor"]["truth"]["energy"][0] > 0
    assert found["cells"] == result["cells"]
    assert (tmp_path / bench.CACHE / ".gitignore").read_text() == "*\n"
    assert Folder(tmp_path, [small()]).cells.keys() == {("mixture-4", "ddim", 3), ("mixture-4", "ddim", 5)}


# ---- what it says


def test_ranking():
    errors = {("a", "x"): 1.0, ("a", "y"): 2.0, ("b", "x"): 9.0, ("b", "y"): 1.0, ("a", "z"): 0.5}
    cells = [{"bed": b, "sampler": s, "evals": 4, "rms": [e, e, e]} for (b, s), e in errors.items()]
    (ranking,) = bench.rank({"cells": [*cells, {"bed": "b", "sampler": "z", "evals": 4, "skipped": "no"}]})
    assert ranking.evals == 4
    assert [name for name, _ in ranking.order] == ["y", "x"]  # z has no figure on b
    assert ranking.order[0][1] == pytest.approx((4 * 1) ** 0.5)
    assert ranking.order[1][1] == pytest.approx((2 * 9) ** 0.5)
