"""Where the nodes of a plan lie, as a config of `PFODEScheduler` and a call of `set_timesteps` say."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfode import grids
from pfode.beta import beta_quantile
from pfode.errors import UsageError, integer, number, unknown
from pfode.process import EDM, Flow, Process, VPDiscrete, float64
from pfode.samplers import auto
from pfode.samplers.adapters.conventions import (
    FLOW_MIN,
    Config,
    Convention,
    Discrete,
    Levels,
    Scaled,
    Straight,
    as_list,
)

__all__ = ["check", "nodes", "trial", "unasked"]


def check(config: Config, kind: Convention) -> None:
    """Refuse words of a config of which no nodes can be made, whatever their number.

    Raises:
        UsageError: an unknown grid or word, or settings that exclude each other.
    """
    rule = config["grid"]
    if rule is not None and not isinstance(rule, str):
        raise UsageError(
            f"grid: need a name as text, got {rule!r:.60}", 'grid="karras", or set_timesteps(sigmas=[...])'
        )
    if rule not in (None, "auto"):
        grids.grid(rule)
    if config["final_sigmas_type"] not in ("zero", "sigma_min"):
        raise unknown("final_sigmas_type", config["final_sigmas_type"], ("zero", "sigma_min"))
    if isinstance(kind, Straight):
        shift(config, 1.0)
    else:
        _rule(config, kind)


def trial(process: Process) -> list[float]:
    """A few nodes that any process has, to try a recipe and its options on."""
    return grids.times(process, "log-snr", 4, "stop")


def nodes(
    config: Config,
    kind: Convention,
    steps: int | None,
    timesteps: Levels | None = None,
    sigmas: Levels | None = None,
    mu: float | None = None,
) -> tuple[Process, list[float]]:
    """The times of a plan's nodes, noise first, and the process, of which the ends may have to be wider.

    With final_sigmas_type "zero" the last is clean data, and no other has sigma = 0; with "sigma_min" there is a node
    at the least level, which is no node twice.

    Args:
        steps: between nodes, where nothing is given. timesteps: the network's times at the nodes.
        sigmas: the levels there; of flows before their shift. A 0 at the end may be there or not.
        mu: of a dynamic shift.

    Raises:
        UsageError: a config, or given nodes, that make no falling times.
    """
    count, trained = config["num_train_timesteps"], config["trained_betas"]
    if isinstance(kind, Discrete) and trained is not None and len(trained) != count:
        problem = f"trained_betas: {len(trained)} values for num_train_timesteps = {count}"
        raise UsageError(problem, f"num_train_timesteps={len(trained)}")
    if isinstance(kind, Straight):
        made, final = _flow_times(config, kind, steps, as_list(timesteps), as_list(sigmas), mu)
    elif timesteps is not None or sigmas is not None:
        final = config["final_sigmas_type"] == "zero"
        made = _given(kind, as_list(timesteps), as_list(sigmas))
    else:
        return kind.process, _placed(config, kind, integer("num_inference_steps", steps, 1, grids.MAX_STEPS))
    process, data = kind.process, kind.process.t_data
    if isinstance(process, Flow | EDM):
        process = _reaching(process, min(made), max(made))
    if final:
        made.append(data)
    elif isinstance(kind, Discrete) and made[-1] > process.t_min:
        made.append(process.t_min)
    return process, grids.times(process, made, 0)


def unasked(sigmas: Levels | None) -> bool:
    """Whether sigmas are the even ones that pipelines of flows pass where nobody asked for any."""
    if sigmas is None:
        return False
    n = len(sigmas)
    return bool(np.allclose(np.asarray(sigmas, dtype=float), np.linspace(1, 1 / n, n), atol=1e-6))


def _given(kind: Convention, timesteps: list[float] | None, sigmas: list[float] | None) -> list[float]:
    """Times of given nodes but for clean data."""
    if timesteps is not None and sigmas is not None:
        raise UsageError("timesteps and sigmas exclude each other", "give one of them")
    if timesteps is not None:
        given = float64(timesteps)
        t = kind.time(given)
        if not torch.allclose(kind.timestep(t), given):
            raise UsageError(f"timesteps: {timesteps!r:.80} leave the range of {kind.process}", "those of its training")
        return t.tolist()
    assert sigmas is not None
    levels = float64(sigmas[:-1] if len(sigmas) > 1 and sigmas[-1] == 0 else sigmas)
    if not (levels > 0).all():
        raise UsageError(f"sigmas: only the last may be 0, got {sigmas!r:.80}", "falling, positive ones")
    return _snapped(kind.process, kind.at_level(levels)).tolist()


def _snapped(process: Process, t: Tensor) -> Tensor:
    """Ends that float32 has moved outside are put back."""
    near = 1e-4 * max(1.0, abs(process.t_max)) if isinstance(process, VPDiscrete) else 0.0
    inside = t.clamp(process.t_min, process.t_max)
    return torch.where((t - inside).abs() <= near, inside, t)


def _reaching(process: Flow | EDM, low: float, high: float) -> Process:
    """The same process with ends that hold these times."""
    if isinstance(process, EDM):
        least, most = min(process.sigma_min, low), max(process.sigma_max, high)
        return process if (least, most) == (process.sigma_min, process.sigma_max) else EDM(least, most)
    return process if process.t_min <= low or low <= 0 else Flow(t_min=low)


def _placed(config: Config, kind: Convention, n: int) -> list[float]:
    """The grid of a config whose process is no flow."""
    process = kind.process
    rule, spaced = _rule(config, kind)
    if rule == "auto":
        rule = auto.choose(process, n, True).grid
    final = "denoise" if config["final_sigmas_type"] == "zero" else "stop"
    final = final if not spaced or config["set_alpha_to_one"] else "stop"
    high, low = (None if isinstance(kind, Scaled) else config[f"sigma_{end}"] for end in ("max", "min"))
    start, stop = (None if s is None else _time(kind, s) for s in (high, low))
    if config["lambda_min_clipped"] is not None and math.isfinite(config["lambda_min_clipped"]):
        start = min(start or process.t_max, process.time(2.0 * config["lambda_min_clipped"]))
    if stop is None and final == "stop" and spaced:
        inner = grids.times(process, rule, n, "denoise", start)[:-1]
        if inner[-1] > process.t_min:
            return [*inner, process.t_min]
    if stop is None:
        return grids.times(process, rule, n, final, start)
    if final == "stop":
        return grids.times(process, rule, n, final, start, stop)
    inner = grids.times(process, rule, n - 1, "stop", start, stop) if n > 1 else [start or process.t_max]
    return [*inner, process.t_data]


def _rule(config: Config, kind: Convention) -> tuple[Any, bool]:
    """The rule of a config whose process is no flow, and whether it is diffusers' spacing of the training steps."""
    flags = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "log-snr", "use_beta_sigmas": "beta-sigma"}
    flags["use_lu_lambdas"] = "log-snr"
    wanted = [grid for flag, grid in flags.items() if config[flag]]
    if len(wanted) > 1:
        raise UsageError(f"more than one of {', '.join(flags)} is set", "set one of them")
    if config["grid"] is not None:
        return config["grid"], False
    if isinstance(kind, Scaled):
        names = {"karras": f"karras({config['rho']})", "exponential": "log-snr"}
        if config["sigma_schedule"] not in names:
            raise unknown("sigma_schedule", config["sigma_schedule"], names)
        return wanted[0] if wanted else names[config["sigma_schedule"]], False
    if wanted:
        return wanted[0], False
    drop = integer("spacing_drop", config["spacing_drop"], 0, 1)
    spacings = {
        "leading": lambda: grids.leading(config["steps_offset"], drop),
        "linspace": lambda: grids.linspace(drop),
        "trailing": grids.trailing,
    }
    spacing = config["timestep_spacing"]
    if spacing not in spacings:
        raise unknown("timestep_spacing", spacing, spacings)
    return spacings[spacing](), True


def _time(kind: Convention, sigma: float) -> float:
    t = kind.at_level(float64([number("sigma", sigma, 1e-12)]))
    return _snapped(kind.process, t).item()


def shift(config: Config, mu: float | None) -> float:
    """The factor of sigma/alpha on a flow's grid: e^mu or mu where it is dynamic, else the config's.

    Raises:
        UsageError: a dynamic shift without mu, or two static ones that differ.
    """
    if config["use_dynamic_shifting"]:
        if mu is None:
            raise UsageError("use_dynamic_shifting: the shift depends on the image, mu is missing", "mu=1.15")
        if config["time_shift_type"] not in ("exponential", "linear"):
            raise unknown("time_shift_type", config["time_shift_type"], ("exponential", "linear"))
        return math.exp(number("mu", mu)) if config["time_shift_type"] == "exponential" else number("mu", mu, 1e-6)
    chosen = {float(config[key]) for key in ("shift", "flow_shift")} - {1.0}
    if len(chosen) > 1:
        raise UsageError(f"shift and flow_shift differ: {sorted(chosen)}", "set one of them")
    return chosen.pop() if chosen else 1.0


def _flow_times(
    config: Config,
    kind: Straight,
    steps: int | None,
    timesteps: list[float] | None,
    sigmas: list[float] | None,
    mu: float | None,
) -> tuple[list[float], bool]:
    """The times but for clean data, and whether that follows: shift, then shift_terminal, then the sigma schedule."""
    final = config["final_sigmas_type"] == "zero"
    if timesteps is not None:
        return _given(kind, timesteps, sigmas), final
    factor = shift(config, mu)
    if sigmas is not None and config["grid"] is not None and unasked(sigmas):
        steps, sigmas = len(sigmas), None
    if sigmas is not None:
        u = np.array(_given(kind, None, sigmas))
    else:
        n = integer("num_inference_steps", steps, 1, grids.MAX_STEPS)
        u = np.linspace(1, 1 / n, n) if final else np.linspace(1, 1 / kind.train, n + 1)
    t = factor * u / (1 + (factor - 1) * u)
    if config["grid"] is not None and sigmas is None:
        rule = auto.choose(kind.process, len(u), True).grid if config["grid"] == "auto" else config["grid"]
        placed = grids.times(Flow(factor, FLOW_MIN), rule, steps, "denoise" if final else "stop")  # type: ignore[arg-type]
        t = np.array(placed[:-1] if final else placed)
    if config["shift_terminal"]:
        end = number("shift_terminal", config["shift_terminal"], 0, 1)
        t = 1 - (1 - t) * ((1 - end) / (1 - t[-1])) if len(t) > 1 else t
    if config["grid"] is None:
        t = _respaced(config, t)
    return t.tolist(), final


def _respaced(config: Config, t: np.ndarray) -> np.ndarray:
    """As many times between the first and the last, by use_karras_sigmas, use_exponential_sigmas or use_beta_sigmas."""
    first, last, ramp = config["sigma_max"] or t[0], config["sigma_min"] or t[-1], np.linspace(0, 1, len(t))
    if config["use_karras_sigmas"]:
        return (first ** (1 / 7) + ramp * (last ** (1 / 7) - first ** (1 / 7))) ** 7
    if config["use_exponential_sigmas"]:
        return np.exp(math.log(first) + ramp * (math.log(last) - math.log(first)))
    if config["use_beta_sigmas"]:
        return last + beta_quantile(1 - ramp, 0.6, 0.6) * (first - last)
    return t
