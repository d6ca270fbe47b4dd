"""`compile=True`: explicit Runge-Kutta steps, with the field and the error's norm in them, under torch.compile.

Two kernels are made of a field. `step` is one attempted step. `ahead` is a loop of them, with the arithmetic of the
controller in it, that runs to where somebody looks: one call of it serves many steps. It ends at the next stop, or
before an attempt that would pass an output time before that; and it leaves an attempt that goes wrong undone. `advance`
makes these, so that what becomes of them is decided in one place.

Times, step sizes, tolerances and limits are inputs: no step compiles another. Another field, shape, dtype or controller
does.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode._torch import cpp_compiler, dynamo_error, while_loop
from pfode.errors import MissingError, UsageError
from pfode.ode.autocast import Casting
from pfode.ode.batching import PerSample
from pfode.ode.control import PID, STRETCH
from pfode.ode.loop import FLOOR
from pfode.ode.methods.explicit import RungeKutta
from pfode.ode.records import Position
from pfode.ode.solver import RMS, OfTableau, Solver, Step, Time, clock
from pfode.ode.state import Field, Layout, rebuild
from pfode.tableau import Tableau

__all__ = ["Compiled"]

_MOST = 64  # kernels that are kept
_OPTIONS = (
    ("cpp.use_decompose_tanh", True),  # on a CPU, where the compiler's own tanh takes six times as long as eager
    ("size_asserts", False),  # of every tensor in every step: a seventh of the time of small ones
)

Kernel = Callable[..., Any]
_kernels: collections.OrderedDict[Any, tuple[Any, Kernel]] = collections.OrderedDict()


@dataclass(frozen=True, eq=False)
class Compiled(OfTableau):
    """An explicit Runge-Kutta method whose steps are compiled with the field: the same numbers up to rounding.

    The first solve with a field takes seconds to a minute. The field must be one that torch.compile can follow whole:
    operations on tensors, no printing, no counting of its calls.

    Args:
        solver: the method.
        options: torch.compile's, as pairs.

    Raises:
        UsageError: a method of another kind; when called, a field that cannot be compiled.
        MissingError: when called, no C++ compiler on a CPU.
    """

    solver: Solver
    options: tuple[tuple[str, Any], ...] = _OPTIONS

    def __post_init__(self) -> None:
        if not isinstance(self.solver, RungeKutta):
            name = getattr(self.solver, "name", type(self.solver).__name__)
            raise UsageError(f"compile: {name} is no explicit Runge-Kutta method", 'method="dopri5"')

    @property
    def tableau(self) -> Tableau:  # type: ignore[override]
        """That of the method."""
        assert isinstance(self.solver, RungeKutta)
        return self.solver.tableau

    def init(self, field: Field, t: Time, y: Tensor, slope: Tensor | None = None) -> Tensor | None:
        return self.solver.init(field, t, y, slope)

    def step(self, field: Field, t0: Time, t1: Time, y0: Tensor, carry: Tensor | None) -> Step:
        assert isinstance(self.solver, RungeKutta)
        tableau = self.tableau
        slope = field(field.time(t0), y0).clone() if carry is None else carry
        norm = _norm(field)
        limits: tuple[Any, Any] = field.context.tolerance if norm and field.context.tolerance else (0.0, 1.0)
        kind: dict[str, Any] = {"dtype": clock(y0.device), "device": y0.device}
        if isinstance(t0, Tensor) or isinstance(t1, Tensor):
            ends = torch.broadcast_tensors(*(torch.as_tensor(t, **kind) for t in (t0, t1)))
            inputs = torch.stack([*ends, *(torch.full_like(ends[0], limit) for limit in limits)])
        else:
            inputs = torch.tensor([t0, t1, *limits], **kind)
        kernel = field.lend(self, lambda: _kernel(field, self, norm, None))
        slopes, y1, error, measured = kernel(inputs, y0, slope, field.args)
        field.calls += tableau.stages - 1
        following = slopes[-1] if tableau.fsal else None
        again = slope if carry is None and y0.ndim == 1 else None
        dense = self.solver.dense(field, t0, t1, y0, [slope, *slopes])
        return Step(y1, error, dense, following, again, measured=measured)

    def ahead(
        self,
        field: Field,
        control: PID,
        here: Position,
        stop: float,
        until: float,
        closes: bool,
        sign: float,
        most: int,
    ) -> tuple[Position, int, int] | None:
        """Attempts up to a stop if that `closes` the run, else before it and before `until`; at most so many.

        Where they lead, how many they are, how many of them accepted; None where there is nothing to do, or nothing
        that can be done so.
        """
        norm = _norm(field)
        if norm is None or not self.tableau.fsal or control.force or not math.isfinite(here.h):
            return None
        if not closes and _passes(here.t, here.h, stop, until, sign):
            return None
        kernel = field.lend((self, "ahead"), lambda: _kernel(field, self, norm, control))
        e, earlier, rejected = here.memory
        numbers = (
            here.t,
            here.h,
            e,
            earlier,
            rejected,
            stop,
            closes,
            until,
            sign,
            most,
            control.min_step,
            control.max_step,
        )
        inputs = torch.tensor(
            [*numbers, *(field.context.tolerance or ())], dtype=clock(here.y.device), device=here.y.device
        )
        facts, y, slope = kernel(inputs, here.y, here.carry, field.args)
        t, h, e, earlier, rejected, steps, accepted = facts.tolist()
        field.calls += (self.tableau.stages - 1) * int(steps)
        return Position(t, h, (e, earlier, bool(rejected)), y, slope), int(steps), int(accepted)


def _passes(t: Any, h: Any, stop: Any, until: Any, sign: Any) -> Any:
    """Whether a step of this size would get to where it is looked at."""
    return ((t + h * sign - until) * sign >= 0) | (h * STRETCH >= (stop - t) * sign)


def _norm(field: Field) -> RMS | None:
    """The norm, where errors can be measured in a kernel."""
    context = field.context
    numbers = isinstance(context.rtol, float) and isinstance(context.atol, float)
    return context.norm if isinstance(context.norm, RMS) and numbers else None


def _kernel(field: Field, how: Compiled, norm: RMS | None, control: PID | None) -> Kernel:
    """A kernel of this field, made or found: `ahead` with a controller, else `step`."""
    layout, f = field.layout, field.f
    form = "" if layout.plain else repr(rebuild(layout.example, itertools.count()))
    form = form, tuple(layout.shapes), tuple(layout.dtypes)
    control = None if control is None else _unlimited(control)
    name = (id(f.f), f.kind, f.dtype) if isinstance(f, Casting) else id(f)
    key = (name, how.tableau, layout.device, layout.per_sample, form, norm, control, how.options)
    if key not in _kernels:
        attempt = _attempt(f, layout, how.tableau, norm)
        made = _step(attempt) if control is None else _ahead(attempt, control, how.error_order)
        _kernels[key] = f, _compiled(made, layout.device, dict(how.options))  # with f, so that its id stays its own
        if len(_kernels) > _MOST:
            _kernels.popitem(last=False)
    return _kernels[key][1]


@functools.cache
def _unlimited(control: PID) -> PID:
    """Without what a kernel is given at every call."""
    return dataclasses.replace(control, first_step=None, min_step=0.0, max_step=math.inf)


def _compiled(f: Callable[..., Any], device: torch.device, options: dict[str, Any]) -> Kernel:
    """torch.compile, whose failures are errors of ours."""
    if device.type == "cpu":
        _require_compiler()
    f.__code__ = f.__code__.replace()  # torch.compile limits how often one code object is compiled
    kernel = torch.compile(f, options=options, dynamic=False, fullgraph=True)

    def call(*inputs: Any) -> Any:
        try:
            return kernel(*inputs)
        except dynamo_error() as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            reason = next((line for line in lines if line.startswith("Explanation:")), lines[0])
            raise UsageError(
                f"compile: torch.compile cannot take the field: {reason.removeprefix('Explanation: '):.200}",
                "compile=False, or a field of operations on tensors only",
            ) from error

    return call


def _require_compiler() -> None:
    if cpp_compiler() is None:
        raise MissingError(
            "compile: on a CPU torch.compile needs a C++ compiler, and none was found", "install g++, or compile=False"
        )


class _Attempt(NamedTuple):
    slopes: list[Tensor]
    y1: Tensor
    error: Tensor | None
    measured: Tensor | None


def _attempt(f: Callable[..., Any], layout: Layout, tableau: Tableau, norm: RMS | None) -> Callable[..., _Attempt]:
    """One step in operations that can be compiled: (t0, t1, rtol, atol, y0, f(t0, y0), args) -> _Attempt."""
    real, batch, per_sample = layout.real, layout.batch, layout.per_sample
    rows = tuple(tuple(tableau.matrix[i, :i].tolist()) for i in range(1, tableau.stages))
    numbers = rows, tuple(tableau.c[1:]), tableau.fsal, tuple(tableau.b), tuple(tableau.error)
    shape = tuple(layout.shapes[0]) if layout.plain else None

    @torch.compiler.assume_constant_result
    def constants() -> Any:  # not looked at again before every step
        return numbers

    def wide(value: Tensor) -> Tensor:
        return (value[:, None] if value.ndim else value).to(real)

    def moved(slopes: list[Tensor], weights: tuple[float, ...]) -> Tensor:
        total = None
        for slope, weight in zip(slopes, weights, strict=True):
            if weight:
                total = slope * weight if total is None else total + slope * weight
        return torch.zeros_like(slopes[0]) if total is None else total

    def call(t: Tensor, y: Tensor, args: tuple[Any, ...]) -> Tensor:
        t = t.to(real)
        t = t.expand(batch) if per_sample and not t.ndim else t
        if shape is None:
            return layout.flat(f(t, layout.tree(y), *args), "the field's result")
        slope = f(t, y.view(shape), *args)
        return slope.reshape(y.shape) if slope.shape == shape and slope.dtype == y.dtype else layout.flat(slope)

    def attempt(
        t0: Tensor, t1: Tensor, rtol: Tensor, atol: Tensor, y0: Tensor, first: Tensor, args: tuple[Any, ...]
    ) -> _Attempt:
        rows, nodes, fsal, last, wrong = constants()
        h, slopes, y = wide(t1 - t0), [first], y0
        for weights, node in zip(rows, nodes, strict=True):
            y = y0 + h * moved(slopes, weights)
            slopes.append(call(t1 if node == 1 else torch.lerp(t0, t1, node), y, args))
        y1 = y if fsal else y0 + h * moved(slopes, last)
        error = h * moved(slopes, wrong) if wrong else None
        if norm is None or error is None:
            return _Attempt(slopes[1:], y1, error, None)
        scaled = error / (wide(atol) + wide(rtol) * torch.maximum(y0.abs(), y1.abs()))
        return _Attempt(slopes[1:], y1, None, norm(scaled))

    return attempt


def _step(attempt: Callable[..., _Attempt]) -> Kernel:
    def step(inputs: Tensor, y0: Tensor, first: Tensor, args: tuple[Any, ...]) -> _Attempt:
        return attempt(*inputs.unbind(), y0, first, args)

    return step


def _ahead(attempt: Callable[..., _Attempt], control: PID, order: float) -> Kernel:
    """The loop over attempts (see `advance`, whose lines these are for tensors)."""
    loop = while_loop()
    batching = PerSample()

    def ahead(inputs: Tensor, y: Tensor, slope: Tensor, args: tuple[Any, ...]) -> Any:
        def going(go: Tensor, *_: Any) -> Tensor:
            return go.clone()

        def body(
            go: Tensor, t: Any, h: Any, e: Any, earlier: Any, rejected: Any, steps: Any, accepted: Any, y: Any, k: Any
        ) -> Any:
            stop, closes, until, sign, most, least, largest, rtol, atol = inputs[5:].unbind()
            left = (stop - t) * sign
            last = torch.where(left <= largest, h * STRETCH, h) >= left
            size, t1 = torch.where(last, left, h), torch.where(last, stop, t + h * sign)
            made = attempt(t, t1, rtol, atol, y, k, args)
            error = made.measured.to(t.dtype)  # type: ignore[union-attr]
            ok = error <= 1
            factor, memory = control.factor(batching, error, ok, (e, earlier, rejected > 0), order)
            wanted = torch.minimum(torch.maximum(size * factor, least), largest)
            bottom = torch.maximum(t.abs() * FLOOR[t.dtype], least)
            right = (error < math.inf) & (ok | ((wanted >= bottom) & (size > least)))
            done, move, hit = right.to(t.dtype), right & ok, right & ok & last
            t = torch.where(move, t1, t)
            h = torch.where(right & ~(hit & (wanted < h)), wanted, h)
            e, earlier, rejected = (
                torch.where(right, new, old)
                for new, old in zip((*memory[:2], memory[2].to(t.dtype)), (e, earlier, rejected), strict=True)
            )
            steps, accepted = steps + done, accepted + move.to(t.dtype)
            y, k = torch.where(move, made.y1, y), torch.where(move, made.slopes[-1], k)
            there = torch.where(closes > 0, hit, _passes(t, h, stop, until, sign))
            return right & ~there & (steps < most), t, h, e, earlier, rejected, steps, accepted, y, k

        zero = torch.zeros_like(inputs[0])
        given = (zero == 0, *inputs[:5].unbind(), zero, zero, y, slope)
        _, *facts, y, slope = loop(going, body, tuple(v.clone() for v in given))
        return torch.stack(facts), y, slope

    return ahead
