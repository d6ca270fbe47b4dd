"""The betas, the noise process and the prediction that a configuration of a diffusers scheduler states.

A `scheduler_config.json` holds what the network was trained for, and how its authors sampled; only the first is used
here. Nothing here imports diffusers.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode.errors import UsageError, did_you_mean
from pfode.fields import FLAG, Field, checked, either, real, several, whole, word
from pfode.process import EDM, Flow, Process, VPDiscrete

__all__ = ["BETAS", "CLASSES", "NOISE", "OWN", "PREDICTION_TYPES", "Stated", "betas", "stated"]

PREDICTION_TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
DISCRETE = (
    "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler",
    "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler", "SASolverScheduler", "LCMScheduler", "TCDScheduler",
    "PFODEScheduler",
)  # fmt: skip
EDM_LIKE = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
FLOW_LIKE = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
CLASSES = (*DISCRETE, *EDM_LIKE, *FLOW_LIKE)

OWN = "PFODEScheduler"
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")

STRING = Field("a string", lambda value: isinstance(value, str)).or_none
ANY_NUMBER = Field("a number", lambda value: type(value) in (int, float) and not math.isnan(value)).or_none
SWITCH = either(FLAG, real(0, 1)).or_none
COUNT = whole(0, 1_000_000).or_none
NOISE: dict[str, Field] = {
    "num_train_timesteps": whole(1, 100_000).otherwise(1000),
    "beta_start": real(0, 0.9999).or_none,
    "beta_end": real(0, 0.9999).or_none,
    "beta_schedule": word("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace").or_none,
    "trained_betas": several(real(0, 1), 2, 100_000).or_none,
    "rescale_betas_zero_snr": FLAG.otherwise(False),
    "prediction_type": word(*PREDICTION_TYPES).otherwise("epsilon"),
    "timestep_type": word("discrete", "continuous").otherwise("discrete"),
    "use_flow_sigmas": FLAG.or_none,
    "flow_shift": real(1e-3, 1e3).or_none,
    "shift": real(1e-3, 1e3).or_none,
    "use_dynamic_shifting": FLAG.or_none,
    "time_shift_type": word("exponential", "linear").otherwise("exponential"),
    "base_shift": real(-20, 20).otherwise(0.5),
    "max_shift": real(-20, 20).otherwise(1.15),
    "base_image_seq_len": whole(1, 10_000_000).otherwise(256),
    "max_image_seq_len": whole(1, 10_000_000).otherwise(4096),
    "invert_sigmas": FLAG.or_none,
    "sigma_data": real(1e-6, 1e6).or_none,
    "sigma_min": real(0, 1e6).or_none,
    "sigma_max": real(0, 1e6).or_none,
}
SAMPLING: dict[str, Field] = {
    **dict.fromkeys(
        ("clip_sample", "disable_corrector", "euler_at_final", "lower_order_final", "predict_x0", "set_alpha_to_one",
         "skip_prk_steps", "stochastic_sampling", "thresholding", "use_beta_sigmas", "use_exponential_sigmas",
         "use_karras_sigmas", "use_lu_lambdas"),
        either(SWITCH, several(COUNT, 0, 100_000)).otherwise(None),
    ),
    **dict.fromkeys(
        ("corrector_order", "num_inference_steps", "original_inference_steps", "predictor_order", "solver_order",
         "steps_offset", "noise_sampler_seed"), COUNT,
    ),
    **dict.fromkeys(
        ("clip_sample_range", "dynamic_thresholding_ratio", "eta", "lambda_min_clipped", "rho", "s_noise",
         "sample_max_value", "shift_terminal", "timestep_scaling"), ANY_NUMBER,
    ),
    **dict.fromkeys(
        ("algorithm_type", "final_sigmas_type", "interpolation_type", "sigma_schedule", "solver_type",
         "timestep_spacing", "upscale_mode", "variance_type", "sampler", "grid", "plan"), STRING,
    ),
    **dict.fromkeys(
        ("scale_factors", "solver_p", "tau_func", "chart", "options", "seed", "spacing_drop"),
        Field("anything", lambda value: True, None),
    ),
}  # fmt: skip


class Stated(NamedTuple):
    """What a network was trained for: arguments of `pfode.scores.Denoiser`."""

    process: Process
    prediction: str
    time_scale: float
    sigma_data: float


def stated(config: Mapping[str, Any], tokens: int | None = None) -> Stated:
    """Read a scheduler's configuration.

    Args:
        config: with the name of the class under "_class_name"; other names that begin with "_" are left alone.
        tokens: length of the image sequence, for a flow shift that depends on it.

    Raises:
        UsageError: an unknown class or field, a value out of range, or what pfode does not know how to sample; the
            message names the field.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise UsageError(f"_class_name: unknown scheduler {name!r:.60}", did_you_mean(name, CLASSES))
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    c = checked(name, public, NOISE | SAMPLING)
    kind = PREDICTION_TYPES[c["prediction_type"]]
    if c["invert_sigmas"]:
        raise UsageError(f"{name}: invert_sigmas: a time that runs backwards is not known")
    if c["timestep_type"] != "discrete":
        raise UsageError(f"{name}: timestep_type: only 'discrete' is known, got {c['timestep_type']!r}")
    if name in EDM_LIKE or (name == OWN and c["sigma_data"] is not None):
        return Stated(_edm(name, c), "edm", 1.0, float(c["sigma_data"]))
    if name in FLOW_LIKE or c["use_flow_sigmas"] or kind == "flow":
        if name not in FLOW_LIKE and kind != "flow":
            raise UsageError(f"{name}: prediction_type: use_flow_sigmas needs 'flow_prediction', got {kind!r}")
        return Stated(Flow(_shift(name, c, tokens)), "flow", float(c["num_train_timesteps"]), 0.5)
    return Stated(VPDiscrete(_alphas_cumprod(name, c)), kind, 1.0, 0.5)


def _edm(name: str, c: Mapping[str, Any]) -> Process:
    for key in ("sigma_min", "sigma_max", "sigma_data"):
        if c[key] is None:
            raise UsageError(f"{name}: no {key!r}", f"expected {NOISE[key].expected}")
    if c["prediction_type"] != "epsilon":
        raise UsageError(f"{name}: prediction_type: only 'epsilon' is known here, got {c['prediction_type']!r}")
    if not 0 < c["sigma_min"] < c["sigma_max"]:
        raise UsageError(f"{name}: sigma_min: need 0 < sigma_min < sigma_max, got {c['sigma_min']}, {c['sigma_max']}")
    return EDM(c["sigma_min"], c["sigma_max"])


def _shift(name: str, c: Mapping[str, Any], tokens: int | None) -> float:
    """The factor s of t = s u / (1 + (s - 1) u)."""
    if c["use_dynamic_shifting"] and tokens is not None:
        slope = (c["max_shift"] - c["base_shift"]) / max(1, c["max_image_seq_len"] - c["base_image_seq_len"])
        mu = c["base_shift"] + slope * (tokens - c["base_image_seq_len"])
        shift = math.exp(mu) if c["time_shift_type"] == "exponential" else mu
        if not 0 < shift < math.inf:
            raise UsageError(f"{name}: base_shift: gives the shift {shift:g} for {tokens} tokens")
        return shift
    return (c["shift"] or 1.0) * (c["flow_shift"] or 1.0)  # only our own scheduler has both, one of them at 1


def _alphas_cumprod(name: str, c: Mapping[str, Any]) -> Tensor:
    """In float32, as the schedulers and the training scripts of diffusers compute it."""
    alphas = torch.cumprod(1 - betas(name, c), 0)
    falling = bool((alphas[1:] < alphas[:-1]).all()) and float(alphas[-1]) >= 0 and float(alphas[0]) < 1
    if not falling or len(alphas) < 2:
        key = "trained_betas" if c["trained_betas"] is not None else "beta_start"
        key = key if len(alphas) > 1 else "num_train_timesteps"
        raise UsageError(f"{name}: {key}: the noise must grow at every step, up to alpha = 0 at most")
    return alphas


def betas(name: str, config: Mapping[str, Any]) -> Tensor:
    """The betas of a configuration, shape (num_train_timesteps,), float32 as in diffusers.

    Args:
        name: of the scheduler, for messages. config: of its fields, those of BETAS are read.

    Raises:
        UsageError: a value out of range, or one that is missing; the message names the field.
    """
    c = checked(name, {key: config[key] for key in BETAS if key in config}, {key: NOISE[key] for key in BETAS})
    made = _unscaled(name, c)
    return _zero_snr(torch.cumprod(1 - made, 0)) if c["rescale_betas_zero_snr"] else made


def _unscaled(name: str, c: Mapping[str, Any]) -> Tensor:
    count, schedule = c["num_train_timesteps"], c["beta_schedule"]
    if c["trained_betas"] is not None:
        if len(c["trained_betas"]) != count:
            raise UsageError(
                f"{name}: trained_betas: {len(c['trained_betas'])} values for num_train_timesteps = {count}"
            )
        return torch.tensor(c["trained_betas"], dtype=torch.float32, device="cpu")
    for key in ("beta_schedule", "beta_start", "beta_end"):
        if c[key] is None:
            raise UsageError(f"{name}: no {key!r}", f"expected {NOISE[key].expected}")
    if schedule in ("squaredcos_cap_v2", "laplace"):
        bar = _cosine if schedule == "squaredcos_cap_v2" else _laplace
        edges = [bar(i / count) for i in range(count + 1)]
        ratios = zip(edges[1:], edges[:-1], strict=True)
        return torch.tensor(
            [min(1 - after / before, 0.999) for after, before in ratios], dtype=torch.float32, device="cpu"
        )
    start, end = c["beta_start"], c["beta_end"]
    if not 0 < start <= end:
        raise UsageError(f"{name}: beta_start: need 0 < beta_start <= beta_end, got {start}, {end}")
    if schedule == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32, device="cpu")
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32, device="cpu") ** 2
    return torch.sigmoid(torch.linspace(-6, 6, count, device="cpu")) * (end - start) + start


def _cosine(u: float) -> float:
    """alpha_bar of Nichol & Dhariwal 2021, eq. 17."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(u: float) -> float:
    """alpha_bar of the Laplace schedule (Hang et al. 2024), as diffusers has it."""
    half = 0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    snr = math.exp(-half)
    return math.sqrt(snr / (1 + snr))


def _zero_snr(alphas_cumprod: Tensor) -> Tensor:
    """Betas shifted and scaled so that the last alpha is 0 and the first stays (Lin et al. 2024, algorithm 1)."""
    root = alphas_cumprod.sqrt()
    square = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return 1 - torch.cat([square[:1], square[1:] / square[:-1]])
