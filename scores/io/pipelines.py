"""Pipelines of diffusers as denoisers: the network under a prompt, in the pipeline's latent space, and its decoder."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from pfode.compat.schedules import NOISE, Stated, stated
from pfode.errors import UsageError, integer, number
from pfode.scores.latent import Autoencoder, LatentDenoiser
from pfode.scores.networks.diffusers import Adapter

__all__ = ["PipelineDenoiser", "Prompted", "from_pipeline"]

Conditions = Mapping[str, Tensor]
PROMPTS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


# ---- how each network is called


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
    """A network under a prompt, guided away from another by a scale, both in one forward of twice the batch.

    Args:
        model: the pipeline's own network, shared with it.
        call: how it is called.
        towards, away: conditions of one sample, with a batch dimension of 1; those under `shared` have none.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[Any, Tensor, Tensor, Conditions], Tensor],
        towards: Conditions,
        away: Conditions | None,
        shared: Conditions,
        scale: float,
    ):
        super().__init__()
        self.model, self.call, self.scale = model, call, scale
        self.guided = away is not None
        self.names = (list(towards), list(shared))
        for group, values in (("towards", towards), ("away", away or {}), ("shared", shared)):
            for name, value in values.items():
                self.register_buffer(f"{group}_{name}", value.detach(), persistent=False)

    @property
    def evals(self) -> int:
        """Network forwards per sample of one call."""
        return 2 if self.guided and self.scale not in (0, 1) else 1

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """x (batch, channels, height, width), c_noise (batch,).

        Raises:
            UsageError: a label, which a network under a prompt does not take.
        """
        if label is not None:
            raise UsageError("this denoiser has a prompt and takes no label", "leave label= out")
        own, shared = self.names
        common = {name: getattr(self, f"shared_{name}") for name in shared}

        def given(group: str) -> dict[str, Tensor]:
            values = {name: getattr(self, f"{group}_{name}") for name in own}
            return {name: value.expand(len(x), *value.shape[1:]) for name, value in values.items()}

        if self.evals == 1:
            group = "away" if self.guided and self.scale == 0 else "towards"
            return self.call(self.model, x, c_noise, given(group) | common)
        first, second = given("away"), given("towards")
        both = {name: torch.cat([first[name], second[name]]) for name in own}
        out = self.call(self.model, torch.cat([x, x]), torch.cat([c_noise, c_noise]), both | common)
        first_out, second_out = out.to(torch.promote_types(out.dtype, torch.float32)).chunk(2)
        return first_out + self.scale * (second_out - first_out)

    def scaled(self, scale: float) -> Self:
        """The same with another scale, sharing everything."""
        other = copy.copy(self)
        other.scale = scale
        return other


class PipelineDenoiser(LatentDenoiser):
    """The denoiser of a text-to-image pipeline: a `LatentDenoiser` with the prompt and the guidance built in."""

    def __init__(self, network: Any, known: Stated, shape: tuple[int, ...], autoencoder: Autoencoder):
        super().__init__(
            network,
            known.process,
            known.prediction,
            autoencoder=autoencoder,
            sigma_data=known.sigma_data,
            shape=shape,
            time_scale=known.time_scale,
        )

    @property
    def evals(self) -> int:  # type: ignore[override]
        """Network forwards per sample of one call."""
        return self.net.evals

    def guided(self, scale: float) -> Self:
        """The same prompts with another scale of guidance.

        Raises:
            UsageError: there is no negative prompt to guide away from.
        """
        if not self.net.guided and scale != 1:
            raise UsageError(
                "this pipeline was taken without a prompt to guide away from", "from_pipeline(pipe, ..., guidance=7.5)"
            )
        return self.with_network(self.net.scaled(scale))


# ---- pipelines


@dataclass(frozen=True)
class _Request:
    """The arguments of a call of `from_pipeline`, checked."""

    pipe: Any
    prompt: str | None
    negative: str | None
    guidance: float
    true_cfg: float
    height: int
    width: int
    embeds: dict[str, Tensor]
    options: dict[str, Any]


def from_pipeline(
    pipe: Any,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    *,
    guidance: float | None = None,
    true_cfg: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    **options: Any,
) -> LatentDenoiser:
    """A pipeline of diffusers as a denoiser in its latent space, with `.decode(x)` for pictures in [-1, 1].

    Stable Diffusion (1 and 2), SDXL, SD3 and Flux, with one prompt; DiT, with the classes as labels; DDPM, DDIM and
    PNDM. The noise process and the prediction are those of the pipeline's scheduler; networks are shared with the
    pipeline, not copied.

    Args:
        prompt, negative_prompt: encoded by the pipeline; or as embeddings of one prompt, of batch size 1.
        guidance: the scale of classifier-free guidance, the pipeline's default when left out; 1 for none. Of Flux the
            scale that is an input of the network. `pfode.sample(..., guidance=)` changes it.
        true_cfg: of Flux the scale of classifier-free guidance, which needs a negative prompt.
        height, width: of the pictures, the pipeline's default when left out.
        options: for the pipeline's `encode_prompt` (prompt_2, clip_skip, max_sequence_length, ...).

    Raises:
        UsageError: a pipeline of another kind, prompts that it cannot take, or a scheduler of unknown noise.
    """
    name = next((cls.__name__ for cls in type(pipe).__mro__ if cls.__name__ in KINDS), None)
    if name is None:
        raise UsageError(f"pipe: {type(pipe).__name__} is none of {', '.join(KINDS)}", "wrap its network yourself")
    kind = KINDS[name]
    embeds = dict(zip(PROMPTS, (prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds,
                                negative_pooled_prompt_embeds), strict=True))  # fmt: skip
    given = {key: value for key, value in embeds.items() if value is not None}
    if kind in (_pixels, _dit):
        if prompt is not None or negative_prompt is not None or given or options or guidance is not None:
            hint = "label= and guidance= are given to pfode.sample" if kind is _dit else "leave prompt and guidance out"
            raise UsageError(f"{name} takes no prompt", hint)
        return kind(pipe)
    _check_prompts(name, prompt, negative_prompt, given)
    scale = inspect.signature(pipe.__call__).parameters["guidance_scale"].default if guidance is None else guidance
    factor = pipe.vae_scale_factor * (2 if kind is _flux else 1)
    sides = {"height": height or _side(pipe, 0), "width": width or _side(pipe, 1)}
    for key, side in sides.items():
        if integer(key, side, factor) % factor:
            raise UsageError(f"{key}: need a multiple of {factor}, got {side}")
    scale, true_cfg = number("guidance", scale), number("true_cfg", true_cfg)
    return kind(
        _Request(pipe, prompt, negative_prompt, scale, true_cfg, sides["height"], sides["width"], given, options)
    )


def _check_prompts(name: str, prompt: object, negative: object, embeds: Mapping[str, object]) -> None:
    """Prompts are single strings, or embeddings of one prompt, and there is one.

    Raises:
        UsageError: they are not; it is named.
    """
    for key, value in embeds.items():
        if not isinstance(value, Tensor) or len(value) != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"{key}: need the embeddings of one prompt, shape (1, ...), got {got}")
    for key, value in (("prompt", prompt), ("negative_prompt", negative)):
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{key}: need one string, got {value!r:.60}", "one denoiser for each prompt")
    if prompt is None and "prompt_embeds" not in embeds:
        raise UsageError(f"{name} needs a prompt", "from_pipeline(pipe, prompt='a cat') or prompt_embeds=")
    if prompt is not None and "prompt_embeds" in embeds:
        raise UsageError("prompt and prompt_embeds exclude each other", "give one of them")


def _side(pipe: Any, axis: int) -> int:
    """The height (axis 0) or width (axis 1) in pixels that a pipeline draws by default."""
    size = getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size
    return (size if isinstance(size, int) else size[axis]) * pipe.vae_scale_factor


def _scheduler(pipe: Any, tokens: int | None = None) -> Stated:
    """The noise process and the prediction of a pipeline, as the config of its scheduler states them."""
    scheduler = pipe.scheduler
    config = {key: value for key, value in dict(scheduler.config).items() if key in NOISE}
    try:
        return stated({**config, "_class_name": type(scheduler).__name__}, tokens)
    except UsageError as error:
        raise UsageError(f"pipe.scheduler: {error.message}", error.hint) from error


def _encoded(request: _Request, guided: bool) -> list[Any]:
    """The embeddings in the order of `PROMPTS`, made by the pipeline's own encoder where they were not given."""
    if request.prompt is None:
        if guided and "negative_prompt_embeds" not in request.embeds:
            raise UsageError("prompt_embeds without negative_prompt_embeds", "give both, or guidance=1")
        return [request.embeds.get(key) for key in PROMPTS]
    words = {
        "negative_prompt": request.negative,
        "do_classifier_free_guidance": guided,
        **request.embeds,
        **request.options,
    }
    for key in ("prompt_2", "prompt_3"):
        if key in inspect.signature(request.pipe.encode_prompt).parameters:
            words.setdefault(key, None)
    with torch.no_grad():
        found = request.pipe.encode_prompt(
            prompt=request.prompt, device=request.pipe._execution_device, num_images_per_prompt=1, **words
        )
    return [*found, *[None] * (4 - len(found))]


def _conditions(**values: Tensor | None) -> dict[str, Tensor]:
    """Those of these conditions that are there."""
    return {name: value for name, value in values.items() if value is not None}


def _latent_denoiser(
    request: _Request, network: Prompted, channels: int, tokens: int | None, time_scale: float | None = None
) -> Any:
    known = _scheduler(request.pipe, tokens)
    if time_scale is not None:
        known = known._replace(time_scale=time_scale)
    factor = request.pipe.vae_scale_factor
    shape = (channels, request.height // factor, request.width // factor)
    return PipelineDenoiser(network.eval(), known, shape, Autoencoder(request.pipe.vae))


def _stable_diffusion(request: _Request) -> PipelineDenoiser:
    """Stable Diffusion 1 and 2 and SDXL."""
    pipe, unet = request.pipe, request.pipe.unet
    config = unet.config
    if config.in_channels != pipe.vae.config.latent_channels:
        raise UsageError(f"pipe.unet: takes {config.in_channels} channels: a network for inpainting or the like")
    embedded = config.time_cond_proj_dim is not None
    guided = request.guidance != 1 and not embedded
    words, no_words, pooled, no_pooled = _encoded(request, guided)
    cond = None
    if embedded:
        w = torch.tensor([request.guidance - 1.0])
        cond = pipe.get_guidance_scale_embedding(w, embedding_dim=config.time_cond_proj_dim).to(words)
    ids = None
    if pooled is not None:
        projection = pooled.shape[-1] if pipe.text_encoder_2 is None else pipe.text_encoder_2.config.projection_dim
        size = (request.height, request.width)
        ids = pipe._get_add_time_ids(size, (0, 0), size, dtype=words.dtype, text_encoder_projection_dim=projection)
    elif getattr(config, "addition_embed_type", None) == "text_time":
        raise UsageError("prompt_embeds of SDXL need pooled_prompt_embeds=", "give both, or a prompt")
    ids = None if ids is None else ids.to(words.device)
    towards = _conditions(words=words, pooled=pooled, time_ids=ids, guidance_cond=cond)
    away = _conditions(words=no_words, pooled=no_pooled, time_ids=ids) if guided else None
    _alike(towards, away)
    return _latent_denoiser(
        request, Prompted(unet, call_unet, towards, away, {}, request.guidance), config.in_channels, None
    )


def _sd3(request: _Request) -> PipelineDenoiser:
    """Stable Diffusion 3."""
    model, factor = request.pipe.transformer, request.pipe.vae_scale_factor * request.pipe.transformer.config.patch_size
    guided = request.guidance != 1
    words, no_words, pooled, no_pooled = _encoded(request, guided)
    if pooled is None:
        raise UsageError("prompt_embeds of SD3 need pooled_prompt_embeds=", "give both, or a prompt")
    towards = _conditions(words=words, pooled=pooled)
    away = _conditions(words=no_words, pooled=no_pooled) if guided else None
    _alike(towards, away)
    tokens = (request.height // factor) * (request.width // factor)
    return _latent_denoiser(
        request, Prompted(model, call_sd3, towards, away, {}, request.guidance), model.config.in_channels, tokens
    )


def _flux(request: _Request) -> PipelineDenoiser:
    """Flux: the guidance is an input of the network, classifier-free guidance (`true_cfg`) comes on top."""
    pipe, model = request.pipe, request.pipe.transformer
    high, wide = (side // (2 * pipe.vae_scale_factor) for side in (request.height, request.width))
    guided = request.true_cfg != 1
    sides: list[dict[str, Tensor]] = []
    for prompt, prefix in ((request.prompt, ""), *(((request.negative, "negative_"),) if guided else ())):
        if prompt is None:
            words, pooled = (request.embeds.get(f"{prefix}{key}") for key in ("prompt_embeds", "pooled_prompt_embeds"))
        else:
            with torch.no_grad():
                words, pooled, _ = pipe.encode_prompt(prompt=prompt, prompt_2=None, device=pipe._execution_device)
        if words is None or pooled is None:
            hint = f"{prefix}prompt=, or {prefix}prompt_embeds= and {prefix}pooled_prompt_embeds="
            raise UsageError(f"Flux: {'true_cfg' if prefix else 'it'} needs a {prefix.replace('_', ' ')}prompt", hint)
        cond = torch.full((1,), request.guidance, device=words.device) if model.config.guidance_embeds else None
        sides.append(_conditions(words=words, pooled=pooled, guidance_cond=cond))
    towards, away = sides[0], sides[1] if guided else None
    _alike(towards, away)
    words = towards["words"]
    places = torch.zeros(high, wide, 3)
    places[..., 1], places[..., 2] = torch.arange(high)[:, None], torch.arange(wide)
    shared = {"text_ids": torch.zeros(words.shape[1], 3).to(words), "image_ids": places.reshape(-1, 3).to(words)}
    network = Prompted(model, call_flux, towards, away, shared, request.true_cfg if guided else 1.0)
    return _latent_denoiser(request, network, model.config.in_channels // 4, high * wide, time_scale=1.0)


def _alike(towards: Conditions, away: Conditions | None) -> None:
    """Raise UsageError where prompt and negative prompt have embeddings of different shapes."""
    for name, value in towards.items():
        if away is not None and (name not in away or away[name].shape != value.shape):
            got = tuple(away[name].shape) if name in away else "none"
            raise UsageError(f"the prompts differ in shape: {name}: {tuple(value.shape)} and {got}", "pad the shorter")


def _adapter(model: nn.Module) -> Adapter:
    """A network of diffusers that is called with states and times alone, or with labels."""
    config: Any = model.config
    public = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    return Adapter(model, type(model).__name__, public).eval()


def _pixels(pipe: Any) -> LatentDenoiser:
    """DDPM, DDIM and PNDM: a network on pixels, with class labels if it has any."""
    known, network = _scheduler(pipe), _adapter(pipe.unet)
    labels = [str(i) for i in range(network.classes)] if network.classes else None
    return LatentDenoiser(
        network,
        known.process,
        known.prediction,
        sigma_data=known.sigma_data,
        shape=network.shape,
        labels=labels,
        time_scale=known.time_scale,
    )


def _dit(pipe: Any) -> LatentDenoiser:
    """DiT: a transformer on latents, with class labels."""
    known, network = _scheduler(pipe), _adapter(pipe.transformer)
    names = {number: name for name, number in reversed(list(pipe.labels.items()))}
    return LatentDenoiser(
        network,
        known.process,
        known.prediction,
        autoencoder=Autoencoder(pipe.vae),
        sigma_data=known.sigma_data,
        shape=network.shape,
        labels=[names.get(i, str(i)) for i in range(network.classes)],
        time_scale=known.time_scale,
    )


KINDS: dict[str, Callable[[Any], Any]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "DiTPipeline": _dit,
    "DDPMPipeline": _pixels,
    "DDIMPipeline": _pixels,
    "PNDMPipeline": _pixels,
}
