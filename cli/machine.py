"""What must hold before torch is loaded: without it native libraries end the process in ways of their own."""

import os

from pfode.errors import MemoryLimitError, WriteError

__all__ = ["LEAST_MEMORY", "check_machine", "memory_limit"]

LEAST_MEMORY = 800_000_000  # bytes of address space that torch's CPU build takes before it computes anything


def check_machine() -> None:
    """Find out whether torch can be loaded here.

    Raises:
        WriteError: the working folder was deleted. MemoryLimitError: too little address space.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise WriteError("the working folder was deleted", "cd into a folder that is there") from error
    limit = memory_limit()
    if limit is not None and limit < LEAST_MEMORY:
        problem = (
            f"the process may take {limit // 1_000_000} MB of address space, torch takes {LEAST_MEMORY // 1_000_000}"
        )
        raise MemoryLimitError(problem, "a larger `ulimit -v`")


def memory_limit() -> int | None:
    """The bytes of address space that the process may take; None without a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit
