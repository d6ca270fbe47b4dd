"""The protocol every solver stands on: D(x, t) = E[x_0 | x_t = x].

A denoiser is any callable `(x, t, **cond) -> x0` with a `.process`. One that also shows its network (`Preconditioned`)
is used through that network, so that its preconditioning folds into the solver's own coefficients.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from pfode.errors import UsageError
from pfode.introspection import compute_dtype
from pfode.process import Process, float64
from pfode.tensors import raw

__all__ = [
    "Bare",
    "Denoiser",
    "Preconditioned",
    "Preconditioning",
    "at",
    "conditioning",
    "conditions",
    "digest",
    "energy",
    "fingerprint",
    "forwards",
    "inmost",
    "network_digest",
    "preconditioned",
    "tuned",
]


@runtime_checkable
class Denoiser(Protocol):
    """A callable `(x, t, **cond) -> x0`; x and x0 of shape (batch, ...), t 0-d or (batch,).

    It must not change x, and returns a tensor of its own at every call: solvers keep both.

    Optional, used where present: `shape` (of one sample, without the batch), `labels` (names of the classes), `evals`
    (network forwards per call; 1 when absent), `data_std` (of data whose mean is 0), `guided(scale)` (classifier-free
    guidance), `compiled()`, `fingerprint` (a digest of its weights), `plans` (fitted to it, by their number of calls),
    `at(t)`: what stands in for it at time t, a float, under the same preconditioning and with its own `evals`,
    `conditioning` (the layers of its network that tell it how noisy x is, each with its width) and `tuned(offsets)`:
    what stands in for it when so much is added to the outputs of those layers, and `conditions(seeds)`: what calls for
    samples of these seeds are given besides the class, tensors by their names.
    """

    @property
    def process(self) -> Process: ...

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor: ...


class Preconditioning(NamedTuple):
    """D(x, t) = c_skip x + c_out F(c_in x, c_noise), each of the shape of t (Karras et al. 2022, eq. 7)."""

    c_in: Tensor
    c_noise: Tensor
    c_skip: Tensor
    c_out: Tensor


class Preconditioned(ABC):
    """A denoiser that shows its network F and how it is preconditioned."""

    process: Process

    @abstractmethod
    def precondition(self, t: Tensor) -> Preconditioning:
        """The four coefficients at times t, computed in the dtype of t."""

    @abstractmethod
    def network(self, x: Tensor, c_noise: Tensor, **cond: Any) -> Tensor:
        """F(x, c_noise): x of shape (batch, ...), c_noise 0-d or (batch,); the output may be of a lower precision."""

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """D(x, t) in the dtype of x."""
        c = Preconditioning(*(_like(value, x) for value in self.precondition(float64(t))))
        noise = c.c_noise.reshape(-1) if c.c_noise.ndim else c.c_noise
        return c.c_skip * x + c.c_out * self.network(c.c_in * x, noise, **cond).to(x.dtype)


OF_TYPES = re.compile(r"dtype|scalar type|type \(")  # in what torch says of tensors that differ in their types


class Bare(Preconditioned):
    """Any denoiser seen as a network with the identity preconditioning: c_in = c_out = 1, c_skip = 0, c_noise = t.

    One that is a torch module, or an object that holds one, is asked in the dtype of the state, and where torch refuses
    that, in the module's own `dtype`.
    """

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser
        self.process = denoiser.process
        held = [denoiser] if isinstance(denoiser, nn.Module) else getattr(denoiser, "__dict__", {}).values()
        dtypes = {compute_dtype(module) for module in held if isinstance(module, nn.Module)}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        self.casts = False

    def precondition(self, t: Tensor) -> Preconditioning:
        return Preconditioning(torch.ones_like(t), t, torch.zeros_like(t), torch.ones_like(t))

    def network(self, x: Tensor, c_noise: Tensor, **cond: Any) -> Tensor:
        """The denoiser in the dtype of x; where torch refuses that, in the one of the module that it is or holds."""
        if self.dtype is None or self.dtype == x.dtype:
            return self.denoiser(x, c_noise, **cond)
        if not self.casts:
            try:
                return self.denoiser(x.clone(), c_noise, **cond)  # which it may change before it fails
            except RuntimeError as error:
                if not OF_TYPES.search(str(error)):
                    raise
                self.casts = True
        time = torch.promote_types(self.dtype, torch.float32)
        return self.denoiser(x.to(self.dtype), c_noise.to(time), **cond)

    def at(self, t: float) -> "Bare":
        """See `at`."""
        there = at(self.denoiser, t)
        return self if there is self.denoiser else Bare(there)

    def tuned(self, offsets: Mapping[str, Tensor]) -> "Bare":
        """See `tuned`."""
        return Bare(tuned(self.denoiser, offsets))


AnyDenoiser = TypeVar("AnyDenoiser", bound=Denoiser)


def at(denoiser: AnyDenoiser, t: Any) -> AnyDenoiser:
    """What stands in for a denoiser at time t: `denoiser.at(t)` where it has that, else the denoiser itself.

    Guidance in an interval, or by a schedule, is another denoiser at every time. The times of a plan are known
    beforehand on the host, so that no call has to look at a time on the device.
    """
    found = getattr(denoiser, "at", None)
    return denoiser if found is None else found(t)


def tuned(denoiser: AnyDenoiser, offsets: Mapping[str, Tensor]) -> AnyDenoiser:
    """What stands in for a denoiser when its network is asked with another condition: `denoiser.tuned(offsets)`.

    The time that a row of a plan asks at is one coordinate of the condition that it asks with; the offsets are others,
    learnt for one row as its time is ("Three Creates All", arXiv 2603.22375: step-wise time embeddings).

    Args:
        offsets: by the name of a conditioning layer, what is added to its output, shape (width,) or (batch, width).

    Raises:
        UsageError: a denoiser without such layers.
    """
    found = getattr(denoiser, "tuned", None)
    if found is None:
        problem = f"{type(denoiser).__name__} has no conditioning layers to which a tuned plan could add its offsets"
        raise UsageError(problem, "run it on the network it was fitted to, wrapped by pfode.scores.Denoiser")
    return found(offsets)


def conditioning(denoiser: Denoiser) -> Mapping[str, int]:
    """The layers that tell a denoiser's network how noisy its input is, and the widths of their outputs.

    Raises:
        UsageError: it has none, or they cannot be found.
    """
    found = getattr(denoiser, "conditioning", None)
    if not found:
        problem = f"{type(denoiser).__name__} has no layers that depend on the time alone: there is nothing to tune"
        raise UsageError(problem, "a torch network wrapped by pfode.scores.Denoiser, or tune=False")
    return found


def conditions(denoiser: Denoiser, seeds: Sequence[int], device: torch.device | str) -> dict[str, Tensor]:
    """What calls for samples of these seeds are given besides the class: by name, each of shape (len(seeds), ...)."""
    found = getattr(denoiser, "conditions", None)
    return {} if found is None else {key: value.to(device) for key, value in found(seeds).items()}


def fingerprint(denoiser: Denoiser) -> str | None:
    """What tells a denoiser from others, whatever its guidance, precision or device; None where it does not say."""
    found = getattr(denoiser, "fingerprint", None)
    return found if isinstance(found, str) else None


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of a description and of tensors by their names: a `fingerprint`."""
    whole = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        whole.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        whole.update(raw(value))
    return whole.hexdigest()


def inmost(denoiser: Any) -> Any:
    """The denoiser that wrappers (guidance, clipping) stand around."""
    while hasattr(denoiser, "denoiser"):
        denoiser = denoiser.denoiser
    return denoiser


def network_digest(network: nn.Module) -> str:
    """sha256 of a network's weights, whether pfode wraps it (as `model`) or a pipeline holds it."""
    state = network.state_dict()
    prefix = "model." if state and all(name.startswith("model.") for name in state) else ""
    return digest("network", {name.removeprefix(prefix): value for name, value in state.items()})


def energy(denoiser: Any, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
    """E(x, t), (batch,): -log p_t(x) up to a constant of x, by `denoiser.energy` or else its `log_prob`.

    Raises:
        UsageError: it has neither.
    """
    if hasattr(denoiser, "energy"):
        return denoiser.energy(x, t, **cond)
    if hasattr(denoiser, "log_prob"):
        return -denoiser.log_prob(x, t)
    raise UsageError(f"energy: {type(denoiser).__name__} has none", "an EnergyDenoiser, or an exact denoiser")


def forwards(denoiser: Denoiser, times: Tensor) -> int:
    """Network forwards per sample of one call at each of these times."""
    return sum(getattr(at(denoiser, t), "evals", 1) for t in times.tolist())


def preconditioned(denoiser: Denoiser) -> Preconditioned:
    """The denoiser itself if it shows its network, else the same function with the identity preconditioning."""
    return denoiser if isinstance(denoiser, Preconditioned) else Bare(denoiser)


def _like(value: Tensor, x: Tensor) -> Tensor:
    """value (0-d or (batch,)) cast to x and shaped to broadcast against it."""
    value = value.to(x)
    return value.reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else value
