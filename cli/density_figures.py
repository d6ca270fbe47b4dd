"""The figures of `pfode likelihood`: the pictures by likelihood on one sheet, and histograms."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pfode.cli.plot import Drawing, png
from pfode.files import write_atomic

if TYPE_CHECKING:
    from pfode.cli.densities import Densities, Line

__all__ = ["HISTOGRAM", "SHEET", "write_histogram", "write_sheet"]

SHEET, HISTOGRAM = "sheet.png", "histogram.png"
SHOWN = 400  # pictures on a sheet
FRAMED = 10
LEAST, MOST = (209, 52, 91), (10, 154, 110)  # colours of the frames
BARS = 30


def write_sheet(run: "Densities", lines: "list[Line]") -> Path:
    """The pictures, likeliest first, the ten likeliest framed in green and the ten least likely in red.

    Of more than 400 pictures every so manieth is shown between these.
    """
    import io

    import numpy as np
    from PIL import Image

    from pfode.cli import images

    ranked = sorted((line for line in lines if "nats" in line), key=lambda line: line["bits_per_dim"])
    if len(ranked) > SHOWN:
        inner = [ranked[round(i)] for i in np.linspace(FRAMED, len(ranked) - FRAMED - 1, SHOWN - 2 * FRAMED)]
        ranked = [*ranked[:FRAMED], *inner, *ranked[-FRAMED:]]
    pixels = images.to_pixels(run.pictures[[line["number"] for line in ranked]])
    if pixels.ndim == 3:
        pixels = pixels[..., None].repeat(3, -1)
    n, height, width = pixels.shape[:3]
    columns = images.sheet_columns(n)
    scale = images.default_scale(n, height, width, columns)
    sheet, gap = images.contact_sheet(pixels, scale, columns), images.GAP
    framed = min(FRAMED, n // 2)
    for i in [*range(framed), *range(n - framed, n)]:
        row, column = divmod(i, columns)
        top, left = row * (height * scale + gap), column * (width * scale + gap)
        bottom, right = top + height * scale + 2 * gap, left + width * scale + 2 * gap
        colour = MOST if i < framed else LEAST
        sheet[top:bottom, left : left + gap] = sheet[top:bottom, right - gap : right] = colour
        sheet[top : top + gap, left:right] = sheet[bottom - gap : bottom, left:right] = colour
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "PNG", optimize=True)
    assert run.folder is not None
    return write_atomic(run.folder / SHEET, stream.getvalue())


def write_histogram(folder: Path, series: "Sequence[tuple[str, list[Line]]]") -> Path:
    """Histograms of bits/dim, one colour a series, with the 5, 50 and 95 % quantiles."""
    values = [sorted(line["bits_per_dim"] for line in lines) for _, lines in series]
    return write_atomic(folder / HISTOGRAM, png(histogram([title for title, _ in series], values)))


def histogram(titles: Sequence[str], values: Sequence[Sequence[float]]) -> Drawing:
    """The drawing; values are sorted."""
    drawing = Drawing(640, 340 + 22 * len(titles))
    x0, x1, y0, y1 = 50.0, 620.0, 30.0 + 22 * len(titles), 290.0 + 22 * len(titles)
    low, high = min(one[0] for one in values), max(one[-1] for one in values)
    pad = 0.02 * (high - low) or 0.5
    low, high = low - pad, high + pad
    step = (high - low) / BARS

    def across(value: float) -> float:
        return x0 + (value - low) / (high - low) * (x1 - x0)

    shares = [
        [sum(low + i * step <= v < low + (i + 1) * step for v in one) / len(one) for i in range(BARS)] for one in values
    ]
    top = max(map(max, shares))
    for k, (title, one, parts) in enumerate(zip(titles, values, shares, strict=True)):
        colour = f"s{1 - k}" if len(titles) > 1 else "s1"
        for i, part in enumerate(parts):
            left, right, height = across(low + i * step), across(low + (i + 1) * step), part / top * (y1 - y0)
            if part:
                drawing.area([(left, y1), (left, y1 - height), (right, y1 - height), (right, y1)], colour, 0.45)
        quantiles = [one[min(len(one) - 1, int(q * len(one)))] for q in (0.05, 0.5, 0.95)]
        for quantile, wide in zip(quantiles, (1.0, 2.0, 1.0), strict=True):
            drawing.line([(across(quantile), y1), (across(quantile), y0)], colour, wide, text=f"{quantile:.3f}")
        words = ", ".join(
            f"{name} {value:.3f}" for name, value in zip(("5 %", "median", "95 %"), quantiles, strict=True)
        )
        drawing.line([(x0, 20.0 + 22 * k), (x0 + 20, 20.0 + 22 * k)], colour, 4.0)
        drawing.text((x0 + 28, 24.0 + 22 * k), f"{title} (n = {len(one)}): {words}", size=12)
    drawing.line([(x0, y1), (x1, y1)], "soft", 1.0)
    for value in ticks(low, high):
        drawing.line([(across(value), y1), (across(value), y1 + 4)], "soft", 1.0)
        drawing.text((across(value), y1 + 18), f"{value:g}", "soft", 11, anchor="middle")
    drawing.text(((x0 + x1) / 2, y1 + 38), "bits per dimension", "soft", 12, anchor="middle")
    return drawing


def ticks(low: float, high: float) -> list[float]:
    """Four to ten round values within [low, high]."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(s for s in (2 * power, power, 0.5 * power, 0.2 * power, 0.1 * power) if (high - low) / s >= 4)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
