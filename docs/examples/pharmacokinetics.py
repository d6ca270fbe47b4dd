"""Concentrations of a drug in sixty people, each measured at 5 to 10 visits: a latent ODE's curves for people it has
not seen, from their first visits.

    python docs/examples/pharmacokinetics.py     # about 1 CPU minute; writes docs/pharmacokinetics.png

The people are simulated by us, by the one-compartment model with first-order absorption of a dose D taken at t = 0,

    C(t) = F D ka / (V (ka - ke)) (exp(-ke t) - exp(-ka t)),        F D = 320 mg,

with absorption ka = 1.5 / h, elimination ke = 0.09 / h and volume V = 32 l in the middle, log-normal from person to
person (standard deviations 0.4, 0.25, 0.2), and errors of measurement of 5 %. They are no patients' data.
"""

import argparse
import math

import torch
from figure import Panel, draw
from torch import Tensor

from pfode.models import Forecast, LatentODE
from pfode.models.series import Scale, Series, Trainer, Training

HOURS = 24.0


def concentration(t: Tensor, person: Tensor) -> Tensor:
    """mg/l at hours t, shape (people, times), of people (ka, ke, V), shape (people, 3)."""
    ka, ke, volume = (part[:, None] for part in person.unbind(1))
    return 320 * ka / (volume * (ka - ke)) * (torch.exp(-ke * t) - torch.exp(-ka * t))


def people(count: int, seed: int) -> tuple[Series, Tensor]:
    """Their series, and what they are made of."""
    drawn = torch.Generator().manual_seed(seed)
    middle, spread = torch.tensor([1.5, 0.09, 32.0]), torch.tensor([0.4, 0.25, 0.2])
    person = middle * torch.exp(spread * torch.randn(count, 3, generator=drawn))
    visits = torch.randint(5, 11, (count, 1), generator=drawn)
    t = (torch.rand(count, 10, generator=drawn) * (HOURS - 0.25) + 0.25).masked_fill(
        torch.arange(10) >= visits, math.nan
    )
    t = t.sort(1).values  # NaN last
    x = concentration(t, person) * (1 + 0.05 * torch.randn(count, 10, generator=drawn))
    return Series(t, x[..., None], channels=("mg/l",)), person


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--out", default="docs/pharmacokinetics.png")
    options = parser.parse_args()
    torch.manual_seed(0)
    (train, _), (test, person) = people(60, 0), people(8, 1)
    scale = Scale.of(train)
    model = LatentODE(1, latent=3, hidden=24, width=32, kl=0.3)
    trainer = Trainer(model, scale.apply(train), Training(epochs=options.epochs, batch=20, rate=0.02))
    for record in trainer.run():
        if record.step % (50 * trainer.each) == 0:
            print(f"epoch {record.epoch:4.0f}  loss {record.loss:8.3f}", flush=True)
    ts, first = torch.linspace(0.25, HOURS, 120), 8.0
    seen = test.until(first)
    with torch.no_grad():
        found = model.forecast(scale.apply(seen), ((ts - scale.origin) / scale.unit).clamp(min=0.0))
    mean, std = scale.values(found.mean), scale.spreads(found.std)
    truth = concentration(ts.expand(8, -1), person)[..., None]
    inside = ((truth - mean).abs() <= 2 * std).float().mean()
    print(
        f"root mean square error {float((truth - mean).square().mean().sqrt()):.2f} mg/l, {inside:.0%} within the band"
    )
    panels = [
        Panel(
            f"person {i}: {int(seen.lengths[i])} visits until then, {int(test.lengths[i])} in all",
            test.t[i],
            test.x[i],
            Forecast(ts[None], mean[i : i + 1], std[i : i + 1]),
            truth[i],
            first,
        )
        for i in range(4)
    ]
    draw(options.out, panels, what="mg/l over hours: dots are visits (after the line not shown), grey is the truth")


if __name__ == "__main__":
    main()
