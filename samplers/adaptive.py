"""Adaptive sampling: the PF-ODE d(x/m)/du = w(u) n of a chart, integrated by `pfode.ode` to a tolerance.

Every sample has its own steps, and none depends on its batch mates. What a `Plan` is to a fixed grid, an `Adaptive` is
here: made from a row of `ADAPTIVE` on the host before the first call, then run on any states.

The ends are those of plans: nothing is evaluated outside [t_min, t_max]; the last call, at t_min, is the row
x = alpha D; where alpha = 0 and the chart does not hold, the first is the row x1 = (sigma1/sigma0) x + alpha1 D.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfode.chart import CHARTS, Chart
from pfode.denoiser import Denoiser, forwards
from pfode.equation import Equation
from pfode.errors import NumericalError, UsageError, integer, number, unknown
from pfode.grids import end_time
from pfode.ode import PID, SOLVERS, Solver, Status, Step, solve
from pfode.ode.solver import Time, column
from pfode.ode.state import Field
from pfode.plans.executor import Failure, as_state, check_output
from pfode.process import Process, float64

__all__ = [
    "ADAPTIVE",
    "MAX_STEPS",
    "Adaptive",
    "AdaptiveRecipe",
    "Arctangent",
    "DpmPair",
    "Run",
    "Stopped",
    "find_adaptive",
    "make_adaptive",
]

MAX_STEPS = 1000
_FIRST = 0.1  # alpha/sigma after a first row from alpha = 0, over sqrt(rtol): its error is O((alpha/sigma)^2)
_LEAST = {torch.float32: 1e-6, torch.float64: 1e-13}  # tolerances below are beyond the rounding of the state
_WHY = {
    Status.MAX_STEPS: ("max_steps were not enough", "a larger rtol, or max_steps="),
    Status.MIN_STEP: ("the step size fell to its limit", "a larger rtol, or dtype=torch.float64"),
    Status.NON_FINITE: ("the denoiser gave NaN or infinity there", "check the network and its precision"),
}


@dataclass(frozen=True)
class DpmPair:
    """The embedded pair of DPM-Solver-12 or -23 (Lu et al. 2022, appendix C), in a chart whose weight is e^u.

    With n = f e^-u, a step is the exact integral of e^u against n or its linear interpolant. The error is in units of
    max(atol, rtol max(|low|, |low of the step before|)), low being the lower order: solve it with rtol = 0, atol = 1.

    Args:
        order: of the solution, 2 or 3.
        rtol, atol: tolerances.
    """

    order: int
    rtol: float
    atol: float

    @property
    def name(self) -> str:
        return f"dpm-{self.order - 1}{self.order}"

    @property
    def error_order(self) -> int:
        return self.order

    def init(self, field: Field, t: Time, y: Tensor, slope: Tensor | None = None) -> Tensor:
        return y

    def step(self, field: Field, t0: Time, t1: Time, y0: Tensor, carry: Tensor) -> Step:
        u0 = torch.as_tensor(t0, dtype=torch.float64, device=y0.device)
        h = torch.as_tensor(t1, dtype=torch.float64, device=y0.device) - u0
        nodes = torch.arange(1, self.order, dtype=torch.float64, device=y0.device) / self.order
        first, *times = (field.time(t0), *field.times(t0, t1, nodes))
        near, far = 1 / self.order, 2 / 3

        def mean(c: Any) -> Tensor:  # of e^u from u0 to u0 + c h
            z = c * h
            return torch.exp(u0) * torch.where(z == 0, 1.0, torch.expm1(z) / torch.where(z == 0, 1.0, z))

        def slope(t: Tensor, y: Tensor, c: float) -> Tensor:
            return field(t, y) * column(torch.exp(-u0 - c * h), y0)

        def move(c: Any, r: float = 1.0, inner: Tensor | None = None, exact: bool = False) -> Tensor:
            """y(u0 + c h) with n constant, or linear through n0 and `inner` at u0 + r h: exact, or e^u by its mean."""
            moved = y0 + column(c * h * mean(c), y0) * n0
            if inner is None:
                return moved
            moment = c * (torch.exp(u0 + c * h) - mean(c)) if exact else 0.5 * c * h * c * mean(c)
            return moved + column(moment / r, y0) * (inner - n0)

        n0 = slope(first, y0, 0.0)
        n1 = slope(times[0], move(near), near)
        if self.order == 2:
            low, end = move(1.0), (near, n1, False)
        else:
            low = move(1.0, near, n1)
            end = (far, slope(times[1], move(far, near, n1, True), far), True)
        y1 = move(1.0, *end)
        error = (y1 - low) / torch.maximum(low.abs(), carry.abs()).mul(self.rtol).clamp(min=self.atol)

        def dense(theta: Tensor) -> Tensor:
            return torch.stack([move(c, *end) for c in theta.unbind()])

        return Step(y1, error, dense, low)


@dataclass(frozen=True)
class Arctangent(PID):
    """The controller of k-diffusion: the factor 1 + atan(e^(-1/k) - 1), accepted if it is at least `safety`.

    The norm that goes with it is the root mean square over `limit`, so that 1 is what is just accepted.
    """

    safety: float = 0.81

    def limit(self, order: int) -> float:
        """The largest error accepted, in units of the tolerance."""
        return (1 - math.tan(1 - self.safety)) ** -order

    def factor(self, batching: Any, error: Any, accepted: Any, memory: Any, order: int) -> Any:
        return 1 + torch.atan((error * self.limit(order) + 1e-8) ** (-1 / order) - 1), memory


@dataclass(frozen=True)
class AdaptiveRecipe:
    """A row of `ADAPTIVE`.

    Args:
        solver: of `pfode.ode`, or a pair of DPM-Solver by its order.
        charts: where it makes sense, the default first.
        calls: denoiser calls per attempted step.
        rtol, atol: the default tolerances; atol, in units of x/m, is scaled with rtol where only that is given.
        source: the paper; summary: one line for the table.
    """

    name: str
    solver: Solver | int
    charts: tuple[str, ...]
    calls: int
    rtol: float
    atol: float
    source: str
    summary: str
    stochastic = False

    @property
    def order(self) -> int:
        """Of convergence."""
        return self.solver if isinstance(self.solver, int) else self.solver.order

    @property
    def order_as_shipped(self) -> int:
        """The same: these methods have no start-up."""
        return self.order

    @property
    def nfe_per_step(self) -> int:
        """Denoiser calls per attempted step."""
        return self.calls


_EVERY = ("flow", *(name for name in CHARTS if name != "flow"))
_PAIRS = ("dpm", "dpm++")  # the weight is e^u
_PAPER, _TEXT = "Lu et al. 2022 (DPM-Solver), appendix C; k-diffusion, sample_dpm_adaptive", "embedded pair"
ADAPTIVE: dict[str, AdaptiveRecipe] = {
    row.name: row
    for row in (
        AdaptiveRecipe("rk23", SOLVERS["bosh3"], _EVERY, 3, 1e-3, 1e-3, "Bogacki & Shampine 1989", "pair 3(2)"),
        AdaptiveRecipe("rk45", SOLVERS["dopri5"], _EVERY, 6, 1e-3, 1e-3, "Dormand & Prince 1980", "pair 5(4)"),
        AdaptiveRecipe("tsit5", SOLVERS["tsit5"], _EVERY, 6, 1e-3, 1e-3, "Tsitouras 2011", "pair 5(4)"),
        AdaptiveRecipe(
            "dopri8", SOLVERS["dopri8"], _EVERY, 13, 1e-5, 1e-5, "Prince & Dormand 1981, RK8(7)13M", "pair 8(7)"
        ),
        AdaptiveRecipe("dpm-adaptive", 3, _PAIRS, 3, 0.05, 0.0078, _PAPER, f"{_TEXT} 23"),
        AdaptiveRecipe("dpm-adaptive2", 2, _PAIRS, 2, 0.05, 0.0078, _PAPER, f"{_TEXT} 12"),
    )
}


@dataclass(frozen=True)
class Stopped(Failure):
    """A sample that did not get to the end: its index, the steps it made, the time where it stopped, and why."""

    status: Status

    @property
    def why(self) -> str:
        return _WHY[self.status][0]

    @property
    def error(self) -> NumericalError:
        where = f"t = {self.time:.6g} after {self.step} steps"
        return NumericalError(f"sample {self.index} stopped at {where}: {self.why}", _WHY[self.status][1])


@dataclass(frozen=True)
class Run:
    """What `Adaptive.run` returns; every tensor but x lies on the host.

    Attributes:
        x: the states at the end, shape (batch, ...), NaN where a sample did not get there.
        nfe, evals: denoiser calls and network forwards of every sample while it was running, shape (batch,); the
            forwards of guidance are counted in full, whatever its interval.
        steps, rejected: of every sample, accepted and rejected steps, shape (batch,).
        failed: the samples that did not get there.
    """

    x: Tensor
    nfe: Tensor
    evals: Tensor
    steps: Tensor
    rejected: Tensor
    failed: list[Stopped]


@dataclass(frozen=True)
class Adaptive:
    """An adaptive sampler settled for a process: see `make_adaptive`.

    Args:
        recipe: the row. process: the noise process; `run` refuses another.
        chart: the coordinates to integrate in.
        rtol, atol: tolerances.
        start: the time of the states it begins with; begin: where the integration does, later where alpha(start) = 0
            and the chart does not hold; stop: where it ends.
        clean: whether the row x = alpha D follows.
        max_steps: attempts allowed per sample.
    """

    recipe: AdaptiveRecipe
    process: Process
    chart: Chart
    rtol: float
    atol: float
    start: float
    begin: float
    stop: float
    clean: bool
    max_steps: int
    stochastic = False
    fitted_to = None  # as of a `Plan` that was fitted to nothing

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def meta(self) -> dict[str, Any]:
        """How it was made, as in `Plan.meta`."""
        ends = {"final": "denoise" if self.clean else "stop"}
        return {"sampler": self.name, "chart": self.chart.name, "rtol": self.rtol, "atol": self.atol, **ends}

    @property
    def first(self) -> Tensor:
        """(time, alpha, sigma) of the states it begins with, as in `Plan.first`."""
        t, process = self.start, self.process
        return float64([t, process.alpha(t), process.sigma(t)])

    @property
    def times(self) -> Tensor:
        """The first and the last time, as in `Plan.times`."""
        return float64([self.start, self.process.t_data if self.clean else self.stop])

    def run(self, denoiser: Denoiser, x: Tensor, **cond: Any) -> Run:
        """Integrate from x, the states at `start`.

        Args:
            x: shape (batch, ...). Half precision is raised to float32. Gradients flow if the caller has them enabled.
            cond: passed on to the denoiser, which is given the time of every sample, shape (batch,).

        Raises:
            UsageError: another process, a tolerance that the dtype of x does not hold, a denoiser whose output has
                another shape.
        """
        if self.process != denoiser.process:
            problem = f"{self.name} was made for {self.process}, the denoiser has {denoiser.process}"
            raise UsageError(problem, "make_adaptive(..., process=denoiser.process)")
        theirs, x = x, as_state(x, 2)
        if self.rtol < _LEAST[x.dtype]:
            problem = f"rtol: {self.rtol:g} is beyond the rounding of {x.dtype}"
            raise UsageError(problem, f"rtol={_LEAST[x.dtype]:g}, or dtype=torch.float64")

        def x0(x: Tensor, t: Tensor) -> Tensor:
            asked = x.clone() if x is theirs else x  # the denoiser may change what it is given
            return check_output(denoiser(asked, t.to(x.device, x.dtype), **cond), x)

        equation = Equation(self.process, self.chart, *sorted((self.begin, self.stop)))
        start, begin, stop = self.chart.nodes(self.process, (self.start, self.begin, self.stop))
        alone = []  # the times of the calls before and after the integration
        if begin != start:  # as alpha is 0 there
            alone.append(start.t)
            x = begin.sigma / start.sigma * x + begin.alpha * x0(x, float64(start.t))
        found = solve(
            equation.field(x0),
            x / begin.m,
            (begin.u, stop.u),
            **self._method(),
            batch="per-sample",
            max_steps=self.max_steps,
            throw=False,
        )
        x = stop.m * found.ys[-1]
        if self.clean:
            alone.append(stop.t)
            x = self.process.alpha(self.process.t_data) * x0(x, float64(stop.t))
        arrived = (found.status == Status.SUCCESS) & torch.isfinite(x.detach()).flatten(1).all(1)
        x = torch.where(arrived.view(-1, *[1] * (x.ndim - 1)), x, math.nan)
        times = equation.times(found.t)
        status = torch.where(arrived | (found.status != Status.SUCCESS), found.status, Status.NON_FINITE).tolist()
        calls, stats = found.stats.nfe.cpu(), found.stats
        return Run(
            x=x,
            nfe=calls + len(alone),
            evals=calls * getattr(denoiser, "evals", 1) + forwards(denoiser, torch.tensor(alone, device="cpu")),
            steps=stats.accepted.cpu(),
            rejected=stats.rejected.cpu(),
            failed=[
                Stopped(i, int(stats.accepted[i]), times[i].item(), Status(why))
                for i, why in enumerate(status)
                if why != Status.SUCCESS
            ],
        )

    def _method(self) -> dict[str, Any]:
        """Solver, tolerances and controller, as `solve` wants them."""
        solver = self.recipe.solver
        if not isinstance(solver, int):
            return {"method": solver, "rtol": self.rtol, "atol": self.atol}
        pair, control = DpmPair(solver, self.rtol, self.atol), Arctangent(first_step=0.05)
        limit = control.limit(pair.error_order)
        norm = lambda error: error.flatten(1).square().mean(1).sqrt() / limit  # noqa: E731
        return {"method": pair, "rtol": 0.0, "atol": 1.0, "norm": norm, "controller": control}


def find_adaptive(sampler: Any) -> AdaptiveRecipe | None:
    """The row of a name, or one of your own; None for what is no adaptive sampler."""
    if isinstance(sampler, str):
        return ADAPTIVE.get(sampler)
    return sampler if isinstance(sampler, AdaptiveRecipe) else None


def make_adaptive(
    sampler: str | AdaptiveRecipe,
    process: Process,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    chart: str | None = None,
    final: str = "denoise",
    start: float | None = None,
    stop: float | None = None,
    max_steps: int | None = None,
    **others: Any,
) -> Adaptive:
    """An adaptive sampler for a process.

    Args:
        sampler: a name of `ADAPTIVE`, or a row of your own.
        rtol, atol: a step's error is at most about atol + rtol |x/m| in the root mean square over a sample, m the scale
            of the chart; `dpm-adaptive` as its paper has it. atol is scaled with rtol where only that is given.
        chart: another of the recipe's charts than its first.
        final: "denoise" ends at clean data, "stop" at the process's t_min.
        start, stop: times of the process between which to integrate instead; from low to high it encodes.
        max_steps: attempts allowed per sample (1000).
        others: what samplers of fixed steps take (steps, grid, eta, ...): refused unless it is None.

    Raises:
        UsageError: unknown names, tolerances that are none, times outside the process or where the chart does not hold.
    """
    if not isinstance(process, Process):
        raise UsageError(f"process: need a noise process, got {process!r:.60}", "process=net.process, or pfode.EDM()")
    row = find_adaptive(sampler)
    if row is None:
        raise unknown("adaptive sampler", sampler, ADAPTIVE)
    for name, value in others.items():
        if value is not None:
            hint = "rtol=1e-3 says how well, or choose a sampler of fixed steps"
            raise UsageError(f"{row.name} chooses its own steps, it takes no {name} (got {value!r:.40})", hint)
    if chart is not None and chart not in row.charts:
        raise unknown(f"chart for {row.name}", chart, row.charts)
    if final not in ("denoise", "stop"):
        raise unknown("final", final, ("denoise", "stop"))
    rtol = row.rtol if rtol is None else number("rtol", rtol, 0, 1)
    atol = row.atol * (rtol / row.rtol) if atol is None else number("atol", atol, 0)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value == 0:
            raise UsageError(f"{name}: need a positive number, got 0", f"{name}=1e-3")
    low, high, data = process.t_min, process.t_max, process.t_data
    first = high if start is None else number("start", start)
    stop = end_time(process, stop)
    last = low if stop is None or stop == data else stop
    if not (low <= first <= high and low <= last <= high) or first == last:
        limits = f"from {first:g} to {last:g}, not between two times within [{low:g}, {high:g}]"
        raise UsageError(f"{row.name} would integrate {limits}", "leave start and stop out")
    clean = stop == data or (stop is None and final == "denoise")
    if clean and first < last:
        raise UsageError(f"start = {first:g} lies below t_min", "start must lie above stop")
    coordinates = CHARTS[chart or row.charts[0]]
    begin = first
    if not process.alpha(first) and not coordinates.nodes(process, [first])[0].regular:
        begin = process.time(2 * math.log(_FIRST * math.sqrt(rtol)))
    for node in coordinates.nodes(process, (begin, last)):
        if not node.regular or begin < low:
            problem = f"chart {coordinates.name} does not hold at t = {node.t:g}, where alpha = {node.alpha:g}"
            raise UsageError(problem, 'chart="flow"' if "flow" in row.charts else f"stop={0.999 * high:g}")
    most = MAX_STEPS if max_steps is None else integer("max_steps", max_steps, 1)
    return Adaptive(row, process, coordinates, rtol, atol, first, begin, last, clean, most)
