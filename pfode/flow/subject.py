"""Whose likelihood is asked for: the denoiser and its conditions, the data, their seeds and bins, checked once."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pfode import defaults, noise
from pfode.arguments import guided, need_denoiser, sample_states
from pfode.denoiser import Denoiser
from pfode.errors import UsageError, integer, shortened
from pfode.flow.dequantise import settled_end
from pfode.labels import class_indices
from pfode.tensors import raw

__all__ = ["Subject", "content_seeds", "subject"]

FAR = 8.0  # no picture in [-1, 1] has values beyond, whatever its noise
MANY = 2**16  # values of an element


@dataclass(frozen=True, eq=False)
class Subject:
    """Some samples of one denoiser.

    Attributes:
        denoiser: guided as asked. x: data (n, ...), in float64 where the device has it, where the denoiser lies.
        seeds: one per sample. cond: what goes to the denoiser, per sample or for all.
        end, width: how the likelihood ends, and the width of a bin; 0 where the data are densities.
        size: samples of a batch.
    """

    denoiser: Denoiser
    x: Tensor
    seeds: list[int]
    cond: dict[str, Any]
    end: str
    width: float
    size: int

    @property
    def dimensions(self) -> int:
        """Elements of a sample."""
        return self.x[0].numel()

    def batches(self) -> Iterator["Subject"]:
        """The same in batches."""
        for i in range(0, len(self.x), self.size):
            some = torch.arange(i, min(i + self.size, len(self.x)), device="cpu")
            yield replace(self, x=self.x[i : i + self.size], seeds=self.seeds[i : i + self.size], cond=self.of(some))

    def of(self, sample: Tensor) -> dict[str, Any]:
        """The conditions of some samples, by their numbers on the host."""
        n = len(self.x)
        return {
            name: value[sample.to(value.device)] if isinstance(value, Tensor) and value.shape[:1] == (n,) else value
            for name, value in self.cond.items()
        }


def subject(
    denoiser: Denoiser,
    x: Tensor,
    *,
    seeds: Sequence[int] | None = None,
    end: str = "truncated",
    bins: int | None = None,
    label: Any = None,
    guidance: float | None = None,
    batch: int | None = None,
    cond: dict[str, Any] | None = None,
) -> Subject:
    """The samples as `log_likelihood` and `elbo` take them.

    Raises:
        UsageError: what cannot be carried out as written.
    """
    need_denoiser(denoiser, "a likelihood", "call it outside: its nats take gradients to x by torch.autograd")
    settled_end(end, denoiser.process, 1.0)
    states = sample_states("x", x)
    own = getattr(denoiser, "shape", None)
    if own is not None and tuple(own) != tuple(states.shape[1:]):
        raise UsageError(f"x: the denoiser has samples of shape {tuple(own)}, got {tuple(states.shape[1:])}")
    bins = getattr(denoiser, "bins", None) if bins is None else integer("bins", bins, 2, MANY)
    if bins is None:
        end = "none"
    width = 2 / (bins - 1) if bins is not None and end != "none" else 0.0
    end = settled_end(end, denoiser.process, width)
    if width and states.detach().abs().max() > FAR:
        problem = f"x: pictures lie in [-1, 1], got values up to {float(states.detach().abs().max()):g}"
        raise UsageError(problem, "x / 127.5 - 1; or end='none' for densities")
    n, where = len(states), getattr(denoiser, "device", None) or states.device
    if seeds is None:
        chosen = content_seeds(states)
    elif isinstance(seeds, str | bytes | dict) or not isinstance(seeds, Sequence | Tensor | range):
        raise UsageError(f"seeds: need integers, got {shortened(seeds)}", "seeds=[0, 1, 2]")
    else:
        chosen = noise.check_seeds(seeds.tolist() if isinstance(seeds, Tensor) else seeds)
    if len(chosen) != n:
        raise UsageError(f"seeds: need one for each of {n} samples, got {len(chosen)}", "seeds=range(n), or None")
    denoiser = guided(denoiser, guidance)
    given = dict(cond or {})
    labels = class_indices(denoiser, label, n)
    if labels is not None:
        given["label"] = labels.to(where)
    states = states.clone() if states.is_inference() else states
    states = states.to(where, torch.float32 if torch.device(where).type == "mps" else torch.float64)
    size = defaults.BATCH if batch is None else integer("batch", batch, 1)
    return Subject(denoiser, states, chosen, given, end, width, size)


def content_seeds(x: Tensor) -> list[int]:
    """A seed for every sample from its numbers: the same sample has the same one wherever it stands."""
    every = x.detach().to("cpu", torch.float64)
    return [int.from_bytes(hashlib.blake2b(raw(one), digest_size=8).digest(), "little") for one in every]
