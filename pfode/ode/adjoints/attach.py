"""One autograd node for a solve: `attach` makes states depend on what they came from."""

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode._torch import keeps_graph
from pfode.errors import UsageError
from pfode.ode.adjoints.problem import Cotangents, Inputs, Problem, Tape, Work, detached
from pfode.ode.adjoints.sources import GraphContents, Sources
from pfode.ode.state import leaves

__all__ = ["Attached", "attach"]


class Attached(NamedTuple):
    """States that depend on what they came from.

    Fields:
        ys, end: flat, at the output times and at the end.
        work: what backward passes will have done.
        held: what to do with every tensor made of these before it is handed out; None: nothing.
    """

    ys: Tensor
    end: Tensor
    work: Work
    held: Callable[[Tensor], Tensor] | None = None


def attach(
    problem: Problem, tape: Tape, found: Sources, seen: GraphContents, y: Tensor, ts: Tensor, ys: Tensor, end: Tensor
) -> Attached:
    """The states ys at the output times and at the end, depending on what they came from.

    Args:
        problem, tape: the solve, made without gradients, and what was kept of it.
        found, seen: sources of gradients, and what a FirstCall, or the tape, met.
        y, ts: the initial state and the output times, with their graphs.
    """
    if found.searched:
        named = found.tensors[len(found.places) :]
        known = {id(t) for t in (problem.y, *leaves(problem.field.args), *named)}
        found.tensors.extend(t for t in {id(t): t for t in seen.leaves}.values() if id(t) not in known)
        found = found._replace(shared=seen.older)
    work = Work()
    if not any(t.requires_grad for t in (y, ts, *found.tensors)):
        return Attached(ys, end, work)
    solve = _Solve(problem, tape, found, ys, end, work)
    ys, end = _Node.apply(solve, y, ts, *found.tensors)  # type: ignore[misc]
    return Attached(ys, end, work, lambda value: _Held.apply(solve, value))  # type: ignore[return-value]


@dataclass(eq=False)
class _Solve:
    """What the node needs: a solve that was made, its tape, and the surroundings it was made in.

    It holds the field, which may be a module that keeps the solution: a circle. Python's garbage collector sees one
    that leads from a tensor to the node that made it, but not from one node to another. So the node itself refers to
    the solve weakly; it is the last node of every output (`_Held`) that keeps it alive.
    """

    problem: Problem
    tape: Tape
    sources: Sources
    ys: Tensor
    end: Tensor
    work: Work
    autocast: Any = field(default_factory=lambda: None)

    def __post_init__(self) -> None:
        kind = self.ys.device.type
        self.autocast = functools.partial(
            torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        )

    def release(self) -> None:
        """Let go of the field and of what the tape kept: the graph was freed."""
        del self.problem, self.tape


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, solve: _Solve, y: Tensor, ts: Tensor, *tensors: Tensor) -> Any:  # type: ignore[override]
        ctx.solve = weakref.ref(solve)
        ctx.save_for_backward(y, ts, *tensors)  # refuses tensors that were changed in place meanwhile
        ctx.set_materialize_grads(False)
        ctx.shape, (ys, end) = solve.ys.shape, (solve.ys, solve.end)
        del solve.ys, solve.end
        return ys.detach(), end.clone()  # the tape keeps these, which must not hold the node, nor be changed in place

    @staticmethod
    def backward(ctx: Any, ys: Tensor | None, end: Tensor | None) -> Any:  # type: ignore[override]
        y, ts, *tensors = ctx.saved_tensors
        solve: _Solve = ctx.solve()
        twice = torch.is_grad_enabled()
        given = Cotangents(
            y.new_zeros(ctx.shape) if ys is None else ys.detach(),
            y.new_zeros(y.shape) if end is None else end.detach(),
        )
        need = ctx.needs_input_grad[1:]
        count = len(solve.sources.places)
        used = [t.detach().requires_grad_(t.requires_grad) for t in tensors[:count]] + tensors[count:]
        args = detached(solve.problem.field.args, solve.sources.places, used[:count])
        inputs = Inputs(
            y.detach().requires_grad_(need[0]),
            ts.detach().requires_grad_(need[1]),
            tuple(used),
            args,
            solve.sources.searched,
            solve.sources.shared,
        )
        with torch.no_grad(), solve.autocast():
            made = solve.tape.pull_back(solve.problem, inputs, given, solve.work)
        if not keeps_graph():
            solve.release()
        made = [g if n else None for g, n in zip(made, need, strict=True)]
        for i in range(2, 2 + solve.sources.declared):
            made[i] = torch.zeros_like(tensors[i - 2]) if made[i] is None and need[i] else made[i]
        if twice:
            made = [None if g is None else _Once.apply(g, *given, y, ts, *tensors) for g in made]
        return None, *made


class _Held(torch.autograd.Function):
    """An output as it is, whose node keeps what the backward pass needs until that was there."""

    @staticmethod
    def forward(ctx: Any, solve: _Solve, value: Tensor) -> Tensor:  # type: ignore[override]
        ctx.solve = solve
        return value.detach()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        return None, slope


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated, and says so."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:  # type: ignore[override]
        raise UsageError("this adjoint makes gradients that cannot be differentiated again", 'adjoint="direct"')
