"""Pictures of a model of points: data, samples, density, and the paths between noise and data."""

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import pfode

if TYPE_CHECKING:
    from torch import Tensor

    from pfode.scores.denoiser import Denoiser
    from pfode.scores.training.points import Points

__all__ = ["describe", "draw", "likelihood", "source_of"]

SIDE, GAP, HEAD = 320, 12, 22  # pixels of a panel, between two, and of its title
SHOWN, PATHS, STEPS = 4000, 80, 40  # points of a panel, paths, steps of a path
CELLS = 80  # of the density, along a side
TESTED = 2000  # points for a likelihood
DARK, LIGHT, INK = (24, 44, 88), (244, 246, 250), (28, 35, 48)
FIRST_TEST = 2**39  # where the points of a likelihood begin in a law's stream: beyond those of any training


def source_of(data: "Points") -> "Any":
    """What t = 1 holds: a base with log_prob and sample, or None where it has no density of its own."""
    from pfode.flow.cnf import StandardNormal

    if data.source is not None:
        return data.source.law
    return None if data.pairs is not None else StandardNormal(data.shape)


def likelihood(den: "Denoiser", data: "Points", x: "Tensor") -> "Tensor | None":
    """log p(x) in nats of a model whose network is a velocity, (n,); None for others."""
    from pfode.flow.cnf import CNF
    from pfode.scores.training.objectives import VelocityField

    base = source_of(data)
    if base is None or den.prediction != "flow" or den.process != pfode.Flow():
        return None
    flow = CNF(VelocityField(den), base, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        return torch.cat([flow.log_prob(part.float()) for part in x.split(1000)])


def describe(den: "Denoiser", data: "Points") -> tuple[dict[str, float], str] | None:
    """The negative log-likelihood of fresh points beside the entropy of their law: figures, and a line; or None."""
    if data.law is None:
        return None
    x = data.law.sample(TESTED, FIRST_TEST)
    found = likelihood(den, data, x)
    if found is None:
        return None
    excess = data.law.log_prob(x) - found.double()
    gap, error = float(excess.mean()), float(excess.std()) / math.sqrt(TESTED)
    nll = data.law.entropy + gap
    line = f"negative log-likelihood {nll:.3f} nats, {gap:+.3f} +- {error:.3f} above the entropy {data.law.entropy:.3f}"
    return {"nll": nll, "entropy": data.law.entropy, "gap": gap, "gap_error": error}, line


def draw(den: "Denoiser", data: "Points") -> bytes:
    """A PNG of four panels, the first two coordinates: data, samples, density (of two dimensions), and paths."""
    real = data.take(list(range(SHOWN if data.law is not None else min(SHOWN, len(data))))).flatten(1)
    starts = _starts(data, SHOWN)
    drawn = pfode.sample(den, steps=STEPS, x=starts).x
    ways = pfode.sample(den, steps=STEPS, x=starts[:PATHS], trajectory=True, **_plain(den)).trajectory
    ends = starts.flatten(1)[:, :2]
    low, high = real[:, :2].amin(0), real[:, :2].amax(0)
    reach = (high - low).max() * 0.58
    box = ((low + high) / 2 - reach, (low + high) / 2 + reach)
    wide = 1.15 * torch.maximum(ends.abs().amax(), torch.maximum(low.abs(), high.abs()).amax())
    panels = [("data", _scatter(real, box)), ("samples", _scatter(drawn.flatten(1), box))]
    density = _density(den, data, box) if data.shape == (2,) else None
    if density is not None:
        panels.append(("density", density))
    panels.append(("paths, from noise to data" if data.source is None else "paths, from the source to data",
                   _paths([way.flatten(1) for way in ways], (-wide.expand(2), wide.expand(2)))))  # fmt: skip
    sheet = Image.new("RGB", (len(panels) * (SIDE + GAP) + GAP, SIDE + HEAD + GAP), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for i, (title, panel) in enumerate(panels):
        left = GAP + i * (SIDE + GAP)
        pen.text((left, 6), title, INK)
        sheet.paste(panel, (left, HEAD))
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()


def _plain(den: "Denoiser") -> dict[str, Any]:
    """What makes a trajectory of the ODE itself."""
    return {"sampler": "ipndm1", "chart": "flow", "grid": "time"} if den.prediction == "flow" else {}


def _starts(data: "Points", n: int) -> "Tensor":
    """States at t = 1 to sample from."""
    from pfode import noise

    if data.source is not None:
        count = n if data.source.law is not None else min(n, len(data.source))
        first = FIRST_TEST if data.source.law is not None else 0
        return data.source.take(list(range(first, first + count))).float()
    return noise.normal(range(n), 0, data.shape)


def _pixels(x: "Tensor", box: tuple["Tensor", "Tensor"]) -> np.ndarray:
    """Places of points in a panel, (n, 2) from the top left."""
    unit = ((x[:, :2].double().cpu() - box[0]) / (box[1] - box[0])).numpy()
    return np.stack([unit[:, 0], 1 - unit[:, 1]], 1) * (SIDE - 1)


def _shaded(value: np.ndarray) -> Image.Image:
    """Numbers from 0 to 1 as shades."""
    light, dark = np.array(LIGHT), np.array(DARK)
    return Image.fromarray((light + value[..., None] * (dark - light)).round().astype(np.uint8))


def _scatter(x: "Tensor", box: tuple["Tensor", "Tensor"]) -> Image.Image:
    """How many points lie in each pixel."""
    x = x if x.shape[1] > 1 else torch.cat([x, torch.zeros_like(x)], 1)
    places = np.rint(_pixels(x[x.isfinite().all(1)], box)).astype(int)
    places = places[((places >= 0) & (places < SIDE)).all(1)]
    counts = np.zeros((SIDE, SIDE))
    for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):  # two pixels wide
        np.add.at(counts, (np.minimum(places[:, 1] + down, SIDE - 1), np.minimum(places[:, 0] + right, SIDE - 1)), 1)
    return _shaded(np.minimum(1.0, counts / 2))


def _density(den: "Denoiser", data: "Points", box: tuple["Tensor", "Tensor"]) -> Image.Image | None:
    steps = (torch.arange(CELLS, dtype=torch.float64, device="cpu") + 0.5) / CELLS
    grid = torch.cartesian_prod(steps, steps) * (box[1] - box[0]) + box[0]
    found = likelihood(den, data, grid)
    if found is None:
        return None
    p = found.double().exp().reshape(CELLS, CELLS).T.flip(0).numpy()
    shades = np.minimum(1.0, p / max(float(np.quantile(p, 0.99)), 1e-300))
    return _shaded(shades).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def _paths(ways: list["Tensor"], box: tuple["Tensor", "Tensor"]) -> Image.Image:
    panel = Image.new("RGB", (SIDE, SIDE), LIGHT)
    pen = ImageDraw.Draw(panel)
    places = np.stack([_pixels(way if way.shape[1] > 1 else torch.cat([way, way * 0], 1), box) for way in ways])
    for i in range(places.shape[1]):
        pen.line([tuple(place) for place in places[:, i]], (120, 140, 175), 1)
        for at, colour in ((places[0, i], (224, 123, 0)), (places[-1, i], DARK)):
            pen.ellipse([at[0] - 2, at[1] - 2, at[0] + 2, at[1] + 2], colour)
    return panel
