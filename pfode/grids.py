"""Time grids: where the nodes of a plan lie.

A `Grid` places n + 1 points between two times of a process. `times` adds the ends, for every rule alike: with
final = "denoise" the last node is clean data (sigma = 0, never evaluated), with final = "stop" it is t_min. `rising`
gives the grid of an encoding, from t_min up. A tensor is used exactly as given. Names carry parameters: "karras(5)".
"""

import functools
import inspect
import itertools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfode.beta import beta_quantile
from pfode.errors import UsageError, integer, number, unknown
from pfode.optional import optional_module
from pfode.process import Process, VPDiscrete, float64

__all__ = [
    "GRIDS",
    "MAX_STEPS",
    "ROUNDING",
    "Grid",
    "ays",
    "beta",
    "beta_sigma",
    "cosine",
    "dm_nonuniform",
    "dm_objective",
    "end_time",
    "flow_shift",
    "grid",
    "karras",
    "leading",
    "linspace",
    "log_snr",
    "polyexponential",
    "rising",
    "shifted",
    "time",
    "times",
    "trailing",
]

MAX_STEPS = 100_000
ROUNDING = 1e-6  # a time beyond an end by less, relatively, is float32's rounding: it is put on the end
_RATIO_OF_PURE_NOISE = 80.0  # sigma/alpha (EDM's sigma_max) that stands for alpha = 0 where a finite log-SNR is needed
_INDICES = 1000  # training steps that a continuous process is given where a rule works on their indices


@dataclass(frozen=True)
class Grid:
    """A rule `place(process, high, low, n)` -> n + 1 falling times from high to low.

    `to_data`: the rule is finite at clean data, so with final = "denoise" it runs on to it instead of to t_min.
    `late`: its first point may lie below t_max, unless the caller names a start.
    """

    name: str
    place: Callable[[Process, float, float, int], Tensor]
    to_data: bool = False
    late: bool = False


def karras(rho: float = 7.0) -> Grid:
    """(sigma/alpha)^(1/rho) is uniform (Karras et al. 2022, eq. 5)."""
    rho = number("karras: rho", rho, 1e-3, 1e3)

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        ends = torch.exp(-0.5 * _log_snr_ends(process, high, low))
        return process.time(-2 * rho * torch.log(_line(ends ** (1 / rho), n)))

    return Grid(_name("karras", [rho], [7.0]), place)


def polyexponential(rho: float = 1.0) -> Grid:
    """log(sigma/alpha) falls as u^rho with u uniform from 1 to 0 (k-diffusion); rho = 1 is `log-snr`."""
    rho = number("polyexponential: rho", rho, 1e-2, 1e2)

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        first, last = _log_snr_ends(process, high, low).tolist()
        return process.time(last + (first - last) * _falling(n) ** rho)

    return Grid(_name("polyexponential", [rho], [1.0]), place)


def log_snr() -> Grid:
    """The log-SNR is uniform (DPM-Solver); `exponential` in k-diffusion and diffusers."""

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        return process.time(_line(_log_snr_ends(process, high, low), n))

    return Grid("log-snr", place)


def cosine(std: float = 1.0) -> Grid:
    """arctan(sigma / (alpha std)) is uniform: the log-SNRs of the cosine schedule (Nichol & Dhariwal 2021).

    The optimal grid of Euler steps for Gaussian data of that standard deviation (Sabour et al. 2024, theorem 3.1).
    """
    std = number("cosine: std", std, 1e-3, 1e3)

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        ratios = torch.exp(-0.5 * process.log_snr(float64([high, low])))
        return process.time(-2 * torch.log(std * torch.tan(_line(torch.atan(ratios / std), n))))

    return Grid(_name("cosine", [std], [1.0]), place)


def time(power: float = 1.0) -> Grid:
    """The time of the process (before its shift, if it has one) is u^power with u uniform.

    time(7) is what diffusers' use_karras_sigmas lays on flows.
    """
    power = number("time: power", power, 1e-3, 1e3)

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        first = process.t_data if math.isfinite(process.t_data) else process.t_min
        ends = _clock(process, high, low) - first
        return process.from_uniform_clock(first + _line(ends ** (1 / power), n) ** power)

    return Grid({1.0: "time", 2.0: "time-quadratic"}.get(power, _name("time", [power])), place, to_data=True)


def beta(a: float = 0.6, b: float = 0.6) -> Grid:
    """The time (before the shift) at equal quantiles of Beta(a, b): dense at both ends (Lee et al. 2024).

    diffusers' use_beta_sigmas on its flow schedulers.
    """
    quantiles = _beta_quantiles("beta", a, b)

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        first, last = _clock(process, high, low).tolist()
        return process.from_uniform_clock(last + (first - last) * quantiles(n))

    return Grid(_name("beta", [a, b], [0.6, 0.6]), place)


def beta_sigma(a: float = 0.6, b: float = 0.6) -> Grid:
    """sigma/alpha at equal quantiles of Beta(a, b): diffusers' use_beta_sigmas on its VP schedulers."""
    quantiles = _beta_quantiles("beta-sigma", a, b)

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        first, last = torch.exp(-0.5 * _log_snr_ends(process, high, low)).tolist()
        return process.time(-2 * torch.log(last + (first - last) * quantiles(n)))

    return Grid(_name("beta-sigma", [a, b], [0.6, 0.6]), place)


def trailing() -> Grid:
    """Indices of the training steps, evenly spaced and rounded, from the last one down (Lin et al. 2024, table 2).

    As `timestep_spacing` of diffusers. This rule, `leading` and `linspace` take the time of a `VPDiscrete` as the index
    and give any other process 1000 of them, even in its time before the shift, the last at t_max.

    Raises:
        UsageError: when placed, more steps than indices.
    """

    def lay(first: int, last: int, n: int) -> np.ndarray:
        return np.rint(np.arange(first + 1, last + 1, -(first - last) / n))[:n] - 1  # arange may add one by rounding

    return _index_grid("trailing", lay)


def leading(offset: int = 0, drop: int = 0) -> Grid:
    """Multiples of a whole number of indices, plus an offset (Lin et al. 2024, table 2); see `trailing`.

    The first node lies below t_max, which costs quality. drop = 0 spaces as DDIM, DDPM and Euler of diffusers do,
    drop = 1, one place more of which the lowest is left out, as DPM-Solver, UniPC and DEIS do.
    """
    offset, drop = integer("leading: offset", offset, 0, 1000), integer("leading: drop", drop, 0, 1)

    def lay(first: int, last: int, n: int) -> np.ndarray:
        stride = (first - last) // (n + drop)
        return last + 1 + offset + stride * (np.arange(n)[::-1] + float(drop))

    return _index_grid(_name("leading", [offset, drop], [0, 0]), lay, late=True, drop=drop)


def linspace(drop: int = 0) -> Grid:
    """Indices evenly spaced from the last to the first one, rounded (Lin et al. 2024, table 2).

    See `trailing`; drop as in `leading`.
    """
    drop = integer("linspace: drop", drop, 0, 1)

    def lay(first: int, last: int, n: int) -> np.ndarray:
        return np.rint(np.linspace(last + 1, first, n + drop))[::-1][:n]

    return _index_grid(_name("linspace", [drop], [0]), lay)


# Sabour et al. 2024, table 3: sigma/alpha of ten steps, the last entry (0 in diffusers' AysSchedules) standing for data
_AYS = {
    "ays-sd": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays-sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays-svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def ays(name: str) -> Grid:
    """Align Your Steps: the published table of a model, log-linear in sigma/alpha between its entries.

    Where the range of the process differs from the table's, the table is cut, or continued by its outermost slopes.
    """
    logs = np.log(_AYS[name])
    far = 100  # intervals by which the table is continued
    logs = np.array([logs[0] + far * (logs[0] - logs[1]), *logs, logs[-1] + far * (logs[-1] - logs[-2])])
    knots = np.array([-far, *range(len(_AYS[name])), len(_AYS[name]) - 1 + far], dtype=np.float64)

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        ends = -0.5 * _log_snr_ends(process, high, low).numpy()
        first, last = np.interp(-ends, -logs, knots)
        first = first if abs(first) > 1e-4 else 0.0  # the table has five digits
        last = last if np.isfinite(ends[1]) else max(knots[-2], first + 1)
        return process.time(-2 * torch.from_numpy(np.interp(np.linspace(first, last, n + 1), knots, logs)))

    return Grid(name, place, to_data=True)


def shifted(rule: str | Grid = "time", shift: float = 3.0) -> Grid:
    """A rule whose sigma/alpha are multiplied by `shift`, its ends kept: t' = shift t / (1 + (shift - 1) t) in flows.

    Esser et al. 2024, eq. 23; for the shift of a resolution see `flow_shift`. It multiplies that of `Flow(shift=)`.
    Rules even in a power or the logarithm of sigma/alpha are unchanged by it.
    """
    inner = grid(rule) if isinstance(rule, str) else rule
    if not isinstance(inner, Grid):
        raise UsageError(f"shifted: need a grid first, got {rule!r:.60}", '"shifted(time,3)"')
    shift = number("shifted: shift", shift, 1e-3, 1e3)

    def move(process: Process, t: Tensor, by: float) -> Tensor:
        return process.time(process.log_snr(t) - 2 * math.log(by))

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        first, last = move(process, float64([high, low]), 1 / shift).tolist()
        return move(process, inner.place(process, first, last, n), shift)

    return Grid(_name("shifted", [inner.name, shift]), place, inner.to_data, inner.late)


def flow_shift(
    seq_len: int,
    kind: str = "exponential",
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
) -> float:
    """The `shift` of a resolution, as Flux and SD3 have it: mu is linear in the length of the image's sequence.

    Args:
        seq_len: number of the image's tokens.
        kind: "exponential", shift = e^mu, or "linear", shift = mu (diffusers' time_shift_type).
        base_shift, max_shift: mu at base_seq_len and max_seq_len; the line goes on beyond them.

    Raises:
        UsageError: an unknown kind, or no positive shift.
    """
    if kind not in ("exponential", "linear"):
        raise unknown("time shift", kind, ("exponential", "linear"))
    short = integer("flow_shift: base_seq_len", base_seq_len, 1, 2**31)
    longer = integer("flow_shift: max_seq_len", max_seq_len, short + 1, 2**32)
    low, high = (number("flow_shift: shift", shift, -100, 100) for shift in (base_shift, max_shift))
    mu = low + (high - low) / (longer - short) * (integer("flow_shift: seq_len", seq_len, 1, 2**31) - short)
    if abs(mu) > 100:
        raise UsageError(f"flow_shift: mu = {mu:g} at {seq_len} tokens is no shift", "a shorter sequence")
    if kind == "linear" and mu <= 0:
        raise UsageError(f"flow_shift: mu = {mu:g} at {seq_len} tokens is no shift", 'kind="exponential"')
    return math.exp(mu) if kind == "exponential" else mu


_OPTIMISED = 20  # most intervals whose nodes DM-NonUniform optimises


def dm_nonuniform(power: float = 1.0) -> Grid:
    """Nodes that minimise a bound on the error of exponential Adams in the log-SNR (Xue et al. 2024, DM-NonUniform).

    From uniform log-SNR where power < 2 (the paper's choice for pixels: 1), else from uniform time (latents: 2). Beyond
    20 intervals the optimum of 20 is interpolated. Takes a second or so, once per range and number of steps. Made for
    orders that fall at the end (lower_order_final).
    """
    power = number("dm-nonuniform: power", power, 0.0, 4.0)
    start = log_snr() if power < 2 else time()

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        few = min(n, _OPTIMISED)
        first, last = (0.5 * _log_snr_ends(process, high, low)).tolist()
        begin = [first, *(0.5 * process.log_snr(start.place(process, high, low, few)[1:-1])).tolist(), last]
        if not all(a < b for a, b in itertools.pairwise(begin)):  # beyond the first end, where alpha = 0
            begin = np.linspace(first, last, few + 1).tolist()
        best = _optimised(tuple(begin), power)
        between = np.interp(np.linspace(0, few, n + 1), np.arange(few + 1), best)
        return process.time(2 * torch.from_numpy(between))

    return Grid(_name("dm-nonuniform", [power], [1.0]), place)


def dm_objective(lambdas: Tensor, power: float = 1.0) -> Tensor:
    """The bound that `dm-nonuniform` minimises: F = sum_n e_n |sum_k J_kn| (Xue et al. 2024, with its code's rules).

    J_kn is the weight of exponential Adams for node n in step k, of orders 1, 2, 3, 3, ..., 3, 2, 1; e_n =
    sigma_n^power / alpha_n, at alpha^2 + sigma^2 = 1, how wrong the network is there. Weights of opposite sign cancel;
    as that misleads with few steps, up to 7 of them the first 3 count by their root of sum of squares instead (the
    paper's truncNum), and beyond the first alone.

    Args:
        lambdas: rising values of log(alpha/sigma), shape (n + 1,).
    """
    n = len(lambdas) - 1
    step, age = torch.arange(n, device="cpu"), torch.arange(3, device="cpu")
    made = (step[:, None] - age).clamp_min(0)  # the node whose prediction is the j-th newest in step k
    used = age < torch.minimum(torch.minimum(step + 1, n - step), torch.tensor(3, device="cpu"))[:, None]
    x, w = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(16))
    half = 0.5 * lambdas.diff()[:, None]
    points = lambdas[:-1, None] + half * (1 + x)  # shape (n, 16)
    nodes = lambdas[made]
    pairs = used[:, :, None] & used[:, None, :] & (age[:, None] != age)
    gaps = torch.where(pairs, nodes[:, :, None] - nodes[:, None, :], 1.0)
    factors = torch.where(pairs[:, None], (points[:, :, None] - nodes[:, None])[:, :, None] / gaps[:, None], 1.0)
    basis = factors[..., 0] * factors[..., 1] * factors[..., 2]  # Lagrange's, shape (n, 16, 3)
    weights = ((half * w * torch.exp(points))[..., None] * basis).sum(1)
    error = torch.sigmoid(-2 * lambdas) ** (power / 2) / torch.sigmoid(2 * lambdas).sqrt()
    terms = torch.where(used, weights * error[made], 0.0)
    alone = step < (3 if n <= 7 else 1)
    signed = torch.zeros(n, dtype=lambdas.dtype, device="cpu").index_add(
        0, made[~alone].flatten(), terms[~alone].flatten()
    )
    return torch.linalg.vector_norm(terms[alone], dim=1).sum() + signed.abs().sum()


@functools.lru_cache(256)
def _optimised(start: tuple[float, ...], power: float) -> tuple[float, ...]:
    """The lambdas that minimise `dm_objective` between the ends of `start`, never worse than it."""
    n = len(start) - 1
    if n == 1:
        return start
    optimize = optional_module("scipy.optimize", "grid 'dm-nonuniform'")

    def objective(inner: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.tensor([start[0], *inner, start[-1]], dtype=torch.float64, requires_grad=True, device="cpu")
        value = dm_objective(x, power)
        (slope,) = torch.autograd.grad(value, x)
        return value.item(), slope[1:-1].numpy()

    gaps = np.eye(n, n - 1) - np.eye(n, n - 1, -1)  # inner lambdas -> gaps, less what the ends add
    least = np.full(n, 1e-3 * (start[-1] - start[0]) / n)
    least[0] += start[0]
    least[-1] -= start[-1]
    apart = optimize.LinearConstraint(gaps, least, np.inf)  # type: ignore[arg-type]
    with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
        warnings.simplefilter("ignore", UserWarning)  # where the gradient does not change: |.| is not smooth
        found = optimize.minimize(
            objective, start[1:-1], jac=True, method="trust-constr", constraints=[apart], options={"maxiter": 200}
        )
    best = (start[0], *found.x.tolist(), start[-1])
    better = found.fun < dm_objective(float64(start), power)
    return best if better and all(a < b for a, b in itertools.pairwise(best)) else start


GRIDS: dict[str, Callable[..., Grid]] = {
    "karras": karras,
    "polyexponential": polyexponential,
    "log-snr": log_snr,
    "cosine": cosine,
    "time": time,
    "time-quadratic": functools.partial(time, 2.0),
    "beta": beta,
    "beta-sigma": beta_sigma,
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    **{name: functools.partial(ays, name) for name in _AYS},
    "shifted": shifted,
    "dm-nonuniform": dm_nonuniform,
}


def grid(text: str) -> Grid:
    """A grid by its name, with or without parameters: "karras", "karras(5)", "beta(0.5,0.7)", "shifted(time,3)".

    `Grid.name` is such a text.

    Raises:
        UsageError: unknown name, unreadable text, or parameters that the grid does not take.
    """
    found = re.fullmatch(r"\s*([^\s(),]+)\s*(?:\((.*)\))?\s*", text)
    if found is None:
        raise UsageError(f"grid: cannot read {text!r:.60}", '"karras", or with parameters "karras(5)"')
    name, inside = found.groups()
    if name not in GRIDS:
        raise unknown("grid", name, GRIDS)
    values = [_parameter(name, part) for part in _split(inside)] if inside is not None else []
    taken = inspect.signature(GRIDS[name])
    try:
        taken.bind(*values)
    except TypeError:
        takes = ", ".join(taken.parameters) or "none"
        problem = f"grid {name}: got {len(values)} parameters, takes {takes}"
        raise UsageError(problem, f'"{GRIDS[name]().name}"') from None
    return GRIDS[name](*values)


def _split(inside: str) -> list[str]:
    """The parts between commas that stand in no inner parentheses."""
    parts, depth = [""], 0
    for letter in inside:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _parameter(name: str, text: str) -> Any:
    """A whole number, a number, or a grid."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    if "rule" in inspect.signature(GRIDS[name]).parameters:
        return grid(text)
    raise UsageError(f"grid {name}: need a number, got {text!r:.60}", '"karras(5)"')


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


def _name(name: str, values: Sequence[float | str], usual: Sequence[float] = ()) -> str:
    """The text from which `grid` makes the same rule."""
    if list(values) == list(usual):
        return name
    return f"{name}({','.join(value if isinstance(value, str) else f'{value:.15g}' for value in values)})"


def _falling(n: int) -> Tensor:
    """n + 1 equidistant numbers from 1 to 0."""
    return torch.linspace(1, 0, n + 1, dtype=torch.float64, device="cpu")


def _line(ends: Tensor, n: int) -> Tensor:
    """n + 1 equidistant numbers from the first end to the last."""
    return torch.linspace(ends[0].item(), ends[1].item(), n + 1, dtype=torch.float64, device="cpu")


def _clock(process: Process, high: float, low: float) -> Tensor:
    """Both ends before the shift of the process."""
    return process.uniform_clock(float64([high, low]))


def _log_snr_ends(process: Process, high: float, low: float) -> Tensor:
    """log-SNR at both ends; where it is not finite at the first, that of 80, or of 4 times the last end's ratio."""
    ends = process.log_snr(float64([high, low]))
    if torch.isinf(ends[0]):
        ends[0] = min(-2 * math.log(_RATIO_OF_PURE_NOISE), ends[1].item() - 2 * math.log(4))
    return ends


def _beta_quantiles(name: str, a: float, b: float) -> Callable[[int], Tensor]:
    """n -> the quantiles of Beta(a, b) at n + 1 equidistant probabilities from 1 to 0."""
    a, b = number(f"{name}: a", a, 0.3, 30), number(f"{name}: b", b, 0.3, 30)

    def quantiles(n: int) -> Tensor:
        return torch.from_numpy(beta_quantile(_falling(n).numpy(), a, b))

    return quantiles


def _index_grid(name: str, lay: Callable[[int, int, int], np.ndarray], late: bool = False, drop: int = 0) -> Grid:
    """A rule on the indices of training steps.

    `lay(first, last, n)` gives n of them, the highest at most `first`, all above `last` (-1 is clean data).
    """

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        to_index, to_time = _indices(process)
        first = math.floor(to_index(high) + 1e-6)
        last = max(math.ceil(to_index(low) - 1e-6), round(to_index(process.t_min)) - 1)
        if n + drop > first - last:
            problem = f"grid {name}: {n} steps do not fit on the {first - last} indices from {first} to {last + 1}"
            raise UsageError(problem, 'fewer steps, or grid="time"')
        inner = to_time(torch.from_numpy(lay(first, last, n).copy()))
        return torch.cat([inner.clamp_min(process.t_min), float64([low])])

    return Grid(name, place, to_data=True, late=late)


def _indices(process: Process) -> tuple[Callable[[float], float], Callable[[Tensor], Tensor]]:
    """Time -> index of the training step, and back: clean data is -1."""
    if isinstance(process, VPDiscrete):
        return lambda t: t, lambda index: index
    ends = process.t_data if math.isfinite(process.t_data) else process.t_min
    top, bottom = _clock(process, process.t_max, ends).tolist()
    count, zero = (_INDICES, -1) if math.isfinite(process.t_data) else (_INDICES - 1, 0)

    def to_index(t: float) -> float:
        clock = process.uniform_clock(float64(t)).item()
        return max((clock - bottom) / (top - bottom) * count + zero, -1.0)

    return to_index, lambda index: process.from_uniform_clock(bottom + (index - zero) / count * (top - bottom))
