"""Denoising score matching: train a network on pictures, survive any kill, resume bit for bit.

Every random number of a run is a function of (seed, position), where position counts the training pictures: the order
of the data, noise levels, noise, dropped classes and mirror images. So neither the number of processes nor an
interruption changes what is drawn, and a checkpoint needs no random state.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from pfode._torch import lerp_all_
from pfode.denoiser import Preconditioning
from pfode.errors import FileError, NumericalError, PfodeError, UsageError, WriteError, unknown
from pfode.files import FolderLock, lock_folder, make_folder, shown, write_atomic
from pfode.prediction import PREDICTIONS
from pfode.process import EDM, VE, Flow, Process, from_config
from pfode.scores.denoiser import Denoiser
from pfode.scores.io.checkpoint import save
from pfode.scores.networks.unet import UNet, UNetConfig
from pfode.scores.training.checkpoints import checkpoints, read_checkpoint, write_checkpoint
from pfode.scores.training.dataset import Data

SCHEDULES = ("cosine", "constant")
LEVELS = ("lognormal", "uniform", "logit-normal")
METRICS = "metrics.jsonl"
OPTIMISER = "optimiser.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
HINTS = {
    "rate": "rate=1e-3 (--lr 1e-3)",
    "ema": "ema=(0.05, 0.1): shares of the run over which the weights are averaged; no decay such as 0.999",
    "drop": "drop=0.1: a tenth of the pictures are shown without their class",
    "batch": "batch=64",
    "accum": "accum=1: the whole batch at once",
}
MAY_CHANGE = {"steps", "cooldown"}  # when a run is resumed: it may be made longer or shorter


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a run, besides the data.

    Args:
        network: of the `UNet`.
        process: its configuration, `Process.config()`.
        prediction: "edm", "x0", "eps", "score", "v" or "flow"; "" chooses by the process: edm, eps or flow.
        levels: how noise levels are drawn: "lognormal" in sigma/alpha with `level_mean`, `level_std` (Karras et al.
            2022), "uniform" in t, or "logit-normal" in t (Esser et al. 2024); "" chooses by the process.
        steps: optimiser steps; the cosine rate ends there.
        batch: pictures per step, over all processes and `accum` parts.
        rate: the highest learning rate, after `warmup` steps.
        schedule: "cosine" falls to 0 over the run; "constant" stays, but for the last `cooldown` steps, a line to 0.
        ema: widths of the averages of the weights, relative to the run (Karras et al. 2024, power-function averages).
        drop: share of the pictures whose class is hidden, for guidance.
        flip: names of the classes shown mirrored half of the time; "*" for all pictures.
        clip: largest norm of the gradient.
        amp: bfloat16 inside the network; weights, averages and optimiser stay float32.

    Raises:
        UsageError: a value out of range, named by its field.
    """

    network: UNetConfig
    process: dict[str, Any]
    prediction: str = ""
    sigma_data: float = 0.5
    levels: str = ""
    level_mean: float = -1.2
    level_std: float = 1.2
    steps: int = 2000
    batch: int = 64
    accum: int = 1
    rate: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 100
    cooldown: int = 0
    beta2: float = 0.99
    decay: float = 0.0
    ema: tuple[float, ...] = (0.05, 0.10)
    drop: float = 0.1
    flip: tuple[str, ...] = ()
    clip: float = 1.0
    seed: int = 0
    amp: bool = False

    def __post_init__(self) -> None:
        process = from_config(self.process)
        for name, value in (("prediction", _prediction(process)), ("levels", _levels(process))):
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
        for name in ("steps", "batch", "accum"):
            _require(name, getattr(self, name) >= 1, getattr(self, name), "at least 1")
        _require("accum", self.batch % self.accum == 0, self.accum, f"a divisor of the batch {self.batch}")
        for name in ("warmup", "cooldown"):
            _require(name, getattr(self, name) >= 0, getattr(self, name), "at least 0")
        for name in ("sigma_data", "level_std", "rate", "clip"):
            _require(name, 0 < getattr(self, name) < math.inf, getattr(self, name), "a positive number")
        _require("drop", 0 <= self.drop <= 1, self.drop, "a share within [0, 1]")
        _require("seed", 0 <= self.seed < 2**63, self.seed, "an integer from 0 to 2^63")
        _require(
            "ema", bool(self.ema) and all(0 < width < 0.25 for width in self.ema), self.ema, "widths within (0, 0.25)"
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return json.loads(json.dumps({**asdict(self), "network": self.network.to_json()}))

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
        plain = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
        return cls(**{**plain, "network": UNetConfig.from_json(value["network"])})


def _prediction(process: Process) -> str:
    return "edm" if isinstance(process, EDM | VE) else "flow" if isinstance(process, Flow) else "eps"


def _levels(process: Process) -> str:
    return "lognormal" if isinstance(process, EDM | VE) else "logit-normal" if isinstance(process, Flow) else "uniform"


def _require(name: str, condition: bool, value: object, wanted: str) -> None:
    if not condition:
        raise UsageError(f"training: {name}: expected {wanted}, got {value!r}", HINTS.get(name, ""))


@dataclass(frozen=True)
class Record:
    """One optimiser step: its number from 1, the loss over the batch, the learning rate, pictures per second."""

    step: int
    loss: float
    rate: float
    images_per_second: float


class Batch:
    """The pictures and the noise of one step: a function of (config, data, step) and of nothing else."""

    def __init__(self, config: TrainConfig, data: Data):
        self.config = config
        self.data = data
        self.process = from_config(config.process)
        mirrored = ["*" in config.flip or name in config.flip for name in data.names] or ["*" in config.flip]
        self.mirrored = torch.tensor(mirrored)
        self.order = (-1, np.empty(0, dtype=np.int64))

    def draw(self, step: int, indices: range) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x0 in [-1, 1], noise, t (all float64) and labels of the pictures `indices` of the batch of a step from 0."""
        config, data = self.config, self.data
        chosen, clock, dropped, mirror, noise = [], [], [], [], []
        for i in indices:
            position = step * config.batch + i
            generator = np.random.Generator(np.random.Philox(key=config.seed, counter=[0, 0, 0, position]))
            u = generator.random(3)
            chosen.append(self._chosen(position))
            clock.append((i + u[0]) / config.batch)  # stratified over the batch
            dropped.append(u[1] < config.drop)
            mirror.append(u[2] < 0.5)
            noise.append(generator.standard_normal(data.shape))
        index = torch.tensor(chosen)
        x0 = data.images[index].to(torch.float64) / 127.5 - 1
        labels = None if data.labels is None else data.labels[index]
        mirrored = self.mirrored[0 if labels is None else labels] & torch.tensor(mirror)
        x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        if labels is not None:
            labels = torch.where(torch.tensor(dropped), len(data.names), labels)
        return x0, torch.from_numpy(np.stack(noise)), self.times(torch.tensor(clock, dtype=torch.float64)), labels

    def times(self, clock: Tensor) -> Tensor:
        """Quantiles in [0, 1) of the distribution of noise levels, as times of the process."""
        config, process = self.config, self.process
        low, high = process.t_min, process.t_max
        if config.levels == "uniform":
            return low + (high - low) * clock
        normal = torch.special.ndtri(clock.clamp(1e-12, 1 - 1e-12))
        if config.levels == "logit-normal":
            return torch.sigmoid(normal).clamp(low, high)
        ratio = torch.exp(config.level_mean + config.level_std * normal)  # sigma / alpha
        return process.time(-2 * torch.log(ratio)).clamp(low, high)

    def _chosen(self, position: int) -> int:
        """The picture at a position: every epoch is a new permutation of the data."""
        epoch, within = divmod(position, len(self.data))
        if self.order[0] != epoch:
            key = np.random.Philox(key=self.config.seed, counter=[0, 0, 1, epoch])
            self.order = (epoch, np.random.Generator(key).permutation(len(self.data)))
        return int(self.order[1][within])


def ema_power(width: float) -> float:
    """The exponent g of the average with weights ~ step^g whose standard deviation is `width` of the run.

    With a = g + 1: width^2 = a / ((a + 1)^2 (a + 2)) (Karras et al. 2024, appendix C): the largest root of
    a cubic in a, found by bisection of the falling right-hand side.
    """
    low, high = 1.0, 1e9
    for _ in range(200):
        a = math.sqrt(low * high)
        low, high = (a, high) if a / ((a + 1) ** 2 * (a + 2)) > width**2 else (low, a)
    return low - 1


class Trainer:
    """One run: `for record in trainer.run(): ...`, with checkpoints in `folder` and the averages at `denoiser()`.

    Args:
        config: the recipe.
        data: the pictures; in memory, the same in every process.
        folder: for checkpoints and metrics.jsonl; None writes nothing.
        resume: continue from the newest sound checkpoint in the folder, and from the start where there is none at
            all; those that are `damaged` are kept in mind there.
        save_every: steps between checkpoints; one is always written at the end.
        device: "cpu", "cuda", ...; accelerate's choice by default.
        trackers: of accelerate ("tensorboard", "wandb", ...), for those who have them.

    Raises:
        UsageError: network and data do not fit, or the folder holds another run, or one is working in it.
        FileError: every checkpoint of the run that is to be continued is damaged.
        NumericalError: while running: the loss is not finite.
        WriteError: the folder cannot be written.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        folder: str | os.PathLike[str] | None = None,
        *,
        resume: bool = False,
        save_every: int = 500,
        device: str | None = None,
        trackers: tuple[str, ...] = (),
    ):
        shape = (config.network.channels, config.network.size, config.network.size)
        if shape != data.shape or config.network.classes != len(data.names):
            raise UsageError(
                f"training: a network for {shape} with {config.network.classes} classes does not fit "
                f"data of {data.shape} with {len(data.names)}"
            )
        self.accelerator = Accelerator(cpu=device == "cpu", log_with=list(trackers) or None)
        if trackers:
            self.accelerator.init_trackers("pfode")
        self.trackers = bool(trackers)
        share, self.first = (
            divmod(config.batch // config.accum, self.accelerator.num_processes),
            self.accelerator.process_index,
        )
        if share[1]:
            raise UsageError(
                f"training: batch: {config.batch} in {config.accum} parts cannot be split "
                f"over {self.accelerator.num_processes} processes"
            )
        self.share = share[0]
        self.config = config
        self.data = data
        self.folder = None if folder is None else Path(folder)
        self.save_every = save_every
        self.batch = Batch(config, data)
        self.step = 0
        self.seconds = 0.0

        torch.manual_seed(config.seed)
        self.net = UNet(config.network)
        self.ema = {
            width: {name: p.detach().clone() for name, p in self.net.named_parameters()} for width in config.ema
        }
        self.model: Any = self.accelerator.prepare_model(self.net)
        self.ema = {
            w: {n: p.to(self.accelerator.device) for n, p in average.items()} for w, average in self.ema.items()
        }
        self.optimiser = torch.optim.AdamW(
            self.net.parameters(), lr=config.rate, betas=(0.9, config.beta2), weight_decay=config.decay, fused=True
        )
        self.den = self._denoiser(self.model)
        self.damaged: list[FileError] = []
        self._locked = FolderLock(None)
        if self.folder is not None:
            try:
                self._open(resume)
            except BaseException:
                self._locked.close()
                raise

    def close(self) -> None:
        """End the trackers, leave the group of processes and let other runs into the folder.

        The threads of the group must not outlive the interpreter.
        """
        self.accelerator.end_training()
        self._locked.close()

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.accelerator.is_main_process

    def run(self) -> Iterator[Record]:
        """Train to the end, one record per optimiser step; checkpoints are written before the record is handed out."""
        while self.step < self.config.steps:
            started = time.perf_counter()
            loss, rate = self._advance(), self.rate(self.step)
            self.step += 1
            elapsed = time.perf_counter() - started
            self.seconds += elapsed
            record = Record(self.step, loss, rate, self.config.batch / elapsed)
            self._log(record)
            if self.folder is not None and (self.step % self.save_every == 0 or self.step == self.config.steps):
                self.save()
            yield record

    def rate(self, step: int) -> float:
        """The learning rate of a step from 0."""
        config = self.config
        warm = min(1.0, (step + 1) / (config.warmup + 1))
        if config.schedule == "constant":
            return config.rate * min(warm, (config.steps - step) / max(config.cooldown, 1))
        return config.rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))

    def denoiser(self, width: float | None = None) -> Denoiser:
        """A denoiser with the averaged weights (the first width by default), in evaluation mode; a copy."""
        net = UNet(self.config.network).to(self.accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        net.load_state_dict(self.ema[self.config.ema[0] if width is None else width])
        return self._denoiser(net.eval().requires_grad_(False))

    def export(self, path: str | os.PathLike[str], card: dict[str, Any], width: float | None = None) -> Path:
        """Write the model of `denoiser(width)` as one safetensors file; see `pfode.scores.io.checkpoint.save`."""
        training = {**self.config.to_json(), "step": self.step, "seconds": round(self.seconds, 1)}
        return save(self.denoiser(width).to("cpu"), path, card={"data": self.data.card, "training": training, **card})

    def _denoiser(self, network: Any) -> Denoiser:
        return Denoiser(
            network,
            self.batch.process,
            self.config.prediction,
            sigma_data=self.config.sigma_data,
            shape=self.data.shape,
            labels=self.data.names or None,
            unseen=unseen_classes(self.config, self.data),
        )

    def _advance(self) -> float:
        """One optimiser step; returns the loss over the whole batch."""
        config, device = self.config, self.accelerator.device
        part = config.batch // config.accum
        torch.manual_seed(hash((config.seed, self.step, self.first)))  # only dropout inside the network uses it
        self.model.train()
        total = torch.zeros((), device=device)
        for k in range(config.accum):
            start = k * part + self.first * self.share
            x0, noise, t, label = self.batch.draw(self.step, range(start, start + self.share))
            x, c, target = self._problem(x0, noise, t)
            extra = {} if label is None else {"label": label.to(device)}
            last = k == config.accum - 1
            with (
                _synchronised(self.accelerator, self.model, last),
                torch.autocast(device.type, torch.bfloat16, enabled=config.amp),
            ):
                out = self.model(
                    (c.c_in.reshape(-1, 1, 1, 1) * x).float().to(device), c.c_noise.float().to(device), **extra
                )
                loss = (out.float() - target.float().to(device)).square().mean() / config.accum
                self.accelerator.backward(loss)
            total += loss.detach()
        loss = float(self.accelerator.reduce(total, reduction="mean"))
        if not math.isfinite(loss):
            raise NumericalError(
                f"training: the loss is {loss} at step {self.step + 1}", "a smaller --lr, or a longer --warmup"
            )
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), config.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(self.step)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        weights = [p.detach() for p in self.net.parameters()]
        for width, average in self.ema.items():
            keep = (1 - 1 / (self.step + 1)) ** (ema_power(width) + 1)
            lerp_all_(list(average.values()), weights, 1 - keep)
        return loss

    def _problem(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Preconditioning, Tensor]:
        """x_t, its preconditioning, and what the network should return: all in float64."""
        alpha = self.batch.process.alpha(t).reshape(-1, 1, 1, 1)
        sigma = self.batch.process.sigma(t).reshape(-1, 1, 1, 1)
        return alpha * x0 + sigma * noise, self.den.precondition(t), self.den.target(x0, noise, alpha, sigma)

    def _log(self, record: Record) -> None:
        if self.trackers:
            self.accelerator.log({"loss": record.loss, "rate": record.rate}, step=record.step)
        if self.main and self.folder is not None:
            line = {
                "step": record.step,
                "loss": float(f"{record.loss:.6g}"),
                "rate": float(f"{record.rate:.4g}"),
                "images_per_second": round(record.images_per_second, 1),
            }
            try:
                with (self.folder / METRICS).open("a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                problem = f"{shown(self.folder / METRICS)}: cannot be written: {error.strerror or error}"
                raise WriteError(problem, "another --out, or make room") from error

    def save(self) -> Path | None:
        """Write a checkpoint, whole or not at all, and drop all but the newest two.

        Raises:
            UsageError: the run has no folder. WriteError: the folder cannot be written.
        """
        if self.folder is None:
            raise UsageError("this run has no folder for checkpoints")
        if not self.main:
            self.accelerator.wait_for_everyone()
            return None
        named = dict(self.net.named_parameters())
        parts = {"network.safetensors": {name: p.detach() for name, p in named.items()}}
        parts |= {_ema_file(width): average for width, average in self.ema.items()}
        state = self.optimiser.state
        parts[OPTIMISER] = {f"{name}.{key}": v for name, p in named.items() for key, v in state.get(p, {}).items()}
        manifest: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "config": self.config.to_json(),
            "data": self.data.card,
        }
        final = write_checkpoint(self.folder, self.step, manifest, parts)
        self.accelerator.wait_for_everyone()
        return final

    def _open(self, resume: bool) -> None:
        """Make the folder and keep other runs out of it; continue the run that it holds."""
        assert self.folder is not None
        make_folder(self.folder)
        self._lock()
        found = checkpoints(self.folder)
        if found and not resume:
            problem = f"{shown(self.folder)} already holds a run ({found[0].name})"
            raise UsageError(problem, "--resume continues it; or another --out")
        for path in found:
            try:
                manifest, parts = read_checkpoint(path)
            except FileError as error:
                self.damaged.append(error)
                continue
            self._restore(path, manifest, parts)
            break
        else:
            if self.damaged:
                problem = f"{shown(self.folder)}: every checkpoint is damaged: {self.damaged[0].message}"
                raise FileError(problem, "bring one back from a copy, or start anew in another --out")
        self.accelerator.wait_for_everyone()
        if self.main:
            for stale in self.folder.glob(".step-*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)
            self._cut_metrics()

    def _lock(self) -> None:
        """Lock the folder in the first process; the others learn whether that could be done."""
        assert self.folder is not None
        problem: list[PfodeError | None] = [None]
        if self.main:
            try:
                self._locked = lock_folder(self.folder)
            except PfodeError as error:
                problem = [error]
        broadcast_object_list(problem)
        if problem[0] is not None:
            raise problem[0]

    def _restore(self, path: Path, manifest: dict[str, Any], parts: dict[str, dict[str, Tensor]]) -> None:
        """Continue from a checkpoint.

        Raises:
            UsageError: it is of a run with other options or other data. FileError: something is missing in it.
        """
        try:
            theirs, ours = manifest["config"], self.config.to_json()
            for key in ours.keys() - MAY_CHANGE:
                if theirs.get(key) != ours[key]:
                    problem = f"{shown(path)}: {key} was {theirs.get(key)!r:.200}, now {ours[key]!r:.200}"
                    raise UsageError(problem, "resume with the options of the run, or another --out")
            if manifest["data"].get("sha256") != self.data.card.get("sha256"):
                problem = f"{shown(path)}: the run was started on other data"
                raise UsageError(problem, "resume with the same --data, or another --out")
            self.net.load_state_dict(parts["network.safetensors"])
            named = dict(self.net.named_parameters())
            for width in self.ema:
                average = parts[_ema_file(width)]
                self.ema[width] = {name: average[name].to(p) for name, p in named.items()}
            moments = parts[OPTIMISER]
            for name, p in named.items():
                if f"{name}.step" in moments:
                    self.optimiser.state[p] = {
                        "step": moments[f"{name}.step"].to(p.device),
                        **{
                            key: torch.empty_like(p, requires_grad=False).copy_(moments[f"{name}.{key}"])
                            for key in MOMENTS
                        },
                    }
            self.step, self.seconds = int(manifest["step"]), float(manifest["seconds"])
        except (KeyError, AttributeError, TypeError, RuntimeError) as error:
            raise FileError(
                f"{shown(path)}: of another kind ({error!r:.200})", "start anew in another --out"
            ) from error

    def _cut_metrics(self) -> None:
        """Drop the lines after the step that the run continues from."""
        assert self.folder is not None
        path = self.folder / METRICS
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= self.step]
            write_atomic(path, "".join(line + "\n" for line in lines).encode())


def unseen_classes(config: TrainConfig, data: Data) -> list[int]:
    """The classes that a network trained so never sees, by number; len(data.names) for no class."""
    if data.labels is None:
        return []
    shown = set() if config.drop == 1 else set(data.labels.unique().tolist())
    if config.drop > 0:
        shown.add(len(data.names))
    return [index for index in range(len(data.names) + 1) if index not in shown]


def _ema_file(width: float) -> str:
    """The file of a checkpoint that has the average of this width."""
    return f"ema-{width:g}.safetensors"


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _synchronised(accelerator: Accelerator, model: Any, last: bool) -> Any:
    """Gradients are exchanged with the last part of a batch only."""
    return torch.enable_grad() if last else accelerator.no_sync(model)
