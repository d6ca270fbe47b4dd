"""Words set from pictures of letters: each cut to its ink, on the common baseline, with equal gaps."""

import math

import numpy as np

from pfode import defaults
from pfode.errors import UsageError

__all__ = ["LONGEST", "check_text", "columns_of", "page_of", "set_word", "spans"]

LONGEST = 200  # letters and spaces
GAP, SPACE, MARGIN = 2, 7, 4  # pixels of a picture: between letters, of a space more, around a word
INK = 64  # difference from the ground, of 255, from which a column belongs to a letter
FAINT = 16  # difference up to which a pixel of a word is taken for the ground
BOX = 12  # columns that an empty picture takes
WIDE = 530  # columns of a page, in pixels of a picture, before words go below each other


def check_text(text: str, model: str, labels: tuple[str, ...]) -> None:
    """Find out whether a model has every letter of a text.

    Raises:
        UsageError: it has not, or the text is empty or too long.
    """
    if not text.strip() or len(text) > LONGEST:
        raise UsageError(f"--text: expected 1 to {LONGEST} letters, got {len(text)}", "--text PFODE")
    missing = sorted({letter for letter in text if letter != " " and letter not in labels})
    if missing:
        known = [name for name in labels if len(name) == 1]
        if not known:
            raise UsageError(
                f"--text: the classes of model {model!r:.60} are no letters", f"--model {defaults.TEXT_MODEL}"
            )
        problem = f"--text: model {model!r:.60} has no {', '.join(map(repr, missing[:5]))}"
        raise UsageError(problem, f"it has {''.join(known)} and the space")


def page_of(words: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Words as one page, and each by itself, all as wide as the widest: uint8 (words, height, width[, 3])."""
    width, ground = max(word.shape[1] for word in words), _ground(words[0])
    padded = np.stack([_widened(word, width, ground) for word in words])
    columns = columns_of(len(words), width)
    height = padded.shape[1]
    page = np.full((-(-len(words) // columns) * height, columns * width, *padded.shape[3:]), ground, np.uint8)
    for i, word in enumerate(padded):
        row, column = divmod(i, columns)
        page[row * height : (row + 1) * height, column * width : (column + 1) * width] = word
    return page, padded


def columns_of(n: int, width: int) -> int:
    """Words beside each other: near as many as rows, on a page of a usual width."""
    return max(1, min(n, math.ceil(math.sqrt(n / 2)), WIDE // width or 1))


def spans(glyphs: np.ndarray) -> list[tuple[int, int]]:
    """The columns, from and to, that the ink of each picture takes; the middle ones of a picture without ink."""
    found = []
    for glyph in glyphs:
        ink = np.abs(glyph.astype(np.int16) - np.int16(_ground(glyph)))
        columns = ink.reshape(*ink.shape[:2], -1).max(axis=(0, 2)) > INK
        marked = np.flatnonzero(columns)
        middle = glyph.shape[1] // 2
        found.append((int(marked[0]), int(marked[-1]) + 1) if len(marked) else (middle - BOX // 2, middle + BOX // 2))
    return found


def set_word(glyphs: np.ndarray, ends: list[tuple[int, int]], order: list[int | None]) -> np.ndarray:
    """A word: the pictures in this order, cut to their ink, on their common baseline; None is a space.

    Args:
        glyphs: uint8 (letters, height, width[, 3]).
        ends: columns from and to of each.
        order: indices of letters.
    """
    ground = _ground(glyphs[0])
    height, colour = glyphs.shape[1], glyphs.shape[3:]

    def blank(width: int) -> np.ndarray:
        return np.full((height, width, *colour), ground, np.uint8)

    parts = [blank(MARGIN)]
    for position, index in enumerate(order):
        if position:
            parts.append(blank(GAP))
        parts.append(blank(SPACE) if index is None else glyphs[index][:, ends[index][0] : ends[index][1]])
    word = np.concatenate([*parts, blank(MARGIN)], axis=1)
    return np.where(np.abs(word.astype(np.int16) - ground) <= FAINT, np.uint8(ground), word)


def _ground(picture: np.ndarray) -> int:
    """The ground of a picture, black or white: what most of its border is."""
    border = np.concatenate([picture[0].ravel(), picture[-1].ravel(), picture[:, 0].ravel(), picture[:, -1].ravel()])
    return 255 if np.median(border) > 127 else 0


def _widened(word: np.ndarray, width: int, ground: int) -> np.ndarray:
    spare = np.full((word.shape[0], width - word.shape[1], *word.shape[2:]), ground, np.uint8)
    return np.concatenate([word, spare], axis=1)
