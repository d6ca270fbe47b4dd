"""The peak of tensor memory of a run, from the storages that its operations make."""

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Meter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.held = self.most = 0  # held: also by those that died since the last look

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in before:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.held += storage.nbytes()
        if self.held > self.most:
            self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
            self.held = sum(size for _, size in self.alive.values())
            self.most = max(self.most, self.held)
        return made


def peak(run: Callable[[], object]) -> int:
    """Bytes that tensors made in a run held at most, together."""
    with _Meter() as meter:
        run()
    return meter.most
