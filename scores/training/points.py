"""Points to train on: an endless stream of a law's samples, or a finite set of vectors in memory."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pfode.errors import UsageError
from pfode.scores.toys import LAWS, Law, law

__all__ = ["ENDLESS", "Points", "points_of"]

ENDLESS = 2**40  # points of a law: more than any run sees


@dataclass(frozen=True)
class Points:
    """Vectors of d numbers, or other tensors of floats, each seen as it is.

    Args:
        values: (n, d) or (n, ...), float; None where `law` makes them.
        law: whose sample i is point i.
        pairs: of that shape, where every point of `values` has a given point of the source: pairs of a reflow.
        source: points at the other end of a flow, instead of noise.
        card: where they come from: JSON.
        labels: int64 (n,), or None; names: of the classes.

    Raises:
        UsageError: neither values nor a law, or values of another shape or that are not finite.
    """

    values: Tensor | None
    law: Law | None = None
    pairs: Tensor | None = None
    source: "Points | None" = None
    card: dict[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    styles: None = None
    names: tuple[str, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.values is None) == (self.law is None):
            raise UsageError("points: need either values or a law", 'points_of("moons")')
        for name, value in (("values", self.values), ("pairs", self.pairs)):
            if value is None:
                continue
            if value.ndim < 2 or 0 in value.shape or not value.is_floating_point():
                got = f"{value.dtype} of shape {tuple(value.shape)}"
                raise UsageError(f"points: {name}: need floats (n, d) or (n, ...), got {got}")
            if not value.isfinite().all():
                raise UsageError(f"points: {name}: not finite", "leave those points out")
        if self.pairs is not None and (self.values is None or self.pairs.shape != self.values.shape):
            raise UsageError("points: pairs: need one for each of the values, of their shape")
        if (self.labels is None) != (not self.names) or (
            self.labels is not None and (self.values is None or self.labels.shape != self.values.shape[:1])
        ):
            raise UsageError("points: labels: need one for each of the values, and names of the classes with them")
        if self.source is not None and (self.pairs is not None or self.source.shape != self.shape):
            raise UsageError(f"points: source: need points of shape {self.shape}, and no pairs", "source=None")

    def __len__(self) -> int:
        return ENDLESS if self.values is None else len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one point, (d,)."""
        return self.law.shape if self.law is not None else tuple(self.values.shape[1:])  # type: ignore[union-attr]

    def take(self, index: list[int]) -> Tensor:
        """The points of these numbers, (n, d) in float64."""
        if self.law is None:
            return self.values[index].double()  # type: ignore[index]
        if index and index == list(range(index[0], index[0] + len(index))):
            return self.law.sample(len(index), index[0])
        return torch.cat([self.law.sample(1, i) for i in index])


def points_of(data: "str | Law | Tensor | Points") -> Points:
    """Points of a law's name, of a law or of a tensor (n, d).

    Raises:
        UsageError: as `Points` and `law`.
    """
    if isinstance(data, Points):
        return data
    if isinstance(data, str):
        found = law(data)
        return Points(None, found, card={"name": data, "source": "a law of pfode.scores.toys", "sha256": data})
    if isinstance(data, Law):
        return Points(None, data, card={"name": data.name, "source": "a law of pfode.scores.toys"})
    if not isinstance(data, Tensor):
        got = f"points: need a name, a law or a tensor (n, d), got {type(data).__name__}"
        raise UsageError(got, f"one of: {', '.join(LAWS)}")
    digest = hashlib.sha256(data.detach().double().contiguous().cpu().numpy().data).hexdigest()
    return Points(data.detach(), card={"name": "points", "count": len(data), "sha256": digest})
