"""The pictures that the network `letters` is trained on: A-Z, a-z and 0-9 of some hundred free typefaces, 32x32, grey.

    python benchmarks/networks/letter_data.py runs/letters.npz [--fonts runs/fonts] [--held runs/letters-held.npz]

The fonts are packages of Debian 12, their versions and licences in letter_fonts.json; those that are not in the folder
yet are downloaded by `apt-get download` and unpacked there, not installed. Every face is scaled to one height of its
capitals and set on one baseline. Left out: faces that lack a letter, have no lower case of their own or are too large
for the square, the same face a second time, and all but 16 faces of a package; of faces with old-style figures the
figures. Every picture comes with the style code of its face: the whitened first principal components of all its
letters. Fifteen seconds on one core, and the download of 250 MB.
"""

import argparse
import hashlib
import json
import string
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["BASELINE", "CAP", "GLYPHS", "SIZE", "STYLES", "packages"]

SIZE, CAP, BASELINE, OVER = 32, 19, 24, 4  # pixels: the square, height of capitals, row of the baseline; oversampling
WIDE = 30  # pixels; wider letters are narrowed
GLYPHS = string.ascii_uppercase + string.ascii_lowercase + string.digits
LETTERS = 52  # of them
STYLES = 24  # numbers of a style code
MOST = 16  # faces of a package
ODD = (
    "smallcap",
    "caps",
    "sc-",
    "sc.",
    "-sc",
    "math",
    "outline",
    "stencil",
    "initials",
    "symbol",
    "unicase",
    "integral",
)


@dataclass(frozen=True)
class Face:
    """A typeface: its package and file, the pictures of GLYPHS (62, SIZE, SIZE), and whether its figures are lining."""

    package: str
    file: str
    pictures: np.ndarray
    lining: bool


def packages() -> dict[str, tuple[str, str]]:
    """Version and licence of every package of fonts."""
    found = json.loads(Path(__file__).with_name("letter_fonts.json").read_text())
    return {name: (version, licence) for name, (version, licence) in found.items()}


def unpacked(folder: Path) -> None:
    """Download and unpack what is not in the folder yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (version, _) in packages().items():
        if not (folder / name).is_dir():
            subprocess.run(["apt-get", "download", "-qq", f"{name}={version}"], cwd=folder, check=True)
            archive = next(folder.glob(f"{name}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", archive, folder / name], check=True)
            archive.unlink()


def faces(folder: Path) -> Iterator[Face]:
    """The faces that are taken, package by package."""
    seen: set[str] = set()
    for package in packages():
        files = [
            p for p in sorted((folder / package).rglob("*")) if p.suffix in (".ttf", ".otf") and not p.is_symlink()
        ]
        sound = []
        for file in files:
            name = file.name.lower()
            if any(word in name for word in ODD) or (package == "fonts-noto-core" and not _latin(file.stem)):
                continue
            drawn = _face(file)
            if drawn is None:
                continue
            digest = hashlib.sha256(drawn[0][:LETTERS].tobytes()).hexdigest()
            if digest not in seen:
                seen.add(digest)
                sound.append(Face(package, file.name, *drawn))
        step = max(1.0, len(sound) / MOST)
        yield from (sound[int(i * step)] for i in range(min(len(sound), MOST)))


def _latin(stem: str) -> bool:
    """Whether a file of the Noto fonts is one for Latin: the others repeat its letters."""
    return stem.split("-")[0] in ("NotoSans", "NotoSerif", "NotoSansDisplay", "NotoSerifDisplay", "NotoSansMono")


def _face(file: Path) -> tuple[np.ndarray, bool] | None:
    """The pictures of a face, and whether its figures are lining; None if it is not to be taken."""
    try:
        probe = ImageFont.truetype(str(file), 400)
        boxes = {glyph: probe.getbbox(glyph, anchor="ls") for glyph in GLYPHS}
        missing = _mask(probe, "\uffff")
    except (OSError, ValueError):
        return None
    heights = {glyph: -box[1] for glyph, box in boxes.items()}
    cap, x_height = heights["H"], heights["x"]
    if cap < 40 or min(box[2] - box[0] for box in boxes.values()) <= 0 or not 0.3 * cap < x_height < 0.88 * cap:
        return None
    if any(_mask(probe, glyph) == missing for glyph in "Aag5"):
        return None
    scale = CAP * OVER / cap
    high = max(heights.values()) * scale / OVER
    low = max(box[3] for box in boxes.values()) * scale / OVER
    if high > BASELINE + 1 or low > SIZE - BASELINE + 1:
        return None
    font = ImageFont.truetype(str(file), 400 * scale)
    pictures = np.stack([_glyph(font, glyph) for glyph in GLYPHS])
    lining = min(heights[figure] for figure in string.digits) > 0.88 * cap
    return pictures, lining


def _mask(font: ImageFont.FreeTypeFont, text: str) -> bytes:
    mask: Any = font.getmask(text)
    return bytes(mask)


def _glyph(font: ImageFont.FreeTypeFont, glyph: str) -> np.ndarray:
    """A letter on the baseline, its ink in the middle: black on white, uint8 (SIZE, SIZE)."""
    left, _, right, _ = font.getbbox(glyph, anchor="ls")
    width = max(int(right - left) + 2 * OVER, SIZE * OVER)
    canvas = Image.new("L", (width, SIZE * OVER), 255)
    at = ((width - (right - left)) / 2 - left, BASELINE * OVER)
    ImageDraw.Draw(canvas).text(at, glyph, font=font, fill=0, anchor="ls")
    if right - left > WIDE * OVER:
        side = round(width * WIDE * OVER / (right - left))
        canvas = canvas.resize((side, SIZE * OVER), Image.Resampling.BOX)
    offset = (canvas.width - SIZE * OVER) // 2
    canvas = canvas.crop((offset, 0, offset + SIZE * OVER, SIZE * OVER))
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))


def codes(train: list[Face], other: list[Face]) -> tuple[np.ndarray, np.ndarray]:
    """Style codes of both lists, float32 (faces, STYLES): the first list's principal components, whitened."""
    rows = [
        np.stack([f.pictures[:LETTERS].ravel() for f in group]).astype(np.float32) / 127.5 - 1
        for group in (train, other)
    ]
    mean = rows[0].mean(0)
    centred = rows[0] - mean
    values, vectors = np.linalg.eigh(centred @ centred.T)
    order = np.argsort(values)[::-1][:STYLES]
    axes = centred.T @ (vectors[:, order] / np.sqrt(values[order]))  # unit vectors, (pixels, STYLES)
    deviation = np.sqrt(values[order] / len(train))
    share = values[order].sum() / values.sum()
    print(f"{STYLES} components have {share:.0%} of the variance between faces")
    first, second = ((group - mean) @ axes / deviation for group in rows)
    return first.astype(np.float32), second.astype(np.float32)


def arrays(group: list[Face], styles: np.ndarray) -> dict[str, Any]:
    """Arrays of an npz of `pfode train`."""
    images, labels, rows = [], [], []
    for face, code in zip(group, styles, strict=True):
        for label, picture in enumerate(face.pictures[: len(GLYPHS) if face.lining else LETTERS]):
            images.append(picture)
            labels.append(label)
            rows.append(code)
    used = Counter(face.package for face in group)
    known = packages()
    count = Counter()
    for package, faces_of_it in used.items():
        count[known[package][1]] += faces_of_it
    licence = ", ".join(f"{name} ({n} faces)" for name, n in count.most_common())
    return {
        "images": np.stack(images),
        "labels": np.array(labels),
        "names": np.array(list(GLYPHS)),
        "styles": np.stack(rows),
        "source": np.array(f"{len(group)} faces of {len(used)} font packages of Debian 12, drawn by Pillow"),
        "licence": np.array(licence),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="FILE.npz")
    parser.add_argument(
        "--fonts", type=Path, default=Path("runs/fonts"), help="where the fonts are, or go (runs/fonts)"
    )
    parser.add_argument("--held", type=Path, help="FILE.npz for the pictures of every 25th face, which out then lacks")
    options = parser.parse_args()
    unpacked(options.fonts)
    found = list(faces(options.fonts))
    held = found[12::25] if options.held else []
    train = [face for face in found if not any(face is one for one in held)]
    both = codes(train, held or train[:1])
    for path, group, styles in ((options.out, train, both[0]), (options.held, held, both[1])):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            made = arrays(group, styles)
            np.savez_compressed(path, **made)
            lining = sum(face.lining for face in group)
            print(f"{path}: {len(made['images'])} pictures of {len(group)} faces, {lining} with lining figures")
    used = Counter(face.package for face in train)
    options.out.with_suffix(".faces.json").write_text(json.dumps(used, indent=1))


if __name__ == "__main__":
    main()
