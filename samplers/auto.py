"""sampler="auto": the recipe and grid to take for a process and a number of calls, read off a measured table."""

from typing import NamedTuple

from pfode.process import Flow, Process


class Choice(NamedTuple):
    """A recipe, a grid and the recipe's chart."""

    sampler: str
    grid: str
    chart: str


def choose(process: Process, nfe: int, guided: bool = False) -> Choice:
    if process.alpha(process.t_max) == 1:
        return Choice("ipndm2", "cosine(0.5)", "trig")
    return (
        Choice("unipc2", "cosine(0.5)", "flow")
        if isinstance(process, Flow)
        else Choice("ipndm2", "time-quadratic", "ddim")
    )
