"""A benchmark problem: a denoiser, the noise that samplers start from, and what their samples are compared with."""

import contextlib
import functools
import hashlib
import math
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfode import defaults, grids, noise
from pfode.denoiser import Denoiser, fingerprint
from pfode.errors import DenoiserError, NumericalError, PfodeError, UsageError, integer
from pfode.plans.table import Plan
from pfode.samplers import auto
from pfode.samplers.catalogue import make_plan
from pfode.samplers.measure.metrics import RESAMPLES, Features, rounded
from pfode.samplers.request import Beginning, Keep, Place
from pfode.samplers.sampling import batches
from pfode.samplers.settle import sample_shape
from pfode.tensors import raw

__all__ = ["Problem", "blamed", "reference_solution"]

VALIDATION = 1_000_000_000  # further on: the noise on which alternatives are chosen and grids searched
TRUTH = 4_000_000_000  # seeds of true samples; the second set lies as far again
TOLERANCE = 2e-4  # of the reference: between two resolutions, as a share of the root mean square of its end points
FIRST, MOST = 64, defaults.Bench.TEACHER  # denoiser calls of the reference solution
MAX_BYTES = 2**34  # that all samples of a problem, or their bootstrap samples, may take
GRIDS = {"alpha = 1": "karras", "VP": "time-quadratic", "Flow": "time"}  # of the reference, by family of process


@dataclass(frozen=True)
class Problem:
    """A denoiser and how samplers are measured on it.

    Args:
        name: in the results.
        denoiser: of known `shape`; a class-conditional one draws its classes in turn.
        n: samples, of seeds `seed`, `seed + 1`, ...
        validation: samples, others, on which alternatives of a sampler are chosen.
        teacher: most denoiser calls of the reference solution; 0 for none, and then no end points are compared.
        truth: true samples (n, *shape), where the denoiser cannot draw them itself (`sample(n, seed)`).
        features: (n, *shape) -> (n, d), in which the distances of distributions are measured; None: the samples.
        features_digest: tells one function of features from another in the settings.
        digest: of what the denoiser was made from, for the settings; its `fingerprint` when None, unless it is exact.
        device: where it runs. batch: samples per denoiser call.

    Raises:
        UsageError: no sample shape, or sizes that cannot be made.
    """

    name: str
    denoiser: Denoiser
    n: int = defaults.Bench.SAMPLES
    seed: int = defaults.Bench.SEED
    validation: int = defaults.Bench.VALIDATION
    teacher: int = MOST
    truth: Tensor | None = None
    features: Features | None = None
    features_digest: str | None = None
    digest: str | None = None
    device: str = "cpu"
    batch: int = defaults.Bench.BATCH

    def __post_init__(self) -> None:
        if not getattr(self.denoiser, "shape", None):
            problem = f"model {self.name!r}: does not say the shape of its samples"
            raise UsageError(problem, "give the denoiser a `shape`")
        sample_shape(self.denoiser, None, None)
        if not isinstance(self.name, str) or not self.name.isprintable() or not self.name:
            raise UsageError(f"name: need a text in one line, got {self.name!r:.200}")
        most = max(1, MAX_BYTES // (8 * max(math.prod(self.shape), 2 * RESAMPLES)))
        integer("n", self.n, 2, most)
        integer("validation", self.validation, 1, most)
        integer("teacher", self.teacher, 0, grids.MAX_STEPS)
        integer("batch", self.batch, 1)
        if self.truth is not None:
            self._check_truth(self.truth)
        if self.features is not None and not callable(self.features):
            raise UsageError(f"features: {type(self.features).__name__} cannot be called", "(n, *shape) -> (n, d)")
        integer("seed", self.seed, 0, 2**64 - 1 - VALIDATION - max(self.n, self.validation))

    def _check_truth(self, truth: Tensor) -> None:
        """Raise UsageError where true samples are none of this problem's."""
        right = isinstance(truth, Tensor) and truth.is_floating_point() and tuple(truth.shape[1:]) == self.shape
        if not right or len(truth) < 2 or not torch.isfinite(truth).all():
            got = f"{truth.dtype}, {tuple(truth.shape)}" if isinstance(truth, Tensor) else type(truth).__name__
            raise UsageError(f"truth: need finite samples of shape (n, *{self.shape}), n > 1, got {got}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.denoiser.shape)  # type: ignore[attr-defined]

    @property
    def evals_per_call(self) -> int:
        """Network evaluations of one denoiser call: 2 under guidance."""
        return getattr(self.denoiser, "evals", 1)

    @property
    def exact(self) -> bool:
        """Whether the denoiser is in closed form."""
        return hasattr(self.denoiser, "log_prob")

    @property
    def dtype(self) -> torch.dtype:
        """Of the states, and of what the denoiser is given: float64 for an exact denoiser, else float32."""
        return torch.float64 if self.exact else torch.float32

    @property
    def pictures(self) -> bool:
        """Whether its samples can be shown."""
        return len(self.shape) == 3 and self.shape[0] in (1, 3)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """All that the figures depend on, as JSON."""
        found: dict[str, Any] = {key: getattr(self, key) for key in ("n", "seed", "validation", "teacher")}
        found["digest"] = self.digest or (None if self.exact else fingerprint(self.denoiser))
        found |= {"process": repr(self.denoiser.process), "evals per call": self.evals_per_call}
        found["truth"] = None if self.truth is None else f"{len(self.truth)} samples, {_digest(self.truth)}"
        found["features"] = False if self.features is None else self.features_digest or True
        return found

    def seeds(self, validation: bool = False) -> list[int]:
        """Of the measured samples, or of those on which alternatives are chosen."""
        first = self.seed + (VALIDATION if validation else 0)
        return [first + i for i in range(self.validation if validation else self.n)]

    def labels(self, n: int) -> list[int] | None:
        """The classes of n samples, in turn; None where there are none."""
        classes = getattr(self.denoiser, "labels", None)
        return [i % len(classes) for i in range(n)] if classes else None

    def run(self, plan: Plan, seeds: Sequence[int]) -> Tensor:
        """End points of a plan, shape (len(seeds), *shape); not finite where it failed."""
        beginning, place = Beginning(label=self.labels(len(seeds))), Place(self.batch, self.dtype, self.device)
        with blamed(f"model {self.name!r}"):
            parts = [part.x.cpu() for part in batches(self.denoiser, plan, seeds, beginning, place, Keep(nan="flag"))]
        return torch.cat(parts)

    def probe(self) -> None:
        """Draw two samples in two steps, to see that the denoiser works at all.

        Raises:
            DenoiserError: it raises an error of its own. UsageError: it returns something else than x0.
        """
        self.run(make_plan("ddim", self.denoiser.process, 2), self.seeds()[:2])

    def initial(self, seeds: Sequence[int]) -> Tensor:
        """The noise that sampling starts from, the state at the process's last time, shape (len(seeds), *shape)."""
        process = self.denoiser.process
        unit = noise.normal(seeds, noise.INITIAL, self.shape, self.dtype, self.device)
        return process.sigma(process.t_max) * unit

    def true(self) -> Tensor | None:
        """Held-out true samples: those given, or n that are drawn; None where there are none."""
        if self.truth is not None:
            return self.truth
        draw = getattr(self.denoiser, "sample", None)
        return None if draw is None else draw(self.n, seed=TRUTH)

    def two_true(self) -> tuple[Tensor, Tensor] | None:
        """Two sets of true samples, whose distance no sampler can pass: the halves of those given."""
        truth = self.true()
        if truth is None or self.truth is not None:
            return None if truth is None or len(truth) < 8 else (truth[::2], truth[1::2])
        return truth, self.denoiser.sample(self.n, seed=2 * TRUTH)  # type: ignore[attr-defined]


def reference_solution(problem: Problem, validation: bool = False) -> tuple[Tensor, dict[str, Any]]:
    """End points of the PF-ODE, shape (n, *shape): exact on a Gaussian, else of `unipc3` in the chart flow.

    Its steps are doubled until two resolutions differ by less than a share TOLERANCE of the end points' root mean
    square, or by `problem.teacher` calls.

    Returns:
        The end points, and how they were made: "calls"; "error", the difference of the last two resolutions, which
        overestimates the error of the finer one; "size", their root mean square.

    Raises:
        NumericalError: end points that are not finite.
    """
    denoiser, process, seeds = problem.denoiser, problem.denoiser.process, problem.seeds(validation)
    flow = getattr(denoiser, "flow", None)
    if flow is not None:
        exact = flow(problem.initial(seeds), process.t_max, process.t_data)
        return exact.cpu(), {"calls": 0, "error": 0.0}
    grid, calls = GRIDS[auto.family(process)], min(FIRST, problem.teacher)

    def solved(nfe: int) -> Tensor:
        return problem.run(make_plan("unipc3", process, nfe=nfe, grid=grid, chart="flow"), seeds)

    before = solved(max(2, calls // 2))
    while True:
        x = solved(calls)
        if not torch.isfinite(x).all():
            raise NumericalError(f"{problem.name}: the reference solution of {calls} calls is not finite")
        error, size = (z.double().pow(2).mean().sqrt().item() for z in (x - before, x))
        if error < TOLERANCE * size or 2 * calls > problem.teacher:
            return x, {"calls": calls, "error": rounded(error), "size": rounded(size)}
        before, calls = x, 2 * calls


@contextlib.contextmanager
def blamed(name: str) -> Iterator[None]:
    """Call an error by its name that a denoiser, or a function of the caller's, raises inside of the block.

    Raises:
        DenoiserError: for one that passed through code of others; pfode's own pass as they are.
    """
    try:
        yield
    except DenoiserError as error:
        raise DenoiserError(error.message.replace("the denoiser", name, 1), error.hint) from error.__cause__
    except (PfodeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not _inside_a_denoiser(error):
            raise
        raise DenoiserError.of(error, name) from error


def _inside_a_denoiser(error: Exception) -> bool:
    """Whether an error passed through code that is not pfode's: what it calls here is a denoiser of the caller's."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(not name.startswith(("pfode.", "contextlib", "torch.utils._contextlib")) for name in modules)


def _digest(x: Tensor) -> str:
    """What tells a tensor from others, in 16 letters."""
    return hashlib.sha256(raw(x)).hexdigest()[:16]
