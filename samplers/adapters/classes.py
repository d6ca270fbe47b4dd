"""Which of diffusers' scheduler classes a config is of, and what it means in the words of `PFODEScheduler`."""

import functools
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from pfode.compat.schedules import OWN
from pfode.errors import UsageError

__all__ = ["KNOWN", "LEARNED", "class_of", "translated"]

Config = Mapping[str, Any]
LIKE_DDIM = ("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "PNDM", "LMSDiscrete", "EulerDiscrete")
LIKE_DDIM += ("EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")
LIKE_DDIM += ("LCM", "TCD")
LIKE_DPM = ("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "SASolver", "UniPCMultistep")
LIKE_FLOW = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "LTXEulerAncestralRF")
LIKE_EDM = ("EDMEuler", "EDMDPMSolverMultistep")
HURRIED = ("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "EDMDPMSolverMultistep")
KNOWN = {f"{name}Scheduler" for name in (*LIKE_DDIM, *LIKE_DPM, *LIKE_FLOW, *LIKE_EDM)}
SAMPLER_KEYS = {  # of shipped configs: they say which sampler was used there, for which `sampler` stands here
    *("solver_order", "solver_type", "algorithm_type", "predict_x0", "disable_corrector", "solver_p", "euler_at_final"),
    *("predictor_order", "corrector_order", "tau_func", "skip_prk_steps", "stochastic_sampling", "noise_sampler_seed"),
    *("original_inference_steps", "timestep_scaling", "eta", "s_noise", "interpolation_type", "upscale_mode"),
}
MEANING_KEYS = {"scale_factors": None, "quantization_config": None}  # others, and the value at which they do nothing
_FLOW_KEYS = {"use_flow_sigmas", "flow_shift"}
_SHIFT_KEYS = {"use_dynamic_shifting", "time_shift_type"}
SINCE_0_31 = {  # keys that classes of diffusers have got since: a file of a newer version means the same with an older
    "DEISMultistep": _FLOW_KEYS | _SHIFT_KEYS,
    "DPMSolverMultistep": _FLOW_KEYS | _SHIFT_KEYS,
    "DPMSolverSinglestep": _FLOW_KEYS | _SHIFT_KEYS,
    "EDMEuler": {"final_sigmas_type"},
    "FlowMatchEulerDiscrete": {"invert_sigmas", "shift_terminal", "time_shift_type", "use_beta_sigmas",
                               "use_exponential_sigmas", "use_karras_sigmas"},
    "SASolver": _FLOW_KEYS,
    "UniPCMultistep": _FLOW_KEYS | _SHIFT_KEYS | {"shift_terminal", "sigma_max", "sigma_min"},
}  # fmt: skip
LEARNED = ("learned", "learned_range")  # variance types whose networks have twice the channels
DEFAULTED = "_use_default_values"  # a key that diffusers puts behind those of the class itself, before what others left
_FEW = 15  # the number of steps below which some classes lower their order at the end


def translated(config: Config, own: set[str], mine: str = OWN) -> dict[str, Any]:
    """A config of one of diffusers' schedulers as one of `PFODEScheduler`; its own as it is.

    A key that the config does not name gets the default of the config's class, which may differ from ours. A key that
    means nothing to that class, left over from the class before it, is dropped.

    Args:
        own: the keys of `PFODEScheduler`.
        mine: the name of the class that asks, which may be derived from it.

    Raises:
        UsageError: a class whose models are of another kind, a config of no known class, or a key without a meaning.
    """
    found, name = dict(config), class_of(config, own)
    if name in (OWN, mine):
        return {key: value for key, value in found.items() if key in own or key not in SAMPLER_KEYS}
    if name not in KNOWN:
        problem = f"{name}: its models are no denoisers of a process that pfode has, or its pipelines need that class"
        raise UsageError(problem, "supported: " + ", ".join(sorted(KNOWN)))
    found.pop(DEFAULTED, None)
    found["_class_name"] = name
    parameters = _parameters(name)
    kind = name.removesuffix("Scheduler")
    taken = set(parameters) | SINCE_0_31.get(kind, set()) if parameters else own
    for key in [key for key in found if not key.startswith("_")]:
        if key not in own | SAMPLER_KEYS | set(MEANING_KEYS) or (
            key in MEANING_KEYS and found[key] != MEANING_KEYS[key]
        ):
            raise UsageError(f"{name}: {key} = {found[key]!r:.60} has no meaning here", f"leave {key} out")
        if key not in taken:
            del found[key]  # of another scheduler before it
    found = {key: value for key, value in parameters.items() if key in own} | found
    if kind in LIKE_FLOW:
        found |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    if kind in LIKE_DPM:
        found["spacing_drop"] = 1
    if kind in HURRIED and found.get("lower_order_final") is True:
        found["lower_order_final"] = _FEW
    return found


def class_of(config: Config, own: set[str]) -> str:
    """The name of the scheduler class that a config is of.

    A config in memory that was never loaded from a file bears no name; then it is the class that has just its keys.
    Keys that a config inherited from another class stand behind `_use_default_values`, and do not count.

    Args:
        own: the keys of `PFODEScheduler`.

    Raises:
        UsageError: no class of diffusers has these keys (a class of somebody else's), or several that differ.
    """
    name = config.get("_class_name")
    if isinstance(name, str):
        return name
    keys = list(config)
    first = keys[: keys.index(DEFAULTED)] if DEFAULTED in keys else keys
    names = _classes().get(_public(first)) or _classes().get(_public(keys)) or ()
    if own <= _public(keys):
        return OWN
    if names and "sampler" in config and all(name.removesuffix("Scheduler") in _PLAIN for name in names):
        return OWN  # handed on by another class, which keeps what it does not know
    if not names:
        listed = ", ".join(sorted(_public(keys))) or "none"
        problem = f"the config names no _class_name, and no scheduler of diffusers has its keys ({listed:.300})"
        raise UsageError(problem, _NAME_IT)
    if len({_kind(name) for name in names}) > 1:
        raise UsageError(f"the config names no _class_name, and its keys are those of {' and '.join(names)}", _NAME_IT)
    return names[0]


_PLAIN = (*LIKE_DDIM, *LIKE_DPM)
_NAME_IT = 'from_config({**scheduler.config, "_class_name": "DDIMScheduler"}), if its models are those of that class'


def _public(keys: list[str]) -> frozenset[str]:
    return frozenset(key for key in keys if not key.startswith("_"))


def _kind(name: str) -> object:
    """What `translated` makes of a class depends on this alone; an unknown class is of its own kind."""
    kind = name.removesuffix("Scheduler")
    return next((group for group in (LIKE_DDIM, LIKE_DPM, LIKE_FLOW, LIKE_EDM) if kind in group), name)


@functools.cache
def _classes() -> dict[frozenset[str], tuple[str, ...]]:
    """All schedulers of the installed diffusers by the keys of their configs, and our own."""
    schedulers = importlib.import_module("diffusers.schedulers")
    found: dict[frozenset[str], tuple[str, ...]] = {}
    for name in sorted(name for name in dir(schedulers) if name.endswith("Scheduler")):
        parameters = _parameters(name)
        if parameters:
            keys = frozenset(parameters)
            found[keys] = (*found.get(keys, ()), name)
    return found


@functools.cache
def _parameters(name: str) -> dict[str, Any]:
    """The keys of a scheduler of diffusers and their defaults; none of one that wants a package that is not there."""
    made = getattr(importlib.import_module("diffusers.schedulers"), name, None)
    if not isinstance(made, type) or not hasattr(made, "from_config") or hasattr(made, "_backends"):
        return {}
    taken = list(inspect.signature(made.__init__).parameters.values())[1:]
    return {p.name: p.default for p in taken if p.kind is not p.VAR_KEYWORD and p.name != "kwargs"}
