"""Parameterisations of a plan: from a vector of zeros, which is the starting plan, to the numbers of a plan."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pfode.errors import UsageError
from pfode.plans.table import Plan
from pfode.process import Process, float64
from pfode.samplers.fit.tangents import Numbers, lower

__all__ = ["DyWeight", "General", "Parameters", "clock", "clocked"]

_PURE = 0.01  # where alpha vanishes the clock ends as if alpha/sigma were this


def clock(process: Process, t: Tensor) -> Tensor:
    """log(sigma / (alpha + sigma/100)) at times t: the logarithm of sigma/alpha, finite at pure noise."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return torch.log(sigma / (alpha + _PURE * sigma))


def clocked(process: Process, u: Tensor) -> Tensor:
    """The times t whose `clock` is u, kept within those of the process."""
    left = torch.expm1(-u - math.log(_PURE)).clamp_min(1e-300)  # alpha/sigma in units of 1/100
    return process.time(2 * torch.log(left * _PURE)).clamp(process.t_min, process.t_max)


class General:
    """Times, query times, and corrections of every coefficient: the union of LD3, S4S and GS.

    The gaps between the nodes, in the clock, are a softmax (the start's logits plus parameters); the coefficients are
    the recipe's at those times plus corrections; each query time is its node's moved by a parameter in the clock.

    Args:
        start: the plan that zeros stand for.
        rebuild: the recipe's plan on other times; None: the start keeps its nodes and coefficients.
        time_only: no corrections of the coefficients.
    """

    def __init__(self, start: Plan, rebuild: Callable[[Tensor], Plan] | None, time_only: bool = False):
        self.start, self.rebuild, self.process = start, rebuild, start.process
        n, self.nodes = start.nfe, start.times
        u = clock(self.process, self.nodes[:-1])
        low = clock(self.process, float64(self.process.t_min))
        gaps = torch.cat([u[:-1] - u[1:], (u[-1] - low).clamp_min(0.02 * (u[0] - low) / n)[None]])
        self.high, self.whole = u[0], gaps.sum()
        self.logits = torch.log(gaps / self.whole)
        free = 0 if rebuild is None else len(gaps) - 1
        self.latest: tuple[Tensor, Plan] | None = None  # what was rebuilt last, for which gaps
        self.parts = [free, n, 0 if time_only else n + n * (n + 1) // 2]
        self.size = sum(self.parts)

    def plan(self, theta: Tensor) -> Plan:
        """The plan of parameters, shape (size,)."""
        return self.numbers(theta).plan(self._base(theta))

    def numbers(self, theta: Tensor) -> Numbers:
        """The numbers of that plan."""
        _, query, corrections = theta.split(self.parts)
        base, n = Numbers.of(self._base(theta)).vector, self.start.nfe
        moved = torch.where(query == 0, base[:n], clocked(self.process, clock(self.process, base[:n]) + query))
        rest = base[n:] + corrections if len(corrections) else base[n:]
        return Numbers(torch.cat([moved, rest]), n)

    def _base(self, theta: Tensor) -> Plan:
        """The plan of the recipe on the times that the parameters say; kept until they say others."""
        gaps = theta[: self.parts[0]]
        if self.rebuild is None or not gaps.any():
            return self.start
        if self.latest is None or not torch.equal(self.latest[0], gaps):
            self.latest = gaps.clone(), self._rebuilt(self.rebuild, gaps)
        return self.latest[1]

    def _rebuilt(self, rebuild: Callable[[Tensor], Plan], gaps: Tensor) -> Plan:
        """The plan of the recipe on times whose gaps are the start's, moved by these parameters."""
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
        zero = self.numbers(torch.zeros(self.size, dtype=torch.float64, device="cpu"))
        if start.nfe != start.steps or not torch.allclose(zero.vector, Numbers.of(start).vector, 1e-6, 1e-9):
            raise UsageError(f"dyweight: plan {start.name!r} is not ipndm3 in the chart ddim", 'start="ipndm3@ddim"')

    def plan(self, theta: Tensor) -> Plan:
        """The plan of parameters, shape (size,)."""
        return self.numbers(theta).plan(self.start)

    def numbers(self, theta: Tensor) -> Numbers:
        """The numbers of that plan."""
        n, process = self.start.nfe, self.start.process
        weights, scales = theta.split([self.size - n, n])
        s, level, states = self.ratio[0], self.start.init[0] / self.start.alpha[0], []
        unit = torch.eye(n + 1, dtype=torch.float64, device="cpu")
        y, slopes, alpha, t = level * unit[0], [], [], []
        for k, free in enumerate(weights.split(self.count)):
            first = process.time(-2 * torch.log(s))
            asked = process.time(-2 * (torch.log(s) + scales[k])).clamp(process.t_min, process.t_max)
            t.append(torch.where(scales[k] == 0, self.start.t[k], asked))
            alpha.append(process.alpha(first))
            slopes.insert(0, (y - unit[k + 1]) / s)
            states.append(y)
            w = free + float64(self.WEIGHTS[min(k, 2)])
            length = self.ratio[k + 1] - s
            y = y + length * sum((w[j] * slopes[j] for j in range(len(w))), torch.zeros_like(y))
            s = (s + w.sum() * length).clamp_min(1e-6)
        x = torch.stack([*states, y]) * torch.stack([*alpha, self.start.alpha[-1]])[:, None]
        r = x[1:, 0] / x[:-1, 0]
        b = torch.tril(x[1:, 1:] - r[:, None] * x[:-1, 1:])
        return Numbers(torch.cat([torch.stack(t), r, lower(b)]), n)


Parameters = General | DyWeight
