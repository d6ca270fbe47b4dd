"""`pfode sample --text`: words in typefaces that do not exist, letter by letter from a model whose classes are letters.

All letters of a word have one seed: the same noise, and the same style where the model has styles. So every seed is a
typeface, whatever the text is.
"""

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

import pfode
from pfode.cli.job import Cost, Job
from pfode.cli.progress import PictureBar
from pfode.cli.streams import Output
from pfode.cli.typeset import columns_of, page_of, set_word, spans
from pfode.errors import NumericalError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["draw"]


def draw(job: Job, out: Output) -> dict[str, Any]:
    """Draw the letters of every typeface, set the words, write sheet and animation.

    Raises:
        NumericalError: letters that are not finite.
    """
    from pfode.cli.outputs import store_film, store_sheet
    from pfode.samplers.request import Keep

    text: str = job.options["text"]
    letters = list(dict.fromkeys(text.replace(" ", "")))
    began = time.perf_counter()
    with PictureBar(len(letters) * len(job.seeds), out) as progress:
        callback = progress if progress.visible and job.fixed else None
        keep = Keep(callback, job.options["trajectory"] is not None, "flag")
        each = [i for i in range(len(job.seeds)) for _ in letters]
        result = job.draw(keep, each, letters * len(job.seeds))
    seconds = time.perf_counter() - began
    if result.bad:
        lost = [f"{letters[bad.index % len(letters)]!r} of seed {result.seeds[bad.index]}" for bad in result.bad[:3]]
        raise NumericalError(f"{len(result.bad)} letters not finite: {', '.join(lost)}", "another --sampler or --dtype")
    glyphs = job.pixels(result.x)
    places = [spans(glyphs[i : i + len(letters)]) for i in range(0, len(glyphs), len(letters))]
    films = []
    if job.options["trajectory"] is not None:
        frames = [sheet(job, _state(job, result, k), letters, places)[0] for k in range(len(result.trajectory))]
        films = [store_film(job, [*frames, *[frames[-1]] * 2])]
    page, words = sheet(job, glyphs, letters, places)
    columns = columns_of(len(words), words.shape[2])
    return {"files": [store_sheet(job, words, page, columns, Cost.of(result)), *films], "cost": Cost.of(result)} | {
        "seconds": seconds
    }


def _state(job: Job, result: Any, k: int) -> np.ndarray:
    """The states at a node, scaled to the data's variance."""
    plan = job.plan
    assert isinstance(plan, pfode.Plan)
    level = math.hypot(*(float(level[plan.node][k]) for level in (plan.alpha, plan.sigma)))
    x: Tensor = result.trajectory[k] / level
    return job.pixels(x)


def sheet(
    job: Job, glyphs: np.ndarray, letters: list[str], places: list[list[tuple[int, int]]]
) -> tuple[np.ndarray, np.ndarray]:
    """All words on one sheet, enlarged by a Lanczos filter, and each by itself, as it was drawn."""
    each = len(letters)
    order = [None if letter == " " else letters.index(letter) for letter in job.options["text"]]
    words = [set_word(glyphs[i * each : (i + 1) * each], ends, order) for i, ends in enumerate(places)]
    page, padded = page_of(words)
    size = page.shape[1] * job.scale, page.shape[0] * job.scale
    return np.asarray(Image.fromarray(page).resize(size, Image.Resampling.LANCZOS)), padded
