"""Pictures: from tensors to pixels and back, contact sheets, animations, and the settings that a file keeps."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, PngImagePlugin

from pfode.cli.places import KINDS
from pfode.errors import FileError, UsageError
from pfode.scores.io.pictures import opened

__all__ = [
    "ANIMATIONS",
    "GAP",
    "GREY",
    "MAX_PIXELS",
    "MAX_SETTINGS",
    "check_sides",
    "contact_sheet",
    "cross_out",
    "default_scale",
    "encode",
    "encode_animation",
    "encode_png",
    "from_picture",
    "parameters",
    "read_settings",
    "read_text",
    "sheet_columns",
    "sheet_size",
    "to_pixels",
    "usual_count",
]

GAP = 2  # white pixels between and around the pictures of a sheet
MAX_PIXELS = 80_000_000  # of a sheet; Pillow calls more a bomb when it reads it back
MAX_SETTINGS = 1_000_000  # characters
GREY = (0.299, 0.587, 0.114)  # of red, green and blue (Rec. 601)
DESCRIPTION, COMMENT, EXIF_IFD = 0x010E, 0x9286, 0x8769  # tags of EXIF
ROWS, COLUMNS = 4, 10  # of a sheet, at least, where nothing says how many pictures
CELL = 96  # pixels of a picture's side on a sheet, at least
SMALL = 64  # pixels of the side of pictures of which a whole sheet is drawn without being asked
ANIMATIONS = {".gif": "GIF", ".png": "PNG", ".apng": "PNG", ".webp": "WEBP"}

if TYPE_CHECKING:
    from torch import Tensor

Pixels = np.ndarray  # uint8, (n, height, width) grey or (n, height, width, 3)


def to_pixels(x: Any) -> Pixels:
    """A tensor (n, channels, height, width) in [-1, 1] as bytes; what is not finite is crossed out.

    Raises:
        UsageError: neither grey nor RGB.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UsageError(f"samples of shape {tuple(x.shape[1:])} are no pictures", "needs (1 or 3, height, width)")
    x = x.detach().cpu().double()
    sound = x.isfinite().flatten(1).all(1)
    scaled = ((x.nan_to_num().clamp(-1, 1) + 1) * 127.5).round().numpy().astype(np.uint8)
    pixels = scaled[:, 0] if scaled.shape[1] == 1 else scaled.transpose(0, 2, 3, 1)
    for i in (~sound).nonzero().flatten().tolist():
        cross_out(pixels[i])
    return pixels


def from_picture(path: str, raw: bytes, shape: tuple[int, ...]) -> "Tensor":
    """A picture file as a tensor of this shape, in [-1, 1]: its centre, resized, on white; grey where one channel is.

    Raises:
        FileError: no picture, a broken one, or one of too many pixels.
    """
    import torch

    from pfode.scores.training.data import decode

    channels, height, width = shape
    pixels = decode(path, raw, (width, height)).astype(np.float32)
    if channels == 1:
        pixels = pixels @ np.array(GREY, np.float32)[:, None]
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def check_sides(path: str, raw: bytes, other: str, its: bytes) -> None:
    """Find out whether two picture files have the same sides, so that pixels of one are those of the other.

    Raises:
        FileError: they differ, or one is no picture.
    """
    with opened(path, raw) as one, opened(other, its) as two:
        if one.size != two.size:
            sizes = [f"{picture.size[0]}x{picture.size[1]}" for picture in (two, one)]
            raise FileError(f"{other}: {sizes[0]} pixels, {path} has {sizes[1]}", "a mask as large as the picture")


def cross_out(picture: np.ndarray) -> None:
    """Make a picture a black cross on white: it says that there is none."""
    height, width = picture.shape[:2]
    rows = np.arange(height)
    columns = rows * (width - 1) // max(1, height - 1)
    picture[:] = 255
    picture[rows, columns] = picture[rows, width - 1 - columns] = 0


def sheet_columns(n: int, classes: int = 0) -> int:
    """Columns of a sheet: as many of every class where that fills the rows; else near-square, or 10 of 40 and more."""
    if 1 < classes <= 20 and n % classes == 0:
        several = classes * max(1, COLUMNS // classes)
        return several if n % several == 0 else classes
    square = math.ceil(math.sqrt(n))
    return square if n < ROWS * COLUMNS else max(square, COLUMNS)


def usual_count(classes: int, height: int, width: int) -> int | None:
    """How many pictures a sheet has where nothing says it: at least 4 rows of 10, as many of every class.

    Args:
        classes: that are drawn in turn; 0 for a single one, or none.

    Returns:
        None for large pictures, and for so many classes that a row cannot have each.
    """
    if max(height, width) > SMALL or classes > 20:
        return None
    columns = max(1, classes) * max(1, COLUMNS // max(1, classes))
    return columns * max(ROWS, -(-ROWS * COLUMNS // columns))


def sheet_size(n: int, height: int, width: int, scale: int, columns: int) -> tuple[int, int]:
    """(height, width) of a contact sheet.

    Raises:
        UsageError: more pixels than a picture may have.
    """
    rows = -(-n // columns)
    size = rows * (height * scale + GAP) + GAP, columns * (width * scale + GAP) + GAP
    if size[0] * size[1] > MAX_PIXELS:
        raise UsageError(
            f"a sheet of {n} pictures would have {size[1]} x {size[0]} pixels, more than {MAX_PIXELS}",
            "a smaller --scale or --n",
        )
    return size


def default_scale(n: int, height: int, width: int, columns: int) -> int:
    """The whole number that brings a picture to 96 pixels or more: 12 for 8x8, 3 for 32x32; less for a huge sheet."""
    room = math.isqrt(MAX_PIXELS // (n + columns)) - GAP
    return max(1, min(-(-CELL // min(height, width)), room // max(height, width)))


def contact_sheet(pixels: Pixels, scale: int, columns: int) -> np.ndarray:
    """All pictures on one white sheet, each enlarged by repeating its pixels."""
    n, height, width = pixels.shape[:3]
    sheet = np.full((*sheet_size(n, height, width, scale, columns), *pixels.shape[3:]), 255, np.uint8)
    large = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    for i, picture in enumerate(large):
        row, column = divmod(i, columns)
        top, left = GAP + row * (height * scale + GAP), GAP + column * (width * scale + GAP)
        sheet[top : top + height * scale, left : left + width * scale] = picture
    return sheet


def encode(picture: np.ndarray, settings: dict[str, Any], suffix: str) -> bytes:
    """A picture as the file that a suffix of `KINDS` says, with how it was made; JPEG alone changes pixels.

    In JPEG and WebP the settings stand in the EXIF data: `pfode` as the description, `parameters` as the comment.

    Raises:
        UsageError: JPEG or WebP, and more pixels or settings than it can have.
    """
    kind = KINDS[suffix]
    if kind == "PNG":
        return encode_png(picture, settings)
    exif = Image.Exif()
    exif[DESCRIPTION] = json.dumps(settings, allow_nan=False)
    exif.get_ifd(EXIF_IFD)[COMMENT] = b"UNICODE\0" + parameters(settings).encode("utf-16-be", "replace")
    how: dict[str, Any] = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    stream = io.BytesIO()
    try:
        Image.fromarray(picture).save(stream, kind, exif=exif, **how)
    except (ValueError, OSError) as error:  # settings of more than 64 KB, or more than 65,535 or 16,383 pixels
        raise UsageError(f"a {kind} cannot hold this sheet: {error}", "--out sheet.png") from error
    return stream.getvalue()


def encode_png(picture: np.ndarray, settings: dict[str, Any]) -> bytes:
    """A PNG that says how it was made: tEXt `parameters` as other tools write it, iTXt `pfode` with everything."""
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", parameters(settings))
    text.add_itxt("pfode", json.dumps(settings, allow_nan=False, ensure_ascii=False))
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", pnginfo=text, optimize=True)
    return stream.getvalue()


def parameters(settings: dict[str, Any]) -> str:
    """The settings in the form of the webui family: the prompts, if there are any, then one line, where a value with a
    comma or a colon is quoted."""
    options = settings["options"]
    fields = {
        "Steps": settings["steps"],
        "Sampler": settings["sampler"],
        "Schedule type": settings["grid"],
        "CFG scale": options.get("guidance"),
        "Denoising strength": options.get("strength"),
        "Seed": options["seed"] if "seed" in options else options["seeds"].split("-")[0].split(",")[0],
        "Size": f"{settings['shape'][2]}x{settings['shape'][1]}",
        "Model hash": (settings["model"]["digest"] or "")[:10] or None,
        "Model": Path(settings["model"]["name"]).stem.replace("\n", "_"),
        "Version": f"pfode {settings['version']}",
    }
    texts = {key: str(value) for key, value in fields.items() if value is not None}
    line = ", ".join(f"{key}: {json.dumps(text) if set(',:') & {*text} else text}" for key, text in texts.items())
    prompts, away = options.get("prompt"), options.get("negative_prompt")
    above = [prompts[0]] if prompts and len(prompts) == 1 else []
    return "\n".join([*above, *([f"Negative prompt: {away}"] if above and away else []), line])


def encode_animation(frames: Sequence[np.ndarray], suffix: str) -> bytes:
    """An endless animation of about two seconds, its last frame held."""
    duration = max(40, 2000 // len(frames))
    pictures = [Image.fromarray(frame) for frame in frames]
    format_ = ANIMATIONS[suffix]
    extra: dict[str, Any] = {"WEBP": {"lossless": True}, "GIF": {"optimize": False}}.get(format_, {})
    stream = io.BytesIO()
    durations = [duration] * (len(pictures) - 1) + [1500]
    pictures[0].save(
        stream, format_, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **extra
    )  # fmt: skip
    return stream.getvalue()


def read_text(path: Path) -> dict[str, str]:
    """The texts of a picture, `pfode` and `parameters` among them, read from its header without decoding a pixel.

    Raises:
        FileError: missing, no PNG, JPEG or WebP, damaged, or too large to be a picture.
    """
    try:
        with opened(str(path), path, ("PNG", "JPEG", "WEBP"), MAX_PIXELS) as picture:
            texts = {str(k): str(v) for k, v in picture.info.items() if isinstance(v, str)}
            if picture.format != "PNG":
                exif = picture.getexif()
                texts |= {"pfode": str(exif[DESCRIPTION])} if DESCRIPTION in exif else {}
                comment = exif.get_ifd(EXIF_IFD).get(COMMENT, b"")
                if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
                    texts["parameters"] = comment[8:].decode("utf-16-be", "replace")
            return texts
    except FileError as error:
        if "broken picture" not in error.message:
            raise
        problem = f"{path}: not a PNG, JPEG or WebP, or a damaged one"
        raise FileError(problem, "give a picture written by pfode sample") from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a picture written by `pfode sample`, their outer form checked; the values of the options are not.

    Raises:
        FileError: as `read_text`, or no settings, or some of another form.
    """
    raw = read_text(path).get("pfode")
    if raw is None:
        raise FileError(f"{path}: holds no pfode settings", "give a picture written by pfode sample, unchanged")
    if len(raw) > MAX_SETTINGS:
        raise FileError(f"{path}: pfode: settings of {len(raw)} characters, more than {MAX_SETTINGS}")
    try:
        settings = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: pfode: broken JSON") from error
    if not isinstance(settings, dict):
        raise FileError(f"{path}: pfode: expected a JSON object, got {type(settings).__name__}")
    for key, kind in (("version", str), ("options", dict), ("model", dict)):
        if not isinstance(settings.get(key), kind):
            raise FileError(f"{path}: pfode: {key}: expected {kind.__name__}, got {settings.get(key)!r:.60}")
    return settings
