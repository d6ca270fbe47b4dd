"""Peers to compare with: loaded without what they drag in, driven as their own pipelines drive them.

`draw` runs a sampler of diffusers or of k-diffusion on a denoiser of any process, from the same noise to the same end
as a plan; `Scheduler` is a scheduler of diffusers on the process that its own numbers belong to.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pfode.denoiser import Denoiser
from pfode.errors import PfodeError, UsageError, unknown
from pfode.samplers.measure.peers import kdiffusion, schedulers
from pfode.samplers.measure.peers.kdiffusion import k_diffusion_sampling
from pfode.samplers.measure.peers.moved import HIGHEST, Counted, Draw, Lay, Moved, Request, keyed
from pfode.samplers.measure.peers.schedulers import Scheduler

__all__ = [
    "DRIVERS",
    "HIGHEST",
    "Counted",
    "Draw",
    "Lay",
    "Moved",
    "Scheduler",
    "draw",
    "find",
    "k_diffusion_sampling",
    "keyed",
]

CANNOT = (TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError, RuntimeError)
DRIVERS = {"diffusers": schedulers, "k-diffusion": kdiffusion}


def draw(
    peer: str,
    denoiser: Denoiser,
    x: Tensor,
    seeds: Sequence[int],
    nfe: int,
    lay: Lay | None = None,
    cond: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Tensor, int]:
    """What a peer draws with as many steps as fit in nfe calls.

    Args:
        peer: "diffusers:CLASS" or "k-diffusion:sample_NAME".
        x: sigma times noise, the state at the first time of the denoiser's process.
        seeds: of the samples, for what noise the peer draws.
        lay: a grid instead of the peer's own; k-diffusion's is `get_sigmas_karras`. The scheduler's own grids see
            thousand training steps from one end of the process to the other: uniform in its time, of a process with
            alpha = 1 in log sigma.
        options: of the scheduler's configuration, or of the function.

    Returns:
        x0 in float64, and the number of calls made.

    Raises:
        UsageError: no such peer, an option it does not take, or a number of calls it cannot do with.
        MissingError: its package is not installed.
    """
    package, _, name = peer.partition(":")
    if package not in DRIVERS:
        raise unknown("package", package, DRIVERS)
    request = Request(denoiser, x, seeds, nfe, lay, cond or {}, options)
    try:
        for steps in range(nfe, 0, -1):
            drawn = DRIVERS[package].run(name, steps, request)
            if drawn is not None:
                return drawn
    except PfodeError:
        raise
    except (*CANNOT, MemoryError) as error:
        words = "; ".join(str(error).split("\n")[:1]) or type(error).__name__
        raise UsageError(f"{peer} with {nfe} calls and {options or 'no options'}: {words}", "other options") from error
    raise UsageError(f"{peer}: no number of steps makes at most {nfe} calls", "a larger --nfe")


def find(peer: str) -> None:
    """Look for a peer.

    Raises:
        UsageError: there is none. MissingError: its package is not installed.
    """
    package, _, name = peer.partition(":")
    if package not in DRIVERS:
        raise unknown("package", package, DRIVERS)
    DRIVERS[package].find(name)
