"""Compiled steps: an explicit Runge-Kutta step, the field and the error's norm included, under torch.compile.

Times and tolerances are inputs of it, so no step compiles another; another field, shape or dtype does.
"""

import collections
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfode.errors import UsageError
from pfode.ode.adjoint import Sighting
from pfode.ode.explicit import RungeKutta
from pfode.ode.solver import RMS, Solver, Step, Time, clock
from pfode.ode.state import Field, Layout, rebuild
from pfode.ode.tableau import Tableau

_MOST = 64  # compiled steps that are kept
_OPTIONS = (
    ("cpp.use_decompose_tanh", True),
)  # on a CPU, where the compiler's own tanh takes six times as long as eager

Kernel = Callable[..., tuple[list[Tensor], Tensor, Tensor | None, Tensor | None]]
_kernels: collections.OrderedDict[Any, tuple[Any, Kernel]] = collections.OrderedDict()


@dataclass(frozen=True, eq=False)
class Compiled:
    """An explicit Runge-Kutta method whose steps are compiled with the field: the same numbers up to rounding.

    The first step of a field takes seconds to a minute. The field must be one that torch.compile can follow.

    Args:
        solver: the method.
        options: torch.compile's, as pairs.

    Raises:
        UsageError: a method of another kind.
    """

    solver: Solver
    options: tuple[tuple[str, Any], ...] = _OPTIONS

    def __post_init__(self) -> None:
        if not isinstance(self.solver, RungeKutta):
            raise UsageError(f"compile: {self.solver.name} is no explicit Runge-Kutta method", 'method="dopri5"')

    @property
    def name(self) -> str:
        return self.solver.name

    @property
    def order(self) -> int:
        return self.solver.order

    @property
    def error_order(self) -> int:
        return self.solver.error_order

    def init(self, field: Field, t: Time, y: Tensor, slope: Tensor | None = None) -> Tensor | None:
        return self.solver.init(field, t, y, slope)

    def step(self, field: Field, t0: Time, t1: Time, y0: Tensor, carry: Tensor | None) -> Step:
        assert isinstance(self.solver, RungeKutta)
        tableau = self.solver.tableau
        slope = field(field.time(t0), y0).clone() if carry is None else carry
        rtol, atol = field.tolerance or (None, None)
        measures = isinstance(field.norm, RMS) and isinstance(rtol, float) and isinstance(atol, float)
        limits: tuple[Any, Any] = (rtol, atol) if measures else (0.0, 1.0)
        kind: dict[str, Any] = {"dtype": clock(y0.device), "device": y0.device}
        if isinstance(t0, Tensor) or isinstance(t1, Tensor):
            ends = torch.broadcast_tensors(*(torch.as_tensor(t, **kind) for t in (t0, t1)))
            inputs = torch.stack([*ends, *(torch.full_like(ends[0], limit) for limit in limits)])
        else:
            inputs = torch.tensor([t0, t1, *limits], **kind)
        norm = field.norm if measures else None
        kernel = field.lend(self, lambda: _kernel(field, tableau, y0.dtype, norm, self.options))
        slopes, y1, error, measured = kernel(inputs, y0, slope, field.args)
        field.calls += tableau.stages - 1
        following = slopes[-1] if tableau.fsal else None
        again = slope if carry is None and y0.ndim == 1 else None
        dense = self.solver.dense(field, t0, t1, y0, [slope, *slopes])
        return Step(y1, error, dense, following, again, measured=measured)


def _kernel(
    field: Field, tableau: Tableau, dtype: torch.dtype, norm: Any, options: tuple[tuple[str, Any], ...]
) -> Kernel:
    """The compiled step of this field, made or found."""
    layout, f = field.layout, field.f
    f = f.f if isinstance(f, Sighting) else f  # that has seen by now what it wanted to
    form = repr(rebuild(layout.example, itertools.count())), tuple(layout.shapes), tuple(layout.dtypes)
    key = (id(f), tableau, dtype, layout.device, layout.per_sample, form, norm, options)
    if key not in _kernels:
        _kernels[key] = f, _compiled(f, layout, tableau, norm, dict(options))  # with f, so that its id stays its own
        if len(_kernels) > _MOST:
            _kernels.popitem(last=False)
    return _kernels[key][1]


def _compiled(f: Callable[..., Any], layout: Layout, tableau: Tableau, norm: Any, options: dict[str, Any]) -> Kernel:
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

    def step(inputs: Tensor, y0: Tensor, first: Tensor, args: tuple[Any, ...]) -> Any:
        rows, nodes, fsal, last, wrong = constants()
        t0, t1, rtol, atol = inputs.unbind()
        h, slopes, y = wide(t1 - t0), [first], y0
        for weights, node in zip(rows, nodes, strict=True):
            y = y0 + h * moved(slopes, weights)
            slopes.append(call(t1 if node == 1 else torch.lerp(t0, t1, node), y, args))
        y1 = y if fsal else y0 + h * moved(slopes, last)
        error = h * moved(slopes, wrong) if wrong else None
        if norm is None or error is None:
            return slopes[1:], y1, error, None
        return slopes[1:], y1, None, norm(error / (wide(atol) + wide(rtol) * torch.maximum(y0.abs(), y1.abs())))

    step.__code__ = step.__code__.replace()  # torch.compile limits how often one code object is compiled
    return torch.compile(step, options=options, dynamic=False, fullgraph=True)
