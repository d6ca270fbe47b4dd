"""What the recipes of the shipped networks share: training by one resumable command, weights, card and pictures."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import pfode
from pfode.checkpoints import checkpoints, read_checkpoint
from pfode.cli.images import contact_sheet, to_pixels
from pfode.process import from_config
from pfode.samplers.measure.metrics import energy_distance
from pfode.scores.io.shipped import WEIGHTS
from pfode.scores.networks.unet import UNet, UNetConfig
from pfode.scores.styles import bank_of
from pfode.scores.training.data import Data

__all__ = ["Run", "distances", "loss_curve", "memorisation", "nearest_sheet", "obeyed", "palette", "train"]

QUANTILES = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
FEW, MANY = 300, 2000  # training pictures: whose nearest other one is found, and that samples are compared with


class Run:
    """The newest checkpoint of a training run: its denoiser, losses and card."""

    def __init__(self, folder: Path, data: Data, width: float | None = None):
        self.manifest, parts = read_checkpoint(checkpoints(folder)[0])
        self.config: dict[str, Any] = self.manifest["config"]
        network = UNetConfig.from_json(self.config["network"])
        weights = dict(parts[f"ema-{width or self.config['ema'][0]:g}.safetensors"])
        if data.styles is not None:
            bank = bank_of(data.styles)
            network, weights["style.bank"] = replace(network, bank=len(bank)), bank
        net = UNet(network)
        net.load_state_dict(weights)
        self.denoiser = pfode.scores.Denoiser(
            net.eval(),
            from_config(self.config["process"]),
            self.config["prediction"],
            sigma_data=self.config["sigma_data"],
            shape=data.shape,
            labels=data.names,
        )
        self.step, self.seconds = int(self.manifest["step"]), float(self.manifest["seconds"])
        self.parameters = sum(p.numel() for p in net.parameters())
        self.levels = [float(f"{value:.3g}") for value in parts["levels.safetensors"]["mean"].tolist()]
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        self.losses = [json.loads(line)["loss"] for line in lines][: self.step]

    @property
    def loss(self) -> float:
        """The mean loss of the last 200 steps."""
        return round(sum(self.losses[-200:]) / len(self.losses[-200:]), 4)

    def curve(self) -> str:
        """The loss around some steps, in words."""
        points = [s for s in (100, 200, 500, 1000, 2000, 3000, 4000, 5000, 8000) if s < self.step] + [self.step]
        means = [(s, self.losses[max(0, s - 100) : s]) for s in points]
        return ", ".join(f"{s}: {sum(part) / len(part):.3f}" for s, part in means if part)

    def save(self, name: str, command: str, recommended: dict[str, Any], width: float | None = None) -> Path:
        """Write the weights as package data."""
        card = {
            "name": name,
            "data": self.manifest["data"],
            "training": {**self.config, "step": self.step, "seconds": round(self.seconds, 1)},
            "licence": f"Apache-2.0 (weights); data: {self.manifest['data'].get('licence', 'unknown')}",
            "loss": self.loss,
            "loss_by_level": self.levels,
            "machine": "one thread of a 2-core CPU that was busy with other work",
            "command": f"pfode {command}",
            "recommended": recommended,
        }
        if width is not None:
            card["ema"] = width
        return pfode.scores.save(self.denoiser, WEIGHTS / f"{name}.safetensors", card=card)


def train(words: str, run: Path) -> None:
    """Train to the end by the command line; a run that was stopped goes on."""
    command = [sys.executable, "-m", "pfode.cli", *words.split(), "--out", str(run)]
    subprocess.run(command + ["--resume"] * (run / "metrics.jsonl").is_file(), check=True)


def rows(images: Tensor) -> Tensor:
    """Pictures as vectors in [-1, 1]."""
    return images.float().flatten(1) / 127.5 - 1


def quantiles(values: Tensor) -> str:
    """Quantiles 5, 25, 50, 75, 95 % in words."""
    return ", ".join(f"{q:.3f}" for q in values.quantile(QUANTILES).tolist())


def near(x: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """RMS distance per value of each row of x to the nearest picture, and its number."""
    best = [torch.cdist(x, part).min(1) for part in pictures.split(4000)]
    distance, where = torch.stack([b.values for b in best]), torch.stack([b.indices for b in best])
    lowest = distance.argmin(0, keepdim=True)
    index = where.gather(0, lowest)[0] + 4000 * lowest[0]
    return distance.amin(0) / x.shape[1] ** 0.5, index


def memorisation(samples: Tensor, data: Data, mirrored: bool = True) -> tuple[str, str, float, int]:
    """RMS distances per value to the nearest training picture: of samples, of 300 training pictures to the others.

    Args:
        mirrored: whether mirror images count as training pictures.

    Returns:
        both quantile lines, the 5 % quantile among training pictures, and how many samples lie closer than it.
    """
    pictures = rows(data.images)
    both = torch.cat([pictures, rows(data.images.flip(-1))]) if mirrored else pictures
    of_samples, _ = near(samples.clamp(-1, 1).flatten(1), both)
    some = torch.arange(0, len(pictures), max(1, len(pictures) // FEW), device="cpu")
    among = torch.cdist(pictures[some], both)
    for copy in range(len(both) // len(pictures)):  # not to itself, nor to its mirror image
        among[torch.arange(len(some)), some + copy * len(pictures)] = torch.inf
    others = among.amin(1) / pictures.shape[1] ** 0.5
    limit = others.quantile(0.05).item()
    return quantiles(of_samples), quantiles(others), limit, int((of_samples < limit).sum())


def distances(samples: Tensor, held: Data, data: Data) -> str:
    """Energy distances to the training set, of samples and of as many held-out pictures, with their intervals."""
    trained = rows(data.images[:: max(1, len(data) // MANY)])
    found = []
    for x in (samples.clamp(-1, 1).flatten(1), rows(held.images[:: max(1, len(held) // len(samples))][: len(samples)])):
        value, low, high = energy_distance(x, trained)
        found.append(f"{value:.2f} ({low:.2f} to {high:.2f})")
    return f"| energy distance to {len(trained)} training pictures: samples / held-out | {found[0]} / {found[1]} |"


def obeyed(samples: Tensor, labels: list[int], data: Data) -> str:
    """How many samples lie nearest to a training picture of the class that they were drawn for, in words."""
    assert data.labels is not None
    _, index = near(samples.clamp(-1, 1).flatten(1), rows(data.images))
    right = int((data.labels[index] == torch.tensor(labels, device="cpu")).sum())
    return f"| samples whose nearest training picture is of their class | {right} of {len(samples)} |"


def nearest_sheet(samples: Tensor, data: Data, columns: int = 10) -> Image.Image:
    """Rows of samples, each above a row of the training pictures that are nearest to them."""
    _, index = near(samples.clamp(-1, 1).flatten(1), rows(data.images))
    found = data.images[index].float() / 127.5 - 1
    parts = [torch.cat([samples[i : i + columns], found[i : i + columns]]) for i in range(0, len(samples), columns)]
    return Image.fromarray(contact_sheet(to_pixels(torch.cat(parts)), 2, columns))


def palette(sheet: Image.Image, path: Path) -> None:
    """Write a sheet in 256 colours."""
    few = sheet.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def loss_curve(losses: list[float]) -> Image.Image:
    """The mean of every 20 steps, loss on a logarithmic axis."""
    width, height, left, below = 520, 240, 48, 24
    means = [sum(losses[i : i + 20]) / len(losses[i : i + 20]) for i in range(0, len(losses), 20)]
    high, low = math.log(max(means)), math.log(min(means) * 0.9)
    out = Image.new("RGB", (left + width + 12, height + below + 8), "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(11)

    def place(step: float, loss: float) -> tuple[float, float]:
        return left + width * step / len(losses), 4 + height * (high - math.log(loss)) / (high - low)

    for loss in (1.0, 0.5, 0.3, 0.2, 0.15, 0.1, 0.07):
        if low < math.log(loss) < high:
            y = place(0, loss)[1]
            draw.line([(left, y), (left + width, y)], fill="#dddddd")
            draw.text((8, y - 6), f"{loss:g}", fill="black", font=font)
    for step in range(0, len(losses) + 1, max(200, len(losses) // 500 * 100)):
        draw.text((place(step, 1)[0] - 8, height + 10), str(step), fill="black", font=font)
    draw.line([place(20 * i + 10, mean) for i, mean in enumerate(means)], fill="#1f4fbf", width=2)
    return out
