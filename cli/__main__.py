"""The `pfode` command. A subcommand's module is imported when it is used; torch only when something is computed."""

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

import click

import pfode
from pfode.cli.exits import end, fail
from pfode.cli.options import COMMANDS, find_command
from pfode.cli.pages import EPILOG, colour_of, write_examples
from pfode.cli.streams import Output, open_standard_streams
from pfode.errors import PfodeWarning, UsageError, unknown

__all__ = ["group", "main"]

ELSEWHERE = {"help": "--help", "version": "--version", "generate": "sample", "draw": "sample", "list": "samplers"}


class Group(click.Group):
    """The commands of the table, imported one by one when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            return find_command(cmd_name)
        if cmd_name.startswith("-") or ctx.resilient_parsing:
            return None
        if cmd_name in ELSEWHERE:
            raise UsageError(f"unknown command {cmd_name!r}", f"`pfode {ELSEWHERE[cmd_name]}`")
        raise unknown("command", cmd_name, COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section(click.style("Commands", bold=True)):
            formatter.write_dl([(click.style(name, fg="cyan"), text) for name, text in COMMANDS.items()])
        write_examples("", formatter)


@click.group(
    cls=Group,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=False,
    invoke_without_command=True,
)
@click.version_option(pfode.__version__, prog_name="pfode", message="%(prog)s %(version)s")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Draw pictures from score networks through the probability-flow ODE."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), color=ctx.color)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with the code that `pfode --help` states."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    out = Output(json="--json" in given, debug="--debug" in given)
    open_standard_streams()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads of torch that spin starve each other on busy cores
    if "_PFODE_COMPLETE" in os.environ:
        group.main(given, prog_name="pfode")
    try:
        with _terminable(), _warnings_as_notes(out):
            code = _run(given, out)
    except BaseException as error:
        fail(error, out)
    end(code, out)


def _run(arguments: list[str], out: Output) -> int:
    """The exit code; errors pass, unlike in `click.Group.main`."""
    try:
        with group.make_context("pfode", arguments, obj=out, color=colour_of(os.environ)) as ctx:
            group.invoke(ctx)
    except click.exceptions.Exit as done:
        return done.exit_code
    return 0


@contextlib.contextmanager
def _warnings_as_notes(out: Output) -> Iterator[None]:
    """Say pfode's own warnings in one line, without the place in the code."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, PfodeWarning):
            out.note(f"warning: {message}")
        else:
            usual(message, category, *where)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that nothing half-written is left."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(143)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
