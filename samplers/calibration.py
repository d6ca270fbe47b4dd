"""Calibration: which of eight hand-made plans serves a network best, measured on a few samples of its own.

`auto` reads its choice off a table of other networks (`auto.TABLE`); what is best differs between networks. The eight
of every kind of process were chosen greedily on the beds of benchmarks/recipes.json: each one is what lowers the mean
logarithm of the least error most, beside those before it, over beds and 3 to 20 calls.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pfode import defaults
from pfode.denoiser import Denoiser, fingerprint
from pfode.errors import NumericalError, UsageError, integer
from pfode.plans.table import Plan
from pfode.samplers import auto
from pfode.samplers.auto import Choice
from pfode.samplers.catalogue import make_plan
from pfode.samplers.fit.cache import Cache
from pfode.samplers.fit.samples import CHECK, Source
from pfode.samplers.fit.team import Team
from pfode.samplers.fit.tuning import errors

__all__ = ["SHORTLIST", "calibrate", "calibration_calls"]

_EDM = (
    Choice("ipndm3", "ays-svd", "ddim"), Choice("unipc2", "cosine(0.5)", "flow"), Choice("unipc2", "ays-svd", "flow"),
    Choice("unipc2", "ays-svd", "dpm++"), Choice("unipc3", "cosine(0.5)", "flow"), Choice("unipc3", "cosine", "flow"),
    Choice("ipndm2", "cosine(0.5)", "trig"), Choice("unipc2", "ays-svd", "dpm3"),
)  # fmt: skip
_EDM_GUIDED = (
    Choice("ipndm2", "ays-svd", "ddim"), Choice("exp-ab2", "cosine(0.5)", "trig"), Choice("ipndm3", "ays-svd", "trig"),
    Choice("ipndm-v3", "ays-svd", "ddim"), Choice("ipndm2", "cosine(0.5)", "trig"), Choice("ipndm2", "ays-svd", "trig"),
    Choice("dpm++2m", "cosine(0.5)", "dpm++"), Choice("unipc2", "ays-svd", "flow"),
)  # fmt: skip
_VP = (
    Choice("unipc2", "time-quadratic", "flow"), Choice("dpm++2m", "time-quadratic", "dpm++"),
    Choice("unipc3", "time-quadratic", "flow"), Choice("unipc2", "time-quadratic", "dpm3"),
    Choice("unipc2", "time-quadratic", "dpm++"), Choice("dpm++2m", "time(1.5)", "dpm++"),
    Choice("unipc2", "ays-svd", "flow"), Choice("unipc2", "time", "flow"),
)  # fmt: skip
_VP_GUIDED = (
    Choice("ipndm2", "time-quadratic", "ddim"), Choice("dpm++2m", "time(1.5)", "dpm++"),
    Choice("unipc2", "ays-svd", "flow"), Choice("unipc2", "time-quadratic", "flow"),
    Choice("exp-ab3", "log-snr", "dpm"), Choice("ipndm2", "ays-svd", "trig"),
    Choice("unipc2", "time", "flow"), Choice("exp-ab2", "time-quadratic", "dpm++"),
)  # fmt: skip
_FLOW = (
    Choice("unipc3", "time(1.5)", "flow"), Choice("unipc2", "beta", "flow"), Choice("ipndm3", "cosine(0.7)", "trig"),
    Choice("unipc3", "beta", "flow"), Choice("unipc2", "time(1.5)", "flow"), Choice("unipc2", "cosine(0.7)", "flow"),
    Choice("unipc2", "ays-svd", "flow"), Choice("unipc2", "time", "flow"),
)  # fmt: skip
SHORTLIST: dict[tuple[str, bool], tuple[Choice, ...]] = {  # (family, guided)
    ("alpha = 1", False): _EDM, ("alpha = 1", True): _EDM_GUIDED, ("VP", False): _VP, ("VP", True): _VP_GUIDED,
    ("Flow", False): _FLOW, ("Flow", True): _FLOW,
}  # fmt: skip


def calibration_calls(nfe: int, n: int = defaults.Calibration.SAMPLES) -> int:
    """How many denoiser calls of one sample a calibration takes: those of the fine solution and of every candidate."""
    return n * (_teacher(nfe) + nfe * (len(_EDM) + 1))


def _teacher(nfe: int) -> int:
    """Steps of the fine solution."""
    return max(32, 3 * nfe)


def calibrate(
    denoiser: Denoiser,
    nfe: int,
    *,
    n: int = defaults.Calibration.SAMPLES,
    label: int | str | Sequence[int | str] | None = defaults.Fit.LABEL,
    guidance: float | None = None,
    seed: int = 0,
    shape: Sequence[int] | None = None,
    batch: int = defaults.BATCH,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> Plan:
    """The hand-made plan of nfe calls that serves this denoiser best, of eight and of what `auto` takes.

    Each is run from the same noise and compared with a fine solution of the PF-ODE; the one with the least product of
    root mean square and median error is taken, as a few samples that land elsewhere dominate the first alone. It takes
    `calibration_calls(nfe)` calls of one sample. What was found is in the plan's meta, under "calibrated". The seeds of
    the noise are far from those of `sample`.

    Args:
        nfe: denoiser calls of the plan.
        n: samples.
        label, guidance, seed, shape, batch, dtype, device: as for `fit_plan`.
        callback: called with the plans tried and how many there are.

    Raises:
        UsageError: options that cannot be carried out. NumericalError: no candidate ends in finite samples.
    """
    nfe, n, batch = integer("nfe", nfe, 1, 10_000), integer("n", n, 1, 2**20), integer("batch", batch, 1)
    if callback is not None and not callable(callback):
        raise UsageError(f"callback: {type(callback).__name__} cannot be called", "callback=None, or a function")
    settings = {
        "label": label, "guidance": guidance, "seed": integer("seed", seed, 0, 2**20 - 1), "teacher": _teacher(nfe),
        "n": n, "check": n,
    }  # fmt: skip
    source = Source(denoiser, settings, shape, dtype, device)
    process, guided = denoiser.process, source.guided
    kind = auto.family(process), guided
    choices = list(dict.fromkeys([auto.choose(process, nfe, guided), *SHORTLIST[kind]]))
    tried: dict[str, tuple[float, float]] = {}
    best: tuple[float, Plan] | None = None
    with torch.no_grad():
        groups, team = source.groups(CHECK, n, Cache(None, {}), lambda done, total: None), Team()
        for done, choice in enumerate(choices):
            if callback is not None:
                callback(done, len(choices))
            try:
                plan = make_plan(choice.sampler, process, nfe=nfe, grid=choice.grid, chart=choice.chart)
            except UsageError:  # too few calls for it
                continue
            found = errors(plan, groups, team, batch)
            if not math.isfinite(found.rms):
                continue
            tried[f"{choice.sampler}@{choice.chart} {choice.grid}"] = found.rms, found.median
            score = math.log(max(found.rms, 1e-300)) + math.log(max(found.median, 1e-300))
            if best is None or score < best[0]:
                best = score, plan
        if callback is not None:
            callback(len(choices), len(choices))
    if best is None:
        raise NumericalError("no plan of so few calls ends in finite samples", "more calls, or check the network")
    said = {"model": fingerprint(denoiser), "n": n, "tried": tried, "guidance": guidance}
    return replace(best[1], meta={**best[1].meta, "calibrated": said})
