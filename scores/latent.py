"""Denoisers in the latent space of an autoencoder, whose decoder turns their samples into pictures."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from pfode.errors import UsageError
from pfode.process import Process
from pfode.scores.denoiser import Denoiser

__all__ = ["Autoencoder", "LatentDenoiser"]

AT_ONCE = 1 << 20  # pixels that are decoded together, at least one picture


class Autoencoder:
    """An autoencoder of diffusers, with the scale and shift that its latents have in a diffusion model.

    Args:
        vae: an `AutoencoderKL` of diffusers, or one with the same configuration, `encode` and `decode`.
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

        A half-precision autoencoder that asks for it (`force_upcast`) runs in float32. Of large pictures a few at a
        time are made.
        """
        vae, moments = self._sound(), self._moments(latents)
        scaled = latents / self.scaling
        if moments is not None:
            scaled = latents * moments[1] / self.scaling + moments[0]
        scaled = (scaled + self.shift).to(vae.device, vae.dtype)
        few = max(1, AT_ONCE // (self.side**2 * math.prod(latents.shape[2:])))
        with torch.no_grad():
            parts = [vae.decode(part, return_dict=False)[0] for part in scaled.split(few)]
        return torch.cat(parts).to(latents).clamp(-1, 1)

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents (batch, channels, h, w) of pictures (batch, channels, height, width) in [-1, 1], in their dtype.

        They are the means of what the encoder returns, where diffusers draws from it: the same at every call.
        """
        vae = self._sound()
        with torch.no_grad():
            latents = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist.mode().to(pictures)
        moments = self._moments(latents)
        if moments is not None:
            return (latents - self.shift - moments[0]) * self.scaling / moments[1]
        return (latents - self.shift) * self.scaling

    def _sound(self) -> Any:
        """The autoencoder; one of half precision that asks for it (`force_upcast`) in float32."""
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            return copy.deepcopy(self.vae).float()
        return self.vae

    def _moments(self, latents: Tensor) -> list[Tensor] | None:
        """Mean and standard deviation of the latents' channels, where the configuration has them."""
        if self.mean is None or self.std is None:
            return None
        return [torch.tensor(v, device="cpu").to(latents).reshape(1, -1, 1, 1) for v in (self.mean, self.std)]

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

    def encode(self, pictures: Tensor) -> Tensor:
        """Samples (n, *shape) of pictures (n, *picture_shape) in [-1, 1]: data to begin from, see `pfode.sample`.

        Raises:
            UsageError: pictures of another shape.
        """
        shape = self.picture_shape
        if pictures.ndim != 4 or (shape is not None and tuple(pictures.shape[1:]) != shape):
            raise UsageError(f"encode: need pictures of shape (n, {_sides(shape)}), got {tuple(pictures.shape)}")
        return pictures if self.autoencoder is None else self.autoencoder.encode(pictures)

    def cells(self, mask: Tensor) -> Tensor:
        """The mask (..., h, w) of samples that covers a mask (..., height, width) of pictures, each value the largest.

        Raises:
            UsageError: of other sides than the pictures.
        """
        shape = self.picture_shape
        if mask.ndim < 2 or (shape is not None and tuple(mask.shape[-2:]) != shape[-2:]):
            raise UsageError(
                f"cells: need a mask of shape (..., {_sides((shape or ())[-2:])}), got {tuple(mask.shape)}"
            )
        if self.autoencoder is None:
            return mask
        whole = mask.float().reshape(-1, 1, *mask.shape[-2:])
        small = torch.nn.functional.max_pool2d(whole, self.autoencoder.side)
        return small.reshape(*mask.shape[:-2], *small.shape[-2:])


def _sides(shape: Sequence[int] | None) -> str:
    """The shape of a sample in words."""
    return "channels, height, width" if shape is None else ", ".join(map(str, shape))
