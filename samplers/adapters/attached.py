"""A tuned plan in a pipeline: its offsets added inside the network, which the pipeline calls itself."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from pfode.denoiser import network_digest
from pfode.errors import UsageError
from pfode.plans.table import Plan

__all__ = ["Attachment"]

ADAPTER = "model."  # before the names of layers, where pfode wraps a network of diffusers


class Attachment:
    """Hooks in a network that add a tuned plan's offsets, until `detach` or the end of a `with`.

    Args:
        plan: a tuned one.
        network: the pipeline's own, the one the plan was tuned to.
        row: says which row the pipeline is at.

    Raises:
        UsageError: a plan without offsets, or another network than the plan's.
    """

    def __init__(self, plan: Plan, network: nn.Module, row: Callable[[], int]):
        if not isinstance(network, nn.Module):
            problem = f"attach: need the pipeline's network, got {type(network).__name__}"
            raise UsageError(problem, "scheduler.attach(pipe.unet), or pipe.transformer")
        layers = {name.removeprefix(ADAPTER): value for name, value in plan.tune.items()}
        modules = dict(network.named_modules())
        absent = [name for name in layers if name not in modules]
        fitted = plan.meta.get("fitted", {})
        if absent or fitted.get("network") != network_digest(network):
            why = f"it has no layer {absent[0]!r:.60}" if absent else "its weights are others"
            problem = (
                f"attach: plan {plan.name!r} was tuned to another network than this {type(network).__name__}: {why}"
            )
            raise UsageError(problem, "fit_plan(pfode.from_pipeline(pipe, ...), nfe, tune=True)")
        self.row, self.asked = row, None
        self.handles = [modules[name].register_forward_hook(self._adds(value)) for name, value in layers.items()]

    def _adds(self, rows: Tensor) -> Callable[..., Tensor]:
        """The hook of a layer."""
        moved: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}

        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            self.asked = self.row()
            kind = out.device, out.dtype
            if kind not in moved:
                moved[kind] = list(rows.to(*kind).unbind())
            return out + moved[kind][self.asked]

        return hook

    def detach(self) -> None:
        """Take the hooks out: the network is as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()
