"""Encoding and decoding along the PF-ODE, from data to noise and back, by plans or to a tolerance.

An adaptive sampler integrates back, with steps of its own. A deterministic recipe encodes by its plan on the reversed
grid; what decoding then misses falls with the steps. One
with r' (O-BELM, BDIA, EDICT) is exactly invertible: its rows y_{k+1} = r_k y_k + r'_k y_{k-1} + b_k m_k are solved for
y_{k-1}. That alone would hold in exact arithmetic only: decoding magnifies rounding, 2e4-fold for BDIA in 20 steps of
EDM. So here the states are whole multiples of a spacing, y_k = N_k s_k, and both directions compute the same numbers:

    decode    N_{k+1} = D_k + N_{k-1},    D_k = round((r_k y_k + b_k m_k) / s_{k+1})
    encode    N_{k-1} = N_{k+1} - D_k

with s_{k-1} = s_{k+1} / |r'_k| (where r' < 0, -N_{k-1} in its place). float64 holds N below 2^53: states that grow
beyond it on the way to noise are an error, as what they were could not be had back. BDIA magnifies what is off by
1/gamma at every step, EDICT by 1/p twice: of many steps the noise that they encode to is exact, but far larger than the
process's own.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode.arguments import sample_states
from pfode.denoiser import Denoiser, preconditioned
from pfode.errors import NumericalError, UsageError
from pfode.grids import Grid
from pfode.plans.executor import Failure, check_output, rows_and_networks, run
from pfode.plans.rows import Sums, add, combine, folded, row_affine
from pfode.plans.table import Plan
from pfode.process import float64
from pfode.samplers.adaptive import Adaptive, find_adaptive
from pfode.samplers.catalogue import Recipe
from pfode.samplers.request import Label, Place, Sampler, Stepping
from pfode.samplers.sampling import non_finite, sample
from pfode.samplers.settle import classes, prepared, settled, state_dtype

__all__ = [
    "Pair",
    "decode",
    "encode",
]

FAMILIAR = "sampler, steps, nfe, grid, chart"  # what an error names of the options that settle a plan
SPACING = 2.0**-40  # of the data, and of the state before it
COARSER = 2.0**2, 2.0**12  # by how much either may grow where spacings fall from there towards the noise
MOST = 2.0**51  # multiples of a spacing that a float64 state tells apart, whatever the spacing


class Pair(NamedTuple):
    """What an exactly invertible recipe encodes to: its state 1 (x) and its state 0 (previous), each (n, *shape).

    In float64, which decoding needs in full: see this module.
    """

    x: Tensor
    previous: Tensor


def encode(
    denoiser: Denoiser,
    x: Tensor,
    steps: int | None = None,
    sampler: Sampler = "auto",
    *,
    nfe: int | None = None,
    grid: Any = None,
    chart: str | None = None,
    plan: Plan | Adaptive | str | os.PathLike[str] | None = None,
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
            none is given), which ends at t_min or `stop`, not at clean data; of adaptive samplers see `make_adaptive`.
        plan: instead, a ready one: for an exactly invertible recipe the one that decodes, else one whose times rise.
        label, guidance, batch, dtype, device: see `sample`; a pair is in float64 whatever the dtype.

    Returns:
        the state at the first time (t_max, or `start`), shape (n, *shape); of exactly invertible recipes the `Pair` of
        their first two states, from which decode returns x to 1e-11 where the network gives the same outputs again
        (deterministic kernels, and the same batch).

    Raises:
        UsageError: a stochastic sampler, a plan that leads the wrong way or ends at clean data, options that cannot be
            carried out; NumericalError: a sample that is not finite, or that an exactly invertible
            recipe makes too large to be taken back.
    """
    denoiser = prepared(denoiser, guidance, device)
    if find_adaptive(sampler) is not None:
        p = denoiser.process
        start, stop = (p.t_min if stop is None else stop), (p.t_max if start is None else start)
    given = {"nfe": nfe, "grid": grid, "chart": chart, "start": start, "stop": stop, **options}
    stepping = Stepping(sampler, steps, plan, options=given, familiar=FAMILIAR)
    made = _plan(denoiser, stepping)
    if isinstance(made, Adaptive):
        if _falls(made):
            hint = "make_adaptive(..., start=process.t_min, stop=process.t_max)"
            raise UsageError(f"{made.name} would go from t = {made.start:g} down to {made.stop:g}", hint)
        return sample(denoiser, x=x, plan=made, label=label, batch=batch, dtype=dtype, device=device).x
    if _paired(made):
        return Pair(*_in_batches(_backwards, made, denoiser, [x], label, Place(batch, dtype, device)))
    if _falls(made):
        if stepping.ready is not None:
            hint = "make_plan(sampler, process, grid=plan.times.flip(0))"
            raise UsageError(f"plan {made.name!r} leads from noise to data: encode needs one whose times rise", hint)
        if made.sigma[-1] == 0:
            hint = f"end the times at t_min = {denoiser.process.t_min:g}"
            raise UsageError(f"plan {made.name!r} ends at clean data, where no denoiser is evaluated", hint)
        named = made.meta["sampler"] if not isinstance(sampler, str | Recipe) or sampler == "auto" else sampler
        made = settled(denoiser, named, grid=made.times.flip(0), chart=chart, **options)
    return sample(denoiser, x=x, plan=made, label=label, batch=batch, dtype=dtype, device=device).x


def decode(
    denoiser: Denoiser,
    z: Tensor | tuple[Tensor, Tensor],
    steps: int | None = None,
    sampler: Sampler = "auto",
    *,
    nfe: int | None = None,
    grid: Any = None,
    chart: str | None = None,
    plan: Plan | Adaptive | str | os.PathLike[str] | None = None,
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
    given = {"nfe": nfe, "grid": grid, "chart": chart, "start": start, "stop": stop, **options}
    made = _plan(denoiser, Stepping(sampler, steps, plan, options=given, familiar=FAMILIAR))
    if not _falls(made):
        raise UsageError(f"plan {made.name!r} leads from data to noise: decode needs one whose times fall")
    if _paired(made) != (isinstance(z, tuple) and len(z) == 2):
        takes = "the pair of its first two states" if _paired(made) else "one state"
        raise UsageError(f"{made.name} decodes {takes}", "z = encode(...), with the sampler that is to decode it")
    if isinstance(made, Adaptive) or not isinstance(z, tuple):
        return sample(denoiser, x=z, plan=made, label=label, batch=batch, dtype=dtype, device=device).x  # type: ignore[arg-type]
    return _in_batches(_onward, made, denoiser, z, label, Place(batch, dtype, device))[-1].to(state_dtype(dtype, z[0]))


States = Iterator[tuple[int, Tensor, Tensor]]  # the number of the state evaluated; the new one in multiples; itself
Walk = Callable[..., States]


def _backwards(plan: Plan, denoiser: Denoiser, cond: dict[str, Any], x: Tensor) -> States:
    """States n ... 0, each with the number of the state evaluated for it. At the data that takes y_n and y_{n-1}:

    - one state per node (O-BELM, BDIA): a row of DDIM inversion makes y_{n-1} of y_n, as their authors do it;
    - an inner stage between the nodes (EDICT): it is the second copy, equal to y_n where both copies are.
    """
    moves, n = _Moves(plan, denoiser, cond, x), plan.nfe
    later = torch.round(x / moves.spacing[n])
    y = later * moves.spacing[n]
    yield n, later, y
    first = run(_ddim(plan, n, n - 1), denoiser, y, **cond) if plan.node[n - 1] else y
    here = torch.round(first / moves.spacing[n - 1])
    yield n, here, here * moves.spacing[n - 1]
    for k in range(n - 1, 0, -1):
        later, here = here, moves.sign(k) * (later - moves.whole(k, here))
        yield k, here, here * moves.spacing[k - 1]


def _onward(plan: Plan, denoiser: Denoiser, cond: dict[str, Any], x: Tensor, previous: Tensor) -> States:
    """States 2 ... n from states 1 and 0, each with the number of the state evaluated for it."""
    moves = _Moves(plan, denoiser, cond, x)
    before, here = torch.round(previous / moves.spacing[0]), torch.round(x / moves.spacing[1])
    for k in range(1, plan.nfe):
        before, here = here, moves.whole(k, here) + moves.sign(k) * before
        yield k, here, here * moves.spacing[k + 1]


def _in_batches(
    walk: Walk, plan: Plan, denoiser: Denoiser, states: Sequence[Tensor], label: Label, place: Place
) -> list[Tensor]:
    """The last two states of a walk, the last of all at the end."""
    states = [sample_states("states", x) for x in states]
    if len({x.shape for x in states}) > 1:
        raise UsageError(f"need tensors of one shape (n, ...), got {[tuple(x.shape) for x in states]}")
    n = len(states[0])
    batch, where = place.size, place.device_of(denoiser, states[0])
    labels = classes(denoiser, label, n)
    ends: list[list[Tensor]] = []
    for i in range(0, n, batch):
        some = slice(i, i + batch)
        cond = {} if labels is None else {"label": labels[some].to(where)}
        end: deque[Tensor] = deque(maxlen=2)
        sizes: list[tuple[int, Tensor]] = []
        with torch.no_grad():
            for k, whole, x in walk(plan, denoiser, cond, *(state[some].to(where, torch.float64) for state in states)):
                end.append(x)
                sizes.append((k, whole.abs().flatten(1).amax(1)))
        largest = torch.stack([size for _, size in sizes]).cpu()  # NaN where one is
        for j in (~(largest <= MOST)).any(0).nonzero().flatten().tolist():
            at = int((~(largest[:, j] <= MOST)).nonzero()[0])
            k = sizes[at][0]
            if not torch.isfinite(largest[at, j]):
                raise non_finite(plan, Failure(i + j, int(plan.step[min(k, plan.nfe - 1)]) + 1, plan.time[k].item()))
            raise _too_large(plan, i + j, k)
        ends.append([*end])
    return [torch.cat(parts) for parts in zip(*ends, strict=True)]


def _too_large(plan: Plan, index: int, k: int) -> NumericalError:
    """The error of a state that float64 does not hold exactly on the lattice."""
    where = f"{plan.name}: sample {index} grows at t = {plan.time[k].item():.6g} beyond what can be taken back exactly"
    if plan.name not in ("bdia", "edict"):
        return NumericalError(f"{where}: its steps differ too much in length", 'another grid, such as "time"')
    nearer = "gamma" if plan.name == "bdia" else "p"
    problem = f"{where}: each of its {plan.steps} steps magnifies what is off"
    return NumericalError(problem, f'fewer steps, {nearer} nearer to 1, or sampler="o-belm"')


class _Moves:
    """What the rows of an exactly invertible plan add to what they keep of the state before.

    Attributes:
        spacing: s_k of all its states.
    """

    def __init__(self, plan: Plan, denoiser: Denoiser, cond: dict[str, Any], x: Tensor):
        _check_invertible(plan)
        net = preconditioned(denoiser)
        self.calls = rows_and_networks(plan, folded(plan, net, x), net, cond, x)
        self.r_prev = plan.r_prev.tolist()
        self.spacing, n = [SPACING] * (plan.nfe + 1), plan.nfe
        for k in range(n - 1, 0, -1):
            self.spacing[k - 1] = self.spacing[k + 1] / abs(self.r_prev[k])
        for first, most in zip((n, n - 1), COARSER, strict=True):  # every other state
            least = min(self.spacing[first::-2])
            factor = min(max(SPACING / least, 1.0), most)
            self.spacing[first::-2] = [2.0 ** round(math.log2(factor)) * s for s in self.spacing[first::-2]]

    def sign(self, k: int) -> float:
        """Of r'_k."""
        return math.copysign(1.0, self.r_prev[k])

    def whole(self, k: int, here: Tensor) -> Tensor:
        """D_k: (r_k y_k + b_k m_k) / s_{k+1}, rounded, of y_k in multiples of its spacing."""
        row, network, t = self.calls[k]
        y = here * self.spacing[k]
        sums: Sums = [None, None]
        add(sums, y, [(j, factor) for j, factor in row.state if j == 0])
        out = check_output(network(y.clone() if row.c_in is None else y * row.c_in, t), y)
        return torch.round(combine(sums, row, y, out) / self.spacing[k + 1])


def _ddim(plan: Plan, k: int, j: int) -> Plan:
    """One DDIM row from the level of state k to that of state j: x_1 = (sigma_1/sigma_0) x + weight D."""
    p, q = row_affine(plan.prediction, plan.alpha[k], plan.sigma[k])
    keep = plan.sigma[j] / plan.sigma[k]
    weight = plan.alpha[j] - plan.alpha[k] * keep
    return _single(plan, k, j, plan.time[k], keep - weight * p / q, weight / q)


def _single(plan: Plan, k: int, j: int, t: Tensor, r: Tensor, b: Tensor) -> Plan:
    """The plan of one row, from state k to state j: y = r x + b m, m queried at t."""
    levels = {key: getattr(plan, key)[[k, j]] for key in ("time", "alpha", "sigma")}
    return Plan(
        plan.process, plan.prediction, t[None], **levels, r=r[None], r_prev=float64([0.0]), b=b[None, None],
        c=plan.c[:1, :0], init=float64([1.0, 0.0]), step=float64([0.0]), node=float64([1.0, 1.0]), name=plan.name,
    )  # fmt: skip


def _plan(denoiser: Denoiser, stepping: Stepping) -> Plan | Adaptive:
    """The deterministic plan that is given or described; it ends at t_min where nothing else is said."""
    grid = stepping.options.get("grid")
    named = grid is None or isinstance(grid, str | Grid)
    if stepping.ready is None and named and "final" not in stepping.options:
        stepping = replace(stepping, options={**stepping.options, "final": "stop"})
    plan = stepping.settle(denoiser)
    if isinstance(plan, Adaptive):
        return plan
    if plan.stochastic:
        hint = 'a deterministic sampler, such as "heun", or an exactly invertible one: sampler="o-belm"'
        raise UsageError(f"{plan.name} draws noise, which nothing takes back", hint)
    if plan.init[0] != 1:
        raise UsageError(f"{plan.name} makes its first step without a call, which no row takes back", "leave afs out")
    return plan


def _paired(plan: Plan | Adaptive) -> bool:
    """Whether rows use the state before the last: the recipes that are exactly invertible."""
    return isinstance(plan, Plan) and bool(plan.r_prev[1:].any())


def _falls(plan: Plan | Adaptive) -> bool:
    """Whether the plan leads from noise to data."""
    if isinstance(plan, Adaptive):
        return plan.start > plan.stop
    return bool(plan.sigma[-1] * plan.alpha[0] < plan.sigma[0] * plan.alpha[-1])


def _check_invertible(plan: Plan) -> None:
    hint = 'make_plan("o-belm", process, steps, final="stop")'
    if plan.sigma[-1] == 0:
        raise UsageError(f"plan {plan.name!r} ends at clean data, where no denoiser is evaluated", hint)
    if not _falls(plan):
        problem = (
            f"plan {plan.name!r} leads from data to noise: an exactly invertible one encodes by the way it decodes"
        )
        raise UsageError(problem, "a grid whose times fall")
    lost, earlier = plan.r_prev[1:] == 0, plan.b[1:, 1:].any(1)
    for k in (lost | earlier).nonzero().flatten().tolist()[:1]:
        why = "has r' = 0" if lost[k] else "uses an earlier prediction"
        hint = 'from pure noise only chart="flow" or "trig" begins invertibly' if plan.alpha[0] == 0 else hint
        raise UsageError(f"plan {plan.name!r} is not exactly invertible: row {k + 1} {why}", hint)
