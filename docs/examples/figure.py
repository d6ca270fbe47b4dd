"""A picture of series: what was observed, the truth where it is known, a forecast with its band."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pfode.cli.plot import Drawing, png
from pfode.files import write_atomic
from pfode.models import Forecast

WIDTH, HEIGHT, GAP = 330.0, 190.0, 36.0
COLOURS = ("s1", "s0", "s2", "s3")


@dataclass
class Panel:
    """One series: dots at (t, x), the forecast with its band, the truth at the forecast's times; channels have colours.

    Attributes:
        title: above it. t: shape (length,). x: shape (length, channels). forecast: of one series.
        truth: shape (times, channels), or None. split: a time after which nothing was observed, or None.
    """

    title: str
    t: Tensor
    x: Tensor
    forecast: Forecast
    truth: Tensor | None = None
    split: float | None = None


def draw(path: str | Path, panels: list[Panel], columns: int = 2, what: str = "") -> None:
    """Write the panels as one PNG file."""
    rows = -(-len(panels) // columns)
    drawing = Drawing(GAP + columns * (WIDTH + GAP), 30 + rows * (HEIGHT + GAP) + 10)
    drawing.text((GAP, 20), what, size=13, bold=True)
    for i, panel in enumerate(panels):
        _panel(drawing, panel, GAP + (i % columns) * (WIDTH + GAP), 40 + (i // columns) * (HEIGHT + GAP))
    write_atomic(path, png(drawing))
    print(f"{path}: {len(panels)} series")


def _panel(drawing: Drawing, panel: Panel, left: float, top: float) -> None:
    ts, mean, std = panel.forecast.t[0], panel.forecast.mean[0], panel.forecast.std[0]
    seen = ~panel.x.isnan()
    every = [mean - 2 * std, mean + 2 * std, panel.x[seen], *([] if panel.truth is None else [panel.truth])]
    low, high = min(float(v.min()) for v in every), max(float(v.max()) for v in every)
    first, last = float(ts[0]), float(ts[-1])

    def place(t: float, value: float) -> tuple[float, float]:
        across, up = (t - first) / (last - first), (value - low) / (high - low or 1.0)
        return left + across * WIDTH, top + HEIGHT - up * HEIGHT

    drawing.text((left, top - 6), panel.title, size=12)
    for share in (0.0, 0.5, 1.0):
        value, t = low + share * (high - low), first + share * (last - first)
        drawing.line([place(first, value), place(last, value)], "grid")
        drawing.text((left - 4, place(first, value)[1] + 4), f"{value:.2g}", "soft", 10, anchor="end")
        drawing.text((place(t, low)[0], top + HEIGHT + 13), f"{t:.3g}", "soft", 10, anchor="middle")
    if panel.split is not None:
        x, _ = place(panel.split, low)
        drawing.line([(x, top), (x, top + HEIGHT)], "soft")
    for c in range(mean.shape[-1]):
        colour, times = COLOURS[c], ts.tolist()
        lower, upper = ((mean + k * std)[:, c].tolist() for k in (-2, 2))
        edge = [place(t, v) for t, v in zip(times, upper, strict=True)]
        back = [place(t, v) for t, v in zip(times, lower, strict=True)]
        drawing.area([*edge, *reversed(back)], colour, 0.16)
        if panel.truth is not None:
            drawing.line([place(t, v) for t, v in zip(times, panel.truth[:, c].tolist(), strict=True)], "soft", 1.0)
        drawing.line([place(t, v) for t, v in zip(times, mean[:, c].tolist(), strict=True)], colour, 2.0)
        for t, v in zip(panel.t[seen[:, c]].tolist(), panel.x[seen[:, c], c].tolist(), strict=True):
            drawing.dot(place(t, v), colour, 3.0)
