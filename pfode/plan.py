"""Plan: a sampler on a fixed grid as a table of numbers, and the executor of every plan (docs/design.md, idea C).

    m_k     = the plan's prediction at (y_k, t_k)                                      one denoiser call
    y_{k+1} = r_k y_k + r'_k y_{k-1} + sum_j b_kj m_{k-j} + sum_j c_kj xi_{k-j}        one fused linear update
    y_0     = r_init x_T + c_init xi_init

Rows are made on the host in float64. The executor folds the network's preconditioning into them once, then runs without
host read-back and without state: coefficients are 0-d tensors on the device.
"""

import functools
import json
import math
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import checkpoint as rematerialise

from pfode import noise
from pfode.denoiser import Bare, Denoiser, Preconditioned, at, fingerprint, preconditioned
from pfode.errors import FileError, OtherModelWarning, UsageError
from pfode.files import read_header
from pfode.grids import ROUNDING
from pfode.prediction import prediction
from pfode.process import Process, from_config
from pfode.tensors import read_tensors, write_tensors

Seeds = Sequence[int] | Callable[[int], Tensor] | None  # or a function: row k -> its noise; the init row is plan.nfe

_TENSORS = ("t", "time", "alpha", "sigma", "r", "r_prev", "b", "c", "init", "step", "node", "first", "span")
_WHOLE = {"step": torch.int64, "node": torch.bool}


@dataclass(frozen=True, eq=False)
class Plan:
    """A table of n rows; row k makes one denoiser call and moves the register y from state k to state k + 1.

    Its tensors are copies and are not meant to be changed: `dataclasses.replace` makes another plan.

    Args:
        process: the noise process the numbers were made for; `run` refuses another.
        prediction: what m is. In a row with alpha = 0 a blind prediction (eps, score) is replaced by x0.
        t: query times, shape (n,).
        time, alpha, sigma: time and noise level of the register at states 0 ... n, shape (n + 1,).
        r, r_prev: factors of y_k and y_{k-1}, shape (n,).
        b: factors of m_k, m_{k-1}, ..., shape (n, window).
        c: factors of xi_k, xi_{k-1}, ..., shape (n, noise window); xi_k is drawn fresh for every row.
        init: (r_init, c_init), shape (2,).
        step: the step (from 0) a row belongs to, shape (n,), integer.
        node: whether state k is a point of the trajectory, not an inner stage, shape (n + 1,), boolean.
        name, meta: how the plan was made; not compared.
        first: (time, alpha, sigma) of x_T, shape (3,): state 0's unless `init` moves x_T (churn, a free first step).
        span: start and stop of the interval that xi_k covers of the Brownian clock u = 1 / (1 + (alpha/sigma)^(1/4)),
            shape (n + 1, 2), the last for xi_init. NaN where nothing is drawn, or the noise has no interval.

    Raises:
        UsageError: shapes, values or times that no plan can have.
    """

    process: Process
    prediction: str
    t: Tensor
    time: Tensor
    alpha: Tensor
    sigma: Tensor
    r: Tensor
    r_prev: Tensor
    b: Tensor
    c: Tensor
    init: Tensor
    step: Tensor
    node: Tensor
    name: str = "plan"
    meta: dict[str, Any] = field(default_factory=dict)
    first: Tensor = None  # type: ignore[assignment]
    span: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        prediction(self.prediction)
        for key in _TENSORS:
            value = getattr(self, key)
            if value is None and key in ("first", "span"):
                value = self._default(key)
            value = torch.as_tensor(value).to("cpu", _WHOLE.get(key, torch.float64))
            object.__setattr__(self, key, value.clone())
            self._check(key, len(self.t))
        if not isinstance(self.name, str) or not self.name.isprintable() or not isinstance(self.meta, dict):
            raise UsageError(f"plan: need a printable name and a dict of meta, got {self.name!r} and {self.meta!r:.60}")
        alpha, sigma = torch.cat([self.first[1:2], self.alpha]), torch.cat([self.first[2:], self.sigma])
        if not (sigma[:-1] > 0).all() or sigma[-1] < 0 or (alpha < 0).any():
            raise UsageError(f"plan {self.name!r}: needs alpha >= 0 and sigma > 0, sigma = 0 only in the last state")
        moved = _alive(self.init[0] - 1) or _alive(self.init[1])
        if not moved and not torch.equal(self.first, self._default("first")):
            problem = f"plan {self.name!r}: x_T is state 0, but first = {self.first.tolist()} is not"
            raise UsageError(problem, "first=None")
        begins = torch.diff(self.step, prepend=torch.tensor([-1]))  # 1 in the first row of a step, else 0
        if not (self.node[0] and self.node[-1] and torch.equal(begins, self.node[:-1].long())):
            raise UsageError(f"plan {self.name!r}: a step must begin at every node but the last, and nowhere else")
        self.check_times(self.process)

    def _default(self, key: str) -> Tensor:
        """What `first` and `span` are where they are not given."""
        if key == "first":
            return torch.stack([self.time[0], self.alpha[0], self.sigma[0]])
        return torch.full((len(self.t) + 1, 2), torch.nan)

    def _check(self, key: str, n: int) -> None:
        """Raise UsageError if a tensor is none that a plan of n rows can have."""
        value: Tensor = getattr(self, key)
        length = {"init": 2, "first": 3}.get(key, n if key in ("t", "r", "r_prev", "b", "c", "step") else n + 1)
        if value.ndim != (2 if key in ("b", "c", "span") else 1) or len(value) != length or n == 0:
            raise UsageError(f"plan {self.name!r}: {key} has shape {tuple(value.shape)} with {n} rows")
        if key == "span":
            none = torch.isnan(value).all(-1)
            inside = ((value >= 0) & (value <= 1)).all(-1)
            if value.shape[1] != 2 or not (none | inside & (value[:, 0] != value[:, -1])).all():
                raise UsageError(f"plan {self.name!r}: span needs two different ends within [0, 1], or NaN twice")
        elif not torch.isfinite(value).all() and (key != "time" or torch.isnan(value).any()):
            raise UsageError(f"plan {self.name!r}: {key} is not finite")

    @property
    def nfe(self) -> int:
        """Number of denoiser calls: the number of rows."""
        return len(self.t)

    @property
    def steps(self) -> int:
        """Number of moves from node to node."""
        return int(self.node.sum()) - 1

    @property
    def times(self) -> Tensor:
        """Times of the nodes, shape (steps + 1,)."""
        return self.time[self.node]

    @property
    def stochastic(self) -> bool:
        """Whether the plan draws noise beyond the initial one."""
        return bool(_alive(self.c).any() or _alive(self.init[1]))

    @property
    def fitted_to(self) -> str | None:
        """The fingerprint of the denoiser that the plan was fitted to; None if to none that says."""
        fitted = self.meta.get("fitted")
        return fitted.get("model") if isinstance(fitted, dict) else None

    def check_times(self, process: Process) -> None:
        """Raise UsageError if the plan evaluates outside the times of the process."""
        low, high = process.t_min, process.t_max
        below = max(ROUNDING * abs(low), 1e-12 * abs(high))  # low may be 0
        if (self.t < low - below).any() or (self.t > high + ROUNDING * abs(high)).any():
            first, last = self.t.max().item(), self.t.min().item()
            problem = (
                f"plan {self.name!r}: evaluates from {first:g} to {last:g}, outside [{low:g}, {high:g}] of {process}"
            )
            raise UsageError(problem, "make a plan for this process: make_plan(..., process=denoiser.process)")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        same = self.process == other.process and self.prediction == other.prediction
        return same and all(_equal(getattr(self, key), getattr(other, key)) for key in _TENSORS)

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        head = f"plan {self.name!r}: {self.steps} steps, {self.nfe} NFE, prediction {self.prediction}, {self.process}"
        lines = [head, " row  step           t      alpha      sigma          r   b | c"]
        for k in range(self.nfe):
            level = f"{self.t[k]:11.5g} {self.alpha[k]:10.5g} {self.sigma[k]:10.5g} {self.r[k]:10.5g}"
            weights = " ".join(f"{w:.5g}" for w in self.b[k].tolist() if w) or "0"
            random = " ".join(f"{w:.5g}" for w in self.c[k].tolist() if w)
            lines.append(f"{k:4d} {int(self.step[k]):5d} {level}   {weights}" + (f" | {random}" if random else ""))
        end = f"{self.time[-1]:11.5g} {self.alpha[-1]:10.5g} {self.sigma[-1]:10.5g}"
        return "\n".join([*lines, f" end       {end}"])

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the plan as one safetensors file with its process, name and digest in the metadata."""
        config = {"name": self.name, "process": self.process.config(), "prediction": self.prediction, "meta": self.meta}
        tensors = {key: getattr(self, key).detach().contiguous() for key in _TENSORS}
        return write_tensors(
            path, tensors, {"pfode.kind": "plan", "pfode.config": json.dumps(config, ensure_ascii=False)}
        )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Plan":
        """Read a plan written by `save`.

        Raises:
            FileError: missing, damaged, or of another kind; the message names file and field.
        """
        header = read_header(path)
        if header.metadata.get("pfode.kind") != "plan":
            kind = header.metadata.get("pfode.kind", "unknown")
            raise FileError(
                f"{path}: pfode.kind: not a plan (got {kind!r}, expected 'plan')", "pfode info shows what it is"
            )
        tensors = read_tensors(header)
        config = header.config("pfode.config")
        try:
            parts = {key: tensors[key] for key in _TENSORS if key in tensors}
            process = from_config(config["process"])
            return cls(process, config["prediction"], **parts, name=config["name"], meta=config["meta"])
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{path}: broken plan: {error}") from error


class Landing(NamedTuple):
    """Where a row with fresh noise landed: x ~ N(mean, std^2)."""

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

    Fields: step (1 ... steps) of `steps`; t and x there; x0, the denoiser's latest output; nfe so far; landings: where
    each row of the step landed, None if it drew no noise.
    """

    step: int
    steps: int
    t: float
    x: Tensor
    x0: Tensor
    nfe: int
    landings: tuple[Landing | None, ...] = field(default=(), repr=False)

    @property
    def log_prob(self) -> Tensor | None:
        """Log-density, in nats, of the noise this step drew: shape (batch,), None where it drew none.

        It is the sum of log N(y_{k+1}; mean_k, c_k0^2) over its rows with c_k0 != 0, given all that earlier rows drew.
        Where a row landed counts as data; gradients flow through the means, as policy gradients want (DDPO, Black et
        al. 2024), and through the state the step began at unless `point.x.detach()` was sent back at the node before.
        """
        parts = [landing.log_prob(landing.x) for landing in self.landings if landing]
        return torch.stack(parts).sum(0) if parts else None

    def log_prob_of(self, x: Tensor) -> Tensor | None:
        """The same, had this step landed at x: for replays, where x was recorded and is then sent back.

        Args:
            x: shape of the state.

        Raises:
            UsageError: another shape, or a step that drew noise before its last row: x does not say what.
        """
        *inner, landing = self.landings
        if any(inner):
            problem = f"step {self.step} draws noise in an inner stage: where it ends does not tell how it got there"
            raise UsageError(problem, "a sampler that draws noise in the last row of a step alone, as euler-a does")
        return landing and landing.log_prob(replaced(self.x, x))


class _Row(NamedTuple):
    """One row as the executor wants it: factors are 0-d tensors on the device, None where there is nothing to do."""

    c_in: Tensor | None  # None: 1
    c_noise: Tensor
    g: Tensor | None  # m = F + g x, up to a factor that is part of b; None: 0
    lean: bool  # r + sum of b = 1: b holds each prediction's share in the sum up to it
    r: Tensor | None  # None: 1
    from_x: bool  # False: r = 0
    r_prev: Tensor | None  # None: 0
    b: list[tuple[int, Tensor]]  # (age j, factor) of the predictions that enter
    c: list[tuple[int, Tensor]]  # the same for the noises of earlier rows
    fresh: Tensor | None  # factor of this row's noise; None: 0
    draws: bool  # whether this row's noise is used, here or later
    c_skip: Tensor
    c_out: Tensor


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
    rows = _walk(plan, denoiser, x, seeds, cond, brownian, checkpoint, preview=True)
    node, times, steps = plan.node.tolist(), plan.time.tolist(), plan.steps
    step, sent, landings = 0, None, []
    try:
        while True:
            k, x, x0, landing = rows.send(sent)
            sent = None
            landings.append(landing)
            if node[k + 1]:
                step += 1
                sent = yield Point(step, steps, times[k + 1], x, x0, k + 1, tuple(landings))
                landings = []
    except StopIteration:
        return


@dataclass(frozen=True)
class Bad:
    """A sample that is not finite: its index, and step (1 ... steps) and time of the evaluation that spoilt it."""

    index: int
    step: int
    time: float

    @property
    def why(self) -> str | None:
        """What went wrong, where more is known than that it is not finite."""
        return None


def find_bad(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    seeds: Seeds = None,
    *,
    brownian: bool = False,
    **cond: Any,
) -> dict[int, Bad]:
    """Replay a plan row by row: the samples of which a state or a denoiser output is not finite, by their index."""
    found: dict[int, Bad] = {}
    for k, y, x0, _ in _walk(plan, denoiser, x, seeds, cond, brownian, checkpoint=False, preview=True):
        for i in not_finite(y) + not_finite(x0):
            found.setdefault(i, Bad(i, int(plan.step[k]) + 1, float(plan.t[k])))
    return found


def not_finite(x: Tensor) -> list[int]:
    """The indices of the samples in x that hold NaN or infinity."""
    return (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten().tolist()


def _walk(
    plan: Plan,
    denoiser: Denoiser,
    x: Tensor,
    seeds: Seeds,
    cond: dict[str, Any],
    brownian: bool,
    checkpoint: bool,
    preview: bool,
) -> Generator[tuple[int, Tensor, Any, Landing | None], Tensor | None, None]:
    """The executor: yields (row, state after it, x0, how it landed); a tensor sent back replaces the state.

    x0 and landing are None without `preview`.
    """
    if plan.process != denoiser.process:
        raise UsageError(
            f"plan {plan.name!r} was made for {plan.process}, the denoiser has {denoiser.process}",
            "make_plan(..., process=denoiser.process)",
        )
    plan.check_times(denoiser.process)
    _remark(plan, denoiser)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0:
        raise UsageError(f"x: need a floating-point tensor of shape (batch, ...), got {x!r:.60}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    draw = _noise_source(plan, x, seeds, brownian)
    net = preconditioned(denoiser)
    networks = _networks(plan, net, cond, checkpoint)
    rows = _fold(plan, net, x)
    ages, noise_ages = plan.b.shape[1] - 1, plan.c.shape[1] - 1
    past: list[Tensor] = []
    noises: list[Tensor] = []
    previous = x
    r_init, c_init = plan.init.to(x).unbind()
    if _alive(plan.init[0] - 1):
        x = r_init * x
    if _alive(plan.init[1]):
        x = x + c_init * draw(plan.nfe)
    dtype, x0 = x.dtype, None
    for k, (row, network) in enumerate(zip(rows, networks, strict=True)):
        c_in, g = row.c_in, row.g
        out = network(x if c_in is None else x * c_in, row.c_noise)
        if k == 0 and (not isinstance(out, Tensor) or out.shape != x.shape):
            got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise UsageError(f"the denoiser returned {got} for x of shape {tuple(x.shape)}", "it must return x0")
        if out.dtype is not dtype:
            out = out.to(dtype)
        past.insert(0, out if g is None else torch.addcmul(out, x, g))
        if preview:
            x0 = torch.addcmul(row.c_skip * x, out, row.c_out)
        if noise_ages >= 0:
            noises = [draw(k) if row.draws else x, *noises[:noise_ages]]  # x: a place kept, never used
        x, previous = _combine(row, x, previous, past, noises), x
        landing = None
        if row.fresh is not None:
            mean = x
            x = torch.addcmul(mean, noises[0], row.fresh)
            landing = Landing(x, mean, row.fresh) if preview else None
        sent = yield k, x, x0, landing
        if sent is not None:
            x = replaced(x, sent)
        if len(past) > ages:
            past.pop()


def _networks(plan: Plan, net: Preconditioned, cond: dict[str, Any], checkpoint: bool) -> list[Callable[..., Any]]:
    """What every row calls, with the conditions: no layer more than needed, as small networks feel each."""
    found = [at(net, t) for t in plan.t.tolist()]
    calls: list[Callable[..., Any]] = [one.denoiser if isinstance(one, Bare) else one.network for one in found]
    if cond:
        calls = [functools.partial(call, **cond) for call in calls]
    if checkpoint:
        calls = [functools.partial(rematerialise.checkpoint, call, use_reentrant=False) for call in calls]
    return calls


def spread(plan: Plan, std: float = 0.5) -> float:
    """The deviation of a plan's end points on Gaussian data of mean 0 and deviation std, over what it would be exactly.

    About 1 for a sound plan; far above where its steps are so long that errors grow from one to the next. The rows are
    linear then, and the covariance of state, window and noises is propagated through them: no sampling, on the host.
    """
    window, noises = plan.b.shape[1], plan.c.shape[1]
    size = 2 + window + noises  # y_k, y_{k-1}, the predictions, the noises
    p, q = (v.tolist() for v in row_affine(plan.prediction, plan.alpha[:-1], plan.sigma[:-1]))
    alpha, sigma = plan.process.alpha(plan.t), plan.process.sigma(plan.t)
    gain = (alpha * std**2 / (alpha**2 * std**2 + sigma**2)).tolist()  # D = gain x

    def variance(alpha: float, sigma: float) -> float:
        return (alpha * std) ** 2 + sigma**2

    state = np.zeros((size, size))
    state[0, 0] = plan.init[0].item() ** 2 * variance(*plan.first[1:].tolist()) + plan.init[1].item() ** 2
    for k, (b, c) in enumerate(zip(plan.b.numpy(), plan.c.numpy(), strict=True)):
        move, drawn = np.eye(size, k=-1), np.zeros(size)  # everything grows older by one
        move[2, 0], move[2, 1] = p[k] + q[k] * gain[k], 0.0
        if noises:
            move[2 + window, 1 + window], drawn[2 + window] = 0.0, 1.0
        factors = np.array([0.0, 0.0, *b, *c])
        move[0], drawn[0] = factors @ move, factors @ drawn
        move[0, :2] += plan.r[k].item(), plan.r_prev[k].item()
        state = move @ state @ move.T + np.outer(drawn, drawn)
    return math.sqrt(state[0, 0] / variance(plan.alpha[-1].item(), plan.sigma[-1].item()))


def foreign(plan: Plan, denoiser: Denoiser) -> bool:
    """Whether a plan was fitted to another model than this one, as far as both say."""
    return plan.fitted_to is not None and fingerprint(denoiser) not in (None, plan.fitted_to)


def _remark(plan: Plan, denoiser: Denoiser) -> None:
    if not torch.compiler.is_compiling() and foreign(plan, denoiser):
        text = f"plan {plan.name!r} was fitted to another model: here a hand-made sampler may serve better"
        warnings.warn(text, OtherModelWarning, stacklevel=4)


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


def _combine(row: _Row, x: Tensor, previous: Tensor, past: list[Tensor], noises: list[Tensor]) -> Tensor:
    """The row's sum but for its fresh noise, in as few tensor operations as there are: the first of them makes y."""
    if row.lean:
        for j, share in row.b:
            x = torch.lerp(x, past[j], share)
        return x
    y = None if not row.from_x else x if row.r is None else x * row.r
    own = y is not x
    for j, factor in row.b:
        y = past[j] * factor if y is None else y.addcmul_(past[j], factor) if own else torch.addcmul(y, past[j], factor)
        own = True
    if row.r_prev is not None:
        y = previous * row.r_prev if y is None else torch.addcmul(y, previous, row.r_prev)
    for j, factor in row.c:
        y = noises[j] * factor if y is None else torch.addcmul(y, noises[j], factor)
    return torch.zeros_like(x) if y is None else y


def _noise_source(plan: Plan, x: Tensor, seeds: Seeds, brownian: bool) -> Callable[[int], Tensor]:
    """A function from the row to its noise."""
    if not plan.stochastic:
        return lambda k: x
    if callable(seeds):
        return seeds
    if seeds is None or len(seeds) != len(x):
        got = "none" if seeds is None else f"{len(seeds)}"
        raise UsageError(
            f"plan {plan.name!r} is stochastic: needs one seed per sample, got {got} for {len(x)}", "seeds=[0, 1, ...]"
        )
    checked, kind = noise.check_seeds(seeds), (x.shape[1:], x.dtype, x.device)
    if not brownian:
        return lambda k: noise.normal(checked, k + 1, *kind)
    drawn = [*used(plan.c).tolist(), bool(_alive(plan.init[1]))]
    for k, (span, draws) in enumerate(zip(plan.span, drawn, strict=True)):
        if draws and torch.isnan(span).any():
            problem = f"plan {plan.name!r}: the noise of row {k} belongs to no interval of a Brownian path"
            raise UsageError(problem, "leave brownian out, or give the plan its span")
    spans, ends = plan.span.tolist(), {}

    def increment(k: int) -> Tensor:
        start, stop = spans[k]
        return noise.brownian(checked, start, stop, *kind, ends)

    return increment


def row_affine(name: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) with m = p x + q D at these levels: the prediction's, or x0's where alpha = 0 and it is blind."""
    p, q = prediction(name).of_x0(alpha, sigma)
    if not prediction(name).blind:
        return p, q
    return torch.where(alpha == 0, 0.0, p), torch.where(alpha == 0, 1.0, q)


def _fold(plan: Plan, net: Preconditioned, x: Tensor) -> list[_Row]:
    """The rows with the network's preconditioning folded in: m = q c_out (F + g x), the factor q c_out moved into b.

    A prediction that no later row needs is not formed at all: its part in x joins r. Nor is one of a stage that the
    next row alone needs: its part in y_k joins that row's r, as y_k = (y_{k+1} - b_k0 F_k) / r_k.
    """
    pre = net.precondition(plan.t)
    p, q = row_affine(plan.prediction, plan.alpha[:-1], plan.sigma[:-1])
    scale = q * pre.c_out
    g = (p + q * pre.c_skip) / scale
    b = weighed(plan.b, scale)
    own = plan.r + b[:, 0] * g
    kept = _alive(g) & used(b, 1)
    learnt = own.requires_grad
    if not learnt and b.shape[1] > 1:
        only = ~(b[:, 1:].any(1) | plan.r_prev.bool() | plan.c.any(1) | used(b, 2) | plan.node[1:])
        only &= own.abs() > 0.2
        back = torch.where(kept & only, b.roll(-1, 0)[:, 1] * g / own, 0.0)  # what y_{k+1} gets for it
        kept &= ~only
        back = back.roll(1)
        own = own + back
        b[:, 1] -= back * b[:, 0].roll(1)
    r = torch.where(kept, own - b[:, 0] * g, own)
    if not learnt:
        r = torch.where(r.abs() < 1e-13 * plan.r.abs(), 0.0, torch.where((r - 1).abs() < 1e-14, 1.0, r))
    g = torch.where(kept, g, 0.0)
    draws = used(plan.c).tolist()

    # where r + sum_j b_j = 1, by linear interpolation from each partial sum to the next: one operation less
    sums = torch.cumsum(torch.cat([r[:, None], b], 1), 1)
    lean = ((sums[:, -1] - 1).abs() < 1e-13) & (sums.abs() > 0.1).all(1) & (r != 0) & (r != 1)
    lean &= ~(plan.r_prev.bool() | plan.c[:, 1:].any(1)) & (not learnt)
    shares = torch.where(lean[:, None], b / sums[:, 1:], b)

    columns = [pre.c_in, pre.c_noise, g, r, plan.r_prev, pre.c_skip, pre.c_out]
    table = torch.cat([torch.stack(columns, 1), shares, plan.c], 1).to(x)
    alive = {
        name: _alive(v).tolist() for name, v in (("g", g), ("r", r), ("r_prev", plan.r_prev), ("b", b), ("c", plan.c))
    }
    scales = (_alive(pre.c_in - 1) & ~((pre.c_in - 1).abs() < 1e-12)).tolist()
    units = (~_alive(r - 1)).tolist()
    # a network is told the time of every sample, a bare denoiser the time
    noise_levels = table[:, 1] if isinstance(net, Bare) else table[:, 1:2].expand(-1, len(x))
    rows, window, leans = [], b.shape[1], lean.tolist()
    for k, (line, c_noise) in enumerate(zip(table.unbind(), noise_levels.unbind(), strict=True)):
        c_in, _, g_k, r_k, r_prev, c_skip, c_out, *factors = line.unbind()
        rows.append(
            _Row(
                c_in=c_in if scales[k] else None,
                c_noise=c_noise,
                g=g_k if alive["g"][k] else None,
                lean=leans[k],
                r=None if units[k] else r_k,
                from_x=alive["r"][k],
                r_prev=r_prev if alive["r_prev"][k] else None,
                b=[(j, factors[j]) for j in range(window) if alive["b"][k][j] and j <= k],
                c=[(j, w) for j, w in enumerate(factors[window:]) if alive["c"][k][j] and 0 < j <= k],
                fresh=factors[window] if alive["c"][k][:1] == [True] else None,
                draws=draws[k],
                c_skip=c_skip,
                c_out=c_out,
            )
        )
    return rows


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN being one."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _alive(factor: Tensor) -> Tensor:
    """Where a factor takes part: it is not 0, or it is being learnt."""
    return torch.ones_like(factor, dtype=torch.bool) if factor.requires_grad else factor != 0


def _made(factors: Tensor) -> Tensor:
    """The row whose value factors[k, j] weighs: k - j."""
    n, window = factors.shape
    return torch.arange(n)[:, None] - torch.arange(window)


def weighed(factors: Tensor, scale: Tensor) -> Tensor:
    """factors[k, j] scale[k - j]: of what is `scale` times smaller; 0 before the first row."""
    made = _made(factors)
    return factors * torch.where(made >= 0, scale[made.clamp_min(0)], 0.0)


def used(factors: Tensor, age: int = 0) -> Tensor:
    """For every row, whether a factor of this age or more weighs what it made."""
    made, found = _made(factors)[:, age:], torch.zeros(len(factors), dtype=torch.bool)
    found[made[_alive(factors[:, age:]) & (made >= 0)]] = True
    return found
