"""Plan: a sampler on a fixed grid as a table of numbers (docs/design.md, idea C).

    m_k     = the plan's prediction at (y_k, t_k)                                      one denoiser call
    y_{k+1} = r_k y_k + r'_k y_{k-1} + sum_j b_kj m_{k-j} + sum_j c_kj xi_{k-j}        one fused linear update
    y_0     = r_init x_T + c_init xi_init

Rows are made on the host in float64; `rows` beside this file applies them, `executor` runs them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfode.denoiser import Denoiser, fingerprint
from pfode.errors import FileError, UsageError
from pfode.grids import ROUNDING
from pfode.header import read_header
from pfode.prediction import prediction
from pfode.process import Process, from_config
from pfode.tensors import read_tensors, write_tensors

__all__ = [
    "Plan",
    "foreign",
    "takes_part",
]

_TENSORS = ("t", "time", "alpha", "sigma", "r", "r_prev", "b", "c", "init", "step", "node", "first", "span")
_WHOLE = {"step": torch.int64, "node": torch.bool}
_TUNE = "tune."  # before the name of a layer, in a file


@dataclass(frozen=True, eq=False)
class Plan:
    """A table of n rows; row k makes one denoiser call and moves the register y from state k to state k + 1.

    Its tensors are copies and are not meant to be changed: `dataclasses.replace` makes another plan.

    Args:
        process: the noise process the numbers were made for; `run` refuses another.
        prediction: what m is. Where alpha = 0, x0 stands for one that is singular there (eps, score).
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
        tune: what row k adds to the output of a conditioning layer of the network it was fitted to, by the layer's
            name, float32, shape (n, width): a tuned plan (`pfode.denoiser.tuned`).

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
    tune: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with torch.inference_mode(False):  # in it, tensors would be of no use to gradients later
            self._settle()

    def _settle(self) -> None:
        """Make the tensors the plan's own, and check everything."""
        prediction(self.prediction)
        for key in _TENSORS:
            value = getattr(self, key)
            if value is None and key in ("first", "span"):
                value = self._default(key)
            value = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
            if value.is_complex():
                raise UsageError(f"plan: {key}: expected real numbers, got {value.dtype}")
            value = value.to("cpu", _WHOLE.get(key, torch.float64))
            object.__setattr__(self, key, value.clone())
            self._check(key, len(self.t))
        self._settle_tune()
        if not isinstance(self.name, str) or not self.name.isprintable() or not isinstance(self.meta, dict):
            raise UsageError(f"plan: need a printable name and a dict of meta, got {self.name!r} and {self.meta!r:.60}")
        alpha, sigma = torch.cat([self.first[1:2], self.alpha]), torch.cat([self.first[2:], self.sigma])
        if not (sigma[:-1] > 0).all() or sigma[-1] < 0 or (alpha < 0).any():
            raise UsageError(f"plan {self.name!r}: needs alpha >= 0 and sigma > 0, sigma = 0 only in the last state")
        moved = takes_part(self.init[0] - 1) or takes_part(self.init[1])
        if not moved and not torch.equal(self.first, self._default("first")):
            problem = f"plan {self.name!r}: x_T is state 0, but first = {self.first.tolist()} is not"
            raise UsageError(problem, "first=None")
        begins = torch.diff(self.step, prepend=torch.tensor([-1], device="cpu"))  # 1 in the first row of a step, else 0
        if not (self.node[0] and self.node[-1] and torch.equal(begins, self.node[:-1].long())):
            raise UsageError(f"plan {self.name!r}: a step must begin at every node but the last, and nowhere else")
        self.check_times(self.process)

    def _settle_tune(self) -> None:
        """Make the offsets the plan's own, and check them."""
        if not isinstance(self.tune, Mapping):
            raise UsageError(f"plan: tune: expected offsets by layer, got {self.tune!r:.60}", 'tune={"layer": offsets}')
        found = {}
        for layer, value in self.tune.items():
            if not isinstance(layer, str) or not layer or not layer.isprintable():
                raise UsageError(f"plan: tune: expected the name of a layer, got {layer!r:.60}")
            floating = isinstance(value, Tensor) and value.is_floating_point()
            if not floating or value.ndim != 2 or len(value) != len(self.t) or value.shape[1] == 0:
                got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.60}"
                raise UsageError(f"plan: tune: {layer}: expected floats of shape ({len(self.t)}, width), got {got}")
            found[layer] = value.to("cpu", torch.float32).clone()
            if not torch.isfinite(found[layer]).all():
                raise UsageError(f"plan: tune: {layer} is not finite")
        object.__setattr__(self, "tune", found)

    def _default(self, key: str) -> Tensor:
        """What `first` and `span` are where they are not given."""
        if key == "first":
            return torch.stack([self.time[0], self.alpha[0], self.sigma[0]])
        return torch.full((len(self.t) + 1, 2), torch.nan, device="cpu")

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
        return bool(takes_part(self.c).any() or takes_part(self.init[1]))

    @property
    def fitted_to(self) -> str | None:
        """The fingerprint of the denoiser that the plan was fitted to, or chosen for; None if to none that says."""
        fitted = self.meta.get("fitted", self.meta.get("calibrated"))
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
        same = same and self.tune.keys() == other.tune.keys()
        pairs = [(getattr(self, key), getattr(other, key)) for key in _TENSORS] if same else []
        pairs += [(value, other.tune[layer]) for layer, value in self.tune.items()] if same else []
        return same and all(_equal(a, b) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        head = f"plan {self.name!r}: {self.steps} steps, {self.nfe} NFE, prediction {self.prediction}, {self.process}"
        if self.tune:
            head += f", tuned: {sum(v.numel() for v in self.tune.values()):,} offsets in {len(self.tune)} layers"
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
        tensors |= {_TUNE + layer: value.detach().contiguous() for layer, value in self.tune.items()}
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
            tune = {key.removeprefix(_TUNE): value for key, value in tensors.items() if key.startswith(_TUNE)}
            process = from_config(config["process"])
            return cls(process, config["prediction"], **parts, name=config["name"], meta=config["meta"], tune=tune)
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{path}: broken plan: {error}") from error


def foreign(plan: Plan, denoiser: Denoiser) -> bool:
    """Whether a plan was fitted to another model than this one, as far as both say."""
    return plan.fitted_to is not None and fingerprint(denoiser) not in (None, plan.fitted_to)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN being one."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def takes_part(factor: Tensor) -> Tensor:
    """Where a factor takes part: it is not 0, or it is being learnt."""
    return torch.ones_like(factor, dtype=torch.bool) if factor.requires_grad else factor != 0
