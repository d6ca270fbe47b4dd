"""How a run speaks: the result on stdout, remarks and progress on stderr, and what happens where one of them fails."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import click

from pfode.cli.pages import colour_of

__all__ = ["Output", "open_standard_streams", "output", "printable", "table"]


@dataclass
class Output:
    """What a run says, and whether it could be said; lives in the root context.

    A stream that is closed or full ends nothing: the work goes on, and `lost` keeps the error for the exit code.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False
    lost: dict[str, OSError] = field(default_factory=dict)  # by "stdout" and "stderr"
    waiting: str = ""  # what stands on the terminal until something else is said

    @property
    def watched(self) -> bool:
        """Whether somebody looks on: stderr is a terminal, and the run is not quiet."""
        return not self.quiet and sys.stderr is not None and sys.stderr.isatty()

    def wait(self, text: str) -> None:
        """Say on a terminal what takes a moment; the next remark, bar or result takes its place."""
        if self.watched:
            self.clear()
            self._put("stderr", text, end="")
            self.waiting = text

    def clear(self) -> None:
        """Take away what `wait` said."""
        if self.waiting:
            text, self.waiting = self.waiting, ""
            self._put("stderr", f"\r{' ' * len(text)}\r", end="")

    def emit(self, data: Any, text: str) -> None:
        """Put the result on stdout: `data` as JSON, or `text`."""
        self._write("stdout", json.dumps(data, allow_nan=False) if self.json else text)

    def emit_bytes(self, data: bytes) -> None:
        """Put a result that is no text, such as a picture, on stdout."""
        self.clear()
        self.flush()
        if sys.stdout is None:
            self.lost.setdefault("stdout", OSError("it is closed"))
            return
        try:
            sys.stdout.buffer.write(data)
        except OSError as error:
            self._lose("stdout", error)
        self.flush()

    def note(self, text: str) -> None:
        """Put a remark on stderr, unless the run is quiet."""
        if not self.quiet:
            self.complain(printable(text))

    def complain(self, text: str) -> None:
        """Put a text on stderr, however quiet the run is."""
        self._write("stderr", text)

    def _write(self, name: str, text: str) -> None:
        self.clear()
        self._put(name, text)

    def _put(self, name: str, text: str, end: str = "\n") -> None:
        text += end
        stream: TextIO | None = getattr(sys, name)
        if stream is None or name in self.lost:
            self.lost.setdefault(name, OSError("it is closed"))
            return
        try:
            try:
                click.echo(text, file=stream, nl=False, color=colour_of(os.environ))
            except UnicodeEncodeError:  # the name of a file, in an encoding that does not have it
                click.echo(text.encode(stream.encoding or "ascii", "backslashreplace"), file=stream, nl=False)
        except OSError as error:
            self._lose(name, error)

    def flush(self) -> None:
        """Hand over what other code has written to the streams, such as a help text."""
        for name in ("stdout", "stderr"):
            stream: TextIO | None = getattr(sys, name)
            try:
                if stream is not None:
                    stream.flush()
            except OSError as error:
                self._lose(name, error)

    def _lose(self, name: str, error: OSError) -> None:
        self.lost.setdefault(name, error)
        with contextlib.suppress(OSError, ValueError):  # what is still in the buffer goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), getattr(sys, name).fileno())


def output(ctx: click.Context) -> Output:
    """The Output of this run."""
    return ctx.find_root().ensure_object(Output)


def open_standard_streams() -> None:
    """Open closed standard descriptors on the null device, and let names of any bytes pass through stdout.

    Without this the next file to be opened, a picture perhaps, would be what libraries take for stderr.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, this one
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")


def printable(text: str) -> str:
    """A text in one line, without anything that a terminal would obey."""
    words = " ".join(text.split())
    return words if words.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the last one unpadded."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)
