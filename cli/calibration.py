"""pfode sample --calibrate: the plan that serves a model best, chosen once and kept beside the model's file."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pfode import defaults
from pfode.cli.model_option import choose
from pfode.cli.prompts import format_size, load_words
from pfode.cli.streams import Output
from pfode.errors import UsageError

if TYPE_CHECKING:
    from pfode.plans.table import Plan

__all__ = ["calibrate_model"]

SETTLED = ("grid", "chart", "rtol", "atol", "eta", "afs", "set", "init", "separate", "like")  # no choice is left with


def calibrate_model(options: dict[str, Any], out: Output) -> None:
    """Choose the plan for the calls asked for, unless one lies beside the model, where `auto` will find it.

    That of a pipeline under prompts is kept in the working folder, for its size, and taken as the sampler.

    Raises:
        UsageError: another sampler than auto, something that the choice would settle, or a model without a file of
            pfode's. WriteError: its folder cannot be written.
    """
    if options["sampler"] != "auto" or not options["fitted"]:
        given = f"--sampler {options['sampler']}" if options["sampler"] != "auto" else "--no-fitted"
        raise UsageError(f"--calibrate chooses the sampler, and {given} is given", "leave one of them out")
    for name in SETTLED:
        if options.get(name):
            raise UsageError(f"--calibrate chooses grid and chart, and --{name} is given", "leave one of them out")
    from pfode.samplers.calibration import calibrate
    from pfode.samplers.settle import find_device

    device = find_device(options["device"])
    words = load_words(options, options["guidance"])
    chosen = choose(options["model"], words=words, device=device)
    net: Any = chosen.denoiser
    nfe = options["nfe"] or options["steps"] or defaults.STEPS
    if words:
        name = re.sub(r"[^\w-]+", "-", Path(chosen.name).name)
        file = Path(f"{name}.calibrated-{nfe}-{format_size(net.picture_shape)}.safetensors")
        if file.exists():
            out.note(f"nothing to calibrate: {file} is there")
        else:
            _announce(nfe, out)
            _say(calibrate(net, nfe, device=device), file, out)
        options |= {"sampler": str(file), "steps": None, "nfe": None}
        return
    if not hasattr(getattr(net, "plans", None), "files") or chosen.path is None:
        problem = f"--calibrate: {chosen.name} has no file of pfode's beside which the plan could be kept"
        raise UsageError(problem, "plan = pfode.calibrate(net, nfe) in Python, or pfode convert")
    if nfe in net.plans:
        out.note(f"nothing to calibrate: {net.plans.files[nfe].name} lies beside the model")
        return
    _announce(nfe, out)
    guidance = chosen.guidance if options["guidance"] is None else options["guidance"]
    plan = calibrate(net, nfe, guidance=guidance, device=device)
    _say(plan, chosen.path.parent / f"{chosen.stem}.calibrated-{nfe}.safetensors", out)


def _announce(nfe: int, out: Output) -> None:
    """Say what calibrating takes."""
    from pfode.samplers.calibration import calibration_calls

    calls = calibration_calls(nfe)
    out.note(f"calibrating: {calls:,} denoiser calls of one picture, as many as {calls // nfe} pictures take")


def _say(plan: "Plan", file: Path, out: Output) -> None:
    """Keep a plan and say how it compares."""
    tried = plan.meta["calibrated"]["tried"]
    ratio = math.sqrt(min(map(math.prod, tried.values())) / max(math.prod(next(iter(tried.values()))), 1e-300))
    plan.save(file)
    meta = plan.meta
    name = f"{meta['sampler']} {meta['chart']} {meta['grid']}"
    out.note(f"{name}, errors (geometric mean of RMS and median) {ratio:.2f} of what auto takes unasked: {file}")
