"""Pipelines of diffusers as denoisers: the network under a prompt, in the pipeline's latent space, and its decoder."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from pfode.compat.schedules import NOISE, Stated, stated
from pfode.denoiser import digest
from pfode.errors import UsageError, integer, number
from pfode.scores.latent import Autoencoder, LatentDenoiser
from pfode.scores.networks.diffusers import Adapter
from pfode.scores.networks.prompted import Conditions, Prompted, call_flux, call_sd3, call_unet

__all__ = ["PipelineDenoiser", "from_pipeline", "prompted"]

PROMPTS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


class PipelineDenoiser(LatentDenoiser):
    """The denoiser of a text-to-image pipeline: a `LatentDenoiser` with the prompts and the guidance built in.

    Of several prompts `labels` has the texts; a label is one of them, or its number.
    `guidance` is the scale that it was made with.
    """

    guidance: float

    def __init__(
        self,
        network: Any,
        known: Stated,
        shape: tuple[int, ...],
        autoencoder: Autoencoder,
        labels: Sequence[str] | None = None,
    ):
        super().__init__(
            network,
            known.process,
            known.prediction,
            autoencoder=autoencoder,
            sigma_data=known.sigma_data,
            shape=shape,
            labels=labels,
            time_scale=known.time_scale,
        )

    @property
    def words(self) -> str:
        """A digest of prompts and guidance as the network is given them, apart from the weights, see `fingerprint`."""
        return digest(f"prompts {self.net.scale}", dict(self.net.named_buffers(recurse=False)))

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
                "this pipeline was taken without a prompt to guide away from",
                "from_pipeline(pipe, ..., guidance=7.5), of Flux true_cfg= and negative_prompt=",
            )
        return self.with_network(self.net.scaled(scale))


@dataclass(frozen=True)
class _Request:
    """The arguments of a call of `from_pipeline`, checked."""

    pipe: Any
    config: Mapping[str, Any]
    prompts: tuple[str, ...] | None
    negative: str | None
    named: bool
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
    prompts: Sequence[str] | None = None,
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

    Stable Diffusion (1 and 2), SDXL, SD3 and Flux, with prompts; DiT, with the classes as labels; DDPM, DDIM and
    PNDM. The noise process and the prediction are those of the pipeline's scheduler; networks are shared with the
    pipeline, not copied.

    Args:
        prompt, negative_prompt: encoded by the pipeline; or as embeddings of one prompt, of batch size 1.
        prompts: several, the classes of the denoiser: `pfode.sample(..., label="all")` draws a picture of each.
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
        words = (prompt, prompts, negative_prompt, guidance)
        if any(value is not None for value in words) or given or options:
            hint = "label= and guidance= are given to pfode.sample" if kind is _dit else "leave prompt and guidance out"
            raise UsageError(f"{name} takes no prompt", hint)
        return kind(pipe)
    config = {key: value for key, value in dict(pipe.scheduler.config).items() if key in NOISE}
    config["_class_name"] = type(pipe.scheduler).__name__
    return prompted(
        pipe, config, prompt, negative_prompt, prompts=prompts, guidance=guidance, true_cfg=true_cfg, height=height,
        width=width, embeds=given, **options,
    )  # fmt: skip


def prompted(
    pipe: Any,
    config: Mapping[str, Any],
    prompt: str | None = None,
    negative_prompt: str | None = None,
    *,
    prompts: Sequence[str] | None = None,
    guidance: float | None = None,
    true_cfg: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    embeds: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> PipelineDenoiser:
    """A text-to-image pipeline under prompts, with the process that the config of a scheduler states.

    Args:
        pipe: of Stable Diffusion, SDXL, SD3 or Flux. config: with the name of the class under "_class_name".
        embeds: in place of prompts, by their names. The others are those of `from_pipeline`.

    Raises:
        UsageError: as `from_pipeline`.
    """
    name = next(cls.__name__ for cls in type(pipe).__mro__ if cls.__name__ in KINDS)
    given = dict(embeds or {})
    _check_prompts(name, prompt, prompts, negative_prompt, given)
    named = prompts is not None
    texts = tuple(prompts) if prompts is not None else None if prompt is None else (prompt,)
    usual = inspect.signature(pipe.__call__).parameters["guidance_scale"].default
    scale = number("guidance", usual if guidance is None else guidance)
    factor = pipe.vae_scale_factor * (2 if KINDS[name] in (_flux, _sd3) else 1)
    sides = {"height": height or _side(pipe, 0), "width": width or _side(pipe, 1)}
    for key, side in sides.items():
        if integer(key, side, factor) % factor:
            near = max(factor, round(side / factor) * factor)
            raise UsageError(f"{key}: need a multiple of {factor}, got {side}", f"{key}={near}")
    return KINDS[name](
        _Request(
            pipe, config, texts, negative_prompt, named, scale, number("true_cfg", true_cfg), sides["height"],
            sides["width"], given, options,
        )
    )  # fmt: skip


def _check_prompts(name: str, prompt: object, prompts: object, negative: object, embeds: Mapping[str, object]) -> None:
    """There are prompts, in one of the ways to give them, and they are strings, or embeddings of one prompt.

    Raises:
        UsageError: they are not; it is named.
    """
    for key, value in embeds.items():
        if not isinstance(value, Tensor) or len(value) != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"{key}: need the embeddings of one prompt, shape (1, ...), got {got}")
    for key, value in (("prompt", prompt), ("negative_prompt", negative)):
        if value is not None and not isinstance(value, str):
            raise UsageError(
                f"{key}: need one string, got {value!r:.60}", "several prompts: prompts=['a cat', 'a dog']"
            )
    if prompts is not None:
        sound = isinstance(prompts, list | tuple) and prompts and all(isinstance(text, str) for text in prompts)
        if not sound:
            raise UsageError(f"prompts: need a list of strings, got {prompts!r:.60}", "prompts=['a cat', 'a dog']")
    given = [key for key, value in (("prompt", prompt), ("prompts", prompts)) if value is not None]
    given += ["prompt_embeds"] if "prompt_embeds" in embeds else []
    if not given:
        raise UsageError(f"{name} needs a prompt", "from_pipeline(pipe, prompt='a cat') or prompt_embeds=")
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", "give one of them")


def _side(pipe: Any, axis: int) -> int:
    """The height (axis 0) or width (axis 1) in pixels that a pipeline draws by default."""
    size = getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size
    return (size if isinstance(size, int) else size[axis]) * pipe.vae_scale_factor


def _known(config: Mapping[str, Any], tokens: int | None = None) -> Stated:
    """The noise process and the prediction of a pipeline, as the config of its scheduler states them."""
    try:
        return stated(config, tokens)
    except UsageError as error:
        raise UsageError(f"pipe.scheduler: {error.message}", error.hint) from error


def _scheduler(pipe: Any) -> Stated:
    config = {key: value for key, value in dict(pipe.scheduler.config).items() if key in NOISE}
    return _known({**config, "_class_name": type(pipe.scheduler).__name__})


def _encoded(request: _Request, guided: bool) -> list[Tensor | None]:
    """The embeddings in the order of `PROMPTS`, made by the pipeline's own encoder where they were not given.

    Those to guide towards have a row for each prompt, those to guide away from one.
    """
    if request.prompts is None:
        if guided and "negative_prompt_embeds" not in request.embeds:
            raise UsageError("prompt_embeds without negative_prompt_embeds", "give both, or guidance=1")
        return [request.embeds.get(key) for key in PROMPTS]
    words = {
        "negative_prompt": request.negative,
        "do_classifier_free_guidance": guided,
        **request.embeds,
        **request.options,
    }
    parameters = inspect.signature(request.pipe.encode_prompt).parameters
    for key in ("prompt_2", "prompt_3"):
        if key in parameters:
            words.setdefault(key, None)
    strange = next((key for key in words if key not in parameters), None)
    if strange is not None:
        known = ", ".join(key for key in parameters if key not in ("prompt", "device", "num_images_per_prompt"))
        raise UsageError(f"{strange}: not an option of the prompts of {type(request.pipe).__name__}", known)
    rows = []
    with torch.no_grad():
        for prompt in request.prompts:
            found = request.pipe.encode_prompt(
                prompt=prompt, device=request.pipe._execution_device, num_images_per_prompt=1, **words
            )
            rows.append([*found, *[None] * (4 - len(found))])
    towards = [None if first is None else torch.cat([row[i] for row in rows]) for i, first in enumerate(rows[0])]
    return [towards[0], rows[0][1], towards[2], rows[0][3]]


def _conditions(**values: Tensor | None) -> dict[str, Tensor]:
    """Those of these conditions that are there."""
    return {name: value for name, value in values.items() if value is not None}


def _latent_denoiser(
    request: _Request, network: Prompted, channels: int, tokens: int | None, time_scale: float | None = None
) -> Any:
    known = _known(request.config, tokens)
    if time_scale is not None:
        known = known._replace(time_scale=time_scale)
    factor = request.pipe.vae_scale_factor
    shape = (channels, request.height // factor, request.width // factor)
    labels = request.prompts if request.named else None
    made = PipelineDenoiser(network.eval(), known, shape, Autoencoder(request.pipe.vae), labels)
    made.guidance = request.guidance
    return made


def _stable_diffusion(request: _Request) -> PipelineDenoiser:
    """Stable Diffusion 1 and 2 and SDXL."""
    pipe, unet = request.pipe, request.pipe.unet
    config = unet.config
    if config.in_channels != pipe.vae.config.latent_channels:
        raise UsageError(f"pipe.unet: takes {config.in_channels} channels: a network for inpainting or the like")
    embedded = config.time_cond_proj_dim is not None
    guided = request.guidance != 1 and not embedded
    words, no_words, pooled, no_pooled = _encoded(request, guided)
    assert words is not None
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
        request, Prompted(unet, call_unet, towards, away, {}, request.guidance, request.named), config.in_channels, None
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
    network = Prompted(model, call_sd3, towards, away, {}, request.guidance, request.named)
    return _latent_denoiser(request, network, model.config.in_channels, tokens)


def _flux(request: _Request) -> PipelineDenoiser:
    """Flux: the guidance is an input of the network, classifier-free guidance (`true_cfg`) comes on top."""
    pipe, model = request.pipe, request.pipe.transformer
    high, wide = (side // (2 * pipe.vae_scale_factor) for side in (request.height, request.width))
    guided = request.true_cfg != 1
    sides: list[dict[str, Tensor]] = []
    negative = None if request.negative is None else (request.negative,)
    for prompts, prefix in ((request.prompts, ""), *(((negative, "negative_"),) if guided else ())):
        words, pooled = _flux_words(request, prompts, prefix)
        cond = torch.full((1,), request.guidance, device=words.device) if model.config.guidance_embeds else None
        sides.append(_conditions(words=words, pooled=pooled, guidance_cond=cond))
    towards, away = sides[0], sides[1] if guided else None
    _alike(towards, away)
    words = sides[0]["words"]
    places = torch.zeros(high, wide, 3)
    places[..., 1], places[..., 2] = torch.arange(high)[:, None], torch.arange(wide)
    shared = {"text_ids": torch.zeros(words.shape[1], 3).to(words), "image_ids": places.reshape(-1, 3).to(words)}
    network = Prompted(model, call_flux, towards, away, shared, request.true_cfg if guided else 1.0, request.named)
    return _latent_denoiser(request, network, model.config.in_channels // 4, high * wide, time_scale=1.0)


def _flux_words(request: _Request, prompts: Sequence[str] | None, prefix: str) -> tuple[Tensor, Tensor]:
    """The two embeddings of prompts that Flux takes, a row each; prefix: "negative_" for those to guide away from."""
    pipe, found = request.pipe, []
    if prompts is None:
        found.append([request.embeds.get(f"{prefix}{key}") for key in ("prompt_embeds", "pooled_prompt_embeds")])
    options = {"prompt_2": None, **request.options} if not prefix else {**request.options, "prompt_2": None}
    for prompt in prompts or ():
        with torch.no_grad():
            found.append(pipe.encode_prompt(prompt=prompt, device=pipe._execution_device, **options)[:2])
    if any(value is None for row in found for value in row):
        hint = f"{prefix}prompt=, or {prefix}prompt_embeds= and {prefix}pooled_prompt_embeds="
        raise UsageError(f"Flux: {'true_cfg' if prefix else 'it'} needs a {prefix.replace('_', ' ')}prompt", hint)
    return torch.cat([row[0] for row in found]), torch.cat([row[1] for row in found])


def _alike(towards: Conditions, away: Conditions | None) -> None:
    """Raise UsageError where prompt and negative prompt have embeddings of different shapes."""
    for name, value in towards.items():
        if away is not None and (name not in away or away[name].shape[1:] != value.shape[1:]):
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
