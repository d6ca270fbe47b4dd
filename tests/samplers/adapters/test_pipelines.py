"""PFODEScheduler in diffusers' own pipelines, tiny and with random weights, built as in diffusers' tests.

The text encoders are left out and their embeddings given; the pipelines of text still ask that transformers is there.
"""

import importlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import pfode
from pfode.errors import UsageError
from pfode.prediction import PREDICTIONS
from pfode.process import Process
from pfode.samplers import PFODEScheduler, make_plan
from tests.scores.tiny import NEWER

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
GUIDANCE = 4.0


def diffusers(*names: str) -> Any:
    """diffusers' classes; those of pipelines with text encoders want transformers."""
    if any(name.startswith(("Stable", "Flux", "SD3")) for name in names):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip("transformers", reason="pip install transformers tokenizers")
    module = importlib.import_module("diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [getattr(module, name) for name in names]
    return found[0] if len(found) == 1 else found


def made(kind: Any, seed: int = 0, **config: Any) -> Any:
    """A network of random weights, the last layers among them that are zero at first."""
    torch.manual_seed(seed)
    network = kind(**config).eval().requires_grad_(False)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(0, 0.05)
    return network


class Guided:
    """A network as the pipeline calls it, as a denoiser of its own: `out(x, timestep)` -> the guided output."""

    def __init__(self, process: Process, prediction: str, out: Callable[[Tensor, Tensor], Tensor], factor: float = 1.0):
        self.process, self.prediction, self.out, self.factor = process, prediction, out, factor

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        skip, gain = PREDICTIONS[self.prediction].to_x0(self.process.alpha(t.double()), self.process.sigma(t.double()))
        return skip.to(x) * x + gain.to(x) * self.out(x, self.factor * t.float())


def vp(pipe: Any) -> Process:
    return pfode.VPDiscrete(pipe.scheduler.alphas_cumprod.double())


class Bench:
    """A pipeline, how to call it, and the same network as a denoiser.

    Fields: pipe; own and kind: the config and the class of its scheduler, which is the recipe; shape: of its states.
    """

    pipe: Any
    own: Any
    kind: Any
    recipe = "ddim"
    shape: tuple[int, ...]

    def start(self) -> Tensor:
        """The noise it begins with."""
        return noise(*self.shape)

    def call(self, **more: Any) -> Tensor:
        raise NotImplementedError

    def denoiser(self) -> Guided:
        raise NotImplementedError

    def use(self, **config: Any) -> PFODEScheduler:
        """Change the one line."""
        self.pipe.scheduler = PFODEScheduler.from_config(self.own, **config)
        return self.pipe.scheduler

    def begun(self, pipe: Any) -> "Bench":
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.own, self.kind = pipe, pipe.scheduler.config, type(pipe.scheduler)
        return self


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Ddpm(Bench):
    shape = (2, 3, 8, 8)
    recipe = "ddpm"

    def __init__(self):
        pipeline, unet, scheduler = diffusers("DDPMPipeline", "UNet2DModel", "DDPMScheduler")
        network = made(
            unet,
            sample_size=8,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
        self.begun(pipeline(network, scheduler(clip_sample=False)))

    def call(self, **more: Any) -> Tensor:
        out = self.pipe(
            batch_size=2,
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=8,
            output_type="pt",
            return_dict=False,
            **more,
        )[0]
        return out * 2 - 1

    def denoiser(self) -> Guided:
        return Guided(vp(self.pipe), "eps", lambda x, t: self.pipe.unet(x, t).sample)

    def start(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(0))


class Dit(Bench):
    """Both halves of the guidance are in its state, and it passes no generator."""

    shape = (2, 4, 8, 8)

    def __init__(self):
        pipeline, transformer, scheduler, vae = diffusers(
            "DiTPipeline", "DiTTransformer2DModel", "DDIMScheduler", "AutoencoderKL"
        )
        network = made(
            transformer,
            sample_size=8,
            num_layers=1,
            patch_size=4,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        )
        self.begun(pipeline(network, made(vae, scaling_factor=1.0, **VAE), scheduler(clip_sample=False)))

    def call(self, **more: Any) -> Tensor:
        seen, decode = [], self.pipe.vae.decode
        self.pipe.vae.decode = lambda latents: seen.append(latents) or decode(latents)  # it returns pictures only
        options = {"num_inference_steps": 8, "guidance_scale": GUIDANCE, "output_type": "pt", "return_dict": False}
        self.pipe(class_labels=[3, 5], generator=torch.Generator().manual_seed(0), **options, **more)
        self.pipe.vae.decode = decode
        return seen[0]

    def denoiser(self) -> Guided:
        labels = torch.tensor([3, 5, 1000, 1000])

        def out(x: Tensor, t: Tensor) -> Tensor:
            both = self.pipe.transformer(torch.cat([x, x]), timestep=t.expand(4), class_labels=labels).sample
            eps, un = both[:, :4].chunk(2)
            return un + GUIDANCE * (eps - un)

        return Guided(vp(self.pipe), "eps", out)

    def start(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(0))


UNET = {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 8,
    "norm_num_groups": 2,
}
VAE = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "latent_channels": 4,
    "norm_num_groups": 2,
}


class StableDiffusion(Bench):
    shape = (2, 4, 8, 8)
    pipeline = "StableDiffusionPipeline"

    def __init__(self):
        pipeline, unet, vae, scheduler = diffusers(
            self.pipeline, "UNet2DConditionModel", "AutoencoderKL", "DDIMScheduler"
        )
        parts = {"vae": made(vae, **VAE), "unet": made(unet, **UNET), "text_encoder": None, "tokenizer": None}
        parts |= {"safety_checker": None, "feature_extractor": None}
        ddim = scheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        self.begun(pipeline(**parts, scheduler=ddim, requires_safety_checker=False))
        self.words, self.none = noise(2, 5, 8, seed=2), noise(2, 5, 8, seed=3)

    def call(self, **more: Any) -> Tensor:
        return self.pipe(
            prompt_embeds=self.words,
            negative_prompt_embeds=self.none,
            guidance_scale=GUIDANCE,
            output_type="latent",
            return_dict=False,
            **{"num_inference_steps": 8, "generator": torch.Generator().manual_seed(0), **self.pictures(), **more},
        )[0]

    def pictures(self) -> dict[str, Any]:
        return {"height": 16, "width": 16, "latents": self.start()}

    def denoiser(self) -> Guided:
        words = torch.cat([self.none, self.words])

        def out(x: Tensor, t: Tensor) -> Tensor:
            un, co = self.pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=words).sample.chunk(2)
            return un + GUIDANCE * (co - un)

        return Guided(vp(self.pipe), "eps", out)


def picture(seed: int = 4) -> Image.Image:
    return Image.fromarray((torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(seed)) * 255).byte().numpy())


class ImageToImage(StableDiffusion):
    pipeline = "StableDiffusionImg2ImgPipeline"

    def pictures(self) -> dict[str, Any]:
        return {"image": picture(), "strength": 0.6}


class Inpainting(StableDiffusion):
    pipeline = "StableDiffusionInpaintPipeline"

    def pictures(self) -> dict[str, Any]:
        mask = Image.fromarray(torch.tensor([[0, 255]]).repeat(16, 8).byte().numpy())
        return {"image": picture(), "mask_image": mask, "height": 16, "width": 16, "strength": 0.8}


class Sdxl(StableDiffusion):
    recipe = "euler"

    def __init__(self):
        pipeline, unet, vae, scheduler = diffusers(
            "StableDiffusionXLPipeline", "UNet2DConditionModel", "AutoencoderKL", "EulerDiscreteScheduler"
        )
        more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2}
        more |= {"projection_class_embeddings_input_dim": 6 * 2 + 8, "use_linear_projection": True}
        parts = {"vae": made(vae, **VAE), "unet": made(unet, **UNET, **more), "text_encoder": None, "tokenizer": None}
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
        euler = scheduler(**SD, steps_offset=1, timestep_spacing="leading")
        self.begun(pipeline(**parts, scheduler=euler, add_watermarker=False))
        self.words, self.none = noise(2, 5, 8, seed=2), noise(2, 5, 8, seed=3)
        self.pooled, self.pooled_none = noise(2, 8, seed=5), noise(2, 8, seed=6)

    def pictures(self) -> dict[str, Any]:
        pooled = {"pooled_prompt_embeds": self.pooled, "negative_pooled_prompt_embeds": self.pooled_none}
        return {"height": 16, "width": 16, "latents": self.start(), **pooled}

    def denoiser(self) -> Guided:
        words, pooled = torch.cat([self.none, self.words]), torch.cat([self.pooled_none, self.pooled])
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(4, 1)}

        def out(x: Tensor, t: Tensor) -> Tensor:
            both = self.pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=words, added_cond_kwargs=added).sample
            un, co = both.chunk(2)
            return un + GUIDANCE * (co - un)

        return Guided(vp(self.pipe), "eps", out)


class Sd3(StableDiffusion):
    pipeline = "StableDiffusion3Pipeline"
    recipe = "euler"
    shifting: dict[str, Any] = {"shift": 3.0}

    def __init__(self):
        pipeline, transformer, vae, scheduler = diffusers(
            self.pipeline, "SD3Transformer2DModel", "AutoencoderKL", "FlowMatchEulerDiscreteScheduler"
        )
        network = made(
            transformer,
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            out_channels=4,
        )
        parts = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"))
        parts |= dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
        self.begun(pipeline(network, scheduler(**self.shifting), made(vae, shift_factor=0.06, **VAE), **parts))
        self.words, self.none = noise(2, 5, 8, seed=2), noise(2, 5, 8, seed=3)
        self.pooled, self.pooled_none = noise(2, 8, seed=5), noise(2, 8, seed=6)

    def pictures(self) -> dict[str, Any]:
        pooled = {"pooled_prompt_embeds": self.pooled, "negative_pooled_prompt_embeds": self.pooled_none}
        even = [1 - i / 8 for i in range(8)]
        return {
            "height": 16,
            "width": 16,
            "latents": self.start(),
            **pooled,
            "sigmas": even,
            "num_inference_steps": None,
        }

    def denoiser(self) -> Guided:
        words, pooled = torch.cat([self.none, self.words]), torch.cat([self.pooled_none, self.pooled])

        def out(x: Tensor, t: Tensor) -> Tensor:
            both = self.pipe.transformer(
                torch.cat([x, x]), timestep=t.expand(4), encoder_hidden_states=words, pooled_projections=pooled
            ).sample
            un, co = both.chunk(2)
            return un + GUIDANCE * (co - un)

        return Guided(pfode.Flow(), "flow", out, 1000.0)


class Sd3ImageToImage(Sd3):
    """Noises the picture by scale_noise."""

    pipeline = "StableDiffusion3Img2ImgPipeline"

    def pictures(self) -> dict[str, Any]:
        more = super().pictures()
        del more["latents"]
        return {**more, "image": picture(), "strength": 0.5}


class Flux(StableDiffusion):
    shape = (2, 16, 4)
    recipe = "euler"

    def __init__(self):
        pipeline, transformer, vae, scheduler = diffusers(
            "FluxPipeline", "FluxTransformer2DModel", "AutoencoderKL", "FlowMatchEulerDiscreteScheduler"
        )
        network = made(
            transformer,
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=[4, 4, 8],
        )
        parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        dynamic = scheduler(use_dynamic_shifting=True, base_image_seq_len=8, max_image_seq_len=32)
        self.begun(pipeline(dynamic, vae=made(vae, **{**VAE, "latent_channels": 1}), transformer=network, **parts))
        self.words, self.pooled = noise(2, 5, 8, seed=2), noise(2, 8, seed=5)

    def call(self, **more: Any) -> Tensor:
        return self.pipe(
            prompt_embeds=self.words,
            pooled_prompt_embeds=self.pooled,
            height=16,
            width=16,
            latents=self.start(),
            output_type="latent",
            return_dict=False,
            **{"num_inference_steps": 8, "generator": torch.Generator().manual_seed(0), **more},
        )[0]

    def denoiser(self) -> Guided:
        images = self.pipe._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)

        def out(x: Tensor, t: Tensor) -> Tensor:
            return self.pipe.transformer(
                hidden_states=x,
                timestep=t.expand(2),
                pooled_projections=self.pooled,
                encoder_hidden_states=self.words,
                txt_ids=torch.zeros(5, 3),
                img_ids=images,
            ).sample

        return Guided(pfode.Flow(), "flow", out)


BENCHES = {
    kind.__name__: kind
    for kind in (Ddpm, Dit, StableDiffusion, ImageToImage, Inpainting, Sdxl, Sd3, Sd3ImageToImage, Flux)
}
LATER = ("Ddpm", "Sd3", "Sd3ImageToImage", "Flux")  # pipelines that take less in an old diffusers
WHOLE = ["Ddpm", "Dit", "StableDiffusion", "Sdxl", "Sd3", "Flux"]  # from noise
kept: dict[str, Bench] = {}


@pytest.fixture
def bench(request) -> Bench:
    name = request.param
    if name in LATER and not NEWER:
        pytest.skip("this version's pipeline does not take what is asked of it")
    if name not in kept:
        kept[name] = BENCHES[name]()
    return kept[name]


def near(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize("bench", BENCHES, indirect=True)
def test_the_same_recipe_gives_the_same_latents(bench):
    """As diffusers' own scheduler: DDPM, DDIM, Euler and FlowMatchEuler."""
    bench.pipe.scheduler = bench.kind.from_config(bench.own)
    with torch.no_grad():
        theirs = bench.call()
        scheduler = bench.use(sampler=bench.recipe)
        ours = bench.call()
    assert isinstance(bench.pipe.scheduler, PFODEScheduler)
    assert scheduler.plan is not None
    assert scheduler.step_index == scheduler.plan.nfe
    assert near(ours, theirs)


@pytest.mark.parametrize("bench", WHOLE, indirect=True)
@pytest.mark.parametrize("name", ["unipc", "dpm++2s", "dpm++2m-sde"])
def test_the_latents_are_those_of_sample(bench, name):
    """`pfode.sample` on the pipeline's own network, guided as the pipeline guides; noise by the scheduler's seed."""
    scheduler = bench.use(sampler=name, seed=3)
    generator = {} if isinstance(bench, Ddpm | Dit) else {"generator": None}
    if isinstance(bench, Ddpm) and "sde" in name:
        return  # passes its generator
    with torch.no_grad():
        ours = bench.call(**generator)
        assert scheduler.plan is not None
        out = pfode.sample(bench.denoiser(), x=bench.start(), plan=scheduler.plan, seed=3).x
    if isinstance(bench, Ddpm):
        out = out.clamp(-1, 1)
    assert near(ours, out)


@pytest.mark.parametrize("bench", BENCHES, indirect=True)
@pytest.mark.parametrize(
    "config", [{"sampler": "heun", "grid": "karras", "chart": "flow"}, {"sampler": "unipc3", "grid": "log-snr"}]
)
def test_other_grids_and_inner_stages(bench, config):
    scheduler = bench.use(**config)
    with torch.no_grad():
        latents = bench.call()
    assert torch.isfinite(latents).all()
    assert scheduler.plan is not None
    assert scheduler.plan.steps == 8
    assert scheduler.step_index == len(scheduler.timesteps) == scheduler.plan.nfe
    assert scheduler.plan.nfe == (8 if config["sampler"] == "unipc3" else 15)


@pytest.mark.parametrize("bench", ["StableDiffusion", "Flux", "Ddpm"], indirect=True)
def test_pipelines_are_saved_and_loaded(bench, tmp_path):
    bench.use(sampler="unipc", grid="karras", seed=1)
    with torch.no_grad():
        before = bench.call()
        bench.pipe.save_pretrained(tmp_path)
        absent = {name: None for name, part in bench.pipe.components.items() if part is None}
        pipe, again = bench.pipe, type(bench.pipe).from_pretrained(tmp_path, **absent)
        again.set_progress_bar_config(disable=True)
        assert isinstance(again.scheduler, PFODEScheduler)
        bench.pipe = again
        after = bench.call()
        bench.pipe = pipe
    assert near(after, before, 1e-4)  # other memory layouts round otherwise


@pytest.mark.parametrize("bench", ["StableDiffusion"], indirect=True)
def test_a_saved_plan_gives_the_pictures_of_sample(bench, tmp_path):
    plan = make_plan("unipc3", bench.denoiser().process, 6, grid="karras")
    path = str(plan.save(tmp_path / "six.safetensors"))
    bench.use(sampler=path)
    with torch.no_grad():
        ours = bench.call(num_inference_steps=6)
        out = pfode.sample(bench.denoiser(), x=bench.start(), plan=plan).x
    assert near(ours, out)


@pytest.mark.parametrize("bench", ["Sd3"], indirect=True)
def test_seeds_reach_where_pipelines_pass_no_generator(bench):
    """The same seed gives the same latents, another one others."""
    made_by = {}
    with torch.no_grad():
        for seed in (0, 0, 1):
            bench.use(sampler="euler-a", seed=seed)
            made_by.setdefault(seed, []).append(bench.call())
    assert torch.equal(*made_by[0])
    assert (made_by[0][0] - made_by[1][0]).abs().max() > 1e-2


@pytest.mark.parametrize("bench", ["StableDiffusion", "Sdxl"], indirect=True)
def test_the_eta_of_a_pipelines_call_is_heeded(bench):
    """It was dropped where the scheduler's step did not name it."""
    with torch.no_grad():
        bench.use(sampler="ddim", seed=3, options={"eta": 1.0})
        wanted = bench.call(generator=None)
        bench.use(sampler="ddim", seed=3)
        assert torch.equal(bench.call(generator=None, eta=1.0), wanted)
        assert not torch.equal(bench.call(generator=None), wanted)
        bench.use(sampler="unipc")
        with pytest.raises(UsageError, match="unipc2 takes no eta"):
            bench.call(eta=1.0)


@pytest.mark.parametrize("bench", ["StableDiffusion"], indirect=True)
def test_a_pipeline_whose_network_returns_one_buffer(bench):
    """As a compiled one with replayed graphs does: the latents are those of a network that returns fresh tensors."""
    bench.use(sampler="unipc3", prediction_type="sample")
    unet = bench.pipe.unet
    forward, buffers = unet.forward, {}

    def bound(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        first = out[0]
        kept = buffers.setdefault("out", torch.empty_like(first))
        return (kept.copy_(first),)

    with torch.no_grad():
        wanted = bench.call()
        unet.forward = bound
        try:
            assert torch.equal(bench.call(), wanted)
        finally:
            unet.forward = forward


@pytest.mark.parametrize("bench", ["Sdxl"], indirect=True)
def test_a_run_can_be_left_and_taken_up(bench):
    """denoising_end of one pipeline; the latents are the state of the plan's node there."""
    scheduler = bench.use(sampler="dpm++2m", timestep_spacing="trailing")
    with torch.no_grad():
        part = bench.call(denoising_end=0.5)
        plan = scheduler.plan
        assert plan is not None
        points = list(pfode.iterate(plan, bench.denoiser(), bench.start()))
    assert scheduler.step_index == 4
    assert near(part, points[3].x)


@pytest.mark.parametrize("bench", ["StableDiffusion"], indirect=True)
def test_half_precision_pipelines(bench):
    """The pipeline sees bfloat16, and its pictures are those of float32 but for the network's rounding."""
    bench.use(sampler="dpm++2m", timestep_spacing="trailing")
    with torch.no_grad():
        exact = bench.call()
        assert bench.call().dtype == torch.float32
        bench.pipe.to(torch.bfloat16)
        words = bench.words, bench.none
        bench.words, bench.none = (w.bfloat16() for w in words)
        half = bench.call(latents=bench.start().bfloat16())
        bench.words, bench.none = words
        bench.pipe.to(torch.float32)
    assert half.dtype == torch.bfloat16
    assert near(half.float(), exact, 0.2)


def test_what_the_page_shows_works(tmp_path, monkeypatch):
    """docs/pipelines.md, block after block."""
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[3] / "docs" / "pipelines.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    assert [info["i"] for info in names["seen"]] == [*range(20)]
    assert torch.isfinite(names["out"]).all()
