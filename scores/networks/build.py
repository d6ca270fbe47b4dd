"""A network from the JSON object that describes it."""

from typing import Any

import torch
from torch import nn

from pfode.errors import UsageError
from pfode.scores.networks import diffusers, edm
from pfode.scores.networks.mlp import MLPConfig
from pfode.scores.networks.unet import UNet, UNetConfig

__all__ = ["build"]


def build(architecture: dict[str, Any]) -> nn.Module:
    """A network from the JSON object that its `architecture` gave, its parameters on the meta device.

    Raises:
        UsageError: an unknown network, or a broken configuration, named by its field.
    """
    name = architecture["name"]
    fields = {key: value for key, value in architecture.items() if key != "name"}
    with torch.device("meta"):
        if name == "UNet":
            return UNet(UNetConfig.from_json(fields))
        if name == "MLP":
            return MLPConfig.from_json(fields).make()
        if name in edm.NETWORKS:
            return edm.NETWORKS[name](**fields)
    if name in diffusers.NETWORKS:
        return diffusers.build(name, fields)
    known = ", ".join(("UNet", "MLP", *edm.NETWORKS, *diffusers.NETWORKS))
    raise UsageError(f"architecture: unknown network {name!r:.60}", f"known: {known}")
