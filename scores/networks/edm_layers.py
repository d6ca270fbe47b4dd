"""Layers of the networks of EDM and EDM2: resampling, residual blocks, attention and embeddings of the noise level.

Written from Karras et al. 2022 (appendix F), Song et al. 2021 (appendix H), Dhariwal & Nichol 2021 and Karras et al.
2024 (appendices B.4 and B.5, eq. 47 to 103). Parameters have the names that published files use.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pfode.errors import UsageError
from pfode.scores.networks.unet import attend

__all__ = [
    "Block", "Conv", "Fourier", "MPBlock", "MPConv", "MPFourier", "Resample", "angles", "exact", "group_norm", "mp_cat",
    "mp_silu", "mp_sum",
]  # fmt: skip


def exact(x: Tensor) -> torch.dtype:
    """The dtype that embeddings are computed in: float32 or better."""
    return torch.promote_types(x.dtype, torch.float32)


# ---- layers of EDM


def filter2d(taps: "list[float] | tuple[float, ...]") -> Tensor:
    """The separable filter of these taps, normalised, shape (1, 1, n, n)."""
    f = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(f, f) / f.sum().square())[None, None]


def halve(x: Tensor, f: Tensor, padding: int) -> Tensor:
    """Filter every channel with f and keep every second pixel."""
    width = x.shape[1]
    return functional.conv2d(x, f.to(x.dtype).expand(width, -1, -1, -1), groups=width, stride=2, padding=padding)


def double(x: Tensor, f: Tensor, padding: int) -> Tensor:
    """Put a zero between pixels and filter every channel with 4 f, which keeps the mean."""
    width = x.shape[1]
    kernel = (4 * f.to(x.dtype)).expand(width, -1, -1, -1)
    return functional.conv_transpose2d(x, kernel, groups=width, stride=2, padding=padding)


class Resample(nn.Module):
    """Halve (resampling "down") or double ("up") the side by a filter alone."""

    resample_filter: Tensor

    def __init__(self, resampling: str, taps: list[float]):
        super().__init__()
        self.resampling = resampling
        self.register_buffer("resample_filter", filter2d(taps))

    def forward(self, x: Tensor) -> Tensor:
        f = self.resample_filter
        return {"down": halve, "up": double}[self.resampling](x, f, (f.shape[-1] - 1) // 2)


class Conv(nn.Conv2d):
    """A convolution that keeps the side (resampling ""), or halves or doubles it first ("down", "up").

    With `fused` the side is halved after the convolution, and both are padded at once.
    """

    resample_filter: Tensor

    def __init__(
        self,
        width_in: int,
        width: int,
        kernel: int,
        resampling: str = "",
        taps: list[float] | None = None,
        fused: bool = False,
    ):
        super().__init__(width_in, width, kernel, padding=kernel // 2)
        self.resampling = "fused" if fused else resampling
        if resampling:
            self.register_buffer("resample_filter", filter2d(taps or [1, 1]))

    def forward(self, input: Tensor) -> Tensor:
        if not self.resampling:
            return super().forward(input)
        f = self.resample_filter
        padding = (f.shape[-1] - 1) // 2
        if self.resampling == "fused":
            wide = functional.conv2d(input, self.weight, self.bias, padding=self.weight.shape[-1] // 2 + padding)
            return halve(wide, f, 0)
        return super().forward({"down": halve, "up": double}[self.resampling](input, f, padding))


def group_norm(width: int, eps: float) -> nn.GroupNorm:
    """Group normalisation in groups of 4 channels or more, at most 32 groups.

    Raises:
        UsageError: the groups do not divide the width.
    """
    groups = max(1, min(32, width // 4))
    if width % groups:
        raise UsageError(f"model_channels: a width of {width} does not divide into {groups} groups")
    return nn.GroupNorm(groups, width, eps=eps)


def heads_of(width: int, channels: int) -> int:
    """How many attention heads of `channels` channels there are; 0 where the width is less than one.

    Raises:
        UsageError: they do not divide the width.
    """
    heads = width // channels
    if heads and width % heads:
        raise UsageError(f"model_channels: a width of {width} does not divide into {heads} attention heads")
    return heads


class Block(nn.Module):
    """A residual block: norm, SiLU, conv, norm, SiLU, conv, plus the input; then attention.

    `song` makes it that of DDPM++, else it is that of ADM. The embedding is added between the convolutions (DDPM++) or
    scales and shifts the second norm (ADM); sums are scaled by 1/sqrt(2) in DDPM++.
    """

    def __init__(
        self, width_in: int, width: int, embedding: int, song: bool, dropout: float, taps: list[float],
        resampling: str = "", attention: bool = False,
    ):  # fmt: skip
        super().__init__()
        eps = 1e-6 if song else 1e-5
        self.width_in, self.width, self.song, self.dropout = width_in, width, song, dropout
        self.heads = (1 if song else heads_of(width, 64)) if attention else 0
        self.scale = math.sqrt(0.5) if song else 1.0
        self.norm0 = group_norm(width_in, eps)
        self.conv0 = Conv(width_in, width, 3, resampling, taps)
        self.affine = nn.Linear(embedding, width if song else 2 * width)
        self.norm1 = group_norm(width, eps)
        self.conv1 = Conv(width, width, 3)
        self.skip: nn.Module | None = None
        if width != width_in or (resampling and song):
            self.skip = Conv(width_in, width, 1, resampling, taps)
        elif resampling:
            self.skip = Resample(resampling, taps)
        if self.heads:
            self.norm2 = group_norm(width, eps)
            self.qkv = Conv(width, 3 * width, 1)
            self.proj = Conv(width, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(functional.silu(self.norm0(x)))
        shift = self.affine(emb)[:, :, None, None]
        if self.song:
            h = functional.silu(self.norm1(h + shift))
        else:
            scale, shift = shift.chunk(2, dim=1)
            h = functional.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        h = self.conv1(functional.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.scale
        if self.heads:
            x = (x + self.proj(attended(self.qkv(self.norm2(x)), self.heads))) * self.scale
        return x


def attended(qkv: Tensor, heads: int, unit: Callable[[Tensor], Tensor] = lambda q: q) -> Tensor:
    """Self-attention over the pixels; qkv: (batch, 3 width, height, wide), its channels (heads, width/heads, 3)."""
    batch, channels, height, wide = qkv.shape
    parts = unit(qkv.reshape(batch, heads, channels // (3 * heads), 3, height * wide))
    q, k, v = (part.transpose(2, 3) for part in parts.unbind(3))
    return attend(q, k, v).transpose(2, 3).reshape(batch, channels // 3, height, wide)


class Fourier(nn.Module):
    """Frequencies of a random Fourier embedding, drawn once and kept with the weights."""

    freqs: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(width // 2))


def angles(c_noise: Tensor, width: int, last: bool, dtype: torch.dtype) -> Tensor:
    """c_noise times width/2 frequencies from 1 down to 1/10000 (`last`: reached): (batch, width/2)."""
    half = width // 2
    exponent = torch.arange(half, device=c_noise.device, dtype=dtype) / (half - last)
    return c_noise.to(dtype)[:, None] * 10_000**-exponent


# ---- EDM2


def unit(x: Tensor, dim: int | tuple[int, ...], eps: float = 1e-4) -> Tensor:
    """x divided by its root mean square over `dim` (pixel norm, eq. 30 of Karras et al. 2024)."""
    size = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=exact(x))
    return x / (eps + size * math.sqrt(size.numel() / x.numel())).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU that keeps magnitudes (eq. 81)."""
    return functional.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The sum (1 - t) a + t b that keeps magnitudes (eq. 88)."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channels of a and b in the proportion 1 - t : t, whatever their number (eq. 103)."""
    m, n = a.shape[1], b.shape[1]
    scale = math.sqrt(m + n) / math.hypot(1 - t, t)
    return torch.cat([a * (scale * (1 - t) / math.sqrt(m)), b * (scale * t / math.sqrt(n))], dim=1)


class MPConv(nn.Module):
    """A convolution, or a matrix where `kernel` is 0, whose output channels have weights of unit length (eq. 47)."""

    def __init__(self, width_in: int, width: int, kernel: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width_in, *(kernel, kernel) if kernel else ()))

    def forward(self, x: Tensor, gain: "float | Tensor" = 1.0) -> Tensor:
        w = self.weight.to(exact(self.weight))
        w = unit(w, tuple(range(1, w.ndim))) * (gain / math.sqrt(w[0].numel()))
        w = w.to(x.dtype)
        return functional.conv2d(x, w, padding=w.shape[-1] // 2) if w.ndim == 4 else functional.linear(x, w)


class MPFourier(nn.Module):
    """sqrt(2) cos(freqs c_noise + phases), frequencies and phases drawn once and kept with the weights (eq. 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, c_noise: Tensor, dtype: torch.dtype) -> Tensor:
        phase = c_noise.to(dtype)[:, None] * self.freqs.to(dtype) + self.phases.to(dtype)
        return phase.cos() * math.sqrt(2)


class MPBlock(nn.Module):
    """A residual block of EDM2 (figure 21): resampling "", "up" or "down"; `encoder` blocks normalise their input."""

    def __init__(
        self, width_in: int, width: int, embedding: int, config: Mapping[str, Any], encoder: bool, resampling: str = "",
        attention: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.config, self.encoder, self.resampling = config, encoder, resampling
        self.heads = heads_of(width, config["channels_per_head"]) if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(width if encoder else width_in, width, 3)
        self.emb_linear = MPConv(embedding, width)
        self.conv_res1 = MPConv(width, width, 3)
        self.conv_skip = MPConv(width_in, width, 1) if width != width_in else None
        if self.heads:
            self.attn_qkv = MPConv(width, 3 * width, 1)
            self.attn_proj = MPConv(width, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        c = self.config
        if self.resampling:
            f = filter2d(c["resample_filter"]).to(x.device)
            x = {"down": halve, "up": double}[self.resampling](x, f, (f.shape[-1] - 1) // 2)
        if self.encoder:
            x = unit(x if self.conv_skip is None else self.conv_skip(x), 1)
        h = self.conv_res0(mp_silu(x))
        h = mp_silu(h * (self.emb_linear(emb, self.emb_gain) + 1)[:, :, None, None].to(h.dtype))
        h = self.conv_res1(functional.dropout(h, c["dropout"], self.training))
        if not self.encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, h, c["res_balance"])
        if self.heads:
            h = self.attn_proj(attended(self.attn_qkv(x), self.heads, lambda qkv: unit(qkv, 2)))
            x = mp_sum(x, h, c["attn_balance"])
        return x if c["clip_act"] is None else x.clamp(-c["clip_act"], c["clip_act"])
