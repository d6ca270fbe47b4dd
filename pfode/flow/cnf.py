"""Continuous normalising flows (Chen et al. 2018; Grathwohl et al. 2019): an ODE takes data to a base distribution.

    dy/dt = f(t, y),  y(t0) = x,  z = y(t1),  log p(x) = log base(z) + int_t0^t1 tr df/dy dt

The steps are chosen for the state alone. The trace, and the regularisers, are then integrated over each accepted step
by a Gauss-Legendre rule on its dense output, at all nodes of all steps in one call of the field: the stepper never sees
them, a probe is fresh at every node, and many small calls become one large one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from pfode import noise
from pfode.errors import NumericalError, UsageError, integer, number
from pfode.flow.divergence import Hutchinson, Trace, divergence, find_trace, signs
from pfode.ode import solve
from pfode.ode.records import Status
from pfode.ode.registry import solver_named
from pfode.ode.solve import steps

__all__ = ["CNF", "Base", "Flowed", "StandardNormal"]

FIXED = ("step_size", "grid", "step_t")  # options that say the steps; they are said once
ORDERS = (2, 3)  # of the derivatives that `taylor` knows


class Base(Protocol):
    """What data are taken to: a density, and samples by seeds."""

    def log_prob(self, x: Tensor, /) -> Tensor: ...

    def sample(self, n: int, seed: int, /) -> Tensor: ...


class StandardNormal:
    """N(0, 1) in every element.

    Args:
        shape: of one sample.
    """

    def __init__(self, shape: Sequence[int]):
        self.shape = tuple(integer("shape", side, 1) for side in shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """In nats, (batch,)."""
        return -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """(n, *shape), float32; sample i depends on seed + i alone."""
        return noise.normal([seed + i for i in range(n)], 0, self.shape)


@dataclass(frozen=True, eq=False)
class Flowed:
    """What `CNF.run` returns; everything but z has shape (batch,).

    Attributes:
        z: the data's place in the base distribution, of the shape of x.
        log_prob: log p(x) in nats.
        trace: int tr df/dy dt.
        kinetic: int |f|^2 dt (per sample, summed over its elements).
        jacobian: int |df/dy|_F^2 dt, by the probes of the trace where it is estimated.
        taylor: int |d^k y/dt^k|^2 dt.
        steps: accepted steps, those of the sample that took most.

    kinetic, jacobian and taylor are zero where they were not asked for.
    """

    z: Tensor
    log_prob: Tensor
    trace: Tensor
    kinetic: Tensor
    jacobian: Tensor
    taylor: Tensor
    steps: int


class CNF(torch.nn.Module):
    """A density p(x) by a field f that carries data to a base distribution.

    Args:
        field: f(t, y), or f(t, y, context) where a context is given; of the shape of y. t has shape (), or (batch,).
        base: what z is distributed as: the shape of one sample, or its number of elements, for a standard normal; or
            anything with log_prob(z) -> (batch,) and sample(n, seed). torch.distributions are taken as well.
        ts: t0, where the data are, and t1.
        trace: "auto" (exact up to 64 elements, one probe beyond), "exact", "hutchinson", or a value of
            `pfode.flow.divergence`.
        kinetic, jacobian: whether `run` integrates |f|^2 and |df/dy|_F^2 (RNODE: Finlay et al. 2020, eq. 8 to 11).
        taylor: 2 or 3: the order of the time derivative along the trajectory whose square it integrates (TayNODE: Kelly
            et al. 2020); None: none.
        nodes: Gauss-Legendre nodes in each step; by default as many as the method's order needs.
        stacked: call the field once for all nodes, t being (rows,); False: node by node, with less memory.
        batch: of the steps, "joint" or "per-sample". By default "joint" where gradients are recorded, else
            "per-sample", so that a value does not depend on the batch it is found in.
        options: of `pfode.solve`: method, rtol, atol, step_size (for a fixed grid), adjoint ("direct" by default).

    Raises:
        UsageError: a base without a density, unknown words, options that `solve` refuses (at the first call).
    """

    def __init__(
        self,
        field: Callable[..., Tensor],
        base: Base | torch.distributions.Distribution | int | Sequence[int],
        ts: Sequence[float] = (0.0, 1.0),
        *,
        trace: str | Trace = "auto",
        kinetic: bool = False,
        jacobian: bool = False,
        taylor: int | None = None,
        nodes: int | None = None,
        stacked: bool = True,
        batch: str | None = None,
        **options: Any,
    ):
        super().__init__()
        if not callable(field):
            raise UsageError(
                f"field: need a function (t, y), got {type(field).__name__}", "a module with forward(t, y)"
            )
        find_trace(trace, 1)
        if taylor is not None and taylor not in ORDERS:
            raise UsageError(f"taylor: need 2, 3 or None, got {taylor!r:.60}", "taylor=2")
        if batch not in (None, "joint", "per-sample"):
            raise UsageError(f"batch: need 'joint', 'per-sample' or None, got {batch!r:.60}", "batch=None")
        if len(ts) != 2 or number("ts", ts[0]) == number("ts", ts[1]):
            raise UsageError(f"ts: need two times apart, of the data and of the base, got {ts!r:.60}", "ts=(0.0, 1.0)")
        self.field, self.base, self.ts = field, _find_base(base), (float(ts[0]), float(ts[1]))
        self.trace, self.kinetic, self.jacobian, self.taylor = trace, bool(kinetic), bool(jacobian), taylor
        order = solver_named(options.get("method", "dopri5")).order
        self.nodes = -(-(order + 1) // 2) if nodes is None else integer("nodes", nodes, 1, 64)
        self.stacked, self.batch, self.options = stacked, batch, options

    def log_prob(self, x: Tensor, context: Tensor | None = None, *, seeds: Sequence[int] | None = None) -> Tensor:
        """log p(x) in nats, (batch,); see `run`."""
        return self._run(x, context, seeds, regularised=False).log_prob

    def run(self, x: Tensor, context: Tensor | None = None, *, seeds: Sequence[int] | None = None) -> Flowed:
        """Data taken to the base, with the regularisers that were asked for.

        Gradients flow to x, the context and the parameters of the field.

        Args:
            x: (batch, ...), float. context: (batch, ...), handed to the field beside y.
            seeds: one per sample, of the probes of an estimated trace; None: drawn from torch's generator.

        Raises:
            UsageError: x, a context or seeds that do not fit. NumericalError: a solve that did not get to its end.
        """
        return self._run(x, context, seeds, regularised=True)

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """z of x, of its shape."""
        return self._carried(x, self.ts, context)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """x of z, of its shape: the inverse of `encode` up to the tolerance."""
        return self._carried(z, (self.ts[1], self.ts[0]), context)

    def sample(self, n: int, seed: int = 0, context: Tensor | None = None) -> Tensor:
        """n samples, (n, ...); sample i depends on seed + i alone (torch.distributions: on n and the seed).

        Args:
            context: (n, ...), where the field takes one.

        Raises:
            UsageError: no number of samples, or a seed that cannot be.
        """
        integer("n", n, 0)
        integer("seed", seed, 0, 2**64 - 1 - n)
        z = self.base.sample(n, seed)
        parameter = next((p for p in self.parameters() if p.is_floating_point()), None)
        z = z if parameter is None else z.to(parameter)
        return self.decode(z, context) if n else z

    def _run(self, x: Tensor, context: Tensor | None, seeds: Sequence[int] | None, regularised: bool) -> Flowed:
        _need_batch(x, context)
        path = self._path(x, context)
        integrals = self._integrals(path, context, seeds, regularised)
        density = self.base.log_prob(path.z)
        if density.shape != (len(x),):
            raise UsageError(f"base: log_prob of {len(x)} samples has shape {tuple(density.shape)}", "one per sample")
        trace, kinetic, jacobian, taylor = integrals
        return Flowed(path.z, density + trace, trace, kinetic, jacobian, taylor, path.steps)

    # ---- the state alone

    def _path(self, x: Tensor, context: Tensor | None) -> "_Path":
        """Where the steps' nodes are, their weights, and the states there."""
        recorded = torch.is_grad_enabled()
        batch = self.batch or ("joint" if recorded else "per-sample")
        places, shares = _gauss(self.nodes)
        ends, times, weights, states = [self.ts[0]], [], [], []
        with torch.no_grad():
            z, made = x, steps(self._field, x.detach(), self.ts, batch=batch, **self._options("adjoint", "params"),
                               args=_args(context))  # fmt: skip
            while True:
                try:
                    point = next(made)
                except StopIteration as stop:
                    _need_success(stop.value.status)
                    break
                for place, share in zip(places, shares, strict=True):
                    times.append(point.t0 + place * (point.t1 - point.t0))
                    weights.append(share * (point.t1 - point.t0))
                    if not recorded:
                        states.append(point.at(times[-1]))
                z = point.y
                ends.append(point.t1)
        if recorded:
            z, states = self._again(x, context, batch, ends, times)
        clock = [torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x)) for t in times]
        share = [torch.as_tensor(w, dtype=x.dtype, device=x.device).expand(len(x)) for w in weights]
        return _Path(z, torch.stack(clock), torch.stack(share), states, len(ends) - 1)

    def _again(self, x: Tensor, context: Tensor | None, batch: str, ends: list[Any], times: list[Any]) -> Any:
        """The same steps with gradients: z and the states at the nodes."""
        options: dict[str, Any] = {"adjoint": "direct", **self.options}
        ts: Any = [self.ts[0], *times, self.ts[1]]
        if batch == "joint":
            options = {name: value for name, value in options.items() if name not in FIXED} | {"grid": ends}
        else:  # samples that are done, or whose step was rejected, stay where they are
            columns = [torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(len(x)) for t in ts]
            ts = torch.stack(columns, 1)
            ts = ts.cummax(1)[0] if self.ts[1] > self.ts[0] else ts.cummin(1)[0]
        ys = solve(self.field, x, ts, batch=batch, args=_args(context), **options).ys
        return ys[-1], list(ys[1:-1])

    def _carried(self, y: Tensor, ts: tuple[float, float], context: Tensor | None) -> Tensor:
        _need_batch(y, context)
        batch = self.batch or ("joint" if torch.is_grad_enabled() else "per-sample")
        options: dict[str, Any] = {"adjoint": "direct", **self.options}
        if "grid" in options:
            options["grid"] = sorted(options["grid"], reverse=ts[1] < ts[0])
        return solve(self.field, y, ts, batch=batch, args=_args(context), **options).ys[-1]

    def _options(self, *without: str) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name not in without}

    # ---- integrals along it

    def _integrals(self, path: "_Path", context: Tensor | None, seeds: Any, regularised: bool) -> Tensor:
        """int of the trace, |f|^2, |df/dy|^2 and |d^k y/dt^k|^2, (4, batch)."""
        count, batch = path.weights.shape
        together = count if self.stacked else 1
        total: Any = 0
        for first in range(0, count, together):
            some = range(first, min(first + together, count))
            y, t = torch.cat([path.states[i] for i in some]), path.times[first : first + together].reshape(-1)
            values = self._integrands(t, y, context, seeds, path, some, regularised)
            weighted = values.reshape(len(values), len(some), batch) * path.weights[first : first + together]
            total = total + weighted.sum(1)
        return total

    def _integrands(
        self, t: Tensor, y: Tensor, context: Any, seeds: Any, path: "_Path", some: range, regularised: bool
    ) -> Tensor:
        """The four integrands at nodes, (4, rows)."""
        batch = len(y) // len(some)
        context = None if context is None else context.repeat(len(some), *[1] * (context.ndim - 1))
        how = find_trace(self.trace, y[0].numel(), 1)
        vectors = None
        if seeds is not None and len(seeds) != batch:
            raise UsageError(f"seeds: need one for each of {batch} samples, got {len(seeds)}")
        if seeds is not None and isinstance(how, Hutchinson):
            numbers = path.numbers[some.start : some.stop].flatten().tolist()
            vectors = signs(y, how.probes, list(seeds) * len(some), numbers)
        found = divergence(lambda state: self._field(t, state, context), y, how, vectors)
        nothing = torch.zeros_like(found.trace)
        kinetic = found.value.square().flatten(1).sum(1) if self.kinetic and regularised else nothing
        jacobian = found.square if self.jacobian and regularised else nothing
        taylor = nothing
        if self.taylor is not None and regularised:
            taylor = _derivative(lambda t, y: self._field(t, y, context), self.taylor)(t, y)
            taylor = taylor.square().flatten(1).sum(1)
        return torch.stack([found.trace, kinetic, jacobian, taylor])

    def _field(self, t: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        """The field, perhaps at many times at once."""
        if t.ndim == 0:
            return self.field(t, y, *_args(context))
        if not self.stacked and bool((t == t[0]).all()):
            return self.field(t[0], y, *_args(context))
        try:
            return self.field(t, y, *_args(context))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            hint = "t.reshape(-1, 1).expand(len(y), 1) takes both; or stacked=False, batch='joint'"
            raise UsageError(f"field: fails for t of shape (batch,): {str(error)[:200]}", hint) from error


@dataclass(frozen=True, eq=False)
class _Path:
    """z, and of every node its times and weights, (nodes, batch), and states."""

    z: Tensor
    times: Tensor
    weights: Tensor
    states: list[Tensor]
    steps: int

    @property
    def numbers(self) -> Tensor:
        """The nodes' numbers, (nodes, batch), counted per sample along the steps that it took."""
        return (self.weights != 0).cumsum(0) - 1


def _derivative(f: Callable[[Tensor, Tensor], Tensor], order: int) -> Callable[[Tensor, Tensor], Tensor]:
    """d^k y/dt^k along dy/dt = f(t, y) as a function of (t, y): total derivatives of f, one inside the other."""
    if order == 1:
        return f
    lower = _derivative(f, order - 1)

    def total(t: Tensor, y: Tensor) -> Tensor:
        found: Any = torch.func.jvp(lower, (t, y), (torch.ones_like(t), f(t, y)))
        return found[1]

    return total


@lru_cache
def _gauss(n: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of the Gauss-Legendre rule on [0, 1]."""
    places, weights = leggauss(n)
    return ((places + 1) / 2).tolist(), (weights / 2).tolist()


def _args(context: Tensor | None) -> tuple[Tensor, ...]:
    return () if context is None else (context,)


def _need_batch(x: Tensor, context: Tensor | None) -> None:
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.is_floating_point() or not len(x):
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UsageError(f"x: need floats of shape (batch, ...), got {got}")
    if context is not None and (not isinstance(context, Tensor) or context.shape[:1] != x.shape[:1]):
        got = f"shape {tuple(context.shape)}" if isinstance(context, Tensor) else type(context).__name__
        raise UsageError(f"context: need a tensor of {len(x)} rows, got {got}")


def _need_success(status: Any) -> None:
    """Raise NumericalError where a solve did not get to its end."""
    each = status.tolist() if isinstance(status, Tensor) else [status]
    bad = [i for i, one in enumerate(each) if one != Status.SUCCESS]
    if bad:
        name = Status(each[bad[0]]).name.lower().replace("_", " ")
        where = f", sample {bad[0]}" if len(each) > 1 else ""
        raise NumericalError(f"the flow's solve stopped{where}: {name}", "a smoother field, or larger rtol and atol")


def _find_base(base: Base | int | Sequence[int] | torch.distributions.Distribution) -> Base:
    if isinstance(base, int) and not isinstance(base, bool):
        return StandardNormal((base,))
    if isinstance(base, torch.distributions.Distribution):
        return _Distribution(base)
    if isinstance(base, list | tuple | torch.Size):
        return StandardNormal(base)
    density: Any = base
    if not callable(getattr(density, "log_prob", None)) or not callable(getattr(density, "sample", None)):
        got = f"{base!r:.60}"
        raise UsageError(f"base: need a shape, or log_prob(z) and sample(n, seed), got {got}", "base=2")
    return density


class _Distribution:
    """A distribution of torch; its samples come from torch's generator, seeded."""

    def __init__(self, distribution: torch.distributions.Distribution):
        self.distribution = distribution

    def log_prob(self, x: Tensor) -> Tensor:
        """In nats, (batch,): summed over what the distribution takes for independent samples."""
        found = self.distribution.log_prob(x)
        return found.flatten(1).sum(1) if found.ndim > 1 else found

    def sample(self, n: int, seed: int) -> Tensor:
        """(n, ...)."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.distribution.sample((n,))
