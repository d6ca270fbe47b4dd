"""The likelihoods of some pictures under a model, line by line, with a folder where they are kept and continued."""

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pfode
from pfode.cli.model_option import choose
from pfode.errors import FileError, UsageError
from pfode.files import FolderLock, lock_folder, make_folder, read_file, shown, write_atomic
from pfode.journal import Journal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pfode.denoiser import Denoiser
    from pfode.flow import Likelihood

__all__ = ["Densities", "Line", "auroc", "cells", "heads", "summary"]

RUN, RESULTS = "run.json", "results.jsonl"
MAX_SETTINGS = 10_000_000  # bytes of run.json
OF_THE_RUN = ("label", "guidance", "probes", "rtol", "end", "bins", "draws", "elbo", "seed")
ANEW = "another --out, or --overwrite to start anew"

Line = dict[str, Any]


@dataclass
class Densities:
    """Pictures, the model that says how likely they are, and where it is written.

    Attributes:
        denoiser, model: the denoiser, and its name and digest. options: of the command.
        names, pictures, labels: of the pictures; float (n, ...) in [-1, 1]; classes by number where they are known.
        title: what the run is called in texts and figures. folder: of --out, None without one.
    """

    denoiser: "Denoiser"
    model: dict[str, Any]
    options: dict[str, Any]
    names: list[str]
    pictures: "Tensor"
    labels: list[int] | None
    title: str
    folder: Path | None
    lock: FolderLock | None = field(default=None, repr=False)

    @classmethod
    def of(cls, options: dict[str, Any], model: str, device: "torch.device", folder: Path | None) -> "Densities":
        """The run that options ask for.

        Raises:
            PfodeError: a model or pictures that cannot be read, or do not fit together.
        """
        chosen = choose(model, "MODEL")
        denoiser = chosen.guided
        if hasattr(denoiser, "to"):
            denoiser = denoiser.to(device)  # type: ignore[attr-defined]
        names, pictures, labels = read_pictures(options, denoiser)
        probes = options["probes"]
        if probes != "exact" and not (probes.isdecimal() and 0 < int(probes) < 10**6):
            raise UsageError(f"--probes: need a number of at least 1, or exact, got {probes!r:.60}", "--probes 4")
        if options["label"] == "all" and not getattr(denoiser, "labels", None):
            raise UsageError("--label all: this model has no classes", "leave --label out")
        data = options["data"] or f"{len(names)} files"
        own = {"name": chosen.name, "digest": chosen.digest}
        return cls(denoiser, own, options, names, pictures, labels, f"{chosen.stem} on {Path(data).name}", folder)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the results."""
        digest = hashlib.sha256(self.pictures.numpy().tobytes()).hexdigest()
        kept = {key: self.options[key] for key in OF_THE_RUN}
        return {"version": pfode.__version__, "model": self.model, "pictures": digest, "options": kept}

    # ---- the folder

    def open(self, overwrite: bool) -> None:
        """Make the folder, or check that it is this run's. For the first process, which then owns it.

        Raises:
            UsageError: another run's folder. FileError: a damaged one. WriteError: it cannot be written.
        """
        if self.folder is None:
            return
        make_folder(self.folder)
        self.lock = lock_folder(self.folder, "run", "wait for it, or another --out")
        settings, path = self.settings, self.folder / RUN
        if overwrite:
            for stale in self._parts():
                stale.unlink()
        elif path.exists():
            try:
                found = json.loads(read_file(path, MAX_SETTINGS, "settings"))
            except ValueError as error:
                raise FileError(f"{shown(path)}: damaged", ANEW) from error
            if not isinstance(found, dict) or {**found, "version": ""} != {**settings, "version": ""}:
                differing = [key for key in settings if key != "version" and found.get(key) != settings[key]]
                raise UsageError(f"{shown(self.folder)} holds a run of another {', '.join(differing)}", ANEW)
        elif any(self._parts()):
            raise FileError(f"{shown(self.folder)}: has {RESULTS}, but no {RUN}", ANEW)
        write_atomic(path, (json.dumps(settings, indent=2) + "\n").encode())

    def close(self) -> None:
        """Let other runs into the folder."""
        if self.lock is not None:
            self.lock.close()

    def _parts(self) -> list[Path]:
        return [] if self.folder is None else sorted(self.folder.glob("results*.jsonl"))

    def _journal(self, name: str) -> Journal:
        assert self.folder is not None
        return Journal(self.folder / name, "a run of pfode likelihood", ANEW)

    def kept(self) -> dict[int, Line]:
        """The lines that are there, by the number of their picture."""
        lines = [line for part in self._parts() for line in self._journal(part.name).read(skip=True)]
        return {
            line["number"]: line for line in lines if "nats" in line and line.get("number") in range(len(self.names))
        }

    def todo(self) -> list[int]:
        """The numbers of the pictures that have no line."""
        kept = self.kept()
        return [i for i in range(len(self.names)) if i not in kept]

    def finish(self, made: list[Line]) -> list[Line]:
        """All lines in order, in one file where there is a folder."""
        every = {**self.kept(), **{line["number"]: line for line in made}}
        lines = [every[i] for i in sorted(every)]
        if self.folder is not None:
            self._journal(RESULTS).rewrite(lines)
            for part in self._parts():
                if part.name != RESULTS:
                    part.unlink()
        return lines

    # ---- the work

    def add(self, numbers: list[int], rank: int) -> list[Line]:
        """The lines of some pictures, written as they are made."""
        lines = self._evaluate(numbers)
        if self.folder is not None:
            journal = self._journal(RESULTS if rank == 0 else f"results.{rank}.jsonl")
            for line in lines:
                journal.add(line, sync=False)
        return lines

    def _evaluate(self, numbers: list[int]) -> list[Line]:
        x, label = self.pictures[numbers], self.options["label"]
        classes = self.denoiser.labels if label == "all" else None  # type: ignore[attr-defined]
        found = [self._under(x, numbers, name) for name in (range(len(classes)) if classes else [label])]
        lines = []
        for k, number in enumerate(numbers):
            line: Line = {"number": number, "picture": self.names[number]}
            lost = [one.failed[k] for one in found if k in one.failed]
            if lost:
                lines.append({**line, "failed": lost[0]})
                continue
            line |= _figures(found[0], k)
            if classes:
                line |= _by_bayes([float(one.nats[k]) for one in found], classes, x[0].numel())
                line |= {"nfe": sum(int(one.nfe[k]) for one in found)}
                line |= {} if self.labels is None else {"label": classes[self.labels[number]]}
            lines.append(line)
        return lines

    def _under(self, x: "Tensor", numbers: list[int], label: Any) -> "Likelihood":
        """The likelihood of pictures under a class: the same probes and noise under each."""
        o = self.options
        seeds = None if o["seed"] is None else [o["seed"] + i for i in numbers]
        how: dict[str, Any] = {"label": label, "guidance": o["guidance"], "bins": o["bins"], "end": o["end"]}
        how |= {"seeds": seeds, "batch": o["batch"], "throw": False}
        import torch

        with torch.no_grad():
            if o["elbo"] is not None:
                return pfode.elbo(self.denoiser, x, levels=o["elbo"], **how)
            trace = "exact" if o["probes"] == "exact" else pfode.flow.Hutchinson(int(o["probes"]))
            return pfode.log_likelihood(self.denoiser, x, divergence=trace, rtol=o["rtol"], draws=o["draws"], **how)


def _figures(found: "Likelihood", k: int) -> Line:
    """What a line says of a picture."""
    stderr = float(found.stderr[k])
    return {
        "bits_per_dim": float(found.bits_per_dim[k]),
        "nats": float(found.nats[k]),
        "stderr": stderr if math.isfinite(stderr) else None,
        "parts": {name: float(value[k]) for name, value in found.parts.items()},
        "nfe": int(found.nfe[k]),
        "products": int(found.products[k]),
        "steps": int(found.steps[k]),
        "end": found.end,
        "bins": round(2 / found.width) + 1 if found.width else None,
        "prior": found.prior,
    }


def _by_bayes(nats: list[float], classes: Sequence[str], d: int) -> Line:
    """p(class | x) where every class is as frequent, and the nats of the mixture of all."""
    top = max(nats)
    total = top + math.log(sum(math.exp(one - top) for one in nats))
    mixture = total - math.log(len(nats))
    best = max(range(len(nats)), key=nats.__getitem__)
    return {
        "nats": mixture,
        "bits_per_dim": -mixture / (d * math.log(2)),
        "class": classes[best],
        "probability": math.exp(nats[best] - total),
        "probabilities": {name: math.exp(one - total) for name, one in zip(classes, nats, strict=True)},
    }


def read_pictures(options: dict[str, Any], denoiser: "Denoiser") -> "tuple[list[str], Tensor, list[int] | None]":
    """Names, pictures in [-1, 1] and classes, where the data's are those of the model.

    Raises:
        UsageError: a model of no pictures, or data of another shape. FileError: broken ones.
    """
    import torch

    from pfode.cli.images import from_picture
    from pfode.scores.io.pictures import read_picture
    from pfode.scores.training.data import load_data

    shape = tuple(getattr(denoiser, "shape", None) or ())
    if len(shape) != 3:
        raise UsageError(
            f"MODEL: of samples of shape {shape}: no pictures", "pfode.log_likelihood(...) takes any shape"
        )
    if options["pictures"]:
        names = list(options["pictures"])[: options["n"]]
        x = torch.stack([from_picture(name, read_picture(name), shape) for name in names])
        return names, x.float(), None
    data = load_data(options["data"], size=shape[-1])
    if tuple(data.images.shape[1:]) != shape:
        raise UsageError(f"--data: pictures of shape {tuple(data.images.shape[1:])}, the model has {shape}")
    images = data.images[: options["n"]]
    same = data.labels is not None and tuple(getattr(denoiser, "labels", None) or ()) == tuple(data.names)
    labels = data.labels[: options["n"]].tolist() if same and data.labels is not None else None
    stem = Path(options["data"]).stem
    return [f"{stem}-{i:05d}" for i in range(len(images))], images.float() / 127.5 - 1, labels


def summary(run: Densities, lines: list[Line]) -> Line:
    """The means over pictures, with the standard error of the first."""
    bits = [line["bits_per_dim"] for line in lines]
    found: Line = {
        "model": run.model["name"],
        "n": len(lines),
        "bits_per_dim": statistics.fmean(bits),
        "standard_error": statistics.stdev(bits) / math.sqrt(len(bits)) if len(bits) > 1 else 0.0,
        **{key: statistics.fmean(line[key] for line in lines) for key in ("nats", "nfe", "products")},
        **{key: lines[0][key] for key in ("end", "bins", "prior")},
        "parts": {name: statistics.fmean(line["parts"][name] for line in lines) for name in lines[0]["parts"]},
    }
    if "label" in lines[0]:
        found["accuracy"] = statistics.fmean(line["class"] == line["label"] for line in lines)
    return found


def auroc(first: list[float], second: list[float]) -> float:
    """P(a > b) + P(a = b) / 2 for a of the first and b of the second: the area under the curve of the two."""
    ranks: dict[float, float] = {}
    every = sorted([*first, *second])
    start = 0
    while start < len(every):
        stop = start
        while stop < len(every) and every[stop] == every[start]:
            stop += 1
        ranks[every[start]] = 0.5 * (start + stop + 1)
        start = stop
    wins = sum(ranks[one] for one in first) - len(first) * (len(first) + 1) / 2
    return wins / (len(first) * len(second))


def heads(line: Line) -> list[str]:
    """The heads of the columns of `cells`."""
    return ["picture", "bits/dim", "+-", "nats", *(["class", "p"] if "class" in line else [])]


def cells(line: Line) -> list[str]:
    """A line as cells of a table; the standard error is that of the bits per dimension."""
    per_nat = abs(line["bits_per_dim"] / line["nats"]) if line["nats"] else 0.0
    error = "-" if line["stderr"] is None else f"{line['stderr'] * per_nat:.4f}"
    more = [line["class"], f"{line['probability']:.4f}"] if "class" in line else []
    return [line["picture"], f"{line['bits_per_dim']:.4f}", error, f"{line['nats']:.2f}", *more]
