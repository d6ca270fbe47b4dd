"""Checkpoints of a training run: RUN/step-000123/ with safetensors files and, last, a manifest of their digests.

A checkpoint is written beside its place and renamed, so that one with this name is whole, whenever the writer was
killed; the digests find what a disk changes later.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor

from pfode.errors import FileError, WriteError
from pfode.files import read_file, shown, sync_folder, write_atomic
from pfode.journal import opened, sealed

__all__ = ["checkpoints", "read_checkpoint", "write_checkpoint"]

KEPT = 2  # checkpoints
MANIFEST = "manifest.json"
MAX_MANIFEST, MAX_PART = 16 << 20, 16 << 30  # bytes


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first; whether they are sound is not looked at."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdecimal()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def write_checkpoint(
    folder: Path,
    step: int,
    manifest: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Tensor]],
    beside: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write a checkpoint, whole or not at all, and remove all but the newest two.

    Args:
        folder: of the run.
        step: optimiser steps done.
        manifest: JSON object, kept with the digests of the parts and its own.
        parts: tensors by their names, by the name of their file.
        beside: writes what else belongs into the folder, before the manifest.

    Raises:
        WriteError: the folder cannot be written.
    """
    final = folder / f"step-{step:06d}"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        digests = {}
        for name, tensors in parts.items():
            raw = serialise({key: value.cpu().contiguous() for key, value in tensors.items()})
            digests[name] = hashlib.sha256(raw).hexdigest()
            write_atomic(temporary / name, raw)
        beside(temporary)
        whole = sealed({**manifest, "files": digests})
        write_atomic(temporary / MANIFEST, json.dumps(whole, indent=1).encode())
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync_folder(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, WriteError):
            problem = f"{shown(final)}: cannot be written: {error.strerror or error}"
            raise WriteError(problem, "another --out, or make room") from error
        raise
    for old in checkpoints(folder)[KEPT:]:
        (old / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
    return final


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The manifest of a checkpoint and its tensors, every digest checked.

    Raises:
        FileError: a file is missing or was changed.
    """
    hint = "an older checkpoint is used, if there is one"
    try:
        raw = read_file(path / MANIFEST, MAX_MANIFEST, "a manifest")
        manifest = opened(raw, shown(path / MANIFEST), "a checkpoint's", hint)
        parts = {}
        for name, digest in manifest["files"].items():
            raw = read_file(path / Path(name).name, MAX_PART, "a part of a checkpoint")
            if hashlib.sha256(raw).hexdigest() != digest:
                raise FileError(f"{shown(path / name)}: does not match its digest in {MANIFEST}", hint)
            parts[name] = parse(raw)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{shown(path)}: not a whole checkpoint ({error!r:.200})", hint) from error
    return manifest, parts
