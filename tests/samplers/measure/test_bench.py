"""The bench: what it compares, that it goes on, refuses, chooses on other noise."""

import json
import math
import warnings

import pytest
import torch

import pfode
from pfode import defaults
from pfode.errors import PfodeError, UsageError
from pfode.samplers import make_plan
from pfode.samplers.measure import bench, metrics, problem, results
from pfode.samplers.measure.measurement import Measurer, Variant
from pfode.samplers.measure.problem import Problem, reference_solution
from pfode.samplers.measure.results import Cache, Folder
from pfode.samplers.measure.spec import Spec
from pfode.scores.beds import bed
from tests import problems

SMALL = {"n": 24, "validation": 12}
NAMES = ["auto", "dpm++2m?grid=karras/cosine", "diffusers:UniPCMultistepScheduler?grid=ays-svd"]


def small(name: str = "mixture-4", **options) -> Problem:
    return Problem(name, bed(name), **{**SMALL, **options})


# ---- texts


def test_texts():
    parsed = Spec.parse("unipc2?chart=dpm++/flow&grid=best/time(7)&lower_order_final=true")
    (first, *_, last) = parsed.alternatives(pfode.EDM())
    assert len(parsed.alternatives(pfode.EDM())) == 2 * 6
    assert first == {"chart": "dpm++", "grid": "karras", "lower_order_final": True}
    assert last == {"chart": "flow", "grid": "time(7)", "lower_order_final": True}
    assert Spec.parse("ddim").alternatives(pfode.VP()) == [{}]
    kinds = {
        "auto": "catalogue",
        "six.safetensors": "plan",
        "plans/": "plans",
        "fitted": "fitted",
        "diffusers:A?x=1": "peer",
    }
    assert {text: Spec.parse(text).kind for text in kinds} == kinds


def test_a_folder_named_like_a_recipe_is_not_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("heun", "auto", "mine"):
        (tmp_path / name).mkdir()
    kinds = {"heun": "catalogue", "auto": "catalogue", "./heun": "plans", "mine": "plans"}
    assert {text: Spec.parse(text).kind for text in kinds} == kinds


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
        Spec.parse(text)


@pytest.mark.parametrize("process", problems.PROCESSES.values(), ids=problems.PROCESSES)
def test_every_grid_of_best_is_one(process):
    for (options,) in ([one] for one in Spec.parse("ddim?grid=best").alternatives(process)):
        assert make_plan("ddim", process, nfe=4, **options).nfe == 4


# ---- what is measured


@pytest.mark.parametrize("process", problems.PROCESSES)
def test_the_teacher_is_the_solution_and_knows_its_error(process):
    denoiser = problems.mixture(problems.PROCESSES[process])
    subject = Problem("mixture", denoiser, n=6, validation=3)
    found, how = reference_solution(subject)
    p = denoiser.process
    x = p.sigma(p.t_max) * pfode.noise.normal(subject.seeds(), 0, (2,), torch.float64)
    top = p.t_max if p.alpha(p.t_max) > 0 else p.time(-2 * math.log(1e5))
    exact = problems.solution(denoiser, x * (p.sigma(top) / p.sigma(p.t_max)), [top, 1e-7])[-1]
    assert (found - exact).pow(2).mean().sqrt() < 1.5 * how["error"] + 1e-6
    assert 0 < how["error"] < 1e-3


def test_the_teacher_of_a_gaussian_is_exact():
    subject = small("gaussian-4")
    found, how = reference_solution(subject)
    fine = subject.run(make_plan("unipc3", subject.denoiser.process, 300, grid="karras", chart="flow"), subject.seeds())
    assert how["error"] == 0
    assert (found - fine).abs().max() < 1e-4


def test_a_cell_by_hand(tmp_path):
    subject = small()
    measurer = Measurer(subject, Cache(tmp_path))
    cell = measurer.cell(Spec.parse("dpm++2m?grid=karras"), 5)
    plan = make_plan("dpm++2m", subject.denoiser.process, nfe=5, grid="karras")
    x = 80 * pfode.noise.normal(subject.seeds(), 0, (4,), torch.float64)
    drawn, truth = pfode.run(plan, subject.denoiser, x), subject.denoiser.sample(24, seed=problem.TRUTH)  # type: ignore[attr-defined]
    rms = (drawn - measurer.reference()[0]).pow(2).mean().sqrt().item()
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
        def variants(self, spec, nfe):
            def watched(variant):
                def draw(seeds):
                    asked.append({*seeds})
                    return variant.draw(seeds)

                return Variant(variant.words, draw)

            return [watched(variant) for variant in super().variants(spec, nfe)]

    cell = Watched(subject).cell(Spec.parse("diffusers:DPMSolverMultistepScheduler?solver_order=2/3&grid=best"), 6)
    assert len(cell["tried"]) == 10
    assert cell["chosen"] == min(cell["tried"], key=lambda words: cell["tried"][words])
    assert asked == 10 * [{*subject.seeds(True)}] + [{*subject.seeds()}]


def test_a_searched_grid_is_gits_own():
    subject = small()
    (variant,) = Measurer(subject).variants(Spec.parse("ipndm2?grid=gits"), 5)
    found, calls = variant.draw(subject.seeds())
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
    expected = measurer.cell(Spec.parse("unipc2?grid=karras"), 4)
    subject.denoiser.plans = plans  # type: ignore[attr-defined]
    for text in (f"{tmp_path}/4.safetensors", f"{tmp_path}", "fitted"):
        assert measurer.cell(Spec.parse(text), 4)["rms"] == expected["rms"]
        assert "no plan of 5 calls" in measurer.cell(Spec.parse(text), 5)["skipped"]


def test_evaluations_count_both_halves_of_guidance():
    subject = small("digits@2", n=4, validation=4, teacher=32)
    measurer = Measurer(subject)
    assert measurer.cell(Spec.parse("ddim"), 6)["nfe"] == 3
    assert "no whole number" in measurer.cell(Spec.parse("ddim"), 5)["skipped"]


def test_what_is_not_finite_is_no_figure():
    class Bad:
        process, shape = pfode.EDM(), (2,)

        def __call__(self, x, t, **cond):
            return torch.where(t < 1, torch.nan, 0.0) + 0 * x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cell = Measurer(Problem("bad", Bad(), n=4, teacher=0)).cell(Spec.parse("ddim"), 4)
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
    with (tmp_path / "parts" / results.LINES).open("ab") as file:
        file.write(b'{"bed": "mixture-4", "sampl')  # torn by a kill
        file.write(b"\n")
    again = run(tmp_path / "parts")
    assert len(again["seen"]) == 3
    assert (tmp_path / "parts" / results.RESULTS).read_bytes() == (tmp_path / "whole" / results.RESULTS).read_bytes()
    assert run(tmp_path / "parts")["seen"] == []
    (tmp_path / "parts" / results.LINES).unlink()  # results.json alone, as it is committed
    assert len(run(tmp_path / "parts", evals=(3, 4, 5))["seen"]) == 3


def test_other_settings_are_refused(tmp_path):
    run(tmp_path, names=["ddim"])
    before = (tmp_path / results.RESULTS).read_bytes()
    with pytest.raises(UsageError, match="n is 24 there, 23 here"):
        run(tmp_path, names=["ddim"], n=23)
    assert (tmp_path / results.RESULTS).read_bytes() == before
    assert run(tmp_path, names=["ddim"], n=23, overwrite=True)["beds"]["mixture-4"]["n"] == 23
    (tmp_path / results.RESULTS).write_text("[]")
    with pytest.raises(pfode.errors.FileError, match="not a benchmark"):
        run(tmp_path, names=["ddim"])


def test_the_results_say_everything(tmp_path):
    result = run(tmp_path, names=["ddim"])
    found = json.loads((tmp_path / results.RESULTS).read_text())
    assert found["pfode"] == pfode.__version__
    assert {"torch", "numpy", "diffusers"} <= set(found["versions"])
    settings = found["beds"]["mixture-4"]
    assert (settings["n"], settings["seed"], settings["validation"]) == (24, defaults.Bench.SEED, 12)
    assert settings["floor"]["teacher"]["error"] > 0
    assert settings["floor"]["truth"]["energy"][0] > 0
    assert found["cells"] == result["cells"]
    assert (tmp_path / results.CACHE / ".gitignore").read_text() == "*\n"
    assert Folder(tmp_path, [small()]).cells.keys() == {("mixture-4", "ddim", 3), ("mixture-4", "ddim", 5)}


# ---- what it says


def test_ranking():
    errors = {("a", "x"): 1.0, ("a", "y"): 2.0, ("b", "x"): 9.0, ("b", "y"): 1.0, ("a", "z"): 0.5}
    cells = [{"bed": b, "sampler": s, "evals": 4, "rms": [e, e, e]} for (b, s), e in errors.items()]
    (ranking,) = results.rank({"cells": [*cells, {"bed": "b", "sampler": "z", "evals": 4, "skipped": "no"}]})
    assert ranking.evals == 4
    assert [name for name, _ in ranking.order] == ["y", "x"]  # z has no figure on b
    assert ranking.order[0][1] == pytest.approx((4 * 1) ** 0.5)
    assert ranking.order[1][1] == pytest.approx((2 * 9) ** 0.5)
