"""A training run: optimiser, averages, metrics, checkpoints; survives any kill and resumes bit for bit.

What is drawn is a function of the seed and the position (see `batches`), so that neither the number of processes nor
an interruption changes it, and a checkpoint needs no random state.
"""

import contextlib
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pfode._torch import has_tiles
from pfode.checkpoints import checkpoints, read_checkpoint, write_checkpoint
from pfode.errors import FileError, MissingError, NumericalError, PfodeError, UsageError, did_you_mean, unknown
from pfode.files import FolderLock, lock_folder, make_folder, shown
from pfode.journal import Journal
from pfode.optional import optional_module
from pfode.scores.denoiser import Denoiser
from pfode.scores.io.save import save
from pfode.scores.io.shipped import SELF_CONTAINED
from pfode.scores.networks.mlp import MLPConfig
from pfode.scores.networks.unet import UNet, UNetConfig
from pfode.scores.styles import bank_of
from pfode.scores.training.averages import average
from pfode.scores.training.balance import Balance
from pfode.scores.training.batches import Batch, unseen_classes
from pfode.scores.training.clock import Clock
from pfode.scores.training.config import TrainConfig
from pfode.scores.training.dataset import Data
from pfode.scores.training.evaluate import mean_loss
from pfode.scores.training.points import Points

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["METRICS", "Record", "TrainConfig", "Trainer", "fast_bfloat16"]

METRICS = "metrics.jsonl"
OPTIMISER, LEVELS = "optimiser.safetensors", "levels.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
MAY_CHANGE = {"steps", "cooldown"}  # when a run is resumed: it may be made longer or shorter


@dataclass(frozen=True)
class Record:
    """One optimiser step: its number from 1, the loss over the batch, the learning rate, pictures per second."""

    step: int
    loss: float
    rate: float
    images_per_second: float


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
        held_out: pictures that are not trained on, for `held_out_loss`.
        card: JSON for the model that every checkpoint holds: name, licence, command.

    Raises:
        UsageError: network and data do not fit, or the folder holds another run, or one is working in it.
        FileError: every checkpoint of the run that is to be continued is damaged.
        NumericalError: while running: the loss is not finite.
        WriteError: the folder cannot be written.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data | Points,
        folder: str | os.PathLike[str] | None = None,
        *,
        resume: bool = False,
        save_every: int = 500,
        device: str | None = None,
        trackers: tuple[str, ...] = (),
        held_out: Data | None = None,
        card: Mapping[str, Any] | None = None,
    ):
        _check_fit(config, data)
        self.config, self.data, self.save_every = config, data, save_every
        self.held_out, self.card = held_out, dict(card or {})
        self.accelerator, self.trackers = _accelerator(device, trackers), bool(trackers)
        processes, part = self.accelerator.num_processes, config.batch // config.accum
        if part % processes:
            parts = f"training: batch: {config.batch} in {config.accum} parts"
            raise UsageError(f"{parts} cannot be split over {processes} processes", f"a multiple of {processes}")
        self.share, self.first = part // processes, self.accelerator.process_index  # pictures of this process, its rank
        self.batch, self.balance, self.moments = Batch(config, data), Balance(config.batch), _moments(data)
        self.step, self.seconds = 0, 0.0
        torch.manual_seed(config.seed)
        self.net = network(config)
        self.model: Any = self.accelerator.prepare_model(self.net)
        weights = {name: p.detach() for name, p in self.net.named_parameters()}
        self.ema = {width: {name: value.clone() for name, value in weights.items()} for width in config.ema}
        self.optimiser = torch.optim.AdamW(
            self.net.parameters(), lr=config.rate, betas=(0.9, config.beta2), weight_decay=config.decay, fused=True
        )
        self.den = self._denoiser(self.model)
        config.objective.check(self.den)
        if config.objective.alone and processes > 1:
            raise UsageError(f"objective {type(config.objective).__name__}: trains in one process, not in {processes}")
        self.folder = None if folder is None else Path(folder)
        self.metrics = None if folder is None else Journal(Path(folder) / METRICS, "a training run's", "remove it")
        self.damaged: list[FileError] = []  # checkpoints that were passed over
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

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Begin from the weights of a network of this kind, in the averages too, instead of random ones.

        Raises:
            UsageError: weights of another network.
        """
        try:
            self.net.load_state_dict(weights)
        except RuntimeError as error:
            raise UsageError(f"begin: weights of another network: {str(error)[:200]}") from error
        named = dict(self.net.named_parameters())
        self.ema = {width: {name: p.detach().clone() for name, p in named.items()} for width in self.ema}

    def run(self, budget: float | None = None) -> Iterator[Record]:
        """Train to the end, one record per optimiser step; checkpoints are written before the record is handed out.

        Args:
            budget: seconds of training in all, those of earlier processes counted in; the number of steps then follows
                from the measured speed, again and again, and `config.steps` is what it was at last.
        """
        clock = None if budget is None else Clock(budget, self.step, self.seconds)
        while self.step < self.config.steps:
            started = time.perf_counter()
            if clock is not None:
                self._schedule(clock.steps(self.step, self.seconds))
            loss, rate = self._advance(), self.rate(self.step)
            self.step += 1
            elapsed = time.perf_counter() - started
            self.seconds += elapsed
            record = Record(self.step, loss, rate, self.config.batch / elapsed)
            self._log(record)
            if self.folder is not None and (self.step % self.save_every == 0 or self.step == self.config.steps):
                self.save()
            yield record

    def _schedule(self, steps: int | None) -> None:
        """Make the run this long, and a cooldown as large a share of it as before; None leaves it."""
        if steps is not None and self.accelerator.num_processes == 1:
            cooldown = round(self.config.cooldown * steps / self.config.steps)
            self.config = replace(self.config, steps=steps, cooldown=cooldown)

    def rate(self, step: int) -> float:
        """The learning rate of a step from 0."""
        config = self.config
        warm = min(1.0, (step + 1) / (config.warmup + 1))
        if config.schedule == "constant":
            return config.rate * min(warm, (config.steps - step) / max(config.cooldown, 1))
        return config.rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))

    def denoiser(self, width: float | None = None) -> Denoiser:
        """A denoiser with the averaged weights (the first width by default), in evaluation mode; a copy."""
        weights = dict(self.ema[self.config.ema[0] if width is None else width])
        config = self.config
        if isinstance(config.network, UNetConfig) and self.data.styles is not None:
            bank = bank_of(self.data.styles)
            config = replace(config, network=replace(config.network, bank=len(bank)))
            weights["style.bank"] = bank
        net = network(config).to(self.accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        net.load_state_dict(weights)
        return self._denoiser(net.eval().requires_grad_(False))

    def held_out_loss(self) -> tuple[float, float] | None:
        """The loss of the first average on pictures that were not trained on, and on as many that were; None without.

        The draws are the same every time: see `pfode.scores.training.evaluate`.
        """
        if self.held_out is None:
            return None
        den, device = self.denoiser(), self.accelerator.device
        held, trained = (mean_loss(den, self.config, part, device) for part in (self.held_out, self.data))
        return held, trained

    def levels(self) -> list[dict[str, float]]:
        """The running mean loss by noise level: {"from", "to": sigma/alpha, "loss"}, from low noise to high."""
        return self.balance.table(self.batch)

    def export(self, path: str | os.PathLike[str], card: dict[str, Any], width: float | None = None) -> Path:
        """Write the model of `denoiser(width)` as one safetensors file; see `pfode.scores.io.save.save`."""
        training = {**self.config.to_json(), "step": self.step, "seconds": round(self.seconds, 1)}
        den = self.denoiser(width).to("cpu")
        if not all(value.isfinite().all() for value in den.net.state_dict().values()):
            raise NumericalError("training: the averaged weights are not finite", "a smaller --lr")
        return save(den, path, card={"data": self.data.card, "training": training, **card})

    def _denoiser(self, network: Any) -> Denoiser:
        return Denoiser(
            network,
            self.batch.process,
            self.config.prediction,
            sigma_data=self.config.sigma_data,
            shape=self.data.shape,
            labels=self.data.names or None,
            unseen=unseen_classes(self.config, self.data),
            bins=self.data.card.get("levels", 256) if isinstance(self.data, Data) else None,
            moments=self.moments,
        )

    def _advance(self) -> float:
        """One optimiser step; returns the loss over the whole batch."""
        torch.manual_seed(hash((self.config.seed, self.step, self.first)))  # only dropout inside the network uses it
        self.model.train()
        parts = [self._learn(part) for part in range(self.config.accum)]
        sums: Any = self.accelerator.reduce(torch.stack(parts).sum(0), reduction="sum")
        loss = float(sums.sum()) / self.config.batch
        if not math.isfinite(loss):
            problem = f"training: the loss is {loss} at step {self.step + 1}"
            raise NumericalError(problem, "a smaller --lr, or a longer --warmup")
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(self.step)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        average(self.ema, self.net, self.step)
        self.balance.update(sums)
        return loss

    def _learn(self, part: int) -> Tensor:
        """Add the gradient of this process's share of one part of the batch; its losses summed by stratum of levels."""
        config, device = self.config, self.accelerator.device
        start = part * (config.batch // config.accum) + self.first * self.share
        indices = range(start, start + self.share)
        example = self.batch.example(self.step, indices)
        last = part == config.accum - 1  # the processes exchange their gradients with the last part only
        together = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
        with together, torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            losses = config.objective.loss(self.den, example, device).reshape(self.share, -1).mean(dim=1)
            weighed = losses * self.balance.weights(indices).to(losses) if config.balance else losses
            self.accelerator.backward(weighed.mean() / config.accum)
        return self.balance.sums(indices, losses.detach())

    def _log(self, record: Record) -> None:
        if self.trackers:
            self.accelerator.log({"loss": record.loss, "rate": record.rate}, step=record.step)
        if self.main and self.metrics is not None:
            line = {
                "step": record.step,
                "loss": float(f"{record.loss:.6g}"),
                "rate": float(f"{record.rate:.4g}"),
                "images_per_second": round(record.images_per_second, 1),
            }
            self.metrics.add(line, sync=False)

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
        parts[LEVELS] = {"mean": self.balance.mean}
        parts |= {_ema_file(width): average for width, average in self.ema.items()}
        state = self.optimiser.state
        parts[OPTIMISER] = {f"{name}.{key}": v for name, p in named.items() for key, v in state.get(p, {}).items()}
        manifest: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "config": self.config.to_json(),
            "data": self.data.card,
        }
        final = write_checkpoint(self.folder, self.step, manifest, parts, self._model)
        self.accelerator.wait_for_everyone()
        return final

    def _model(self, folder: Path) -> None:
        """Put the model as it is now into a checkpoint, so that a run can be looked at before its end."""
        with contextlib.suppress(NumericalError, UsageError):  # weights too large for half precision
            self.export(folder / SELF_CONTAINED, self.card)

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
        optional_module("accelerate.utils", "training").broadcast_object_list(problem)
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
            self.balance.mean = parts[LEVELS]["mean"]
            self.step, self.seconds = int(manifest["step"]), float(manifest["seconds"])
        except (KeyError, AttributeError, TypeError, RuntimeError) as error:
            raise FileError(
                f"{shown(path)}: of another kind ({error!r:.200})", "start anew in another --out"
            ) from error

    def _cut_metrics(self) -> None:
        """Drop the lines after the step that the run continues from."""
        assert self.metrics is not None
        if self.step:
            self.metrics.rewrite(line for line in self.metrics.read() if line["step"] <= self.step)
        else:
            self.metrics.remove()


def network(config: TrainConfig) -> torch.nn.Module:
    """A new network of a configuration."""
    return config.network.make() if isinstance(config.network, MLPConfig) else UNet(config.network)


def _moments(data: Data | Points) -> tuple[Tensor, Tensor] | None:
    """Mean and variances of pictures; points are drawn without end."""
    return data.moments() if isinstance(data, Data) else None


def _check_fit(config: TrainConfig, data: Data | Points) -> None:
    """Refuse a network that does not fit the data, and classes that the data do not have.

    Raises:
        UsageError: see above.
    """
    shape = config.network.shape
    if shape != data.shape or config.network.classes != len(data.names):
        network = f"training: a network for {shape} with {config.network.classes} classes"
        raise UsageError(f"{network} does not fit data of {data.shape} with {len(data.names)}")
    if config.flip and isinstance(data, Points):
        raise UsageError("training: flip: points have no mirror images", "flip=()")
    styles = 0 if data.styles is None else data.styles.shape[1]
    if getattr(config.network, "styles", 0) != styles:
        raise UsageError(
            f"training: a network for {getattr(config.network, 'styles', 0)} numbers of style, data with {styles}"
        )
    for name in config.flip:
        if name != "*" and name not in data.names:
            raise UsageError(f"training: flip: no class {name!r:.60}", did_you_mean(name, ("*", *data.names)))


def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device computes faster in bfloat16: CPUs with tile instructions (AMX), and GPUs that have it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and has_tiles()


def _accelerator(device: str | None, trackers: tuple[str, ...]) -> "Accelerator":
    """accelerate's helper for devices and processes, with its trackers.

    Raises:
        UsageError: an unknown tracker. MissingError: its package is not installed, or accelerate is not.
    """
    accelerate = optional_module("accelerate", "training")
    known = sorted(str(kind) for kind in accelerate.utils.LoggerType if str(kind) != "all")
    for name in trackers:
        if name not in known:
            raise unknown("tracker", name, known)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*log_with")
        try:
            accelerator = accelerate.Accelerator(cpu=device == "cpu", log_with=list(trackers) or None)
        except UserWarning as error:  # accelerate goes on without a tracker whose package is not there
            raise MissingError(f"trackers {', '.join(trackers)}: {error}", "pip install their packages") from error
    if trackers:
        accelerator.init_trackers("pfode")
    return accelerator


def _ema_file(width: float) -> str:
    """The file of a checkpoint that has the average of this width."""
    return f"ema-{width:g}.safetensors"
