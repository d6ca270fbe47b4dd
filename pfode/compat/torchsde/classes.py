"""SDE classes with torchsde's names, and what `sdeint` makes of a user's object: a `pfode.sde.SDE`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pfode.compat.torchsde.settings import NOISE_TYPES, SDE_TYPES
from pfode.sde import SDE

__all__ = ["BaseSDE", "SDEIto", "SDEStratonovich", "equation", "logqp", "renamed"]

_NAMES = {
    "drift": "f",
    "diffusion": "g",
    "prior_drift": "h",
    "drift_and_diffusion": "f_and_g",
    "drift_and_diffusion_prod": "f_and_g_prod",
}
_METHODS = ("f", "g", "h", "g_prod", "f_and_g", "f_and_g_prod")


class BaseSDE(nn.Module):
    """A module with a valid `noise_type` and `sde_type`.

    Raises:
        ValueError: other words than those of the settings.
    """

    def __init__(self, noise_type: str, sde_type: str):
        super().__init__()
        if noise_type not in NOISE_TYPES:
            raise ValueError(f"Expected noise type in {NOISE_TYPES}, but found {noise_type}")
        if sde_type not in SDE_TYPES:
            raise ValueError(f"Expected sde type in {SDE_TYPES}, but found {sde_type}")
        self.noise_type, self.sde_type = noise_type, sde_type


class SDEIto(BaseSDE):
    """An Ito equation."""

    def __init__(self, noise_type: str):
        super().__init__(noise_type, SDE_TYPES.ito)


class SDEStratonovich(BaseSDE):
    """A Stratonovich equation."""

    def __init__(self, noise_type: str):
        super().__init__(noise_type, SDE_TYPES.stratonovich)


class _Methods:
    """The functions of a user's object, under torchsde's own names, and its two words."""

    def __init__(self, noise_type: str, sde_type: str, functions: dict[str, Callable[..., Any]]):
        self.noise_type, self.sde_type = noise_type, sde_type
        for name, function in functions.items():
            setattr(self, name, function)


def renamed(sde: Any, names: dict[str, str] | None) -> Any:
    """The object with the functions that `names` says."""
    own = {key: value for key, value in (names or {}).items() if key in _NAMES}
    if not own:
        return sde
    wanted = {**{name: name for name in _METHODS}, **{_NAMES[key]: value for key, value in own.items()}}
    functions = {name: getattr(sde, found) for name, found in wanted.items() if hasattr(sde, found)}
    return _Methods(sde.noise_type, sde.sde_type, functions)


def logqp(sde: Any) -> Any:
    """The equation with one more component, the integral of |u|^2 / 2, u = (f - h) / g.

    Raises:
        AttributeError: f, g or h is missing.
    """
    missing = [name for name in "fgh" if not hasattr(sde, name)]
    if missing:
        raise AttributeError("If using logqp then drift, diffusion and prior drift must all be specified.")
    diagonal = sde.noise_type == NOISE_TYPES.diagonal

    def f(t: Tensor, y: Tensor) -> Tensor:
        y = y[:, :-1]
        drift, diffusion = sde.f(t, y), sde.g(t, y)
        gap = drift - sde.h(t, y)
        if diagonal:
            u = gap / torch.where(
                diffusion.abs() > 1e-7, diffusion, torch.full_like(diffusion, 1e-7) * diffusion.sign()
            )
        else:
            u = torch.linalg.pinv(diffusion).matmul(gap[..., None])[..., 0]
        return torch.cat([drift, 0.5 * u.square().sum(1, keepdim=True)], 1)

    def g(t: Tensor, y: Tensor) -> Tensor:
        diffusion = sde.g(t, y[:, :-1])
        return torch.cat([diffusion, torch.zeros_like(diffusion[:, :1])], 1)

    return _Methods(sde.noise_type, sde.sde_type, {"f": f, "g": g})


def equation(sde: Any, channels: int) -> SDE:
    """The same equation as pfode takes it; a "diagonal" g is not tested, as torchsde does not."""

    def no_noise(y: Tensor) -> Tensor:
        return torch.zeros(len(y), channels, dtype=y.dtype, device=y.device)

    if hasattr(sde, "f"):
        f = sde.f
    elif hasattr(sde, "f_and_g"):
        f = lambda t, y: sde.f_and_g(t, y)[0]  # noqa: E731
    else:
        f = lambda t, y: sde.f_and_g_prod(t, y, no_noise(y))[0]  # noqa: E731
    noise, calculus = sde.noise_type, sde.sde_type
    if hasattr(sde, "g"):
        return SDE(f, sde.g, noise, calculus, check=False)
    if hasattr(sde, "f_and_g"):
        return SDE(f, lambda t, y: sde.f_and_g(t, y)[1], noise, calculus, check=False)
    product = sde.g_prod if hasattr(sde, "g_prod") else lambda t, y, v: sde.f_and_g_prod(t, y, v)[1]
    return SDE(f, _no_diffusion, noise, calculus, product, channels, check=False)


def _no_diffusion(t: Tensor, y: Tensor) -> Tensor:
    raise RuntimeError("Method `g` has not been provided, but is required for this method.")
