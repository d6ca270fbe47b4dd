"""A U-Net for pictures of 8x8 to 64x64: residual blocks, attention at chosen resolutions, noise and class embedding.

    x --first--> [block, block, down] ... [block, block] -> middle -> [block, block, block, up] ... --last--> out
                     |______________ every feature map on the way down is joined on the way up ________^

Everything keeps the channels-last layout: bfloat16 convolutions on a CPU are then several times faster than float32.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pfode.errors import UsageError, unknown
from pfode.labels import label_tensor
from pfode.tensors import transformed

__all__ = ["MAX_STYLES", "UNet", "UNetConfig", "attend"]

MAX_PARAMETERS = 200_000_000
MAX_STYLES = 1024


@dataclass(frozen=True)
class UNetConfig:
    """The numbers that define a `UNet`; a JSON object by `to_json`, checked by `from_json`.

    Args:
        size: side of the square pictures; a multiple of 2 ** (levels - 1).
        channels: 1 for grey, 3 for colour.
        classes: number of labels, 0 for an unconditional network; label `classes` means "none" (guidance).
        widths: channels of each level; the side halves from one to the next.
        blocks: residual blocks of each level on the way down (one more on the way up).
        attention: sides at which every block is followed by self-attention.
        head: channels per attention head; divides the widths that have attention.
        dropout: inside the residual blocks, while training.
        styles: numbers of the style vector that a picture may come with besides its class; 0 for none.
        bank: how many styles the network keeps, of which new ones are mixed; see `pfode.scores.styles`.

    Raises:
        UsageError: a value out of range, named by its field.
    """

    size: int = 32
    channels: int = 3
    classes: int = 0
    widths: tuple[int, ...] = (64, 128, 192)
    blocks: tuple[int, ...] = (1, 2, 2)
    attention: tuple[int, ...] = (8,)
    head: int = 32
    dropout: float = 0.0
    styles: int = 0
    bank: int = 0

    def __post_init__(self) -> None:
        _integer("size", self.size, 4, 256)
        _integer("channels", self.channels, 1, 64)
        _integer("classes", self.classes, 0, 100_000)
        _integers("widths", self.widths, 1, 6, 8, 1024)
        _integers("blocks", self.blocks, 1, 6, 1, 8)
        _integers("attention", self.attention, 0, 6, 1, 64)
        _integer("head", self.head, 4, 1024)
        _integer("styles", self.styles, 0, MAX_STYLES)
        _integer("bank", self.bank, 0, MAX_STYLES if self.styles else 0)
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise UsageError(f"network: dropout: expected a number in [0, 1), got {self.dropout!r}")
        if len(self.blocks) != len(self.widths):
            raise UsageError(f"network: blocks: one number per width, got {list(self.blocks)} for {list(self.widths)}")
        if any(width % 8 for width in self.widths):
            raise UsageError(f"network: widths: need multiples of 8, got {list(self.widths)}")
        unit = 2 ** (len(self.widths) - 1)
        if self.size % unit:
            near = [n for n in (self.size // unit * unit, -(-self.size // unit) * unit) if 4 <= n <= 256]
            problem = f"{self.size} cannot be halved {len(self.widths) - 1} times (widths {list(self.widths)})"
            raise UsageError(f"network: size: {problem}", f"a size of {' or '.join(map(str, near))}, or fewer widths")
        for level, width in enumerate(self.widths):
            if self.size >> level in self.attention and width % self.head:
                raise UsageError(
                    f"network: head: {self.head} does not divide the width {width} of the side {self.size >> level}"
                )
        if self.parameters() > MAX_PARAMETERS:
            raise UsageError(f"network: widths: about {self.parameters():,} parameters; at most {MAX_PARAMETERS:,}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one picture: (channels, size, size)."""
        return self.channels, self.size, self.size

    def parameters(self) -> int:
        """An upper estimate of the number of parameters, without building the network."""
        widest = max(self.widths)
        convolutions = sum(
            width * (width + widest) * (6 * n + 10) for width, n in zip(self.widths, self.blocks, strict=True)
        )
        return 9 * convolutions + 4 * self.widths[0] * (self.classes + self.styles)

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` rebuilds the configuration."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "UNetConfig":
        """Check an untrusted JSON object.

        Raises:
            UsageError: an unknown key, a wrong type or a value out of range, named by its field.
        """
        known = {field.name: field.default for field in fields(cls)}
        for key in value:
            if key not in known:
                raise unknown("network field", key, known)
        given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
        return cls(**given)


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise UsageError(f"network: {name}: expected an integer from {low} to {high}, got {value!r:.40}")


def _integers(name: str, value: Any, least: int, most: int, low: int, high: int) -> None:
    if not isinstance(value, tuple) or not least <= len(value) <= most:
        raise UsageError(f"network: {name}: expected {least} to {most} integers, got {value!r:.40}")
    for item in value:
        _integer(name, item, low, high)


class UNet(nn.Module):
    """The network of `UNetConfig`: (x, c_noise, label, style) -> out of the shape of x."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.shape = (config.channels, config.size, config.size)
        self.classes, self.styles = config.classes, config.styles
        widths = config.widths
        embedding = 4 * widths[0]
        self.noise = nn.Sequential(Linear(2 * WAVES, embedding), nn.SiLU(), Linear(embedding, embedding))
        self.label = nn.Embedding(config.classes + 1, embedding) if config.classes else None
        self.style = Style(config.styles, config.bank, embedding) if config.styles else None
        self.first = nn.Conv2d(config.channels, widths[0], 3, padding=1)

        def block(side: int, width_in: int, width: int) -> Block:
            return Block(width_in, width, embedding, config.head if side in config.attention else 0, config.dropout)

        self.down = nn.ModuleList()
        skips = [widths[0]]
        width, side = widths[0], config.size
        for level, target in enumerate(widths):
            if level:
                self.down.append(Down(width))
                skips.append(width)
                side //= 2
            for _ in range(config.blocks[level]):
                self.down.append(block(side, width, target))
                width = target
                skips.append(width)
        self.middle = nn.ModuleList([block(side, width, width), block(0, width, width)])
        self.up = nn.ModuleList()
        for level, target in reversed(list(enumerate(widths))):
            for _ in range(config.blocks[level] + 1):
                self.up.append(block(side, width + skips.pop(), target))
                width = target
            if level:
                width = widths[level - 1]
                self.up.append(Up(target, width))
                side *= 2
        self.last_norm = Norm(width)
        self.last = _zero(nn.Conv2d(width, config.channels, 3, padding=1))
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.5)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def style_bank(self) -> Tensor | None:
        """The styles that the network keeps, (bank, styles); None for a network without."""
        return None if self.style is None else self.style.bank

    def architecture(self) -> dict[str, Any]:
        """A JSON object of which `pfode.scores.networks.build.build` makes the same network."""
        return {"name": "UNet", **self.config.to_json()}

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, style: Tensor | None = None) -> Tensor:
        """x (batch, channels, size, size), c_noise (batch,), label (batch,) of integers; None: the null class.

        style (batch, styles), or (styles,) for all; None, or a row that is not finite: no style is given.

        Raises:
            UsageError: labels or styles for a network without them, out of range, or of another shape.
        """
        if style is not None:
            style = style_tensor(style, self.styles, x)
        if label is not None and self.label is not None:
            label = label_tensor(label, range(self.config.classes), x)
        if len(x) == 1 and x.device.type == "cpu" and not self.training:  # one picture alone would round differently
            pair = (x.expand(2, -1, -1, -1), c_noise.expand(2), None if label is None else label.expand(2))
            pair = (*pair, None if style is None else style.expand(2, -1))
            return self(*pair)[:1]
        emb = self.noise(waves(c_noise).to(x.dtype))
        if self.label is not None:
            null = torch.full_like(c_noise, self.config.classes, dtype=torch.long)
            emb = emb + self.label(null if label is None else label).to(emb.dtype)
        elif label is not None:
            raise UsageError(
                "this network is unconditional: it takes no label", "leave label= (or --label, --guidance) out"
            )
        if self.style is not None:
            emb = emb + self.style(style, emb)
        emb = functional.silu(emb)
        h = self.first(x if transformed(x) else x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for layer in self.down:
            h = layer(h, emb)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1) if isinstance(layer, Block) else h, emb)
        return self.last(functional.silu(self.last_norm(h)))


WAVES = 32


def waves(c_noise: Tensor) -> Tensor:
    """Sines and cosines of c_noise at 32 angular frequencies from 1 to 100, in float32: shape (batch, 64)."""
    frequencies = torch.exp(torch.linspace(0, math.log(100.0), WAVES, device=c_noise.device, dtype=torch.float32))
    angles = c_noise.to(torch.float32)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Linear(nn.Linear):
    """A linear layer whose rows do not depend on how many there are: matrix products of few rows round differently."""

    def forward(self, input: Tensor) -> Tensor:
        rows = len(input)
        if rows >= 8 or input.device.type != "cpu":
            return super().forward(input)
        return super().forward(functional.pad(input, (0, 0, 0, 8 - rows)))[:rows]


class Norm(nn.GroupNorm):
    """Group normalisation over 16 channels, or 8 where 16 do not divide the width.

    In bfloat16 on a CPU, groups of a multiple of 16 channels are 3 to 7 times faster than others.
    """

    def __init__(self, width: int):
        super().__init__(width // math.gcd(16, width), width)

    def forward(self, input: Tensor) -> Tensor:
        # the forward-mode derivative of torch's group norm needs a contiguous input
        return super().forward(input.contiguous() if transformed(input) else input)


class Block(nn.Module):
    """norm, SiLU, conv, norm scaled and shifted by the embedding, SiLU, conv, plus the input; then attention."""

    def __init__(self, width_in: int, width: int, embedding: int, head: int, dropout: float):
        super().__init__()
        self.norm1 = Norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.embed = Linear(embedding, 2 * width)
        self.norm2 = Norm(width)
        self.dropout = dropout
        self.conv2 = _zero(nn.Conv2d(width, width, 3, padding=1))
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()
        self.attention = Attention(width, head) if head else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        scale, shift = self.embed(emb)[:, :, None, None].chunk(2, dim=1)
        h = functional.silu(torch.addcmul(shift, self.norm2(h), scale + 1))
        if self.training and self.dropout:
            h = functional.dropout(h, self.dropout)
        return self.attention(self.skip(x) + self.conv2(h))


class Attention(nn.Module):
    """Self-attention over the pixels, `head` channels per head, plus the input."""

    def __init__(self, width: int, head: int):
        super().__init__()
        self.head = head
        self.norm = Norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = _zero(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, wide = x.shape
        # (batch, pixels, 3, heads, head) -> 3 x (batch, heads, pixels, head)
        rows = self.qkv(self.norm(x)).permute(0, 2, 3, 1)
        q, k, v = rows.reshape(batch, height * wide, 3, -1, self.head).permute(2, 0, 3, 1, 4).unbind(0)
        y = attend(q, k, v).transpose(1, 2).reshape(batch, height, wide, width).permute(0, 3, 1, 2)
        return x + self.out(y)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention, softmax(q k^T / sqrt(head)) v; all of shape (batch, heads, pixels, head)."""
    slow = q.device.type == "cpu" and q.requires_grad  # the fused kernel's backward pass is 2 to 7 times slower there
    if slow or transformed(q):  # and none has a forward-mode derivative
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1).to(v.dtype) @ v
    return functional.scaled_dot_product_attention(q, k, v)


class Style(nn.Module):
    """A two-layer perceptron of a style vector, added to the embedding; a last input says whether there is one."""

    def __init__(self, styles: int, bank: int, embedding: int):
        super().__init__()
        self.bank: Tensor
        self.register_buffer("bank", torch.zeros(bank, styles) if bank else None)
        self.layers = nn.Sequential(Linear(styles + 1, embedding), nn.SiLU(), Linear(embedding, embedding))
        self.styles = styles

    def forward(self, style: Tensor | None, emb: Tensor) -> Tensor:
        if style is None:
            return self.layers(emb.new_zeros(len(emb), self.styles + 1))
        known = style.isfinite().all(dim=1, keepdim=True)
        return self.layers(torch.cat([torch.where(known, style, 0), known], dim=1).to(emb.dtype))


def style_tensor(style: Tensor, styles: int, x: Tensor) -> Tensor:
    """A style as (batch, styles) on the device of x.

    Raises:
        UsageError: a network without styles, or a style of another shape.
    """
    if not styles:
        raise UsageError("this network takes no style", "leave style= out")
    if not isinstance(style, Tensor) or style.shape not in ((styles,), (1, styles), (len(x), styles)):
        got = tuple(style.shape) if isinstance(style, Tensor) else type(style).__name__
        raise UsageError(f"style: expected a tensor of shape ({styles},) or ({len(x)}, {styles}), got {got}")
    return style.to(x.device).expand(len(x), -1)


class Down(nn.Module):
    """Halve the side: the mean of 2x2 pixels, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(functional.avg_pool2d(x, 2))


class Up(nn.Module):
    """Double the side: every pixel four times, then a convolution."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        batch, width, height, wide = x.shape
        rows = x.permute(0, 2, 3, 1)[:, :, None, :, None, :].expand(batch, height, 2, wide, 2, width)
        return self.conv(rows.reshape(batch, 2 * height, 2 * wide, width).permute(0, 3, 1, 2))


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Start a residual branch at zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
