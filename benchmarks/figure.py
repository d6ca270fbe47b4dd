"""The figure at the top of the README: pictures, and the error against network calls, of one network.

    python benchmarks/figure.py [--model avatars] [--n 64] [--teacher 256] [--out docs/figure.png]

Three rows draw the same noise: the best of diffusers' schedulers, the best of pfode's samplers, and the plans fitted to
the network; a fourth has the converged solution. The curves are the distance to it (RMS over the samples, per pixel).
"Best" is taken at every number of calls, for diffusers as for pfode, each with the best of three grids, which is
chosen on other noise. The measurements lie in benchmarks/results/figure, where a stopped run goes on.
"""

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from pfode import defaults
from pfode.cli import plot
from pfode.cli.bench import find_problem
from pfode.cli.images import to_pixels
from pfode.cli.models import model_digest
from pfode.cli.progress import CellBar
from pfode.cli.streams import Output
from pfode.files import write_atomic
from pfode.samplers.measure import bench, results
from pfode.scores.io.find import guided_name, model_path

RESULTS = Path(__file__).parent / "results" / "figure"
GRIDS = "grid=karras/cosine/ays-svd"
ROWS = {  # name, its colour, its samplers
    "diffusers": ("s3", [
        f"diffusers:DPMSolverMultistepScheduler?{GRIDS}", f"diffusers:UniPCMultistepScheduler?{GRIDS}",
        f"diffusers:UniPCMultistepScheduler?solver_order=3&{GRIDS}", f"diffusers:DEISMultistepScheduler?{GRIDS}",
        f"diffusers:IPNDMScheduler?{GRIDS}", f"diffusers:EulerDiscreteScheduler?{GRIDS}",
    ]),
    "pfode": ("s1", [
        "auto", f"dpm++2m?{GRIDS}", f"unipc2?chart=flow&{GRIDS}", f"unipc3?chart=flow&{GRIDS}",
        f"ipndm2?chart=trig&{GRIDS}", f"ipndm3?chart=ddim&{GRIDS}",
    ]),
    "pfode, fitted": ("s0", ["fitted"]),
}  # fmt: skip
CALLS = (3, 4, 5, 6, 8, 10, 15, 20)
SHOWN, PICTURES = (4, 6, 8), 3  # calls of the columns of pictures; pictures in each
CELL, GAP, LABEL, HEAD = 160, 3, 150, 30  # pixels


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All cells of the figure, from the folder where they are there."""
    how = {"device": defaults.DEVICE, "features": None, "truth": None, "n": options.n, "seed": None}
    how |= {"validation": max(8, options.n // 2), "teacher": options.teacher, "batch": defaults.Bench.BATCH}
    problem = find_problem(options.model, how)
    fitted = [options.plans] if options.plans else ROWS["pfode, fitted"][1]
    ROWS["pfode, fitted"] = (ROWS["pfode, fitted"][0], fitted)
    texts = [text for _, samplers in ROWS.values() for text in samplers]
    with CellBar(Output()) as progress:
        return bench.bench([(problem, texts)], options.results, options.calls, progress=progress)


def best(result: dict[str, Any], model: str) -> dict[str, dict[int, tuple[str, list[float]]]]:
    """The best sampler of every row at every number of calls, with its error and the ends of its interval."""
    cells = {(c["sampler"], c["evals"]): c["rms"] for c in result["cells"] if c["bed"] == model and "rms" in c}
    found: dict[str, dict[int, tuple[str, list[float]]]] = {}
    for row, (_, samplers) in ROWS.items():
        for k in sorted({k for _, k in cells}):
            there = [(cells[text, k], text) for text in samplers if (text, k) in cells]
            if there:
                error, text = min(there, key=lambda pair: pair[0][0])
                found.setdefault(row, {})[k] = text, error
    return found


def strip(x: Any) -> Image.Image:
    """A few pictures side by side."""
    made = Image.new("RGB", (PICTURES * (CELL + GAP) - GAP, CELL), "white")
    for i, pixels in enumerate(to_pixels(x)[:PICTURES]):
        picture = Image.fromarray(pixels).convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST)
        made.paste(picture, (i * (CELL + GAP), 0))
    return made


def pictures(cache: results.Cache, model: str, chosen: dict[str, dict[int, tuple[str, list[float]]]]) -> Image.Image:
    """The rows of pictures, with their names and numbers of calls."""
    width = PICTURES * (CELL + GAP) + 5 * GAP
    made = Image.new("RGB", (LABEL + len(SHOWN) * width, HEAD + (len(ROWS) + 1) * (CELL + GAP)), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(19)
    for j, k in enumerate(SHOWN):
        draw.text((LABEL + j * width, 2), f"{k} network calls", plot.LIGHT["ink"], font)
    for i, row in enumerate([*ROWS, "converged"]):
        top = HEAD + i * (CELL + GAP)
        colour = plot.LIGHT[ROWS[row][0] if row in ROWS else "ink"]
        draw.text((6, top + CELL // 2 - 12), row, colour, font)
        for j, k in enumerate(SHOWN):
            text = chosen.get(row, {}).get(k, ("", []))[0] if row in ROWS else ""
            x = cache.samples(model, text, k if row in ROWS else 0) if text or row not in ROWS else None
            if x is not None:
                made.paste(strip(x), (LABEL + j * width, top))
    return made


def curves(chosen: dict[str, dict[int, tuple[str, list[float]]]]) -> Image.Image:
    """The error against the calls."""
    lines = [
        plot.Curve(row, ROWS[row][0], [(k, *error) for k, (_, error) in at.items()])  # type: ignore[misc]
        for row, at in chosen.items()
    ]
    panel = plot.Panel("distance to the converged picture", "RMS", lines)
    drawing = plot.draw([panel], [(row, ROWS[row][0]) for row in chosen])
    with Image.open(io.BytesIO(plot.png(drawing))) as picture:
        return picture.convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=defaults.MODEL, help="also guided, as in avatars@2")
    parser.add_argument("--n", type=int, default=64, help="samples")
    parser.add_argument("--teacher", type=int, default=256, help="most evaluations of the converged solution")
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS, help="network calls of the curves")
    parser.add_argument("--plans", help="folder of fitted plans, where the model has none of its own")
    parser.add_argument("--results", type=Path, help="folder of the measurements")
    parser.add_argument("--out", type=Path, default=Path("docs/figure.png"))
    options = parser.parse_args()
    options.results = options.results or RESULTS / options.model
    chosen = best(measure(options), options.model)
    left, right = pictures(results.Cache(options.results / results.CACHE), options.model, chosen), curves(chosen)
    whole = np.full((max(left.height, right.height), left.width + right.width, 3), 255, np.uint8)
    whole[: left.height, : left.width] = np.asarray(left)
    whole[: right.height, left.width :] = np.asarray(right)
    text = PngImagePlugin.PngInfo()
    digest = model_digest(model_path(guided_name(options.model)[0]))
    text.add_text("made", f"benchmarks/figure.py, {options.model} {digest}")
    stream = io.BytesIO()
    Image.fromarray(whole).save(stream, "PNG", pnginfo=text, optimize=True)
    write_atomic(options.out, stream.getvalue())
    for row, at in chosen.items():
        print(row, ", ".join(f"{k}: {error[0]:.4f} ({text.partition('?')[0]})" for k, (text, error) in at.items()))


if __name__ == "__main__":
    main()
