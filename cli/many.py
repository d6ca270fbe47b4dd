"""Pictures by the thousand: batch by batch into a folder, where a later run continues.

What was killed leaves at most half a line and a temporary file: the next run clears them up, and draws again what has
no line or another digest than its line says. A batch always holds the same seeds, in however many runs and processes it
is drawn: a network may round differently in another batch.
"""

import contextlib
import hashlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pfode import defaults
from pfode.cli.folder import DONE, NON_FINITE, RESULTS, RUN, Folder, picture
from pfode.cli.job import Cost, Job, settings
from pfode.cli.outputs import flaw, flaws, non_finite, write_film, write_sheet
from pfode.cli.processes import Share
from pfode.cli.progress import PictureBar
from pfode.cli.streams import Output
from pfode.files import write_atomic
from pfode.journal import Journal

if TYPE_CHECKING:
    import numpy as np

    from pfode.samplers import Samples

__all__ = ["draw"]


def draw(job: Job, out: Output) -> dict[str, Any] | None:
    """Draw the pictures that the folder lacks, then write the sheet.

    Returns:
        the figures of the run; None in all processes but the first.

    Raises:
        PfodeError: as `pfode.sample`, or a folder that cannot be used; what is finished stays.
    """
    share = Share.find(job.device)
    if share.device is not None and job.device.type == "cuda" and job.device.index is None:
        job = replace(job, device=share.device)
    out = out if share.first else replace(out, quiet=True)
    with contextlib.closing(share), contextlib.closing(Folder(job)) as folder:
        return _draw(job, folder, share, out)


def _draw(job: Job, folder: Folder, share: Share, out: Output) -> dict[str, Any] | None:
    share.agree(lambda: folder.open(bool(job.options["overwrite"])) if share.first else None)
    kept = folder.lines()
    batch = job.options["batch"] or defaults.BATCH
    spans = [range(i, min(i + batch, len(job.seeds))) for i in range(0, len(job.seeds), batch)]
    todo = [span for span in spans if any(job.seeds[i] not in kept for i in span)]
    if kept:
        out.note(f"{folder.path} has {len(kept)} of {len(job.seeds)} pictures, the others follow")
    began = time.perf_counter()
    mine = [i for span in todo[share.rank :: share.count] for i in span]
    share.agree(lambda: _fill(job, folder, mine, batch, set(kept), share.rank, out))
    seconds = time.perf_counter() - began
    if not share.first:
        return None
    folder.finish()
    lines = folder.lines(DONE, NON_FINITE)
    spoilt = [line for line in lines.values() if line.get("status") == NON_FINITE]
    cost = folder.cost(job.seeds)
    drawn = len(lines) - len(spoilt) - len(kept)
    shown = job.sheet
    sheet = write_sheet(shown, _read(shown, folder), folder.cost(shown.seeds))
    files = [sheet, str(folder.path / RESULTS), str(folder.path / RUN)]
    if job.options["trajectory"] is not None:
        files.insert(1, _film(shown))
    out.note(f"{drawn} drawn, {len(kept)} kept, {len(spoilt)} not finite ({seconds:.2f} s)")
    if spoilt:
        raise non_finite(
            [flaw(job, line["seed"], line["step"], line["time"], line.get("why")) for line in spoilt],
            job,
            f"{folder.path / RESULTS} lists them, the other pictures stand beside it",
        )
    return {"files": files, "drawn": drawn, "kept": len(kept), "cost": cost, "seconds": seconds}


def _fill(job: Job, folder: Folder, mine: list[int], batch: int, kept: set[int], rank: int, out: Output) -> None:
    """Draw the pictures of the indices `mine` batch by batch, and write each to the folder and to its journal."""
    from pfode.samplers.request import Keep

    if not mine:
        return
    size, done = batch, 0
    journal = folder.journal(rank)
    with PictureBar(len(mine), out) as progress:
        keep = Keep(progress if progress.visible and job.fixed else None, nan="flag")
        for part in job.batches(keep, mine):
            if not job.fixed:
                progress.bar.update(len(part.x))
            if part.stats["batch"] < size:
                size = int(part.stats["batch"])
                out.note(f"out of memory: going on with --batch {size}")
            indices = mine[done : done + len(part.x)]
            done += len(part.x)
            _write(job, part, indices, folder, kept, journal)
            if part.bad and job.options["nan"] == "raise":
                raise non_finite(flaws(job, part), job, "--nan flag leaves such pictures out and draws the others")


def _write(job: Job, part: "Samples", indices: list[int], folder: Folder, kept: set[int], journal: Journal) -> None:
    from pfode.cli import images

    pixels = job.pictures(part.x)
    spoilt = {bad.index: bad for bad in part.bad}
    for k, i in enumerate(indices):
        seed = job.seeds[i]
        if seed in kept:
            continue
        if k in spoilt:
            bad = spoilt[k]
            line = {"seed": seed, "status": NON_FINITE, "sample": i, "step": bad.step, "time": bad.time}
            journal.add(line | ({"why": bad.why} if bad.why else {}), sync=False)
            continue
        own = {key: int(part.stats[key][k]) for key in ("steps", "nfe", "evals") if key in part.stats}
        cost = Cost.over([own]) if own else Cost.of(part)
        data = images.encode_png(pixels[k], settings(job, cost, i))
        write_atomic(folder.path / picture(seed), data)
        digest = hashlib.sha256(data).hexdigest()
        line = {"seed": seed, "status": DONE, "file": picture(seed), "sha256": digest, "nfe": part.nfe} | own
        journal.add(line, sync=False)


def _read(job: Job, folder: Folder) -> "np.ndarray":
    """Read the pictures of the sheet from the folder, uint8 (n, height, width[, 3]); missing ones become crosses."""
    import numpy as np

    from pfode.cli import images
    from pfode.scores.io.pictures import opened

    lines = folder.lines()
    channels, *size = job.shape
    pixels = np.empty((len(job.seeds), *size, *([3] if channels == 3 else [])), np.uint8)
    for place, seed in zip(pixels, job.seeds, strict=True):
        if seed not in lines:
            images.cross_out(place)
            continue
        with opened(picture(seed), folder.path / picture(seed), ("PNG",)) as found:
            place[:] = np.asarray(found)
    return pixels


def _film(job: Job) -> str:
    """Write the animation of the pictures on the sheet, for which they are drawn once more."""
    from pfode.samplers.request import Keep

    return write_film(job, job.draw(Keep(trajectory=True, nan="flag")))
