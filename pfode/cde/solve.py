"""`cdesolve`: a controlled differential equation as the ordinary one dz/ds = f(t, z) dX/ds, knots as stops."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pfode.cde.paths import Path
from pfode.errors import UsageError
from pfode.ode.registry import solver_named
from pfode.ode.solution import Solution
from pfode.ode.solve import solve
from pfode.ode.solver import Solver
from pfode.ode.state import Tree, leaves, rebuild

__all__ = ["Driven", "cdesolve", "product"]


def cdesolve(
    f: Any,
    path: Path,
    z0: Tree,
    ts: Tensor | Sequence[float] | None = None,
    *,
    method: str | Solver = "dopri5",
    rtol: Any = 1e-4,
    atol: Any = 1e-6,
    args: tuple[Any, ...] = (),
    **options: Any,
) -> Solution:
    """Solve dz = f(t, z) dX, z(ts[0]) = z0, for the states at ts (Kidger et al. 2020).

    Args:
        f: (t, z, *args) -> shape (*batch, hidden, channels), or an object with `prod`, (t, z, dX, *args) -> f(t, z) dX
            of shape (*batch, hidden), which needs no matrix. t has shape (); where every series has its own times it
            has the batch's shape.
        path: what drives it, of `linear`, `hermite`, `natural` or `rectilinear`. Gradients flow to what it was made of.
        z0: the state, shape (*batch, hidden), or a tree of such tensors, for each of which f has its matrix.
        ts: times, shape (times,), or (*batch, times) for times of each series; None: the times of the observations, at
            the same place in all series: what is padding repeats the last state. Of a rectilinear path the state at an
            observation's time is that after it.
        method: as of `solve`; methods that estimate no error make one step from knot to knot.
        rtol, atol: of `solve`. Paths are rough, so they are wider than its own.
        args: further arguments of f.
        options: of `solve`: adjoint, batch, controller, step_size, ... Steps end at the knots in any case. step_size is
            in units of the path's parameter: time, or pieces where every series has its own times.

    Returns:
        As `solve`; ys has shape (times, *batch, hidden). t, where the solve ended, is the path's parameter.

    Raises:
        UsageError: anything that cannot be carried out as written.
        NumericalError: with throw, a solve that did not get to its end.
    """
    if not isinstance(path, Path):
        raise UsageError(f"path: need a pfode.cde.Path, got {type(path).__name__}", "pfode.cde.hermite(x, t)")
    _refuse_misfit(path, z0)
    if options.get("events") is not None and path.times is not None:
        raise UsageError("events: the path's series have their own times, which events would not see", "events=None")
    per_sample = options.get("batch") == "per-sample"
    s = _parameters(path, ts, per_sample, bool(solver_named(method).error_order))
    given = [] if options.get("step_t") is None else [torch.as_tensor(options.pop("step_t"), device=path.knots.device)]
    knots = path.knots.detach()
    differentiable = any(part.requires_grad for part in leaves(path) if isinstance(part, Tensor))
    if path.smooth and not differentiable:  # adjoint equations jump where the gradient goes to the next piece
        options["step_t"] = torch.cat([knots, *(g.to(knots) for g in given)])
    else:
        jumps = [] if options.get("jump_t") is None else [torch.as_tensor(options["jump_t"], device=knots.device)]
        options["jump_t"] = torch.cat([knots, *(j.to(knots) for j in jumps)])
        options.update({"step_t": given[0]} if given else {})
    options = {"method": method, "rtol": rtol, "atol": atol, **options}
    field = Driven(f, None if differentiable else path)
    args = args if isinstance(args, tuple) else (args,)
    solution = solve(field, z0, s, args=(path, *args) if differentiable else args, **options)
    return dataclasses.replace(solution, ts=s if ts is None else ts)


class Driven(torch.nn.Module):
    """The field f(t, z) dX/ds of a path.

    Args:
        f: as of `cdesolve`.
        path: the path; None: it is the first of the further arguments, so that gradients flow to it.
    """

    def __init__(self, f: Any, path: Path | None):
        super().__init__()
        self.f, self.path, self.prod = f, path, getattr(f, "prod", None)

    def forward(self, s: Tensor, z: Tree, *args: Any) -> Tree:
        path = self.path
        if path is None:
            path, *args = args  # type: ignore[assignment]
        t, dx = path.drive(s)
        if self.prod is not None:
            return self.prod(t, z, dx, *args)
        matrix = self.f(t, z, *args)
        if isinstance(z, Tensor) and isinstance(matrix, Tensor):
            return product(matrix, dx, z)
        pairs = zip(leaves(matrix), leaves(z), strict=True)
        return rebuild(z, iter([product(m, dx, part) for m, part in pairs]))


def product(matrix: Any, dx: Tensor, z: Tensor) -> Tensor:
    """The matrix f(t, z) times dX, shape of z.

    Raises:
        UsageError: a matrix of another shape than (*z.shape, channels).
    """
    if not isinstance(matrix, Tensor) or matrix.shape != (*z.shape, dx.shape[-1]):
        got = f"shape {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
        need = f"{(*z.shape, dx.shape[-1])}"
        raise UsageError(
            f"f: need shape {need} of it, the state's and the path's {dx.shape[-1]} channels, got {got}",
            "f(t, z).view(*z.shape, channels), or an object with prod(t, z, dX)",
        )
    return torch.matmul(matrix, dx.unsqueeze(-1)).squeeze(-1)


def _refuse_misfit(path: Path, z0: Tree) -> None:
    """Raise UsageError for a state and a path that do not go together."""
    for part in leaves(z0):
        if not isinstance(part, Tensor):
            return  # solve says what is wrong
        if part.ndim != len(path.batch) + 1 or part.shape[:-1] != path.batch:
            need = "(" + ", ".join([*map(str, path.batch), "hidden"]) + ")"
            raise UsageError(
                f"z0: need shape {need} for a path of {tuple(path.batch)} series, got {tuple(part.shape)}",
                "one state for each series",
            )
        if part.dtype != path.start.dtype or part.device != path.start.device:
            raise UsageError(
                f"z0: {part.dtype} on {part.device}, and a path in {path.start.dtype} on {path.start.device}",
                "path.to(z0)",
            )


def _parameters(path: Path, ts: Any, per_sample: bool, adaptive: bool) -> Tensor:
    """The path's parameter at the output times: shape (times,), or (batch, times) for steps of each series."""
    if ts is None:
        return path.observations.detach()
    try:
        t = ts if isinstance(ts, Tensor) else torch.as_tensor(ts, dtype=torch.float64, device=path.knots.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"ts: need times, got {ts!r:.60}", "ts=[0.0, 1.0], or None: the observations'") from error
    if path.times is None:
        return t
    if t.ndim not in (1, path.times.ndim) or (t.ndim > 1 and t.shape[:-1] != path.batch) or not t.shape[-1]:
        need = f"(times,) or {(*path.batch, 'times')}".replace("'", "")
        raise UsageError(f"ts: need shape {need}, got {tuple(t.shape)}", "ts=None: the times of the observations")
    t = t.to(path.times.device)
    if path.times.ndim == 1:
        return path.parameter(t)
    s = path.parameter(t if t.ndim > 1 else t.expand(*path.batch, len(t)))
    rows = s.reshape(-1, s.shape[-1])
    if bool((rows == rows[:1]).all()):
        return rows[0]
    if not (per_sample and adaptive) or len(path.batch) > 1:
        raise UsageError(
            "ts: these times lie at different places in the series, which are solved together",
            'batch="per-sample" with an adaptive method and one dimension of batch, or ts=None: the observations',
        )
    return s
