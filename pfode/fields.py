"""The fields of untrusted JSON objects: what each may be."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pfode.errors import UsageError, did_you_mean

__all__ = ["FLAG", "REQUIRED", "Field", "checked", "either", "real", "several", "shown", "whole", "word"]

REQUIRED = object()


@dataclass(frozen=True)
class Field:
    """One field: what it may be, in words and as a test, and its value where it is left out."""

    expected: str
    sound: Callable[[Any], bool]
    default: Any = REQUIRED

    def otherwise(self, default: Any) -> "Field":
        """The same field with a default."""
        return replace(self, default=default)

    @property
    def or_none(self) -> "Field":
        """The same field, or null, which is also its default."""
        return Field(f"{self.expected}, or null", lambda value: value is None or self.sound(value), None)


def whole(low: int, high: int) -> Field:
    return Field(f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def real(low: float, high: float) -> Field:
    def sound(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and low <= value <= high

    return Field(f"a number from {low:g} to {high:g}", sound)


FLAG = Field("true or false", lambda value: type(value) is bool)


def word(*known: str) -> Field:
    return Field(f"one of {', '.join(known)}", lambda value: type(value) is str and value in known)


def several(item: Field, least: int, most: int) -> Field:
    def sound(value: Any) -> bool:
        return isinstance(value, list | tuple) and least <= len(value) <= most and all(map(item.sound, value))

    return Field(f"{least} to {most} values, each {item.expected}", sound)


def either(*fields: Field) -> Field:
    expected = " or ".join(field.expected for field in fields)
    return Field(expected, lambda value: any(field.sound(value) for field in fields))


def checked(where: str, values: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """The values with defaults for what is left out.

    Raises:
        UsageError: an unknown field, a missing one, or a value that it may not have; the message names the field.
    """
    for key in values:
        if key not in fields:
            raise UsageError(f"{where}: unknown field {shown(key)}", did_you_mean(str(key)[:60], fields))
    found = {}
    for key, field in fields.items():
        value = values.get(key, field.default)
        if value is REQUIRED:
            raise UsageError(f"{where}: no {key!r}", f"expected {field.expected}")
        if key in values and not field.sound(value):
            raise UsageError(f"{where}: {key}: expected {field.expected}, got {shown(value)}")
        found[key] = value
    return found


def shown(value: Any, length: int = 60) -> str:
    """A value of a file for a message: one line of at most that many characters.

    Only the beginning of it is looked at: a value that is shared a few dozen times within itself can be larger than any
    memory once it is written out.
    """
    text = _brief(value, length, 3)
    return text if len(text) <= length else text[: length - 3] + "..."


def _brief(value: Any, length: int, depth: int) -> str:
    if value is None or type(value) in (bool, float):
        return repr(value)
    if type(value) is int:
        return repr(value) if value.bit_length() <= 400 else f"an integer of {value.bit_length():,} bits"
    if type(value) in (str, bytes):
        return repr(value[: length + 1])
    brackets = {list: "[]", tuple: "()", dict: "{}", set: "{}"}.get(type(value))
    if brackets is None or not depth:
        return f"a {type(value).__name__}"
    parts, used = [], 0
    for item in value:
        part = _brief(item, length, depth - 1)
        part += f": {_brief(value[item], length, depth - 1)}" if type(value) is dict else ""
        parts.append(part)
        used += len(part) + 2
        if used > length:
            break
    inside = ", ".join(parts) + ("," if type(value) is tuple and len(value) == 1 else "")
    return brackets[0] + inside + brackets[1]
