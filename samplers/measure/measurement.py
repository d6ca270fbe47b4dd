"""Measuring a sampler on a problem at a number of network evaluations: one cell of a benchmark's table."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode import grids
from pfode.denoiser import conditions, fingerprint
from pfode.errors import DenoiserError, NumericalError, UsageError
from pfode.plans.table import Plan
from pfode.samplers.catalogue import make_plan
from pfode.samplers.fit.search import Jumps, measure_jumps
from pfode.samplers.measure import metrics, peers
from pfode.samplers.measure.comparison import compared, features_of
from pfode.samplers.measure.metrics import rounded, triple
from pfode.samplers.measure.problem import Problem, blamed, reference_solution
from pfode.samplers.measure.results import Cache, Cell
from pfode.samplers.measure.spec import Spec, load_plans

__all__ = ["Measurer", "Variant"]

JUMPS = 32  # trajectories of the grid search


class Variant(NamedTuple):
    """One way to run a sampler: how it was chosen, in words, and seeds -> samples and the denoiser calls of each."""

    words: str
    draw: Callable[[list[int]], tuple[Tensor, int]]


class Measurer:
    """Measures samplers on one problem. The reference solution and the searched grids are made when first needed.

    Args:
        problem: what is sampled.
        cache: keeps the reference solution and the samples that are shown.
    """

    def __init__(self, problem: Problem, cache: Cache | None = None):
        self.problem, self.cache = problem, cache
        self._jumps: Jumps | None = None
        self._references: dict[bool, tuple[Tensor, dict[str, Any]]] = {}

    def cell(self, spec: Spec, evals: int) -> Cell:
        """The figures of a sampler at a number of evaluations, or why there are none, under "skipped".

        Raises:
            DenoiserError: the denoiser fails, whatever the sampler.
        """
        cell: Cell = {"bed": self.problem.name, "sampler": spec.text, "evals": evals}
        try:
            return cell | self._measured(spec, evals)
        except DenoiserError:
            raise
        except (UsageError, NumericalError) as error:
            return cell | {"skipped": error.message}

    def _measured(self, spec: Spec, evals: int) -> dict[str, Any]:
        """The figures of the best variant of a sampler."""
        per_call = self.problem.evals_per_call
        if evals % per_call:
            raise UsageError(f"{evals} evaluations are no whole number of calls of {per_call}")
        variants = self.variants(spec, evals // per_call)
        tried: dict[str, float] = {}
        chosen = variants[0]
        if len(variants) > 1:
            tried = self._tried(variants)
            chosen = min(variants, key=lambda variant: tried[variant.words])
        x, nfe = chosen.draw(self.problem.seeds())
        lost = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        if lost:
            raise NumericalError(f"{lost} of {len(x)} samples are not finite")
        figures: dict[str, Any] = {"nfe": nfe, "chosen": chosen.words}
        if tried:
            figures["tried"] = {words: rounded(error) for words, error in tried.items() if math.isfinite(error)}
        if self.problem.teacher:
            figures |= end_points(x, self.reference()[0], 2.0 if self.problem.pictures else None)
        figures |= self.distribution(x)
        if self.cache is not None and self.problem.pictures:
            self.cache.save_samples(self.problem, spec.text, evals, x)
        return figures

    def _tried(self, variants: list[Variant]) -> dict[str, float]:
        """The error of each variant on the validation noise; infinite where it failed."""
        if not self.problem.teacher:
            raise UsageError("alternatives are chosen by their end points, and there is no teacher", "one alternative")
        seeds, errors, failure = self.problem.seeds(True), {}, None
        target = self.reference(True)[0].double()
        for variant in variants:
            try:
                error = float((variant.draw(seeds)[0].double() - target).pow(2).mean().sqrt())
            except UsageError as found:
                failure, error = found, math.inf
            errors[variant.words] = error if math.isfinite(error) else math.inf
        if failure is not None and not any(map(math.isfinite, errors.values())):
            raise failure
        return errors

    # ---- variants

    def variants(self, spec: Spec, nfe: int) -> list[Variant]:
        """All that a sampler's text allows at a number of denoiser calls.

        Raises:
            UsageError: nothing.
        """
        if spec.kind in ("plan", "plans", "fitted"):
            return [Variant(words, self._runner(plan)) for words, plan in self._plans(spec, nfe)]
        make = self._peer if spec.kind == "peer" else self._recipe
        found, failure = [], None
        for options in spec.alternatives(self.problem.denoiser.process):
            try:
                found.append(make(spec, nfe, options))
            except UsageError as error:
                failure = error
        if not found and failure is not None:
            raise failure
        return found

    def _recipe(self, spec: Spec, nfe: int, options: dict[str, Any]) -> Variant:
        """A recipe of the catalogue, or what auto takes."""
        process, given = self.problem.denoiser.process, dict(options)
        guided = self.problem.evals_per_call > 1
        if given.get("grid") == "gits":
            rest = {key: value for key, value in given.items() if key not in ("grid", "coefficient")}
            steps = make_plan(spec.name, process, nfe=nfe, guided=guided, **rest).steps
            grid = self.jumps().grid(steps, given.get("coefficient", 1.15))
            plan = make_plan(spec.name, process, grid=grid, guided=guided, **rest)
        else:
            plan = make_plan(spec.name, process, nfe=nfe, guided=guided, **given)
        words = _words(options)
        if spec.name == "auto":
            words = f"{plan.name} {plan.meta['chart']} {plan.meta['grid']}"
        return Variant(words, self._runner(plan))

    def _peer(self, spec: Spec, nfe: int, options: dict[str, Any]) -> Variant:
        """A peer's own code, on its own grid or on one of ours."""
        problem, given = self.problem, dict(options)
        grid, process = given.pop("grid", None), problem.denoiser.process
        lay: peers.Lay | None = None
        if grid == "gits":
            lay = lambda steps: self.jumps().grid(steps).tolist()  # noqa: E731
        elif grid is not None:
            lay = lambda steps: grids.times(process, grid, steps)  # noqa: E731

        def draw(seeds: list[int]) -> tuple[Tensor, int]:
            labels, parts, calls = problem.labels(len(seeds)), [], 0
            for done in range(0, len(seeds), problem.batch):
                some = slice(done, done + problem.batch)
                cond = {} if labels is None else {"label": torch.tensor(labels[some], device="cpu").to(problem.device)}
                cond |= conditions(problem.denoiser, seeds[some], problem.device)
                x = problem.initial(seeds[some])
                with torch.no_grad(), blamed(f"model {problem.name!r}"):
                    end, calls = peers.draw(spec.name, problem.denoiser, x, seeds[some], nfe, lay, cond, **given)
                parts.append(end.cpu())
            return torch.cat(parts), calls

        return Variant(_words(options), draw)

    def _plans(self, spec: Spec, nfe: int) -> list[tuple[str, Plan]]:
        """The plans of so many calls for this process, with their names."""
        denoiser = self.problem.denoiser
        if spec.kind == "fitted":
            known = [(f"{name}", plan) for name, plan in (getattr(denoiser, "plans", None) or {}).items()]
            where = f"the denoiser of {self.problem.name}"
        else:
            own, where = fingerprint(denoiser), spec.name
            known = [(path.name, plan) for path, plan in load_plans(where)]
            if spec.kind == "plans" and own is not None:  # a single file is measured wherever it fits
                known = [(name, plan) for name, plan in known if plan.fitted_to in (None, own)]
        found = [(name, plan) for name, plan in known if plan.nfe == nfe and plan.process == denoiser.process]
        if not found:
            raise UsageError(f"{where} has no plan of {nfe} calls for {denoiser.process}")
        return found

    def _runner(self, plan: Plan) -> Callable[[list[int]], tuple[Tensor, int]]:
        """What draws by a plan."""
        return lambda seeds: (self.problem.run(plan, seeds), plan.nfe)

    def jumps(self) -> Jumps:
        """The costs of the grid search, measured once on the validation noise."""
        if self._jumps is None:
            problem, n = self.problem, min(JUMPS, self.problem.validation)
            how: dict[str, Any] = {"dtype": problem.dtype, "device": problem.device, "batch": n}
            how["label"] = problem.labels(n)
            with blamed(f"model {problem.name!r}"):
                self._jumps = measure_jumps(problem.denoiser, n, seed=problem.seeds(True)[0], **how)
        return self._jumps

    # ---- what samples are compared with

    def reference(self, validation: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """The `reference_solution` of the problem, from the cache where it is there.

        Raises:
            FileError: the cache is damaged.
        """
        if validation not in self._references:
            self._references[validation] = self._referred(validation)
        return self._references[validation]

    def _referred(self, validation: bool) -> tuple[Tensor, dict[str, Any]]:
        """The reference solution, kept or made."""
        kept = None if self.cache is None else self.cache.reference(self.problem, validation)
        if kept is not None:
            return kept
        x, how = reference_solution(self.problem, validation)
        if self.cache is not None:
            self.cache.save_reference(self.problem, validation, x, how)
        return x, how

    def distribution(self, x: Tensor) -> dict[str, Any]:
        """Distances from held-out true samples; empty where there are none."""
        return {} if self.truth is None else compared(self.problem, x, *self.truth)

    @functools.cached_property
    def truth(self) -> tuple[Tensor, Tensor] | None:
        """Held-out true samples, and their features."""
        found = self.problem.true()
        return None if found is None else (found, features_of(self.problem, found))

    def floor(self) -> dict[str, Any]:
        """What no sampler can pass: the error and the distances of the reference, those between two true sets."""
        found: dict[str, Any] = {}
        if self.problem.teacher:
            x, how = self.reference()
            found["teacher"] = how | self.distribution(x)
        pair = self.problem.two_true()
        if pair is not None:
            found["truth"] = compared(self.problem, pair[1], pair[0], features_of(self.problem, pair[0]))
        return found


def end_points(x: Tensor, reference: Tensor, peak: float | None) -> dict[str, Any]:
    """`metrics.end_point` as JSON."""
    found = metrics.end_point(x, reference, peak)
    psnr = {} if math.isinf(found.psnr) else {"psnr": rounded(found.psnr)}
    return {"rms": triple(found.rms), "median": triple(found.median), **psnr, "flipped": triple(found.flipped)}


def _words(options: dict[str, Any]) -> str:
    """Options as results say them."""
    return " ".join(f"{key}={value}" for key, value in options.items())
