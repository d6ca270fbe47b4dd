"""What neural ODEs can learn, and what regularisers save: nested spheres and two spirals, trained and drawn.

    python benchmarks/neural_ode.py [--json FILE] [--picture FILE] [--steps 400]

A NeuralODE and an AugmentedNeuralODE with the same network (an MLP of 2 x 32 with the time) and a linear classifier on
the state at the end, trained alike on fresh points at every step. The ways of an ODE never cross (Dupont et al. 2019):
on a line it cannot take the inner interval out from between the outer ones, in the plane it gets the disc out of the
ring only through a slit that it tears into the ring; with three further dimensions it lifts it out. Spirals it can
unwind in the plane, with more evaluations. Then the augmented one again with the regularisers of Finlay et al. (2020)
at several weights: evaluations of the field that a solve at one tolerance takes.

The picture shows, per problem and model, the plane coloured by class (on the line: the probability of the inner class)
and the ways of test points (on the line: over the time).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from pfode.models import AugmentedNeuralODE, NeuralODE, VectorField

WEIGHTS = [0.0, 0.002, 0.02]  # of both regularisers
TRAINING, TESTING = 1e-3, 1e-5  # tolerances
SIDE, MARGIN, LINE, REACH = 220, 6, 34, 2.0
BLUE, RED = (38, 98, 178), (200, 62, 48)
Points = tuple[Tensor, Tensor]


def spheres(n: int, generator: torch.Generator) -> Points:
    """A disc of radius 0.6 (class 1), and the ring from 1.0 to 1.6 around it (class 0)."""
    inside = torch.rand(n, generator=generator) < 0.5
    share, angle = torch.rand(n, generator=generator), 2 * math.pi * torch.rand(n, generator=generator)
    radius = torch.where(inside, 0.6 * share.sqrt(), (1.0 + (1.6**2 - 1.0) * share).sqrt())
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), inside.float()


def intervals(n: int, generator: torch.Generator) -> Points:
    """The same on a line: an interval of radius 0.6 (class 1), and what lies 1.0 to 1.6 from 0 (class 0)."""
    inside = torch.rand(n, generator=generator) < 0.5
    share, side = torch.rand(n, generator=generator), torch.rand(n, generator=generator) < 0.5
    radius = torch.where(inside, 0.6 * share, 1.0 + 0.6 * share)
    return torch.where(side, radius, -radius)[:, None], inside.float()


def spirals(n: int, generator: torch.Generator) -> Points:
    """Two arms of one and a half turns, half a turn apart, with noise of 0.04."""
    arm = (torch.rand(n, generator=generator) < 0.5).float()
    share = torch.rand(n, generator=generator).sqrt()
    angle, radius = 3 * math.pi * share + math.pi * arm, 0.1 + 1.5 * share
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return x + 0.04 * torch.randn(n, 2, generator=generator), arm


PROBLEMS: dict[str, Callable[[int, torch.Generator], Points]] = {
    "spheres, line": intervals,
    "spheres, plane": spheres,
    "two spirals": spirals,
}


@dataclass
class Trained:
    """A model and what it does on test points."""

    ode: NeuralODE
    head: nn.Linear
    accuracy: float
    loss: float
    nfe: int

    def score(self, x: Tensor) -> Tensor:
        """Above 0: class 1."""
        with torch.no_grad():
            return self.head(self.ode(x))[:, 0]


def train(problem: str, extra: int, weight: float, steps: int, seed: int = 0) -> Trained:
    """Adam on the cross-entropy, with `weight` times both regularisers."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    d = PROBLEMS[problem](1, torch.Generator())[0].shape[1] + extra
    mlp = nn.Sequential(nn.Linear(d + 1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, d))
    options: dict[str, Any] = {"kinetic": weight > 0, "jacobian": "hutchinson" if weight else None}
    options |= {"rtol": TRAINING, "atol": TRAINING}
    field = VectorField(mlp, timed=True)
    ode = AugmentedNeuralODE(field, extra, **options) if extra else NeuralODE(field, **options)
    head = nn.Linear(d, 1)
    optimiser = torch.optim.Adam([*ode.parameters(), *head.parameters()], 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, 1e-4)
    for _ in range(steps):
        x, label = PROBLEMS[problem](256, generator)
        run = ode.run(x)
        loss = nn.functional.binary_cross_entropy_with_logits(head(run.y)[:, 0], label)
        if weight:
            loss = loss + weight * (run.kinetic.mean() + run.jacobian.mean())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    ode.options |= {"rtol": TESTING, "atol": TESTING}
    x, label = PROBLEMS[problem](4000, torch.Generator().manual_seed(99))
    with torch.no_grad():
        run = ode.run(x, regularised=False)
        score = head(run.y)[:, 0]
        entropy = nn.functional.binary_cross_entropy_with_logits(score, label).item()
    return Trained(ode, head, ((score > 0) == (label > 0)).float().mean().item(), entropy, run.nfe)


def picture(problem: str, model: Trained) -> tuple[Image.Image, Image.Image]:
    """The plane coloured by class with test points; and the ways of some, in the first two dimensions of the state."""
    line = torch.linspace(-REACH, REACH, SIDE)
    x, label = PROBLEMS[problem](300, torch.Generator().manual_seed(7))
    model.ode.ts, kept = tuple(torch.linspace(0, 1, 41).tolist()), model.ode.ts
    with torch.no_grad():
        ways = model.ode.trajectory(x[:80])[..., :2]
    model.ode.ts = kept
    if x.shape[1] == 1:
        curve = torch.stack([line, REACH * (2 * torch.sigmoid(model.score(line[:, None])) - 1)], 1)
        left, pen = _blank()
        pen.line(_pixels(curve, REACH), fill="black")
        _dots(pen, torch.cat([x, REACH * (1.8 * label[:, None] - 0.9)], 1), label, REACH)
        over = torch.linspace(-1, 1, len(ways))[:, None].expand(ways.shape[:2])
        return left, _drawn(torch.stack([over * ways[..., 0].abs().max(), ways[..., 0]], -1), label)
    plane = torch.stack([line.expand(SIDE, SIDE), line.flip(0)[:, None].expand(SIDE, SIDE)], -1).reshape(-1, 2)
    share = torch.sigmoid(model.score(plane)).view(SIDE, SIDE, 1)
    colours = share * torch.tensor(BLUE) + (1 - share) * torch.tensor(RED)
    left = Image.fromarray((255 - 0.45 * (255 - colours)).round().to(torch.uint8).numpy())
    _dots(ImageDraw.Draw(left), x, label, REACH)
    return left, _drawn(ways, label)


def _blank() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    out = Image.new("RGB", (SIDE, SIDE), "white")
    return out, ImageDraw.Draw(out)


def _drawn(ways: Tensor, label: Tensor) -> Image.Image:
    """Ways of shape (times, n, 2) as lines, with dots where they end."""
    out, pen = _blank()
    reach = 1.05 * ways.abs().max().item()
    for way, c in zip(ways.unbind(1), label.tolist(), strict=False):
        pen.line(_pixels(way, reach), fill=BLUE if c else RED)
    _dots(pen, ways[-1], label[: ways.shape[1]], reach)
    return out


def _dots(pen: ImageDraw.ImageDraw, x: Tensor, label: Tensor, reach: float) -> None:
    for (a, b), c in zip(_pixels(x, reach), label.tolist(), strict=True):
        pen.ellipse((a - 2, b - 2, a + 2, b + 2), fill=BLUE if c else RED)


def _pixels(x: Tensor, reach: float) -> list[tuple[float, float]]:
    scaled = (x / reach * torch.tensor([1.0, -1.0]) + 1) * (SIDE - 1) / 2
    return [(a, b) for a, b in scaled.tolist()]


def sheet(rows: list[list[tuple[str, Image.Image]]]) -> Image.Image:
    """Pictures with their captions, in rows."""
    width, height = SIDE + MARGIN, SIDE + LINE
    out = Image.new("RGB", (len(rows[0]) * width + MARGIN, len(rows) * height + MARGIN), "white")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(12)
    for i, row in enumerate(rows):
        for j, (caption, image) in enumerate(row):
            pen.text((MARGIN + j * width, i * height + 2), caption, fill="black", font=font)
            out.paste(image, (MARGIN + j * width, i * height + LINE))
    return out


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results, drawn = [], []
    print(f"{'problem':16} {'model':20} {'weight':>7} {'accuracy':>9} {'loss':>8} {'NFE':>5}")
    for problem in PROBLEMS:
        row: list[tuple[str, Image.Image]] = []
        for extra, weight in [(0, 0.0), *((3, weight) for weight in WEIGHTS)]:
            name = "AugmentedNeuralODE" if extra else "NeuralODE"
            model = train(problem, extra, weight, options.steps)
            result = {"problem": problem, "model": name, "weight": weight}
            result |= {"accuracy": model.accuracy, "loss": model.loss, "nfe": model.nfe}
            results.append(result)
            figures = f"{model.accuracy:9.4f} {model.loss:8.4f} {model.nfe:5d}"
            print(f"{problem:16} {name:20} {weight:7g} {figures}", flush=True)
            if weight in (0.0, WEIGHTS[-1]):
                about = f"{model.accuracy:.1%}, NFE {model.nfe}" + (f", weight {weight:g}" if weight else "")
                row += list(zip((f"{name}\n{about}", "its ways"), picture(problem, model), strict=True))
        drawn.append(row)
    if options.picture:
        sheet(drawn).save(options.picture, optimize=True)
    tolerances = {"training": TRAINING, "testing": TESTING}
    harness.record(options, {"tolerances": tolerances, "results": results})


if __name__ == "__main__":
    main()
