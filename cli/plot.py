"""Curves against network evaluations on logarithmic axes, drawn once and written as SVG or PNG.

A drawing is a list of marks whose colours have names. PNG, and SVG in a file of its own, take the light colours; SVG
inside a page takes the page's variables, which follow the light or dark surroundings.
"""

import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DARK", "LIGHT", "SERIES", "Curve", "Drawing", "Mark", "Panel", "draw", "png", "style", "svg"]

Point = tuple[float, float]
SERIES = ("s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7")
LIGHT = {
    "paper": "#ffffff", "ink": "#1c2330", "soft": "#5b6675", "grid": "#e6e9ee", "other": "#c3cad4", "floor": "#8a94a3",
    "s0": "#d1345b", "s1": "#1f77d0", "s2": "#0a9a6e", "s3": "#e07b00", "s4": "#7b4fd6", "s5": "#00a3b4",
    "s6": "#b07d00", "s7": "#c445a8",
}  # fmt: skip
DARK = {
    "paper": "#12161d", "ink": "#e8ecf2", "soft": "#9aa6b6", "grid": "#262d38", "other": "#465061", "floor": "#7b8798",
    "s0": "#ff6f91", "s1": "#5fb0ff", "s2": "#3fd0a2", "s3": "#ffae4d", "s4": "#b396ff", "s5": "#3fd6e6",
    "s6": "#e2b84a", "s7": "#f08ad8",
}  # fmt: skip


@dataclass
class Mark:
    """A line, a filled area, a dot or a text, in a colour by name."""

    kind: str
    points: Sequence[Point]
    colour: str
    size: float = 1.0  # width of a line, radius of a dot, height of a text
    text: str = ""  # of a text; what a line or a dot is, for whoever points at it
    anchor: str = "start"
    dash: bool = False
    opacity: float = 1.0
    bold: bool = False


@dataclass
class Drawing:
    """Marks on a surface of `width` by `height` units, later ones on top."""

    width: float
    height: float
    marks: list[Mark] = field(default_factory=list)

    def line(self, points: Sequence[Point], colour: str, width: float = 1.0, **options: Any) -> None:
        """Add a line through points; options: fields of `Mark`."""
        self.marks.append(Mark("line", points, colour, width, **options))

    def area(self, points: Sequence[Point], colour: str, opacity: float) -> None:
        """Add a filled polygon."""
        self.marks.append(Mark("area", points, colour, opacity=opacity))

    def dot(self, at: Point, colour: str, radius: float, text: str = "") -> None:
        """Add a disc; the text is shown to whoever points at it."""
        self.marks.append(Mark("dot", [at], colour, radius, text))

    def text(self, at: Point, text: str, colour: str = "ink", size: float = 12.0, **options: Any) -> None:
        """Add a text at a point of its base line; options: fields of `Mark`."""
        self.marks.append(Mark("text", [at], colour, size, text, **options))


@dataclass(frozen=True)
class Curve:
    """A sampler's figures: (evaluations, value, low, high), and its colour."""

    label: str
    colour: str
    points: Sequence[tuple[int, float, float, float]]


@dataclass(frozen=True)
class Panel:
    """Curves of one metric on one problem, and its lower bounds (what, value)."""

    title: str
    what: str
    curves: Sequence[Curve]
    floors: Sequence[tuple[str, float]] = ()
    band: float = 0.09  # opacity of the intervals


WIDTH, HEIGHT, GAP, MARGIN, HEAD = 372.0, 286.0, 20.0, 22.0, 14.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 8.0, 34.0, 40.0  # within a panel


def draw(panels: Sequence[Panel], legend: Sequence[tuple[str, str]], columns: int = 3) -> Drawing:
    """Draw the panels in rows, under a legend of (label, colour)."""
    columns = max(1, min(columns, len(panels)))
    rows = -(-len(panels) // columns)
    width = 2 * MARGIN + columns * WIDTH + (columns - 1) * GAP
    rows_of_legend = _arranged(legend, width - 2 * MARGIN)
    top = HEAD + 22 * len(rows_of_legend) + 8
    drawing = Drawing(width, top + rows * HEIGHT + (rows - 1) * GAP + MARGIN)
    for i, row in enumerate(rows_of_legend):
        y = HEAD + 22 * i + 11
        for x, label, colour in row:
            drawing.line([(MARGIN + x, y), (MARGIN + x + 20, y)], colour, 3.0)
            drawing.text((MARGIN + x + 27, y + 4.5), label, size=13)
    for i, panel in enumerate(panels):
        x, y = MARGIN + (i % columns) * (WIDTH + GAP), top + (i // columns) * (HEIGHT + GAP)
        _panel(drawing, panel, x, y)
    return drawing


def _arranged(legend: Sequence[tuple[str, str]], width: float) -> list[list[tuple[float, str, str]]]:
    """The legend broken into rows: (x, label, colour)."""
    rows: list[list[tuple[float, str, str]]] = [[]]
    x = 0.0
    for label, colour in legend:
        need = 27 + 7.8 * len(label) + 24
        if rows[-1] and x + need > width:
            rows.append([])
            x = 0.0
        rows[-1].append((x, label, colour))
        x += need
    return rows


def _panel(drawing: Drawing, panel: Panel, x: float, y: float) -> None:
    """Draw a panel whose upper left corner is (x, y)."""
    counts = sorted({k for curve in panel.curves for k, *_ in curve.points})
    values = [v for curve in panel.curves for _, v, *_ in curve.points if v > 0]
    drawing.text((x, y + 13), panel.title, size=14, bold=True)
    drawing.text((x + WIDTH - RIGHT, y + 13), panel.what, "soft", 12, anchor="end")
    if not counts or not values:
        return
    floors = [(what, value) for what, value in panel.floors if value > 0 and value > min(values) / 4]
    low, high = min([*values, *(value for _, value in floors)]), max(values)
    span = math.log10(high / low)
    low, high = math.log10(low) - 0.06 - 0.08 * span * bool(floors), math.log10(high) + 0.06  # the label's room
    first, last = math.log(counts[0]), math.log(counts[-1])
    x0, x1, y0, y1 = x + LEFT, x + WIDTH - RIGHT, y + TOP, y + HEIGHT - BOTTOM

    def place(k: float, value: float) -> Point:
        across = (math.log(k) - first) / (last - first) if last > first else 0.5
        up = (math.log10(max(value, 1e-300)) - low) / (high - low)
        return x0 + 8 + across * (x1 - x0 - 16), y1 - min(max(up, 0.0), 1.0) * (y1 - y0)

    for value in _ticks(low, high):
        _, at = place(counts[0], value)
        drawing.line([(x0, at), (x1, at)], "grid", 1.0)
        drawing.text((x0 - 6, at + 4), f"{value:g}", "soft", 11, anchor="end")
    for k in counts:
        at, _ = place(k, 1.0)
        drawing.line([(at, y1), (at, y1 + 4)], "soft", 1.0)
        drawing.text((at, y1 + 17), f"{k}", "soft", 11, anchor="middle")
    drawing.line([(x0, y1), (x1, y1)], "soft", 1.0)
    drawing.text(((x0 + x1) / 2, y1 + 33), "network evaluations", "soft", 11, anchor="middle")

    def on_top(curve: Curve) -> tuple[bool, int]:  # the first series on top
        named = curve.colour in SERIES
        return named, -SERIES.index(curve.colour) if named else 0

    for curve in sorted(panel.curves, key=on_top):
        points = sorted(curve.points)
        named = curve.colour != "other"
        if named and len(points) > 1:
            upper, lower = [place(k, h) for k, _, _, h in points], [place(k, low_) for k, _, low_, _ in points]
            drawing.area([*upper, *reversed(lower)], curve.colour, panel.band)
        drawing.line([place(k, v) for k, v, *_ in points], curve.colour, 2.2 if named else 1.0, text=curve.label)
        for k, v, *_ in points if named or len(points) == 1 else []:
            drawing.dot(place(k, v), curve.colour, 2.9, f"{curve.label}, {k} evaluations: {v:.4g}")
    for what, value in floors:
        _, at = place(counts[0], value)
        drawing.line([(x0, at), (x1, at)], "floor", 1.2, dash=True, text=f"{what}: {value:.3g}")
        drawing.text((x1 - 4, at + 13), what, "floor", 10.5, anchor="end")


def _ticks(low: float, high: float) -> list[float]:
    """Round values for the ticks of a logarithmic axis from 10^low to 10^high, three to eight if possible."""
    halves = [1 + 0.5 * i for i in range(18)]
    for steps in (halves, range(1, 10), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        decades = range(math.floor(low), math.ceil(high) + 1)
        found = [s * 10.0**d for d in decades for s in steps if low <= math.log10(s) + d <= high]
        if len(found) <= 8:
            return found
    return found[:: -(-len(found) // 8)]


# ---- writing


def style(selector: str = "svg") -> str:
    """The colours as variables, light and dark."""

    def block(colours: dict[str, str]) -> str:
        return "".join(f"--{name}:{colour};" for name, colour in colours.items())

    return f"{selector}{{{block(LIGHT)}}}@media(prefers-color-scheme:dark){{{selector}{{{block(DARK)}}}}}"


def svg(drawing: Drawing, alone: bool = True) -> str:
    """As SVG: on its own ground when it stands alone, else in the colours of the page around it.

    Alone it has presentation attributes only, in the light colours: Inkscape, librsvg and office programs know no
    variables of CSS and draw what is coloured by them in black.
    """
    w, h = drawing.width, drawing.height
    fonts = "font-family=\"system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif\""
    size = f'width="{w:g}" height="{h:g}" ' if alone else ""
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}viewBox="0 0 {w:g} {h:g}" {fonts} role="img">']
    if alone:
        parts.append(f'<rect width="{w:g}" height="{h:g}" {_paint("fill", "paper", alone)}/>')
    parts += [_svg_mark(mark, alone) for mark in drawing.marks]
    return "\n".join([*parts, "</svg>\n"])


def _paint(what: str, colour: str, alone: bool) -> str:
    """The attribute that fills or strokes in a colour by name: as it is when alone, else by the page's variable."""
    return f'{what}="{LIGHT[colour]}"' if alone else f'style="{what}:var(--{colour})"'


def _svg_mark(mark: Mark, alone: bool) -> str:
    """One element of SVG."""
    title = f"<title>{html.escape(mark.text)}</title>" if mark.text and mark.kind != "text" else ""
    fill = _paint("fill", mark.colour, alone)
    if mark.kind == "text":
        (x, y), weight = mark.points[0], ' font-weight="600"' if mark.bold else ""
        return (
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{mark.size:g}" text-anchor="{mark.anchor}"{weight} '
            f"{fill}>{html.escape(mark.text)}</text>"
        )
    if mark.kind == "dot":
        (x, y), r = mark.points[0], mark.size
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" {fill}>{title}</circle>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in mark.points)
    if mark.kind == "area":
        return f'<polygon points="{path}" {fill} fill-opacity="{mark.opacity:g}"/>'
    dash = ' stroke-dasharray="5 4"' if mark.dash else ""
    return (
        f'<polyline points="{path}" fill="none" stroke-width="{mark.size:g}" stroke-linejoin="round" '
        f'stroke-linecap="round"{dash} {_paint("stroke", mark.colour, alone)}>{title}</polyline>'
    )


def png(drawing: Drawing, scale: int = 2) -> bytes:
    """As PNG, in the light colours; `scale` pixels per unit."""
    from PIL import Image, ImageDraw, ImageFont

    fine = 2 * scale  # drawn at twice the size, for smooth edges; texts are smooth by themselves
    size = (round(drawing.width * fine), round(drawing.height * fine))
    picture = Image.new("RGB", size, LIGHT["paper"])
    brush = ImageDraw.Draw(picture)
    for mark in drawing.marks:
        points, colour = [(x * fine, y * fine) for x, y in mark.points], LIGHT[mark.colour]
        if mark.kind == "area":
            left, top = (math.floor(min(p[i] for p in points)) for i in (0, 1))
            box = [math.ceil(max(p[i] for p in points)) - start + 1 for i, start in ((0, left), (1, top))]
            mask = Image.new("L", (box[0], box[1]), 0)
            ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in points], fill=round(255 * mark.opacity))
            picture.paste(colour, (left, top), mask)
        elif mark.kind == "line":
            for piece in _dashed(points, 5 * fine, 4 * fine) if mark.dash else [points]:
                brush.line(piece, fill=colour, width=round(mark.size * fine), joint="curve")
        elif mark.kind == "dot":
            (x, y), r = points[0], mark.size * fine
            brush.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    picture = picture.resize((size[0] // 2, size[1] // 2), Image.Resampling.LANCZOS)
    brush = ImageDraw.Draw(picture)
    for mark in drawing.marks:
        if mark.kind == "text":
            (x, y), anchor = mark.points[0], {"start": "ls", "middle": "ms", "end": "rs"}[mark.anchor]
            font = ImageFont.load_default(mark.size * scale)
            heavy = scale / 5 if mark.bold else 0
            at = (x * scale, y * scale)
            brush.text(at, mark.text, LIGHT[mark.colour], font, anchor, stroke_width=heavy)
    picture = picture.quantize(256, dither=Image.Dither.NONE)  # a third of the bytes, and looks the same
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def _dashed(points: Sequence[Point], on: float, off: float) -> list[list[Point]]:
    """The dashes of a horizontal line."""
    (first, y), (last, _) = points[0], points[-1]
    count = math.ceil((last - first) / (on + off))
    starts = (first + i * (on + off) for i in range(count))
    return [[(x, y), (min(x + on, last), y)] for x in starts]
