"""What a model argument names, found without importing torch: a shipped model, a file, a folder, a model of the hub."""

import os
import re
from pathlib import Path

from pfode.errors import FileError, UsageError, did_you_mean, nearly
from pfode.files import open_regular, shown
from pfode.optional import optional_module
from pfode.scores.io.shipped import SELF_CONTAINED, shipped

__all__ = ["guided_name", "model_path"]

HUB_NAME = re.compile(r"(?:hf:)?([\w.-]{1,96}/[\w.-]{1,96})(?:@([\w./-]{1,100}))?")
SCALE = re.compile(r"[+-]?(\d{1,6}(\.\d*)?|\.\d+)")  # a number of more digits is a revision of a hub
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def guided_name(model: str | os.PathLike[str]) -> tuple[str, float | None]:
    """A model argument without its guidance, and the scale: ("avatars", 2.0) for "avatars@2"; None where none is given.

    After "owner/name" of a hub a number is guidance, too, and anything else a revision; a tag that looks like a number
    is written "@refs/tags/2".

    Raises:
        UsageError: something else than a number after a model that has no revisions.
    """
    try:
        name = os.fsdecode(model)
    except TypeError as error:
        raise UsageError(f"model: expected a name or a path, got {type(model).__name__}") from error
    head, _, scale = name.rpartition("@")
    if not head or os.path.lexists(name):
        return name, None
    if SCALE.fullmatch(scale):
        return head, float(scale)
    if head in shipped() or os.path.lexists(head):
        raise UsageError(f"model {name!r:.200}: after @ stands the scale of the guidance, a number", f"{head}@2")
    return name, None


def newest(run: Path) -> Path | None:
    """The model in the newest checkpoint of a training run that has not ended; None for another folder."""
    found = [path for path in run.glob(f"step-*/{SELF_CONTAINED}") if path.parent.name[5:].isdecimal()]
    return max(found, key=lambda path: int(path.parent.name[5:]), default=None)


def model_path(model: str | os.PathLike[str], prompts: bool = False, variant: str | None = None) -> Path:
    """What is behind a model argument, on the disk: a file, or a folder that pfode or diffusers saved.

    Args:
        model: a name, a path, or the name of a model of the hub.
        prompts: whether there will be prompts; a pipeline that needs some is not fetched without.
        variant: of the weights to fetch of it, such as "fp16".

    Raises:
        UsageError: an unknown name. FileError: no such file, or one that is not read.
        MissingError: a model of the hub that is neither in the cache nor can be fetched.
    """
    try:
        known, name = shipped(), os.fsdecode(model)
    except TypeError as error:
        raise UsageError(f"model: expected a name or a path, got {type(model).__name__}") from error
    if name in known:
        return known[name]
    if os.path.isdir(name):
        own = Path(name) / SELF_CONTAINED
        return own if os.path.isfile(own) else newest(Path(name)) or Path(name)
    if os.path.lexists(name):
        file = Path(name)
        if file.suffix in PICKLES:
            hint = "safetensors are read, and the network pickles (.pkl) of EDM and EDM2, without running anything"
            raise FileError(f"{shown(file)}: is a pickle, which can run any code when read: refused", hint)
        open_regular(file).close()
        return file
    if "://" in name:
        place = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", name)
        hint = f"its name on the hub: {place[1]}" if place else "download it and give the file"
        raise UsageError(f"model {name!r:.200}: an address is not read", hint)
    if not name.isprintable():
        raise UsageError(f"unknown model {name!r:.200}", did_you_mean(name, known))
    found = HUB_NAME.fullmatch(name)
    if found and not name.startswith((".", "/")) and not name.endswith((".safetensors", ".pkl", *PICKLES)):
        optional_module("huggingface_hub", f"model {name!r}: no such file or folder; a model of a hub")
        from pfode.scores.io.fetch import fetch

        return model_path(fetch(found[1], found[2], prompts=prompts, variant=variant))
    if not Path(name).suffix:
        hint = f"a .safetensors file, a folder, owner/name on the hub, or a shipped model ({did_you_mean(name, known)})"
        raise UsageError(f"unknown model {name!r:.200}", hint)
    raise FileError(f"{name!r:.200}: no such file", nearly(name, known) or "is the path right?")
