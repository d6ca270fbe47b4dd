"""Every name of torch that is not public and that pfode uses: what it is for, since which torch, what serves instead.

The versions are those in which the names came. `tests/engine/test_torch_names.py` tries each, and its fallback.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "cpp_compiler",
    "dynamo_error",
    "has_tiles",
    "in_place_changes",
    "is_transformed",
    "keeps_graph",
    "lerp_all_",
    "storage_uses",
    "transformed",
    "version",
    "while_loop",
]


_C: Any = torch._C  # whose stubs do not know all of it

version: Callable[[Tensor], int] = operator.attrgetter("_version")
"""How often a tensor was changed in place, not for tensors of inference mode. `Tensor._version`: in every torch."""


def in_place_changes(x: Tensor) -> int | None:
    """How often a tensor was changed in place; None for one of inference mode, where torch does not count."""
    return None if x.is_inference() else version(x)


def storage_uses(x: Tensor) -> Callable[[], float]:
    """What counts the tensors that share the storage of x, for as long as x lives.

    `torch._C._storage_Use_Count`: torch >= 2.1. Without it infinity: the storage counts as shared.
    """
    count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
    return (lambda: math.inf) if count is None else functools.partial(count, x.untyped_storage()._cdata)


def is_transformed(x: Tensor) -> bool:
    """Whether x is a tensor inside `torch.func` (vmap, grad, jvp ...), whose values cannot be read.

    `torch._C._functorch.is_functorch_wrapped_tensor`: torch >= 2.0. Without it: whether any transform is going on.
    """
    ask: Callable[[Tensor], bool] | None = getattr(_C._functorch, "is_functorch_wrapped_tensor", None)
    return transformed() is not None if ask is None else ask(x)


def transformed() -> str | None:
    """Whether differentiation or batching by transforms is going on: "vmap", "other" or None.

    `torch._C._functorch.get_interpreter_stack`: torch >= 2.0. Without it transforms of `torch.func` go unseen, which
    then fail with torch's own errors. `torch.autograd.forward_ad._current_level`: torch >= 1.11.
    """
    ask: Callable[[], Sequence[Any] | None] | None = getattr(_C._functorch, "get_interpreter_stack", None)
    kinds = [str(interpreter.key()) for interpreter in (ask() if ask else None) or ()]
    if kinds:
        return "vmap" if any("Vmap" in kind for kind in kinds) else "other"
    return "other" if getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0 else None


def keeps_graph() -> bool:
    """Inside a backward pass: whether it was asked to keep the graph, for another pass through it.

    `torch._C._autograd._get_current_graph_task_keep_graph`: torch >= 2.5. Without it True: memory is freed later.
    """
    ask: Callable[[], bool] | None = getattr(_C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()


def has_tiles() -> bool:
    """Whether the CPU has tile instructions (AMX), with which bfloat16 is several times faster than float32.

    `torch.cpu._is_amx_tile_supported`: torch >= 2.6. Without it the answer is no.
    """
    found: Callable[[], bool] | None = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return found is not None and found()


def lerp_all_(targets: list[Tensor], values: list[Tensor], weight: float) -> None:
    """target += weight (value - target) for every pair, in few kernels.

    `torch._foreach_lerp_`: torch >= 2.0. Without it one kernel a pair.
    """
    foreach: Callable[..., None] | None = getattr(torch, "_foreach_lerp_", None)
    if foreach is not None:
        foreach(targets, values, weight)
        return
    for target, value in zip(targets, values, strict=True):
        target.lerp_(value, weight)


def dynamo_error() -> type[Exception]:
    """What `torch.compile` raises where it cannot take a function.

    `torch._dynamo.exc.TorchDynamoException`: torch >= 2.1. Without it RuntimeError, from which it is derived.
    """
    from torch._dynamo import exc

    return getattr(exc, "TorchDynamoException", RuntimeError)


def cpp_compiler() -> str | None:
    """The C++ compiler that `torch.compile` would use on a CPU; None where there is none.

    `torch._inductor.cpp_builder.get_cpp_compiler` and `torch._inductor.exc.InvalidCxxCompiler`: torch >= 2.4. Without
    them the name "c++": that a compiler is missing is then torch's to say.
    """
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
    except ImportError:
        return "c++"
    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def while_loop() -> Callable[..., Any]:
    """A loop inside a compiled function whose number of turns depends on its tensors.

    `torch._higher_order_ops.while_loop`: torch >= 2.2.

    Raises:
        ImportError: an older torch; there is no fallback.
    """
    from torch._higher_order_ops import while_loop

    return while_loop
