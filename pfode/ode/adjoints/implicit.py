"""Gradients at fixed points: `Implicit`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pfode.errors import NumericalError, UsageError, number
from pfode.ode.adjoints.problem import Cotangents, Inputs, Problem, Tape, Work, replay_field
from pfode.ode.adjoints.sources import refuse_unknown
from pfode.ode.methods.newton import jacobian
from pfode.ode.records import End

__all__ = ["Implicit"]


@dataclass(frozen=True)
class Implicit:
    """The last state is a fixed point, f(t1, y1, p) = 0: dL/dp = -(dL/dy1) (df/dy)^-1 df/dp.

    The path there does not matter: neither the initial state nor the times have a gradient, and no other output may be
    used. Memory is that of the Jacobian, by blocks where the field acts on rows.

    Args:
        tolerance: how far from the fixed point the state may be, by a Newton step, relative to its size.

    Raises:
        UsageError: no positive number.
    """

    tolerance: float = 1e-3
    pure = False

    def __post_init__(self) -> None:
        number("tolerance", self.tolerance, 0.0)

    def tape(self, problem: Problem) -> "_FixedPoint":
        return _FixedPoint(self)


class _FixedPoint(Tape):
    """The last state of a solve."""

    def __init__(self, how: Implicit):
        self.how = how

    def finish(self, ys: Tensor, end: End) -> None:
        self.end = end

    def pull_back(self, problem: Problem, inputs: Inputs, given: Cotangents, work: Work) -> list[Tensor | None]:
        if len(given.ys) < 2 or given.ys[1:-1].any():
            raise UsageError('adjoint="implicit": only the last state has a gradient', "ts=(t0, t1), and sol.ys[-1]")
        field = replay_field(problem, inputs.args, pure=True)
        y, t = self.end.y, field.time(self.end.t)
        rows, blocks = jacobian(field, t, y)
        with torch.enable_grad():
            slope = field(t, y)
        wrong = torch.linalg.solve_ex(blocks, rows.pack(slope.detach())[..., None])[0]
        far = float(wrong.abs().max() / y.abs().max().clamp(min=torch.finfo(wrong.dtype).tiny))
        if not far <= self.how.tolerance:
            raise NumericalError(
                f"implicit: the state at t = {float(t.flatten()[0]):.6g} is no fixed point: a Newton step from there "
                f"has {far:.1e} of its size",
                "a later ts[-1]",
            )
        cotangent = rows.pack(given.ys[-1] + given.end)[..., None]
        a = rows.unpack(-torch.linalg.solve_ex(blocks.mT, cotangent)[0][..., 0])
        into = [x for x in inputs.tensors if x.requires_grad]
        made = iter(())
        if slope.requires_grad:
            if inputs.searched:
                refuse_unknown([slope], into)
            made = iter(
                torch.autograd.grad(slope, into, a.view_as(slope), retain_graph=inputs.shared, allow_unused=True)
            )
        work.nfe += field.calls
        found = [next(made, None) if x.requires_grad else None for x in inputs.tensors]
        return [given.ys[0].clone(), torch.zeros_like(problem.ts), *found]
