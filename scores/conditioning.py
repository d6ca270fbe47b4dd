"""The layers by which a network is told how noisy its input is, and what is added to their outputs in a tuned plan.

They are found by running the network, not by a list of architectures: with the input changed their outputs stay, with
the time changed they move. In a U-Net that is the time embedding and every block's scale and shift, in a transformer
the modulation of every block.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pfode.errors import UsageError

__all__ = ["Offset", "Tunable", "check_offsets", "find_layers", "plain"]


def plain(network: nn.Module) -> nn.Module:
    """The network as it was before `torch.compile`."""
    inner = getattr(network, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else network


def find_layers(network: nn.Module, call: Callable[[Tensor, Tensor], Any], shape: tuple[int, ...]) -> dict[str, int]:
    """The conditioning layers of a network and the width of their outputs, in the order in which they are called.

    They are the modules with weights, and no modules within, whose output is of shape (batch, width), or of twice the
    batch under guidance, does not depend on x and does on the time.

    Args:
        call: runs the network on x of shape (2, *shape) and c_noise of shape (2,), float32.
    """
    seen: dict[str, list[Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.ndim == 2 and len(out) % 2 == 0 and out.is_floating_point():
                seen.setdefault(name, []).append(out.detach().clone())

        return hook

    leaves = [(name, m) for name, m in network.named_modules() if name and not [*m.children()] and [*m.parameters()]]
    handles = [module.register_forward_hook(note(name)) for name, module in leaves]
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    x, other = (torch.randn(2, *shape, generator=draw, device="cpu").to(device) for _ in range(2))
    times = [torch.full((2,), value, device=device) for value in (-0.3, 0.7)]
    try:
        with torch.no_grad():
            for asked in ((x, times[0]), (other, times[0]), (x, times[1])):
                call(*asked)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, outputs in seen.items():
        if len(outputs) % 3:
            continue
        here, moved, later = outputs[0], outputs[len(outputs) // 3], outputs[2 * len(outputs) // 3]
        if torch.equal(here, moved) and not torch.equal(here, later):
            found[name] = here.shape[1]
    return found


class Tunable(nn.Module):
    """A network that adds offsets to the outputs of some of its layers; it shares all weights with the original.

    One object serves one call at a time, as the offsets of a call are the module's while it lasts.

    Args:
        network: that has the layers; it is left as it is.
        layers: their names.
    """

    def __init__(self, network: nn.Module, layers: Mapping[str, int]):
        super().__init__()
        held = [kept for module in network.modules() for kept in (module._parameters, module._buffers)]
        self.network = copy.deepcopy(network, {id(kept): kept for kept in held})  # what is replaced later is seen here
        self.offsets: Mapping[str, Tensor] = {}
        for name in layers:
            layer = self.network.get_submodule(name)
            layer.forward = self._adding(name, layer.forward)  # quicker than a hook

    def _adding(self, name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The forward of a layer, with its offset added to the output."""

        def added(*args: Any, **kwargs: Any) -> Tensor:
            out, offset = forward(*args, **kwargs), self.offsets.get(name)
            return out if offset is None else out + offset.to(out)

        return added

    def forward(self, offsets: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The network's output.

        Args:
            offsets: by the name of a layer, shape (width,) or (batch, width).
            args, kwargs: of the network.
        """
        self.offsets = offsets
        try:
            return self.network(*args, **kwargs)
        finally:
            self.offsets = {}


class Offset:
    """A network asked with offsets; all its other attributes are those of the network it was made of.

    Args:
        tunable: takes the offsets. network: of which it was made. offsets: by the name of a layer.
    """

    def __init__(self, tunable: Callable[..., Any], network: nn.Module, offsets: Mapping[str, Tensor]):
        self.tunable, self.network, self.offsets = tunable, network, offsets

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tunable(self.offsets, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a copy or a pickle asks before there is a network
            raise AttributeError(name)
        return getattr(self.network, name)


def check_offsets(offsets: Mapping[str, Tensor], layers: Mapping[str, int]) -> None:
    """Raise UsageError if offsets do not fit the conditioning layers of a network."""
    for name, value in offsets.items():
        width = layers.get(name)
        if width is None:
            known = ", ".join(list(layers)[:4]) or "none"
            raise UsageError(f"tune: the network has no conditioning layer {name!r:.60}; it has {known} ...")
        if value.shape[-1:] != (width,):
            raise UsageError(f"tune: {name}: need {width} offsets, got shape {tuple(value.shape)}")
