"""The one command that makes the network letters: download the fonts, draw the data, train, write weights and card.

    python benchmarks/letters.py [--runs runs] [--no-train]

Needs `apt-get download` of Debian 12 (250 MB, unpacked, not installed). The training takes about a quarter of an hour of
one core; it goes on where an earlier run stopped. The card has data, licences, command, time, loss, alphabets in
typefaces that do not exist, the training pictures nearest to samples, and distances to the training set.
"""

# ruff: noqa: E501 (the rows of the card's tables)

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from networks.letter_data import GLYPHS, packages
from networks.shipping import Run, distances, loss_curve, memorisation, nearest_sheet, obeyed, palette, train
from PIL import Image

import pfode
from pfode.cli.images import to_pixels
from pfode.cli.typeset import page_of, set_word, spans
from pfode.files import write_atomic
from pfode.scores.io.shipped import WEIGHTS
from pfode.scores.training.data import Data, load_data

NAME = "letters"
MEASURED = 248  # samples: 4 typefaces
WORDS = ("PFODE", 24)  # on the card, and in how many typefaces
RECIPE = (
    "train --data runs/letters.npz --process edm --batch 32 --schedule constant --warmup 100 --amp --save-every 250 "
    "--widths 16,48,96 --blocks 1,2,2 --attention 8 --steps 5250 --cooldown 1500"
)
RECOMMENDED: dict[str, object] = {"sampler": "auto", "steps": 20}


def data_files(runs: Path) -> tuple[Data, Data, dict[str, int]]:
    """The pictures to train on, those held out, and the faces of each package, made where they are not there yet."""
    file, held = runs / "letters.npz", runs / "letters-held.npz"
    if not (file.is_file() and held.is_file()):
        script = Path(__file__).parent / "networks" / "letter_data.py"
        command = [sys.executable, str(script), str(file), "--fonts", str(runs / "fonts"), "--held", str(held)]
        subprocess.run(command, check=True)
    return load_data(file), load_data(held), json.loads(file.with_suffix(".faces.json").read_text())


def ship(run: Path, data: Data, held: Data, faces: dict[str, int]) -> None:
    """The newest checkpoint as package data, with its card."""
    made = Run(run, data)
    config = made.config
    path = made.save(NAME, RECIPE, RECOMMENDED)
    net = pfode.load(NAME)
    each = len(GLYPHS)
    seeds = [seed for seed in range(MEASURED // each) for _ in GLYPHS]
    x = pfode.sample(net, seeds=seeds, label=list(GLYPHS) * (MEASURED // each), steps=20).x
    glyphs = to_pixels(x)
    alphabets = []
    for i in range(0, len(glyphs), each):
        part = glyphs[i : i + each]
        alphabets.append(set_word(part, spans(part), list(range(each))))
    palette(_large(page_of(alphabets)[0], 1), WEIGHTS / f"{NAME}.png")
    word, n = WORDS
    drawn = to_pixels(pfode.sample(net, seeds=[s for s in range(n) for _ in word], label=list(word) * n, steps=20).x)
    parts = [drawn[i : i + len(word)] for i in range(0, len(drawn), len(word))]
    page = page_of([set_word(part, spans(part), list(range(len(word)))) for part in parts])[0]
    palette(_large(page, 2), WEIGHTS / f"{NAME}-words.png")
    some = x[:: max(1, len(x) // 40)][:40]
    palette(nearest_sheet(some, data), WEIGHTS / f"{NAME}-nearest.png")
    loss_curve(made.losses).save(WEIGHTS / f"{NAME}-loss.png", optimize=True)
    of_samples, of_data, limit, close = memorisation(x, data, mirrored=False)
    known = packages()
    table = "\n".join(f"| {name} | {known[name][0]} | {count} | {known[name][1]} |" for name, count in faces.items())
    count = Counter()
    for name, number in faces.items():
        count[known[name][1]] += number
    text = f"""# {NAME}

Letters, 32x32, black on white: A to Z, a to z and 0 to 9 are the classes, and a style of 24 numbers says in which
typeface. `pfode sample --text PFODE --seed 7` sets a word in a typeface that does not exist: its style is mixed from
three of those that the network keeps, and all its letters begin from the same noise, both by the seed.

| | |
|---|---|
| network | `UNet`: widths {config["network"]["widths"]}, {made.parameters:,} parameters and {made.denoiser.net.style_bank.shape[0]} styles, half precision, {path.stat().st_size:,} bytes |
| data | {len(data)} pictures: {data.card["source"]}; capitals 19 pixels high, baseline below row 24 |
| styles | the first 24 principal components of a face's letters, whitened; the network keeps them without the names of the faces |
| licences | weights Apache-2.0; the fonts of the data: {", ".join(f"{k} ({n} faces)" for k, n in count.most_common())}; packages below |
| recipe | denoising score matching, batch {config["batch"]}, {made.step} steps ({made.step * config["batch"]:,} pictures), Adam, rate {config["rate"]:g}, {config["drop"]:.0%} of the classes and of the styles hidden, noise of 0.1 on the styles, average of the weights of width {config["ema"][0]:g} |
| noise levels | measured: sigma_data {config["sigma_data"]:g}, log sigma with mean {config["level_mean"]:g} and deviation {config["level_std"]:g}; each level's loss divided by its mean |
| time | {made.seconds / 60:.0f} minutes, most of them waiting: on one thread of a 2-core CPU that was busy with other work |
| loss | {made.loss} (mean of the last 200 steps); around step {made.curve()} |
| best settings, by looking | sampler auto, 20 steps, no guidance |

    python benchmarks/letters.py

draws the data and runs

    pfode {RECIPE}

![loss by step]({NAME}-loss.png)

![{word} in {n} typefaces that do not exist]({NAME}-words.png)

![alphabets]({NAME}.png)

One typeface a row, seeds 0 to {MEASURED // each - 1}, 20 steps.

Distances (values from -1 to 1; {MEASURED} samples, held-out pictures of other faces; quantiles 5, 25, 50, 75, 95 % of
root-mean-square distances):

| | |
|---|---|
{distances(x, held, data)}
{obeyed(x, list(range(each)) * (MEASURED // each), data)}
| the samples to the nearest training picture | {of_samples} |
| a training picture to the nearest other one | {of_data} |
| samples nearer than 5 % of the training pictures are to another ({limit:.3f}) | {close} of {MEASURED} |

Forty samples, each row above the training pictures that are nearest to them:

![samples and their nearest training pictures]({NAME}-nearest.png)

| package of Debian 12 | version | faces | licence |
|---|---|---|---|
{table}
"""
    write_atomic(WEIGHTS / f"{NAME}.md", text.encode())
    print(text)


def _large(page: np.ndarray, scale: int) -> Image.Image:
    picture = Image.fromarray(page)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of fonts, data and the training run")
    parser.add_argument("--no-train", action="store_true", help="only write weights and card of what is there")
    options = parser.parse_args()
    data, held, faces = data_files(options.runs)
    if not options.no_train:
        train(RECIPE.replace("runs/", f"{options.runs}/"), options.runs / NAME)
    ship(options.runs / NAME, data, held, faces)


if __name__ == "__main__":
    main()
