"""The pictures of the documentation, drawn by the shipped networks.

    python benchmarks/pictures.py [--model avatars] [--out docs]

`nfe.png`: the same seeds at 5, 10, 20 and 40 denoiser calls for several samplers. `guidance.png`: the same seeds at
several scales of classifier-free guidance and, where the model has a sibling NAME-small, of autoguidance.
`denoising.webp`: the steps of one run as an animation, of at most 400 kB. Two minutes on one core.
"""

import argparse
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

import pfode
from pfode import defaults
from pfode.cli.images import contact_sheet, to_pixels
from pfode.header import read_header
from pfode.scores.io.shipped import shipped

SAMPLERS = ["euler", "dpm++2m", "ipndm3", "heun"]
BUDGETS = [5, 10, 20, 40]
SCALES = [1.0, 1.5, 2.0, 3.0]
GAP, MARGIN, LINE = 2, 84, 18


def strip(x: Tensor, scale: int) -> Image.Image:
    """Pictures (n, c, h, w) in [-1, 1] side by side."""
    side = x.shape[-1] * scale
    out = Image.new("RGB", (len(x) * (side + GAP) - GAP, side), "white")
    for i, pixels in enumerate(to_pixels(x)):
        picture = Image.fromarray(pixels).convert("RGB").resize((side, side), Image.Resampling.NEAREST)
        out.paste(picture, (i * (side + GAP), 0))
    return out


def table(cells: list[list[Image.Image]], rows: list[str], columns: list[str]) -> Image.Image:
    """Strips in rows and columns, with their names."""
    width, height = cells[0][0].size
    size = (MARGIN + len(columns) * (width + 4 * GAP), LINE + len(rows) * (height + 2 * GAP))
    out = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(13)
    for j, name in enumerate(columns):
        draw.text((MARGIN + j * (width + 4 * GAP), 1), name, fill="black", font=font)
    for i, name in enumerate(rows):
        top = LINE + i * (height + 2 * GAP)
        draw.text((4, top + height // 2 - 8), name, fill="black", font=font)
        for j, cell in enumerate(cells[i]):
            out.paste(cell, (MARGIN + j * (width + 4 * GAP), top))
    return out


def animation(net: Any, seed: int, scale: int, most: int = 400_000) -> bytes:
    """The states of a run of 20 steps, scaled to one variance, as an endless WebP of at most `most` bytes.

    Two rows of eight pictures, the classes in turn; the last frame is held. Quality falls until the bytes suffice.
    """
    classes = len(net.labels or ())
    label = [i % classes for i in range(16)] if classes else None
    out = pfode.sample(net, 16, steps=20, label=label, seed=seed, trajectory=True)
    assert isinstance(out.plan, pfode.Plan)
    levels = torch.hypot(*(level[out.plan.node] for level in (out.plan.alpha, out.plan.sigma))).tolist()
    states = [x / level for x, level in zip(out.trajectory, levels, strict=True)]
    frames = [Image.fromarray(contact_sheet(to_pixels(x), scale, 8)).convert("RGB") for x in states]
    durations = [110] * (len(frames) - 1) + [2500]
    for quality in range(90, 0, -10):
        stream = io.BytesIO()
        how: dict[str, Any] = {"duration": durations, "loop": 0, "quality": quality, "method": 6}
        frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:], **how)
        if stream.tell() <= most:
            return stream.getvalue()
    raise SystemExit(f"an animation of less than {most} bytes is not to be had: a smaller --scale")


def save(picture: Image.Image, path: Path, model: str) -> None:
    """With the model's digest in the text, so that a test can tell a picture of an older network."""
    text = PngImagePlugin.PngInfo()
    text.add_text("made", f"benchmarks/pictures.py, {model} {read_header(shipped()[model]).metadata['pfode.digest']}")
    picture.save(path, pnginfo=text, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=defaults.MODEL)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    net = pfode.load(options.model)
    classes = len(net.labels or ())
    scale = max(1, 64 // (net.shape or (1, 32, 32))[1])

    (options.out / "denoising.webp").write_bytes(animation(net, options.seed, scale))

    few = torch.tensor([0, 3, 4, 8]) % classes
    cells = [
        [strip(pfode.sample(net, 4, nfe=k, sampler=name, label=few, seed=options.seed).x, scale) for k in BUDGETS]
        for name in SAMPLERS
    ]
    save(table(cells, SAMPLERS, [f"{k} NFE" for k in BUDGETS]), options.out / "nfe.png", options.model)

    every = torch.arange(classes)
    small = f"{options.model}-small"
    rows, cells = [], []
    for weak in [None, pfode.load(small)] if small in shipped() else [None]:
        for w in SCALES:
            guided = pfode.scores.guide(net, w, weak=weak)
            rows.append(f"{'auto ' if weak else ''}{w:g}")
            cells.append([strip(pfode.sample(guided, classes, nfe=20, label=every, seed=options.seed).x, scale)])
    head = ["20 NFE, one picture of every class, by scale"]
    save(table(cells, rows, head), options.out / "guidance.png", options.model)


if __name__ == "__main__":
    main()
