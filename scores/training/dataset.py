"""What a network is trained on: pictures in memory, with or without classes."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pfode.errors import FileError, UsageError

__all__ = ["MAX_BYTES", "MAX_CLASSES", "Data", "checked_names"]

MAX_BYTES = 4 << 30  # of pictures in memory
MAX_CLASSES = 100_000


@dataclass(frozen=True)
class Data:
    """Pictures in memory.

    Args:
        images: uint8 (n, channels, size, size), of 1 or 3 channels.
        labels: int64 (n,), or None.
        names: of the classes; empty without labels.
        card: where they come from, under what licence, digests: JSON. `card["flip"]` names the classes of which a
            mirror image is as good as the picture.
        left_out: how many files were found and not taken, by the reason.
        styles: float32 (n, numbers), a vector per picture that the network is told besides the class; or None.

    Raises:
        UsageError: of another type or shape, or labels and names that do not fit.
    """

    images: Tensor
    labels: Tensor | None
    names: tuple[str, ...] = ()
    card: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    styles: Tensor | None = None

    def __post_init__(self) -> None:
        n, channels, height, width = self.images.shape if self.images.ndim == 4 else (0, 0, 0, 0)
        if n == 0 or height != width or channels not in (1, 3) or self.images.dtype != torch.uint8:
            got = f"{self.images.dtype} of shape {tuple(self.images.shape)}"
            raise UsageError(f"data: expected uint8 (n, 1 or 3, size, size) with n > 0, got {got}")
        if (self.labels is None) != (not self.names):
            raise UsageError("data: labels and names of the classes go together")
        if self.labels is not None and (
            self.labels.dtype != torch.int64
            or self.labels.shape != (n,)
            or not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.names)
        ):
            raise UsageError(f"data: labels must be {n} integers from 0 to {len(self.names) - 1} (int64)")

        styles = self.styles
        if styles is not None and (
            styles.dtype != torch.float32 or styles.ndim != 2 or len(styles) != n or not styles.isfinite().all()
        ):
            got = f"{styles.dtype} of shape {tuple(styles.shape)}"
            raise UsageError(f"data: styles must be finite float32 ({n}, numbers), got {got}")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: list[int]) -> Tensor:
        """The pictures of these numbers in [-1, 1], (n, channels, size, size) in float64."""
        return self.images[torch.tensor(index)].to(torch.float64) / 127.5 - 1

    def split(self, share: float) -> tuple["Data", "Data | None"]:
        """The pictures to train on, and those held out: this share of them, evenly spaced; None for a share of 0.

        Raises:
            UsageError: a share outside [0, 0.5], or one that leaves no picture on a side.
        """
        if share == 0:
            return self, None
        n = len(self)
        count = round(n * share) if 0 < share <= 0.5 else 0
        if not 0 < count < n:
            problem = f"data: held_out: {share:g} of {n} pictures leaves none on a side"
            raise UsageError(problem, "a share from 0.01 to 0.5 (--held-out 0.05)")
        held = torch.zeros(n, dtype=torch.bool)
        held[(torch.arange(count) * n + n // 2) // count] = True
        return self._part(~held, share), self._part(held, share)

    def _part(self, chosen: Tensor, share: float) -> "Data":
        def of(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[chosen]

        digest = hashlib.sha256(f"{self.card.get('sha256')} without {share!r}".encode()).hexdigest()
        card = {**self.card, "count": int(chosen.sum()), "held_out": share, "sha256": digest}
        images, labels, styles = self.images[chosen], of(self.labels), of(self.styles)
        return Data(images, labels, self.names, card, self.left_out, styles)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variances of every pixel in [-1, 1], float64, each of the shape of one picture."""
        total, square = (torch.zeros(self.shape, dtype=torch.float64, device="cpu") for _ in range(2))
        for part in self.images.split(1024):
            x = part.double() / 127.5 - 1
            total, square = total + x.sum(0), square + x.square().sum(0)
        mean = total / len(self)
        return mean, (square / len(self) - mean**2).clamp(min=0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one picture: (channels, size, size)."""
        _, channels, height, width = self.images.shape
        return channels, height, width


def checked_names(where: str, names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes as they came with a file: in one line each, and no two alike.

    Args:
        where: the file, for messages.

    Raises:
        FileError: an empty name, one with controls or broken characters, or one that is there twice.
    """
    known: set[str] = set()
    for name in names:
        if not name.isprintable() or not name.strip():
            raise FileError(f"{where}: {name!r:.120}: no name for a class", "rename it")
        if name in known:
            raise FileError(f"{where}: {name!r:.120}: the name of two classes", "rename one")
        known.add(name)
    return tuple(names)
