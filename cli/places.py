"""Where the contact sheet of `pfode sample` goes: a file, a folder, or stdout; nothing is overwritten unasked."""

import contextlib
import itertools
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from pfode.errors import UsageError, WriteError
from pfode.files import make_folder, shown, write_atomic

__all__ = ["KINDS", "PREVIEWS", "SHEET", "STDOUT", "folder_of", "open_picture", "suffix_of", "write_free"]

KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # of sheets, by their suffixes
PREVIEWS = ("auto", "kitty", "iterm", "sixel", "blocks", "none")  # on the terminal, see `cli.preview`
SHEET = "sheet.png"  # then sheet-2.png, sheet-3.png ...
STDOUT = "-"


def folder_of(out: str | None) -> Path | None:
    """The folder in which the sheet takes the first free name; None where --out names a file, or stdout."""
    if out is None:
        return Path()
    named = out.endswith(("/", os.sep)) or (os.path.isdir(out) and Path(out).suffix.lower() not in KINDS)
    return Path(out) if named else None


def suffix_of(out: str | None) -> str:
    """The suffix of the sheet, which says what kind of file it is.

    Raises:
        UsageError: none that a sheet can have.
    """
    if out == STDOUT or folder_of(out) is not None:
        return ".png"
    suffix = Path(str(out)).suffix.lower()
    if suffix not in KINDS:
        name = f"{Path(str(out)).stem or 'sheet'}.png"
        problem = f"--out {out}: the sheet is a file {', '.join(KINDS)}, - for stdout, or goes into a folder, DIR/"
        raise UsageError(problem, f"--out {name}")
    return suffix


def write_free(folder: Path, data: bytes, ours: Callable[[Path], bool] = lambda path: False) -> Path:
    """Write a sheet under the first free name of a folder, which is made where it is missing.

    Args:
        ours: whether a file that is there may be replaced.

    Raises:
        WriteError: it cannot be written.
    """
    make_folder(folder)
    temporary = write_atomic(folder / f".{SHEET}.{secrets.token_hex(6)}.tmp", data)
    try:
        for name in _names(folder):
            try:
                os.link(temporary, name)  # unlike a rename, fails where something of this name is
                return name
            except FileExistsError:
                if ours(name):
                    os.replace(temporary, name)
                    return name
            except OSError:  # a file system without links
                if not os.path.lexists(name):
                    os.replace(temporary, name)
                    return name
    except OSError as error:
        raise WriteError(f"{shown(folder)}: cannot be written: {error.strerror or error}", "another --out") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    raise AssertionError("there is always a free name")


def open_picture(path: str) -> str | None:
    """Open a picture in the program that the system has for it; what to say where there is none."""
    screens = ("DISPLAY", "WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not any(os.environ.get(name) for name in screens):
        return f"--open: there is no screen here to open {shown(path)} on"
    if click.launch(path):
        return f"--open: nothing here opens {shown(path)}"
    return None


def _names(folder: Path) -> Iterator[Path]:
    """sheet.png, sheet-2.png, sheet-3.png ..."""
    first = folder / SHEET
    yield first
    for number in itertools.count(2):
        yield first.with_name(f"{first.stem}-{number}{first.suffix}")
