"""The contact sheet on the terminal: by the graphics of kitty, iTerm2 or sixel, else as half blocks of colour.

Which of them a terminal has, its environment says, or it answers itself. Nothing is shown without a terminal.
"""

import base64
import contextlib
import io
import os
import re
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from pfode.cli.streams import Output

__all__ = ["find_kind", "half_blocks", "iterm", "kitty", "show", "sixel"]

CELL = (8, 16)  # pixels of a character, where the terminal does not say: width, height
ANSWER = 0.3  # seconds that a terminal has to answer
QUESTION = b"\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b[c"  # kitty's graphics; then what every terminal answers
CHUNK = 4096  # bytes of base64 in one message of kitty's
READABLE = 16  # pixels that a picture of a sheet needs to be known


def show(pictures: np.ndarray, sheet: np.ndarray, columns: int, kind: str, out: Output) -> None:
    """Show a sheet on the terminal that stderr is, if it is one.

    Args:
        pictures: uint8 (n, height, width[, 3]), of which half blocks have room for the first few.
        sheet: the whole sheet, (height, width[, 3]); columns: its pictures side by side.
        kind: one of `cli.places.PREVIEWS`.
    """
    if kind == "none" or not out.watched:
        return
    out.clear()
    chosen = find_kind(os.environ, ask) if kind == "auto" else kind
    if chosen == "none":
        return
    width, height = shutil.get_terminal_size()
    if chosen == "blocks":
        text = half_blocks(few(pictures, columns, width, height), true_colour(os.environ))
    else:
        cell = cell_size()
        picture = fitted(sheet, width * cell[0], max(4, height - 4) * cell[1])
        text = {"kitty": kitty, "iterm": iterm, "sixel": sixel}[chosen](picture)
    with contextlib.suppress(OSError, UnicodeEncodeError):  # a picture on the screen is no reason to fail
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


# ---- which kind


def find_kind(environment: Mapping[str, str], ask: Callable[[], bytes]) -> str:
    """The kind of pictures that a terminal shows, by its variables and, where they say nothing, by its answer.

    Inside of tmux and screen the variables are those of another terminal: what they pass on is only asked for.

    Args:
        ask: what the terminal answers to `QUESTION`.
    """
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if term in ("", "dumb", "linux"):
        return "blocks" if term == "linux" and "NO_COLOR" not in environment else "none"
    inside = "TMUX" in environment or term.startswith(("tmux", "screen"))
    if not inside:
        if "KITTY_WINDOW_ID" in environment or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
            return "kitty"
        if program in ("iTerm.app", "WezTerm", "mintty") or environment.get("LC_TERMINAL") == "iTerm2":
            return "iterm"
    answer = ask()
    if b"_Gi=31;OK" in answer and not inside:
        return "kitty"
    found = re.search(rb"\x1b\[\?([\d;]+)c", answer)
    if found and b"4" in found[1].split(b";"):
        return "sixel"
    return "none" if "NO_COLOR" in environment or not _has_blocks() else "blocks"


def _has_blocks() -> bool:
    """Whether the half block can be written."""
    try:
        "▀".encode(getattr(sys.stderr, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def true_colour(environment: Mapping[str, str]) -> bool:
    """Whether a terminal has all colours, and not 256 of them."""
    return environment.get("COLORTERM") in ("truecolor", "24bit")


def ask() -> bytes:
    """What the terminal answers to `QUESTION`; nothing where it is not ours, or does not answer in time."""
    try:
        import termios
        import tty

        handle = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
    except (ImportError, OSError):
        return b""
    answer = b""
    try:
        if os.tcgetpgrp(handle) != os.getpgrp():  # in the background: it would be stopped
            return b""
        before = termios.tcgetattr(handle)
        try:
            tty.setcbreak(handle, termios.TCSANOW)
            os.write(handle, QUESTION)
            until = time.monotonic() + ANSWER
            while b"c" not in answer.rpartition(b"\x1b[?")[2] or b"\x1b[?" not in answer:
                left = until - time.monotonic()
                if left <= 0 or not select.select([handle], [], [], left)[0] or len(answer) > 4096:
                    break
                answer += os.read(handle, 1024)
        finally:
            termios.tcsetattr(handle, termios.TCSAFLUSH, before)
    except (OSError, termios.error):
        return b""
    finally:
        os.close(handle)
    return answer


def cell_size() -> tuple[int, int]:
    """Width and height of a character in pixels."""
    try:
        import fcntl
        import struct
        import termios

        raw = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, bytes(8))
        rows, columns, width, height = struct.unpack("HHHH", raw)
    except (ImportError, OSError, ValueError):
        return CELL
    return (width // columns, height // rows) if min(rows, columns) and width > columns and height > rows else CELL


# ---- what is shown


def fitted(picture: np.ndarray, width: int, height: int) -> Image.Image:
    """A picture that is made smaller, where it must be, to fit into so many pixels."""
    image = Image.fromarray(picture).convert("RGB")
    share = min(1.0, width / image.width, height / image.height)
    if share == 1:
        return image
    size = max(1, int(image.width * share)), max(1, int(image.height * share))
    return image.resize(size, Image.Resampling.LANCZOS)


def few(pictures: np.ndarray, columns: int, width: int, height: int) -> np.ndarray:
    """The first pictures of a sheet, as many as a terminal of so many characters can show side by side, (h, w, 3).

    They are as wide as the sheet's row lets them be, but not narrower than 16 pixels.
    """
    n, high, wide = pictures.shape[:3]
    side = max(min(READABLE, wide), min(wide, (width + 1) // columns - 1))
    tall = max(1, round(high * side / wide))
    across = max(1, min(columns, n, (width + 1) // (side + 1)))
    down = max(1, min(-(-n // across), (2 * (height - 4) + 1) // (tall + 1)))
    made = np.full((down * (tall + 1) - 1, across * (side + 1) - 1, 3), 255, np.uint8)
    for i, picture in enumerate(pictures[: across * down]):
        row, column = divmod(i, across)
        small = Image.fromarray(picture).convert("RGB").resize((side, tall), Image.Resampling.BOX)
        made[row * (tall + 1) :, column * (side + 1) :][:tall, :side] = np.asarray(small)
    return made[:, :width]


def half_blocks(picture: np.ndarray, all_colours: bool) -> str:
    """A picture (height, width, 3) as characters of an upper half block: two pixels each, one above the other."""
    if len(picture) % 2:
        picture = np.concatenate([picture, np.full_like(picture[:1], 255)])
    lines = []
    for above, below in zip(picture[::2].tolist(), picture[1::2].tolist(), strict=True):
        line, last = "", ""
        for top, bottom in zip(above, below, strict=True):
            style = f"\x1b[38;{_colour(top, all_colours)};48;{_colour(bottom, all_colours)}m"
            line += ("" if style == last else style) + "▀"
            last = style
        lines.append(f"{line}\x1b[0m")
    return "\n".join(lines)


def _colour(rgb: list[int], all_colours: bool) -> str:
    """A colour as the terminal names it; of 256 the nearest of the cube of 6 x 6 x 6."""
    if all_colours:
        return "2;{};{};{}".format(*rgb)
    red, green, blue = (0 if value < 48 else 1 if value < 115 else (value - 35) // 40 for value in rgb)
    return f"5;{16 + 36 * red + 6 * green + blue}"


def kitty(picture: Image.Image) -> str:
    """A picture in the graphics protocol of kitty: a PNG in chunks; answers are not asked for."""
    data = _png(picture)
    chunks = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    text = ""
    for i, chunk in enumerate(chunks):
        first = "a=T,f=100,q=2," if i == 0 else ""
        text += f"\x1b_G{first}m={int(i < len(chunks) - 1)};{chunk}\x1b\\"
    return text


def iterm(picture: Image.Image) -> str:
    """A picture in the protocol of iTerm2."""
    data = _png(picture)
    size = f"width={picture.width}px;height={picture.height}px"
    return f"\x1b]1337;File=inline=1;size={len(base64.b64decode(data))};{size};preserveAspectRatio=1:{data}\x07"


def sixel(picture: Image.Image) -> str:
    """A picture as sixels: bands of six rows, each a line per colour, in which repeated sixels are counted."""
    palette = picture.quantize(256, dither=Image.Dither.NONE)
    indices, colours = np.asarray(palette), np.array(palette.getpalette()).reshape(-1, 3)
    text = f'\x1bP0;1;0q"1;1;{picture.width};{picture.height}'
    text += "".join(f"#{i};2;{r * 100 // 255};{g * 100 // 255};{b * 100 // 255}" for i, (r, g, b) in enumerate(colours))
    for top in range(0, picture.height, 6):
        band = indices[top : top + 6]
        bits = 1 << np.arange(len(band))[:, None]
        lines = [f"#{i}" + "".join(_runs(((band == i) * bits).sum(0))) for i in np.unique(band).tolist()]
        text += "$".join(lines) + "-"
    return text + "\x1b\\"


def _runs(row: Any) -> Iterator[str]:
    """The sixels of a line, more than three equal ones as a count."""
    edges = np.flatnonzero(np.diff(row)) + 1
    starts = [0, *edges.tolist()]
    for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
        mark, count = chr(63 + int(row[start])), stop - start
        yield mark * count if count < 4 else f"!{count}{mark}"


def _png(picture: Image.Image) -> str:
    """A PNG in base64."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
