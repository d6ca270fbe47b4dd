"""Stochastic Runge-Kutta methods as values: what their stages are made of.

With s = |h|, W the increment of a step and H its space-time area, a stage is the state

    z = y + h sum_j a_j f_j + sum_(noise term, j) b_j (term g_j)

over the evaluations f_j, g_j made before it, and so are the state at the end and the estimate of the error. The noise
terms are (Roessler 2010, section 2; Foster & Jelincic 2023, definition 1.6)

    "W"    W                  "H"   H                       "U"   int W dt / h = W/2 + H
    "r"    sqrt(s)            "I2"  (W^2 - s) / (2 sqrt(s))  "J2"  W^2 / (2 sqrt(s))        "I3"  (W^3 - 3 s W) / (6 s)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["AREA_TERMS", "Row", "Stage", "Tableau"]

AREA_TERMS = frozenset({"H", "U"})
Weights = Mapping[str, Sequence[float]]


@dataclass(frozen=True, eq=False)
class Row:
    """A combination of evaluations: `f` weighs h f_j, `g` under the name of each noise term that term times g_j."""

    f: Sequence[float] = ()
    g: Weights = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Stage:
    """A state z at the time t + c h, and what is evaluated there: "f", "g" or "fg"."""

    c: float
    at: Row = Row()
    evaluates: str = "fg"


@dataclass(frozen=True, eq=False)
class Tableau:
    """A method.

    Args:
        name, source: as it is known, and from where.
        calculus: of the equations it solves, one or both of "ito", "stratonovich".
        noises: the kinds of noise that it takes.
        stages, end: as in the module's text.
        error: rows whose absolute values add up to the estimate of the error; none: there is no estimate.
        error_order: the estimate is O(h^error_order).
        strong: order of strong convergence, for each kind of noise; weak: the same in distribution.
    """

    name: str
    source: str
    calculus: tuple[str, ...]
    noises: tuple[str, ...]
    stages: tuple[Stage, ...]
    end: Row
    error: tuple[Row, ...] = ()
    error_order: float = 0
    strong: Mapping[str, float] = field(default_factory=dict)
    weak: float = 1

    @property
    def area(self) -> bool:
        """Whether it uses space-time areas."""
        rows = [stage.at for stage in self.stages] + [self.end, *self.error]
        return any(AREA_TERMS & set(row.g) for row in rows)

    def terms(self) -> list[tuple[str, ...]]:
        """The noise terms that every evaluation of g is multiplied by, in the order of these."""
        count = sum("g" in stage.evaluates for stage in self.stages)
        found: list[dict[str, None]] = [{} for _ in range(count)]
        for row in [stage.at for stage in self.stages] + [self.end, *self.error]:
            for term, weights in row.g.items():
                for j, weight in enumerate(weights):
                    if weight:
                        found[j][term] = None
        return [tuple(terms) for terms in found]
