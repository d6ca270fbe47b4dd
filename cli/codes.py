"""Exit codes: the one statement of what each means. The errors of `pfode.errors` carry those from 2 to 7."""

__all__ = [
    "CODES", "FILE", "INTERNAL", "INTERRUPTED", "MEMORY", "MISSING", "NUMERICAL", "READER_GONE", "TERMINATED", "USAGE",
    "WRITE", "describe_codes",
]  # fmt: skip

INTERNAL, USAGE, FILE, MISSING, NUMERICAL, MEMORY, WRITE = range(1, 8)
INTERRUPTED, READER_GONE, TERMINATED = 130, 141, 143
CODES = {  # the kind of error that --json gives, and what it means
    0: ("", "done"),
    INTERNAL: ("internal", "a bug: please report it with the log that is named"),
    USAGE: ("usage", "wrong use"),
    FILE: ("file", "bad input file, configuration or data"),
    MISSING: ("missing", "missing package or device"),
    NUMERICAL: ("numerical", "numerical failure"),
    MEMORY: ("memory", "out of memory, or of open files"),
    WRITE: ("write", "a file, stdout or stderr could not be written; what was drawn stays"),
    INTERRUPTED: ("interrupted", "interrupted by Ctrl-C"),
    READER_GONE: ("pipe", "the reader of the output went away"),
    TERMINATED: ("terminated", "terminated by a signal"),
}


def describe_codes() -> str:
    """The codes as the end of a help text shows them."""
    return "\n".join(f"  {code:<4} {meaning}" for code, (_, meaning) in CODES.items())
