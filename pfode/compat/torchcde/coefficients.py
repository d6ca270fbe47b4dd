"""The coefficients of paths as tensors, as torchcde keeps them: of a linear path its values, of a cubic one
[a, b, 2 c, 3 d] along the channels, a + b s + c s^2 + d s^3 on a piece."""

import warnings

import torch
from torch import Tensor

from pfode import cde
from pfode.cde.filling import fill_linear
from pfode.cde.logsig import windows
from pfode.compat.torchcde.misc import forward_fill, need, validate_input_path

__all__ = [
    "hermite_cubic_coefficients_with_backward_differences",
    "linear_interpolation_coeffs",
    "logsig_windows",
    "logsignature_windows",
    "natural_cubic_coeffs",
    "natural_cubic_spline_coeffs",
]


def linear_interpolation_coeffs(x: Tensor, t: Tensor | None = None, rectilinear: int | None = None) -> Tensor:
    """The values of the linear path through x, shape (..., length, channels), NaN filled linearly; with `rectilinear`,
    the channel that is the time, those of the rectilinear path, (..., 2 length - 1, channels)."""
    if rectilinear is not None:
        if bool(torch.isnan(x[..., 0, :]).any()):
            warnings.warn(
                "The data `x` begins with missing values in some channels. The path will be constructed by "
                "backward-filling the first observed value, which is not causal. Raising a warning as the "
                "`rectilinear` argument has also been passed, which is nearly always only used when causality is "
                "desired. If you need causality then fill in the missing value at the start of each channel with "
                "whatever you'd like it to be. (The mean over that channel is a common choice.)",
                stacklevel=2,
            )
        x = _rectilinear(x, rectilinear)
    return fill_linear(x, validate_input_path(x, t))


def _rectilinear(x: Tensor, time: int) -> Tensor:
    channels = x.shape[-1]
    need(isinstance(time, int), f"Index of the time channel must be an integer in [0, {channels - 1}]")
    need(0 <= time < channels, f"Time index must be in [0, {channels - 1}], was given {time}.")
    need(
        not bool(torch.isnan(x[..., time]).any()),
        "There exist nan values in the time column which is not allowed. If the times are padded with nans after final "
        "time, a simple solution is to forward fill the final time.",
    )
    twice = forward_fill(x).repeat_interleave(2, -2)
    moves = torch.arange(channels, device=x.device) == time
    return torch.where(moves, twice[..., 1:, :], twice[..., :-1, :])


def hermite_cubic_coefficients_with_backward_differences(x: Tensor, t: Tensor | None = None) -> Tensor:
    """Of cubic Hermite splines with backward differences for slopes, shape (..., length - 1, 4 channels)."""
    return _packed(cde.hermite(x, validate_input_path(x, t)))


def natural_cubic_coeffs(x: Tensor, t: Tensor | None = None) -> Tensor:
    """Of natural cubic splines, constant before a channel's first observation and after its last."""
    return _packed(cde.natural(x, validate_input_path(x, t)))


def natural_cubic_spline_coeffs(x: Tensor, t: Tensor | None = None) -> Tensor:
    """Of natural cubic splines; only the very ends of a channel are filled (deprecated there)."""
    return _packed(cde.natural(x, validate_input_path(x, t), flat_ends=False))


def _packed(path: cde.Path) -> Tensor:
    return torch.cat([path.start, *path.rate], -1)


def logsig_windows(x: Tensor, depth: int, window_length: float, t: Tensor | None = None) -> Tensor:
    """The path whose increments are the log-signatures of windows: see `pfode.cde.logsig_windows`."""
    return cde.logsig_windows(x, depth, window_length, validate_input_path(x, t))


def logsignature_windows(x: Tensor, depth: int, window_length: float, t: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same with increments times the windows' lengths, and the windows' ends (deprecated there)."""
    t = validate_input_path(x, t)
    ends = windows(t, window_length)
    path = cde.logsig_windows(x, depth, window_length, t)
    scaled = path.diff(dim=-2) * ends.diff()[:, None]
    return torch.cat([path[..., :1, :], scaled], -2).cumsum(-2), ends
