"""Which options a run uses: of rivals the one with the stronger source, a picture's recipe, lists of seeds."""

import re
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pfode.cli.common import check_value
from pfode.errors import FileError, UsageError

RECIPE = (
    "model", "sampler", "steps", "nfe", "grid", "chart", "eta",
    "seed", "n", "seeds", "label", "guidance", "dtype", "scale",
)  # fmt: skip
MAX_SAMPLES = 1_000_000


def settle(ctx: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Merge --like, and of two options that exclude each other keep the one with the stronger source.

    Raises:
        UsageError: both with the same source.
    """
    ranks = {name: _rank(ctx, name) for name in options}
    if options["like"] is not None:
        _merge_recipe(ctx, options, ranks)
    plan = options["sampler"].endswith(".safetensors")
    for name in ("steps", "nfe", "grid", "chart", "eta"):
        if plan and ranks[name] == 0:
            raise UsageError(
                f"--{name} with a plan file: the plan {options['sampler']} has its own", f"leave --{name} out"
            )
    for name, other in (("steps", "nfe"), ("seed", "seeds"), ("n", "seeds")):
        if ranks[name] == ranks[other] < _DEFAULT:
            raise UsageError(f"--{name} and --{other} exclude each other", "give one of them")
    if ranks["nfe"] < ranks["steps"]:
        options["steps"] = None
    else:
        options["nfe"] = None
    if min(ranks["seed"], ranks["n"]) < ranks["seeds"]:
        options["seeds"] = None
    if ranks["n"] == _DEFAULT:
        options["n"] = None
    return options


_DEFAULT = 9
_RANKS = {ParameterSource.COMMANDLINE: 0, ParameterSource.ENVIRONMENT: 2, ParameterSource.DEFAULT_MAP: 3}


def _rank(ctx: click.Context, name: str) -> int:
    """How strong the source of a value is; 1 is a picture's recipe."""
    where = ctx.get_parameter_source(name)
    return _RANKS.get(where, _DEFAULT) if where else _DEFAULT


def _merge_recipe(ctx: click.Context, options: dict[str, Any], ranks: dict[str, int]) -> None:
    from pfode.cli.images import read_recipe

    path = Path(options["like"])
    recipe = read_recipe(path)
    found = recipe["options"]
    params = {p.name: p for p in ctx.command.params}
    for key in found:
        if key not in RECIPE:
            raise FileError(
                f"{path}: pfode: options: unknown option {key!r:.60}", "the picture was not written by this pfode"
            )
    for key in RECIPE:
        if ranks[key] == 0:
            continue
        param = params[key]
        options[key], ranks[key] = param.default if isinstance(param.default, str | int) else None, _DEFAULT
        if key in found:
            value = check_value(f"{path}: pfode: options: {key}", param, found[key])
            try:
                options[key], ranks[key] = param.type_cast_value(ctx, value), 1
            except click.BadParameter as error:
                raise FileError(f"{path}: pfode: options: {key}: {error.message}") from error
    digests = {"model": recipe["model"].get("digest"), "sampler": recipe.get("plan")}
    for value in digests.values():
        if value is not None and not isinstance(value, str):
            raise FileError(f"{path}: pfode: digest: expected a string, got {value!r:.60}")
    options["digests"] = {key: value for key, value in digests.items() if ranks[key] == 1}


def check_digest(options: dict[str, Any], key: str, digest: str | None) -> None:
    """Refuse to repeat a picture with another file of the same name.

    Raises:
        FileError: the digest is not the recorded one.
    """
    wanted = options.get("digests", {}).get(key)
    if wanted is not None and wanted != digest:
        raise FileError(
            f"{options['like']}: made with another {options[key]} (digest {wanted!r:.12}..., here {digest!r:.12}...)",
            f"give --{key} to use it anyway",
        )


def parse_seeds(text: str) -> list[int]:
    """The seeds of "0-63,80".

    Raises:
        UsageError: not a list of seeds, one twice, or too many.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,20})(?:-(\d{1,20}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < 2**64:
            raise UsageError(f"--seeds: cannot read {part!r:.60}", "--seeds 0-63,80")
        if last - first + len(seeds) >= MAX_SAMPLES:
            raise UsageError(f"--seeds: more than {MAX_SAMPLES} seeds", "several runs with a part each")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise UsageError("--seeds: a seed stands there twice", "each seed is one picture: name it once")
    return seeds


def format_seeds(seeds: list[int]) -> str:
    """The inverse of `parse_seeds`, as short as it gets."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in parts)


def seed_range(seed: int, n: int) -> list[int]:
    """n seeds from `seed` on.

    Raises:
        UsageError: too many, or seeds of more than 64 bits.
    """
    if seed + n > 2**64:
        raise UsageError(f"--seed {seed}: {n} seeds from there on pass 2^64 - 1", f"--seed {2**64 - n}")
    if n > MAX_SAMPLES:
        raise UsageError(f"--n {n}: more than {MAX_SAMPLES} pictures", "several runs with a --seed each")
    return list(range(seed, seed + n))
