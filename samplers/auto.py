"""sampler="auto": the recipe and grid to take for a process and a number of calls, read off a measured table.

The table is benchmarks/recipes.json, part of which is in benchmarks/README.md: distance from the converged pictures by
recipe, grid and number of calls on the digits networks (two of them guided, too), on emoji-small with its own process,
and on exact mixtures. The choices for guided flows, and what emoji-small says as VP and flow process, are from runs of
benchmarks/recipes.py whose figures the file does not hold. Where the best differ between networks, a choice loses
little on them, by the geometric mean over its range of calls; the mixtures decide between what serves them alike.
benchmarks/quality.py measures it on others.
"""

from typing import NamedTuple

from pfode.process import Flow, Process

__all__ = [
    "Choice",
    "choose",
    "family",
]


class Choice(NamedTuple):
    """A recipe, a grid and the recipe's chart."""

    sampler: str
    grid: str
    chart: str


MANY = 10**9
TABLE: dict[tuple[str, bool], tuple[tuple[int, Choice], ...]] = {  # (family, guided): (most calls, choice), ...
    ("alpha = 1", False): (
        (3, Choice("unipc2", "ays-svd", "dpm3")),
        (10, Choice("ipndm3", "ays-svd", "ddim")),
        (15, Choice("unipc2", "ays-svd", "flow")),
        (MANY, Choice("unipc3", "ays-svd", "flow")),
    ),
    ("alpha = 1", True): ((MANY, Choice("ipndm2", "ays-svd", "trig")),),
    ("VP", False): (
        (8, Choice("unipc2", "time-quadratic", "dpm++")),
        (15, Choice("unipc2", "ays-svd", "flow")),
        (MANY, Choice("unipc2", "time-quadratic", "flow")),
    ),
    ("VP", True): (
        (5, Choice("dpm++2m", "time(1.5)", "dpm++")),
        (MANY, Choice("ipndm2", "time-quadratic", "ddim")),
    ),
    ("Flow", False): (
        (4, Choice("unipc2", "time", "flow")),
        (12, Choice("unipc2", "ays-svd", "flow")),
        (MANY, Choice("unipc3", "beta", "flow")),
    ),
    ("Flow", True): ((MANY, Choice("unipc2", "cosine(0.7)", "flow")),),
}


def family(process: Process) -> str:
    """By which the table goes, and the grids that are worth trying."""
    return "alpha = 1" if process.alpha(process.t_max) == 1 else "Flow" if isinstance(process, Flow) else "VP"


def choose(process: Process, nfe: int, guided: bool = False) -> Choice:
    """What to take for a process, a number of denoiser calls, and with or without guidance."""
    return next(choice for most, choice in TABLE[family(process), guided] if nfe <= most)
