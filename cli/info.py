"""pfode info: what a file holds, read without torch; and what this installation is."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

import pfode
from pfode.cli.machine import check_machine
from pfode.cli.model_option import own
from pfode.cli.options import Command, FileName, find_command, source
from pfode.cli.settings import typed
from pfode.cli.streams import output, table
from pfode.cli.trust import names_code
from pfode.errors import FileError, MissingError, UsageError, nearly
from pfode.files import open_regular
from pfode.header import Header, read_header
from pfode.scores.io import kinds
from pfode.scores.io.find import guided_name, model_path
from pfode.scores.io.shipped import shipped

__all__ = ["command"]

PACKAGES = ("torch", "numpy", "safetensors", "diffusers", "accelerate", "pillow", "click", "huggingface_hub")
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
LONG = 160  # characters of a value that are shown


@click.command(cls=Command, name="info")
@click.argument("what", type=FileName(), metavar="MODEL|FOLDER|PLAN|PNG|MODULE:NAME|models|config|env")
@click.option("--verify", is_flag=True, help="Recompute the digest of a model or a plan.")
@click.pass_context
def command(ctx: click.Context, what: str, verify: bool) -> None:
    """Say what a model, a plan or a picture holds.

    The argument is a file, a folder of diffusers or its name on the hub, the name of a shipped model, MODULE:NAME for a
    denoiser of your own, or one of the words `models` (those that come with pfode), `config` (every option's value and
    where it comes from) and `env` (versions, for a bug report).
    """
    words = {"models": _models, "config": _config, "env": _env}
    if what in words:
        if verify:
            raise UsageError(f"--verify: {what} has no digest", "give a model or a plan")
        found, text = words[what](ctx)
    else:
        name, guidance = guided_name(what)
        found = _own(name, verify) if names_code(name) else _file(_path(name, words), verify)
        found |= {} if guidance is None else {"guidance": guidance}
        text = _lines(_shown(found))
    output(ctx).emit(found, text)


def _path(name: str, words: Iterable[str]) -> Path:
    """The file or the folder of a model, a plan or a picture.

    Raises:
        UsageError: no such model; a word that is nearly the name is named.
    """
    try:
        return model_path(name)
    except UsageError as error:
        raise UsageError(error.message, nearly(name, words) or error.hint) from error


def _own(name: str, verify: bool) -> dict[str, Any]:
    """The entries for a denoiser of the user's own code."""
    if verify:
        raise UsageError(f"--verify: {name} is no file", "give a model or a plan")
    check_machine()
    from pfode.cli.models import denoiser

    return {"name": name, **denoiser(own("info", name))}


def _file(path: Path, verify: bool) -> dict[str, Any]:
    from pfode.cli import models

    if path.is_dir() or path.suffix == ".pkl":
        if verify:
            raise UsageError(f"--verify: {path} has no digest", "only files written by pfode have one: pfode convert")
        return models.folder(path) if path.is_dir() else models.pickle(path)
    return _picture(path, verify) if _is_picture(path) else _tensors(read_header(path), verify)


def _is_picture(path: Path) -> bool:
    with open_regular(path) as file:
        first = file.read(12)
    return first.startswith((PNG, JPEG)) or (first[:4], first[8:]) == (b"RIFF", b"WEBP")


def _tensors(header: Header, verify: bool) -> dict[str, Any]:
    kind = header.metadata.get("pfode.kind") or kinds.kind(header)[0] or "safetensors"
    found: dict[str, Any] = {"file": str(header.path), "kind": kind}
    if found["kind"] in ("model", "plan"):
        found |= header.config("pfode.config")
    else:
        found |= {"metadata": header.metadata}
    if found["kind"] == "plan":
        found["nfe"] = header.entries["t"].shape[0] if "t" in header.entries and header.entries["t"].shape else None
    else:
        found["parameters"] = header.parameters
        found["dtypes"] = sorted({entry.dtype for entry in header.entries.values()})
    found["bytes"] = header.path.stat().st_size
    found["digest"] = header.metadata.get("pfode.digest")
    if verify:
        if found["digest"] is None:
            raise FileError(
                f"{header.path}: pfode.digest: there is none to verify", "only files written by pfode have one"
            )
        header.verify()
        found["verified"] = True
    return found


def _shown(found: dict[str, Any]) -> dict[str, Any]:
    """The entries to show; the errors of a fitted plan get lines of their own."""
    meta = found.get("meta")
    fitted = meta.get("fitted") if isinstance(meta, dict) else None
    if not isinstance(fitted, dict) or not isinstance(fitted.get("validation"), dict):
        return found
    shown = {key: value for key, value in found.items() if key != "meta"}
    shown |= {"fitted to": fitted.get("model"), "start": fitted.get("start"), "settings": fitted.get("settings")}
    try:
        errors = {key: float(fitted["validation"][key]) for key in ("rms", "median", "start rms", "start median")}
    except (KeyError, TypeError, ValueError):
        return shown
    for key in ("rms", "median"):
        shown[f"validation {key}"] = f"{errors[key]:.4g} (start: {errors[f'start {key}']:.4g})"
    return shown


def _picture(path: Path, verify: bool) -> dict[str, Any]:
    from pfode.cli.images import read_settings

    if verify:
        raise UsageError(f"--verify: {path} is a picture and has no digest", "give a model or a plan")
    settings = read_settings(path)
    words = ["pfode", "sample", *typed(find_command("sample"), settings["options"])]
    return {"file": str(path), "kind": "picture", **settings, "command": shlex.join(words)}


def _models(ctx: click.Context) -> tuple[Any, str]:
    found, rows = [], []
    for name, path in shipped().items():
        header = read_header(path)
        config = header.config("pfode.config")
        size = path.stat().st_size
        found.append({"name": name, "file": str(path), "parameters": header.parameters, "bytes": size, **config})
        process = config.get("process")
        process = process.get("name") if isinstance(process, dict) else process
        shape = "x".join(map(str, config.get("shape") or ()))
        rows.append([name, str(process), str(config.get("prediction")), shape, f"{header.parameters:,}", f"{size:,}"])
    return found, table(("name", "process", "prediction", "shape", "parameters", "bytes"), rows)


def _config(ctx: click.Context) -> tuple[Any, str]:
    """The value and source of every option of the commands that compute, or what a command refuses in a value."""
    found: dict[str, Any] = {}
    parts = []
    for name in ("sample", "train", "fit", "bench"):
        try:
            with find_command(name).make_context(name, _config_arguments(ctx), parent=ctx.parent) as inner:
                values = {key: (inner.params[key], source(inner, key)) for key in sorted(inner.params)}
        except click.BadParameter as error:
            where = f"{source(error.ctx, error.param.name)}: " if error.ctx and error.param and error.param.name else ""
            found[name] = {"error": f"{where}{error.format_message()}"}
            parts.append(f"[{name}]  {found[name]['error']}")
            continue
        found[name] = {key: {"value": value, "source": where} for key, (value, where) in values.items()}
        rows = [[key, _value(value), where] for key, (value, where) in values.items()]
        parts.append(table((f"[{name}]", "value", "source"), rows))
    return found, "\n\n".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(value) or "-"
    return "-" if value is None else str(value)


def _config_arguments(ctx: click.Context) -> list[str]:
    file = ctx.meta.get("pfode.config")
    return ["--config", file] if file else []


def _env(ctx: click.Context) -> tuple[Any, str]:
    import platform
    from importlib import metadata

    found = {"pfode": pfode.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    if found["torch"] == "missing":
        raise MissingError("torch is not installed", "pip install torch")
    check_machine()
    import torch

    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found["threads"] = str(torch.get_num_threads())
    return found, _lines(found)


def _lines(found: dict[str, Any]) -> str:
    rows = [(key, _short(value)) for key, value in found.items() if value is not None and key != "options"]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in rows)


def _short(value: Any) -> str:
    if isinstance(value, dict) and "name" in value and not any(isinstance(v, dict) for v in value.values()):
        rest = ", ".join(f"{k}={v}" for k, v in value.items() if k != "name")
        text = f"{value['name']}({rest})"
    elif isinstance(value, list) and all(isinstance(v, str | int) for v in value):
        text = ", ".join(map(str, value))
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, int):
        text = f"{value:,}"
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    text = "".join(c if c.isprintable() else "?" for c in text)  # a file has no say over the terminal
    return text if len(text) <= LONG or " " not in text or text.startswith("pfode ") else text[: LONG - 3] + "..."
