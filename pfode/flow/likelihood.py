"""The likelihood of data under a denoiser: the change of variables along its PF-ODE (docs/design.md, idea F).

    log p(x) = log p(x_1) + d log(sigma_1 / sigma_0) - int alpha tr dD/dx d log(sigma/alpha)

with x_0 the state at t_min and x_1 the one at t_max (Song et al. 2021, appendix D.2, written for a denoiser). How data
become states at t_min, and densities probabilities, is in dequantise.py; the path and the nodes of the integral are in
path.py; the law of x_1 is in prior.py, the trace in divergence.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pfode.denoiser import Denoiser
from pfode.errors import NumericalError, UsageError, integer, number
from pfode.flow.dequantise import dequantised
from pfode.flow.divergence import Exact, Trace, denoiser_divergence, find_trace, signs
from pfode.flow.path import (
    MAX_STEPS,
    End,
    Nodes,
    Paths,
    adaptive_path,
    differentiable_path,
    ends,
    plan_path,
    solver_for,
    walked,
)
from pfode.flow.prior import Prior, moments_for, prior_at
from pfode.flow.subject import Subject, subject
from pfode.ode import Solver
from pfode.ode.adjoints.problem import Adjoint, Direct
from pfode.plans.executor import check_output
from pfode.plans.table import Plan

__all__ = ["Likelihood", "Parts", "log_likelihood"]

Parts = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Likelihood:
    """What `log_likelihood` and `elbo` return; tensors of shape (n,) unless said otherwise.

    Attributes:
        nats: log p of every sample: of data in bins the logarithm of a probability (a lower bound), of others that of
            a density.
        stderr: standard error of nats over the probes (over the noise, of an `elbo`): 0 where the trace is exact, NaN
            of one probe.
        parts: what nats is the sum of, in their order. Of a likelihood "prior", log p of the state at t_max; "linear",
            d log(sigma_1 / sigma_0), for densities with d log alpha_0; "trace", minus the integral of the trace;
            "dequantisation", what makes a probability of a density.
        z: the states at t_max, as `encode` gives them, shape (n, ...).
        nfe: denoiser calls, those for traces among them; products: with the Jacobian; steps: accepted ones.
        failed: why a sample has no value (NaN), by its index.
        end, width: "none", "uniform" or "truncated"; the width of a bin, 0 for densities.
        prior: name of the law at t_max: "exact", "moments", "mean" or "plain" (see pfode.flow.prior).
        plain_kl: what a plain one is off by in the mean, in nats; the value of one sample by about sqrt(2 plain_kl).
    """

    nats: Tensor
    stderr: Tensor
    parts: Parts
    z: Tensor
    nfe: Tensor
    products: Tensor
    steps: Tensor
    failed: dict[int, str]
    end: str
    width: float
    prior: str
    plain_kl: float

    @property
    def bits_per_dim(self) -> Tensor:
        """-nats / (d log 2), d the elements of a sample."""
        return -self.nats / (self.z[0].numel() * math.log(2))

    def __len__(self) -> int:
        return len(self.nats)


def log_likelihood(
    denoiser: Denoiser,
    x: Tensor,
    *,
    divergence: str | Trace = "auto",
    probes: int = 4,
    rtol: float = 1e-5,
    seeds: Sequence[int] | None = None,
    end: str = "truncated",
    bins: int | None = None,
    draws: int = 1,
    prior: str = "auto",
    label: Any = None,
    guidance: float | None = None,
    plan: Plan | None = None,
    method: str | Solver = "auto",
    adjoint: str | Adjoint | Direct = "checkpoint",
    batch: int | None = None,
    max_steps: int = MAX_STEPS,
    throw: bool = True,
    **cond: Any,
) -> Likelihood:
    """log p(x) of every sample, along the PF-ODE.

    A sample's value depends on its numbers, its seed and the tolerance, not on its batch. Gradients flow to x, to what
    the denoiser is made of and to its conditions, where the caller has them enabled and something asks for them: the
    graph of every trace is then kept.

    Args:
        x: data as `sample` gives them, shape (n, ...), pictures in [-1, 1]. The state is kept in float64.
        divergence: "exact", "hutchinson", or "auto", exact up to 64 elements; or `Exact(...)`, `Hutchinson(...)`.
        probes: of "hutchinson": new random signs at every node.
        rtol: about the error in nats that the solver makes where densities are smooth; the state is solved to a
            hundredth of it (a tenth with the method of order 8, taken below 1e-6).
        seeds: of every sample, for probes and dequantisation; by default from its own numbers.
        end: "truncated" or "uniform" dequantisation for data of finitely many values, "auto" by the noise of t_min (see
            pfode.flow.dequantise); "none": the density of data with that noise, also where nothing says how many
            values there are.
        bins: how many values an element has, evenly from -1 to 1; by default as the denoiser says (`bins`).
        draws: of the dequantisation, importance weighted: the bound rises with them.
        prior: of the states at t_max: "moments", "mean", "plain", or "auto", the best that is known.
        label, guidance: as for `sample`.
        plan: go along a plan whose times rise from t_min to t_max instead: a fixed number of calls.
        method: a solver of `pfode.solve` with an error estimate; "auto": dopri5, dopri8 below 1e-6.
        adjoint: how gradients of the path are made, see `pfode.solve`.
        batch: samples per denoiser call (64). max_steps: attempts allowed per sample.
        throw: raise where a sample has no finite value; else it is NaN and in `failed`.
        cond: passed on to the denoiser; tensors (n, ...) sample by sample.

    Raises:
        UsageError: anything that cannot be carried out as written. NumericalError: with throw.
    """
    of = subject(
        denoiser, x, seeds=seeds, end=end, bins=bins, label=label, guidance=guidance, batch=batch, cond=cond
    )  # fmt: skip
    how, count = find_trace(divergence, of.dimensions, probes), integer("draws", draws, 1, 10**6)
    moments_for(of.denoiser, prior)
    if plan is not None and not isinstance(plan, Plan):
        raise UsageError(f"plan: need a Plan, got {plan!r:.60}", "pfode.make_plan(...), its grid rising")
    solver, tolerance = solver_for(method, number("rtol", rtol, 1e-12, 1.0))
    ask = _Ask(
        how, prior, solver, tolerance, adjoint, integer("max_steps", max_steps, 1), plan,
        torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and _depends(of),
    )  # fmt: skip
    with torch.inference_mode(False), torch.set_grad_enabled(ask.record):
        made = [_combined([_one(part, ask, draw, count) for draw in range(count)]) for part in of.batches()]
    return joined(made, of, throw)


@dataclass(frozen=True)
class _Ask:
    """How a likelihood is found: the trace, the prior, the path, and whether gradients are recorded."""

    how: Trace
    prior: str
    solver: Solver
    rtol: float
    adjoint: str | Adjoint | Direct
    max_steps: int
    plan: Plan | None
    record: bool

    def path(self, of: Subject, x: Tensor) -> Paths:
        """The paths from the states x at t_min."""
        denoiser, process = of.denoiser, of.denoiser.process
        if self.plan is not None:
            return plan_path(self.plan, denoiser, x, **of.cond)

        def x0(x: Tensor, t: Tensor) -> Tensor:
            return check_output(denoiser(x.clone(), t.to(x), **of.cond), x)

        if self.record:
            return differentiable_path(x0, process, x, self.solver, self.rtol, self.max_steps, self.adjoint)
        return adaptive_path(x0, process, x, self.solver, self.rtol, self.max_steps)


def _one(of: Subject, ask: _Ask, draw: int, draws: int) -> Likelihood:
    """The likelihood of a batch by one of the draws of its dequantisation."""
    process, n, d = of.denoiser.process, len(of.x), of.dimensions
    x, surprise = dequantised(of.x, process, of.end, of.width, of.seeds, draw, draws)
    nothing = x.new_zeros(n)
    sums = _Sums(nothing, nothing, torch.zeros(n, dtype=torch.int64, device="cpu"))

    def add(nodes: Nodes) -> None:
        for part in nodes.split(of.size):
            sums.add(part, of, ask.how, draw)

    end: End = walked(ask.path(of, x), add)
    law, calls = law_at(of, ask.prior, process.t_max)
    low, high = ends(process)
    spread = d * math.log(high.sigma / low.sigma)
    shift = d * math.log(low.alpha) if of.end == "none" else 0.0
    parts = {
        "prior": law.log_prob(end.x),
        "linear": x.new_full((n,), spread + shift),
        "trace": sums.integral - d * math.log(high.u / low.u),
        "dequantisation": surprise,
    }
    nats = sum(parts.values(), nothing)
    lost = ~torch.isfinite(nats.detach()).cpu()
    failed = {i: end.failed.get(i, "its value is not finite") for i in lost.nonzero().flatten().tolist()} | end.failed
    return Likelihood(
        nats=nats, stderr=sums.variance.sqrt(), parts=parts, z=end.x, nfe=end.nfe + sums.nodes + calls,
        products=sums.nodes * ask.how.products(d), steps=end.steps, failed=failed, end=of.end, width=of.width,
        prior=law.name, plain_kl=law.plain_kl,
    )  # fmt: skip


@dataclass
class _Sums:
    """The integral of the divergence over the clock, its variance over probes, and the nodes, each (n,), so far."""

    integral: Tensor
    variance: Tensor
    nodes: Tensor

    def add(self, nodes: Nodes, of: Subject, how: Trace, draw: int) -> None:
        """Add some nodes."""
        x, d, sample = nodes.x, of.dimensions, nodes.sample.to(nodes.x.device)
        vectors = None
        if not isinstance(how, Exact):
            seeds = [of.seeds[i] for i in nodes.sample.tolist()]
            numbers = [k + (draw << 40) for k in nodes.number.tolist()]
            vectors = signs(x, how.probes, seeds, numbers)
        found = denoiser_divergence(of.denoiser, x, nodes.t.to(x), how, vectors, **of.of(nodes.sample))
        u, m, weight = (one.to(x) for one in (nodes.u, nodes.m, nodes.weight))
        self.integral = self.integral.index_add(0, sample, weight * (d - m * found.trace) / u)
        if not isinstance(how, Exact):
            spread = found.traces.detach().var(0) / how.probes if how.probes > 1 else torch.full_like(u, math.nan)
            self.variance = self.variance.index_add(0, sample, (weight * m / u) ** 2 * spread)
        self.nodes = self.nodes + torch.bincount(nodes.sample, minlength=len(self.nodes))


def law_at(of: Subject, kind: str, t: float) -> tuple[Prior, int]:
    """The law of the states at time t, and the calls that were made for it."""
    calls = 0

    def mean() -> Tensor:
        nonlocal calls
        calls = 1
        times = torch.full((len(of.x),), t, dtype=of.x.dtype, device=of.x.device)
        return of.denoiser(torch.zeros_like(of.x), times, **of.cond)

    law = prior_at(of.denoiser, kind, t, mean, bool(of.cond))
    return law, calls


def _depends(of: Subject) -> bool:
    """Whether anything that the nats are made of asks for gradients."""
    given = [of.x, *(value for value in of.cond.values() if isinstance(value, Tensor))]
    if any(value.requires_grad for value in given):
        return True
    with torch.enable_grad():
        t = torch.full((1,), of.denoiser.process.t_min, dtype=of.x.dtype, device=of.x.device)
        out = of.denoiser(of.x[:1].detach(), t, **of.of(torch.zeros(1, dtype=torch.int64, device="cpu")))
    return isinstance(out, Tensor) and out.requires_grad


def _combined(drawn: list[Likelihood]) -> Likelihood:
    """The importance-weighted bound of several draws: log mean exp; z is that of the first."""
    if len(drawn) == 1:
        return drawn[0]
    every = torch.stack([one.nats for one in drawn])
    nats, weights = torch.logsumexp(every, 0) - math.log(len(drawn)), torch.softmax(every.detach(), 0)
    parts = {name: torch.stack([one.parts[name] for one in drawn]).mean(0) for name in drawn[0].parts}
    others = sum((value for name, value in parts.items() if name != "dequantisation"), torch.zeros_like(nats))
    parts["dequantisation"] = nats - others
    variance = (weights * torch.stack([one.stderr for one in drawn])).square().sum(0)
    failed = {i: why for one in drawn for i, why in one.failed.items()}
    counts = {name: sum(getattr(one, name) for one in drawn) for name in ("nfe", "products", "steps")}
    made = {"nats": others + parts["dequantisation"], "stderr": variance.sqrt(), "parts": parts, "failed": failed}
    return replace(drawn[0], **made, **counts)


def joined(batches: list[Likelihood], of: Subject, throw: bool) -> Likelihood:
    """The batches as one; with throw an error for the first sample that has no value."""
    offsets = range(0, len(of.x), of.size)
    failed = {i + first: why for first, one in zip(offsets, batches, strict=True) for i, why in one.failed.items()}
    if failed and throw:
        index, why = min(failed.items())
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        hint = "a larger rtol, or max_steps=" if "steps" in why else "check the network and the data"
        raise NumericalError(f"sample {index}{more}: {why}", f"{hint}; throw=False gives the others")
    kinds = ("nats", "stderr", "z", "nfe", "products", "steps")
    whole = {name: torch.cat([getattr(one, name) for one in batches]) for name in kinds}
    parts = {name: torch.cat([one.parts[name] for one in batches]) for name in batches[0].parts}
    kl = sum(one.plain_kl * len(one) for one in batches) / len(of.x)
    return replace(batches[0], **whole, parts=parts, failed=failed, plain_kl=kl)
