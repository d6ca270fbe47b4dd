"""Pictures to train on: `digits`, `emoji`, a folder, a zip or an npz, all as one `Data`.

Everything is held as 8-bit tensors in memory; nothing is cached on disk.
"""

import hashlib
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfode.errors import FileError, MissingError, UsageError, did_you_mean
from pfode.scores.io.pictures import MAX_FILE, SUFFIXES, opened, read_picture

EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
MAX_BYTES = 4 << 30  # of pictures in memory


@dataclass(frozen=True)
class Data:
    """Pictures in memory.

    Args:
        images: uint8 (n, channels, size, size).
        labels: int64 (n,), or None.
        names: of the classes; empty without labels.
        card: where they come from, under what licence, digests: JSON. `card["flip"]` names the classes of which a
            mirror image is as good as the picture.
    """

    images: Tensor
    labels: Tensor | None
    names: tuple[str, ...] = ()
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, channels, height, width = self.images.shape
        if n == 0 or height != width or channels not in (1, 3) or self.images.dtype != torch.uint8:
            raise UsageError(f"data: expected uint8 (n, 1 or 3, size, size) with n > 0, got {tuple(self.images.shape)}")
        if (self.labels is None) != (not self.names):
            raise UsageError("data: labels and names of the classes go together")
        if self.labels is not None and (
            self.labels.shape != (n,) or not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.names)
        ):
            raise UsageError(f"data: labels must be {n} integers from 0 to {len(self.names) - 1}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one picture: (channels, size, size)."""
        _, channels, height, width = self.images.shape
        return channels, height, width


def load_data(source: str | Path, *, size: int = 32, font: Path = EMOJI_FONT, listing: Path = EMOJI_LIST) -> Data:
    """`digits`, `emoji`, a folder, FILE.zip or FILE.npz.

    Raises:
        MissingError: a package or a system file is not there; the hint installs it.
        FileError: a broken picture or file.
        UsageError: neither a known name nor a path.
    """
    if str(source) == "digits":
        return digits()
    if str(source) == "emoji":
        return emoji(font, listing, size=size)
    path = Path(source)
    if path.is_dir():
        return folder(path, size=size)
    if path.suffix.lower() == ".npz" and path.exists():
        return arrays(path)
    if path.suffix.lower() == ".zip" and path.exists():
        return archive(path, size=size)
    if path.exists():
        raise FileError(f"{path}: not a folder, a .zip or an .npz", "--data digits|emoji|DIR|FILE.npz|FILE.zip")
    raise UsageError(f"data {str(source)!r}: no such file or data set", did_you_mean(source, ["digits", "emoji"]))


def digits() -> Data:
    """The 1797 handwritten digits of 8x8 that come with scikit-learn; values 0 to 16 become 0 to 255.

    Raises:
        MissingError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingError("data 'digits' needs scikit-learn", 'pip install "pfode[digits]"') from error
    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    card = {
        "name": "digits",
        "source": "sklearn.datasets.load_digits (UCI: Optical Recognition of Handwritten Digits, test part), 8x8",
        "licence": "CC BY 4.0 (UCI); distributed with scikit-learn under BSD-3-Clause",
        "count": len(images),
        "sha256": _sha256(images.numpy().tobytes()),
        "flip": [],
    }
    return Data(images, torch.from_numpy(bunch.target.astype(np.int64)), tuple("0123456789"), card)


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
    names = tuple(dict.fromkeys(groups))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    card = {
        "name": "emoji",
        "source": f"{Path(font).name} rendered by Pillow at {size}x{size} on white; groups of {Path(listing).name}",
        "licence": "font: SIL OFL 1.1; artwork: Apache-2.0 (Noto Emoji); emoji-test.txt: Unicode licence",
        "count": len(images),
        "sha256_font": _sha256(Path(font).read_bytes()),
        "sha256_list": _sha256(Path(listing).read_bytes()),
        "sha256": _sha256(images.numpy().tobytes()),
        "flip": [name for name in MIRRORED if name in names],
    }
    return Data(images, torch.tensor([names.index(group) for group in groups]), names, card)


def _listed_emoji(listing: Path) -> Iterator[tuple[str, str]]:
    """(text, group) of every fully-qualified emoji without a skin tone, in the order of the file."""
    group = ""
    try:
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("# group:"):
                group = line.removeprefix("# group:").strip()
            match = re.match(r"([0-9A-F ]+?)\s*;\s*fully-qualified", line)
            if match and group != "Component":
                codes = [int(code, 16) for code in match[1].split()]
                if not any(code in COMPONENTS for code in codes):
                    yield "".join(map(chr, codes)), group
    except ValueError as error:
        raise FileError(f"{listing}: not a list of emoji ({error})", "apt-get install unicode-data") from error


def _silhouette(picture: np.ndarray) -> bool:
    """A picture of a person without any colour."""
    values = picture.astype(int)
    return bool((values.max(axis=2) - values.min(axis=2)).max() < 24)


def folder(path: Path, *, size: int = 32) -> Data:
    """Pictures below a folder; its sub-folders become the classes, if it has any."""
    root = path.resolve()
    names = [p for p in sorted(root.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
    entries = [(p.relative_to(root).as_posix(), p.stat().st_size, partial(read_picture, p)) for p in names]
    return _pictures(path, entries, size)


def archive(path: Path, *, size: int = 32) -> Data:
    """Pictures in a zip file; folders in it become the classes. Nothing is unpacked to disk."""
    try:
        with zipfile.ZipFile(path) as file:
            infos = sorted((i for i in file.infolist() if not i.is_dir()), key=lambda info: info.filename)
            for info in infos:
                parts = PurePosixPath(info.filename.replace("\\", "/"))
                if parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
                    raise FileError(
                        f"{path}: {info.filename!r:.80}: a path that leads out of the archive", "write the zip anew"
                    )
            chosen = [i for i in infos if i.filename.lower().endswith(SUFFIXES)]

            def reader(info: zipfile.ZipInfo) -> Callable[[], bytes]:
                def read() -> bytes:
                    with file.open(info) as stream:
                        return stream.read(MAX_FILE + 1)

                return read

            return _pictures(path, [(i.filename.replace("\\", "/"), i.file_size, reader(i)) for i in chosen], size)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: not a readable zip file ({error})", "write the zip anew") from error


def _pictures(path: Path, entries: list[tuple[str, int, Callable[[], bytes]]], size: int) -> Data:
    """Decode, crop to the centre square and resize; the first folder of each name is its class."""
    if not entries:
        raise FileError(f"{path}: no pictures ({', '.join(SUFFIXES)})", "class sub-folders with pictures become labels")
    if len(entries) * 3 * size * size > MAX_BYTES:
        raise FileError(
            f"{path}: {len(entries)} pictures of {size}x{size} need more than {MAX_BYTES >> 30} GiB",
            "take a smaller --size",
        )
    classes = [PurePosixPath(name).parts[0] if "/" in name else "" for name, _, _ in entries]
    names = tuple(dict.fromkeys(classes))
    if "" in names and len(names) > 1:
        loose = entries[classes.index("")][0]
        raise FileError(f"{path}: {loose!r} lies beside class sub-folders", "move it into one of them")
    images = np.empty((len(entries), size, size, 3), dtype=np.uint8)
    for i, (name, length, read) in enumerate(entries):
        if length > MAX_FILE:
            raise FileError(
                f"{path}: {name}: {length} bytes; a picture may have {MAX_FILE >> 20} MiB", "make it smaller"
            )
        images[i] = decode(f"{path}: {name}", read(), (size, size))
    stacked = torch.from_numpy(images).permute(0, 3, 1, 2)
    if (images[..., :1] == images).all():
        stacked = stacked[:, :1]
    stacked = stacked.contiguous()
    card = {
        "name": path.name,
        "source": path.name,
        "count": len(images),
        "sha256": _sha256(stacked.numpy().tobytes()),
        "flip": [],
    }
    if names == ("",):
        return Data(stacked, None, (), card)
    return Data(stacked, torch.tensor([names.index(c) for c in classes]), names, card)


def decode(where: str, raw: bytes, size: tuple[int, int]) -> np.ndarray:
    """One picture as (height, width, 3) on white, of this (width, height); the first frame, its centre, Lanczos."""
    from PIL import Image, ImageOps

    with opened(where, raw) as source:
        picture = ImageOps.exif_transpose(source).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    fitted = ImageOps.fit(Image.alpha_composite(ground, picture).convert("RGB"), size, Image.Resampling.LANCZOS)
    return np.asarray(fitted)


def arrays(path: Path) -> Data:
    """FILE.npz with `images` (n, height, width[, channels]) or (n, channels, height, width) of uint8 and, if known,
    `labels` (n,) of integers and `names` of the classes.

    Raises:
        FileError: other arrays, or a damaged file.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            content = {key: file[key] for key in ("images", "labels", "names") if key in file.files}
            held = file.files
    except Exception as error:  # zipfile, zlib and numpy raise almost anything on broken input
        raise FileError(
            f"{path}: not a readable npz file ({type(error).__name__}: {error})",
            "np.savez(FILE, images=..., labels=...)",
        ) from error
    if "images" not in content:
        raise FileError(
            f"{path}: no array 'images' (it has: {', '.join(held) or 'nothing'})",
            "np.savez(FILE, images=..., labels=...)",
        )
    images, labels = content["images"], content.get("labels")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        raise FileError(
            f"{path}: images: expected uint8 (n, height, width, channels), got {images.dtype} {images.shape}"
        )
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3]:
        raise FileError(f"{path}: images: expected square pictures of 1 or 3 channels, got {content['images'].shape}")
    card = {
        "name": path.name,
        "source": path.name,
        "count": len(images),
        "sha256": _sha256(images.tobytes()),
        "flip": [],
    }
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    if labels is None:
        return Data(tensor, None, (), card)
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),) or labels.min() < 0 or labels.max() >= 100_000:
        raise FileError(f"{path}: labels: expected {len(images)} integers >= 0, got {labels.dtype} {labels.shape}")
    given = content.get("names")
    names = tuple(map(str, given)) if given is not None else tuple(map(str, range(int(labels.max()) + 1)))
    if labels.max() >= len(names):
        raise FileError(f"{path}: names: {len(names)} names for labels up to {labels.max()}")
    return Data(tensor, torch.from_numpy(labels.astype(np.int64)), names, card)


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
