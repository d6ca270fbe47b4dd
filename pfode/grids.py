"""Time grids: where the nodes of a plan lie.

A `Grid` places n + 1 points between two times of a process. `times` adds the ends: with final = "denoise" the last node
is clean data (sigma = 0, never evaluated), with final = "stop" it is t_min. A tensor is used exactly as given.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pfode.errors import UsageError, integer, number, unknown
from pfode.process import Process

MAX_STEPS = 100_000
ROUNDING = 1e-6  # a time beyond an end by less, relatively, is float32's rounding: it is put on the end
_RATIO_OF_PURE_NOISE = 80.0  # sigma/alpha (EDM's sigma_max) that stands for alpha = 0 where a finite log-SNR is needed


@dataclass(frozen=True)
class Grid:
    """A rule `place(process, high, low, n)` -> n + 1 falling times from high to low.

    `to_data`: the rule is finite at clean data, so with final = "denoise" it runs on to it instead of to t_min.
    """

    name: str
    place: Callable[[Process, float, float, int], Tensor]
    to_data: bool = False


def karras(rho: float = 7.0) -> Grid:
    """(sigma/alpha)^(1/rho) is uniform (Karras et al. 2022, eq. 5)."""
    rho = number("karras: rho", rho, 1e-3, 1e3)

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        ends = torch.exp(-0.5 * _log_snr_ends(process, high, low))
        return process.time(-2 * rho * torch.log(_line(ends ** (1 / rho), n)))

    return Grid("karras" if rho == 7 else f"karras({rho:g})", place)


def log_snr() -> Grid:
    """The log-SNR is uniform (DPM-Solver)."""

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        return process.time(_line(_log_snr_ends(process, high, low), n))

    return Grid("log-snr", place)


def time(power: float = 1.0) -> Grid:
    """The time of the process (before its shift, if it has one) is u^power with u uniform."""
    power = number("time: power", power, 1e-3, 1e3)

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        first = process.t_data if math.isfinite(process.t_data) else process.t_min
        ends = process.uniform_clock(torch.tensor([high, low], dtype=torch.float64)) - first
        return process.from_uniform_clock(first + _line(ends ** (1 / power), n) ** power)

    return Grid({1.0: "time", 2.0: "time-quadratic"}.get(power, f"time({power:g})"), place, to_data=True)


GRIDS: dict[str, Callable[[], Grid]] = {
    "karras": karras,
    "log-snr": log_snr,
    "time": time,
    "time-quadratic": lambda: time(2.0),
}


def grid(name: str) -> Grid:
    """Look a grid up by name.

    Raises:
        UsageError: unknown name.
    """
    if name not in GRIDS:
        raise unknown("grid", name, GRIDS)
    return GRIDS[name]()


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
        rule: a name, a `Grid`, or the times themselves (then the other arguments but `process` are not used).
        final: "denoise" ends at clean data, "stop" at t_min.
        start, stop: times of the process to begin and end at instead; `stop` overrides `final`.

    Raises:
        UsageError: unknown name, steps < 1, times that do not fall or leave the range of the process.
    """
    if isinstance(rule, str | Grid):
        nodes = _placed(process, grid(rule) if isinstance(rule, str) else rule, steps, final, start, stop)
    else:
        try:
            nodes = torch.as_tensor(rule, dtype=torch.float64).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            what = "a name, a grid or times"
            raise UsageError(f"grid: need {what}, got {rule!r:.60}", 'grid="karras" or grid=grids.karras()') from error
        if nodes.ndim != 1 or len(nodes) < 2:
            raise UsageError(f"grid: need a list of at least two times, got shape {tuple(nodes.shape)}")
    return _checked(process, nodes.tolist())


def _placed(process: Process, rule: Grid, steps: int, final: str, start: float | None, stop: float | None) -> Tensor:
    steps = integer("steps", steps, 1, MAX_STEPS)
    if final not in ("denoise", "stop"):
        raise unknown("final", final, ("denoise", "stop"))
    high = process.t_max if start is None else number("start", start)
    if stop is not None and stop != process.t_data:
        return _line_of(rule, process, high, number("stop", stop), steps)
    if stop is None and final == "stop":
        return _line_of(rule, process, high, process.t_min, steps)
    if rule.to_data and math.isfinite(process.t_data):
        nodes = _line_of(rule, process, high, process.t_data, steps)
        if nodes[-2] >= process.t_min:
            return nodes
    data = torch.tensor([process.t_data], dtype=torch.float64)
    if steps == 1:
        return torch.cat([torch.tensor([high], dtype=torch.float64), data])
    return torch.cat([_line_of(rule, process, high, process.t_min, steps - 1), data])


def _line_of(rule: Grid, process: Process, high: float, low: float, n: int) -> Tensor:
    """The rule's points with both ends exact."""
    if not process.t_data <= low < high <= process.t_max:
        limits = f"{low:g} to {high:g} does not fall within {process.t_data:g} to {process.t_max:g}"
        raise UsageError(f"grid: the range {limits}", "start must lie above stop, both within the process's times")
    nodes = rule.place(process, high, low, n)
    nodes[0], nodes[-1] = high, low
    return nodes


def _checked(process: Process, nodes: list[float]) -> list[float]:
    for i, (a, b) in enumerate(itertools.pairwise(nodes)):
        if not a > b:
            raise UsageError(f"grid: times must fall strictly, got {a:g} then {b:g} at position {i}", "sort them")
    inner = nodes[:-1] if nodes[-1] == process.t_data else nodes
    for i, value in enumerate(inner):
        nodes[i] = min(max(value, process.t_min), process.t_max)
        if abs(nodes[i] - value) > ROUNDING * abs(value):
            raise UsageError(
                f"grid: time {value:g} lies outside [{process.t_min:g}, {process.t_max:g}] of {process}",
                f"only the last time may be that of clean data, {process.t_data:g}",
            )
    return nodes


def _line(ends: Tensor, n: int) -> Tensor:
    """n + 1 equidistant numbers from the first end to the last."""
    return torch.linspace(ends[0].item(), ends[1].item(), n + 1, dtype=torch.float64)


def _log_snr_ends(process: Process, high: float, low: float) -> Tensor:
    """log-SNR at both ends, clipped where it is not finite."""
    ends = process.log_snr(torch.tensor([high, low], dtype=torch.float64))
    return ends.clamp_min(-2 * math.log(_RATIO_OF_PURE_NOISE)) if torch.isinf(ends[0]) else ends
