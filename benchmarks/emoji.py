"""The one command that makes the shipped emoji networks: train both, then write weights, sheet and model card.

    python benchmarks/emoji.py [--runs runs] [--only emoji-small] [--note FILE] [--no-train]

Training goes on where an earlier run stopped. The card has data, licences, command, time, loss, ten samples of every
class, and how near the samples come to the training pictures.
"""

# ruff: noqa: E501 (the rows of the card's tables)

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import pfode
from pfode.checkpoints import checkpoints, read_checkpoint
from pfode.cli.images import contact_sheet, to_pixels
from pfode.process import from_config
from pfode.scores.io.shipped import WEIGHTS
from pfode.scores.networks.unet import UNet
from pfode.scores.training.config import TrainConfig
from pfode.scores.training.data import Data, emoji

TRAIN = "train --data emoji --process edm --batch 64 --attention 8 --blocks 1,2,2 --amp"
RECIPES = {
    "emoji": f"{TRAIN} --widths 32,96,128 --steps 5200 --schedule constant --cooldown 1100 --warmup 200 --lr 0.001",
    "emoji-small": f"{TRAIN} --widths 16,32,64 --steps 1000 --warmup 100 --lr 0.002",
}
QUANTILES = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])


def memorisation(samples: torch.Tensor, data: Data) -> tuple[str, str, float, int]:
    """RMS distances per pixel to the nearest training picture or its mirror image: of samples, of training pictures.

    Returns both quantile lines, the 5 % quantile among training pictures, and how many samples lie closer than it.
    """
    pictures = data.images.float().flatten(1) / 127.5 - 1
    mirrored = data.images.flip(-1).float().flatten(1) / 127.5 - 1
    both, root = torch.cat([pictures, mirrored]), pictures.shape[1] ** 0.5
    near = torch.cdist(samples.clamp(-1, 1).flatten(1), both).amin(1) / root
    among = torch.cdist(pictures, both) / root
    own = torch.arange(len(pictures))
    among[own, own] = among[own, own + len(pictures)] = torch.inf
    nearest = among.amin(1)
    lines = [", ".join(f"{q:.3f}" for q in v.quantile(QUANTILES).tolist()) for v in (near, nearest)]
    limit = nearest.quantile(0.05).item()
    return lines[0], lines[1], limit, int((near < limit).sum())


def loss_curve(losses: list[float]) -> Image.Image:
    """The mean of every 20 steps, loss on a logarithmic axis."""
    width, height, left, below = 520, 240, 48, 24
    means = [sum(losses[i : i + 20]) / len(losses[i : i + 20]) for i in range(0, len(losses), 20)]
    high, low = math.log(max(means)), math.log(min(means) * 0.9)
    out = Image.new("RGB", (left + width + 12, height + below + 8), "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(11)

    def place(step: float, loss: float) -> tuple[float, float]:
        return left + width * step / len(losses), 4 + height * (high - math.log(loss)) / (high - low)

    for loss in (1.0, 0.5, 0.3, 0.2, 0.15, 0.1):
        if low < math.log(loss) < high:
            y = place(0, loss)[1]
            draw.line([(left, y), (left + width, y)], fill="#dddddd")
            draw.text((8, y - 6), f"{loss:g}", fill="black", font=font)
    for step in range(0, len(losses) + 1, max(200, len(losses) // 500 * 100)):
        draw.text((place(step, 1)[0] - 8, height + 10), str(step), fill="black", font=font)
    draw.line([place(20 * i + 10, mean) for i, mean in enumerate(means)], fill="#1f4fbf", width=2)
    return out


def ship(run: Path, name: str, note: str) -> None:
    """The newest checkpoint as package data, with its card."""
    manifest, parts = read_checkpoint(checkpoints(run)[0])
    data, config = emoji(), TrainConfig.from_json(manifest["config"])
    net = UNet(config.network)
    net.load_state_dict(parts[f"ema-{config.ema[0]:g}.safetensors"])
    denoiser = pfode.scores.Denoiser(
        net.eval(),
        from_config(config.process),
        config.prediction,
        sigma_data=config.sigma_data,
        shape=tuple(data.images.shape[1:]),
        labels=data.names,
    )
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    step = manifest["step"]
    licence = f"Apache-2.0 (weights); data: {manifest['data']['licence']}"
    card = {
        "name": name,
        "data": manifest["data"],
        "training": {**manifest["config"], "step": step},
        "licence": licence,
        "loss": round(sum(losses[-200:]) / len(losses[-200:]), 4),
        "machine": "2-core CPU",
        "command": f"pfode {RECIPES[name]}",
    }
    path = pfode.scores.save(denoiser, WEIGHTS / f"{name}.safetensors", card=card)
    labels = [i % len(data.names) for i in range(10 * len(data.names))]
    out = pfode.sample(pfode.load(name), len(labels), steps=20, label=labels)
    sheet = contact_sheet(to_pixels(out.x), 2, len(data.names))
    few = Image.fromarray(sheet).quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(WEIGHTS / f"{name}.png", optimize=True)
    loss_curve(losses).save(WEIGHTS / f"{name}-loss.png", optimize=True)
    of_samples, of_data, limit, close = memorisation(out.x, data)
    points = [s for s in (100, 200, 500, 1000, 1500, 2000, 3000, 4000, 5000) if s < step] + [step]
    curve = ", ".join(f"{s}: {sum(losses[max(0, s - 100) : s]) / min(100, s):.3f}" for s in points if s <= len(losses))
    text = f"""# {name}

Emoji, 32x32, colour on white, class-conditional: the nine Unicode groups ({", ".join(data.names)}), and none, for
guidance. EDM process, EDM preconditioning.

| | |
|---|---|
| network | `UNet`: widths {config.network.widths}, {sum(p.numel() for p in net.parameters()):,} parameters, half precision, {path.stat().st_size:,} bytes |
| data | {len(data.images)} pictures: `pfode train --data emoji`; font sha256 `{data.card["sha256_font"]}`, list sha256 `{data.card["sha256_list"]}` |
| licences | {licence} |
| recipe | denoising score matching, batch {config.batch}, {step} steps, Adam, rate {config.rate:g}, {config.drop:.0%} of the classes hidden, mirror images of all groups but Travel, Objects, Symbols and Flags, average of the weights of width {config.ema[0]:g} |
| time | {manifest["seconds"] / 60:.0f} minutes on a 2-core CPU that was busy with other work |
| loss | {card["loss"]} (mean of the last 200 steps); around step {curve} |

    python benchmarks/emoji.py --only {name}

which runs

    pfode {RECIPES[name]}

{note}
![loss by step]({name}-loss.png)

![ten samples of every class]({name}.png)

Every column is a class; 20 steps of the default sampler, seeds 0 to {len(labels) - 1}, no guidance.

Memorisation: root-mean-square distance per pixel (values from -1 to 1) to the nearest training picture or its mirror
image, quantiles 5, 25, 50, 75, 95 %:

| | |
|---|---|
| the {len(labels)} samples to the training pictures | {of_samples} |
| training pictures to the others | {of_data} |
| samples nearer than 5 % of the training pictures are to another ({limit:.3f}) | {close} of {len(labels)} |
"""
    (WEIGHTS / f"{name}.md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the training runs")
    parser.add_argument("--only", choices=RECIPES, help="one of the two")
    parser.add_argument("--note", type=Path, help="a text for the card")
    parser.add_argument("--no-train", action="store_true", help="only write weights and card of what is there")
    options = parser.parse_args()
    for name, words in RECIPES.items():
        if options.only in (None, name):
            run = options.runs / name
            if not options.no_train:
                command = [sys.executable, "-m", "pfode.cli", *words.split(), "--out", str(run)]
                subprocess.run(command + ["--resume"] * (run / "metrics.jsonl").is_file(), check=True)
            ship(run, name, options.note.read_text() if options.note else "")


if __name__ == "__main__":
    main()
