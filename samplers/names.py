"""The names that people know recipes and arguments by, beside our own: of families, of classes, of web interfaces."""

import re

__all__ = ["ARGUMENTS", "CLASSES", "FAMILIES", "GRIDS", "squeezed", "with_grid"]

FAMILIES = {  # a family's name -> the member that it means
    "unipc": "unipc2",
    "unip": "unip2",
    "dpm": "dpm-2m",
    "dpm-solver": "dpm-2m",
    "dpm++": "dpm++2m",
    "dpm-solver++": "dpm++2m",
    "deis": "deis-tab3",
    "ipndm": "ipndm4",
    "ipndm-v": "ipndm-v4",
    "exp-ab": "exp-ab2",
    "res": "res-2m",
    "res-multistep": "res-2m",
    "er-sde": "er-sde-3",
    "rk": "rk4",
}


CLASSES = {  # of diffusers -> what they are with their own defaults
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "DPMSolverSDEScheduler": "dpm++sde",
    "DPMSolverSinglestepScheduler": "dpm++2s",
    "EDMDPMSolverMultistepScheduler": "dpm++2m",
    "EDMEulerScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "IPNDMScheduler": "ipndm",
    "KDPM2AncestralDiscreteScheduler": "dpm2-a",
    "KDPM2DiscreteScheduler": "dpm2",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "SASolverScheduler": "sa-solver",
    "UniPCMultistepScheduler": "unipc",
}
ARGUMENTS = {  # what other programs call them -> what they are called here
    "cfg": "guidance", "cfg_scale": "guidance", "guidance_scale": "guidance", "scheduler": "sampler",
    "sampler_name": "sampler", "num_inference_steps": "steps", "num_steps": "steps", "n_samples": "n", "count": "n",
    "num_images": "n", "num_samples": "n", "num_images_per_prompt": "n", "class": "label", "class_label": "label",
    "class_labels": "label", "batch_size": "batch", "image": "init", "init_image": "init",
    "denoising_strength": "strength", "schedule": "grid", "precision": "dtype", "torch_dtype": "dtype",
}  # fmt: skip
GRIDS = {  # the last word of a sampler's name in web interfaces -> the grid that it means
    "karras": "karras",
    "exponential": "log-snr",
    "polyexponential": "polyexponential",
    "beta": "beta",
}


def squeezed(name: str) -> str:
    """A name without what its spellings differ in: "dpm++2s-a" and "sample_dpmpp_2s_ancestral" are both "dpmpp2sa"."""
    plain = re.sub(r"[\s_-]", "", name.lower().replace("++", "pp").replace("ancestral", "a"))
    return re.sub(r"^sample(?=.)|(?<=.)gpu$", "", plain)


def with_grid(name: str) -> tuple[str, str | None]:
    """A name as web interfaces have it without its grid, and the grid: ("DPM++ 2M", "karras") for "DPM++ 2M Karras"."""
    found = re.fullmatch(r"(.*[^\s_-])[\s_-]+([^\W_]+)", name.strip())
    grid = GRIDS.get(found[2].lower()) if found else None
    return (found[1], grid) if found and grid else (name, None)
