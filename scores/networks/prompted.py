"""Networks of diffusers under prompts: how each is called, and classifier-free guidance in one doubled call."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from pfode.errors import UsageError
from pfode.tensors import readable

__all__ = ["Conditions", "Prompted", "call_flux", "call_sd3", "call_unet"]

Conditions = Mapping[str, Tensor]


def call_unet(model: Any, x: Tensor, t: Tensor, c: Conditions) -> Tensor:
    """The output of a `UNet2DConditionModel` (Stable Diffusion, SDXL) for states x at network times t, under c."""
    added = {"text_embeds": c["pooled"], "time_ids": c["time_ids"]} if "pooled" in c else None
    words = {"encoder_hidden_states": c["words"], "timestep_cond": c.get("guidance_cond")}
    return model(x, t, **words, added_cond_kwargs=added, return_dict=False)[0]


def call_sd3(model: Any, x: Tensor, t: Tensor, c: Conditions) -> Tensor:
    """The output of an `SD3Transformer2DModel` (Stable Diffusion 3) for states x at network times t, under c."""
    words = {"encoder_hidden_states": c["words"], "pooled_projections": c["pooled"]}
    return model(hidden_states=x, timestep=t, **words, return_dict=False)[0]


def call_flux(model: Any, x: Tensor, t: Tensor, c: Conditions) -> Tensor:
    """The output of a `FluxTransformer2DModel`, which sees the latents as a row of squares of 2 x 2, under c."""
    batch, channels, height, width = x.shape
    squares = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    words = {"encoder_hidden_states": c["words"], "pooled_projections": c["pooled"], "guidance": c.get("guidance_cond")}
    places = {"txt_ids": c["text_ids"], "img_ids": c["image_ids"]}
    row = squares.reshape(batch, (height // 2) * (width // 2), 4 * channels)
    out = model(hidden_states=row, timestep=t.to(x.dtype), **words, **places, return_dict=False)[0]
    back = out.reshape(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return back.reshape(batch, channels, height, width)


class Prompted(nn.Module):
    """A network under one of several prompts, guided away from another, both in one forward of twice the batch.

    Args:
        model: the pipeline's own network, shared with it.
        call: how it is called.
        towards: conditions of each prompt, (prompts, ...), or (1, ...) of all.
        away: those of the prompt to guide away from, (1, ...); None without one.
        shared: conditions without a batch dimension.
        scale: of classifier-free guidance; 1 for none.
        named: whether it is told the prompt by its number, `label`, where len(prompts) is the prompt to guide away
            from; otherwise there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[Any, Tensor, Tensor, Conditions], Tensor],
        towards: Conditions,
        away: Conditions | None,
        shared: Conditions,
        scale: float,
        named: bool = False,
    ):
        super().__init__()
        self.model, self.call, self.scale, self.named = model, call, scale, named
        self.prompts = max(len(value) for value in towards.values())
        self.guided = away is not None
        self.names = (list(towards), list(shared))
        for name, value in towards.items():
            rows = value.expand(self.prompts, *value.shape[1:])
            rows = rows if away is None else torch.cat([rows, away[name]])
            self.register_buffer(f"own_{name}", rows.detach(), persistent=False)
        for name, value in shared.items():
            self.register_buffer(f"shared_{name}", value.detach(), persistent=False)

    @property
    def evals(self) -> int:
        """Network forwards per sample of one call."""
        return 2 if self.guided and self.scale not in (0, 1) else 1

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """x (batch, channels, height, width), c_noise (batch,), label (batch,): the number of the prompt, the first
        where None.

        Raises:
            UsageError: a label for a network under one prompt, or that of the prompt to guide away from without one.
        """
        if label is None:
            label = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        elif not self.named:
            raise UsageError("this denoiser has a prompt and takes no label", "leave label= out")
        elif not self.guided and readable(label) and int(label.max()) >= self.prompts:
            raise UsageError("this denoiser has no prompt to guide away from", "a guidance other than 1")
        if self.evals == 1:
            return self._called(x, c_noise, self._other(label) if self.guided and self.scale == 0 else label)
        both = torch.cat([self._other(label), label])
        out = self._called(torch.cat([x, x]), torch.cat([c_noise, c_noise]), both)
        first, second = out.to(torch.promote_types(out.dtype, torch.float32)).chunk(2)
        return first + self.scale * (second - first)

    def _other(self, label: Tensor) -> Tensor:
        return torch.full_like(label, self.prompts)

    def _called(self, x: Tensor, c_noise: Tensor, index: Tensor) -> Tensor:
        own, shared = self.names
        given = {name: getattr(self, f"own_{name}")[index] for name in own}
        return self.call(self.model, x, c_noise, given | {name: getattr(self, f"shared_{name}") for name in shared})

    def scaled(self, scale: float) -> Self:
        """The same with another scale, sharing everything."""
        other = copy.copy(self)
        other.scale = scale
        return other
