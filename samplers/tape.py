"""From formulas to rows: methods are written with states and predictions as a paper has them, a tape makes the plan.

A `Linear` is a combination of symbols: y_k (the register before row k), m_k (row k's prediction), xi_k (its noise).
Whenever a prediction is asked for, the register has to hold its state; the tape works out the row that brings it there
by eliminating the registers that have been overwritten.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

from pfode.chart import Node
from pfode.plans.table import Plan
from pfode.process import Process, float64

__all__ = [
    "NOTHING",
    "Linear",
    "Tape",
    "brownian_clock",
    "combined",
    "without",
]

Symbol = tuple[str, int]
_ROUNDING = 1e-14  # what is left, relatively, of two terms that cancel exactly


class Linear:
    """An immutable linear combination of symbols."""

    __slots__ = ("terms",)

    def __init__(self, terms: dict[Symbol, float]):
        self.terms = terms

    def __add__(self, other: "Linear") -> "Linear":
        terms = dict(self.terms)
        for symbol, factor in other.terms.items():
            old = terms.get(symbol, 0.0)
            new = old + factor
            if abs(new) <= _ROUNDING * max(abs(old), abs(factor)):
                terms.pop(symbol, None)
            else:
                terms[symbol] = new
        return Linear(terms)

    def __mul__(self, factor: float) -> "Linear":
        return Linear({symbol: factor * f for symbol, f in self.terms.items()} if factor else {})

    __rmul__ = __mul__

    def __sub__(self, other: "Linear") -> "Linear":
        return self + other * -1.0

    def __truediv__(self, divisor: float) -> "Linear":
        return self * (1 / divisor)


NOTHING = Linear({})


def combined(weights: Iterable[float], values: Iterable[Linear]) -> Linear:
    """sum_j w_j v_j."""
    total = NOTHING
    for weight, value in zip(weights, values, strict=True):
        total = total + value * weight
    return total


class Tape:
    """The rows of a plan in the making.

    Args:
        pair: keep the register before the last as well (r' of the rows), for exactly invertible methods.
    """

    def __init__(self, pair: bool = False):
        self.pair = pair
        self.first = Linear({("y", -1): 1.0})  # x_T
        self.queried: list[Node] = []  # where row k calls the denoiser
        self.updates: list[Linear] = []  # y_k said in what came before it; entry 0 is the init row
        self.step: list[int] = []
        self.node: list[bool] = []
        self.spans: dict[int, tuple[float, float]] = {}
        self._begins = False

    def begin(self) -> None:
        """The next call is the first of a step."""
        self._begins = True

    def evaluate(self, x: Linear, node: Node) -> tuple[Linear, Linear]:
        """A row that calls the denoiser on x at a node: x, now in the register, and the plan's prediction there."""
        k = len(self.queried)
        self._reach(x)
        self.queried.append(node)
        self.node.append(self._begins)
        self.step.append((self.step[-1] if self.step else -1) + self._begins)
        self._begins = False
        return Linear({("y", k): 1.0}), Linear({("m", k): 1.0})

    def noise(self, start: Node, stop: Node) -> Linear:
        """The fresh noise of the latest row (of the init row before any), which covers the time between two nodes."""
        k = len(self.queried) - 1
        assert k not in self.spans, "one fresh noise per row"
        self.spans[k] = (brownian_clock(start), brownian_clock(stop))
        return Linear({("xi", k): 1.0})

    def fresh(self) -> Linear:
        """The fresh noise of the latest row where it covers no time, so that it is of no Brownian path."""
        k = len(self.queried) - 1
        assert k not in self.spans, "one fresh noise per row"
        self.spans[k] = (math.nan, math.nan)
        return Linear({("xi", k): 1.0})

    def settled(self, x: Linear) -> Linear:
        """x said in the register as it is, for pairs in the one before it too."""
        oldest = len(self.updates) - (2 if self.pair else 1)
        while overwritten := [j for name, j in x.terms if name == "y" and j < oldest]:
            x = self._without(x, min(overwritten))
        return x

    def _reach(self, x: Linear) -> None:
        """The update that puts x into the register."""
        x = self.settled(x)
        largest = max((abs(f) for (name, _), f in x.terms.items() if name == "m"), default=0.0)
        self.updates.append(Linear({s: f for s, f in x.terms.items() if s[0] != "m" or abs(f) > _ROUNDING * largest}))

    def _without(self, x: Linear, j: int) -> Linear:
        """x with the overwritten y_j said in the registers after it."""
        gone = ("y", j)
        k = j + 2 if j + 2 < len(self.updates) and gone in self.updates[j + 2].terms else j + 1
        update = self.updates[k]
        assert gone in update.terms, "a state is used that a row with r = 0 has overwritten"
        y = (Linear({("y", k): 1.0}) - without(update, gone)) / update.terms[gone]
        return without(x, gone) + y * x.terms[gone]

    def plan(self, process: Process, prediction: str, x: Linear, start: Node, end: Node, **about: Any) -> Plan:
        """The finished plan: x is the last state, at the node `end`; x_T is at the node `start`."""
        self._reach(x)
        n = len(self.queried)
        rows = [update.terms for update in self.updates[1:]]
        window = {name: 1 + max((k - j for k, row in enumerate(rows) for s, j in row if s == name), default=-1)
                  for name in ("m", "xi")}  # fmt: skip
        states = [*self.queried, end]
        spans = [self.spans.get(k if k < n else -1, (math.nan, math.nan)) for k in range(n + 1)]
        return Plan(
            process=process,
            prediction=prediction,
            t=_column([node.t for node in self.queried]),
            time=_column([node.t for node in states]),
            alpha=_column([node.alpha for node in states]),
            sigma=_column([node.sigma for node in states]),
            r=_column([row.get(("y", k), 0.0) for k, row in enumerate(rows)]),
            r_prev=_column([row.get(("y", k - 1), 0.0) for k, row in enumerate(rows)]),
            b=_column([[row.get(("m", k - j), 0.0) for j in range(max(1, window["m"]))] for k, row in enumerate(rows)]),
            c=_column([[row.get(("xi", k - j), 0.0) for j in range(window["xi"])] for k, row in enumerate(rows)]),
            init=_column([self.updates[0].terms[("y", -1)], self.updates[0].terms.get(("xi", -1), 0.0)]),
            step=torch.tensor(self.step, device="cpu"),
            node=torch.tensor([*self.node, True], device="cpu"),
            first=_column([start.t, start.alpha, start.sigma]),
            span=_column(spans),
            **about,
        )


def without(x: Linear, symbol: Symbol) -> Linear:
    """The combination without one of its terms."""
    return Linear({s: f for s, f in x.terms.items() if s != symbol})


def brownian_clock(node: Node) -> float:
    """A bounded clock for noise: 1 / (1 + s^(-1/4)), s = sigma/alpha."""
    return 1 / (1 + math.exp(-node.v / 4)) if node.v > -2000 else 0.0


def _column(values: list[Any]) -> torch.Tensor:
    return float64(values)
