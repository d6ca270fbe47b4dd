"""Classes as people name them, into numbers: the one place where a label enters.

A denoiser with classes has `labels`, their names, and knows them by number from 0; len(labels) stands for "no class"
inside, where guidance needs it. Those that never came up in training are its `unseen`.
"""

import operator
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pfode.errors import UnseenLabelWarning, UsageError, nearly
from pfode.tensors import readable

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

__all__ = ["class_count", "class_index", "class_indices", "label_tensor", "listed", "warn_unseen"]


def class_indices(denoiser: Any, label: Any, n: int) -> Tensor | None:
    """The classes of n samples by number.

    Args:
        denoiser: whose classes they are; one without `labels` and `classes` is not asked which there are.
        label: one class for all, or n of them in a list, a tuple, a range, an array or a tensor: each a number, a name,
            or None for no class; None alone gives no labels at all.
        n: how many samples.

    Returns:
        int64 (n,), or None.

    Raises:
        UsageError: a label that is not there or no label, another count of them, or a network without classes.
    """
    names, count = getattr(denoiser, "labels", None), class_count(denoiser)
    if label is None:
        if count:
            warn_unseen(denoiser, [count])
        return None
    given = label.tolist() if hasattr(label, "tolist") else label
    several = list(given) if isinstance(given, list | tuple | range) else None
    if several is not None and len(several) != n:
        raise UsageError(f"label: need one, or {n} in a list, got a list of {len(several)}", "label=3")
    indices = [_index(names, count, one) for one in ([given] if several is None else several)]
    if count is not None:
        warn_unseen(denoiser, indices)
    return torch.tensor(indices, dtype=torch.int64, device="cpu").expand(n)


def _index(names: Sequence[str] | None, count: int | None, label: Any) -> int:
    if label is None:
        if not count:
            raise UsageError("label None: this network has no classes", "leave the label out")
        return count
    if count is not None:
        return class_index(names, label, count)
    number = _number(label)  # nothing is known of the classes
    if number is None or not 0 <= number < 2**63:
        raise UsageError(f"label: need an integer of at least 0, got {label!r:.60}", "label=3")
    return number


def class_count(denoiser: Any) -> int | None:
    """How many classes a denoiser has, 0 for none; None where it does not say."""
    names = getattr(denoiser, "labels", None)
    return getattr(denoiser, "classes", None) if names is None else len(names)


def class_index(names: Sequence[str] | None, label: Any, count: int | None = None) -> int:
    """The number of a class, given by its name or its number.

    Args:
        names: of the classes, if they have names.
        label: a name, in upper or lower case, or a number, which may be written out.
        count: of the classes, where they have no names.

    Raises:
        UsageError: an unknown class, no label, or a network without classes.
    """
    count = len(names or ()) if count is None else count
    if not count:
        raise UsageError(f"label {label!r:.60}: this network is unconditional", "leave the label out")
    names = tuple(map(str, range(count))) if names is None else names
    known = f"0 to {count - 1}: {listed(names)}; None for no class"
    if not isinstance(label, str):
        number = _number(label)
        if number is None:
            raise UsageError(f"label: {label!r:.60} is neither a number nor a name", known)
        if not 0 <= number < count:
            raise UsageError(f"unknown label {label!r:.60}", known)
        return number
    if label in names:
        return names.index(label)
    folded, wanted = [name.casefold() for name in names], label.casefold()
    if wanted in folded:
        return folded.index(wanted)
    if label.isdecimal() and len(label) < 10 and int(label) < count:
        return int(label)
    hint = ("" if label.isdecimal() else nearly(label, names)) or f"known: {known}"
    raise UsageError(f"unknown label {label!r:.60}", hint)


def _number(label: Any) -> int | None:
    """An integer of any type; None for anything else, True and False among them."""
    try:
        return None if isinstance(label, bool) else operator.index(label)
    except (TypeError, ValueError, RuntimeError):
        return None


def label_tensor(label: Any, names: Sequence[object] | None, x: Tensor) -> Tensor:
    """Labels as a network takes them: int64 (batch,) on the device of x, where len(names) means no class.

    Tensors on a device are not looked at, as that would wait for it.

    Args:
        label: a number, or a tensor of integers, 0-d or (batch,).
        names: of the classes, or their numbers; None where they are not known.
        x: the samples.

    Raises:
        UsageError: out of range, not integers, or of another length.
    """
    n = len(x)
    if isinstance(label, Tensor):
        if label.dtype not in INTEGERS or label.shape not in ((), (n,)):
            raise _no_integers(f"{label.dtype} of shape {tuple(label.shape)}", n)
        seen = names is not None and label.numel() and readable(label)
        low, high = (int(label.min()), int(label.max())) if seen else (0, 0)
    else:
        number = _number(label)
        if number is None:
            raise _no_integers(f"{label!r:.60}", n)
        low = high = number
    most = 2**31 if names is None else len(names)
    if not 0 <= low <= high <= most:
        hint = "a number of a class" if names is None else f"0 to {len(names) - 1}: {listed(names)}"
        raise UsageError(f"label {low if low < 0 else high} is out of range", hint)
    found = label if isinstance(label, Tensor) else torch.tensor(high, device="cpu")
    return found.to(x.device, torch.int64).expand(n)


def _no_integers(got: str, n: int) -> UsageError:
    return UsageError(f"label: expected integers of shape ({n},), got {got}", "torch.tensor([0, 3])")


def warn_unseen(denoiser: Any, indices: Iterable[int]) -> None:
    """Warn of labels that the network of a denoiser never saw in training, where that is known."""
    unseen: Collection[int] = getattr(denoiser, "unseen", ())
    if not unseen:
        return
    count, names = class_count(denoiser) or 0, getattr(denoiser, "labels", None)
    for index in sorted(set(indices) & set(unseen)):
        if index == count:
            text = "no label was ever hidden from this network in training: it does not know what no class is, and "
            text += "guidance away from it means nothing; give a label and no guidance, or train with --drop 0.1"
        else:
            name = f" ({names[index]!r})" if names else ""
            text = (
                f"label {index}{name}: never came up when this network was trained: what it draws for it means nothing"
            )
        warnings.warn(text, UnseenLabelWarning, stacklevel=3)


def listed(names: Sequence[object]) -> str:
    """The names of the classes in one line, shortened."""
    return ", ".join(map(str, names[:20])) + (", ..." if len(names) > 20 else "")
