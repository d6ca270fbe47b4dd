"""What a benchmark says: table.md, quality.svg and .png, and report.html, which needs nothing beside it."""

import base64
import collections
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pfode.cli import plot
from pfode.files import write_atomic
from pfode.samplers.measure import results
from pfode.samplers.measure.comparison import DISTRIBUTION, END_POINT
from pfode.samplers.measure.spec import Spec

__all__ = ["label", "write"]

Result = dict[str, Any]
METRICS = {**END_POINT, **DISTRIBUTION}
IN_TABLES = ("rms", "median", "flipped", "energy", "sliced")
SHOWN = 5  # samplers in a row of pictures
AT = (4, 6, 10)  # evaluations of the strips


def write(out: Path, result: Result, title: str = "Quality against evaluations") -> list[str]:
    """Write every file; their names, the report first.

    Raises:
        WriteError: one that cannot be written.
    """
    colours = coloured(result)
    figure = plot.draw(panels(result, colours), [(label(text), colour) for text, colour in colours.items()])
    files = {
        "report.html": page(out, result, title, figure).encode(),
        "table.md": markdown(result, title).encode(),
        "quality.svg": plot.svg(figure).encode(),
        "quality.png": plot.png(figure),
    }
    return [str(write_atomic(out / name, data)) for name, data in files.items()]


# ---- names and colours


def label(text: str) -> str:
    """A sampler as it is called in a figure: without the search over grids, which the tables of choices show."""
    name, _, options = text.partition("?")
    kept = [pair for pair in options.split("&") if pair and pair != "grid=best"]
    words = [pair.removeprefix("chart=").removeprefix("solver_") for pair in kept]
    if name.endswith(".safetensors") or "/" in name:
        name = Path(name).name
    package, colon, peer = name.partition(":")
    if colon:
        name = f"{package} {peer.removeprefix('sample_').removesuffix('Scheduler').removesuffix('Multistep')}"
    return f"{name} ({', '.join(words)})" if words else name


def coloured(result: Result) -> dict[str, str]:
    """The samplers that get a colour of their own: fitted ones, auto, two peers, then the others by their mean rank."""
    means: dict[str, list[float]] = {}
    for ranking in results.rank(result) or results.rank(result, "frechet"):
        for text, mean in ranking.order:
            means.setdefault(text, []).append(mean)
    order = sorted(means, key=lambda text: (-len(means[text]), results.geometric_mean(means[text])))
    kinds = {text: Spec.parse(text).kind for text in order}
    first = [text for text in order if kinds[text] in ("fitted", "plan", "plans")] + [t for t in order if t == "auto"]
    first += [text for text in order if kinds[text] == "peer"][:2]
    chosen = dict.fromkeys([*first, *order])
    kept = list(chosen)[: len(plot.SERIES)]
    return dict(zip(sorted(kept, key=order.index), plot.SERIES, strict=False))


def panels(result: Result, colours: dict[str, str]) -> list[plot.Panel]:
    """One panel per model of the RMS error, and one of the energy distance where there are true samples."""
    found = []
    for key in ("rms", "energy"):
        for bed, settings in result["beds"].items():
            curves = _curves(result, bed, key, colours)
            floor = settings["floor"]
            if not curves:
                continue
            teacher, truth = floor.get("teacher", {}), floor.get("truth", {})
            if key == "rms":
                floors = [("the teacher's own error", teacher.get("error") or 0.0)]
            else:
                floors = [("two sets of true samples", results.figure(truth, key) or 0.0)]
            found.append(plot.Panel(bed, METRICS[key].title, curves, floors, 0.09 if key == "rms" else 0.035))
    return found


def _curves(result: Result, bed: str, key: str, colours: dict[str, str]) -> list[plot.Curve]:
    points: dict[str, list[tuple[int, float, float, float]]] = {}
    for cell in result["cells"]:
        if cell["bed"] == bed and key in cell:
            value, low, high = cell[key]
            points.setdefault(cell["sampler"], []).append((cell["evals"], value, low, high))
    named = {label(text): colour for text, colour in colours.items()}  # plans of a folder, or of the model's own
    return [plot.Curve(label(text), named.get(label(text), "other"), found) for text, found in points.items()]


# ---- table.md


def markdown(result: Result, title: str) -> str:
    """The page table.md: the recommendations, then the figures of every model."""
    lines = [f"# {title}", "", *_advice(result), ""]
    for bed, settings in result["beds"].items():
        lines += [f"## {bed}", "", _about(settings), ""]
        for key in IN_TABLES:
            head, rows = _rows(result, bed, key)
            if rows:
                lines += [f"{METRICS[key].title} by evaluations:", "", *_markdown(head, rows), ""]
    lines += ["## What is measured", "", *(f"* **{metric.title}**: {metric.about}." for metric in METRICS.values()), ""]
    return "\n".join(lines)


def _advice(result: Result) -> list[str]:
    """Which sampler to take at which number of evaluations."""
    rows = []
    for ranking in results.rank(result):
        named = [f"{label(text)} ({mean:.2f}x)" for text, mean in ranking.order[:3]]
        rows.append([f"{ranking.evals}", *named, *[""] * (3 - len(named))])
    if not rows:
        return []
    what = "In brackets: RMS error over each model's best, geometric mean over the models measured, more than half."
    return ["Which sampler to use:", "", *_markdown(("evaluations", "first", "second", "third"), rows), "", what]


def _about(settings: dict[str, Any]) -> str:
    """The settings of a model, and the errors that no sampler can pass, in a sentence."""
    parts = [f"{settings['process']}, {settings['n']} samples"]
    floor = settings["floor"]
    if "teacher" in floor:
        teacher = floor["teacher"]
        calls, error = teacher["calls"], teacher["error"]
        parts.append(f"teacher of {calls} calls, its own error {error:.2g}" if calls else "teacher exact")
    if "truth" in floor:
        parts.append(f"two sets of true samples differ by {floor['truth']['energy'][0]:.3g} (energy)")
        if "teacher" in floor and "energy" in floor["teacher"]:
            parts.append(f"the teacher from the truth by {floor['teacher']['energy'][0]:.3g}")
    return "; ".join(parts) + "."


def _rows(result: Result, bed: str, key: str) -> tuple[list[str], list[list[str]]]:
    """The head and rows of a table, samplers by evaluations; the best of each column stands between asterisks."""
    values = {(s, k): value for (b, s, k), value in results.table(result, key).items() if b == bed}
    counts = sorted({k for _, k in values})
    samplers = sorted({s for s, _ in values})
    best = {k: min(value for (_, at), value in values.items() if at == k) for k in counts}

    def shown(sampler: str, k: int) -> str:
        value = values.get((sampler, k))
        if value is None:
            return ""
        return f"**{value:.3g}**" if value == best[k] else f"{value:.3g}"

    rows = [[label(s), *(shown(s, k) for k in counts)] for s in samplers]
    return ["sampler", *map(str, counts)], rows


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


# ---- report.html


def page(out: Path, result: Result, title: str, figure: plot.Drawing) -> str:
    """The page report.html."""
    body = [
        f"<h1>{html.escape(title)}</h1>",
        _lead(result),
        f'<section class="wide">{plot.svg(figure, alone=False)}</section>',
        "<p class=soft>Coloured: the samplers that do best over all models, with bootstrap bands of 95 %; grey: the "
        "others. Point at a line to see its name. Dashed: what cannot be passed.</p>",
        _strips(out, result),
        "<h2>Every figure</h2>",
        *(_details(result, bed) for bed in result["beds"]),
        "<h2>What is measured</h2>",
        "<dl>" + "".join(f"<dt>{metric.title}</dt><dd>{metric.about}</dd>" for metric in METRICS.values()) + "</dl>",
        _made(result),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{html.escape(title)}</title>'
        f"<style>{plot.style(':root')}{CSS}</style>"
    )
    text = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{text}\n</main></body></html>\n'


CSS = """
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
main{max-width:1220px;margin:0 auto;padding:36px 28px 80px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}h2{font-size:20px;margin:44px 0 10px}
h3{font-size:16px;margin:26px 0 8px}.soft,dd,caption{color:var(--soft)}p{max-width:76ch}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13.5px}
th,td{padding:5px 12px 5px 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:500}
td.best{font-weight:700}caption{text-align:left;padding:14px 0 4px}
.scroll{overflow-x:auto}.lead td{font-size:15px;padding:7px 22px 7px 0;text-align:left}.lead td b{font-weight:650}
.lead small{display:block;color:var(--soft);font-size:12.5px;line-height:1.3}.lead td{vertical-align:top}
.lead th{text-align:left;padding-right:22px}.lead td span{color:var(--soft)}
.wide{margin:26px 0 6px}.wide svg{width:calc(100% + 44px);margin-left:-22px;height:auto;display:block}
details{border-top:1px solid var(--grid);padding:8px 0}summary{cursor:pointer;font-weight:600}
.strip{display:grid;grid-template-columns:max-content max-content;gap:6px 16px;align-items:center;margin:0 34px 18px 0}
.strip img{display:block;height:48px}.strip img.small{image-rendering:pixelated}
.strip span{font-size:13px}.strip small{color:var(--soft);display:block}.strips{display:flex;flex-wrap:wrap}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 20px;max-width:100ch}dt{font-weight:600}dd{margin:0}
code{font-size:12.5px;background:var(--grid);padding:1px 5px;border-radius:4px}
"""


def _lead(result: Result) -> str:
    """The first paragraph and table: which sampler to use at which number of evaluations."""
    rows = []
    for ranking in results.rank(result):
        cells = [f"<td>{ranking.evals}</td>"]
        for i, (text, mean) in enumerate(ranking.order[:3]):
            name = html.escape(label(text))
            taken = html.escape(_taken(result, text, ranking.evals)) if i == 0 else ""
            named = f"<b>{name}</b> <span>{mean:.2f}x</span><small>{taken}</small>" if i == 0 else name
            cells.append(f"<td>{named}</td>" if i == 0 else f"<td>{named} <span>{mean:.2f}x</span></td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    if not rows:
        return "<p>No end points were compared.</p>"
    beds = ", ".join(html.escape(bed) for bed in result["beds"])
    return (
        "<p>Which sampler to use, by network evaluations per sample. The factor is the RMS error over that of the best "
        f"sampler of each model, geometric mean over those it was measured on, more than half of {beds}.</p>"
        '<div class="scroll"><table class="lead"><tr><th>evaluations</th><th>use</th><th>then</th><th>then</th></tr>'
        f"{''.join(rows)}</table></div>"
    )


def _taken(result: Result, text: str, evals: int) -> str:
    """The alternative of a sampler that most models chose."""
    words = [c["chosen"] for c in result["cells"] if c["sampler"] == text and c["evals"] == evals and c.get("chosen")]
    if not words:
        return ""
    (most, count), *_ = collections.Counter(words).most_common(1)
    plain = most.replace("grid=", "").replace("chart=", "")
    if count == len(words):
        return plain
    return f"{plain} on {count} of {len(words)} models" if 2 * count > len(words) else "by model, see below"


def _details(result: Result, bed: str) -> str:
    settings = result["beds"][bed]
    tables = []
    for key in METRICS:
        head, rows = _rows(result, bed, key)
        if not rows:
            continue
        lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
        lines += ["".join(_cell(cell, key) for cell in row) for row in rows]
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        tables.append(f'<div class="scroll"><table><caption>{METRICS[key].title}</caption>{body}</table></div>')
    chosen = _chosen(result, bed)
    about = html.escape(_about(settings))
    return f"<details><summary>{html.escape(bed)}</summary><p class=soft>{about}</p>{''.join(tables)}{chosen}</details>"


def _cell(cell: str, key: str) -> str:
    best = cell.startswith("**") and key in IN_TABLES
    return f"<td{' class=best' if best else ''}>{html.escape(cell.strip('*'))}</td>"


def _chosen(result: Result, bed: str) -> str:
    """The table of the alternatives that were chosen."""
    cells = [c for c in result["cells"] if c["bed"] == bed and c.get("chosen")]
    counts = sorted({c["evals"] for c in cells})
    found = {(c["sampler"], c["evals"]): c["chosen"].replace("grid=", "").replace("chart=", "") for c in cells}
    lines = ["<tr><th>sampler</th>" + "".join(f"<th>{k}</th>" for k in counts) + "</tr>"]
    for text in sorted({c["sampler"] for c in cells}):
        row = "".join(f"<td>{html.escape(found.get((text, k), ''))}</td>" for k in counts)
        lines.append(f"<tr><td>{html.escape(label(text))}</td>{row}</tr>")
    caption = "taken among the alternatives, on the validation noise"
    return f'<div class="scroll"><table><caption>{caption}</caption>{"".join(lines)}</table></div>' if found else ""


def _strips(out: Path, result: Result) -> str:
    """Strips of pictures: the same seeds drawn by every sampler, under the converged ones."""
    parts, cache = [], results.Cache(out / results.CACHE)
    colours = coloured(result)
    for bed in result["beds"]:
        converged = cache.samples(bed, "", 0)
        if converged is None or converged.ndim != 4 or converged.shape[1] not in (1, 3):
            continue
        counts = sorted({c["evals"] for c in result["cells"] if c["bed"] == bed and "rms" in c})
        blocks = []
        for k in [k for k in AT if k in counts] or counts[:3]:
            rows = [("converged", "", converged)]
            errors = {s: v for (b, s, at), v in results.table(result, "rms").items() if b == bed and at == k}
            for text in [t for t in colours if t in errors][:SHOWN]:
                drawn = cache.samples(bed, text, k)
                if drawn is not None:
                    rows.append((label(text), f"RMS {errors[text]:.3g}", drawn))
            cells = "".join(f"<span>{html.escape(a)}<small>{b}</small></span>{_picture(x)}" for a, b, x in rows)
            blocks.append(f'<div><h3>{k} evaluations</h3><div class="strip">{cells}</div></div>')
        if blocks:
            parts.append(f'<h2>{html.escape(bed)}</h2><div class="strips">{"".join(blocks)}</div>')
    if not parts:
        return ""
    return "<h2>The same seeds, beside the converged picture</h2>" + re.sub("<(/?)h2>", r"<\1h3>", "".join(parts))


def _picture(x: Any) -> str:
    """A strip of pictures side by side, as an element of the page."""
    import numpy as np
    from PIL import Image

    from pfode.cli import images

    pixels = [Image.fromarray(one).convert("RGBA") for one in images.to_pixels(x)]
    gap = max(1, pixels[0].height // 16)
    strip = [np.pad(np.asarray(one), ((0, 0), (0, gap), (0, 0))) for one in pixels]
    stream = io.BytesIO()
    Image.fromarray(np.concatenate(strip, 1)[:, :-gap]).save(stream, "PNG", optimize=True)
    data = base64.b64encode(stream.getvalue()).decode()
    small = ' class="small"' if pixels[0].height <= 16 else ""
    return f'<img alt=""{small} src="data:image/png;base64,{data}">'


def _made(result: Result) -> str:
    """The last paragraph: the versions with which the figures were made."""
    words = ", ".join(f"{name} {version}" for name, version in {"pfode": result["pfode"], **result["versions"]}.items())
    rows = [
        f"<tr><td>{html.escape(bed)}</td><td>{s['n']}</td><td>{s['seed']}</td><td>{s['validation']}</td>"
        f"<td>{html.escape(s['process'])}</td></tr>"
        for bed, s in result["beds"].items()
    ]
    head = "<tr><th>model</th><th>samples</th><th>first seed</th><th>validation samples</th><th>process</th></tr>"
    return f'<h2>How it was made</h2><p>{words}</p><div class="scroll"><table>{head}{"".join(rows)}</table></div>'
