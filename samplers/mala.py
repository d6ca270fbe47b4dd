"""The Metropolis-adjusted Langevin algorithm: samples of p_t at one noise level, exact whatever the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfode import noise
from pfode.denoiser import Denoiser
from pfode.denoiser import energy as energy_of
from pfode.errors import integer, number
from pfode.process import float64
from pfode.samplers.settle import need_denoiser, sample_states, seed_list

__all__ = ["Chain", "mala"]


@dataclass(frozen=True, eq=False)
class Chain:
    """What `mala` returns.

    Attributes:
        x: the last states, shape (n, ...).
        energy: of them, (n,).
        accepted: the share of steps that each sample accepted, (n,).
        trajectory: the states after every step, where they were asked for.
    """

    x: Tensor
    energy: Tensor
    accepted: Tensor
    trajectory: list[Tensor]


def mala(
    denoiser: Denoiser,
    x: Tensor,
    t: float | None = None,
    steps: int = 100,
    size: float = 0.01,
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    trajectory: bool = False,
    **cond: Any,
) -> Chain:
    """Langevin steps, each accepted or refused so that p_t stays what it is (Roberts & Tweedie 1996).

    x' = x + h s(x) + sqrt(2 h) xi is accepted with the probability min(1, p(x') q(x|x') / (p(x) q(x'|x))), by every
    sample for itself. Noise and decisions are keyed by the samples' seeds.

    Args:
        denoiser: with `energy(x, t)`, as an `EnergyDenoiser` or `EnergySum`, or `log_prob(x, t)`, as exact ones.
        x: states to begin from, shape (n, ...).
        t: the time of the process; t_min by default.
        steps: of the chain. size: h, in units of squared x.
        seed, seeds: sample i has seed + i, or seeds[i].
        trajectory: keep every state.
        cond: passed on to the denoiser.

    Raises:
        UsageError: a denoiser without an energy, or values out of range.
    """
    need_denoiser(denoiser)
    x = sample_states("x", x)
    keys = seed_list(None, seed, seeds, x, len(x))
    steps, h = integer("steps", steps, 0), number("size", size, 0)
    process = denoiser.process
    time = process.t_min if t is None else number("t", t, process.t_min, process.t_max)
    at, alpha, sigma = float64(time).to(x.device), process.alpha(time), process.sigma(time)
    kept = [x] if trajectory else []

    def known(state: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and drift h s there."""
        score = (alpha * denoiser(state, at, **cond) - state) / sigma**2
        return energy_of(denoiser, state, time, **cond), h * score

    with torch.no_grad():
        energy, drift = known(x)
        accepted = torch.zeros_like(energy)
        for step in range(steps):
            xi = noise.normal(keys, 2 * step + 1, x.shape[1:], x.dtype, x.device)
            uniform = torch.special.ndtr(noise.normal(keys, 2 * step + 2, (), torch.float64)).to(energy)
            proposal = x + drift + math.sqrt(2 * h) * xi
            its_energy, its_drift = known(proposal)
            back = (x - proposal - its_drift).flatten(1).square().sum(1) / (4 * h) if h else 0 * energy
            ratio = energy - its_energy - back + 0.5 * xi.flatten(1).square().sum(1)
            takes = uniform.log() < (ratio if h else 0 * ratio)  # NaN refuses
            wide = takes.reshape(-1, *[1] * (x.ndim - 1))
            x, drift = torch.where(wide, proposal, x), torch.where(wide, its_drift, drift)
            energy, accepted = torch.where(takes, its_energy, energy), accepted + takes
            if trajectory:
                kept.append(x)
    return Chain(x, energy, accepted / max(steps, 1), kept[1:])
