"""The pictures that the network `avatars` is trained on: ten styles of the DiceBear avatar library, 32x32, colour.

    pip install -r benchmarks/networks/requirements.txt
    python benchmarks/networks/avatar_data.py runs/avatars.npz [--each 3000] [--first 0]

A seed is a picture, the same on every machine: picture i of a style has the seed "pfode-i". Only styles under CC0 1.0
by their own metadata are taken, and duplicates are left out. About a minute on one core.
"""

import argparse
import io
import json
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["CLASSES", "SIZE", "avatars", "licences"]

SIZE = 32
CLASSES = {  # names of the classes: styles of dicebear-styles
    "planet": "planets",
    "plant": "sprouts",
    "monster": "critters",
    "smiley": "moods",
    "robot": "voxel-bot",
    "person": "voxel-art",
    "face": "pixel-art",
    "portrait": "open-peeps",
    "landscape": "landscape",
    "stones": "stack",
}
PACKAGES = ("dicebear-core", "dicebear-styles", "resvg_py")


def definition(style: str) -> dict[str, object]:
    """The definition of a style, as its package has it."""
    return json.loads(files("dicebear_styles").joinpath(f"{style}.json").read_text("utf-8"))


def licences() -> list[dict[str, str]]:
    """Of every class: style, licence, its address, and the text that the style's metadata asks for.

    Raises:
        ValueError: a style is not under CC0 1.0.
    """
    found = []
    for name, style in CLASSES.items():
        meta = definition(style)["meta"]
        assert isinstance(meta, dict)
        licence = meta["license"]
        if licence["name"] != "CC0 1.0":
            raise ValueError(f"{style}: {licence['name']}")
        found.append({"class": name, "style": style, "licence": licence["name"], "text": licence["text"]})
    return found


def rendered(svg: str) -> np.ndarray:
    """An SVG as uint8 (SIZE, SIZE, 3), on white."""
    png = import_module("resvg_py").svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    return np.asarray(page.convert("RGB"))


def avatars(each: int, first: int = 0) -> dict[str, Any]:
    """Arrays of an npz of `pfode train`: the pictures of the seeds first ... first + each - 1 of every class."""
    library: Any = import_module("dicebear")
    licences()
    images, labels, seen = [], [], set()
    for label, style in enumerate(CLASSES.values()):
        drawn = library.Style(definition(style))
        for seed in range(first, first + each):
            picture = rendered(library.Avatar(drawn, {"seed": f"pfode-{seed}"}).to_string())
            if picture.tobytes() not in seen:
                seen.add(picture.tobytes())
                images.append(picture)
                labels.append(label)
    pinned = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    source = f"DiceBear avatars ({pinned}), seeds pfode-{first} to pfode-{first + each - 1} of the styles " + ", ".join(
        CLASSES.values()
    )
    return {
        "images": np.stack(images),
        "labels": np.array(labels),
        "names": np.array(list(CLASSES)),
        "source": np.array(source),
        "licence": np.array("CC0 1.0 (each style, by its metadata)"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="FILE.npz")
    parser.add_argument("--each", type=int, default=3000, help="seeds of every style (3000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    options = parser.parse_args()
    made = avatars(options.each, options.first)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out, **made)
    print(f"{options.out}: {len(made['images'])} distinct pictures of {len(CLASSES)} styles")


if __name__ == "__main__":
    main()
