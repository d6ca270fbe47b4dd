"""One trainer for models of series: survives any kill, and a run that was resumed is the run that was not stopped.

What is drawn depends on the seed and the step only: a checkpoint needs no random state.
"""

import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pfode.checkpoints import checkpoints, read_checkpoint, write_checkpoint
from pfode.errors import FileError, NumericalError, UsageError, integer, number, unknown
from pfode.files import FolderLock, lock_folder, make_folder, shown
from pfode.journal import Journal
from pfode.models.series.data import Series, generator

__all__ = ["Model", "Record", "Trainer", "Training"]

METRICS = "metrics.jsonl"
SCHEDULES = ("constant", "cosine")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Model(Protocol):
    """What can be trained: a torch module that says what it loses on series, and how good it is."""

    def loss(self, series: Series, generator: torch.Generator, progress: float) -> Tensor:
        """The mean loss over the series; `progress` is the share of the training that is done, from 0 to 1."""
        ...

    def metrics(self, series: Series) -> dict[str, float]:
        """Figures by their names."""
        ...


@dataclass(frozen=True)
class Training:
    """How to train: Adam on batches of whole series.

    Args:
        epochs: passes over the data. batch: series in a step. seed: of the order and of all that models draw.
        rate: learning rate. schedule: "constant", or "cosine" down to 0. decay: weight decay (AdamW).
        clip: the gradient's norm is kept to this.

    Raises:
        UsageError: numbers out of range, an unknown schedule.
    """

    epochs: int = 50
    batch: int = 32
    rate: float = 1e-3
    schedule: str = "cosine"
    decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        integer("epochs", self.epochs, 1)
        integer("batch", self.batch, 1)
        integer("seed", self.seed, 0)
        for name in ("rate", "clip"):
            if number(name, getattr(self, name), 0.0) == 0:
                raise UsageError(f"{name}: need a positive number, got 0", f"{name}=1e-3")
        number("decay", self.decay, 0.0)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)


@dataclass(frozen=True)
class Record:
    """A step: its number from 1, epochs done, loss, learning rate, seconds; the figures of the validation part after
    each epoch."""

    step: int
    epoch: float
    loss: float
    rate: float
    seconds: float
    valid: dict[str, float] = field(default_factory=dict)


class Trainer:
    """One run: `for record in trainer.run(): ...`.

    Args:
        model: a module with `loss` and `metrics`, see `Model`; trained in place.
        data: the series to train on, in the units of the model: `Scale.of(data).apply(data)`.
        training: how.
        valid: series that `metrics` is asked about after each epoch.
        folder: for checkpoints and metrics.jsonl; None writes nothing.
        resume: continue from the folder's newest sound checkpoint, or from the start if it has none.
        save_every: steps between checkpoints; one is always written at the end.
        accelerator: an accelerate.Accelerator, for other devices and several processes, which share each batch.

    Raises:
        UsageError: nothing to train on; a folder that holds another run; a run of another model, data or training.
        FileError: every checkpoint of the run that is to be continued is damaged.
        NumericalError: while running: the loss is not finite.
        WriteError: the folder cannot be written.
    """

    def __init__(
        self,
        model: Any,
        data: Series,
        training: Training = Training(),
        *,
        valid: Series | None = None,
        folder: str | os.PathLike[str] | None = None,
        resume: bool = False,
        save_every: int = 200,
        accelerator: Any = None,
    ):
        if not isinstance(model, torch.nn.Module) or not hasattr(model, "loss") or not hasattr(model, "metrics"):
            raise UsageError(
                f"model: need a module with loss and metrics, got {type(model).__name__}", "NeuralCDE(...)"
            )
        if not isinstance(data, Series) or not len(data):
            raise UsageError("data: need series to train on", "read(table).split([0.8, 0.2])[0]")
        self.model, self.data, self.training, self.valid = model, data, training, valid
        self.save_every, self.accelerator = integer("save_every", save_every, 1), accelerator
        self.rank, self.processes = 0, 1
        wrapped: Any = _Losses(model)
        if accelerator is not None:
            self.rank, self.processes = accelerator.process_index, accelerator.num_processes
            wrapped = accelerator.prepare_model(wrapped)
        self.losses = wrapped
        self.device = next(model.parameters()).device
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=training.rate, weight_decay=training.decay)
        self.step = 0
        self.folder = None if folder is None else Path(folder)
        self.metrics = None if folder is None else Journal(Path(folder) / METRICS, "a training run's", "remove it")
        self._locked = FolderLock(None)
        if self.folder is not None:
            make_folder(self.folder)
            self._locked = lock_folder(self.folder) if self.rank == 0 else self._locked
            try:
                self._open(self.folder, resume)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Let other runs into the folder."""
        self._locked.close()

    @property
    def each(self) -> int:
        """Steps in an epoch."""
        return -(-len(self.data) // self.training.batch)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.each * self.training.epochs

    def run(self) -> Iterator[Record]:
        """Train to the end, a record for each step; checkpoints are written before the record is handed out."""
        while self.step < self.steps:
            began, rate = time.perf_counter(), self._rate()
            loss = self._advance(rate)
            self.step += 1
            valid = {}
            if self.valid is not None and self.step % self.each == 0:
                valid = self.evaluate(self.valid)
            record = Record(self.step, self.step / self.each, loss, rate, time.perf_counter() - began, valid)
            if self.rank == 0 and self.metrics is not None:
                self.metrics.add({**asdict(record), "seconds": round(record.seconds, 4)}, sync=False)
            if self.folder is not None and (self.step % self.save_every == 0 or self.step == self.steps):
                self.save()
            yield record

    def evaluate(self, series: Series) -> dict[str, float]:
        """The model's figures on some series, in evaluation mode."""
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            found: dict[str, float] = self.model.metrics(series.to(self.device))  # type: ignore[operator]
        self.model.train(training)
        return {name: float(value) for name, value in found.items()}

    def _rate(self) -> float:
        training = self.training
        if training.schedule == "constant":
            return training.rate
        return training.rate * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))

    def _batch(self) -> Series:
        """The series of a step: each epoch has all of them once, in an order of its own."""
        seed, (epoch, at) = self.training.seed, divmod(self.step, self.each)
        order = torch.randperm(len(self.data), generator=generator("epoch", seed, epoch), device="cpu")
        places = order[at * self.training.batch : (at + 1) * self.training.batch]
        mine = places[self.rank :: self.processes]
        return self.data[mine if len(mine) else places[:1]].to(self.device)

    def _advance(self, rate: float) -> float:
        self.model.train()
        drawn = generator("step", self.training.seed, self.step, self.rank)
        loss = self.losses(self._batch(), drawn, self.step / self.steps)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NumericalError(f"training: the loss is {value} at step {self.step + 1}", "a smaller rate=")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward() if self.accelerator is None else self.accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        return value

    def save(self) -> Path | None:
        """Write a checkpoint, whole or not at all, and drop all but the newest two.

        Raises:
            UsageError: the run has no folder. WriteError: it cannot be written.
        """
        if self.folder is None:
            raise UsageError("this run has no folder for checkpoints", 'Trainer(..., folder="run")')
        final = None
        if self.rank == 0:
            named, state = dict(self.model.named_parameters()), self.optimiser.state
            moments = {f"{name}.{key}": value for name, p in named.items() for key, value in state.get(p, {}).items()}
            parts = {"model.safetensors": _whole(self.model.state_dict()), "optimiser.safetensors": _whole(moments)}
            manifest = {"step": self.step, "training": asdict(self.training), "data": _digest(self.data)}
            final = write_checkpoint(self.folder, self.step, manifest, parts)
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
        return final

    def _open(self, folder: Path, resume: bool) -> None:
        """Continue the run that the folder holds."""
        found = checkpoints(folder)
        if found and not resume:
            raise UsageError(f"{shown(folder)} already holds a run ({found[0].name})", "resume=True, or another folder")
        damaged: list[FileError] = []
        for path in found:
            try:
                manifest, parts = read_checkpoint(path)
            except FileError as error:
                damaged.append(error)
                continue
            self._restore(path, manifest, parts)
            break
        else:
            if damaged:
                problem = f"{shown(folder)}: every checkpoint is damaged: {damaged[0].message}"
                raise FileError(problem, "bring one back from a copy, or start anew in another folder")
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
        if self.rank == 0 and self.metrics is not None:
            for stale in folder.glob(".step-*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)
            self.metrics.rewrite(line for line in self.metrics.read() if line["step"] <= self.step)

    def _restore(self, path: Path, manifest: dict[str, Any], parts: dict[str, dict[str, Tensor]]) -> None:
        """Continue from a checkpoint: bit for bit the run that wrote it.

        Raises:
            UsageError: it is of a run with other data or another training. FileError: of another model.
        """
        if manifest.get("data") != _digest(self.data):
            raise UsageError(f"{shown(path)}: the run was started on other series", "the same data, or another folder")
        for name, value in asdict(self.training).items():
            before = manifest.get("training", {}).get(name)
            if before != value and not (name == "epochs" and self.training.schedule == "constant"):
                raise UsageError(f"{shown(path)}: {name} was {before!r}, now {value!r}", "the same training")
        try:
            self.model.load_state_dict(parts["model.safetensors"])
            moments = parts["optimiser.safetensors"]
            for name, p in self.model.named_parameters():
                if f"{name}.step" in moments:
                    kept = {key: moments[f"{name}.{key}"] for key in MOMENTS}
                    self.optimiser.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in kept.items()}
            self.step = int(manifest["step"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FileError(f"{shown(path)}: of another model ({error!r:.200})", "start in another folder") from error


class _Losses(torch.nn.Module):
    """A model's loss as a forward pass, which is what runs on several devices."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, series: Series, drawn: torch.Generator, progress: float) -> Tensor:
        return self.model.loss(series, drawn, progress)  # type: ignore[operator]


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory."""
    return {name: value.detach().clone() for name, value in tensors.items()}


def _digest(series: Series) -> str:
    """A digest of what there is to train on."""
    made = hashlib.sha256(repr((series.ids, series.channels, series.classes)).encode())
    for part in (series.t, series.x, series.label):
        if part is not None:
            made.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()
