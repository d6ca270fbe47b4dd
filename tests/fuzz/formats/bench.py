"""Folders of `pfode bench`: its results and its cache."""

import json
import tempfile
from pathlib import Path

from pfode.cli import plot, report
from pfode.errors import FileError
from pfode.journal import sealed
from pfode.samplers.measure.bench import bench
from pfode.samplers.measure.problem import Problem
from pfode.samplers.measure.results import CACHE, LINES, RESULTS, Cache, Folder
from pfode.scores.beds import bed
from tests.fuzz.engine import Files, Target
from tests.fuzz.formats.folder import files_of
from tests.fuzz.formats.model import seal

FILES = 2  # results.json, and a reference solution


def read(folder: Path) -> object:
    """What the results say, as tables and a figure, and the samples that are kept."""
    result, cache = Folder(folder, []).result(), Cache(folder / CACHE)
    if len(files_of(folder)) < FILES:
        raise FileError(f"{folder}: a file is missing, which is measured, or made, again")
    colours = report.coloured(result)
    figure = plot.draw(report.panels(result, colours), [(report.label(text), c) for text, c in colours.items()])
    samples = [cache.samples(name, "", 0) for name in result["beds"]]
    sums = [x.double().sum().item() for x in samples if x is not None]
    return report.markdown(result, "Fuzzed"), plot.svg(figure), sums


def reseal(files: Files) -> Files:
    """Digests that fit what the files say, where they still say anything."""
    try:
        found = json.loads(files[RESULTS])
        text = json.dumps(sealed(found)).encode() if isinstance(found, dict) else files[RESULTS]
    except (ValueError, RecursionError):
        text = files[RESULTS]
    rest = {name: raw for name, raw in files.items() if name != RESULTS}
    return {**seal(rest), RESULTS: text}


def target() -> Target:
    """See `Target`."""
    samples = []
    for name, sampler in (("mixture-2", "ddim"), ("gaussian-2", "unipc2?chart=flow")):
        with tempfile.TemporaryDirectory() as folder:
            problem = Problem(name, bed(name), n=6, validation=3, teacher=8)
            bench([(problem, [sampler])], folder, [3, 4])
            files = files_of(Path(folder))
        samples.append({key: raw for key, raw in files.items() if not key.endswith((LINES, ".gitignore"))})
    return Target("bench", tuple(samples), read, digest=True, reseal=reseal)
