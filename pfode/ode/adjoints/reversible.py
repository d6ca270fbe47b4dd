"""`Reversible`: exact gradients from states that are computed backwards.

Reversible keeps the last state and computes those before it backwards, `solver.back`. Rounding errors grow on the way
where the solution forgets its past; at anchors, every `every` steps and at the start, what came out is compared with
what was there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pfode.errors import NumericalError, UsageError, integer, number
from pfode.ode.adjoints.problem import Cotangents, Inputs, Problem, Work
from pfode.ode.adjoints.replay import BackwardPass, ReplayTape, State, StepRecord

__all__ = ["Reversible", "ReversibleTape"]


@dataclass(frozen=True)
class Reversible:
    """Compute the states backwards too: exact up to rounding, memory that does not grow with the steps.

    Args:
        every: keep a state every so many steps, to begin anew from; None: none but the first and the last.
        tolerance: allowed difference between a state that was kept and what came out, relative to its size, in units of
            the square root of the dtype's rounding.

    Raises:
        UsageError: no positive numbers; a solver that cannot go back.
    """

    every: int | None = None
    tolerance: float = 1.0
    pure = False

    def __post_init__(self) -> None:
        if self.every is not None:
            integer("every", self.every, 1)
        number("tolerance", self.tolerance, 0.0)

    def tape(self, problem: Problem) -> "ReversibleTape":
        if problem.batching.per_sample and any(problem.schedule.jumps):
            raise UsageError('adjoint="reversible": cannot go back over jumps in per-sample mode', 'batch="joint"')
        if not hasattr(problem.solver, "back"):
            raise UsageError(
                f'adjoint="reversible": {problem.solver.name} cannot be stepped backwards exactly',
                'method="reversible-heun", or adjoint="checkpoint"',
            )
        return ReversibleTape(problem, self)


class ReversibleTape(ReplayTape):
    """See `Reversible`."""

    def __init__(self, problem: Problem, how: Reversible):
        super().__init__(problem)
        self.how, self.anchors = how, {0: self.start}
        self.last = self.start

    def keep(self, state: State) -> None:
        self.last = state
        if self.fresh is True or (self.how.every is not None and len(self.records) % self.how.every == 0):
            self.anchors[len(self.records)] = state

    def pull_back(self, problem: Problem, inputs: Inputs, given: Cotangents, work: Work) -> list[Tensor | None]:
        back = BackwardPass(self, problem, inputs, given, work)
        state = self.last
        for i in range(len(self.records) - 1, -1, -1):
            record = self.records[i]
            y, carry = problem.solver.back(back.quick, record.u0, record.u1, state.y, state.carry)  # type: ignore[attr-defined]
            before = State(y, carry)
            if record.accepted is not None:
                before = State(
                    *(self.batching.merge(record.accepted, new, old) for new, old in zip(before, state, strict=True))
                )
            state = before
            if i in self.anchors:
                self._compare(problem, record, state.y, self.anchors[i].y)
                state = self.anchors[i]
            back.pull(i, i + 1, state)
        return back.result()

    def _compare(self, problem: Problem, record: StepRecord, y: Tensor, kept: Tensor) -> None:
        wrong = float((y - kept).abs().max() / kept.abs().max().clamp(min=torch.finfo(kept.dtype).tiny))
        most = self.how.tolerance * torch.finfo(kept.dtype).eps ** 0.5
        if not wrong <= most:
            t0 = float(torch.as_tensor(record.t0, device="cpu").flatten()[0])
            raise NumericalError(
                f"reversible: the state at t = {t0:.6g} came out wrong by "
                f"{wrong:.1e} of its size, more than {most:.1e}: rounding errors grow on the way back, or the field "
                "changed since the solve",
                'Reversible(every=...) with fewer steps between anchors, float64, or adjoint="checkpoint" or "direct"',
            )
