"""The configuration of a training run, checked when it is made; kept with checkpoints and models."""

import json
from dataclasses import dataclass, field, fields
from typing import Any

from pfode import defaults
from pfode.errors import UsageError, unknown
from pfode.prediction import PREDICTIONS
from pfode.process import EDM, VE, Flow, Process, from_config
from pfode.scores.networks.mlp import MLPConfig
from pfode.scores.networks.unet import UNetConfig
from pfode.scores.training.levels import LEVELS, usual_levels
from pfode.scores.training.objectives import Denoising, Objective, objective

__all__ = ["TrainConfig", "usual_network"]

SCHEDULES = ("cosine", "constant")
WHOLE = {
    "steps": (1, 10**9), "batch": (1, 2**16), "accum": (1, 2**16), "warmup": (0, 10**9), "cooldown": (0, 10**9),
    "seed": (0, 2**63 - 1),
}  # fmt: skip
REAL = {
    "sigma_data": (1e-6, 1e6), "level_mean": (-50.0, 50.0), "level_std": (1e-6, 50.0), "rate": (1e-12, 1e3),
    "clip": (1e-12, 1e12), "drop": (0.0, 1.0), "beta2": (0.0, 0.999999), "decay": (0.0, 1e3),
}  # fmt: skip
USUAL = {  # up to this side of the pictures: widths, blocks, sides with attention
    12: ((24, 48), (1, 1), (4,)),
    32: ((32, 96, 128), (1, 2, 2), (8,)),
    64: ((32, 64, 128, 192), (1, 1, 2, 2), (8,)),
}
MAX_EMA = 16  # averages of the weights
HINTS = {
    "rate": "rate=1e-3 (--lr 1e-3)",
    "ema": "ema=(0.05, 0.1): shares of the run over which the weights are averaged; no decay such as 0.999",
    "drop": "drop=0.1: a tenth of the pictures are shown without their class",
    "batch": "batch=64",
    "accum": "accum=1: the whole batch at once",
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a run, besides the data.

    Args:
        network: configuration of the `UNet`, see `usual_network`; of the `MLP` for points.
        process: the noise process, as `Process.config()` gives it.
        prediction: what the network returns: "edm", "x0", "eps", "score", "v" or "flow"; "" chooses by the process:
            "edm" for EDM and VE, "flow" for Flow, else "eps".
        sigma_data: standard deviation of the data, for the prediction "edm".
        levels: how noise levels are drawn: "lognormal" in sigma/alpha (Karras et al. 2022, section 5), "uniform" in t,
            or "logit-normal" in t (Esser et al. 2024); "" chooses by the process.
        level_mean, level_std: of log(sigma/alpha), for "lognormal"; see `pfode.scores.training.measure`.
        balance: divide the loss of every noise level by its running mean, see `pfode.scores.training.balance`.
        steps: optimiser steps; the cosine schedule ends there.
        batch: pictures per step, over all processes and all `accum` parts.
        accum: parts of a batch whose gradients are added up before a step; divides `batch`.
        rate: the highest learning rate.
        schedule: of the learning rate: "cosine" falls to 0 over the run; "constant" stays, but falls linearly to 0
            over the last `cooldown` steps.
        warmup: steps over which the learning rate rises linearly.
        beta2, decay: second-moment factor and weight decay of AdamW; its first is 0.9.
        ema: averages of the weights, by their widths relative to the run (Karras et al. 2024, section 3.1).
        drop: share of the pictures whose class is hidden, for classifier-free guidance.
        flip: names of the classes of which half of the pictures are mirrored; "*" for all pictures.
        clip: largest norm of the gradient.
        seed: of every random number of the run.
        amp: bfloat16 autocast inside the network; weights, averages and optimiser stay float32.
        objective: what is minimised: see `pfode.scores.training.objectives`.

    Raises:
        UsageError: a value of another type or out of range, named by its field.
    """

    network: UNetConfig | MLPConfig
    process: dict[str, Any]
    prediction: str = ""
    sigma_data: float = defaults.Train.SIGMA_DATA
    levels: str = ""
    level_mean: float = -1.2
    level_std: float = 1.2
    balance: bool = False
    steps: int = defaults.Train.STEPS
    batch: int = defaults.Train.BATCH
    accum: int = defaults.Train.ACCUM
    rate: float = defaults.Train.RATE
    schedule: str = defaults.Train.SCHEDULE
    warmup: int = defaults.Train.WARMUP
    cooldown: int = defaults.Train.COOLDOWN
    beta2: float = 0.99
    decay: float = 0.0
    ema: tuple[float, ...] = defaults.Train.EMA
    drop: float = defaults.Train.DROP
    flip: tuple[str, ...] = ()
    clip: float = defaults.Train.CLIP
    seed: int = defaults.Train.SEED
    amp: bool = False
    objective: Objective = field(default_factory=Denoising)

    def __post_init__(self) -> None:
        process = from_config(self.process)
        for name, value in (("prediction", _prediction(process)), ("levels", usual_levels(process))):
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        if self.prediction != "edm" and self.prediction not in PREDICTIONS:
            raise unknown("prediction", self.prediction, ["edm", *PREDICTIONS])
        if self.levels not in LEVELS:
            raise unknown("noise levels", self.levels, LEVELS)
        if self.levels == "logit-normal" and not 0 <= process.t_min < process.t_max <= 1:
            raise UsageError(
                f"training: levels: 'logit-normal' needs times within [0, 1], not those of {self.process['name']}"
            )
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        for name, (low, high) in WHOLE.items():
            value = getattr(self, name)
            _require(name, type(value) is int and low <= value <= high, value, f"an integer from {low} to {high}")
        _require("accum", self.batch % self.accum == 0, self.accum, f"a divisor of the batch {self.batch}")
        for name, (least, most) in REAL.items():
            value = getattr(self, name)
            _require(name, _within(value, least, most), value, f"a number from {least:g} to {most:g}")
        ema = self.ema if isinstance(self.ema, tuple) else ()
        sound = 0 < len(ema) <= MAX_EMA and all(_within(width, 1e-3, 0.249) for width in ema)
        _require("ema", sound and len(set(ema)) == len(ema), self.ema, f"1 to {MAX_EMA} widths from 0.001 to 0.249")
        _require(
            "flip", isinstance(self.flip, tuple) and all(isinstance(n, str) for n in self.flip), self.flip, "names"
        )
        for name in ("amp", "balance"):
            _require(name, isinstance(getattr(self, name), bool), getattr(self, name), "True or False")
        _require("objective", isinstance(self.objective, Objective), self.objective, "a value such as Denoising()")
        signed = self.balance and self.objective.signed
        _require("balance", not signed, True, "False (--no-balance) where losses may be negative")

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        kept = {one.name: getattr(self, one.name) for one in fields(self)}
        kept |= {"network": self.network.to_json(), "objective": self.objective.config()}
        if self.objective == Denoising():
            del kept["objective"]
        return json.loads(json.dumps(kept))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainConfig":
        """Inverse of `to_json`.

        Raises:
            UsageError: an unknown key or a value out of range.
        """
        known = {field.name for field in fields(cls)}
        for key in value:
            if key not in known:
                raise unknown("training field", key, known)
        plain: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
        network = MLPConfig if value["network"].get("name") == "MLP" else UNetConfig
        plain["network"] = network.from_json(value["network"])
        if "objective" in plain:
            plain["objective"] = objective(value["objective"])
        return cls(**plain)


def usual_network(
    size: int,
    channels: int,
    classes: int,
    *,
    widths: tuple[int, ...] | None = None,
    blocks: tuple[int, ...] | None = None,
    attention: tuple[int, ...] | None = None,
    dropout: float = 0.0,
    styles: int = 0,
) -> UNetConfig:
    """A network for pictures of a size, about as large as one CPU trains in minutes (8x8) to hours (64x64).

    Args:
        size, channels, classes, styles: of the data.
        widths, blocks, attention, dropout: see `UNetConfig`; those that are None are chosen by the size.

    Raises:
        UsageError: a value out of range, or a size that cannot be halved as often as there are widths.
    """
    standard = next(network for side, network in USUAL.items() if size <= side or side == max(USUAL))
    widths = standard[0] if widths is None else widths
    if blocks is None:
        blocks = standard[1] if len(widths) == len(standard[1]) else (1, *(2 for _ in widths[1:]))
    attention = standard[2] if attention is None else attention
    attended = [width for level, width in enumerate(widths) if size >> level in attention]
    head = next((h for h in (32, 24, 16, 8) if all(width % h == 0 for width in attended)), 8)
    return UNetConfig(size, channels, classes, widths, blocks, attention, head, dropout, styles)


def _prediction(process: Process) -> str:
    return "edm" if isinstance(process, EDM | VE) else "flow" if isinstance(process, Flow) else "eps"


def _within(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _require(name: str, condition: bool, value: object, wanted: str) -> None:
    if not condition:
        raise UsageError(f"training: {name}: expected {wanted}, got {value!r:.60}", HINTS.get(name, ""))
