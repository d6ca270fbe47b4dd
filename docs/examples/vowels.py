"""Nine speakers told apart by two vowels, most of what was recorded dropped: JapaneseVowels and a neural CDE.

    pip download --no-deps aeon==1.6.0
    python docs/examples/vowels.py aeon-1.6.0-py3-none-any.whl     # about 2 CPU minutes

The recordings (12 channels, 7 to 29 times; Kudo, Toyama and Shimbo, UCI, CC BY 4.0) are read from the wheel of aeon
(BSD-3), which has them; nothing of it is installed. 30, 50 and 70 % of the times are dropped at random, from each
series its own. Writes docs/vowels.png: one recording, what was left of it, and what is predicted as it comes in.
"""

import argparse
import zipfile

import torch
from figure import Panel, draw

from pfode.models import Forecast, NeuralCDE
from pfode.models.series import Scale, Trainer, Training, read_ts

NAME = "aeon/datasets/data/JapaneseVowels/JapaneseVowels_{}.ts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", default="docs/vowels.png")
    options = parser.parse_args()
    with zipfile.ZipFile(options.wheel) as archive:
        train, test = (read_ts(archive.read(NAME.format(part))) for part in ("TRAIN", "TEST"))
    scale = Scale.of(train)
    online = None
    for dropped in (0.0, 0.3, 0.5, 0.7):
        parts = [scale.apply(part.dropped(dropped)) for part in (train, test)]
        torch.manual_seed(0)
        model = NeuralCDE(12, 9, online=dropped == 0.7)
        trainer = Trainer(model, parts[0], Training(epochs=options.epochs, rate=5e-3, decay=0.01))
        for _ in trainer.run():
            pass
        figure = trainer.evaluate(parts[1])["accuracy"]
        print(f"{dropped:.0%} dropped: accuracy {figure:.3f}{' of all its times' if model.online else ''}", flush=True)
        online = (model, parts[1]) if model.online else None
    assert online is not None
    model, series = online
    one = series[[0, 120, 240, 360]]
    with torch.no_grad():
        chance = model(one.t, one.x).softmax(-1)
    panels = []
    for i in range(4):
        n, speaker = int(one.lengths[i]), int(one.label[i])  # type: ignore[index]
        there = chance[i, :n, speaker, None]
        band = Forecast(one.t[i : i + 1, :n], there[None], torch.zeros_like(there)[None])
        panels.append(Panel(f"speaker {one.classes[speaker]}: {n} times of 12 channels", one.t[i, :n], there, band))
    draw(options.out, panels, what="Probability of the right speaker as the observations come in, 70 % of them dropped")


if __name__ == "__main__":
    main()
