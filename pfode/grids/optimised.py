"""Rules that minimise a bound on the error of a sampler: DM-NonUniform."""

import functools
import itertools
import warnings

import numpy as np
import torch
from torch import Tensor

from pfode.errors import number
from pfode.grids.ends import log_snr_ends
from pfode.grids.levels import log_snr, time
from pfode.grids.rule import Grid, named, spelt
from pfode.optional import optional_module
from pfode.process import Process, float64

__all__ = ["dm_nonuniform", "dm_objective"]

_OPTIMISED = 20  # most intervals whose nodes DM-NonUniform optimises


@named("dm-nonuniform")
def dm_nonuniform(power: float = 1.0) -> Grid:
    """Nodes that minimise a bound on the error of exponential Adams in the log-SNR (Xue et al. 2024, DM-NonUniform).

    From uniform log-SNR where power < 2 (the paper's choice for pixels: 1), else from uniform time (latents: 2). Beyond
    20 intervals the optimum of 20 is interpolated. Takes a second or so, once per range and number of steps. Made for
    orders that fall at the end (lower_order_final).
    """
    power = number("dm-nonuniform: power", power, 0.0, 4.0)
    start = log_snr() if power < 2 else time()

    def place(process: Process, high: float, low: float, n: int) -> Tensor:
        few = min(n, _OPTIMISED)
        first, last = (0.5 * log_snr_ends(process, high, low)).tolist()
        begin = [first, *(0.5 * process.log_snr(start.place(process, high, low, few)[1:-1])).tolist(), last]
        if not all(a < b for a, b in itertools.pairwise(begin)):  # beyond the first end, where alpha = 0
            begin = np.linspace(first, last, few + 1).tolist()
        best = _optimised(tuple(begin), power)
        between = np.interp(np.linspace(0, few, n + 1), np.arange(few + 1), best)
        return process.time(2 * torch.from_numpy(between))

    return Grid(spelt("dm-nonuniform", [power], [1.0]), place)


def dm_objective(lambdas: Tensor, power: float = 1.0) -> Tensor:
    """The bound that `dm-nonuniform` minimises: F = sum_n e_n |sum_k J_kn| (Xue et al. 2024, with its code's rules).

    J_kn is the weight of exponential Adams for node n in step k, of orders 1, 2, 3, 3, ..., 3, 2, 1; e_n =
    sigma_n^power / alpha_n, at alpha^2 + sigma^2 = 1, how wrong the network is there. Weights of opposite sign cancel;
    as that misleads with few steps, up to 7 of them the first 3 count by their root of sum of squares instead (the
    paper's truncNum), and beyond the first alone.

    Args:
        lambdas: rising values of log(alpha/sigma), shape (n + 1,).
    """
    n = len(lambdas) - 1
    step, age = torch.arange(n, device="cpu"), torch.arange(3, device="cpu")
    made = (step[:, None] - age).clamp_min(0)  # the node whose prediction is the j-th newest in step k
    used = age < torch.minimum(torch.minimum(step + 1, n - step), torch.tensor(3, device="cpu"))[:, None]
    x, w = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(16))
    half = 0.5 * lambdas.diff()[:, None]
    points = lambdas[:-1, None] + half * (1 + x)  # shape (n, 16)
    nodes = lambdas[made]
    pairs = used[:, :, None] & used[:, None, :] & (age[:, None] != age)
    gaps = torch.where(pairs, nodes[:, :, None] - nodes[:, None, :], 1.0)
    factors = torch.where(pairs[:, None], (points[:, :, None] - nodes[:, None])[:, :, None] / gaps[:, None], 1.0)
    basis = factors[..., 0] * factors[..., 1] * factors[..., 2]  # Lagrange's, shape (n, 16, 3)
    weights = ((half * w * torch.exp(points))[..., None] * basis).sum(1)
    error = torch.sigmoid(-2 * lambdas) ** (power / 2) / torch.sigmoid(2 * lambdas).sqrt()
    terms = torch.where(used, weights * error[made], 0.0)
    alone = step < (3 if n <= 7 else 1)
    signed = torch.zeros(n, dtype=lambdas.dtype, device="cpu").index_add(
        0, made[~alone].flatten(), terms[~alone].flatten()
    )
    return torch.linalg.vector_norm(terms[alone], dim=1).sum() + signed.abs().sum()


@functools.lru_cache(256)
def _optimised(start: tuple[float, ...], power: float) -> tuple[float, ...]:
    """The lambdas that minimise `dm_objective` between the ends of `start`, never worse than it."""
    n = len(start) - 1
    if n == 1:
        return start
    optimize = optional_module("scipy.optimize", "grid 'dm-nonuniform'")

    def objective(inner: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.tensor([start[0], *inner, start[-1]], dtype=torch.float64, requires_grad=True, device="cpu")
        value = dm_objective(x, power)
        (slope,) = torch.autograd.grad(value, x)
        return value.item(), slope[1:-1].numpy()

    gaps = np.eye(n, n - 1) - np.eye(n, n - 1, -1)  # inner lambdas -> gaps, less what the ends add
    least = np.full(n, 1e-3 * (start[-1] - start[0]) / n)
    least[0] += start[0]
    least[-1] -= start[-1]
    apart = optimize.LinearConstraint(gaps, least, np.inf)  # type: ignore[arg-type]
    with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
        warnings.simplefilter("ignore", UserWarning)  # where the gradient does not change: |.| is not smooth
        found = optimize.minimize(
            objective, start[1:-1], jac=True, method="trust-constr", constraints=[apart], options={"maxiter": 200}
        )
    best = (start[0], *found.x.tolist(), start[-1])
    better = found.fun < dm_objective(float64(start), power)
    return best if better and all(a < b for a, b in itertools.pairwise(best)) else start
