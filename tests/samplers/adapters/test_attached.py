"""Tuned plans in pipelines: the same samples as by pfode itself, and nothing left behind."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch

import pfode
from pfode.errors import UsageError
from pfode.samplers import PFODEScheduler, fit_plan
from tests.scores import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
QUICK = {
    "n": 8, "active": 8, "check": 8, "teacher": 8, "iterations": 1, "start": "ddim", "tune": True, "tune_steps": 4,
    "tune_batch": 8,
}  # fmt: skip


class Made:
    """A pipeline, its denoiser, and a plan of three calls tuned to it, in a file."""

    def __init__(self, folder: Any):
        pytest.importorskip("transformers")
        scheduler = tiny.scheduler("DDIMScheduler", clip_sample=False, beta_schedule="scaled_linear")
        self.pipe = tiny.stable_diffusion(scheduler)
        self.words = {"prompt_embeds": tiny.words(1), "negative_prompt_embeds": tiny.words(2), "guidance": 3.0}
        self.denoiser = pfode.from_pipeline(self.pipe, **self.words)
        plan = fit_plan(self.denoiser, 3, **QUICK)
        draw = torch.Generator().manual_seed(1)
        tune = {name: 0.3 * torch.randn(value.shape, generator=draw) for name, value in plan.tune.items()}
        self.plan = dataclasses.replace(plan, tune=tune)  # more than four steps learn
        self.file = str(self.plan.save(folder / "sd.tuned-3.safetensors"))
        self.x = torch.randn(2, 4, 8, 8, generator=draw)

    def scheduler(self) -> PFODEScheduler:
        self.pipe.scheduler = PFODEScheduler.from_config(
            tiny.scheduler("DDIMScheduler", clip_sample=False, beta_schedule="scaled_linear").config, sampler=self.file
        )
        return self.pipe.scheduler

    def draw(self) -> torch.Tensor:
        words = {key: value for key, value in self.words.items() if key != "guidance"}
        return self.pipe(
            **words, guidance_scale=3.0, latents=self.x.clone(), num_images_per_prompt=2, num_inference_steps=3,
            output_type="latent", return_dict=False,
        )[0]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("tuned"))


def test_the_same_samples_as_by_pfode(made):
    wanted = pfode.run(made.plan, made.denoiser, made.x)
    plain = pfode.run(dataclasses.replace(made.plan, tune={}), made.denoiser, made.x)
    assert (wanted - plain).abs().max() > 0.01
    scheduler = made.scheduler()
    with scheduler.attach(made.pipe.unet):
        first, again = made.draw(), made.draw()
    assert torch.allclose(first, wanted, atol=1e-4)
    assert torch.equal(first, again)


def test_without_it_the_run_is_refused(made):
    scheduler = made.scheduler()
    with pytest.raises(UsageError, match=r"is tuned(.|\n)*scheduler.attach"):
        made.draw()
    attached = scheduler.attach(made.pipe.unet)
    made.draw()
    attached.detach()
    with pytest.raises(UsageError, match="is tuned"):
        made.draw()
    assert not any(module._forward_hooks for module in made.pipe.unet.modules())


def test_attached_twice_counts_once(made):
    scheduler = made.scheduler()
    with scheduler.attach(made.pipe.unet):
        once = made.draw()
        with scheduler.attach(made.pipe.unet):
            assert torch.equal(made.draw(), once)


def test_a_network_that_was_not_asked_for_the_row(made):
    scheduler = made.scheduler()
    with scheduler.attach(made.pipe.unet):
        scheduler.set_timesteps(3)
        with pytest.raises(UsageError, match="row 0 of a tuned plan"):
            scheduler.step(made.x, scheduler.timesteps[0], made.x)
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps[:2]:
            out = made.pipe.unet(made.x, scheduler.timesteps[0], tiny.words(1).expand(2, -1, -1)).sample
            scheduler.step(out, t, made.x)
        with pytest.raises(UsageError, match="row 2 of a tuned plan"):
            scheduler.step(made.x, scheduler.timesteps[2], made.x)


def test_a_copy_is_attached_to_nothing(made):
    scheduler = made.scheduler()
    with scheduler.attach(made.pipe.unet):
        for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
            with pytest.raises(UsageError, match="is tuned"):
                other.set_timesteps(3)


def test_other_networks(made):
    scheduler = made.scheduler()
    changed = copy.deepcopy(made.pipe.unet)
    changed.conv_out.bias.data += 1
    with pytest.raises(UsageError, match="its weights are others"):
        scheduler.attach(changed)
    with pytest.raises(UsageError, match="it has no layer"):
        scheduler.attach(torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match="need the pipeline's network, got StableDiffusionPipeline"):
        scheduler.attach(made.pipe)
    with pytest.raises(UsageError, match="only tuned plans"):
        PFODEScheduler(sampler="ddim").attach(made.pipe.unet)
