"""The colour emoji of the Noto font as pictures to train on."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pfode.errors import FileError, MissingError
from pfode.files import read_file
from pfode.scores.training.dataset import Data, checked_names

__all__ = ["EMOJI_FONT", "EMOJI_LIST", "emoji"]

EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian's
EMOJI_LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
MAX_FONT, MAX_LIST = 256 << 20, 16 << 20  # bytes
MIRRORED = ("Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Activities")
COMPONENTS = range(0x1F3FB, 0x1F400)  # skin tones


def emoji(font: Path = EMOJI_FONT, listing: Path = EMOJI_LIST, *, size: int = 32) -> Data:
    """The colour emoji of the Noto font on white; the Unicode groups are the classes.

    Fully-qualified ones without skin tones, rendered at the font's only size of 109 pixels, centred on a white square
    and reduced with a Lanczos filter. People drawn as grey silhouettes (families) are left out. Mirror images are
    offered for the groups in which nothing is written.

    Raises:
        MissingError: the font or the list is not there.
        FileError: one of them is damaged or of another kind.
    """
    for path, package in ((font, "fonts-noto-color-emoji"), (listing, "unicode-data")):
        if not Path(path).is_file():
            raise MissingError(
                f"data 'emoji' needs {path}", f"apt-get install {package} (or give the path as an option)"
            )
    from PIL import Image, ImageDraw, ImageFont

    try:
        face = ImageFont.truetype(str(font), 109)
    except OSError as error:
        raise FileError(
            f"{font}: not a colour bitmap font that Pillow reads ({error})", "apt-get install fonts-noto-color-emoji"
        ) from error
    pictures: list[np.ndarray] = []
    groups: list[str] = []
    for text, group in _listed_emoji(Path(listing)):
        left, top, right, bottom = (round(v) for v in face.getbbox(text))
        side = max(right - left, bottom - top)
        if side <= 0 or right - left > 1.5 * (bottom - top):  # a sequence the font draws as several pictures
            continue
        canvas = Image.new("RGB", (side, side), "white")
        at = ((side - (right - left)) // 2 - left, (side - (bottom - top)) // 2 - top)
        ImageDraw.Draw(canvas).text(at, text, font=face, embedded_color=True)
        picture = np.asarray(canvas.resize((size, size), Image.Resampling.LANCZOS))
        if not (group == "People & Body" and _silhouette(picture)):
            pictures.append(picture)
            groups.append(group)
    if not pictures:
        raise FileError(f"{listing}: no emoji found that {font} draws", "apt-get install unicode-data")
    names = checked_names(str(listing), dict.fromkeys(groups))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    card = {
        "name": "emoji",
        "source": f"{Path(font).name} rendered by Pillow at {size}x{size} on white; groups of {Path(listing).name}",
        "licence": "font: SIL OFL 1.1; artwork: Apache-2.0 (Noto Emoji); emoji-test.txt: Unicode licence",
        "count": len(images),
        "sha256_font": hashlib.sha256(read_file(font, MAX_FONT, "a font")).hexdigest(),
        "sha256_list": hashlib.sha256(read_file(listing, MAX_LIST, "a list of emoji")).hexdigest(),
        "sha256": hashlib.sha256(images.numpy().data).hexdigest(),
        "flip": [name for name in MIRRORED if name in names],
    }
    return Data(images, torch.tensor([names.index(group) for group in groups]), names, card)


def _listed_emoji(listing: Path) -> Iterator[tuple[str, str]]:
    """(text, group) of every fully-qualified emoji without a skin tone, in the order of the file."""
    group = ""
    try:
        for line in read_file(listing, MAX_LIST, "a list of emoji").decode().splitlines():
            if line.startswith("# group:"):
                group = line.removeprefix("# group:").strip()
            match = re.match(r"([0-9A-F ]+?)\s*;\s*fully-qualified", line)
            if match and group != "Component":
                codes = [int(code, 16) for code in match[1].split()]
                if not any(code in COMPONENTS for code in codes):
                    yield "".join(map(chr, codes)), group
    except (ValueError, OverflowError) as error:
        raise FileError(f"{listing}: not a list of emoji ({error})", "apt-get install unicode-data") from error


def _silhouette(picture: np.ndarray) -> bool:
    """A picture of a person without any colour."""
    values = picture.astype(int)
    return bool((values.max(axis=2) - values.min(axis=2)).max() < 24)
