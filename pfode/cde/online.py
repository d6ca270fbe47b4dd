"""`Online`: a controlled differential equation fed observation by observation."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pfode.cde.paths import hermite, linear, rectilinear
from pfode.cde.solve import cdesolve
from pfode.errors import UsageError, unknown
from pfode.ode.registry import solver_named
from pfode.ode.solver import OfTableau
from pfode.ode.state import leaves, rebuild

__all__ = ["PATHS", "Online"]

PATHS = {"rectilinear": rectilinear, "linear": linear, "hermite": hermite}
"""The paths that go up to an observation without knowing what comes after it."""
_KEPT = 4  # observations: the cubic on the left of the last piece has a slope from the piece before


class Online:
    """The states of `cdesolve`, one observation at a time, the same numbers bit for bit as those of the whole series.

        stream = Online(f, path="rectilinear", time=0)
        for t, x in feed:
            z = stream.observe(t, x, z0)       # z0 is looked at with the first observation only

    Args:
        f: as of `cdesolve`.
        path: "rectilinear", where values may be missing, "linear" or "hermite". (A natural spline needs the future.)
        time: the channel that is the time, of a rectilinear path.
        method: a Runge-Kutta method of fixed steps, made from knot to knot.
        args: further arguments of f.

    Attributes:
        z: the state after the last observation; None before the first.
        count: how many observations there were.

    Raises:
        UsageError: names that are unknown; a method with steps of its own choice, as they would depend on what follows.
    """

    def __init__(
        self,
        f: Any,
        *,
        path: str = "rectilinear",
        time: int | None = None,
        method: Any = "rk4",
        args: tuple[Any, ...] = (),
    ):
        if path not in PATHS:
            raise unknown("path", path, PATHS)
        solver = solver_named(method)
        if solver.error_order or not isinstance(solver, OfTableau):
            why = "chooses its steps" if solver.error_order else "looks back over several steps"
            raise UsageError(f"method: {solver.name} {why}, which may lie between observations", 'method="rk4"')
        if time is not None and path != "rectilinear":
            raise UsageError(f"time: a channel of a rectilinear path, not of a {path} one", 'path="rectilinear"')
        self.f, self.path, self.time, self.method, self.args = f, path, time, method, args
        self.z: Any = None
        self.count = 0
        self._x: list[Tensor] = []
        self._t: list[float] = []

    def observe(self, t: float | Tensor, x: Tensor, z0: Any = None) -> Any:
        """The state after one more observation.

        Args:
            t: its time, later than the last one.
            x: shape (*batch, channels); NaN where missing, of a rectilinear path.
            z0: the state at the first observation, shape (*batch, hidden).

        Raises:
            UsageError: a time that is not later, a shape that has changed, values missing where they may not, no z0.
        """
        t = float(t)
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.ndim:
            raise UsageError(f"x: need real numbers of shape (*batch, channels), got {x!r:.60}")
        if self._t and not t > self._t[-1]:
            raise UsageError(f"t: need a time after {self._t[-1]:g}, got {t:g}", "observations in their order")
        if self._x and x.shape != self._x[-1].shape:
            raise UsageError(f"x: need shape {tuple(self._x[-1].shape)} as before, got {tuple(x.shape)}")
        missing = torch.isnan(x)
        if self.path != "rectilinear" and bool(missing.any()):
            raise UsageError(f"x: values are missing, which a {self.path} path cannot know yet", 'path="rectilinear"')
        before = self._x[-1] if self._x else torch.zeros_like(x)
        x = torch.where(missing, before, x)
        if not self._t:
            if z0 is None or not list(leaves(z0)):
                raise UsageError("z0: the first observation needs the state there", "stream.observe(t, x, z0)")
            self.z = z0
        self._t, self._x = [*self._t[1 - _KEPT :], t], [*self._x[1 - _KEPT :], x]
        self.count += 1
        if self.count > 1:
            self.z = self._go()
        return self.z

    def _go(self) -> Any:
        """The state at the last observation, from the one at that before: a path of the last piece or two, whose
        parameters are those of the whole series'."""
        x, t = (
            torch.stack(self._x, -2),
            torch.tensor(self._t, dtype=self._x[-1].dtype, device="cpu").to(self._x[-1].device),
        )
        if self.path == "rectilinear":
            path = rectilinear(x[..., -2:, :], t[-2:], time=self.time)
            path, ts = replace(path, knots=path.knots + 2 * (self.count - 2)), None
        else:
            path = PATHS[self.path](x, t)
            ts = path.knots[-2:]
        ys = cdesolve(self.f, path, self.z, ts, method=self.method, args=self.args).ys
        return rebuild(ys, iter([part[-1] for part in leaves(ys)]))
