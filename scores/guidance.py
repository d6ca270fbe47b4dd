"""Guidance, a denoiser made from denoisers: away from no class (Ho & Salimans 2022) or from a weaker network."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pfode.denoiser import Denoiser, Preconditioned, Preconditioning, preconditioned
from pfode.errors import UsageError


class Guided(Preconditioned):
    """F_u + scale (F_c - F_u): the network with its label and without, in one forward of twice the batch.

    As D is affine in F, guiding F is guiding D.
    """

    def __init__(self, denoiser: Denoiser, scale: float, label: Tensor | int | None):
        self.inner = preconditioned(denoiser)
        self.denoiser = denoiser
        self.process = denoiser.process
        self.scale = scale
        self.label = label
        self.labels: Sequence[str] = getattr(denoiser, "labels", None) or ()
        self.shape = getattr(denoiser, "shape", None)
        self.dtype = getattr(denoiser, "dtype", None)
        self.device = getattr(denoiser, "device", None)
        self.evals = getattr(denoiser, "evals", 1) * (1 if scale in (0, 1) else 2)

    def precondition(self, t: Tensor) -> Preconditioning:
        return self.inner.precondition(t)

    def network(self, x: Tensor, c_noise: Tensor, *, label: Tensor | int | None = None, **cond: Any) -> Tensor:
        """The guided F; `label` as for the denoiser, else the one given to `guide`.

        Raises:
            UsageError: no label.
        """
        if self.scale == 0:
            return self.inner.network(x, c_noise, **cond)
        label = self.label if label is None else label
        if label is None:
            raise UsageError("guidance needs a class to guide towards", "give label= (or --label NAME, --label all)")
        if self.scale == 1:
            return self.inner.network(x, c_noise, label=label, **cond)
        if isinstance(label, int):
            label = torch.full((x.shape[0],), label, device=x.device)
        if label.shape not in ((), (x.shape[0],)):
            raise UsageError(f"label: got {len(label)} for {x.shape[0]} samples", "give them to sample(label=...)")
        label = label.expand(x.shape[0])
        null = torch.full_like(label, len(self.labels))
        cond = {key: _twice(value, x.shape[0]) for key, value in cond.items()}
        out = self.inner.network(torch.cat([x, x]), _twice(c_noise, x.shape[0]), label=torch.cat([null, label]), **cond)
        without, given = out.to(x.dtype).chunk(2)  # before the scale magnifies the rounding of a half-precision network
        return torch.lerp(without, given, self.scale)

    def label_index(self, name: str | int) -> int:
        """See `Denoiser.label_index`."""
        return self.denoiser.label_index(name)  # type: ignore[attr-defined]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Guided":
        """See `Denoiser.to`."""
        return Guided(self.denoiser.to(device, dtype), self.scale, self.label)  # type: ignore[attr-defined]

    def compiled(self) -> "Guided":
        """See `Denoiser.compiled`."""
        return Guided(self.denoiser.compiled(), self.scale, self.label)  # type: ignore[attr-defined]

    def guided(self, scale: float) -> Denoiser:
        """The denoiser underneath, guided by another scale."""
        return guide(self.denoiser, scale, self.label)


class Autoguided:
    """D_weak + scale (D - D_weak): away from a weaker network's mistakes (Karras et al. 2024), classes or not."""

    def __init__(self, denoiser: Denoiser, weak: Denoiser, scale: float):
        if denoiser.process != weak.process:
            raise UsageError(f"the weak denoiser has {weak.process}, the other {denoiser.process}", "take its sibling")
        shapes = [getattr(d, "shape", None) for d in (denoiser, weak)]
        classes = [len(getattr(d, "labels", None) or ()) for d in (denoiser, weak)]
        if shapes[0] != shapes[1] or classes[0] != classes[1]:
            raise UsageError(f"the weak denoiser differs in shape or classes: {shapes}, {classes}", "take its sibling")
        self.denoiser, self.weak, self.scale = denoiser, weak, scale
        self.process = denoiser.process
        self.labels: Sequence[str] = getattr(denoiser, "labels", None) or ()
        self.shape = shapes[0]
        self.dtype = getattr(denoiser, "dtype", None)
        self.device = getattr(denoiser, "device", None)
        self.evals = getattr(denoiser, "evals", 1) + getattr(weak, "evals", 1)

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The guided D; both denoisers see the same x, t and conditions."""
        return torch.lerp(self.weak(x, t, **cond), self.denoiser(x, t, **cond), self.scale)

    def label_index(self, name: str | int) -> int:
        """See `Denoiser.label_index`."""
        return self.denoiser.label_index(name)  # type: ignore[attr-defined]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Autoguided":
        """See `Denoiser.to`."""
        both = (d.to(device, dtype) for d in (self.denoiser, self.weak))  # type: ignore[attr-defined]
        return Autoguided(*both, self.scale)

    def compiled(self) -> "Autoguided":
        """See `Denoiser.compiled`."""
        return Autoguided(self.denoiser.compiled(), self.weak.compiled(), self.scale)  # type: ignore[attr-defined]


def guide(
    denoiser: Denoiser, scale: float, label: Tensor | int | str | None = None, weak: Denoiser | None = None
) -> Denoiser:
    """Guidance: D_0 + scale (D - D_0), where D_0 is the denoiser at the null class, or a weaker denoiser.

    Args:
        denoiser: class-conditional, its label len(labels) meaning none; with `weak`, any.
        scale: 0 is D_0, 1 the denoiser itself, above 1 exaggerates the difference.
        label: the class, where calls do not give one: an index, a name, or (batch,) indices.
        weak: a smaller or less trained sibling, for autoguidance.

    Raises:
        UsageError: an unconditional denoiser, a scale that is not finite, an unknown class, or no sibling.
    """
    if not math.isfinite(scale):
        raise UsageError(f"guidance scale must be finite, got {scale}", "1 means no guidance; try 1.5 to 4")
    if weak is not None:
        if label is not None:
            raise UsageError("autoguidance takes no label of its own", "give label= to sample")
        return denoiser if scale == 1 else Autoguided(denoiser, weak, float(scale))
    if scale == 1 and label is None:
        return denoiser
    if not getattr(denoiser, "labels", None):
        raise UsageError(
            "guidance needs a class-conditional denoiser; this one has no labels", "leave the guidance out"
        )
    if isinstance(label, str):
        label = denoiser.label_index(label)  # type: ignore[attr-defined]
    return Guided(denoiser, float(scale), label)


def _twice(value: Any, batch: int) -> Any:
    """A batched tensor repeated for both halves; anything else as it is."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
        return torch.cat([value, value])
    return value
