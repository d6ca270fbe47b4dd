"""The way every error leaves the process: its exit code, one line, and a hint."""

import errno
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import click
from click.core import ParameterSource

from pfode.cli.codes import (
    CODES,
    FILE,
    INTERNAL,
    INTERRUPTED,
    MEMORY,
    MISSING,
    READER_GONE,
    TERMINATED,
    USAGE,
    WRITE,
)
from pfode.cli.machine import memory_limit
from pfode.cli.options import source
from pfode.cli.streams import Output, printable
from pfode.errors import MemoryLimitError, PfodeError, nearly
from pfode.samplers.names import ARGUMENTS

__all__ = ["end", "fail"]

ELSEWHERE = {  # what other programs call the options
    **{name.replace("_", "-"): f"--{here}" for name, here in ARGUMENTS.items()},
    "epochs": "--steps", "output": "--out", "outdir": "--separate", "output-dir": "--separate", "ckpt": "--model",
    "learning-rate": "--lr", "checkpoint": "--model", "mask-image": "--mask", "true-cfg-scale": "--true-cfg",
    "network": "--model", "dataset": "--data", "resolution": "--size",
}  # fmt: skip
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
NO_MEMORY += ("failed to map segment", "cannot create thread", "can't start new thread")
NO_MEMORY += ("could not create a primitive",)  # of oneDNN  # at an import, or of a pool


class _End(NamedTuple):
    """An exit code with the error and the hint to show."""

    code: int
    message: str
    hint: str = ""


def fail(error: BaseException, out: Output) -> NoReturn:
    """Report an error that ends the run, and exit with its code."""
    code, message, hint = _describe(error)
    out.flush()
    if code == READER_GONE:
        sys.exit(code)
    if out.debug or code == INTERNAL:
        try:
            import traceback

            trace = "".join(traceback.format_exception(error))
        except (OSError, ImportError, MemoryError) as shortage:  # no descriptor for the module's own file
            code, message, hint = _describe(shortage)
            trace = ""
        if out.debug:
            out.complain(trace)
        if code == INTERNAL:
            hint = f"this is a bug: please report it {_log(trace)}"
    message, hint = printable(message), printable(hint)
    if out.json:
        out.emit({"error": {"code": code, "kind": CODES[code][0], "message": message, "hint": hint}}, "")
    out.complain(f"{click.style('pfode: error:', fg='red', bold=True)} {message}")
    if hint:
        out.complain(f"{click.style('hint:', fg='green')} {hint}")
    sys.exit(code)


def end(code: int, out: Output) -> NoReturn:
    """Exit with a code; one of success becomes that of a result or a remark that could not be said."""
    out.flush()
    if code or not out.lost:
        sys.exit(code)
    if any(isinstance(error, BrokenPipeError) for error in out.lost.values()):
        sys.exit(READER_GONE)
    for name, error in tuple(out.lost.items()):
        out.complain(f"pfode: error: {name}: cannot be written: {error.strerror or error}")
    sys.exit(WRITE)


def _describe(error: BaseException) -> _End:
    if isinstance(error, click.ClickException):
        return _describe_click(error)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return _End(INTERRUPTED, "interrupted")
    if isinstance(error, SystemExit):
        return _End(TERMINATED, "terminated")
    short = _scarce(error)
    if short is not None:
        return short
    if isinstance(error, PfodeError):
        return _End(error.code, error.message, error.hint)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("pfode"):
        return _End(MISSING, f"the package {error.name!r} is not installed", f"pip install {error.name}")
    if isinstance(error, ImportError):
        return _End(MISSING, f"a package cannot be imported: {error}", "`pfode info env` lists those that are there")
    if isinstance(error, BrokenPipeError):
        return _End(READER_GONE, "the reader of the output went away")
    if isinstance(error, OSError):
        of = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return _End(WRITE, f"{of}{error.strerror or error}", "is the disk full, or the working folder gone?")
    if isinstance(error, SystemError) and memory_limit() is not None:  # an allocation failed in a module that forgot it
        return _End(MEMORY, "out of memory", "a larger `ulimit -v`")
    return _End(INTERNAL, f"internal error: {type(error).__name__}: {error}")


def _scarce(error: BaseException) -> _End | None:
    """What the process ran out of, be it memory or file descriptors, however the error was wrapped on its way."""
    if isinstance(error, MemoryLimitError):
        return None  # which says it better
    torch = sys.modules.get("torch")
    for cause in _chain(error):
        number = cause.errno if isinstance(cause, OSError) else None
        text = str(cause).lower() if isinstance(cause, OSError | ImportError | RuntimeError) else ""
        if number in NO_DESCRIPTORS or "too many open files" in text:
            return _End(MEMORY, "too many open files: the process may open no more", "a larger `ulimit -n`")
        whole = isinstance(cause, MemoryError) or (torch is not None and isinstance(cause, torch.OutOfMemoryError))
        if isinstance(cause, PfodeError):
            continue  # says itself what it is
        if whole or number == errno.ENOMEM or any(words in text for words in NO_MEMORY):
            return _End(MEMORY, "out of memory", "a smaller --batch or a smaller --n")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from or during, the outermost first."""
    found: BaseException | None = error
    for _ in range(20):
        if found is None:
            return
        yield found
        found = found.__cause__ or found.__context__


def _describe_click(error: click.ClickException) -> _End:
    ctx, param = getattr(error, "ctx", None), getattr(error, "param", None)
    hint = f"`{ctx.command_path} --help` lists the options" if ctx else "`pfode --help`"
    message = error.format_message()
    if isinstance(error, click.NoSuchOption) and ctx:
        known = [
            word for param in ctx.command.params for word in (*param.opts, *param.secondary_opts) if word[:2] == "--"
        ]
        elsewhere = ELSEWHERE.get(error.option_name.lstrip("-").replace("_", "-"))
        if elsewhere in known:
            return _End(USAGE, f"no such option {error.option_name}", f"here it is called {elsewhere}")
        return _End(USAGE, f"no such option {error.option_name}", nearly(error.option_name, known) or hint)
    if ctx and param and param.name:
        where = source(ctx, param.name)
        if ctx.get_parameter_source(param.name) is ParameterSource.DEFAULT_MAP:
            return _End(FILE, f"{where}: {message}", hint)
        if ctx.get_parameter_source(param.name) is ParameterSource.ENVIRONMENT:
            hint = f"the value comes from {where} in the environment"
    return _End(USAGE, message, hint)


def _log(trace: str) -> str:
    """Keep a traceback in a file of the temporary folder and say where."""
    import tempfile

    try:
        handle, path = tempfile.mkstemp(prefix="pfode-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"pfode {' '.join(sys.argv[1:])}\n\n{trace}")
    except OSError:
        return "with the output of --debug"
    return f"with {path}"
