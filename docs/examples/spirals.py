"""Spirals that wind one way or the other, seen at 30 times of their own: a latent ODE fills the gaps and goes on.

    python docs/examples/spirals.py     # about 1 CPU minute; writes docs/spirals.png

After Chen et al. (2018), section 5.1. The first half of the time is seen by the encoder; training shows the second half
to the decoder, of other spirals than those in the picture.
"""

import argparse
import math

import torch
from figure import Panel, draw
from torch import Tensor

from pfode.models import LatentODE
from pfode.models.series import Series, Trainer, Training

NOISE = 0.02


def spiral(t: Tensor, phase: Tensor, side: Tensor) -> Tensor:
    """Places at times from 0 to 1, of shape (series, times)."""
    angle, radius = phase + side * 7.0 * t, 0.3 + 0.7 * t
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def spirals(count: int, seed: int, times: int = 60) -> tuple[Series, Tensor, Tensor]:
    """Series with observations at `times` of their own from 0 to 1, and what their places are made of."""
    drawn = torch.Generator().manual_seed(seed)
    t = torch.rand(count, times, generator=drawn).sort(1).values
    side = torch.randint(0, 2, (count, 1), generator=drawn) * 2.0 - 1
    phase = torch.rand(count, 1, generator=drawn) * 2 * math.pi
    x = spiral(t, phase, side)
    return Series(t, x + NOISE * torch.randn(x.shape, generator=drawn)), phase, side


def model() -> LatentODE:
    """Sees up to 0.5, explains up to 1."""
    return LatentODE(2, latent=6, hidden=32, width=48, encoder="rnn", noise=0.05, context=0.5, kl=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", default="docs/spirals.png")
    options = parser.parse_args()
    torch.manual_seed(0)
    train, *_ = spirals(120, 0, 40)
    test, phase, side = spirals(40, 1, 40)
    net = model()
    trainer = Trainer(net, train, Training(epochs=options.epochs, batch=40, rate=0.02), valid=test)
    for record in trainer.run():
        if record.valid and int(record.epoch) % 25 == 0:
            print(f"epoch {record.epoch:4.0f}  loss {record.loss:8.3f}  {record.valid}", flush=True)
    ts = torch.linspace(0, 1, 80)
    with torch.no_grad():
        found = net.forecast(test[:4], ts)
    panels = []
    for i in range(4):
        one = type(found)(found.t[i : i + 1], found.mean[i : i + 1], found.std[i : i + 1])
        seen = test[[i]].until(0.5)
        truth = spiral(ts[None], phase[i : i + 1], side[i : i + 1])[0]
        way = "one way" if side[i] > 0 else "the other way"
        panels.append(Panel(f"series {i}, {way}", seen.t[0], seen.x[0], one, truth, 0.5))
    draw(
        options.out,
        panels,
        what="Latent ODE: dots were seen, lines are the mean, bands two standard deviations, grey is true",
    )


if __name__ == "__main__":
    main()
