"""What `pfode sample` writes, the contact sheet and the animation, and what it says of pictures that it lost."""

import contextlib
import math
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import pfode
from pfode.cli.job import Cost, Job, settings
from pfode.cli.places import SHEET, STDOUT, folder_of, suffix_of, write_free
from pfode.cli.streams import output
from pfode.errors import FileError, NumericalError, UsageError, WriteError
from pfode.files import write_atomic

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "check_outputs",
    "flaw",
    "flaws",
    "non_finite",
    "store_film",
    "store_sheet",
    "write",
    "write_film",
    "write_sheet",
]


def check_outputs(out: str | None, trajectory: str | None, separate: str | None) -> None:
    """Find out whether the results can be written, before anything is drawn.

    Raises:
        UsageError: a name that no output can have. WriteError: a folder that takes no file.
    """
    suffix_of(out)
    folder = folder_of(out)
    sheet = None if out == STDOUT else out if folder is None else str(folder / SHEET)
    if trajectory is not None:
        suffix = Path(trajectory).suffix.lower()
        if suffix not in (".gif", ".png", ".apng", ".webp"):
            raise UsageError(f"--trajectory {trajectory}: unknown kind {suffix!r}", "use .gif, .png or .webp")
        if sheet is not None and os.path.realpath(trajectory) == os.path.realpath(sheet):
            raise UsageError(f"--trajectory and --out are the same file {sheet}", "give them different names")
    if separate is not None:
        for name in filter(None, (sheet, trajectory)):
            if _within(name, separate) and re.fullmatch(r"\d+\.png", Path(name).name):
                raise UsageError(f"{name} has the name of a picture of --separate", "give it another name")
        _check_writable(separate, "--separate", made=True)
    for option, name in (("--out", sheet), ("--trajectory", trajectory)):
        if name is not None:
            made = (separate is not None and _within(name, separate)) or (name == sheet and folder is not None)
            _check_writable(name, option, made=made)
        if name == sheet and folder is not None:
            continue  # takes another name where something of this one is
        if name is not None and os.path.isdir(name):
            raise WriteError(f"{name}: is a folder", f"give {option} the name of a file")


def _within(name: str, folder: str) -> bool:
    return os.path.realpath(os.path.dirname(name) or ".") == os.path.realpath(folder)


def _check_writable(name: str, option: str, made: bool) -> None:
    """Find out whether a file can be made under this name; `made`: missing folders above it will be made first."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(f"{name}.temporary")  # too long a name?
        folder = Path(name).parent
        while made and not os.path.exists(folder):
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WriteError(f"{name}: cannot be written: {error.strerror}", f"give {option} another place") from error


def flaw(job: Job, seed: int, step: int, t: float, why: str | None = None) -> str:
    """The seed, step and time at which a picture stopped being finite and, for an adaptive sampler, why."""
    of = f" of {job.plan.steps}" if isinstance(job.plan, pfode.Plan) else ""
    return f"seed {seed} after step {step}{of}, t = {t:.6g}" + (f": {why}" if why else "")


def flaws(job: Job, result: Any) -> list[str]:
    """The `flaw` of every picture of a result that is not finite."""
    return [flaw(job, result.seeds[bad.index], bad.step, bad.time, bad.why) for bad in result.bad]


def non_finite(lost: list[str], job: Job, hint: str) -> NumericalError:
    """The error for pictures that are not finite; it names the first three."""
    more = [f"and {len(lost) - 3} more"] if len(lost) > 3 else []
    return NumericalError(f"{len(lost)} of {len(job.seeds)} pictures not finite: {'; '.join(lost[:3] + more)}", hint)


def write(job: Job, result: Any) -> list[str]:
    """Write the animation, if there is one, then the sheet; return their names, the sheet first."""
    films = [write_film(job, result)] if job.options["trajectory"] is not None else []
    return [write_sheet(job, job.pictures(result.x), Cost.of(result)), *films]


def write_sheet(job: Job, pixels: "np.ndarray", cost: Cost) -> str:
    """Write the contact sheet, and return its name.

    Where --out names no file it takes the first free name: one that is there is replaced by --separate alone, where it
    is the sheet of the same run.
    """
    from pfode.cli import images

    return store_sheet(job, pixels, images.contact_sheet(pixels, job.scale, job.columns), job.columns, cost)


def store_sheet(job: Job, pixels: "np.ndarray", sheet: "np.ndarray", columns: int, cost: Cost) -> str:
    """Write a sheet of these pictures, in so many columns, and show it where there is a terminal; return its name."""
    from pfode.cli import images, preview
    from pfode.cli.folder import same_run

    out, said = job.options["out"], settings(job, cost)
    data = images.encode(sheet, said, suffix_of(out))
    preview.show(pixels, sheet, columns, job.options["preview"], output(click.get_current_context()))
    folder = folder_of(out)
    if out == STDOUT:
        output(click.get_current_context()).emit_bytes(data)
        return out
    if folder is None:
        return str(write_atomic(out, data))

    def ours(path: Path) -> bool:
        with contextlib.suppress(FileError, KeyError, TypeError, AttributeError):
            return job.options["separate"] is not None and same_run(images.read_settings(path), said)
        return False

    return str(write_free(folder, data, ours))


def write_film(job: Job, result: Any) -> str:
    """Write the animation of a result that has its trajectory, and return its name."""
    return store_film(job, [_frame(job, result, k) for k in range(len(result.trajectory))])


def store_film(job: Job, frames: "list[np.ndarray]") -> str:
    """Write an animation, and return its name."""
    from pfode.cli import images

    path = job.options["trajectory"]
    write_atomic(path, images.encode_animation(frames, Path(path).suffix.lower()))
    return path


def _frame(job: Job, result: Any, k: int) -> "np.ndarray":
    """The frame of node k: the states, scaled to the data's variance, beside the denoiser's outputs."""
    import numpy as np

    from pfode.cli import images

    plan: Any = job.plan
    level = math.hypot(*(float(level[plan.node][k]) for level in (plan.alpha, plan.sigma)))
    seen = result.preview[k] if k < len(result.preview) else result.x
    pixels = [job.pixels(x) for x in (result.trajectory[k] / level, seen)]
    views = [images.contact_sheet(part, job.scale, job.columns) for part in pixels]
    between = np.full_like(views[0][:, : 4 * images.GAP], 255)
    return np.concatenate([views[0], between, views[1]], axis=1)
