"""A pipeline's run in progress: the row it is at, and what the rows look back on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pfode.errors import UsageError
from pfode.plans.rows import Row, Sums, add, combine, with_noise
from pfode.plans.table import Plan
from pfode.process import float64
from pfode.samplers.adapters.conventions import Convention
from pfode.samplers.adapters.rows import Table
from pfode.samplers.adapters.timesteps import Timesteps

__all__ = ["Adjust", "Run"]

Adjust = Callable[[Row, Tensor, Tensor], Tensor]  # (row, state, output) -> output
Restart = Callable[[list[float], float | None], Plan]  # (nodes, eta) -> the plan of the same recipe over them


class Run:
    """A pipeline's run in progress: where it is, and what its rows look back on.

    Args:
        plan, kind: what is run, and for which kind of network.
        restart: makes the plan of the same recipe over other nodes; None where there is no way, as for a saved plan.
        adjust: what is done to the network's output before it is used (channels left out, its denoiser clipped).
    """

    def __init__(
        self,
        plan: Plan,
        kind: Convention,
        restart: Restart | None,
        device: torch.device | str | None,
        adjust: Adjust | None,
    ):
        self.plan, self.kind, self.restart = plan, kind, restart
        self.whole = Table(plan, kind)
        self.schedule = self.own = Timesteps(kind.timestep(plan.t), plan.node[:-1], kind.counts, device)
        self.sigmas = kind.sigma(plan.alpha, plan.sigma).to(torch.float32)
        self.begin_index: int | None = None
        self.begun = False
        self.adjust = adjust
        self.eta: float | None = None
        self.seeds: list[int] | None = None
        self.begin_at(0)

    @property
    def timesteps(self) -> Tensor:
        """The time that the network is to be given in every row, in its own units."""
        return self.schedule.values

    def begin_at(self, i: int) -> None:
        """Begin at row i, with nothing to look back on.

        Raises:
            UsageError: an inner stage, or a plan whose later rows cannot do without the earlier ones.
        """
        table, offset = self.whole, 0
        if i < self.plan.nfe and not table.begins_at(i):
            table, offset = self._from(i), i
        self._enter(i, table, offset)

    def _enter(self, i: int, table: Table, offset: int, schedule: Timesteps | None = None) -> None:
        """Set the position to row i, which is row i - offset of this table; `schedule` replaces the plan's own."""
        self.position, self.table, self.offset = i, table, offset
        self.schedule = schedule or self.own
        self.dense: Tensor | None = None
        self.forget()
        self.fit(torch.empty((), dtype=torch.float32, device=self.timesteps.device))

    def forget(self) -> None:
        """Drop what earlier rows added to the states to come, and the state that was returned."""
        self.sums: Sums = [None] * self.table.window
        self.given: Tensor | None = None
        self.state: Tensor | None = None
        self.version: int | None = None

    def _from(self, i: int) -> Table:
        """The rows from i on, of a plan made to begin there."""
        plan, step = self.plan, int(self.plan.step[i])
        if not plan.node[i]:
            problem = f"{plan.name}: call {i} is an inner stage of step {step}, a run cannot begin there"
            raise UsageError(problem, 'a recipe of one call per step, or on flows one with chart="flow"')
        made = None if self.restart is None else self.restart(plan.times[step:].tolist(), self.eta)
        if made is None or made.nfe != plan.nfe - i or not torch.allclose(made.t, plan.t[i:], rtol=1e-9, atol=1e-9):
            problem = f"{plan.name}: a run cannot begin with call {i}: what later rows look back on is missing"
            raise UsageError(problem, "begin with the first timestep, or choose another recipe")
        return Table(made, self.kind)

    def _begin_between(self, value: float) -> None:
        """Begin at a timestep of no row, and go on to the next node below it.

        A level below the last node is taken as that of the last step. The inner stages of the first step, if it has
        any, have timesteps of their own then, which are those of the run.

        Raises:
            UsageError: beyond the process's range, a saved plan, or a recipe that has other calls from there on.
        """
        plan, times = self.plan, self.plan.times.tolist()
        timestep = float64(value)
        t = self.kind.time(timestep)
        if not torch.allclose(self.kind.timestep(t), timestep, rtol=1e-6) or t > plan.process.t_max * (1 + 1e-6):
            problem = f"timestep: {value:g} lies outside those that the network was trained for"
            raise UsageError(problem, "one of scheduler.timesteps")
        t = max(float(t), plan.process.t_min)
        falls = times[0] > times[-1]
        step = sum(1 for node in times[1:-1] if (node >= t if falls else node <= t))
        i = int((plan.step == step).nonzero()[0])
        beyond = t <= times[-1] if falls else t >= times[-1]
        if beyond or abs(t - times[step]) < 1e-9 * max(1.0, abs(t)):
            return self.begin_at(i)
        made = None if self.restart is None else self.restart([t, *times[step + 1 :]], self.eta)
        if made is None or made.nfe != plan.nfe - i:
            problem = f"{plan.name}: a run cannot begin at timestep {value:g}, between its nodes"
            raise UsageError(problem, "one of scheduler.timesteps")
        later = torch.cat([self.own.host[:i], self.kind.timestep(made.t).float()])
        self._enter(
            i, Table(made, self.kind), i, Timesteps(later, self.own.node, self.kind.counts, self.own.values.device)
        )

    def with_eta(self, eta: float) -> None:
        """Begin with another eta at the row where the run is; the nodes stay.

        Raises:
            UsageError: a recipe that takes no eta, one whose timesteps depend on it, a saved plan, or an inner stage.
        """
        if self.restart is None:
            raise UsageError(f"eta = {eta:g}: the plan {self.plan.name!r} has its own noise", "leave eta out")
        plan = self.restart(self.plan.times.tolist(), eta)
        if not torch.equal(plan.t, self.plan.t):
            problem = f"eta = {eta:g}: the timesteps of {plan.name} depend on eta, and are set by now"
            raise UsageError(problem, f'from_config(..., options={{"eta": {eta:g}}}), and no eta in the call')
        self.plan, self.eta, self.whole = plan, eta, Table(plan, self.kind)
        self.begin_at(self.position)

    def fit(self, x: Tensor) -> None:
        """The rows in the dtype and on the device of a state."""
        if self.dense is not None and self.dense.dtype is x.dtype and self.dense.device == x.device:
            return
        self.dense = self.table.columns.to(x.dtype).to(x.device)
        rows = [factors.unbind() for factors in self.dense.unbind()]
        self.rows = [self.table.row(k, factors) for k, factors in enumerate(rows)]

    def nearest(self, timestep: Any) -> int:
        """The row at which a run can begin, of the timestep next to this one."""
        value, row = self.schedule.find(timestep, self.position)
        if row is not None:
            return row
        away = (self.schedule.host.double() - value).abs()
        begins = self.plan.node[:-1].clone()
        if self.restart is None:
            begins &= torch.tensor([self.whole.begins_at(i) for i in range(self.plan.nfe)], device="cpu")
        return int(torch.where(begins, away, torch.inf).argmin())

    def place(self, timestep: Any) -> None:
        """Go to the row of this timestep, where the run is at another.

        Raises:
            UsageError: in the midst of a run, a timestep of none of its rows.
        """
        index, fresh = self.schedule.alias(timestep), not self.begun or self.position == self.plan.nfe
        if index is None:
            value, index = self.schedule.find(timestep, self.position)
            if fresh and index not in (None, self.position) and not self.plan.node[index]:
                index = None  # a run does not begin with an inner stage
            if index is None:
                if not fresh or self.begin_index is not None:
                    problem = f"timestep: {value:g} is none of the scheduler's ({self.schedule.host[0]:g} ...)"
                    raise UsageError(problem, "one of scheduler.timesteps, or set_timesteps(timesteps=[...]) before")
                self._begin_between(value)
                index = self.position
        if index != self.position:
            self.begin_at(index)
        self.begun = True

    def advance(self, row: Row, x: Tensor, out: Tensor, noise: Tensor) -> Tensor:
        """The state after a row, from that before it, the network's output and the row's noise, of which none is kept.

        The caller may write over all of them, and over what it is given.
        """
        add(self.sums, x, row.state)
        made = combine(self.sums, row, x, out)
        return with_noise(self.sums, row, made, noise) if row.draws else made
