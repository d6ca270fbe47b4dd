"""pfode sample --calibrate: the plan that serves a model best, chosen once and kept beside the model's file."""

from typing import Any

from pfode import defaults
from pfode.cli.model_option import choose
from pfode.cli.streams import Output
from pfode.errors import UsageError

__all__ = ["calibrate_model"]

SETTLED = ("grid", "chart", "rtol", "atol", "eta", "afs", "set", "init", "separate", "like")  # no choice is left with


def calibrate_model(options: dict[str, Any], out: Output) -> None:
    """Choose the plan for the calls asked for, unless one lies beside the model, where `auto` will find it.

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
    from pfode.samplers.calibration import calibrate, calibration_calls
    from pfode.samplers.settle import find_device

    chosen = choose(options["model"])
    net: Any = chosen.denoiser
    if not hasattr(getattr(net, "plans", None), "files") or chosen.path is None:
        problem = f"--calibrate: {chosen.name} has no file of pfode's beside which the plan could be kept"
        raise UsageError(problem, "plan = pfode.calibrate(net, nfe) in Python, or pfode convert")
    nfe = options["nfe"] or options["steps"] or defaults.STEPS
    if nfe in net.plans:
        out.note(f"nothing to calibrate: {net.plans.files[nfe].name} lies beside the model")
        return
    calls = calibration_calls(nfe)
    out.note(f"calibrating: {calls:,} denoiser calls of one picture, as many as {calls // nfe} pictures take")
    guidance = chosen.guidance if options["guidance"] is None else options["guidance"]
    plan = calibrate(net, nfe, guidance=guidance, device=find_device(options["device"]))
    tried = plan.meta["calibrated"]["tried"]
    least, auto = min(map(sum, tried.values())), sum(next(iter(tried.values())))
    file = plan.save(chosen.path.parent / f"{chosen.stem}.calibrated-{nfe}.safetensors")
    meta = plan.meta
    name = f"{meta['sampler']} {meta['chart']} {meta['grid']}"
    out.note(f"{name}, errors {least / auto:.2f} of what auto takes unasked: {file}")
