"""Which settings a run uses: of two that exclude each other the stronger, those of --like, and lists of values."""

import contextlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from pfode import defaults
from pfode.cli.options import check_value
from pfode.cli.prompts import OF_THE_PROMPT
from pfode.cli.trust import TRUST, names_code
from pfode.errors import FileError, PfodeError, UsageError, unknown
from pfode.header import read_header
from pfode.scores.io.find import guided_name
from pfode.scores.io.shipped import shipped

__all__ = [
    "DTYPES",
    "KEPT",
    "MAX_PICTURES",
    "OF_A_TOLERANCE",
    "OF_FIXED_STEPS",
    "OF_THE_GUIDANCE",
    "OF_THE_PLAN",
    "OF_THE_SAMPLER",
    "RECORDED",
    "check_digest",
    "find_sampler",
    "flag",
    "format_seeds",
    "format_set",
    "is_adaptive",
    "listed",
    "parse_interval",
    "parse_seeds",
    "parse_set",
    "seed_range",
    "settle",
    "typed",
]

T = TypeVar("T")
OF_FIXED_STEPS = ("steps", "nfe", "grid", "eta", "set", "lower_order_final", "afs")
OF_A_TOLERANCE = ("rtol", "atol")
OF_THE_SAMPLER = ("chart", "eta", "set", "lower_order_final", "afs", *OF_A_TOLERANCE)  # which another one may not take
OF_THE_PLAN = ("steps", "nfe", "grid", *OF_THE_SAMPLER, "strength")
OF_THE_GUIDANCE = ("negative", "guidance_interval", "guidance_rescale")
RECORDED = (
    "model", "prompt", *OF_THE_PROMPT, "sampler", *OF_THE_PLAN, "brownian", "init", "mask", "label", "guidance",
    *OF_THE_GUIDANCE, "text", "seed", "n", "seeds", "dtype", "scale",
)  # fmt: skip
KEPT = ("model", "base", "sampler", "init", "mask")  # names of files that a picture keeps
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}  # and torch's names
MAX_PICTURES = 1_000_000  # of one run; Python has its own limit, `settle.MAX_SAMPLES`


def settle(ctx: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Merge --like, and of two options that exclude each other keep the one with the stronger source.

    Raises:
        UsageError: both with the same source, or one without the other that it belongs to.
    """
    ranks = {name: _rank(ctx, name) for name in options}
    if options["like"] is not None:
        _merge(ctx, options, ranks)
    for name in KEPT:
        if options[name] is not None and not options[name].isprintable():
            problem = f"{flag(name)} {options[name]!r:.60}: such a name cannot be kept in a picture"
            raise UsageError(problem, "rename the file: no line breaks, control characters or broken UTF-8")
    if options["text"] is not None and ranks["model"] == _DEFAULT:
        options["model"] = defaults.TEXT_MODEL
    _take_guidance(options, ranks)
    if options["like"] is None:
        _take_recommended(ctx, options, ranks)
    named = options["sampler"]
    if named.endswith(".safetensors"):
        foreign, why = OF_THE_PLAN, f"with a plan file: the plan {named} has its own"
    elif is_adaptive(named):
        foreign, why = OF_FIXED_STEPS, f"with {named}, which chooses its own steps for every picture"
    else:
        foreign, why = OF_A_TOLERANCE, f"with {named}, whose steps lie on a grid"
    for name in foreign:
        if ranks[name] == 0:
            hint = ", or an adaptive --sampler, such as rk45" if foreign is OF_A_TOLERANCE else ""
            if foreign is OF_A_TOLERANCE and named != "auto":
                find_sampler(named)  # raises where there is none
            raise UsageError(f"{flag(name)} {why}", f"leave {flag(name)} out{hint}")
    alone = tuple(("text", name) for name in ("label", "separate", "init", "mask", "prompt"))
    for name, other in (("steps", "nfe"), ("seed", "seeds"), ("n", "seeds"), *alone):
        if ranks[name] == ranks[other] < _DEFAULT:
            raise UsageError(f"--{name} and --{other} exclude each other", "give one of them")
    for name, other, value in (
        ("strength", "init", "PICTURE"),
        ("mask", "init", "PICTURE"),
        *((name, "guidance", "2") for name in OF_THE_GUIDANCE),
    ):
        if ranks[name] == 0 and options[other] in (None, 1):
            how = f"without --{other}" if options[other] is None else f"at --{other} 1"
            raise UsageError(f"{flag(name)} does nothing {how}", f"--{other} {value}")
    if options["prompt"]:
        for name in ("label", "negative"):
            if ranks[name] == 0:
                hint = "one --prompt for each picture" if name == "label" else "--negative-prompt"
                raise UsageError(f"{flag(name)}: is a class, which a pipeline under prompts does not have", hint)
        options |= {"label": None, "negative": None}
    if options["mask"] is not None and ranks["strength"] == _DEFAULT:
        options["strength"] = 1.0
    if ranks["nfe"] < ranks["steps"]:
        options["steps"] = None
    else:
        options["nfe"] = None
    if min(ranks["seed"], ranks["n"]) < ranks["seeds"]:
        options["seeds"] = None
    return options


def _take_guidance(options: dict[str, Any], ranks: dict[str, int]) -> None:
    """Make --model NAME@2 --model NAME --guidance 2, unless a stronger source has another scale.

    Raises:
        UsageError: both with the same source.
    """
    name, scale = guided_name(options["model"])
    if scale is None:
        return
    options["model"] = name
    if ranks["guidance"] == ranks["model"]:
        problem = f"--model {name}@{scale:g} and --guidance {options['guidance']:g} exclude each other"
        raise UsageError(problem, "give one of them")
    if ranks["guidance"] > ranks["model"]:
        options["guidance"], ranks["guidance"] = scale, ranks["model"]


def _take_recommended(ctx: click.Context, options: dict[str, Any], ranks: dict[str, int]) -> None:
    """Where nothing else says them: the guidance that a model's card recommends, and its sampler with its steps."""
    name = options["model"]
    known = shipped().get(name) or (Path(name) if os.path.isfile(name) else None)
    found: Any = None
    with contextlib.suppress(PfodeError):  # what is damaged is said by who loads it
        header = None if known is None or known.suffix != ".safetensors" else read_header(known)
        found = None if header is None else header.config("pfode.config").get("recommended")
    if not isinstance(found, dict):
        return
    free = all(ranks[key] == _DEFAULT for key in ("sampler", *OF_THE_PLAN))
    unclassed = options["label"] == "none"
    for param in ctx.command.params:
        key = str(param.name)
        wanted = (key in ("sampler", "steps") and free) or (key == "guidance" and not unclassed)
        if wanted and key in found and ranks[key] == _DEFAULT:
            value = check_value(f"{known}: pfode.config: recommended: {key}", param, found[key])
            options[key] = param.type_cast_value(ctx, value)


def find_sampler(name: str) -> Any:
    """The recipe of this name in the catalogue.

    Raises:
        UsageError: unknown name.
    """
    from pfode.samplers.catalogue import recipe_and_grid

    return recipe_and_grid(name)[0]


def is_adaptive(sampler: str) -> bool:
    """Whether a name is that of an adaptive sampler."""
    from pfode.samplers.adaptive import ADAPTIVE

    return sampler in ADAPTIVE


_DEFAULT = 9
_RANKS = {ParameterSource.COMMANDLINE: 0, ParameterSource.ENVIRONMENT: 2, ParameterSource.DEFAULT_MAP: 3}


def _rank(ctx: click.Context, name: str) -> int:
    """The rank of the source of a value: 0 a flag, 1 --like, 2 a variable, 3 a file, 9 a default."""
    where = ctx.get_parameter_source(name)
    return _RANKS.get(where, _DEFAULT) if where else _DEFAULT


def _merge(ctx: click.Context, options: dict[str, Any], ranks: dict[str, int]) -> None:
    """Put the settings of the picture --like into the options, where no flag is stronger."""
    from pfode.cli.images import read_settings

    path = Path(options["like"])
    settings = read_settings(path)
    found = settings["options"]
    params = {p.name: p for p in ctx.command.params}
    for key in found:
        if key not in RECORDED:
            raise FileError(
                f"{path}: pfode: options: unknown option {key!r:.60}", "the picture was not written by this pfode"
            )
    if ranks["sampler"] == 0:
        found = {key: value for key, value in found.items() if key not in OF_THE_SAMPLER}
    for key in RECORDED:
        if ranks[key] == 0:
            continue
        param = params[key]
        options[key], ranks[key] = _default(param), _DEFAULT
        if key in found:
            value = check_value(f"{path}: pfode: options: {key}", param, found[key])
            try:
                options[key], ranks[key] = param.type_cast_value(ctx, value), 1
            except click.BadParameter as error:
                raise FileError(f"{path}: pfode: options: {key}: {error.message}") from error
    if ranks["model"] == 1 and names_code(options["model"]) and not options[TRUST]:
        problem = f"{path}: pfode: options: model: {options['model']!r:.60} would run Python code"
        raise FileError(problem, f"--model {options['model']} on the command line, or --trust-python")
    digests = {"model": settings["model"].get("digest"), "sampler": settings.get("plan")}
    digests |= {key: settings.get(key) for key in ("init", "mask")}
    for value in digests.values():
        if value is not None and not isinstance(value, str):
            raise FileError(f"{path}: pfode: digest: expected a string, got {value!r:.60}")
    options["digests"] = {key: value for key, value in digests.items() if ranks[key] == 1}


def _default(param: click.Parameter) -> Any:
    """The default of an option."""
    given = param.default
    return given if isinstance(given, str | int | float) else () if param.multiple else None


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


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def typed(command: click.Command, options: dict[str, Any]) -> list[str]:
    """The words that give a command these options."""
    params = {param.name: param for param in command.params}
    words: list[str] = []
    for key, value in options.items():
        param = params.get(key)
        if isinstance(value, bool) and param is not None and param.secondary_opts:
            words.append((param.opts if value else param.secondary_opts)[0])
        else:
            for one in value if isinstance(value, list) else [value]:
                words += [flag(key), str(one)]
    return words


# ---- values


def listed(name: str, text: str, kind: Callable[[str], T], what: str, example: str) -> tuple[T, ...]:
    """The values between the commas of an option, at least one.

    Raises:
        UsageError: one that is not of the kind.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{name}: expected {what} separated by commas, got {text!r:.60}", example) from error


def parse_interval(text: str) -> tuple[float, float]:
    """The two ends of --guidance-interval.

    Raises:
        UsageError: not two numbers.
    """
    ends = listed("--guidance-interval", text, float, "two numbers", "--guidance-interval 0.3,5")
    if len(ends) != 2:
        raise UsageError(f"--guidance-interval: need two numbers, got {text!r:.60}", "--guidance-interval 0.3,5")
    return ends[0], ends[1]


def parse_set(words: Iterable[str]) -> dict[str, Any]:
    """The options of a sampler from "NAME=VALUE" words; a value is a number, or a tuple of numbers between commas.

    Raises:
        UsageError: another form, a name twice, or one that no sampler takes.
    """
    known, found = _options_of_samplers(), {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f"--set: expected NAME=VALUE, got {word!r:.60}", "--set churn=40")
        if name not in known:
            raise unknown("sampler option", name, known)
        if name == "eta":
            raise UsageError("--set eta: it has an option of its own", f"--eta {text}")
        if name in found:
            raise UsageError(f"--set {name}: given twice", f"give {name} once")
        values = listed(f"--set {name}", text, _number, "numbers", "--set tau=0.5 --set between=0.7,25")
        found[name] = values[0] if len(values) == 1 else values
    return found


def format_set(meta: dict[str, Any]) -> list[str]:
    """The "NAME=VALUE" words for the sampler options among the metadata of a plan: the inverse of `parse_set`."""
    known = _options_of_samplers() - {"eta"}
    values = {name: meta[name] for name in meta if name in known}
    return [f"{name}={','.join(map(repr, v)) if isinstance(v, tuple) else repr(v)}" for name, v in values.items()]


def _number(text: str) -> float:
    """The number that a text is; an integer if it is written as one, which options that count need."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def _options_of_samplers() -> set[str]:
    from pfode.samplers import CATALOGUE

    return {name for recipe in CATALOGUE.values() for name in recipe.method.options}


def parse_seeds(text: str) -> list[int]:
    """The seeds of a list such as "0-63,80".

    Raises:
        UsageError: not a list of seeds, one twice, or too many.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,20})(?:-(\d{1,20}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < 2**64:
            raise UsageError(f"--seeds: cannot read {part!r:.60}", "--seeds 0-63,80")
        if last - first + len(seeds) >= MAX_PICTURES:
            raise UsageError(f"--seeds: more than {MAX_PICTURES} seeds", "several runs with a part each")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise UsageError("--seeds: a seed appears twice", "each seed is one picture: name it once")
    return seeds


def format_seeds(seeds: list[int]) -> str:
    """The shortest list of these seeds: the inverse of `parse_seeds`."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in parts)


def seed_range(seed: int, n: int) -> list[int]:
    """The seeds seed, seed + 1, ..., n of them.

    Raises:
        UsageError: too many, or seeds of more than 64 bits.
    """
    if n > MAX_PICTURES:
        raise UsageError(f"--n {n}: more than {MAX_PICTURES} pictures", "several runs with a --seed each")
    if seed + n > 2**64:
        raise UsageError(f"--seed {seed}: {n} seeds from there on pass 2^64 - 1", f"--seed {2**64 - n}")
    return list(range(seed, seed + n))
