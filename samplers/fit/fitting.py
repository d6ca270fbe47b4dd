"""Fitted plans: the numbers of a plan moved until its ends are those of a fine solution (docs/design.md, section 6).

No data are needed: noise, the converged end points of the same PF-ODE, and the fixed network. A plan has tens of
numbers, each of which is felt at the end point by its tangent (`tangents`), so the fit is a Gauss-Newton method
(Levenberg-Marquardt): per iteration one pass for the tangents of some samples, whose squared errors are then known as
quadratic functions of the numbers. A loss that is robust to the few samples that land elsewhere is minimised over
those functions exactly, and of several dampings the step is taken that lowers the loss of those samples most.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfode import grids, noise
from pfode.denoiser import Denoiser, at, fingerprint
from pfode.errors import FileError, NumericalError, UsageError, integer, number, unknown
from pfode.files import lock_folder, make_folder
from pfode.labels import class_indices
from pfode.plans.executor import run
from pfode.plans.table import Plan
from pfode.process import Process
from pfode.samplers import auto
from pfode.samplers.catalogue import Recipe, make_plan
from pfode.samplers.fit.tangents import Numbers, differences, end, lower, tangents
from pfode.samplers.sampling import DEFAULT_BATCH, find_device, prepared, sample_shape, state_dtype
from pfode.tensors import read_sealed, write_tensors

GROUP = 8  # samples that share a guidance scale
MEMORY = 2**27  # bytes that the tangents may take
FIT, CHECK = 2**60, 2**61  # first seeds of the noise fitted on and of the noise that chooses; users' seeds are small
PARAMETERISATIONS = ("general", "dyweight")
STARTS = {  # beside what auto takes by hand: the least loss decides, and with it where the first nodes lie
    "exp-ab2@trig": ("cosine(0.5)", "cosine"),
    "ipndm3@ddim": ("ays-svd",),
    "ipndm3@trig": ("cosine(0.5)", "ays-svd"),
    "unipc2@flow": ("cosine(0.5)",),
}
CACHED = {"pfode.kind": "cache"}  # what files of the cache say they are
ANEW = "delete it: it is made again"
LIMITS = {"teacher": grids.MAX_STEPS, "batch": 2**31}
MAX_NFE = 200  # of a fitted plan
MAX_BYTES = 2**34  # that the quadratic functions of an iteration, or all samples, may take
PATIENCE = 3  # iterations in which the noise that chooses shows no gain of GAIN
GAIN = 0.02  # in the logarithm of the median, in the last phase of both errors' product
DAMPED, DAMPING = 0.3, 8.0  # the first damping; the factor between those that are tried
TRIES = 6  # dampings per iteration
REWEIGHTINGS = 8  # of the samples, for a step


# ---- losses: of the mean square error q of a sample, beside the median s and the mean m of all; value and slope

Loss = tuple[Callable[[Tensor, float, float], Tensor], Callable[[Tensor, float, float], Tensor]]


def _power(p: float, soft: float) -> Loss:
    return lambda q, s, m: (q + soft * s) ** p, lambda q, s, m: p * (q + soft * s) ** (p - 1)


def _balanced(weight: float) -> Loss:
    return (
        lambda q, s, m: torch.log(q + 1e-2 * s) + weight * q / m,
        lambda q, s, m: 1 / (q + 1e-2 * s) + weight / m,
    )


LOSSES: dict[str, Loss] = {
    "l2": (lambda q, s, m: q, lambda q, s, m: torch.ones_like(q)),
    "l1": _power(0.5, 1e-4),
    "root": _power(0.25, 1e-3),
    "log": (lambda q, s, m: torch.log(q + 1e-2 * s), lambda q, s, m: 1 / (q + 1e-2 * s)),
    "geman-mcclure": (lambda q, s, m: q / (1 + q / (9 * s)), lambda q, s, m: (1 + q / (9 * s)) ** -2),
    "balanced": _balanced(3.0),
}
PHASES = {"balanced": ("log", "balanced")}  # one after another


# ---- parameterisations: from a vector of zeros, which is the starting plan, to the numbers of a plan


_PURE = 0.01  # where alpha vanishes the clock ends as if alpha/sigma were this


def clock(process: Process, t: Tensor) -> Tensor:
    """log(sigma / (alpha + sigma/100)): the logarithm of sigma/alpha, finite at pure noise."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return torch.log(sigma / (alpha + _PURE * sigma))


def clocked(process: Process, u: Tensor) -> Tensor:
    """The times at these clocks, kept within those of the process."""
    left = torch.expm1(-u - math.log(_PURE)).clamp_min(1e-300)  # alpha/sigma in units of 1/100
    return process.time(2 * torch.log(left * _PURE)).clamp(process.t_min, process.t_max)


class General:
    """Times, query times, and corrections of every coefficient: the union of LD3, S4S and GS.

    The gaps between the nodes, in the clock, are a softmax (the start's logits plus parameters); the coefficients are
    the recipe's at those times plus corrections; each query time is its node's moved by a parameter in the clock.

    Args:
        start: the plan of zeros.
        rebuild: the recipe's plan on other times; None: the start keeps its nodes and coefficients.
        time_only: no corrections of the coefficients.
    """

    def __init__(self, start: Plan, rebuild: Callable[[Tensor], Plan] | None, time_only: bool = False):
        self.start, self.rebuild, self.process = start, rebuild, start.process
        n, self.nodes = start.nfe, start.times
        u = clock(self.process, self.nodes[:-1])
        low = clock(self.process, torch.tensor(self.process.t_min, dtype=torch.float64))
        gaps = torch.cat([u[:-1] - u[1:], (u[-1] - low).clamp_min(0.02 * (u[0] - low) / n)[None]])
        self.high, self.whole = u[0], gaps.sum()
        self.logits = torch.log(gaps / self.whole)
        free = 0 if rebuild is None else len(gaps) - 1
        self.latest: tuple[Tensor, Plan] | None = None  # what was rebuilt last, for which gaps
        self.parts = [free, n, 0 if time_only else n + n * (n + 1) // 2]
        self.size = sum(self.parts)

    def plan(self, theta: Tensor) -> Plan:
        return self.numbers(theta).plan(self._base(theta))

    def numbers(self, theta: Tensor) -> Numbers:
        _, query, corrections = theta.split(self.parts)
        base, n = Numbers.of(self._base(theta)).vector, self.start.nfe
        moved = torch.where(query == 0, base[:n], clocked(self.process, clock(self.process, base[:n]) + query))
        rest = base[n:] + corrections if len(corrections) else base[n:]
        return Numbers(torch.cat([moved, rest]), n)

    def _base(self, theta: Tensor) -> Plan:
        gaps = theta[: self.parts[0]]
        if self.rebuild is None or not gaps.any():
            return self.start
        if self.latest is None or not torch.equal(self.latest[0], gaps):
            self.latest = gaps.clone(), self._rebuilt(self.rebuild, gaps)
        return self.latest[1]

    def _rebuilt(self, rebuild: Callable[[Tensor], Plan], gaps: Tensor) -> Plan:
        share = torch.softmax(self.logits + torch.cat([gaps, gaps.new_zeros(1)]), 0)
        inner = clocked(self.process, self.high - self.whole * share.cumsum(0)[:-1])
        return rebuild(torch.cat([self.nodes[:1], inner, self.nodes[-1:]]))


class DyWeight:
    """Three weights per step and a scale of each query time, the step's length following from its weights (DyWeight).

    With s = sigma/alpha, y = x/alpha and d_k = (y_k - D(., kappa_k s_k))/s_k,

        y_{k+1} = y_k + (s'_{k+1} - s_k) sum_j w_kj d_{k-j},    s_{k+1} = s_k + (sum_j w_kj) (s'_{k+1} - s_k),

    s' being the start's nodes. The start is ipndm3 in the chart ddim.

    Raises:
        UsageError: a start at pure noise (alpha = 0), or with other rows than ipndm3's.
    """

    WEIGHTS = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12))

    def __init__(self, start: Plan):
        self.start = start
        if start.alpha[0] == 0:
            raise UsageError("dyweight: sigma/alpha is infinite at the first time", 'parameterisation="general"')
        self.ratio = start.sigma / start.alpha
        self.count = [min(k, 2) + 1 for k in range(start.nfe)]
        self.size = sum(self.count) + start.nfe
        zero = self.numbers(torch.zeros(self.size, dtype=torch.float64))
        if start.nfe != start.steps or not torch.allclose(zero.vector, Numbers.of(start).vector, 1e-6, 1e-9):
            raise UsageError(f"dyweight: plan {start.name!r} is not ipndm3 in the chart ddim", 'start="ipndm3@ddim"')

    def plan(self, theta: Tensor) -> Plan:
        return self.numbers(theta).plan(self.start)

    def numbers(self, theta: Tensor) -> Numbers:
        n, process = self.start.nfe, self.start.process
        weights, scales = theta.split([self.size - n, n])
        s, level, states = self.ratio[0], self.start.init[0] / self.start.alpha[0], []
        unit = torch.eye(n + 1, dtype=torch.float64)
        y, slopes, alpha, t = level * unit[0], [], [], []
        for k, free in enumerate(weights.split(self.count)):
            first = process.time(-2 * torch.log(s))
            asked = process.time(-2 * (torch.log(s) + scales[k])).clamp(process.t_min, process.t_max)
            t.append(torch.where(scales[k] == 0, self.start.t[k], asked))
            alpha.append(process.alpha(first))
            slopes.insert(0, (y - unit[k + 1]) / s)
            states.append(y)
            w = free + torch.tensor(self.WEIGHTS[min(k, 2)], dtype=torch.float64)
            length = self.ratio[k + 1] - s
            y = y + length * sum((w[j] * slopes[j] for j in range(len(w))), torch.zeros_like(y))
            s = (s + w.sum() * length).clamp_min(1e-6)
        x = torch.stack([*states, y]) * torch.stack([*alpha, self.start.alpha[-1]])[:, None]
        r = x[1:, 0] / x[:-1, 0]
        b = torch.tril(x[1:, 1:] - r[:, None] * x[:-1, 1:])
        return Numbers(torch.cat([torch.stack(t), r, lower(b)]), n)


Family = General | DyWeight


# ---- what is fitted: noise, end points, conditions


@dataclass(frozen=True, eq=False)
class Group:
    """Samples under one guidance scale: x_T, the converged end points, both (batch, ...), and a class each, or none."""

    denoiser: Denoiser
    x: Tensor
    target: Tensor
    label: Tensor | None

    def __len__(self) -> int:
        return len(self.x)

    def part(self, size: int) -> Iterator["Group"]:
        """The same in parts of at most `size` samples."""
        for i in range(0, len(self), size):
            few = slice(i, i + size)
            label = None if self.label is None else self.label[few]
            yield Group(self.denoiser, self.x[few], self.target[few], label)

    def call(self, x: Tensor, t: float) -> Tensor:
        """D, for the group's samples or several times as many: all of them, then all of them again."""
        cond = {} if self.label is None else {"label": self.label.repeat(len(x) // len(self))}
        return at(self.denoiser, t)(x, torch.tensor(t, dtype=torch.float64), **cond).to(x.dtype)


@dataclass(frozen=True)
class Progress:
    """What a fit says of itself.

    Fields: stage, "teacher" or "fit"; done of total (samples, iterations); and of a fit the root mean square and the
    median end-point error on the noise that chooses, of the best plan so far and of the starting plan.
    """

    stage: str
    done: int
    total: int
    rms: float = math.nan
    median: float = math.nan
    start_rms: float = math.nan
    start_median: float = math.nan


@dataclass
class _State:
    """A fit between two iterations."""

    theta: Tensor
    best: Tensor
    damping: float = DAMPED
    done: int = 0
    stale: int = 0
    failed: int = 0
    phase: int = 0
    mark: float = math.inf  # the lowest value that a phase looks at

    def save(self, path: Path) -> None:
        """Keep it; the file says by its name what it is a state of."""
        rest = [self.damping, self.mark, self.done, self.stale, self.failed, self.phase]
        kept = {"theta": self.theta, "best": self.best.clone(), "rest": torch.tensor(rest, dtype=torch.float64)}
        write_tensors(path, kept, {**CACHED, "pfode.for": path.name})

    @classmethod
    def load(cls, path: Path, size: int, phases: int) -> "_State":
        """The state that was kept.

        Raises:
            FileError: damaged, or of another fit.
        """
        found = _read(path, {"theta": (size,), "best": (size,), "rest": (6,)})
        damping, mark, *counts = found["rest"].tolist()
        sound = damping > 0 and not math.isnan(mark) and all(math.isfinite(c) and c >= 0 == c % 1 for c in counts)
        if not sound or counts[-1] >= phases:
            raise FileError(f"{path}: not the state of this fit", ANEW)
        done, stale, failed, phase = map(int, counts)
        return cls(found["theta"], found["best"], damping, done, stale, failed, phase, mark)


class Errors:
    """Mean square end-point errors per sample, float64, shape (n,)."""

    def __init__(self, each: Tensor):
        self.each = each

    @property
    def rms(self) -> float:
        return self.each.mean().sqrt().item()

    @property
    def median(self) -> float:
        return self.each.sqrt().median().item()

    def gain(self, start: "Errors") -> float:
        """The logarithms of both ratios to the start's, added; infinite where one of them is worse."""
        ratios = [new / max(old, 1e-300) for new, old in ((self.rms, start.rms), (self.median, start.median))]
        sound = all(ratio <= 1 for ratio in ratios)
        return sum(math.log(max(ratio, 1e-300)) for ratio in ratios) if sound else math.inf


@dataclass(frozen=True, eq=False)
class _Problem:
    """What the iterations see."""

    family: Family
    phases: tuple[str, ...]
    features: Callable[[Tensor], Tensor] | None
    batch: int

    def errors(self, numbers: Numbers, groups: Sequence[Group]) -> Errors:
        """Of a plan's end points; in the features, where there are any."""
        each = []
        for group in groups:
            y = end(numbers, group.call, self._first(group))
            apart = self._seen(y) - self._seen(group.target)
            each.append(apart.double().flatten(1).pow(2).mean(1))
        return Errors(torch.cat(each).cpu())

    def quadratics(self, theta: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Tensor, Tensor]:
        """The errors q + 2 g.d + d.H d of every sample after a step d: shapes (n,), (n, size), (n, size, size)."""
        numbers = self.family.numbers(theta)
        change = differences(self.family.numbers, theta)
        whole = len(numbers.vector)
        own = self.family.size < whole
        wanted = change if own else Numbers(torch.eye(whole, dtype=torch.float64), numbers.n)
        found: list[tuple[Tensor, ...]] = []
        for group in groups:
            each = group.x[0].numel() * group.x.element_size() * len(wanted.vector) * (numbers.n + 2)
            for part in group.part(max(1, int(MEMORY // each))):
                y, moved = tangents(
                    numbers, wanted, self.family.start.process, part.call, self._first(part), self.batch
                )
                apart, moved = self._apart(part, y, moved)
                d = apart.shape[1]
                found.append(
                    (apart.pow(2).mean(1), (moved @ apart[..., None])[..., 0] / d, moved @ moved.transpose(1, 2) / d)
                )
        q, g, h = (torch.cat(values).cpu() for values in zip(*found, strict=True))
        if own:
            return q, g, h
        a = change.vector
        return q, g @ a.T, a @ h @ a.T

    def _first(self, group: Group) -> Tensor:
        return float(self.family.start.init[0]) * group.x

    def _seen(self, x: Tensor) -> Tensor:
        """Samples as errors see them, shape (batch, ...)."""
        if self.features is None:
            return x
        found = self.features(x)
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(x) or found.numel() == 0:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(f"features: need a tensor of shape ({len(x)}, ...), got {got}", "x.flatten(1), say")
        return found

    def _apart(self, part: Group, y: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """Errors, (batch, d), and their tangents, (batch, p, d), in float64."""
        if self.features is not None:
            here, size = self._seen(y), moved.flatten(2).pow(2).mean(2).sqrt().clamp_min(1e-30)
            level = 1e-2 * part.target.pow(2).mean().sqrt()
            h = (level / size).reshape(*size.shape, *[1] * (y.ndim - 1))
            moved = torch.stack([(self._seen(y + h[i] * move) - here) for i, move in enumerate(moved)])
            moved, y = moved / h.reshape(*size.shape, *[1] * (here.ndim - 1)), here
        apart = y - self._seen(part.target)
        return apart.double().flatten(1), moved.double().flatten(2).transpose(0, 1)

    def iterate(self, state: _State, groups: Sequence[Group]) -> None:
        """One Levenberg-Marquardt step on some groups: of several dampings the one with the least loss of theirs."""
        value, slope = LOSSES[self.phases[state.phase]]
        q, g, h = self.quadratics(state.theta, groups)
        usual = max(q.sqrt().median().item() ** 2, 1e-300), max(q.mean().item(), 1e-300)
        diagonal = (slope(q, *usual)[:, None] * h.diagonal(dim1=1, dim2=2)).mean(0)
        diagonal = diagonal.clamp_min(1e-9 * float(diagonal.max()) + 1e-300)

        def attempt(damping: float) -> tuple[float, Tensor]:
            step = _minimised(q, g, h, lambda each: slope(each, *usual), damping * diagonal)
            try:
                numbers = self.family.numbers(state.theta + step)
            except UsageError:  # two of its times have become one
                return math.inf, step
            found = value(self.errors(numbers, groups).each, *usual).mean().item()
            return found if math.isfinite(found) else math.inf, step

        least, damping = value(q, *usual).mean().item(), state.damping
        found, step = attempt(damping)
        factor = 1 / DAMPING if found < least else DAMPING
        better = found < least
        for _ in range(TRIES):
            if better and factor > 1:
                break
            tried, other = attempt(factor * damping)
            if better and tried >= found:
                break
            damping, found, step = factor * damping, tried, other
            better = found < least
        state.damping, state.failed = min(max(damping, 1e-9), 1e6), 0 if better else state.failed + 1
        if better:
            state.theta = state.theta + step


def _after(q: Tensor, g: Tensor, h: Tensor, step: Tensor) -> Tensor:
    """The errors after a step, as the quadratic functions have them."""
    return (q + 2 * (g @ step) + ((h @ step) @ step)).clamp_min(0)


def _minimised(q: Tensor, g: Tensor, h: Tensor, slope: Callable[[Tensor], Tensor], ridge: Tensor) -> Tensor:
    """The step that minimises the mean loss of the quadratic functions, by reweighting them."""
    step = torch.zeros_like(ridge)
    for _ in range(REWEIGHTINGS):
        weight = slope(_after(q, g, h, step))
        matrix = torch.einsum("n,npq->pq", weight, h) / len(q) + torch.diag(ridge)
        step = -torch.linalg.solve(matrix, (weight[:, None] * g).mean(0))
    return step


class _Fit:
    """Where noise and teachers come from, and the cache.

    Args:
        settings: all that the result depends on, for the names in the cache and the plan's meta.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        settings: dict[str, Any],
        shape: Sequence[int] | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        cache: str | Path | None,
        batch: int,
        tell: Callable[[Progress], None],
    ):
        self.denoiser = prepared(denoiser, None, device)
        self.settings, self.batch, self.tell = settings, batch, tell
        self.shape, self.dtype = sample_shape(denoiser, None, shape), state_dtype(dtype, None)
        self.device = find_device(device or getattr(self.denoiser, "device", None) or "cpu")
        self.scales = _ends(settings["guidance"])
        self.fingerprint = fingerprint(denoiser)
        self.cache = None if cache is None else Path(cache)
        if self.cache is not None:
            if self.fingerprint is None or settings["features"]:
                what = "features have" if settings["features"] else "this denoiser has"
                raise UsageError(f"cache: {what} no fingerprint to tell its files by", "leave the cache out")
            if hasattr(denoiser, "denoiser"):
                problem = f"cache: {type(denoiser).__name__} has the fingerprint of the denoiser underneath"
                raise UsageError(problem, "give that one and guidance=, or leave the cache out")
            make_folder(self.cache)
        label = settings["label"]
        names = getattr(denoiser, "labels", None)
        self.labels = (list(range(len(names))) if names else None) if label == "all" else label

    @property
    def guided(self) -> bool:
        return self.scales is not None or getattr(self.denoiser, "evals", 1) > 1

    def check_size(self, numbers: int) -> None:
        """Refuse what cannot be kept in memory, before anything is made.

        Args:
            numbers: that are fitted.

        Raises:
            UsageError: too many samples, or too many numbers for so many.
        """
        s = self.settings
        most = MAX_BYTES // (16 * math.prod(self.shape))
        for name in ("n", "check"):
            integer(name, s[name], 1, most)
        size = 8 * min(s["active"], s["n"]) * numbers**2
        if size > MAX_BYTES:
            problem = f"nfe, active: {s['active']} samples by {numbers} numbers would take {size / 2**30:,.0f} GiB"
            raise UsageError(problem, "fewer calls, a smaller active=, or time_only=True")

    def groups(self, first: int, n: int) -> list[Group]:
        """n samples with their end points: noise from `first` on, the classes in turn, scales spread over the range."""
        count = math.ceil(n / GROUP)
        seeds = [first + (self.settings["seed"] << 32) + i for i in range(n)]
        labels = self._labels(n)
        made = []
        for i in range(count):
            few = slice(i * GROUP, (i + 1) * GROUP)
            denoiser = self.denoiser
            if self.scales is not None:
                low, high = self.scales
                denoiser = prepared(denoiser, low + (high - low) * (i + 0.5) / count)
            x = noise.normal(seeds[few], noise.INITIAL, self.shape, self.dtype, self.device)
            x = float(denoiser.process.sigma(denoiser.process.t_max)) * x
            made.append(Group(denoiser, x, x, None if labels is None else labels[few]))
        ends = self._teach(made, first)
        return [replace(group, target=end) for group, end in zip(made, ends, strict=True)]

    def _labels(self, n: int) -> Tensor | None:
        if self.labels is None:
            return None
        some = self.labels if isinstance(self.labels, list | tuple) else [self.labels]
        each = [one for _, one in zip(range(n), itertools.cycle(some), strict=False)]
        indices = class_indices(self.denoiser, each, n)
        assert indices is not None
        return indices.to(self.device)

    def _teach(self, groups: list[Group], first: int) -> list[Tensor]:
        """The end points of a fine solution, from the cache if they are there."""
        keys = ("n" if first == FIT else "check", "teacher", "label", "guidance", "seed")
        path = self._path("teacher", {key: self.settings[key] for key in keys} | {"first": first})
        if path is not None and path.exists():
            shape = (sum(map(len, groups)), *self.shape)
            ends = _read(path, {"x0": shape})["x0"].to(self.device, self.dtype)
        else:
            process = self.denoiser.process
            plan = make_plan("exp-ab3", process, self.settings["teacher"], grid="karras")
            parts, total = [], sum(map(len, groups))
            for group in groups:
                cond: dict[str, Any] = {} if group.label is None else {"label": group.label}
                parts.append(run(plan, group.denoiser, group.x, **cond))
                self.tell(Progress("teacher", sum(map(len, parts)), total))
            ends = torch.cat(parts)
            if path is not None:
                write_tensors(path, {"x0": ends.cpu()}, {**CACHED, "pfode.for": path.name})
        if not ends.isfinite().all():
            raise NumericalError("the fine solution is not finite", "check the network and its precision")
        return list(ends.split([len(group) for group in groups]))

    def _path(self, kind: str, what: dict[str, Any]) -> Path | None:
        """Where the cache keeps something that depends on the model and on `what`."""
        if self.cache is None:
            return None
        whole = {**what, "model": self.fingerprint, "shape": list(self.shape), "dtype": str(self.dtype)}
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()
        return self.cache / f"{kind}-{digest[:16]}.safetensors"

    def run(self, families: list[Family], features: Callable[[Tensor], Tensor] | None) -> Plan:
        """The iterations, from where the cache has them."""
        s = self.settings
        fitted, checked = self.groups(FIT, s["n"]), self.groups(CHECK, s["check"])
        problem, start = self._best(families, fitted, checked, features)
        family, total = problem.family, s["iterations"]
        zeros = torch.zeros(family.size, dtype=torch.float64)
        path = self._path("fit", {**s, "iterations": None, "start": family.numbers(zeros).vector.tolist()})
        kept = path is not None and path.exists()
        state = _State.load(path, family.size, len(problem.phases)) if path and kept else _State(zeros, zeros)
        best = problem.errors(family.numbers(state.best), checked)
        while True:
            self.tell(Progress("fit", state.done, total, best.rms, best.median, start.rms, start.median))
            if (state.failed or state.stale >= PATIENCE) and state.phase + 1 < len(problem.phases):
                state = _State(state.best, state.best, done=state.done, phase=state.phase + 1)
            if state.done >= total or state.failed or state.stale >= PATIENCE:
                break
            draw = torch.Generator().manual_seed((s["seed"] << 20) + state.done)
            some = torch.randperm(len(fitted), generator=draw)[: math.ceil(s["active"] / GROUP)]
            problem.iterate(state, [fitted[i] for i in sorted(some.tolist())])
            state.done += 1
            if not state.failed:
                latest = problem.errors(family.numbers(state.theta), checked)
                mark = latest.gain(start) if state.phase else math.log(latest.median)
                state.stale = 0 if mark < state.mark - GAIN else state.stale + 1
                state.mark = min(mark, state.mark)
                if latest.gain(start) < best.gain(start):
                    best, state.best = latest, state.theta
            if path is not None:
                state.save(path)
        return self._plan(family, state, best, start)

    def _best(
        self, families: list[Family], fitted: list[Group], checked: list[Group], features: Any
    ) -> tuple[_Problem, Errors]:
        """The start with the least loss on some of the noise fitted on, and its errors on the noise that chooses."""
        fitted = fitted[: math.ceil(self.settings["active"] / GROUP)]
        problems = [
            _Problem(family, PHASES.get(self.settings["loss"], (self.settings["loss"],)), features, self.batch)
            for family in families
        ]
        zeros = [family.numbers(torch.zeros(family.size, dtype=torch.float64)) for family in families]
        found = [problem.errors(zero, fitted) for problem, zero in zip(problems, zeros, strict=True)]
        value = LOSSES[self.settings["loss"]][0]
        usual = [max(min(values) ** 2, 1e-300) for values in zip(*((e.median, e.rms) for e in found), strict=True)]
        losses = [value(errors.each, *usual).mean().item() for errors in found]
        if not any(map(math.isfinite, losses)):
            raise NumericalError("no starting plan ends in finite samples and features", "check network and features")
        losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
        i = min(range(len(losses)), key=losses.__getitem__)
        return problems[i], problems[i].errors(zeros[i], checked)

    def _plan(self, family: Family, state: _State, best: Errors, start: Errors) -> Plan:
        """The best plan, which says how it came about."""
        begun = family.start
        validation = {
            "rms": best.rms, "median": best.median, "start rms": start.rms, "start median": start.median,
            "n": len(best.each),
        }  # fmt: skip
        fitted = {
            "model": self.fingerprint,
            "start": {"name": begun.name, **begun.meta},
            "settings": self.settings,
            "iterations": state.done,
            "validation": validation,
        }
        return replace(family.plan(state.best), name=f"fitted-{begun.nfe}", meta={"grid": "fitted", "fitted": fitted})


def fit_plan(
    denoiser: Denoiser,
    nfe: int,
    *,
    start: str | Recipe | Plan | Sequence[str | Recipe | Plan] = "auto",
    grid: Any = None,
    chart: str | None = None,
    parameterisation: str = "general",
    time_only: bool = False,
    loss: str = "balanced",
    features: Callable[[Tensor], Tensor] | None = None,
    iterations: int = 20,
    n: int = 256,
    active: int = 96,
    check: int = 128,
    teacher: int = 100,
    label: int | str | Sequence[int | str] | None = "all",
    guidance: float | tuple[float, float] | None = None,
    seed: int = 0,
    shape: Sequence[int] | None = None,
    batch: int = DEFAULT_BATCH,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    cache: str | Path | None = None,
    callback: Callable[[Progress], None] | None = None,
) -> Plan:
    """A plan of nfe denoiser calls whose end points are as near as they get to those of a fine solution.

    It starts from a hand-made plan and is never worse than it, in root mean square or median, on noise that was not
    fitted on. The seeds of all noise are far from those of `sample`. The same arguments give the same plan.

    Args:
        denoiser: what the plan is for; its `fingerprint`, where it has one, goes into the plan, which then warns when
            it is run with another.
        nfe: rows.
        start: a recipe, "recipe@chart", "auto" or a plan of nfe rows; of several the one with the least loss is taken,
            and "auto" is several: what it is for `make_plan`, and `STARTS`. A plan that `make_plan` made keeps its
            recipe, any other its coefficients. grid, chart: of the recipe.
        parameterisation: "general" (`General`), or "dyweight" (`DyWeight`).
        time_only: fit times and query times alone.
        loss: of a sample's mean square error: "l2", "l1", "root", "log" or "geman-mcclure", from the one that samples
            which landed elsewhere dominate to those that they cannot; "balanced" is "log" while that helps, then with
            the mean square beside it.
        features: (batch, *shape) -> (batch, ...), in which errors are then measured.
        iterations: at most; it ends when nothing is gained any more. With a cache a later call may ask for more.
        n: samples fitted on; active: those of them, drawn anew, that an iteration has tangents of; check: samples that
            choose the best iterate and end the fit.
        teacher: steps of the fine solution, by exp-ab3.
        label: a class, or several in turn; "all" for every class, where there are any; None for none.
        guidance: a scale, or the ends of a range over which the samples are spread.
        shape, batch, dtype, device: as for `sample`.
        cache: a folder (made where missing) that keeps the teacher's end points and the state of the fit: called
            again after an interruption, it continues, to the same plan.
        callback: told about the progress.

    Raises:
        UsageError: options that cannot be carried out; NumericalError: a teacher whose end points are not finite.
        WriteError, FileError: the cache.
    """
    nfe, seed = integer("nfe", nfe, 1, MAX_NFE), integer("seed", seed, 0, 2**20 - 1)
    if not isinstance(loss, str) or loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    if not isinstance(parameterisation, str) or parameterisation not in PARAMETERISATIONS:
        raise unknown("parameterisation", parameterisation, PARAMETERISATIONS)
    if not isinstance(time_only, bool):
        raise UsageError(f"time_only: got {time_only!r:.60}", "time_only=True or time_only=False")
    for name, function in (("features", features), ("callback", callback)):
        if function is not None and not callable(function):
            raise UsageError(f"{name}: {type(function).__name__} cannot be called", f"{name}=None, or a function")
    if cache is not None and not isinstance(cache, str | os.PathLike):
        raise UsageError(f"cache: need a folder, got {cache!r:.60}", 'cache="folder"')
    if time_only and parameterisation != "general":
        raise UsageError("time_only: dyweight is another parameterisation", 'parameterisation="general"')
    counts = {"iterations": iterations, "n": n, "active": active, "check": check, "teacher": teacher, "batch": batch}
    counts = {name: integer(name, value, 1, LIMITS.get(name, 2**62)) for name, value in counts.items()}
    tell = callback or (lambda progress: None)
    settings = {
        "nfe": nfe, "parameterisation": parameterisation, "time_only": time_only, "loss": loss,
        **{name: value for name, value in counts.items() if name != "batch"},
        "label": label, "guidance": guidance, "seed": seed, "features": features is not None,
        "begun": stated(start, grid, chart),
    }  # fmt: skip
    begun = _Fit(denoiser, settings, shape, dtype, device, cache, batch, tell)
    families = _starts(start, denoiser.process, nfe, grid, chart, begun.guided, parameterisation, time_only)
    begun.check_size(max(family.size for family in families))
    lock = contextlib.nullcontext() if cache is None else lock_folder(cache, "fit", "wait for it, or another cache")
    with lock, torch.no_grad():
        return begun.run(families, features)


def stated(start: Any, grid: Any = None, chart: str | None = None) -> list[Any]:
    """What a fit was told to start from, as JSON: the names, the numbers of plans, then grid and chart."""
    several = list(start) if isinstance(start, Sequence) and not isinstance(start, str) else [start]
    told: list[Any] = []
    for one in several:
        told.append(
            [one.name, *Numbers.of(one).vector.tolist()] if isinstance(one, Plan) else getattr(one, "name", one)
        )
    return [*told, grid.tolist() if isinstance(grid, Tensor) else grid if grid is None else str(grid), chart]


def _starts(
    start: Any, process: Process, nfe: int, grid: Any, chart: str | None, guided: bool, kind: str, time_only: bool
) -> list[Family]:
    """The family of every starting plan."""
    several = list(start) if isinstance(start, Sequence) and not isinstance(start, str) else [start]
    if not several:
        raise UsageError("start: got none", 'start="auto"')
    if kind == "dyweight" and several == ["auto"]:
        several = ["ipndm3@ddim"]
    if "auto" in several and grid is None and chart is None and kind == "general":
        for name, rules in STARTS.items():
            sampler, named = name.split("@")
            several += [make_plan(sampler, process, nfe=nfe, grid=rule, chart=named) for rule in rules]
    families = []
    for one in several:
        if isinstance(one, Plan):
            if grid is not None or chart is not None:
                raise UsageError("a plan to start from has its own grid and chart", "leave grid and chart out")
            if one.process != process:
                raise UsageError(f"start: the plan was made for {one.process}, the denoiser has {process}")
            plan, sampler, named = one, one.meta.get("sampler"), one.meta.get("chart")
        else:
            if not isinstance(one, str | Recipe):
                raise UsageError(f"start: need a recipe or a plan, got {one!r:.60}", 'start="auto"')
            sampler, named = one, chart
            if isinstance(one, str) and "@" in one:
                sampler, named = one.split("@", 1)
            if sampler == "auto":
                chosen = auto.choose(process, nfe, guided)
                sampler, named = chosen.sampler, chosen.chart if named is None else named
            plan = make_plan(sampler, process, nfe=nfe, grid=grid, chart=named, guided=guided)
        if not plan.first[0] >= process.t_max * (1 - 1e-6) or plan.sigma[-1] > 0:
            raise UsageError(
                f"start: plan {plan.name!r} does not lead from t_max to clean data", "leave its ends alone"
            )
        if plan.nfe != nfe:
            raise UsageError(f"start: plan {plan.name!r} makes {plan.nfe} calls, not {nfe}", "another sampler or nfe")
        if kind == "dyweight":
            families.append(DyWeight(plan))
            continue
        rebuild = _rebuild(plan, sampler, named)
        families.append(General(plan, rebuild, time_only))
    return families


def _rebuild(plan: Plan, sampler: Any, chart: str | None) -> Callable[[Tensor], Plan] | None:
    """The plan's recipe on other times; None where its recipe is not known, or has options that are not."""

    def rebuild(times: Tensor) -> Plan:
        return make_plan(sampler, plan.process, grid=times, chart=chart)

    if plan.nfe < 2 or sampler is None or "afs" in plan.meta or "fitted" in plan.meta:
        return None
    try:
        again = rebuild(plan.times)
        same = torch.allclose(Numbers.of(again).vector, Numbers.of(plan).vector, 1e-6, 1e-9)
    except UsageError:
        return None
    return rebuild if again.nfe == plan.nfe and same else None


def _ends(guidance: float | tuple[float, float] | None) -> tuple[float, float] | None:
    """The ends of the range of scales."""
    if guidance is None:
        return None
    low, high = guidance if isinstance(guidance, tuple | list) and len(guidance) == 2 else (guidance, guidance)
    low, high = number("guidance", low), number("guidance", high)
    if low > high:
        raise UsageError(f"guidance: the range {low:g} to {high:g} is empty", f"guidance=({high:g}, {low:g})")
    return low, high


def _read(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The floating-point tensors of a file of the cache.

    Raises:
        FileError: damaged, renamed, or with other tensors than these.
    """
    found, metadata = read_sealed(path, CACHED["pfode.kind"], ANEW)
    sound = {name: tuple(value.shape) for name, value in found.items()} == shapes
    if not sound or not all(x.is_floating_point() for x in found.values()) or metadata.get("pfode.for") != path.name:
        raise FileError(f"{path}: not what a fit keeps under this name", ANEW)
    return found
