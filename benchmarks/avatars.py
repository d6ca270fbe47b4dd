"""The one command that makes the networks avatars and avatars-small: draw the data, train, write weights and cards.

    python benchmarks/avatars.py [--runs runs] [--only avatars] [--no-train]

Needs `pip install -r benchmarks/networks/requirements.txt`. The data take a minute, the training about half an hour of
one core; it goes on where an earlier run stopped. The card has data, licences, command, time, loss, samples of every
class, the training pictures nearest to them, and distances to the training set.
"""

# ruff: noqa: E501 (the rows of the card's tables)

import argparse
import json
from pathlib import Path

from networks.avatar_data import avatars, licences
from networks.shipping import Run, distances, loss_curve, memorisation, nearest_sheet, obeyed, palette, train
from PIL import Image

import pfode
from pfode.cli.images import contact_sheet, to_pixels
from pfode.files import write_atomic
from pfode.scores.io.shipped import WEIGHTS
from pfode.scores.training.data import Data, load_data

EACH, HELD = 3000, 100  # seeds of every style, and of those that are held out
FIRST_HELD = 1_000_000
MEASURED = 200  # samples
TRAIN = "train --data runs/avatars.npz --process edm --batch 32 --schedule constant --warmup 100 --amp --save-every 250"
RECIPES = {
    "avatars": f"{TRAIN} --widths 32,64,128 --blocks 1,1,2 --steps 5000 --cooldown 1500",
    "avatars-small": f"{TRAIN} --widths 16,32,48 --blocks 1,1,1 --steps 1000 --cooldown 300",
}
RECOMMENDED = {
    "avatars": {"sampler": "euler-a", "steps": 20},
    "avatars-small": {},
}
ABOUT = {
    "avatars": "The default network of `pfode sample`.",
    "avatars-small": "A small and weak sibling of `avatars`, for autoguidance: `pfode.scores.guide(pfode.load("
    '"avatars"), 2.0, weak=pfode.load("avatars-small"))`.',
}


def data_files(runs: Path) -> tuple[Data, Data]:
    """The pictures to train on and those held out, drawn where they are not there yet."""
    import numpy as np

    for name, each, first in (("avatars", EACH, 0), ("avatars-held", HELD, FIRST_HELD)):
        file = runs / f"{name}.npz"
        if not file.is_file():
            runs.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(file, **avatars(each, first))
    return load_data(runs / "avatars.npz"), load_data(runs / "avatars-held.npz")


def ship(run: Path, name: str, data: Data, held: Data) -> None:
    """The newest checkpoint as package data, with its card."""
    made, best = Run(run, data), RECOMMENDED[name]
    config = made.config
    path = made.save(name, RECIPES[name], best)
    classes = len(data.names)
    how = {key: value for key, value in best.items() if key != "guidance"} or {"steps": 20}
    guided = {"guidance": best["guidance"]} if "guidance" in best else {}
    labels = [i % classes for i in range(MEASURED)]
    x = pfode.sample(pfode.load(name), MEASURED, label=labels, **how, **guided).x
    palette(Image.fromarray(contact_sheet(to_pixels(x[: 8 * classes]), 2, classes)), WEIGHTS / f"{name}.png")
    palette(nearest_sheet(x[:40], data), WEIGHTS / f"{name}-nearest.png")
    loss_curve(made.losses).save(WEIGHTS / f"{name}-loss.png", optimize=True)
    of_samples, of_data, limit, close = memorisation(x, data, mirrored=False)
    table = "\n".join(f"| {row['class']} | {row['style']} | {row['licence']} | {row['text']} |" for row in licences())
    asks = ", ".join(f"{key} {value}" for key, value in {**how, **guided}.items())
    text = f"""# {name}

{ABOUT[name]} It imitates an avatar program, DiceBear: ten of its styles are the classes ({", ".join(data.names)}); a
class may be left out, for guidance. 32x32, colour. EDM process, EDM preconditioning.

| | |
|---|---|
| network | `UNet`: widths {config["network"]["widths"]}, {made.parameters:,} parameters, half precision, {path.stat().st_size:,} bytes |
| data | {len(data)} distinct pictures: {data.card["source"]} |
| licences | weights Apache-2.0; data CC0 1.0, see below |
| recipe | denoising score matching, batch {config["batch"]}, {made.step} steps ({made.step * config["batch"]:,} pictures), Adam, rate {config["rate"]:g}, {config["drop"]:.0%} of the classes hidden, average of the weights of width {config["ema"][0]:g} |
| noise levels | measured: sigma_data {config["sigma_data"]:g}, log sigma with mean {config["level_mean"]:g} and deviation {config["level_std"]:g}; each level's loss divided by its mean |
| time | {made.seconds / 60:.0f} minutes, most of them waiting: on one thread of a 2-core CPU that was busy with other work |
| loss | {made.loss} (mean of the last 200 steps); around step {made.curve()} |
| best settings, by looking | {asks}; `pfode sample` takes them where nothing else is said |

    python benchmarks/avatars.py --only {name}

draws the data and runs

    pfode {RECIPES[name]}

![loss by step]({name}-loss.png)

![samples]({name}.png)

Every column is a class; seeds 0 to {8 * classes - 1}, {asks}.

Distances (values from -1 to 1; {MEASURED} samples, quantiles 5, 25, 50, 75, 95 % of root-mean-square distances):

| | |
|---|---|
{distances(x, held, data)}
{obeyed(x, labels, data)}
| the samples to the nearest training picture | {of_samples} |
| a training picture to the nearest other one | {of_data} |
| samples nearer than 5 % of the training pictures are to another ({limit:.3f}) | {close} of {MEASURED} |

Forty samples, each row above the training pictures that are nearest to them:

![samples and their nearest training pictures]({name}-nearest.png)

| class | style | licence, by the style's metadata | as it asks to be named |
|---|---|---|---|
{table}
"""
    write_atomic(WEIGHTS / f"{name}.md", text.encode())
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of data and training runs")
    parser.add_argument("--only", choices=RECIPES, help="one of the two")
    parser.add_argument("--no-train", action="store_true", help="only write weights and card of what is there")
    options = parser.parse_args()
    data, held = data_files(options.runs)
    for name, words in RECIPES.items():
        if options.only in (None, name):
            run = options.runs / name
            if not options.no_train:
                train(words.replace("runs/", f"{options.runs}/"), run)
            ship(run, name, data, held)
    print(json.dumps({name: (WEIGHTS / f"{name}.safetensors").stat().st_size for name in RECIPES}))


if __name__ == "__main__":
    main()
