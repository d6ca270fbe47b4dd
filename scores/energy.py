"""Energies: a scalar E(x, t) whose gradient is minus the score, p_t(x) proportional to e^(-E(x, t)).

With D = c_skip x + c_out F(c_in x) and F = -grad psi, the score (alpha D - x)/sigma^2 is a gradient, that of -E with

    E(x, t) = (1 - alpha c_skip) |x|^2 / (2 sigma^2) + alpha c_out / (sigma^2 c_in) psi(c_in x, c_noise).

So an energy costs no more than a scalar network under the usual preconditioning; it is trained by every objective of
score matching, and is known up to a constant of x at every noise level.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pfode.denoiser import energy as energy_of
from pfode.errors import UsageError, number
from pfode.process import Process, float64
from pfode.scores.denoiser import Denoiser
from pfode.scores.networks.mlp import Potential

__all__ = ["EnergyDenoiser", "EnergySum", "energy_denoiser"]


class EnergyDenoiser(Denoiser):
    """A denoiser whose score is the gradient of a scalar: its Jacobian is symmetric, and densities can be compared.

    Args:
        network: psi: a module or function (x, c_noise, **cond) -> (batch,) or (batch, 1); or a `Potential`.
        process, prediction, options: as for `Denoiser`; the prediction is that of F = -grad psi.

    Raises:
        UsageError: as `Denoiser`; a network of more than one number per sample, when it is called.
    """

    def __init__(
        self, network: Callable[..., Tensor], process: Process, prediction: str = "edm", **options: Any
    ) -> None:
        known = isinstance(network, Potential | type) or not callable(network)
        made: Any = network if known else Potential(network)
        super().__init__(made, process, prediction, **options)

    def energy(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """E(x, t), (batch,): -log p_t(x) up to a constant that does not depend on x.

        Args:
            x: (batch, ...). t: a time of the process, 0-d or (batch,). cond: passed on to the network.
        """
        times = float64(t)
        c = self.precondition(times)
        alpha, sigma = self.process.alpha(times), self.process.sigma(times)
        square, factor = (1 - alpha * c.c_skip) / (2 * sigma**2), alpha * c.c_out / (sigma**2 * c.c_in)
        wide = (-1, *[1] * (x.ndim - 1))
        noise_level = c.c_noise.to(x).reshape(-1).expand(len(x))
        dtype = x.dtype if self.dtype is None else self.dtype
        scaled = (c.c_in.to(x).reshape(wide) * x).to(dtype)
        psi = self.net.potential(scaled, noise_level.to(dtype), **cond).to(x.dtype)
        return square.to(x).reshape(-1) * x.flatten(1).square().sum(1) + factor.to(x).reshape(-1) * psi

    def log_density(self, x: Tensor, t: float | Tensor | None = None, **cond: Any) -> Tensor:
        """log p_t(x) up to a constant of x, (batch,); at t_min when t is None."""
        return -self.energy(x, self.process.t_min if t is None else t, **cond)


def energy_denoiser(den: Denoiser) -> EnergyDenoiser:
    """A loaded model whose network is a potential, with its energy.

    Raises:
        UsageError: another network.
    """
    if not isinstance(den.net, Potential):
        problem = f"energy: the network {type(den.net).__name__} is no gradient of a scalar"
        raise UsageError(problem, "one trained with --energy, or EnergyDenoiser(network, process)")
    made = EnergyDenoiser.__new__(EnergyDenoiser)
    for name, value in vars(den).items():
        setattr(made, name, value)
    return made


class EnergySum:
    """The product of densities: energies and scores add up, each with a weight (Du et al. 2023).

    At t_min it is the product's score; at higher noise levels, the score of no diffused density, so that its PF-ODE
    does not sample the product exactly: annealed Langevin steps and `pfode.samplers.mala` do.

    Args:
        parts: denoisers of one process, with `energy` or `log_prob`.
        weights: one per part; 1 by default. A negative one divides by a density.

    Raises:
        UsageError: no parts, parts of different processes, or weights that do not fit.
    """

    labels = None

    def __init__(self, parts: Sequence[Any], weights: Sequence[float] | None = None):
        self.parts = list(parts)
        self.weights = [1.0] * len(self.parts) if weights is None else [number("weight", w) for w in weights]
        if not self.parts or len(self.weights) != len(self.parts):
            raise UsageError(f"sum of energies: {len(self.parts)} parts, {len(self.weights)} weights", "one each")
        if any(part.process != self.parts[0].process for part in self.parts):
            raise UsageError("sum of energies: parts of different processes", "denoisers trained on one process")
        self.process: Process = self.parts[0].process
        self.shape = getattr(self.parts[0], "shape", None)
        self.evals = sum(getattr(part, "evals", 1) for part in self.parts)

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """x/alpha + sum_i w_i (D_i - x/alpha), of the shape of x."""
        alpha = self.process.alpha(float64(t)).to(x).reshape(-1, *[1] * (x.ndim - 1))
        clean = x / alpha
        terms = [w * (part(x, t, **cond) - clean) for part, w in zip(self.parts, self.weights, strict=True)]
        return clean + torch.stack(terms).sum(0)

    def energy(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """sum_i w_i E_i(x, t), (batch,)."""
        terms = [w * energy_of(part, x, t, **cond) for part, w in zip(self.parts, self.weights, strict=True)]
        return torch.stack(terms).sum(0)
