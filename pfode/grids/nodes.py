"""The nodes of a plan: a rule's points between the ends of a process, or times that were given."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pfode.errors import UsageError, integer, number, unknown
from pfode.grids.rule import Grid, grid
from pfode.process import Process, float64

__all__ = ["MAX_STEPS", "ROUNDING", "end_time", "rising", "times"]

MAX_STEPS = 100_000
ROUNDING = 1e-6  # a time beyond an end by less, relatively, is float32's rounding: it is put on the end


def times(
    process: Process,
    rule: str | Grid | Tensor | Sequence[float],
    steps: int,
    final: str = "denoise",
    start: float | None = None,
    stop: float | None = None,
) -> list[float]:
    """The steps + 1 falling node times of a plan.

    Args:
        rule: a name, a `Grid`, or the times themselves (then the other arguments but `process` are not used), which may
            as well rise.
        final: "denoise" ends at clean data, "stop" at t_min.
        start, stop: times of the process to begin and end at instead; `stop` overrides `final`.

    Raises:
        UsageError: unknown name, steps < 1, times that are not monotone or leave the range of the process.
    """
    if isinstance(rule, str | Grid):
        return _checked(process, _placed(process, rule, steps, final, start, stop).tolist())
    return _checked(process, _given(rule))


def rising(
    process: Process,
    rule: str | Grid | Tensor | Sequence[float],
    steps: int,
    start: float | None = None,
    stop: float | None = None,
) -> list[float]:
    """The steps + 1 rising node times of an encoding, from data to noise: those of the falling grid in reverse.

    Args:
        rule: as for `times`; given times that fall are reversed.
        start: where to begin instead of t_min. stop: where to end instead of the top of the grid.

    Raises:
        UsageError: as `times`; given times that hold the time of clean data, where nothing can be evaluated.
    """
    if isinstance(rule, str | Grid):
        return _checked(process, _placed(process, rule, steps, "stop", stop, start).flip(0).tolist())
    nodes = _given(rule)
    return _checked(process, nodes if nodes[0] < nodes[-1] else nodes[::-1])


def _given(rule: Tensor | Sequence[float]) -> list[float]:
    try:
        nodes = float64(rule).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        what = "a name, a grid or times"
        raise UsageError(f"grid: need {what}, got {rule!r:.60}", 'grid="karras" or grid=grids.karras()') from error
    if nodes.ndim != 1 or len(nodes) < 2:
        raise UsageError(f"grid: need a list of at least two times, got shape {tuple(nodes.shape)}")
    return nodes.tolist()


def _placed(
    process: Process, named: str | Grid, steps: int, final: str, start: float | None, stop: float | None
) -> Tensor:
    rule = grid(named) if isinstance(named, str) else named
    steps = integer("steps", steps, 1, MAX_STEPS)
    if final not in ("denoise", "stop"):
        raise unknown("final", final, ("denoise", "stop"))
    high = None if start is None else number("start", start)
    stop = end_time(process, stop)
    if stop is not None and stop != process.t_data:
        return _line_of(rule, process, high, stop, steps)
    if stop is None and final == "stop":
        return _line_of(rule, process, high, process.t_min, steps)
    if rule.to_data and math.isfinite(process.t_data):
        nodes = _line_of(rule, process, high, process.t_data, steps)
        if nodes[-2] >= process.t_min:
            return nodes
    data = float64([process.t_data])
    if steps == 1:
        return torch.cat([float64([process.t_max if high is None else high]), data])
    return torch.cat([_line_of(rule, process, high, process.t_min, steps - 1), data])


def end_time(process: Process, stop: Any) -> float | None:
    """A time to end at: a number, or that of clean data, which may be infinite; None stays None.

    Raises:
        UsageError: no such time.
    """
    if stop is None or (isinstance(stop, float) and stop == process.t_data):
        return stop
    return number("stop", stop)


def _line_of(rule: Grid, process: Process, start: float | None, low: float, n: int) -> Tensor:
    """The rule's points with both ends exact, but for the first of a late rule that was given no start."""
    high = process.t_max if start is None else start
    if not process.t_data <= low < high <= process.t_max:
        limits = f"{low:g} to {high:g} does not fall within {process.t_data:g} to {process.t_max:g}"
        raise UsageError(f"grid: the range {limits}", "start must lie above stop, both within the process's times")
    nodes = rule.place(process, high, low, n)
    if start is not None or not rule.late:
        nodes[0] = high
    nodes[-1] = low
    return nodes


def _checked(process: Process, nodes: list[float]) -> list[float]:
    falls = not nodes[0] < nodes[-1]
    for i, (a, b) in enumerate(itertools.pairwise(nodes)):
        if not (a > b if falls else a < b):
            way = "fall" if falls else "rise"
            raise UsageError(f"grid: times must {way} strictly, got {a:g} then {b:g} at position {i}", "sort them")
    inner = nodes[:-1] if falls and nodes[-1] == process.t_data else nodes
    for i, value in enumerate(inner):
        nodes[i] = min(max(value, process.t_min), process.t_max)
        if abs(nodes[i] - value) > ROUNDING * abs(value):
            raise UsageError(
                f"grid: time {value:g} lies outside [{process.t_min:g}, {process.t_max:g}] of {process}",
                f"only the last time of a falling grid may be that of clean data, {process.t_data:g}",
            )
    return nodes
