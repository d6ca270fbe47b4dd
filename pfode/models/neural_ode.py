"""Neural ODEs as layers (Chen et al. 2018), with further dimensions (Dupont et al. 2019) and regularisers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfode.errors import UsageError, integer, unknown
from pfode.flow.divergence import Exact, Hutchinson, divergence, signs
from pfode.models.spectral import bound_spectral_norm
from pfode.ode import Solution, solve

__all__ = ["JACOBIANS", "AugmentedNeuralODE", "NeuralODE", "Run", "VectorField"]

JACOBIANS = ("hutchinson", "exact")


class VectorField(torch.nn.Module):
    """A network as a field: f(t, y) = net(y), or net([y, t]) with the time as one more feature (channel).

    Args:
        network: y of shape (batch, d, ...), or (batch, d + 1, ...) with the time, to (batch, d, ...).
        timed: whether the network is given the time.
    """

    def __init__(self, network: torch.nn.Module, timed: bool = False):
        super().__init__()
        self.network, self.timed = network, timed

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if not self.timed:
            return self.network(y)
        column = t.to(y.dtype).reshape(-1, *[1] * (y.ndim - 1)).expand(len(y), 1, *y.shape[2:])
        return self.network(torch.cat([y, column], 1))


@dataclass(frozen=True, eq=False)
class Run:
    """What `NeuralODE.run` returns.

    Attributes:
        y: the state at the end, shape of x.
        kinetic, jacobian: the regularisers of every sample, shape (batch,): zero where they were not asked for.
        solution: the solve they come from.
    """

    y: Tensor
    kinetic: Tensor
    jacobian: Tensor
    solution: Solution

    @property
    def nfe(self) -> int:
        """Evaluations of the field, of the sample that took most."""
        return int(torch.as_tensor(self.solution.stats.nfe, device="cpu").max())


class NeuralODE(torch.nn.Module):
    """The layer x -> y(t1) with dy/dt = f(t, y), y(t0) = x.

    With method="euler" and step_size = 1/L on ts = (0, 1) it is the ResNet y_{l+1} = y_l + f(l/L, y_l)/L of L blocks.

    The regularisers of Finlay et al. (2020, eq. 8 to 11) are integrals along the trajectory, which `run` returns for
    the loss:

        kinetic   int |f|^2 dt          straight trajectories at constant speed
        jacobian  int |df/dy|_F^2 dt    fields that change little from place to place: fewer steps

    They are integrated with the state, but the steps are chosen for the state alone.

    Args:
        field: f(t, y) -> dy/dt, y of shape (batch, ...); t has shape (), or (batch,) with batch="per-sample".
        ts: t0 and t1, or further times between, for `trajectory`.
        kinetic: whether `run` integrates |f|^2.
        jacobian: how it integrates |df/dy|_F^2: "hutchinson", |e^T df/dy|^2 with one random sign vector e per call;
            "exact", which costs as many products as the state has elements; None: not at all.
        spectral_norm: bound of the spectral norm of every weight of the field, see `bound_spectral_norm`.
        options: of `pfode.solve`: method, rtol, atol, adjoint, batch, step_size, ...

    Raises:
        UsageError: unknown names; options that `solve` refuses, at the first call.
    """

    def __init__(
        self,
        field: Callable[[Tensor, Tensor], Tensor],
        ts: Sequence[float] = (0.0, 1.0),
        *,
        kinetic: bool = False,
        jacobian: str | None = None,
        spectral_norm: float | None = None,
        **options: Any,
    ):
        super().__init__()
        if jacobian is not None and jacobian not in JACOBIANS:
            raise unknown("jacobian", jacobian, JACOBIANS)
        if spectral_norm is not None:
            if not isinstance(field, torch.nn.Module):
                raise UsageError(f"spectral_norm: needs a module, got {type(field).__name__}", "spectral_norm=None")
            bound_spectral_norm(field, spectral_norm)
        self.field, self.ts, self.options = field, tuple(ts), options
        self.kinetic, self.jacobian = kinetic, jacobian

    def forward(self, x: Tensor) -> Tensor:
        """The state at ts[-1], shape of x."""
        return self.run(x, regularised=False).y

    def trajectory(self, x: Tensor) -> Tensor:
        """The states at ts, shape (times, *x.shape)."""
        return solve(self.field, self.start(x), self.ts, **self.options).ys

    def run(self, x: Tensor, regularised: bool = True) -> Run:
        """The state at ts[-1] with the regularisers that were asked for."""
        y = self.start(x)
        nothing = y.new_zeros(len(y))
        if not regularised or not (self.kinetic or self.jacobian):
            found = solve(self.field, y, self.ts, **self.options)
            return Run(found.ys[-1], nothing, nothing, found)
        probe = signs(y, 1)
        along = _Regularised(self.field, self.kinetic, self.jacobian)
        options = {"norm": _first_leaf(self.options.get("batch") == "per-sample"), **self.options}
        found = solve(along, (y, nothing, nothing), self.ts, args=(probe,), **options)
        y, kinetic, size = (leaf[-1] for leaf in found.ys)
        return Run(y, kinetic, size, found)

    def start(self, x: Tensor) -> Tensor:
        """The state at ts[0]."""
        return x


class AugmentedNeuralODE(NeuralODE):
    """A NeuralODE with further features (channels) that begin at zero (Dupont, Doucet & Teh 2019).

    Its trajectories may pass each other in the new dimensions: it represents maps, such as those that take nested
    spheres apart, that no ODE in the dimensions of the data does, as trajectories never cross.

    Args:
        field: f(t, y) of the larger state, shape (batch, d + extra, ...).
        extra: how many.
        ts, options: as for NeuralODE. The layer returns the larger state.
    """

    def __init__(self, field: Callable[[Tensor, Tensor], Tensor], extra: int, *args: Any, **options: Any):
        super().__init__(field, *args, **options)
        self.extra = integer("extra", extra, 1)

    def start(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(len(x), self.extra, *x.shape[2:])], 1)


class _Regularised(torch.nn.Module):
    """The field of (y, int |f|^2, int |df/dy|^2)."""

    def __init__(self, field: Callable[[Tensor, Tensor], Tensor], kinetic: bool, jacobian: str | None):
        super().__init__()
        self.field, self.kinetic, self.jacobian = field, kinetic, jacobian

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor, Tensor], probe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, nothing, _ = state
        if self.jacobian is None:
            slope, size = self.field(t, y), torch.zeros_like(nothing)
        else:
            how, vectors = (Exact(), None) if self.jacobian == "exact" else (Hutchinson(), probe)
            found = divergence(lambda y: self.field(t, y), y, how, vectors)
            slope, size = found.value, found.square
        energy = slope.square().flatten(1).sum(1) if self.kinetic else torch.zeros_like(nothing)
        return slope, energy, size


def _first_leaf(per_sample: bool) -> Callable[[Any], Tensor]:
    """The root mean square of the state's error, without those of the regularisers."""
    if per_sample:
        return lambda error: error[0].flatten(1).square().mean(1).sqrt()
    return lambda error: error[0].square().mean().sqrt()
