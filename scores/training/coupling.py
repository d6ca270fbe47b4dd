"""Couplings: which point of the source belongs to which point of the data, within a batch.

A coupling reorders the source's points of a batch and leaves the data, with its labels, where it is: every point of
either is used exactly once, and no label is parted from its picture. (Drawing from a transport plan with replacement,
as usual elsewhere, uses some 62 % of a batch.)
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pfode.errors import UsageError, integer, number, unknown
from pfode.optional import optional_module

__all__ = ["COUPLINGS", "Assignment", "Coupling", "Entropic", "Given", "Independent", "assignment", "coupling"]

LEVELS = (1.0, 1 / 8, 1 / 64)  # of the entropy, in mean costs, on the way to the potentials an assignment starts from
MAX_BATCH = 8192  # the matrix of costs has the square of it


@dataclass(frozen=True)
class Independent:
    """The pairs as they were drawn."""

    joint: ClassVar[bool] = False

    def order(self, x0: Tensor, x1: Tensor, label: Tensor | None, seed: int) -> Tensor:
        """Which of the x1 goes to each x0, (n,)."""
        return torch.arange(len(x0), device="cpu")


@dataclass(frozen=True)
class Given(Independent):
    """The pairs that the data came with, as in a reflow (Liu et al. 2023)."""


@dataclass(frozen=True)
class Assignment:
    """Optimal transport between the two halves of a batch: the pairs of the least total squared distance.

    Args:
        within: pair points of one class only with the sources that were drawn for that class, so that the source of
            every class stays what it is (a coupling over all classes makes it depend on the class: Cheng & Schwing
            2025).

    References: Pooladian et al. 2023; Tong et al. 2024 (OT-CFM).
    """

    within: bool = False
    joint: ClassVar[bool] = True

    def order(self, x0: Tensor, x1: Tensor, label: Tensor | None, seed: int) -> Tensor:
        """Which of the x1 goes to each x0, (n,): a permutation.

        Raises:
            MissingError: scipy is not installed. UsageError: a batch of more than 8,192, or values not finite.
        """
        if not self.within or label is None:
            return assignment(costs(x0, x1))
        found = torch.empty(len(x0), dtype=torch.int64, device="cpu")
        for one in label.unique():
            members = (label == one).nonzero()[:, 0].cpu()
            found[members] = members[assignment(costs(x0[members], x1[members]))]
        return found


@dataclass(frozen=True)
class Entropic:
    """Entropic optimal transport as permutations p drawn with probability proportional to exp(-sum_i c_{i, p_i} / reg).

    Every point is used once, and over many points the pairs are distributed as the entropic plan (Cuturi 2013) has
    them. It is drawn by Gibbs sampling from the optimal assignment on: in a sweep all points are paired at random, and
    each pair exchanges its partners with the probability that leaves the distribution as it is.

    Args:
        reg: factor of the entropy, in units of squared distance; the Schrodinger bridge of noise std has 2 std^2.
        sweeps: of the sampler.

    Raises:
        UsageError: a value that is not positive.
    """

    reg: float = 0.5
    sweeps: int = 100
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number("reg", self.reg, 1e-12, 1e12)
        integer("sweeps", self.sweeps, 1, 100_000)

    def order(self, x0: Tensor, x1: Tensor, label: Tensor | None, seed: int) -> Tensor:
        """Which of the x1 goes to each x0, (n,): a permutation, drawn by the seed."""
        cost = costs(x0, x1)
        found, c, n = assignment(cost).numpy(), cost.numpy() / self.reg, len(cost)
        random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 2, 0]))
        for _ in range(self.sweeps):
            one, other = random.permutation(n)[: n - n % 2].reshape(2, -1)
            p, q = found[one], found[other]
            gain = c[one, p] + c[other, q] - c[one, q] - c[other, p]
            swap = -np.log(random.standard_exponential(len(gain))) + np.log(random.standard_exponential(len(gain)))
            swap = swap < gain  # a logistic variable: probability 1 / (1 + e^-gain)
            found[one], found[other] = np.where(swap, q, p), np.where(swap, p, q)
        return torch.from_numpy(found)


Coupling = Independent | Given | Assignment | Entropic
COUPLINGS: dict[str, type[Any]] = {
    "independent": Independent, "assignment": Assignment, "entropic": Entropic, "given": Given,
}  # fmt: skip


def coupling(config: dict[str, Any]) -> Coupling:
    """The coupling that `described` said.

    Raises:
        UsageError: an unknown name or field.
    """
    name = config.get("name")
    if name not in COUPLINGS:
        raise unknown("coupling", name, COUPLINGS)
    try:
        return COUPLINGS[str(name)](**{key: value for key, value in config.items() if key != "name"})
    except TypeError as error:
        raise UsageError(f"coupling {name}: {error}", f"{name} alone has its usual values") from error


def described(value: Coupling) -> dict[str, Any]:
    """A coupling as a JSON object."""
    return {"name": next(name for name, kind in COUPLINGS.items() if type(value) is kind), **asdict(value)}


def costs(x0: Tensor, x1: Tensor) -> Tensor:
    """Squared distances |x0_i - x1_j|^2, (n, n).

    Raises:
        UsageError: batches of two sizes, more than 8,192 points, or values that are not finite.
    """
    if x0.shape != x1.shape:
        raise UsageError(f"coupling: need as many points of either, got {tuple(x0.shape)} and {tuple(x1.shape)}")
    if len(x0) > MAX_BATCH:
        raise UsageError(f"coupling: a batch of {len(x0)}, more than {MAX_BATCH}", "a smaller batch")
    a, b = x0.detach().cpu().flatten(1).double(), x1.detach().cpu().flatten(1).double()
    found = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min_(0)
    if not found.isfinite().all():
        raise UsageError("coupling: points that are not finite")
    return found


def assignment(cost: Tensor) -> Tensor:
    """The permutation p of the least sum_i cost[i, p_i], (n,).

    scipy's shortest augmenting paths (Crouse 2016) find it from reduced costs: a few sweeps of Sinkhorn's algorithm
    give potentials that are nearly optimal, which shortens the paths. Subtracting potentials of rows and columns from
    the costs changes the sum of every permutation alike.

    Args:
        cost: (n, n), finite.

    Raises:
        MissingError: scipy is not installed.
    """
    solve = optional_module("scipy.optimize", "the coupling 'assignment'").linear_sum_assignment
    exact = cost.detach().cpu().double().numpy()
    if exact.shape[0] < 2:
        return torch.zeros(len(exact), dtype=torch.int64, device="cpu")
    rows, columns = _potentials(exact)
    reduced = exact - rows[:, None]
    reduced -= columns
    reduced -= reduced.min(1, keepdims=True)
    return torch.from_numpy(solve(reduced)[1])


def _potentials(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Potentials of rows and columns by one sweep of Sinkhorn's algorithm at each of three falling entropies."""
    small = cost.astype(np.float32)
    scale = max(float(small.mean()), 1e-30)
    rows = columns = np.zeros(len(small), np.float32)
    for level in LEVELS:
        rows = -_soft_maximum(columns - small, level * scale, 1)
        columns = -_soft_maximum(rows[:, None] - small, level * scale, 0)
    return rows.astype(np.float64), columns.astype(np.float64)


def _soft_maximum(values: np.ndarray, level: float, axis: int) -> np.ndarray:
    """level log sum exp(values / level); overwrites them."""
    highest = values.max(axis, keepdims=True)
    values -= highest
    values *= 1 / level
    np.exp(values, out=values)
    return highest.squeeze(axis) + level * np.log(values.sum(axis))
