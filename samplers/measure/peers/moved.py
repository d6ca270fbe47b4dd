"""A denoiser as peers see it: on their process, in their precision, its calls counted."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfode import noise
from pfode.denoiser import Denoiser, at
from pfode.errors import DenoiserError, MemoryLimitError, PfodeError
from pfode.process import Process

__all__ = ["HIGHEST", "Counted", "Draw", "Lay", "Moved", "Request", "keyed", "levels"]

HIGHEST = 999.0  # sigma/alpha where a process begins with alpha = 0: the first of diffusers' flow sigmas
Lay = Callable[[int], Sequence[float]]  # steps -> the times of their nodes on the denoiser's process
Draw = Callable[[int], Tensor]  # number of calls so far -> noise of the state's shape


class Counted:
    """A denoiser that counts its calls: the key of the keyed noise.

    Row k of a plan draws the noise (seed, k + 1), and a sampler that draws after its evaluations has made k + 1 calls
    by then.
    """

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.process, self.calls = denoiser, denoiser.process, 0

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.calls += 1
        return self.denoiser(x, t, **cond)


class Moved:
    """A denoiser on another process: D depends on x/alpha and sigma/alpha alone.

    A level beyond those it knows is taken for its last one.

    Args:
        inner: the denoiser. process: the other process.
        dtype: of what the denoiser is given, where peers hold their states in float64; None: the state's.
        cond: what else the denoiser is given.

    Raises:
        DenoiserError: at a call, where the denoiser raises an error of its own.
    """

    def __init__(self, inner: Denoiser, process: Process, dtype: torch.dtype | None = None, **cond: Any):
        self.inner, self.process, self.dtype, self.cond = inner, process, dtype, cond

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        process = self.inner.process
        t = t[0] if t.ndim else t  # k-diffusion gives one per sample, all the same
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        own = process.time(-2 * torch.log(sigma / alpha)).clamp(process.t_min, process.t_max)
        scale = torch.hypot(process.alpha(own), process.sigma(own)) / torch.hypot(alpha, sigma)
        given = (scale * x).to(self.dtype or x.dtype)
        try:
            x0 = at(self.inner, float(own))(given, own, **self.cond, **cond)
        except PfodeError:
            raise
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise MemoryLimitError("out of memory inside of the denoiser", "a smaller batch") from error
        except Exception as error:
            raise DenoiserError.of(error) from error
        if not isinstance(x0, Tensor) or x0.shape != x.shape:
            got = f"shape {tuple(x0.shape)}" if isinstance(x0, Tensor) else type(x0).__name__
            raise DenoiserError(f"the denoiser returned {got} for x of shape {tuple(x.shape)}", "(x, t) -> x0")
        return x0.to(x.dtype)


class Request(NamedTuple):
    """What a peer is to do.

    Attributes:
        denoiser: on its own process. x: the state at the first time of that process, shape (n, ...).
        seeds: of the samples, for what noise the peer draws.
        nfe: most calls.
        lay: a grid instead of the peer's own.
        cond: what else the denoiser is given.
        options: of the scheduler's configuration, or of the function.
    """

    denoiser: Denoiser
    x: Tensor
    seeds: Sequence[int]
    nfe: int
    lay: Lay | None
    cond: dict[str, Any]
    options: dict[str, Any]

    def moved(self, process: Process) -> Counted:
        """The denoiser on the peer's process, its calls counted."""
        return Counted(Moved(self.denoiser, process, self.x.dtype, **self.cond))

    def initial(self, sigma: float | Tensor) -> Tensor:
        """The noise of x, of the deviation sigma, in float64."""
        process = self.denoiser.process
        return self.x.double() / process.sigma(process.t_max) * sigma


def keyed(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Draw:
    """The noise of a plan's rows, in float64."""
    return lambda calls: noise.normal(seeds, calls, shape, torch.float64, device)


def levels(process: Process, times: Sequence[float]) -> list[float]:
    """sigma/alpha at times, 0 at that of clean data, at most HIGHEST."""
    found = []
    for t in times:
        alpha = process.alpha(t)
        level = HIGHEST if alpha <= 0 else min(HIGHEST, process.sigma(t) / alpha)
        found.append(0.0 if t == process.t_data else level)
    return found
