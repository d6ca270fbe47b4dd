"""The one command that makes the emoji networks, which do not ship any more: train both, write weights and cards.

    python benchmarks/emoji.py [--runs runs] [--only emoji-small] [--note FILE] [--no-train]

Training goes on where an earlier run stopped. The card has data, licences, command, time, loss, ten samples of every
class, and how near the samples come to the training pictures.
"""

# ruff: noqa: E501 (the rows of the card's tables)

import argparse
from pathlib import Path

from networks.shipping import Run, loss_curve, memorisation, palette, train
from PIL import Image

import pfode
from pfode.cli.images import contact_sheet, to_pixels
from pfode.scores.io.shipped import WEIGHTS
from pfode.scores.training.data import emoji

TRAIN = "train --data emoji --process edm --batch 64 --attention 8 --blocks 1,2,2 --amp"
RECIPES = {
    "emoji": f"{TRAIN} --widths 32,96,128 --steps 5200 --schedule constant --cooldown 1100 --warmup 200 --lr 0.001",
    "emoji-small": f"{TRAIN} --widths 16,32,64 --steps 1000 --warmup 100 --lr 0.002",
}


def ship(run: Path, name: str, note: str) -> None:
    """The newest checkpoint as package data, with its card."""
    data = emoji()
    made = Run(run, data)
    config, step = made.config, made.step
    path = made.save(name, RECIPES[name], {})
    licence = f"Apache-2.0 (weights); data: {data.card['licence']}"
    labels = [i % len(data.names) for i in range(10 * len(data.names))]
    out = pfode.sample(pfode.load(name), len(labels), steps=20, label=labels)
    sheet = contact_sheet(to_pixels(out.x), 2, len(data.names))
    palette(Image.fromarray(sheet), WEIGHTS / f"{name}.png")
    loss_curve(made.losses).save(WEIGHTS / f"{name}-loss.png", optimize=True)
    of_samples, of_data, limit, close = memorisation(out.x, data)
    text = f"""# {name}

Emoji, 32x32, colour on white, class-conditional: the nine Unicode groups ({", ".join(data.names)}), and none, for
guidance. EDM process, EDM preconditioning.

| | |
|---|---|
| network | `UNet`: widths {config["network"]["widths"]}, {made.parameters:,} parameters, half precision, {path.stat().st_size:,} bytes |
| data | {len(data.images)} pictures: `pfode train --data emoji`; font sha256 `{data.card["sha256_font"]}`, list sha256 `{data.card["sha256_list"]}` |
| licences | {licence} |
| recipe | denoising score matching, batch {config["batch"]}, {step} steps, Adam, rate {config["rate"]:g}, {config["drop"]:.0%} of the classes hidden, mirror images of all groups but Travel, Objects, Symbols and Flags, average of the weights of width {config["ema"][0]:g} |
| time | {made.seconds / 60:.0f} minutes on a 2-core CPU that was busy with other work |
| loss | {made.loss} (mean of the last 200 steps); around step {made.curve()} |

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
                train(words, run)
            ship(run, name, options.note.read_text() if options.note else "")


if __name__ == "__main__":
    main()
