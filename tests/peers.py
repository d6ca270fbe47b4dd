"""Peers to compare with, loaded without what they drag in."""

import functools
import importlib.util
import sys
from types import ModuleType
from unittest import mock


@functools.cache
def k_diffusion_sampling() -> ModuleType:
    """k_diffusion/sampling.py alone: the package itself imports torchvision, clip and more, none of which it needs.

    `odeint` (log_likelihood) and torchsde (the samplers named sde) are stand-ins and fail when used.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("k-diffusion: pip install --no-deps k-diffusion==0.1.1")
    utils = ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]  # type: ignore[attr-defined]
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    package.utils = utils  # type: ignore[attr-defined]
    odeint = ModuleType("torchdiffeq")
    odeint.odeint = None  # type: ignore[attr-defined]
    stand_ins = {
        "k_diffusion": package,
        "k_diffusion.utils": utils,
        "torchdiffeq": odeint,
        "torchsde": ModuleType("torchsde"),
    }
    with mock.patch.dict(sys.modules, stand_ins):
        return importlib.import_module("k_diffusion.sampling")
