"""The executor: one loop over the rows of a plan runs every sampler, without host read-back and without state."""

import functools
import math
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import checkpoint as rematerialise

from pfode import noise
from pfode._torch import transformed
from pfode.denoiser import Bare, Denoiser, Preconditioned, at, preconditioned, tuned
from pfode.errors import OtherModelWarning, UsageError, shortened
from pfode.plans.rows import Row, Rows, Sums, add, combine, folded, used, with_noise
from pfode.plans.table import Plan, foreign, takes_part

__all__ = [
    "Failure",
    "Point",
    "Transition",
    "as_state",
    "check_output",
    "check_plan",
    "find_failures",
    "iterate",
    "not_finite",
    "replaced",
    "rows_and_networks",
    "run",
]

Walk = Generator[tuple[int, Tensor, Any, "Transition | None"], Tensor | None, None]
Seeds = Sequence[int] | Callable[[int], Tensor] | None  # or a function: row k -> its noise; the init row is plan.nfe
PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that a state may come in


class Transition(NamedTuple):
    """The random part of a row: the state x that it ended with was drawn from N(mean, std^2), std 0-d."""

    x: Tensor
    mean: Tensor
    std: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean, std^2) of every sample, in nats, shape (batch,); x is data, gradients flow into the mean."""
        flat = ((x.detach() - self.mean) / self.std).reshape(len(x), -1)
        constant = torch.log(self.std.abs()) + 0.5 * math.log(2 * math.pi)
        return -0.5 * flat.square().sum(1) - flat.shape[1] * constant


@dataclass(frozen=True, eq=False)
class Point:
    """A node reached by a plan.

    Fields: step (1 ... steps) of `steps`; t and x there; x0, the denoiser's latest output; nfe so far; transitions:
    that of each row of the step, None for a row that drew no noise.
    """

    step: int
    steps: int
    t: float
    x: Tensor
    x0: Tensor
    nfe: int
    transitions: tuple[Transition | None, ...] = field(default=(), repr=False)

    @property
    def log_prob(self) -> Tensor | None:
        """Log-density, in nats, of the noise this step drew: shape (batch,), None where it drew none.

        It is the sum of log N(y_{k+1}; mean_k, c_k0^2) over its rows with c_k0 != 0, given all that earlier rows drew.
        Where a row landed counts as data; gradients flow through the means, as policy gradients want (DDPO, Black et
        al. 2024), and through the state the step began at unless `point.x.detach()` was sent back at the node before.
        """
        parts = [transition.log_prob(transition.x) for transition in self.transitions if transition]
        return torch.stack(parts).sum(0) if parts else None

    def log_prob_of(self, x: Tensor) -> Tensor | None:
        """The same, had this step landed at x: for replays, where x was recorded and is then sent back.

        Args:
            x: shape of the state.

        Raises:
            UsageError: another shape, or a step that drew noise before its last row: x does not say what.
        """
        *inner, transition = self.transitions
        if any(inner):
            problem = f"step {self.step} draws noise in an inner stage: where it ends does not tell how it got there"
            raise UsageError(problem, "a sampler that draws noise in the last row of a step alone, as euler-a does")
        return transition and transition.log_prob(replaced(self.x, x))


def run(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    seeds: Seeds = None,
    *,
    brownian: bool = False,
    checkpoint: bool = False,
    **cond: Any,
) -> Tensor:
    """Run a plan from x, the state at its first time, to its last state.

    Args:
        x: shape (batch, ...). Half precision is raised to float32.
        seeds: one per sample; needed by stochastic plans, whose row k draws noise (seed, k + 1). Or a function that
            gives the noise of row k, and of the row `init` as that of row plan.nfe.
        brownian: take the noise from one Brownian path per seed, by the rows' `span`: the same path for any steps.
        checkpoint: keep nothing of the denoiser's calls for the gradients but their input, and call again going back:
            the memory of one call at the price of a second one.
        cond: passed on to the denoiser. Gradients flow if the caller has them enabled.

    Raises:
        UsageError: another process than the plan's, missing seeds, a denoiser whose output has another shape; noise
            that belongs to no interval of a Brownian path.
    """
    rows = _walk(plan, denoiser, x, seeds, cond, brownian, checkpoint, preview=False)
    states = (y for _, y, _, _ in rows)
    return deque(states, maxlen=1).pop()


def iterate(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    seeds: Seeds = None,
    *,
    brownian: bool = False,
    checkpoint: bool = False,
    **cond: Any,
) -> Generator[Point, Tensor | None, None]:
    """As `run`, but yield every node reached. A tensor sent back replaces the state there (inpainting, projections)."""
    return _points(plan, _walk(plan, denoiser, x, seeds, cond, brownian, checkpoint, preview=True))


def _points(plan: Plan, rows: Walk) -> Generator[Point, Tensor | None, None]:
    """The nodes of a walk."""
    node, times, steps = plan.node.tolist(), plan.time.tolist(), plan.steps
    step, sent, transitions = 0, None, []
    for _ in range(plan.nfe):
        k, x, x0, transition = rows.send(sent)
        sent = None
        transitions.append(transition)
        if node[k + 1]:
            step += 1
            sent = yield Point(step, steps, times[k + 1], x, x0, k + 1, tuple(transitions))
            transitions = []


@dataclass(frozen=True)
class Failure:
    """A sample that is not finite: its index, and step (1 ... steps) and time of the evaluation that spoilt it."""

    index: int
    step: int
    time: float

    @property
    def why(self) -> str | None:
        """What went wrong, where more is known than that it is not finite."""
        return None


def find_failures(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    seeds: Seeds = None,
    *,
    brownian: bool = False,
    **cond: Any,
) -> dict[int, Failure]:
    """Replay a plan row by row: the samples of which a state or a denoiser output is not finite, by their index."""
    found: dict[int, Failure] = {}
    for k, y, x0, _ in _walk(plan, denoiser, x, seeds, cond, brownian, checkpoint=False, preview=True):
        for i in not_finite(y) + not_finite(x0):
            found.setdefault(i, Failure(i, int(plan.step[k]) + 1, float(plan.t[k])))
    return found


def not_finite(x: Tensor) -> list[int]:
    """The indices of the samples in x that hold NaN or infinity."""
    return (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten().tolist()


def as_state(x: Any, dimensions: int = 1) -> Tensor:
    """A batch of states of at least so many dimensions, in float32 or better.

    Raises:
        UsageError: anything but a tensor of samples that holds numbers, in half precision or better.
    """
    hint = "x=sigma * torch.randn(n, ...)"
    if not isinstance(x, Tensor) or x.dtype not in PRECISIONS or x.ndim < dimensions:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"{type(x).__name__}"
        raise UsageError(f"x: need a floating-point tensor of shape (batch, ...), got {got}", hint)
    if x.layout != torch.strided or x.numel() == 0:
        lacks = "no numbers" if x.layout == torch.strided else f"layout {x.layout}"
        raise UsageError(f"x: need a batch of samples, got {x.dtype} of shape {tuple(x.shape)} with {lacks}", hint)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_output(out: Any, x: Tensor) -> Tensor:
    """What a denoiser returned for x, in the dtype of x.

    Raises:
        UsageError: no tensor of the shape of x.
    """
    if not isinstance(out, Tensor) or out.shape != x.shape:
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise UsageError(f"the denoiser returned {got} for x of shape {tuple(x.shape)}", "it must return x0")
    return out if out.dtype is x.dtype else out.to(x.dtype)


def check_plan(plan: Plan, denoiser: Denoiser) -> None:
    """Find out whether a plan can be run with a denoiser; warn of one that was fitted to another.

    Raises:
        UsageError: no plan, no denoiser, or another process than the plan's.
    """
    if not isinstance(plan, Plan):
        raise UsageError(f"plan: need a Plan, got {shortened(plan)}", "make_plan(...) or Plan.load(path)")
    if not callable(denoiser) or not hasattr(denoiser, "process"):
        problem = f"denoiser: need a callable (x, t) -> x0 with a process, got {shortened(denoiser)}"
        raise UsageError(problem, "pfode.load(...), or pfode.scores.Denoiser(network, process, prediction)")
    if plan.process != denoiser.process:
        raise UsageError(
            f"plan {plan.name!r} was made for {plan.process}, the denoiser has {denoiser.process}",
            "make_plan(..., process=denoiser.process)",
        )
    plan.check_times(denoiser.process)
    _remark(plan, denoiser)


def _walk(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    seeds: Seeds,
    cond: dict[str, Any],
    brownian: bool,
    checkpoint: bool,
    preview: bool,
) -> Walk:
    """The executor: yields (row, state after it, x0, the row's transition); a tensor sent back replaces the state.

    x0 and transition are None without `preview`. The network may change what it is given, and may give out what it will
    change: no state that others hold, or that is needed after the call, is handed to it, and its output is used up
    before it is called again.
    """
    check_plan(plan, denoiser)
    state = as_state(x)
    draw = _noise_source(plan, state, seeds, brownian)
    net = preconditioned(denoiser)
    rows = folded(plan, net, state)
    sums: Sums = [None] * rows.window
    if rows.before is not None:
        add(sums, state, [(0, rows.before)])
    r_init, c_init = plan.init.to(state).unbind()
    if takes_part(plan.init[0] - 1):
        state = r_init * state
    if takes_part(plan.init[1]):
        state = state + c_init * draw(plan.nfe)
    return _rows(rows_and_networks(plan, rows, net, cond, state, checkpoint), sums, state, state is x, draw, preview)


def rows_and_networks(
    plan: Plan, rows: Rows, net: Preconditioned, cond: dict[str, Any], x: Tensor, checkpoint: bool = False
) -> list[tuple[Row, Callable[..., Any], Tensor]]:
    """Every row with the network it calls, conditions bound, and the time it is given, for states like x."""
    times = rows.c_noise.clone()  # the network may write over it, and the rows are kept
    if not isinstance(net, Bare):  # a network is given the time of every sample, a bare denoiser one time
        times = times[:, None].expand(-1, len(x))
    return list(zip(rows.rows, _networks(plan, net, cond, x, checkpoint), times.unbind(), strict=True))


def _rows(
    rows: Iterable[tuple[Row, Callable[..., Any], Tensor]],
    sums: Sums,
    x: Tensor,
    lent: bool,
    draw: Callable[[int], Tensor],
    preview: bool,
) -> Walk:
    """The loop over `rows_and_networks`; `lent`: x is the caller's, and is not handed to the network itself."""
    x0, skipped, in_place = None, x, transformed() is None
    for k, (row, network, t) in enumerate(rows):
        add(sums, x, row.state, in_place)
        if preview:
            skipped = row.c_skip * x
        if row.c_in is not None:
            asked = x * row.c_in
        else:
            asked = x.clone() if preview or row.g is not None or lent else x
        lent = False
        out = network(asked, t)
        if k == 0 or out.dtype is not x.dtype:
            out = check_output(out, x)
        if preview:
            x0 = torch.addcmul(skipped, out, row.c_out)
        x = combine(sums, row, x, out, in_place)
        transition = None
        if row.draws:
            mean, x = x, with_noise(sums, row, x, draw(k), in_place)
            transition = Transition(x, mean, row.fresh) if preview and row.fresh is not None else None
        sent = yield k, x, x0, transition
        if sent is not None:
            x = replaced(x, sent)


def _networks(
    plan: Plan, net: Preconditioned, cond: dict[str, Any], x: Tensor, checkpoint: bool
) -> list[Callable[..., Any]]:
    """What every row calls, with the conditions: no layer more than needed, as small networks feel each."""
    found = [at(net, t) for t in plan.t.tolist()]
    if plan.tune:
        rows = [value.to(x.device).unbind() for value in plan.tune.values()]
        offsets = (dict(zip(plan.tune, row, strict=True)) for row in zip(*rows, strict=True))
        found = [tuned(one, row) for one, row in zip(found, offsets, strict=True)]
    calls: list[Callable[..., Any]] = [
        one.denoiser if isinstance(one, Bare) and one.dtype in (None, x.dtype) else one.network for one in found
    ]
    if cond:
        calls = [functools.partial(call, **cond) for call in calls]
    if checkpoint:
        calls = [functools.partial(rematerialise.checkpoint, _on_a_copy(call), use_reentrant=False) for call in calls]
    return calls


def _on_a_copy(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call that may change what it is given, and can be made again all the same."""
    return lambda x, *args: call(x.clone(), *args)


def _remark(plan: Plan, denoiser: Denoiser) -> None:
    """Say that a plan was fitted to another model.

    Raises:
        UsageError: a tuned plan, whose offsets mean nothing there.
    """
    if not torch.compiler.is_compiling() and foreign(plan, denoiser):
        if plan.tune:
            problem = f"plan {plan.name!r} was tuned to another model: its offsets belong to the weights of that one"
            raise UsageError(problem, "fit_plan(denoiser, nfe, tune=True)")
        text = f"plan {plan.name!r} was fitted to another model: here a hand-made sampler may serve better"
        warnings.warn(text, OtherModelWarning, stacklevel=5)


def replaced(x: Tensor, sent: Tensor | None) -> Tensor:
    """The state, or the one sent back in its place.

    Raises:
        UsageError: of another shape.
    """
    if sent is None:
        return x
    if not isinstance(sent, Tensor) or sent.shape != x.shape:
        raise UsageError(f"a state sent back must have the shape of x, {tuple(x.shape)}, got {sent!r:.60}")
    return sent.to(x)


def _noise_source(plan: Plan, x: Tensor, seeds: Seeds, brownian: bool) -> Callable[[int], Tensor]:
    """A function from the row to its noise."""
    if not plan.stochastic:
        return lambda k: x
    if callable(seeds):
        return seeds
    if isinstance(seeds, Tensor):
        seeds = seeds.tolist() if seeds.ndim == 1 else None
    if not isinstance(seeds, Sized) or len(seeds) != len(x):
        got = "none" if seeds is None else f"{len(seeds)}" if isinstance(seeds, Sized) else shortened(seeds)
        raise UsageError(
            f"plan {plan.name!r} is stochastic: needs one seed per sample, got {got} for {len(x)}", "seeds=[0, 1, ...]"
        )
    checked, kind = noise.check_seeds(seeds), (x.shape[1:], x.dtype, x.device)
    if not brownian:
        return lambda k: noise.normal(checked, k + 1, *kind)
    drawn = [*used(plan.c).tolist(), bool(takes_part(plan.init[1]))]
    for k, (span, draws) in enumerate(zip(plan.span, drawn, strict=True)):
        if draws and torch.isnan(span).any():
            problem = f"plan {plan.name!r}: the noise of row {k} belongs to no interval of a Brownian path"
            raise UsageError(problem, "leave brownian out, or give the plan its span")
    spans, ends = plan.span.tolist(), {}

    def increment(k: int) -> Tensor:
        start, stop = spans[k]
        return noise.brownian(checked, start, stop, *kind, ends)

    return increment
