"""The networks of EDM and EDM2: SongUNet (DDPM++, NCSN++), DhariwalUNet (ADM) and the EDM2 U-Net.

Written from Karras et al. 2022 (appendix F, tables 7 and 8), Song et al. 2021 (appendix H), Dhariwal & Nichol 2021 and
Karras et al. 2024 (appendices B.4 and B.5). Parameters have the names that published files use.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pfode.errors import UsageError
from pfode.fields import Field, checked, real, several, whole, word
from pfode.labels import label_tensor
from pfode.scores.networks.edm_layers import (
    Block,
    Conv,
    Fourier,
    MPBlock,
    MPConv,
    MPFourier,
    Resample,
    angles,
    exact,
    group_norm,
    mp_cat,
    mp_silu,
    mp_sum,
)

__all__ = ["NETWORKS", "DhariwalUNet", "EDM2UNet", "Network", "SongUNet"]

MAX_PARAMETERS = 4_000_000_000
COMMON: dict[str, Field] = {
    "img_resolution": whole(4, 1024),
    "in_channels": whole(1, 64),
    "out_channels": whole(1, 128),
    "label_dim": whole(0, 100_000).otherwise(0),
    "augment_dim": whole(0, 1000).otherwise(0),
    "channel_mult": several(whole(1, 64), 1, 8),
    "channel_mult_emb": whole(1, 64).otherwise(4),
    "num_blocks": whole(1, 32),
    "attn_resolutions": several(whole(1, 1024), 0, 16),
    "dropout": real(0, 0.999).otherwise(0.1),
    "label_dropout": real(0, 1).otherwise(0),
}
SONG: dict[str, Field] = COMMON | {
    "model_channels": whole(4, 4096).otherwise(128),
    "channel_mult": COMMON["channel_mult"].otherwise([1, 2, 2, 2]),
    "num_blocks": COMMON["num_blocks"].otherwise(4),
    "attn_resolutions": COMMON["attn_resolutions"].otherwise([16]),
    "embedding_type": word("positional", "fourier").otherwise("positional"),
    "channel_mult_noise": whole(1, 64).otherwise(1),
    "encoder_type": word("standard", "skip", "residual").otherwise("standard"),
    "decoder_type": word("standard", "skip").otherwise("standard"),
    "resample_filter": several(real(-100, 100), 2, 16).otherwise([1, 1]),
}
DHARIWAL: dict[str, Field] = COMMON | {
    "model_channels": whole(4, 4096).otherwise(192),
    "channel_mult": COMMON["channel_mult"].otherwise([1, 2, 3, 4]),
    "num_blocks": COMMON["num_blocks"].otherwise(3),
    "attn_resolutions": COMMON["attn_resolutions"].otherwise([32, 16, 8]),
}
EDM2: dict[str, Field] = {
    "img_resolution": COMMON["img_resolution"],
    "img_channels": whole(1, 64),
    "label_dim": COMMON["label_dim"],
    "model_channels": whole(1, 4096).otherwise(192),
    "channel_mult": COMMON["channel_mult"].otherwise([1, 2, 3, 4]),
    "channel_mult_noise": whole(1, 64).or_none,
    "channel_mult_emb": whole(1, 64).or_none,
    "num_blocks": COMMON["num_blocks"].otherwise(3),
    "attn_resolutions": COMMON["attn_resolutions"].otherwise([16, 8]),
    "label_balance": real(0, 1).otherwise(0.5),
    "concat_balance": real(0, 1).otherwise(0.5),
    "resample_filter": several(real(-100, 100), 2, 16).otherwise([1, 1]),
    "channels_per_head": whole(1, 1024).otherwise(64),
    "dropout": real(0, 0.999).otherwise(0),
    "res_balance": real(0, 1).otherwise(0.3),
    "attn_balance": real(0, 1).otherwise(0.3),
    "clip_act": real(1e-3, 1e6).otherwise(256),
}
EDM2["clip_act"] = EDM2["clip_act"].or_none.otherwise(256)


class Network(nn.Module):
    """What the three have in common: (x, c_noise, label, augment) -> out, and a configuration in JSON.

    Output channels beyond those of the input (a learned variance) are dropped.

    Raises:
        UsageError: a configuration that defines no network, named by its field.
    """

    fields: Mapping[str, Field]

    def __init__(self, **config: Any):
        super().__init__()
        name = type(self).__name__
        self.config = config = checked(name, config, self.fields)
        channels: int = config["img_channels" if "img_channels" in config else "in_channels"]
        side: int = config["img_resolution"]
        self.shape = (channels, side, side)
        self.classes: int = config["label_dim"]
        mult = config["channel_mult"]
        if side % 2 ** (len(mult) - 1):
            raise UsageError(f"{name}: img_resolution: {side} cannot be halved {len(mult) - 1} times")
        if len(config.get("resample_filter", (1, 1))) % 2 or sum(config.get("resample_filter", (1, 1))) == 0:
            raise UsageError(f"{name}: resample_filter: need an even number of values whose sum is not 0")
        widths = [config["model_channels"] * m for m in mult]
        most = 9 * sum(width * (width + max(widths)) * (3 * config["num_blocks"] + 6) for width in widths)
        if most > MAX_PARAMETERS:
            raise UsageError(f"{name}: model_channels: up to {most:,} parameters; at most {MAX_PARAMETERS:,}")

    def architecture(self) -> dict[str, Any]:
        """A JSON object of which `pfode.scores.networks.build.build` makes the same network."""
        return {"name": type(self).__name__, **self.config}

    def one_hot(self, label: Tensor | None, x: Tensor) -> Tensor | None:
        """(batch, classes), zeros for no class, which is the label `classes`; None for an unconditional network.

        Raises:
            UsageError: labels for an unconditional network, out of range, or of another length.
        """
        if not self.classes:
            if label is None:
                return None
            raise UsageError(
                "this network is unconditional: it takes no label", "leave label= (or --label, --guidance) out"
            )
        hot = torch.zeros(len(x), self.classes + 1, device=x.device, dtype=x.dtype)
        if label is not None:
            hot = hot.scatter(1, label_tensor(label, range(self.classes), x)[:, None], 1.0)
        return hot[:, : self.classes]


# ---- networks of EDM


class SongUNet(Network):
    """DDPM++ and NCSN++ of Song et al. 2021, as Karras et al. 2022 (table 7) run them."""

    fields = SONG

    def __init__(self, **config: Any):
        super().__init__(**config)
        c = self.config
        base, side, levels, taps = (
            c["model_channels"],
            c["img_resolution"],
            len(c["channel_mult"]),
            c["resample_filter"],
        )
        embedding, noise = base * c["channel_mult_emb"], base * c["channel_mult_noise"]
        self.noise_width = noise
        self.map_noise = Fourier(noise) if c["embedding_type"] == "fourier" else None
        self.map_label = nn.Linear(self.classes, noise) if self.classes else None
        self.map_augment = nn.Linear(c["augment_dim"], noise, bias=False) if c["augment_dim"] else None
        self.map_layer0 = nn.Linear(noise, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)

        def block(width_in: int, width: int, resampling: str = "", attention: bool = False) -> Block:
            return Block(width_in, width, embedding, True, c["dropout"], taps, resampling, attention)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips, width, beside = [base], base, c["in_channels"]
        for level, mult in enumerate(c["channel_mult"]):
            name = f"{side >> level}x{side >> level}"
            if level == 0:
                self.enc[f"{name}_conv"] = Conv(c["in_channels"], base, 3)
            else:
                self.enc[f"{name}_down"] = block(width, width, "down")
                skips.append(width)
                if c["encoder_type"] == "skip":
                    self.enc[f"{name}_aux_down"] = Resample("down", taps)
                    self.enc[f"{name}_aux_skip"] = Conv(beside, width, 1)
                elif c["encoder_type"] == "residual":
                    self.enc[f"{name}_aux_residual"] = Conv(beside, width, 3, "down", taps, fused=True)
                    beside = width
            for index in range(c["num_blocks"]):
                self.enc[f"{name}_block{index}"] = block(
                    width, base * mult, attention=side >> level in c["attn_resolutions"]
                )
                width = base * mult
                skips.append(width)
        for level, mult in reversed(list(enumerate(c["channel_mult"]))):
            name = f"{side >> level}x{side >> level}"
            if level == levels - 1:
                self.dec[f"{name}_in0"] = block(width, width, attention=True)
                self.dec[f"{name}_in1"] = block(width, width)
            else:
                self.dec[f"{name}_up"] = block(width, width, "up")
            for index in range(c["num_blocks"] + 1):
                attention = index == c["num_blocks"] and side >> level in c["attn_resolutions"]
                self.dec[f"{name}_block{index}"] = block(width + skips.pop(), base * mult, attention=attention)
                width = base * mult
            if c["decoder_type"] == "skip" or level == 0:
                if c["decoder_type"] == "skip" and level < levels - 1:
                    self.dec[f"{name}_aux_up"] = Resample("up", taps)
                self.dec[f"{name}_aux_norm"] = group_norm(width, 1e-6)
                self.dec[f"{name}_aux_conv"] = Conv(width, c["out_channels"], 3)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """x (batch, channels, side, side), c_noise (batch,), label (batch,) of integers or None: no class; augment:
        (batch, augment_dim), what was done to the training pictures, zero when left out.
        """
        if self.map_noise is not None:
            phase = c_noise.to(exact(x))[:, None] * (2 * math.pi * self.map_noise.freqs.to(exact(x)))
        else:
            phase = angles(c_noise, self.noise_width, True, exact(x))
        emb = torch.cat([phase.sin(), phase.cos()], dim=1).to(x.dtype)
        hot = self.one_hot(label, x)
        if hot is not None:
            hot = dropped(hot, self.config["label_dropout"], self.training)
            emb = emb + self.map_label(hot * math.sqrt(self.classes))  # type: ignore[misc]
        emb = augmented(emb, self.map_augment, augment)
        emb = functional.silu(self.map_layer1(functional.silu(self.map_layer0(emb))))

        skips: list[Tensor] = []
        beside = x
        for name, layer in self.enc.items():
            if "aux_down" in name:
                beside = layer(beside)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(beside)
            elif "aux_residual" in name:
                x = skips[-1] = beside = (x + layer(beside)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, Block) else layer(x)
                skips.append(x)
        out = None
        for name, layer in self.dec.items():
            if "aux_up" in name:
                out = layer(out)
            elif "aux_norm" in name:
                beside = functional.silu(layer(x))
            elif "aux_conv" in name:
                out = layer(beside) if out is None else out + layer(beside)
            else:
                x = layer(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
        assert out is not None
        return out[:, : self.shape[0]]


class DhariwalUNet(Network):
    """ADM of Dhariwal & Nichol 2021, as Karras et al. 2022 (table 7) run it."""

    fields = DHARIWAL

    def __init__(self, **config: Any):
        super().__init__(**config)
        c = self.config
        base, side, embedding = c["model_channels"], c["img_resolution"], c["model_channels"] * c["channel_mult_emb"]
        self.map_augment = nn.Linear(c["augment_dim"], base, bias=False) if c["augment_dim"] else None
        self.map_layer0 = nn.Linear(base, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.map_label = nn.Linear(self.classes, embedding, bias=False) if self.classes else None

        def block(width_in: int, width: int, resampling: str = "", attention: bool = False) -> Block:
            return Block(width_in, width, embedding, False, c["dropout"], [1, 1], resampling, attention)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width = base * c["channel_mult"][0]
        skips = [width]
        for level, mult in enumerate(c["channel_mult"]):
            name, attention = f"{side >> level}x{side >> level}", side >> level in c["attn_resolutions"]
            if level == 0:
                self.enc[f"{name}_conv"] = Conv(c["in_channels"], width, 3)
            else:
                self.enc[f"{name}_down"] = block(width, width, "down")
                skips.append(width)
            for index in range(c["num_blocks"]):
                self.enc[f"{name}_block{index}"] = block(width, base * mult, attention=attention)
                width = base * mult
                skips.append(width)
        for level, mult in reversed(list(enumerate(c["channel_mult"]))):
            name, attention = f"{side >> level}x{side >> level}", side >> level in c["attn_resolutions"]
            if level == len(c["channel_mult"]) - 1:
                self.dec[f"{name}_in0"] = block(width, width, attention=True)
                self.dec[f"{name}_in1"] = block(width, width)
            else:
                self.dec[f"{name}_up"] = block(width, width, "up")
            for index in range(c["num_blocks"] + 1):
                self.dec[f"{name}_block{index}"] = block(width + skips.pop(), base * mult, attention=attention)
                width = base * mult
        self.out_norm = group_norm(width, 1e-5)
        self.out_conv = Conv(width, c["out_channels"], 3)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """See `SongUNet.forward`."""
        phase = angles(c_noise, self.config["model_channels"], False, exact(x))
        emb = augmented(torch.cat([phase.cos(), phase.sin()], dim=1).to(x.dtype), self.map_augment, augment)
        emb = self.map_layer1(functional.silu(self.map_layer0(emb)))
        hot = self.one_hot(label, x)
        if hot is not None:
            emb = emb + self.map_label(dropped(hot, self.config["label_dropout"], self.training))  # type: ignore[misc]
        emb = functional.silu(emb)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
        return self.out_conv(functional.silu(self.out_norm(x)))[:, : self.shape[0]]


def dropped(hot: Tensor, probability: float, training: bool) -> Tensor:
    """One-hot labels, some of them dropped while training."""
    if not training or not probability:
        return hot
    return hot * (torch.rand(len(hot), 1, device=hot.device) >= probability)


def augmented(emb: Tensor, layer: nn.Module | None, augment: Tensor | None) -> Tensor:
    """The embedding with that of the augmentation, which is 0 where nothing was augmented."""
    if augment is None:
        return emb
    if layer is None:
        raise UsageError("this network takes no augment=", "leave it out")
    return emb + layer(augment.to(emb.dtype))


# ---- the network of EDM2


class EDM2UNet(Network):
    """The magnitude-preserving U-Net of Karras et al. 2024 (configuration G, figure 21)."""

    fields = EDM2

    def __init__(self, **config: Any):
        super().__init__(**config)
        c = self.config
        widths, side = [c["model_channels"] * mult for mult in c["channel_mult"]], c["img_resolution"]
        noise = widths[0] if c["channel_mult_noise"] is None else c["model_channels"] * c["channel_mult_noise"]
        embedding = max(widths) if c["channel_mult_emb"] is None else c["model_channels"] * c["channel_mult_emb"]
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise)
        self.emb_noise = MPConv(noise, embedding)
        self.emb_label = MPConv(self.classes, embedding) if self.classes else None

        def block(width_in: int, width: int, encoder: bool, resampling: str = "", attention: bool = False) -> MPBlock:
            return MPBlock(width_in, width, embedding, c, encoder, resampling, attention)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width = widths[0]
        skips = [width]
        for level, target in enumerate(widths):
            name, attention = f"{side >> level}x{side >> level}", side >> level in c["attn_resolutions"]
            if level == 0:
                self.enc[f"{name}_conv"] = MPConv(c["img_channels"] + 1, width, 3)
            else:
                self.enc[f"{name}_down"] = block(width, width, True, "down")
                skips.append(width)
            for index in range(c["num_blocks"]):
                self.enc[f"{name}_block{index}"] = block(width, target, True, attention=attention)
                width = target
                skips.append(width)
        for level, target in reversed(list(enumerate(widths))):
            name, attention = f"{side >> level}x{side >> level}", side >> level in c["attn_resolutions"]
            if level == len(widths) - 1:
                self.dec[f"{name}_in0"] = block(width, width, False, attention=True)
                self.dec[f"{name}_in1"] = block(width, width, False)
            else:
                self.dec[f"{name}_up"] = block(width, width, False, "up")
            for index in range(c["num_blocks"] + 1):
                self.dec[f"{name}_block{index}"] = block(width + skips.pop(), target, False, attention=attention)
                width = target
        self.out_conv = MPConv(width, c["img_channels"], 3)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """x (batch, channels, side, side), c_noise (batch,), label (batch,) of integers or None: no class."""
        emb = self.emb_noise(self.emb_fourier(c_noise, exact(x)).to(x.dtype))
        hot = self.one_hot(label, x)
        if hot is not None:
            named = self.emb_label(hot * math.sqrt(self.classes))  # type: ignore[misc]
            emb = mp_sum(emb, named, self.config["label_balance"])
        emb = mp_silu(emb)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, MPBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(mp_cat(x, skips.pop(), self.config["concat_balance"]) if "block" in name else x, emb)
        return self.out_conv(x, self.out_gain)


NETWORKS: dict[str, type[Network]] = {net.__name__: net for net in (SongUNet, DhariwalUNet, EDM2UNet)}
