"""Models of other libraries: what `pfode info` says of them, and the digests that `pfode sample` keeps."""

import hashlib
from pathlib import Path
from typing import Any

from pfode.errors import FileError
from pfode.header import read_header

__all__ = ["denoiser", "folder", "model_digest", "pickle"]

CHUNK = 1 << 20


def folder(path: Path) -> dict[str, Any]:
    """The entries of `pfode info` for a folder of diffusers, which is not imported.

    Raises:
        FileError: it is none, or something in it is broken.
    """
    from pfode.compat.schedules import stated
    from pfode.scores.io import layout

    name = layout.prompted_pipeline(path)
    if name is not None:
        return _pipeline(path, name)
    index, place, scheduler = layout.parts(path)
    config = layout.read_json(place / "config.json")
    files, _, _ = layout.weight_files(place)
    headers = [read_header(file) for file in files]
    found: dict[str, Any] = {"file": str(path), "kind": "diffusers folder", "pipeline": index.get("_class_name")}
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    found["architecture"] = {"name": str(config.get("_class_name")), **public}
    if scheduler is not None:
        about = layout.read_json(scheduler)
        try:
            known = stated(about)
        except ValueError as error:
            raise FileError(f"{scheduler}: {getattr(error, 'message', error)}", getattr(error, "hint", "")) from error
        found |= {"scheduler": about["_class_name"], "process": known.process.config(), "prediction": known.prediction}
    return found | {
        "autoencoder": "vae" if "vae" in index else None,
        "files": [file.name for file in files],
        "parameters": sum(header.parameters for header in headers),
        "dtypes": sorted({entry.dtype for header in headers for entry in header.entries.values()}),
        "bytes": sum(file.stat().st_size for file in files),
    }


def _pipeline(path: Path, name: str) -> dict[str, Any]:
    """The entries of `pfode info` for a folder of a pipeline under prompts.

    Raises:
        FileError: something in it is missing or broken.
    """
    from pfode.compat.schedules import stated
    from pfode.scores.io import layout

    index = layout.read_json(path / "model_index.json")
    found: dict[str, Any] = {"file": str(path), "kind": "diffusers folder", "pipeline": name, "takes": "--prompt"}
    about = layout.read_json(path / "scheduler" / "scheduler_config.json")
    try:
        known = stated(about)
    except ValueError as error:
        where = path / "scheduler" / "scheduler_config.json"
        raise FileError(f"{where}: {getattr(error, 'message', error)}", getattr(error, "hint", "")) from error
    found |= {"scheduler": about["_class_name"], "process": known.process.config(), "prediction": known.prediction}
    parts: dict[str, Any] = {}
    dtypes: set[str] = set()
    whole = 0
    for key in layout.TEXT_PIPELINES[name]:
        entry = index.get(key)
        if key in layout.LEFT_OUT or key.startswith("tokenizer") or not isinstance(entry, list) or entry[-1] is None:
            continue
        place, stem = path / key, layout.stem(key)
        there = layout.variants(place, stem)
        if not there:
            raise FileError(f"{place}: no {stem}.safetensors", "the download may be incomplete")
        files = [file for file in place.glob(f"{stem}*.safetensors") if (None in there) != (file.name.count(".") > 1)]
        headers = [read_header(file) for file in files]
        count = sum(header.parameters for header in headers)
        parts[key] = f"{entry[-1]}, {count:,} parameters, variants: {', '.join(sorted(v or 'plain' for v in there))}"
        dtypes |= {entry.dtype for header in headers for entry in header.entries.values()}
        whole += count
    return found | parts | {"parameters": whole, "dtypes": sorted(dtypes)}


def pickle(path: Path) -> dict[str, Any]:
    """The entries of `pfode info` for a network pickle of EDM or EDM2; nothing in it is executed.

    Raises:
        FileError: it is none.
    """
    from pfode.scores.io.edm_files import load_pickle

    den: Any = load_pickle(path)
    weights = list(den.net.state_dict().values())
    return {
        "file": str(path),
        "kind": "network pickle",
        "architecture": den.net.architecture(),
        "process": den.process.config(),
        "prediction": den.prediction,
        "shape": list(den.shape),
        "classes": len(den.labels or ()),
        "parameters": sum(value.numel() for value in weights),
        "dtypes": sorted({str(value.dtype).removeprefix("torch.") for value in weights}),
        "bytes": path.stat().st_size,
    }


def denoiser(den: Any) -> dict[str, Any]:
    """The entries of `pfode info` for a denoiser in memory."""
    from torch import nn

    from pfode.denoiser import fingerprint
    from pfode.labels import class_count

    network = getattr(den, "net", den)
    weights = list(network.parameters()) if isinstance(network, nn.Module) else []
    found = {
        "kind": "denoiser",
        "architecture": type(network).__name__,
        "process": den.process.config(),
        "prediction": getattr(den, "prediction", None),
        "shape": list(getattr(den, "shape", None) or ()) or None,
        "classes": class_count(den),
        "labels": list(getattr(den, "labels", None) or ()) or None,
        "evals": getattr(den, "evals", 1),
        "parameters": sum(weight.numel() for weight in weights),
        "dtypes": sorted({str(weight.dtype).removeprefix("torch.") for weight in weights}),
        "digest": fingerprint(den),
    }
    return {key: value for key, value in found.items() if value not in (None, [])}


def model_digest(path: Path) -> str | None:
    """sha256 of a model: the one that a file of pfode records, else over the bytes of the file or of the folder."""
    if path.is_file() and path.suffix != ".pkl":
        recorded = read_header(path).metadata.get("pfode.digest")
        if recorded is not None:
            return recorded
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".json", ".safetensors"))
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(str(file.relative_to(path)).encode())
            with file.open("rb") as stream:
                while chunk := stream.read(CHUNK):
                    digest.update(chunk)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
