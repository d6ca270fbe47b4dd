"""Test beds by name: the denoisers that samplers are measured on, exact ones and networks.

gaussian-16         a Gaussian in 16 dimensions, its flow known
mixture-64-flow     a mixture of 8 Gaussians in 64 dimensions, on a flow process (-vp: VP; else EDM)
mixture-64x15       its modes 15 deviations apart instead of 7
mixture-64~0.1      the same with a smooth error of a tenth in what a network would have to say
digits-ideal        the ideal denoiser of the handwritten digits, kernel width 0.1
avatars, avatars@2  a shipped network or a file; guided by the scale 2
"""

import hashlib
import math
import re
from typing import Any

import torch
from torch import Tensor

from pfode.denoiser import Denoiser
from pfode.errors import UsageError, integer, number
from pfode.process import EDM, VP, Flow, Process
from pfode.scores.exact import Empirical, Gaussian, GaussianMixture

PROCESSES: dict[str, Process] = {"edm": EDM(), "vp": VP(), "flow": Flow()}
MODES = 8
APART = 7.0  # distance of two modes, in deviations
MAX_DIMENSIONS = 1000
WIDTH = 0.1  # of the kernel of digits-ideal: narrower ones end on the points themselves
DATA_STD = 0.5
EXACT = re.compile(
    r"(?P<kind>gaussian-\d+|mixture-\d+(x(?P<apart>[\d.]+))?|digits-ideal)"
    r"(-(?P<process>edm|vp|flow))?(~(?P<error>[\d.]+))?"
)
HINT = "gaussian-16, mixture-64, mixture-64-vp~0.1, digits-ideal-flow, avatars@2, a name of `pfode info models`, a file"

__all__ = ["Perturbed", "bed", "gaussian", "mixture"]


def bed(name: str) -> Any:
    """The denoiser of a name, as listed above.

    Exact ones have `sample` and `log_prob`, mixtures also `modes`, a Gaussian also `flow`.

    Raises:
        UsageError: no such test bed, dimensions outside 1 to 1,000 (mixtures: from 2), or a network that cannot be
            guided.
        FileError: a model file that is missing or damaged.
    """
    found = EXACT.fullmatch(name)
    if found is None:
        return _network(name)
    process = PROCESSES[found["process"] or "edm"]
    kind, _, size = found["kind"].partition("-")
    if kind == "digits":
        exact: GaussianMixture = _digits(process)
    elif kind == "gaussian":
        exact = gaussian(integer("dimensions", int(size), 1, MAX_DIMENSIONS), process)
    else:
        apart = APART if found["apart"] is None else number("modes apart", _float(name, found["apart"]), 0, 1000)
        exact = mixture(integer("dimensions", int(size.partition("x")[0]), 2, MAX_DIMENSIONS), process, apart)
    if found["error"] is None:
        return exact
    return Perturbed(exact, number("error", _float(name, found["error"]), 0, 10))


def gaussian(dimensions: int, process: Process) -> Gaussian:
    """A Gaussian whose standard deviations fall from 0.5 to 0.05 along the axes by a power law, as in pictures.

    Its mean is 0.7 times a fixed standard normal sample.
    """
    mean = 0.7 * _normal(dimensions)
    return Gaussian(mean, _deviations(dimensions) ** 2, process=process)


def mixture(dimensions: int, process: Process, apart: float = APART) -> GaussianMixture:
    """A mixture of 8 Gaussians, of weights 1 : 2 : ... : 8.

    The standard deviations of each are those of `gaussian`, times factors of 0.7 to 1.4 of its own. With modes much
    farther apart, the mode where a trajectory near a border ends is chance, and the root mean square error counts those
    trajectories: mixture-64x15.

    Args:
        dimensions: of the samples; the modes lie apart in the 8 widest.
        process: the noise process.
        apart: distance of two modes on average, in standard deviations.
    """
    deviations, wide = _deviations(dimensions), min(dimensions, MODES)
    means = torch.zeros(MODES, dimensions, dtype=torch.float64, device="cpu")
    means[:, :wide] = apart * _normal(MODES, wide) / math.sqrt(2 * wide) * deviations[:wide]
    factors = 2 ** (torch.rand(MODES, dimensions, generator=_generator(1), dtype=torch.float64, device="cpu") - 0.5)
    weights = torch.arange(1, MODES + 1, dtype=torch.float64, device="cpu")
    return GaussianMixture(means, std=deviations * factors, weights=weights, process=process)


class Perturbed:
    """An exact denoiser with the kind of error that a network has: D + error c_out g(x).

    c_out = sigma s / sqrt(sigma^2 + alpha^2 s^2) with s = 0.5 is the factor of an EDM network's output (Karras et al.
    2022, table 1), and g a fixed smooth field of root mean square 1: sine waves in random directions, about as long as
    the data are wide. `sample`, `log_prob` and `modes` stay those of the exact denoiser.

    Args:
        exact: the denoiser without the error.
        error: root mean square of the error, in units of c_out.
    """

    def __init__(self, exact: GaussianMixture, error: float):
        self.exact, self.error = exact, error
        self.process, self.shape, self.labels = exact.process, exact.shape, None
        self.weights, self.sample, self.log_prob, self.modes = exact.weights, exact.sample, exact.log_prob, exact.modes
        d = math.prod(self.shape)
        self.directions = _normal(d, d) / math.sqrt(d)
        self.phases = 2 * math.pi * torch.rand(d, generator=_generator(7), dtype=torch.float64, device="cpu")

    @property
    def fingerprint(self) -> str | None:
        """A digest of the exact denoiser and of the error; None where the exact one has none."""
        found = getattr(self.exact, "fingerprint", None)
        return None if found is None else hashlib.sha256(f"{found} {self.error}".encode()).hexdigest()

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The perturbed D(x, t), of the shape of x, (batch, *shape)."""
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        length = torch.sqrt(sigma**2 + (alpha * DATA_STD) ** 2)
        seen = (x / length).flatten(1) @ self.directions.to(x) + self.phases.to(x)
        field = math.sqrt(2) * torch.sin(seen).reshape(x.shape)
        return self.exact(x, t.reshape(-1)) + self.error * sigma * DATA_STD / length * field


def _digits(process: Process) -> Empirical:
    """The ideal denoiser of the digits."""
    from pfode.scores.training.data import digits

    return Empirical(digits().images.double() / 127.5 - 1, std=WIDTH, process=process)


def _network(name: str) -> Denoiser:
    """A model by its name or file, with guidance where the name ends in @scale."""
    from pfode.scores.io.find import guided_name, model_path
    from pfode.scores.io.load import load

    try:
        model_path(guided_name(name)[0])
    except UsageError as error:
        raise UsageError(f"unknown test bed {name!r:.200}", error.hint if "@" in name else HINT) from error
    return load(name)


def _float(name: str, text: str) -> float:
    """A number within a name."""
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"test bed {name!r:.200}: need a number, got {text!r}", HINT) from error


def _generator(seed: int) -> torch.Generator:
    """A generator of fixed numbers: a test bed is the same everywhere."""
    return torch.Generator().manual_seed(seed)


def _normal(*shape: int) -> Tensor:
    """Fixed standard normal numbers."""
    return torch.randn(*shape, generator=_generator(0), dtype=torch.float64, device="cpu")


def _deviations(dimensions: int) -> Tensor:
    """Standard deviations from 0.5 to 0.05, (dimensions,)."""
    return 0.5 * torch.logspace(0, -1, dimensions, dtype=torch.float64, device="cpu")
