"""What every command shares: its options, and where their values come from."""

import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from pfode.cli import trust
from pfode.cli.complete import completer
from pfode.cli.machine import check_machine
from pfode.cli.pages import write_examples, write_options
from pfode.cli.streams import output
from pfode.errors import FileError, PfodeError, did_you_mean, nearly
from pfode.files import read_file

__all__ = [
    "COMMANDS",
    "CONFIG_FILE",
    "Command",
    "FileName",
    "Finite",
    "as_flags",
    "check_value",
    "find_command",
    "misspelt_variables",
    "read_config",
    "source",
]

COMMANDS = {
    "sample": "Draw pictures from a score network.",
    "train": "Train a score network.",
    "reflow": "Straighten the paths of a flow.",
    "fit": "Fit plans of few calls to a model.",
    "convert": "Write a model of diffusers or EDM as one file.",
    "info": "Say what a model, a plan or a picture holds.",
    "samplers": "List the samplers.",
    "likelihood": "Say how likely pictures are under a model.",
    "bench": "Measure samplers: quality against evaluations.",
}
CONFIG_FILE = "pfode.toml"
CONFIG_LIMIT = 1_000_000  # bytes
MORE = "`pfode --help` has the exit codes, and where the values of options come from."


class FileName(click.types.StringParamType):
    """The name of a file or a folder, or of something else; `~` at its beginning is the home folder.

    The shell expands `~` in most words of a command line, but not after `=`, in a variable or in a file.
    """

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        name = super().convert(value, param, ctx)
        if not name:
            self.fail("an empty name.", param, ctx)
        return os.path.expanduser(name)


class Command(click.Command):
    """A command with the shared options, PFODE_* variables and configuration files."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.context_settings = {
            "auto_envvar_prefix": "PFODE",
            "help_option_names": ["-h", "--help"],
            "show_default": True,
        }
        self.epilog = MORE
        for param in self.params:
            complete = completer(self.name, param.name)
            if complete is not None:
                param._custom_shell_complete = complete
            if isinstance(param, click.Option) and param.metavar is None:
                numbers = (click.types.IntParamType, "N"), (click.types.FloatParamType, "X")
                param.metavar = next((metavar for kind, metavar in numbers if isinstance(param.type, kind)), None)
        self.params += [
            click.Option(
                ["--config"],
                type=FileName(),
                metavar="FILE.toml",
                is_eager=True,
                expose_value=False,
                callback=_use_config,
                help="Configuration file: values for the options.",
            ),
            _switch(["--json"], "One JSON object on stdout, also for an error."),
            _switch(["--quiet", "-q"], "No progress and no remarks on stderr."),
            _switch(["--debug"], "Show the traceback of an error."),
        ]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_options(self, ctx, formatter)
        write_examples(self.name or "", formatter)

    def invoke(self, ctx: click.Context) -> Any:
        for remark in misspelt_variables():
            output(ctx).note(remark)
        trust.check_sources(ctx)
        if self.name != "info":  # which answers without torch
            check_machine()
            if "torch" not in sys.modules:
                output(ctx).wait("pfode: loading torch ...")
        try:
            return super().invoke(ctx)
        except PfodeError as error:
            error.hint = as_flags(self, error.hint)
            raise


def _switch(names: list[str], text: str) -> click.Option:
    return click.Option(names, is_flag=True, expose_value=False, callback=_set_switch, help=text)


def _set_switch(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and param.name:
        setattr(output(ctx), param.name, True)


class Finite(click.types.FloatParamType):
    """A float that is neither infinite nor NaN, from `low` to `high`; or, where `word` says so, one word instead."""

    def __init__(self, low: float = -math.inf, high: float = math.inf, word: str | None = None):
        self.low, self.high, self.word = low, high, word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if self.word is not None and value == self.word:
            return value
        number = super().convert(value, param, ctx)
        if not math.isfinite(number) or not self.low <= number <= self.high:
            ends = (f" of at least {self.low:g}", f" up to {self.high:g}")
            limits = "".join(text for text, end in zip(ends, (self.low, self.high), strict=True) if math.isfinite(end))
            self.fail(f"{value} is not a finite number{limits}.", param, ctx)
        return number


def as_flags(command: click.Command, hint: str) -> str:
    """The hint of an error, which names arguments of Python (steps=20), with the flags of a command (--steps 20)."""
    known = _config_options(command)

    def flagged(match: re.Match[str]) -> str:
        name, _, value = match.groups()
        option = known.get(name)
        if option is None or not isinstance(option, click.Option) or option.is_flag:
            return match[0]
        return f"{option.opts[0]} {value}"

    return re.sub(r"(?<![\w.-])([a-z_]+)=(\"?)([\w.+-]+)\2", flagged, hint)


# ---- configuration files and variables


def _use_config(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    files = [Path(CONFIG_FILE)] if os.path.isfile(CONFIG_FILE) else []
    if value is not None:
        files.append(Path(value))
        ctx.meta["pfode.config"] = value
    merged: dict[str, Any] = {}
    for file in files:
        found = read_config(file, ctx.command, ctx.info_name or "")
        merged |= found
        ctx.meta.setdefault("pfode.origin", {}).update(dict.fromkeys(found, str(file)))
    ctx.default_map = merged


def read_config(file: Path, command: click.Command, name: str) -> dict[str, Any]:
    """The values a TOML file gives to the options of one command.

    Keys stand in [tool.pfode], or in [tool.pfode.COMMAND] for one command; a file given by --config may also have them
    at its top.

    Raises:
        FileError: no such file, broken TOML, an unknown key, or a value of the wrong type.
    """
    import tomllib

    raw = read_file(file, CONFIG_LIMIT, "a configuration file")
    try:
        content = tomllib.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{file}: broken TOML: {error}") from error
    tool = content.get("tool", {})
    if not isinstance(tool, dict) or not isinstance(tool.get("pfode", {}), dict):
        raise FileError(f"{file}: tool.pfode: expected a table", "[tool.pfode]")
    if file.name == CONFIG_FILE and content.keys() - {"tool"}:
        key = min(content.keys() - {"tool"})
        raise FileError(f"{file}: {key!r} stands outside of [tool.pfode]", "write [tool.pfode] above it")
    table = tool.get("pfode", {}) if "tool" in content else content
    for key, value in table.items():
        if isinstance(value, dict) and key not in COMMANDS:
            raise FileError(f"{file}: unknown table {key!r}", did_you_mean(key, COMMANDS))
    known = _config_options(command)
    for place in (table, table.get(name, {})):
        if any(key.replace("-", "_") == trust.TRUST for key in place):
            raise FileError(f"{file}: {trust.TRUST}: a file cannot trust itself", "--trust-python on the command line")
    values = {}
    for key, value in table.items():
        option = key.replace("-", "_")
        if option in known:
            values[option] = check_value(f"{file}: {key}", known[option], _several(known[option], value))
        elif not isinstance(value, dict) and not any(option in _config_options(c) for c in map(find_command, COMMANDS)):
            raise FileError(f"{file}: unknown key {key!r}", did_you_mean(key, known))
    for key, value in table.get(name, {}).items():
        option = key.replace("-", "_")
        if option not in known:
            raise FileError(f"{file}: [{name}]: unknown key {key!r}", did_you_mean(key, known))
        values[option] = check_value(f"{file}: [{name}]: {key}", known[option], _several(known[option], value))
    return values


def _several(option: click.Parameter, value: Any) -> Any:
    """A list of one string for an option that takes one in another command: `model = "digits"` is meant for both."""
    if not option.multiple or not isinstance(value, str):
        return value
    others = (_config_options(find_command(name)).get(option.name or "") for name in COMMANDS)
    return [value] if any(other is not None and not other.multiple for other in others) else value


def check_value(where: str, option: click.Parameter, value: Any) -> Any:
    """The value itself if it has the type of the option (click alone would turn 2.5 into 2).

    Raises:
        FileError: it has another type.
    """
    if isinstance(option, click.Option) and option.is_flag:
        sound, expected = isinstance(value, bool), "true or false"
    elif option.multiple:
        sound = isinstance(value, list) and all(type(one) is str and one.isprintable() for one in value)
        expected = "a list of strings"
    elif isinstance(option.type, click.types.IntParamType):
        sound, expected = type(value) is int, "a whole number"
    elif isinstance(option.type, click.types.FloatParamType):
        word = getattr(option.type, "word", None)
        sound = type(value) in (int, float) or (word is not None and value == word)
        expected = "a number" if word is None else f"a number or {word!r}"
    else:
        sound, expected = type(value) is int or (type(value) is str and value.isprintable()), "a string"
    if not sound:
        raise FileError(f"{where}: expected {expected}, got {value!r:.60}")
    return value


def misspelt_variables() -> list[str]:
    """A remark for every PFODE_* variable that is the value of no option."""
    given = [name for name in os.environ if name.startswith("PFODE_")]
    if not given:
        return []
    known = {"config", *(name for command in map(find_command, COMMANDS) for name in _config_options(command))}
    strange = (name for name in sorted(given) if name.removeprefix("PFODE_").lower() not in known)
    lister = "`pfode info config` lists the options"
    return [f"{n} belongs to no option: {nearly(n.removeprefix('PFODE_').lower(), known) or lister}" for n in strange]


def _config_options(command: click.Command) -> dict[str, click.Parameter]:
    options = (p for p in command.params if isinstance(p, click.Option))
    return {p.name: p for p in options if p.name and p.name not in ("config", "help", trust.TRUST)}


def find_command(name: str) -> click.Command:
    """Import the module of a command and return the command."""
    from importlib import import_module

    return import_module(f"pfode.cli.{name}").command


def source(ctx: click.Context, name: str) -> str:
    """Where the value of an option comes from, in words."""
    where = ctx.get_parameter_source(name)
    if where is ParameterSource.COMMANDLINE:
        return "flag"
    if where is ParameterSource.ENVIRONMENT:
        return f"PFODE_{name.upper()}"
    if where is ParameterSource.DEFAULT_MAP:
        return ctx.meta.get("pfode.origin", {}).get(name, "config")
    return "default"
