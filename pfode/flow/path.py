"""The path from data to noise along the PF-ODE, and the nodes on it at which a trace is evaluated.

The state is solved alone, by steps of its own for every sample, in the chart `flow`: y = x/m, m = alpha + sigma, clock
u = sigma/m, dy/du = (y - D)/u. The divergence of that field, (d - m tr dD/dx)/u, is then integrated by Gauss-Legendre
on the dense output of every accepted step: the stepper never sees a probe. A step from near u = 0 may reach over many
scales of noise, on each of which the trace changes; it is split where u grows by more than a factor.
"""

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pfode.chart import CHARTS, Node, lagrange
from pfode.denoiser import Denoiser
from pfode.equation import Equation
from pfode.errors import UsageError
from pfode.ode import PID, Solver, Status, solve, steps
from pfode.ode.adjoints.problem import Adjoint, Direct
from pfode.ode.registry import solver_named
from pfode.plans.executor import iterate
from pfode.plans.table import Plan
from pfode.process import Process

__all__ = [
    "MAX_STEPS",
    "End",
    "Nodes",
    "Paths",
    "adaptive_path",
    "differentiable_path",
    "ends",
    "plan_path",
    "solver_for",
    "walked",
]

FLOW = CHARTS["flow"]
FACTOR = 6.0  # by which u may grow within one rule
HIGH = 1e-6  # tolerances below take the method of order 8
MAX_STEPS = 10_000
CONTROL = PID(grow=4.0)  # longer strides follow errors that are hardly more than rounding, which changes with the batch


class Nodes(NamedTuple):
    """Nodes of the paths of some samples, each of shape (nodes,).

    Fields:
        sample, number: whose, and which on its path, counted from 0.
        t: times of the process, float64 on the host. x: states there, shape (nodes, ...).
        u, m, weight: the clock, the scale, and the weight of the integral over u.
    """

    sample: Tensor
    number: Tensor
    t: Tensor
    x: Tensor
    u: Tensor
    m: Tensor
    weight: Tensor

    def split(self, size: int) -> Iterator["Nodes"]:
        """In parts of at most so many nodes."""
        for parts in zip(*(one.split(size) for one in self), strict=True):
            yield Nodes(*parts)


class End(NamedTuple):
    """Where the paths end: states at t_max; calls and accepted steps of each, shape (n,); why some did not get there.

    `failed`: by index of the sample.
    """

    x: Tensor
    nfe: Tensor
    steps: Tensor
    failed: dict[int, str]


Paths = Generator[Nodes, None, End]
X0 = Callable[[Tensor, Tensor], Tensor]


def ends(process: Process) -> tuple[Node, Node]:
    """The two ends of every path, in the chart: t_min and t_max."""
    low, high = FLOW.nodes(process, (process.t_min, process.t_max))
    return low, high


def solver_for(method: str | Solver, rtol: float) -> tuple[Solver, float]:
    """The method, and the tolerance it solves the state to, for an error of about rtol nats where densities are smooth.

    Raises:
        UsageError: an unknown method, or one without dense output and an error estimate.
    """
    solver = solver_named(("dopri8" if rtol < HIGH else "dopri5") if method == "auto" else method)
    if not solver.error_order:
        raise UsageError(f"method: {solver.name} estimates no error", 'method="dopri5"')
    return solver, max(rtol / (10 if solver.order > 5 else 100), 1e-13)


def adaptive_path(x0: X0, process: Process, x: Tensor, solver: Solver, rtol: float, max_steps: int) -> Paths:
    """The paths of states x at t_min, their nodes as the steps are made.

    Args:
        x0: the denoiser, of states and times (batch,).
    """
    low, high = ends(process)
    equation = Equation(process, FLOW, process.t_min, process.t_max)
    count = torch.zeros(len(x), dtype=torch.int64, device="cpu")
    made = steps(
        equation.field(x0), x / low.m, (low.u, high.u), method=solver, rtol=rtol, atol=rtol, batch="per-sample",
        max_steps=max_steps, controller=CONTROL,
    )  # fmt: skip
    while True:
        try:
            point = next(made)
        except StopIteration as stop:
            end = stop.value
            break
        u, weight, used = _rule(point.t0.cpu(), point.t1.cpu(), point.accepted.cpu(), solver.order // 2 + 1)
        y = point.at(torch.where(used, u, point.t1.cpu()).to(x.device))
        sample = torch.arange(len(x), device="cpu").expand_as(used)[used]
        number = (torch.arange(len(u), device="cpu")[:, None] + count)[used]
        count += used.sum(0)
        yield _nodes(equation, sample, number, u[used], weight[used], y[used.to(x.device)])
    accepted, status = end.counts.accepted.cpu(), end.status.tolist()
    where = equation.times(end.t).tolist()
    failed = {
        i: f"stopped at t = {where[i]:.6g} after {int(accepted[i])} steps: {_WHY[Status(why)]}"
        for i, why in enumerate(status)
        if why != Status.SUCCESS
    }
    return End(high.m * end.y.reshape(x.shape), end.counts.nfe.cpu(), accepted, failed)


_WHY = {
    Status.MAX_STEPS: "max_steps were not enough",
    Status.MIN_STEP: "the step size fell to its limit",
    Status.NON_FINITE: "the denoiser gave NaN or infinity there",
}


def differentiable_path(
    x0: X0, process: Process, x: Tensor, solver: Solver, rtol: float, max_steps: int, adjoint: str | Adjoint | Direct
) -> Paths:
    """The same with gradients: the steps are found without, then solved again for the states at their nodes."""
    found = list[Nodes]()
    with torch.no_grad():
        end = walked(adaptive_path(x0, process, x.detach(), solver, rtol, max_steps), found.append)
    low, high = ends(process)
    equation = Equation(process, FLOW, process.t_min, process.t_max)
    sample, number, u, weight = (torch.cat([getattr(one, name) for one in found]) for name in _PLACES)
    times = torch.full((len(x), int(number.max()) + 3), high.u, dtype=torch.float64, device="cpu")
    times[:, 0] = low.u
    times[sample, number + 1] = u
    solved = solve(
        equation.field(x0), x / low.m, times.to(x.device), method=solver, rtol=rtol, atol=rtol, batch="per-sample",
        max_steps=max_steps, controller=CONTROL, throw=False, adjoint=adjoint,
    )  # fmt: skip
    yield _nodes(equation, sample, number, u, weight, solved.ys[number + 1, sample])
    return end._replace(x=high.m * solved.ys[-1])


def plan_path(plan: Plan, denoiser: Denoiser, x: Tensor, **cond: Any) -> Paths:
    """The paths by a plan whose times rise from t_min to t_max: a fixed number of calls, with gradients.

    The nodes are those of the plan; between them the integrand over sqrt(u) is a cubic through the four next to it.

    Raises:
        UsageError: a plan that draws noise, or does not lead from t_min to t_max of the denoiser's process.
    """
    process = denoiser.process
    first, last = (float(one) for one in (plan.times[0], plan.times[-1]))
    near = 1e-6 * (process.t_max - process.t_min)
    if plan.stochastic or abs(first - process.t_min) > near or abs(last - process.t_max) > near:
        kind = "draws noise" if plan.stochastic else f"leads from t = {first:g} to {last:g}"
        problem = f"plan {plan.name!r} {kind}: need one from t_min = {process.t_min:g} to t_max = {process.t_max:g}"
        raise UsageError(problem, "pfode.make_plan(sampler, process, grid=rising times)")
    nodes = FLOW.nodes(process, plan.time[plan.node].tolist())
    weights = _cubic([math.sqrt(node.u) for node in nodes])
    states = itertools.chain([x], (point.x for point in iterate(plan, denoiser, x, **cond)))
    every = torch.arange(len(x), device="cpu")
    for k, (node, weight, state) in enumerate(zip(nodes, weights, states, strict=True)):
        u, m, t = (
            torch.full((len(x),), value, dtype=torch.float64, device="cpu") for value in (node.u, node.m, node.t)
        )
        yield Nodes(every, torch.full_like(every, k), t, state, u, m, 2 * u.sqrt() * weight)
        x = state
    calls = torch.full_like(every, plan.nfe)
    return End(x, calls, torch.full_like(every, plan.steps), {})


def walked(walk: Paths, keep: Callable[[Nodes], object]) -> End:
    """The end of a walk; each of its nodes is handed to `keep` on the way."""
    while True:
        try:
            nodes = next(walk)
        except StopIteration as stop:
            return stop.value
        keep(nodes)


_PLACES = ("sample", "number", "u", "weight")


def _nodes(equation: Equation, sample: Tensor, number: Tensor, u: Tensor, weight: Tensor, y: Tensor) -> Nodes:
    """Nodes at these values of the clock, where the scaled states are y."""
    t, (m, _, _) = equation.levels(u, y)
    return Nodes(sample, number, t, m * y, u, m.detach().flatten().cpu().double(), weight)


def _rule(u0: Tensor, u1: Tensor, accepted: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gauss-Legendre for steps from u0 to u1, shape (batch,): nodes, weights, which are used, each (nodes, batch)."""
    points, weights = (torch.from_numpy(one)[:, None] for one in np.polynomial.legendre.leggauss(order))
    growth = torch.where(accepted, torch.log(u1 / u0), 0.0)
    panels = (growth / math.log(FACTOR)).ceil().clamp(min=1)
    k = torch.arange(int(panels.max()), device="cpu")[:, None]
    left = u0 * torch.exp(growth / panels * k)
    right = torch.where(k + 1 < panels, u0 * torch.exp(growth / panels * (k + 1)), u1)
    half = 0.5 * (right - left)[:, None]
    shape = (-1, len(u0))
    u, weight = left[:, None] + half * (1 + points), half * weights
    used = ((k < panels) & accepted)[:, None].expand_as(u)
    return u.reshape(shape), weight.reshape(shape), used.reshape(shape)


def _cubic(s: Sequence[float]) -> list[float]:
    """Weights of the integral over s from the first to the last node, cubics through four neighbours in between."""
    total = [0.0] * len(s)
    points, weights = np.polynomial.legendre.leggauss(2)
    for k in range(len(s) - 1):
        first = min(max(k - 1, 0), max(len(s) - 4, 0))
        near = range(first, min(first + 4, len(s)))
        half = 0.5 * (s[k + 1] - s[k])
        basis = lagrange([s[j] for j in near], s[k] + half * (1 + points))
        for j, values in zip(near, basis, strict=True):
            total[j] += float(half * weights @ values)
    return total
