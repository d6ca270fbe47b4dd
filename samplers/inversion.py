"""Encoding and decoding: from data to noise and back along the PF-ODE, by plans (idea C).

A deterministic recipe encodes by its plan on the reversed grid; what decoding then misses falls with the steps. One
with r' (O-BELM, BDIA, EDICT) is exactly invertible: its rows y_{k+1} = r_k y_k + r'_k y_{k-1} + b_k m_k, solved for
y_{k-1}, are the rows of another plan, `inverse`, which undoes them to rounding.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode.denoiser import Denoiser
from pfode.errors import UsageError, integer
from pfode.grids import Grid
from pfode.plan import Plan, find_bad, iterate, not_finite, row_affine
from pfode.samplers.catalogue import Recipe, make_plan
from pfode.samplers.sampling import (
    DEFAULT_BATCH,
    DEFAULT_STEPS,
    _labels,
    _not_finite,
    _state_dtype,
    find_device,
    prepared,
    sample,
)


class Pair(NamedTuple):
    """What an exactly invertible recipe encodes to: its state 1 (x) and its state 0 (previous), each (n, *shape).

    In float64: decoding magnifies what a float32 pair has lost, 2e4-fold for BDIA in 20 steps of EDM, until it shows.
    """

    x: Tensor
    previous: Tensor


def encode(
    denoiser: Denoiser,
    x: Tensor,
    steps: int | None = None,
    sampler: str | Recipe = "auto",
    *,
    nfe: int | None = None,
    grid: Any = None,
    chart: str | None = None,
    plan: Plan | None = None,
    start: float | None = None,
    stop: float | None = None,
    label: int | str | Sequence[int | str] | Tensor | None = None,
    guidance: float | None = None,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Tensor | Pair:
    """The noise from which `decode`, with the same arguments, makes the data again.

    Args:
        x: data, shape (n, *shape), taken to be at the time `stop` (the process's t_min).
        steps, nfe, sampler, grid, chart, start, stop, options: of the plan that decodes, see `make_plan` (20 steps when
            none is given), which ends at t_min or `stop`, not at clean data.
        plan: instead, a ready one: for an exactly invertible recipe the one that decodes, else one whose times rise.
        label, guidance, batch, dtype, device: see `sample`; a pair is in float64 whatever the dtype.

    Returns:
        the state at the first time (t_max, or `start`), shape (n, *shape); of exactly invertible recipes the `Pair` of
        their first two states, from which decode returns x to rounding where the network gives the same outputs again
        (kernels that are deterministic, and the same batch).

    Raises:
        UsageError: a stochastic sampler, a plan that leads the wrong way or ends at clean data, options that cannot be
            carried out; NumericalError: a sample that is not finite.
    """
    denoiser = prepared(denoiser, guidance, device)
    made = _plan(denoiser, plan, sampler, steps, nfe, grid, chart, start, stop, options)
    if made.r_prev.any():
        end = _carried(denoiser, inverse(made), Pair(x, x), label, batch, device)
        return Pair(end.previous, end.x)
    if _falls(made):
        if plan is not None:
            hint = "make_plan(sampler, process, grid=plan.times.flip(0))"
            raise UsageError(f"plan {made.name!r} leads from noise to data: encode needs one whose times rise", hint)
        if made.sigma[-1] == 0:
            hint = f"end the times at t_min = {denoiser.process.t_min:g}"
            raise UsageError(f"plan {made.name!r} ends at clean data, where no denoiser is evaluated", hint)
        named = made.meta["sampler"] if sampler == "auto" else sampler
        made = make_plan(named, denoiser.process, grid=made.times.flip(0), chart=chart, **options)
    return sample(denoiser, x=x, plan=made, label=label, batch=batch, dtype=dtype, device=device).x


def decode(
    denoiser: Denoiser,
    z: Tensor | tuple[Tensor, Tensor],
    steps: int | None = None,
    sampler: str | Recipe = "auto",
    *,
    nfe: int | None = None,
    grid: Any = None,
    chart: str | None = None,
    plan: Plan | None = None,
    start: float | None = None,
    stop: float | None = None,
    label: int | str | Sequence[int | str] | Tensor | None = None,
    guidance: float | None = None,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Tensor:
    """The data of which z is the noise: what `encode`, with the same arguments, returned.

    Args:
        z: states at the first time, shape (n, *shape); for exactly invertible recipes the `Pair` that encode returned.
        plan: instead of what settles it, a ready one, whose times fall. The others are those of `encode`.

    Returns:
        the state at the time `stop` (t_min), shape (n, *shape).

    Raises:
        UsageError: as `encode`; a pair for a recipe that takes none, or the other way round. NumericalError.
    """
    denoiser = prepared(denoiser, guidance, device)
    made = _plan(denoiser, plan, sampler, steps, nfe, grid, chart, start, stop, options)
    if not _falls(made):
        raise UsageError(f"plan {made.name!r} leads from data to noise: decode needs one whose times fall")
    if made.r_prev.any() != (isinstance(z, tuple) and len(z) == 2):
        takes = "the pair of its first two states" if made.r_prev.any() else "one state"
        raise UsageError(f"{made.name} decodes {takes}", "z = encode(...), with the sampler that is to decode it")
    if not isinstance(z, tuple):
        return sample(denoiser, x=z, plan=made, label=label, batch=batch, dtype=dtype, device=device).x
    _check_invertible(made)
    k = torch.arange(1, made.nfe)
    onward = _chain(made, torch.arange(1, made.nfe + 1), made.t[k], made.r[k], made.r_prev[k], made.b[k, :1])
    return _carried(denoiser, onward, Pair(*z), label, batch, device).x.to(_state_dtype(dtype, z[0]))


def inverse(plan: Plan) -> Plan:
    """The plan that walks an exactly invertible one back, from its last state to its first, a row each.

    Row k of the plan, solved for y_{k-1}, is y_{k-1} = (y_{k+1} - r_k y_k - b_k m_k) / r'_k, k = n - 1 ... 1, with m_k
    evaluated at y_k as before. At the end of the data that needs y_n and y_{n-1}:
    - one state per node (O-BELM, BDIA): y_{n-1} is made of y_n by a row of DDIM inversion, as their authors do it;
    - an inner stage between nodes (EDICT): it is the second copy, and equal to y_n where the two copies are.

    Sources: Wang et al. 2024 (BELM), Zhang et al. 2024 (BDIA), Wallace et al. 2023 (EDICT).

    Raises:
        UsageError: a plan that is not exactly invertible, or ends at clean data.
    """
    _check_invertible(plan)
    n = plan.nfe
    k = torch.arange(n - 1, 0, -1)
    t, r, r_prev, b = plan.t[k], -plan.r[k] / plan.r_prev[k], 1 / plan.r_prev[k], -plan.b[k, 0] / plan.r_prev[k]
    states = torch.arange(n - 1, -1, -1)
    if plan.node[n - 1]:
        p, q = row_affine(plan.prediction, plan.alpha[n:], plan.sigma[n:])
        keep = plan.sigma[n - 1] / plan.sigma[n]
        weight = plan.alpha[n - 1] - plan.alpha[n] * keep  # x_1 = keep x + weight D, and m = p x + q D
        t, r = torch.cat([plan.time[n:], t]), torch.cat([keep - weight * p / q, r])
        r_prev, b = torch.cat([torch.zeros(1), r_prev]), torch.cat([weight / q, b])
        states = torch.arange(n, -1, -1)
    return _chain(plan, states, t, r, r_prev, b[:, None], f"{plan.name} inverted")


def _chain(
    plan: Plan, states: Tensor, t: Tensor, r: Tensor, r_prev: Tensor, b: Tensor, name: str | None = None
) -> Plan:
    """A plan through some states of another, all of them nodes."""
    n = len(t)
    return replace(
        plan,
        name=name or plan.name,
        **{"t": t, "r": r, "r_prev": r_prev, "b": b, "c": torch.zeros(n, 0), "init": torch.tensor([1.0, 0.0])},
        **{key: getattr(plan, key)[states] for key in ("time", "alpha", "sigma")},
        **{"step": torch.arange(n), "node": torch.ones(n + 1), "first": None, "span": None},
    )


def _carried(denoiser: Denoiser, plan: Plan, pair: Pair, label: Any, batch: Any, device: Any) -> Pair:
    """The last two states of a plan that begins at a pair, batch by batch."""
    for state in pair:
        if not isinstance(state, Tensor) or not state.is_floating_point() or state.ndim < 2 or not len(state):
            raise UsageError(f"need floating-point tensors of shape (n, ...), got {state!r:.60}")
    batch = DEFAULT_BATCH if batch is None else integer("batch", batch, 1)
    labels = _labels(denoiser, label, len(pair.x))
    where = find_device(device or getattr(denoiser, "device", None) or pair.x.device)
    ends: list[Pair] = []
    for i in range(0, len(pair.x), batch):
        some = slice(i, i + batch)
        x, previous = (state[some].to(where, torch.float64) for state in pair)
        cond: dict[str, Any] = {} if labels is None else {"label": labels[some].to(where)}
        end = Pair(x, previous)
        with torch.no_grad():
            for point in iterate(plan, denoiser, x, previous=previous, **cond):
                end = Pair(point.x, end.x)
            for j in not_finite(end.x):
                bad = find_bad(plan, denoiser, x, previous=previous, **cond)[j]
                raise _not_finite(plan, replace(bad, index=i + j))
        ends.append(end)
    return Pair(*(torch.cat(states) for states in zip(*ends, strict=True)))


def _plan(
    denoiser: Denoiser,
    plan: Plan | None,
    sampler: str | Recipe,
    steps: int | None,
    nfe: int | None,
    grid: Any,
    chart: str | None,
    start: float | None,
    stop: float | None,
    options: dict[str, Any],
) -> Plan:
    """The deterministic plan that is given or described."""
    settled: dict[str, Any] = {"nfe": nfe, "grid": grid, "chart": chart, "start": start, "stop": stop, **options}
    if plan is None:
        named = grid is None or isinstance(grid, str | Grid)
        steps = DEFAULT_STEPS if named and steps is None and nfe is None else steps
        settled |= {"final": "stop"} if named and "final" not in settled else {}
        plan = make_plan(sampler, denoiser.process, steps, **settled)
    elif not isinstance(plan, Plan):
        raise UsageError(f"plan: need a Plan, got {plan!r:.60}", "make_plan(...) or Plan.load(path)")
    elif sampler != "auto" or any(value is not None for value in (steps, *settled.values())):
        raise UsageError("plan given together with what it settles", "leave out sampler, steps, nfe, grid, chart, ...")
    if plan.stochastic:
        hint = 'a deterministic sampler, such as "heun", or an exactly invertible one: sampler="o-belm"'
        raise UsageError(f"{plan.name} draws noise, which nothing takes back", hint)
    return plan


def _falls(plan: Plan) -> bool:
    """Whether the plan leads from noise to data."""
    return bool(plan.sigma[-1] * plan.alpha[0] < plan.sigma[0] * plan.alpha[-1])


def _check_invertible(plan: Plan) -> None:
    hint = 'make_plan("o-belm", process, steps, final="stop")'
    if plan.sigma[-1] == 0:
        raise UsageError(f"plan {plan.name!r} ends at clean data, where no denoiser is evaluated", hint)
    if plan.nfe < 2:
        raise UsageError(f"plan {plan.name!r} has one row, its pair of states needs two", "steps=2")
    lost, earlier = plan.r_prev[1:] == 0, plan.b[1:, 1:].any(1)
    for k in (lost | earlier).nonzero().flatten().tolist()[:1]:
        why = "has r' = 0" if lost[k] else "uses an earlier prediction"
        hint = 'from pure noise only chart="flow" or "trig" begins invertibly' if plan.alpha[0] == 0 else hint
        raise UsageError(f"plan {plan.name!r} is not exactly invertible: row {k + 1} {why}", hint)
