"""Denoisers in the latent space of an autoencoder, whose decoder turns their samples into pictures."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from pfode.errors import UsageError
from pfode.process import Process
from pfode.scores.denoiser import Denoiser

__all__ = ["Autoencoder", "LatentDenoiser"]


class Autoencoder:
    """The decoder of diffusers' autoencoder, with the scale and shift that its latents have in a diffusion model.

    Args:
        vae: an `AutoencoderKL` of diffusers, or one with the same configuration and `decode`.
    """

    def __init__(self, vae: Any):
        config = vae.config
        self.vae = vae
        self.side = 2 ** (len(config.block_out_channels) - 1)  # pixels along one side of a latent pixel
        self.scaling = float(config.scaling_factor)
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)
        self.mean = getattr(config, "latents_mean", None)
        self.std = getattr(config, "latents_std", None)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (batch, channels, height, width) in [-1, 1], from latents (batch, channels, h, w), in their dtype.

        A half-precision autoencoder that asks for it (`force_upcast`) runs in float32.
        """
        vae = self.vae
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            vae = copy.deepcopy(vae).float()
        scaled: Any = latents / self.scaling
        if self.mean is not None and self.std is not None:
            mean, std = (torch.tensor(v, device="cpu").to(latents).reshape(1, -1, 1, 1) for v in (self.mean, self.std))
            scaled = latents * std / self.scaling + mean
        scaled = scaled + self.shift
        with torch.no_grad():
            pictures = vae.decode(scaled.to(vae.device, vae.dtype), return_dict=False)[0]
        return pictures.to(latents).clamp(-1, 1)

    def to(self, device: torch.device | str | None) -> "Autoencoder":
        """A copy on another device; this one stays as it is."""
        if device is None or torch.device(device) == self.vae.device:
            return self
        return Autoencoder(copy.deepcopy(self.vae).to(device))


class LatentDenoiser(Denoiser):
    """A `Denoiser` whose samples are latents; `decode` makes pictures of them.

    Args:
        autoencoder: for `decode`; None where the samples are pictures themselves.
        network, process, prediction, sigma_data, shape, labels, time_scale: see `Denoiser`.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        process: Process,
        prediction: str = "eps",
        *,
        autoencoder: Autoencoder | None = None,
        sigma_data: float = 0.5,
        shape: Sequence[int] | None = None,
        labels: Sequence[str] | None = None,
        time_scale: float = 1.0,
    ):
        super().__init__(
            network, process, prediction, sigma_data=sigma_data, shape=shape, labels=labels, time_scale=time_scale
        )
        self.autoencoder = autoencoder

    @property
    def picture_shape(self) -> tuple[int, ...] | None:
        """The shape of one picture that `decode` makes."""
        if self.shape is None or self.autoencoder is None:
            return self.shape
        side = self.autoencoder.side
        return (self.autoencoder.vae.config.out_channels, *(side * length for length in self.shape[1:]))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """A copy on another device or in another dtype; the autoencoder moves to the device and keeps its dtype."""
        moved = super().to(device, dtype)
        if moved is not self and moved.autoencoder is not None:
            moved.autoencoder = moved.autoencoder.to(device)
        return moved

    def decode(self, x: Tensor) -> Tensor:
        """Pictures (n, channels, height, width) in [-1, 1] of samples (n, *shape).

        Raises:
            UsageError: x has another shape.
        """
        if x.ndim != 4 or (self.shape is not None and tuple(x.shape[1:]) != self.shape):
            raise UsageError(f"decode: need samples of shape (n, {_sides(self.shape)}), got {tuple(x.shape)}")
        return x.clamp(-1, 1) if self.autoencoder is None else self.autoencoder.decode(x)


def _sides(shape: Sequence[int] | None) -> str:
    """The shape of a sample in words."""
    return "channels, height, width" if shape is None else ", ".join(map(str, shape))
