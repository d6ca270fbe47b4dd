"""Butcher tableaus: methods as data, checked against the order conditions of rooted trees when they are made.

A tree is the sorted tuple of its branches. With Phi of the leaf = 1 and Phi of (t1, ..., tk) = prod_j (A Phi(tj)), a
method has order p if b Phi(tree) = 1 / gamma(tree) for every tree of at most p nodes, and its weights b(theta) give
y(t0 + theta h) to that order if b(theta) Phi(tree) = theta^nodes / gamma(tree) (Hairer, Norsett & Wanner 1993, II.2
and II.6). The same conditions, solved for b(theta), make the dense output of every method: see `Tableau.extension`.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pfode.errors import UsageError

__all__ = [
    "EULER",
    "HEUN2",
    "HEUN3",
    "MIDPOINT",
    "RK4",
    "Extension",
    "Tableau",
    "elementary",
    "gamma",
    "order_of",
    "trees",
]

TreeShape = tuple["TreeShape", ...]
Rows = Sequence[Sequence[float]]

_EXACT = 1e-12  # relative to the sum of the terms' sizes
_NODES = (0.5, 0.2, 0.8, 0.35, 0.65, 0.1, 0.9, 0.275, 0.725, 0.425, 0.575, 0.05)  # where further stages are laid
_SMALL = 3e-2  # the size of weights, against the residuals of the next order, where these leave the weights free


@dataclass(frozen=True)
class Extension:
    """Dense output: y(t0 + theta h) = y0 + h sum_i b_i(theta) k_i over the stages and, after them, further ones.

    Attributes:
        a, c: the further stages (the derivative at the end of the step first, if it is no stage anyway).
        p: b_i(theta) = sum_d p[i, d] theta^(d + 1), shape (stages + further, degree).
        order: conditions up to this order hold: the local error is O(h^(order + 1)).
    """

    a: tuple[tuple[float, ...], ...]
    c: tuple[float, ...]
    p: np.ndarray
    order: int


@dataclass(frozen=True, eq=False)
class Tableau:
    """A Runge-Kutta method.

    Args:
        name: for messages.
        order: of the solution that is propagated.
        a: stage weights, row i over the stages before it (explicit) or over all (implicit).
        b: weights of the solution.
        error: weights of the estimate of the local error, b - b^ of an embedded method; empty without one.
        embedded: order of the embedded method.
        c: nodes; the row sums of a if not given.

    Raises:
        UsageError: sums or order conditions that do not hold.
    """

    name: str
    order: int
    a: Rows
    b: Sequence[float]
    error: Sequence[float] = ()
    embedded: int = 0
    c: Sequence[float] = ()

    def __post_init__(self) -> None:
        s = len(self.b)
        a = np.zeros((s, s))
        for i, row in enumerate(self.a):
            a[i, : len(row)] = row
        object.__setattr__(self, "matrix", a)
        c = np.array(self.c) if len(self.c) else a.sum(1)
        c = np.where(abs(c - 1) < _EXACT, 1.0, c)
        object.__setattr__(self, "c", tuple(c.tolist()))
        b = np.array(self.b)
        if abs(a.sum(1) - c).max() > _EXACT * max(1, abs(a).max()):
            raise UsageError(f"tableau {self.name!r}: the rows of a do not sum to c: {a.sum(1) - c}")
        if (found := order_of(a, b, self.order)) < self.order:
            raise UsageError(f"tableau {self.name!r}: b has order {found}, not {self.order}")
        if len(self.error) and (found := order_of(a, b - np.array(self.error), self.embedded)) < self.embedded:
            raise UsageError(f"tableau {self.name!r}: b - error has order {found}, not {self.embedded}")

    matrix: np.ndarray = None  # type: ignore[assignment]  # a as (stages, stages), set here

    @property
    def stages(self) -> int:
        return len(self.b)

    @functools.cached_property
    def rows(self) -> tuple[tuple[float, ...], ...]:
        """Of an explicit method the weights of every stage after the first and, last, of the solution: row i is over
        the first i + 1 stages.
        """
        inner = (tuple(self.matrix[i, :i].tolist()) for i in range(1, self.stages))
        return (*inner, tuple(float(weight) for weight in self.b))

    @functools.cached_property
    def explicit(self) -> bool:
        """Whether every stage needs only those before it."""
        return not np.triu(self.matrix).any()

    @functools.cached_property
    def fsal(self) -> bool:
        """Whether the last stage is the derivative at the end of the step (first same as last)."""
        return self.c[-1] == 1 and np.array_equal(self.matrix[-1], self.b)

    @functools.cached_property
    def error_order(self) -> int:
        """The error estimate is O(h^error_order)."""
        return min(self.order, self.embedded) + 1

    @functools.cached_property
    def extension(self) -> Extension:
        """Dense output that keeps the method's order: `dense`, or derived from the order conditions.

        As few further stages as that needs, each evaluated on the best extension so far (the bootstrapping of Enright
        et al. 1986); what the conditions leave free minimises the residuals of the next order.
        """
        a, b, c = self.matrix, np.array(self.b), np.array(self.c)
        goal, s = max(self.order - 1, 1), self.stages
        order, p = _continuous(a, b, self.order, self.fsal)
        if order < goal and not self.fsal:
            a, b, c = _with_stage(a, b, c, b, 1.0)
            order, p = _continuous(a, b, self.order, True)
        for node in _NODES:
            if order >= goal:
                break
            row = p @ node ** np.arange(1, p.shape[1] + 1)
            a, b, c = _with_stage(a, b, c, row, node)
            order, p = _continuous(a, b, self.order, True, end=s - 1 if self.fsal else s)
        rows = tuple(tuple(row[: s + i].tolist()) for i, row in enumerate(a[s:]))
        return Extension(rows, tuple(c[s:].tolist()), p, order)


@functools.cache
def trees(nodes: int) -> tuple[TreeShape, ...]:
    """All rooted trees of that many nodes: 1, 1, 2, 4, 9, 20, 48, 115, ..."""
    return tuple(sorted(_forests(nodes - 1, nodes - 1)))


@functools.cache
def _forests(nodes: int, largest: int) -> frozenset[TreeShape]:
    """All multisets of trees with `nodes` nodes in all, none of more than `largest`."""
    if nodes == 0:
        return frozenset({()})
    found: set[TreeShape] = set()
    for size in range(1, min(nodes, largest) + 1):
        for first, rest in itertools.product(trees(size), _forests(nodes - size, size)):
            found.add(tuple(sorted((first, *rest))))
    return frozenset(found)


@functools.cache
def gamma(tree: TreeShape) -> int:
    """The density of a tree."""
    value = _size(tree)
    for branch in tree:
        value *= gamma(branch)
    return value


@functools.cache
def _size(tree: TreeShape) -> int:
    return 1 + sum(_size(branch) for branch in tree)


def elementary(a: np.ndarray, orders: int) -> list[tuple[TreeShape, np.ndarray]]:
    """(tree, Phi(tree)) for all trees of at most `orders` nodes, Phi over the stages."""
    inner: dict[TreeShape, np.ndarray] = {}
    found = []
    for tree in itertools.chain.from_iterable(trees(n) for n in range(1, orders + 1)):
        phi = np.ones(len(a))
        for branch in tree:
            phi = phi * inner[branch]
        inner[tree] = a @ phi
        found.append((tree, phi))
    return found


def order_of(a: np.ndarray, b: np.ndarray, most: int) -> int:
    """The order of a method, at most `most`."""
    for tree, phi in elementary(a, most):
        if abs(b @ phi - 1 / gamma(tree)) > _EXACT * max(1.0, abs(b) @ abs(phi)):
            return _size(tree) - 1
    return most


def _with_stage(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, row: np.ndarray, node: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The method with one more stage that its solution does not use."""
    s = len(b)
    larger = np.zeros((s + 1, s + 1))
    larger[:s, :s] = a
    larger[s, :s] = row
    return larger, np.append(b, 0.0), np.append(c, node)


def _continuous(a: np.ndarray, b: np.ndarray, most: int, closes: bool, end: int = -1) -> tuple[int, np.ndarray]:
    """The highest order, below or at `most`, of weights b(theta) over these stages, and the weights.

    Conditions: b(0) = 0, b(1) = b, b'(0) selects the first stage if it is explicit, and if `closes` b'(1) selects the
    stage `end`.
    """
    for order in range(most, 0, -1):
        p = _solve_conditions(a, b, order, closes, end % len(b))
        if p is not None:
            return order, p
    return 0, b[:, None]


def _solve_conditions(a: np.ndarray, b: np.ndarray, order: int, closes: bool, end: int) -> np.ndarray | None:
    """p of shape (stages, degree), or None if the conditions contradict each other."""
    s, degree = len(b), max(order, 3 if closes else order)
    powers = np.arange(1.0, degree + 1)
    shapes, phis = zip(*elementary(a, order + 1), strict=True)
    nodes = np.array([_size(tree) for tree in shapes])
    target = (nodes[:, None] == powers) / np.array([float(gamma(tree)) for tree in shapes])[:, None]
    phi, now, eye = np.array(phis), nodes <= order, np.eye(s)

    u, sizes, vh = np.linalg.svd(phi[now])
    rank = int((sizes > 1e-9 * sizes[0]).sum())
    if abs(u[:, rank:].T @ target[now]).max(initial=0.0) > 1e-9:
        return None
    left = [np.kron(vh[:rank], np.eye(degree)), np.kron(eye, np.ones_like(powers))]
    right = [((u[:, :rank].T @ target[now]) / sizes[:rank, None]).ravel(), b]
    if degree > 1 and not a[0].any():
        left.append(np.kron(eye, np.eye(1, degree)))
        right.append(eye[0])
    if closes:
        left.append(np.kron(eye, powers))
        right.append(eye[end])
    matrix, values = np.concatenate(left), np.concatenate(right)
    u, sizes, vh = np.linalg.svd(matrix)
    rank = int((sizes > 1e-10 * sizes[0]).sum())
    p = vh[:rank].T @ ((u[:, :rank].T @ values) / sizes[:rank])
    if abs(matrix @ p - values).max() > 1e-9 * max(1.0, abs(p).max()):
        return None
    if rank < len(p):
        free = vh[rank:].T
        values_at = np.linspace(0.0, 1.0, 2 * degree + 1)[:, None] ** powers  # b(theta) at points of the step
        ahead = np.asarray(
            np.linalg.qr(np.concatenate([phi[~now], target[~now]], 1), mode="r")
        )  # as many rows as it has columns
        small = _SMALL * np.kron(eye, values_at)
        rest = np.kron(ahead[:, :s], values_at)
        wanted = np.concatenate([(ahead[:, s:] @ values_at.T).ravel() - rest @ p, -small @ p])
        p = p + free @ np.linalg.lstsq(np.concatenate([rest, small]) @ free, wanted, rcond=None)[0]
    return p.reshape(s, degree)


# What ODE solvers and samplers share
EULER = Tableau("euler", 1, [[]], [1])
MIDPOINT = Tableau("midpoint", 2, [[], [1 / 2]], [0, 1])
HEUN2 = Tableau("heun2", 2, [[], [1]], [1 / 2, 1 / 2])
HEUN3 = Tableau("heun3", 3, [[], [1 / 3], [0, 2 / 3]], [1 / 4, 0, 3 / 4])
RK4 = Tableau("rk4", 4, [[], [1 / 2], [0, 1 / 2], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6])  # Kutta 1901
