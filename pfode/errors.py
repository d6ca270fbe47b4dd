"""The errors pfode raises on purpose: each says the cause, the value and what to write instead.

Every class carries the exit code of the command line, so that `pfode` needs no table of its own.
"""

import difflib
import math
import operator
import re
from collections.abc import Iterable
from typing import Any

__all__ = [
    "DenoiserError",
    "FileError",
    "MemoryLimitError",
    "MissingError",
    "NumericalError",
    "OtherModelWarning",
    "PfodeError",
    "PfodeWarning",
    "UnseenLabelWarning",
    "UnsoundWarning",
    "UsageError",
    "WriteError",
    "did_you_mean",
    "integer",
    "nearly",
    "number",
    "shortened",
    "unknown",
]


class PfodeError(Exception):
    """Base of every error that is the caller's or the world's fault, never a bug.

    Args:
        message: what is wrong, with the value found.
        hint: what to write or do instead; shown on a second line.
    """

    code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class UsageError(PfodeError, ValueError):
    """A call or an option that cannot be carried out as written."""

    code = 2


class DenoiserError(UsageError):
    """A network or a function of the caller's own that raised an error."""

    @classmethod
    def of(cls, error: Exception, name: str = "the denoiser") -> "DenoiserError":
        """The error for one that was raised inside of it."""
        return cls(f"{name} raised {type(error).__name__}: {error}", "--debug shows where it was raised")


class FileError(PfodeError, ValueError):
    """An input file that is missing, damaged or of another kind."""

    code = 3


class MissingError(PfodeError, RuntimeError):
    """A package, a device or a data set that is not there."""

    code = 4


class NumericalError(PfodeError, ArithmeticError):
    """A result that is not finite, or a tolerance that cannot be met."""

    code = 5


class MemoryLimitError(PfodeError, RuntimeError):
    """Out of memory at the smallest batch."""

    code = 6


class WriteError(PfodeError, OSError):
    """A file that could not be written; what stood there before is kept."""

    code = 7


class PfodeWarning(UserWarning):
    """Base of every warning: a result that may not be what was meant."""


class OtherModelWarning(PfodeWarning):
    """A plan is run with another model than the one it was fitted to."""


class UnsoundWarning(PfodeWarning):
    """A plan whose steps are too long for it: its errors grow from step to step."""


class UnseenLabelWarning(PfodeWarning):
    """A class, or the absence of one, that the network never saw in training."""


NEAR = 0.65  # how alike two names are, of 1, that one is suggested for the other
ENOUGH = 4  # characters of the beginning of a name that stand for it
FEW = 10  # names that are listed where none is near


def nearly(name: object, known: Iterable[str]) -> str:
    """The question after the one to three known names that are nearly the given one; empty where none is."""
    given = _plain(str(name)[:100])
    like = {one: difflib.SequenceMatcher(None, given, _plain(one)).ratio() for one in known}
    begun = (one for one in like if len(given) >= ENOUGH and _plain(one).startswith(given))
    like |= {one: max(like[one], NEAR) for one in begun}
    best = max(like.values(), default=0.0)
    near = sorted((one for one in like if like[one] >= max(NEAR, best - 0.12)), key=lambda one: (-like[one], one))
    return "did you mean " + " or ".join(repr(one) for one in near[:3]) + "?" if near else ""


def _plain(name: str) -> str:
    """A name without what people write in different ways: case, spaces, underscores, `pp` for `++`."""
    return re.sub(r"[\s_-]+", "", name.lower()).replace("pp", "++")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A hint for an unknown name: those that are nearly the same, else the known ones, the first few of many."""
    names = sorted(known)
    rest = f" and {len(names) - FEW} more" if len(names) > FEW + 1 else ""
    return nearly(name, names) or "known: " + ", ".join(names[: FEW if rest else None]) + rest


def unknown(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """The error for a name that is not in a table."""
    return UsageError(f"unknown {kind} {shortened(name)}", did_you_mean(name, known))


def shortened(value: object) -> str:
    """The value as a message may show it: at most about 60 characters of its `repr`."""
    if isinstance(value, str | bytes):
        value = value[:60]
    elif isinstance(value, int) and value.bit_length() > 400:  # Python refuses to write very long ones
        return f"a number of about {int(value.bit_length() * 0.30103):,} digits"
    return f"{value!r:.60}"


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int within [low, high].

    Raises:
        UsageError: no integer, or out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < low or (high is not None and number > high):
        limit = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name}: need an integer {limit}, got {shortened(value)}", f"{name}={max(low, 1)}")
    return number


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a float within [low, high].

    Raises:
        UsageError: no number, not finite, or out of range.
    """
    try:
        real = math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        real = math.nan
    if not math.isfinite(real) or not low <= real <= high:
        limits = [f"{word} {end:g}" for word, end in (("at least", low), ("at most", high)) if math.isfinite(end)]
        raise UsageError(
            f"{name}: need a number{' of ' if limits else ''}{' and '.join(limits)}, got {shortened(value)}"
        )
    return real
