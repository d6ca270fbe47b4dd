"""Pipelines as denoisers: pfode.sample gives what the pipeline itself gives."""

from typing import Any

import pytest
import torch

import pfode
from pfode.errors import UsageError
from tests.scores import tiny
from tests.scores.tiny import NEWER, diffusers

transformers = pytest.importorskip("transformers", reason="diffusers has text-to-image pipelines only beside it")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the peers

STEPS = 4
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
WORDS: dict[str, Any] = {"prompt_embeds": tiny.words(1), "negative_prompt_embeds": tiny.words(2)}
POOLED: dict[str, Any] = {
    **WORDS,
    "pooled_prompt_embeds": tiny.pooled(1),
    "negative_pooled_prompt_embeds": tiny.pooled(2),
}


def ddim(**changes: Any) -> Any:
    return tiny.scheduler("DDIMScheduler", clip_sample=False, beta_schedule="scaled_linear", **changes)


def flow(**changes: Any) -> Any:
    return tiny.scheduler("FlowMatchEulerDiscreteScheduler", **changes)


def two(embeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The embeddings for both samples, as pipelines want them."""
    return {name: value.expand(2, *value.shape[1:]) for name, value in embeds.items()}


def times(pipe: Any, process: pfode.Process) -> torch.Tensor:
    """The grid of the pipeline's last run, as the process has it."""
    if isinstance(process, pfode.VPDiscrete):
        return torch.cat([pipe.scheduler.timesteps.double(), torch.tensor([-1.0], dtype=torch.float64)])
    return pipe.scheduler.sigmas.double()


def packed(x: torch.Tensor) -> torch.Tensor:
    return diffusers.FluxPipeline._pack_latents(x, *x.shape)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))


CASES: dict[str, tuple[Any, dict[str, torch.Tensor], float, str]] = {
    "sd": (lambda: tiny.stable_diffusion(ddim()), WORDS, 5.0, "ddim"),
    "sd-v": (lambda: tiny.stable_diffusion(ddim(prediction_type="v_prediction")), WORDS, 2.5, "ddim"),
    "sd-unguided": (lambda: tiny.stable_diffusion(ddim()), WORDS, 1.0, "ddim"),
    "sdxl": (lambda: tiny.sdxl(ddim()), POOLED, 5.0, "ddim"),
    "sd3": (lambda: tiny.sd3(flow(shift=3.0)), POOLED, 7.0, "euler"),
    "sd3-dynamic": (lambda: tiny.sd3(flow(use_dynamic_shifting=True)), POOLED, 7.0, "euler"),
}


@pytest.mark.parametrize(("make", "embeds", "scale", "sampler"), CASES.values(), ids=CASES)
def test_latents_and_pictures_equal_the_pipeline(make, embeds, scale, sampler, request):
    if "sd3-dynamic" in request.node.name and not NEWER:
        pytest.skip("this version's pipeline passes no mu")
    pipe = make()
    options = {**two(embeds), "guidance_scale": scale, "num_inference_steps": STEPS, "latents": LATENTS}
    latents = pipe(**options, output_type="latent").images
    pictures = pipe(**options, output_type="pt").images
    den = pfode.from_pipeline(pipe, guidance=scale, **embeds)
    assert den.shape == (4, 8, 8)
    assert den.labels is None
    result = pfode.sample(den, x=LATENTS, sampler=sampler, grid=times(pipe, den.process))
    assert result.evals == STEPS * (1 if scale == 1 else 2)
    close(result.x, latents)
    close(den.decode(result.x) / 2 + 0.5, pictures)


@pytest.mark.skipif(not NEWER, reason="this version's pipeline has no true_cfg_scale")
@pytest.mark.parametrize("true_cfg", [1.0, 2.0])
@pytest.mark.parametrize("embedded", [True, False])
def test_flux(embedded, true_cfg):
    pipe = tiny.flux(flow(use_dynamic_shifting=True), embedded)
    embeds = two(POOLED) if true_cfg > 1 else {k: v for k, v in two(POOLED).items() if "negative" not in k}
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "true_cfg_scale": true_cfg}
    options |= {"height": 16, "width": 16, "latents": packed(LATENTS)}
    latents = pipe(**embeds, **options, output_type="latent").images
    pictures = pipe(**embeds, **options, output_type="pt").images
    den = pfode.from_pipeline(pipe, guidance=3.0, true_cfg=true_cfg, height=16, width=16, **POOLED)
    assert den.shape == (4, 8, 8)
    result = pfode.sample(den, x=LATENTS, sampler="euler", grid=times(pipe, den.process))
    assert result.evals == STEPS * (2 if true_cfg > 1 else 1)
    close(packed(result.x), latents)
    close(den.decode(result.x) / 2 + 0.5, pictures)


def test_a_plan_fitted_to_a_pipeline_runs_in_it(tmp_path):
    """Fitted through `from_pipeline`, saved, and the sampler of the pipeline's own scheduler: the same latents."""
    pipe = tiny.stable_diffusion(ddim())
    den = pfode.from_pipeline(pipe, guidance=5.0, **WORDS)
    plan = pfode.fit_plan(den, 3, start="ipndm3@ddim", n=8, active=8, check=8, teacher=8, iterations=1)
    path = plan.save(tmp_path / "three.safetensors")
    found = plan.meta["fitted"]["validation"]
    assert found["rms"] < found["start rms"]
    result = pfode.sample(den, x=LATENTS, plan=pfode.Plan.load(path))
    assert result.evals == 6
    pipe.scheduler = pfode.samplers.PFODEScheduler.from_config(pipe.scheduler.config, sampler=str(path))
    options = {**two(WORDS), "guidance_scale": 5.0, "num_inference_steps": 3, "latents": LATENTS}
    close(pipe(**options, output_type="latent").images, result.x)
    close(pipe(**options, output_type="pt").images, den.decode(result.x) / 2 + 0.5)


@pytest.mark.skipif(not NEWER, reason="this version's pipeline shifts otherwise")
def test_the_shift_is_that_of_the_resolution():
    pipe = tiny.flux(flow(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64))
    for side, mu in ((16, 0.5), (32, 1.15)):
        process: Any = pfode.from_pipeline(pipe, height=side, width=side, **POOLED).process
        assert process.shift == pytest.approx(torch.tensor(mu).exp().item())


def test_prompts_are_encoded_by_the_pipeline(tmp_path):
    pipe = tiny.stable_diffusion(ddim(), **tiny.text_encoder(tmp_path))
    options = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    wanted = pipe(["a cat"] * 2, negative_prompt=["a dog"] * 2, latents=LATENTS, **options).images
    den = pfode.from_pipeline(pipe, "a cat", "a dog", guidance=4.0)
    grid = times(pipe, den.process)
    close(pfode.sample(den, x=LATENTS, sampler="ddim", grid=grid).x, wanted)
    other = pfode.from_pipeline(pipe, "a bat", "a dog", guidance=4.0)
    assert (pfode.sample(other, x=LATENTS, sampler="ddim", grid=grid).x - wanted).abs().max() > 1e-3


def test_another_scale_of_guidance():
    pipe = tiny.stable_diffusion(ddim())
    den: Any = pfode.from_pipeline(pipe, guidance=5.0, **WORDS)
    options: dict[str, Any] = {"n": 2, "steps": 3, "sampler": "ddim"}
    again = pfode.sample(pfode.from_pipeline(pipe, guidance=2.0, **WORDS), **options)
    assert torch.equal(pfode.sample(den, guidance=2.0, **options).x, again.x)
    alone = pfode.sample(den, guidance=1.0, **options)
    assert alone.evals == 3
    close(alone.x, pfode.sample(pfode.from_pipeline(pipe, guidance=1.0, **WORDS), **options).x)
    assert pfode.sample(den, **options).evals == 6


def test_it_is_a_denoiser_like_others(tmp_path):
    """Encoding and decoding through a plan, another dtype, one forward for both prompts."""
    den: Any = pfode.from_pipeline(tiny.stable_diffusion(ddim()), guidance=2.0, **WORDS)
    x = pfode.sample(den, n=2, steps=20, sampler="ddim").x
    latents: Any = pfode.encode(den, x, steps=20)
    assert latents.shape == x.shape
    sizes = []
    handle = den.net.model.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    pfode.sample(den, n=3, steps=2, sampler="ddim")
    handle.remove()
    assert sizes == [6, 6]
    half = den.to(dtype=torch.bfloat16)
    assert half.net.model is not den.net.model
    assert half(x, torch.tensor(500.0)).dtype == x.dtype
    assert next(den.net.model.parameters()).dtype == torch.float32


def test_pipelines_without_prompts():
    net = tiny.unet()
    pipe = diffusers.DDPMPipeline(net, ddim())
    den = pfode.from_pipeline(pipe)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor(400.0)
    eps = net(x, 400, return_dict=False)[0]
    close(den(x, t), (x - den.process.sigma(400.0) * eps) / den.process.alpha(400.0))
    assert torch.equal(den.decode(3 * x), (3 * x).clamp(-1, 1))
    dit: Any = pfode.from_pipeline(tiny.dit_pipeline())
    assert dit.labels[7] == "class 7"
    assert dit.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 8, 8)
    wrong: tuple[dict[str, Any], ...] = ({"prompt": "a cat"}, {"guidance": 3.0}, {"prompt_embeds": tiny.words(1)})
    for given in wrong:
        with pytest.raises(UsageError, match="DDPMPipeline takes no prompt"):
            pfode.from_pipeline(pipe, **given)


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (lambda: object(), {}, "object is none of StableDiffusionPipeline"),
        (lambda: tiny.stable_diffusion(ddim()), {}, "needs a prompt"),
        (lambda: tiny.stable_diffusion(ddim()), {"prompt": ["a", "b"]}, "prompt: need one string"),
        (lambda: tiny.stable_diffusion(ddim()), {"prompt": "a", **WORDS}, "exclude each other"),
        (lambda: tiny.stable_diffusion(ddim()), {"prompt_embeds": tiny.words(1)}, "without negative_prompt_embeds"),
        (lambda: tiny.stable_diffusion(ddim()), two(WORDS), r"one prompt, shape \(1, ...\), got shape \(2,"),
        (
            lambda: tiny.stable_diffusion(ddim()),
            {**WORDS, "negative_prompt_embeds": tiny.words(2)[:, :3]},
            "differ in shape: words",
        ),
        (lambda: tiny.stable_diffusion(ddim()), {**WORDS, "height": 17}, "height: need a multiple of 2"),
        (lambda: tiny.stable_diffusion(ddim()), {**WORDS, "guidance": float("nan")}, "guidance"),
        (lambda: tiny.sdxl(ddim()), WORDS, "SDXL need pooled_prompt_embeds"),
        (lambda: tiny.sd3(flow()), WORDS, "SD3 need pooled_prompt_embeds"),
        (lambda: tiny.flux(flow()), {**WORDS}, "Flux: it needs a prompt"),
        (
            lambda: tiny.flux(flow()),
            {"prompt_embeds": tiny.words(1), "pooled_prompt_embeds": tiny.pooled(1), "true_cfg": 2.0},
            "true_cfg needs a negative prompt",
        ),
        (lambda: tiny.stable_diffusion(tiny.scheduler("UnCLIPScheduler")), WORDS, "pipe.scheduler: _class_name"),
    ],
)
def test_what_cannot_be(make, given, message):
    with pytest.raises(UsageError, match=message):
        pfode.from_pipeline(make(), **given)


def test_labels_and_guidance_it_does_not_have():
    den = pfode.from_pipeline(tiny.stable_diffusion(ddim()), guidance=1.0, **WORDS)
    with pytest.raises(UsageError, match="takes no label"):
        pfode.sample(den, n=1, steps=2, label=3)
    with pytest.raises(UsageError, match="without a prompt to guide away from"):
        pfode.sample(den, n=1, steps=2, guidance=3.0)


@pytest.mark.parametrize("strength", [0.9, 0.5])
def test_inpainting_equals_the_pipeline(strength, monkeypatch):
    """Of a network without channels for a mask, with the noise of pfode's seeds in place of the pipeline's own.

    At a strength of 1 the pipeline lets its first call see noise alone, pfode the kept part in it.
    """
    scheduler = ddim(timestep_spacing="trailing")
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    cls = diffusers.StableDiffusionInpaintPipeline
    pipe = cls(vae=tiny.vae(), unet=tiny.latent_unet(), scheduler=scheduler, requires_safety_checker=False, **nothing)
    picture = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    hole = torch.zeros(1, 1, 16, 16)
    hole[..., 4:12, 6:14] = 1
    eps = pfode.noise.normal([7, 8], pfode.noise.INITIAL, (4, 8, 8), torch.float32, torch.device("cpu"))
    monkeypatch.setitem(cls.prepare_latents.__globals__, "randn_tensor", lambda *shape, **options: eps)
    options = {"num_inference_steps": 8, "guidance_scale": 3.0, "height": 16, "width": 16, "strength": strength}
    options |= {"image": picture.expand(2, -1, -1, -1), "mask_image": hole, "masked_image_latents": picture}
    wanted = tiny.quiet(pipe)(**two(WORDS), **options, output_type="latent").images
    den = pfode.from_pipeline(tiny.stable_diffusion(ddim()), guidance=3.0, height=16, width=16, **WORDS)
    grid = torch.cat([scheduler.timesteps[-int(8 * strength) :].double(), torch.tensor([-1.0], dtype=torch.float64)])
    got = pfode.sample(den, seeds=[7, 8], sampler="ddim", grid=grid, init=picture[0], mask=den.cells(hole)[0])
    close(got.x, wanted)


def test_pictures_into_latents():
    """The encoder's mean, with every scale and shift, is what decoding begins from."""
    for change in ({}, {"shift_factor": 0.06}, {"latents_mean": [0.1] * 4, "latents_std": [2.0, 3.0, 4.0, 5.0]}):
        pipe = tiny.stable_diffusion(ddim(), vae=tiny.vae(scaling_factor=0.3, **change))
        den = pfode.from_pipeline(pipe, guidance=1.0, **WORDS)
        picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
        latents = den.encode(picture)
        assert latents.shape == (2, 4, 8, 8)
        mean = pipe.vae.encode(picture).latent_dist.mode()
        close(den.decode(latents), pipe.vae.decode(mean).sample.clamp(-1, 1))
        if not change or "shift_factor" in change:
            close(latents, (mean - change.get("shift_factor", 0.0)) * 0.3)
    with pytest.raises(UsageError, match=r"encode: need pictures of shape \(n, 3, 16, 16\)"):
        den.encode(picture[..., 1:])
    hole = torch.zeros(16, 16)
    hole[3, 5] = 1
    assert den.cells(hole).nonzero().tolist() == [[1, 2]]
    with pytest.raises(UsageError, match="cells: need a mask"):
        den.cells(hole[1:])
