"""What a safetensors file is that pfode did not write, told by the names of its tensors, without importing torch."""

from pfode.header import Header
from pfode.scores.io.layout import TEXT_PIPELINES

__all__ = ["kind", "pipeline_of"]

SINGLE_FILE = "it takes a prompt: pfode.load(FILE, prompt='a cat', base=FOLDER), or diffusers.{}.from_single_file(FILE)"
FOLDER = "give the folder that diffusers saved, with its config.json"
# beginnings of names that are there, what the file is then, and what to do with it; the first that fits
_KINDS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("model.diffusion_model.joint_blocks.",),
        "a single-file checkpoint of Stable Diffusion 3",
        SINGLE_FILE.format("StableDiffusion3Pipeline"),
    ),
    (
        ("model.diffusion_model.", "conditioner.embedders."),
        "a single-file checkpoint of Stable Diffusion XL",
        SINGLE_FILE.format("StableDiffusionXLPipeline"),
    ),
    (
        ("model.diffusion_model.",),
        "a single-file checkpoint of Stable Diffusion",
        SINGLE_FILE.format("StableDiffusionPipeline"),
    ),
    (
        ("double_blocks.", "single_blocks."),
        "a single-file checkpoint of Flux",
        SINGLE_FILE.format("FluxPipeline"),
    ),
    (("first_stage_model.",), "a single-file autoencoder", FOLDER),
    (("down_blocks.", "conv_in."), "the weights of a network of diffusers", FOLDER),
    (("transformer_blocks.",), "the weights of a transformer of diffusers", FOLDER),
    (("encoder.", "decoder."), "the weights of an autoencoder", FOLDER),
    (("text_model.",), "the weights of a text encoder", ""),
)


def kind(header: Header) -> tuple[str, str]:
    """What the file is, and what to do with it; two empty texts where it is not known."""
    names = list(header.entries)
    if any(".lora_" in name or name.startswith("lora_") for name in names):
        return "a file of LoRA weights", "pipe.load_lora_weights(FILE); pfode.from_pipeline(pipe, prompt=...)"
    for beginnings, what, hint in _KINDS:
        if all(any(name.startswith(start) for name in names) for start in beginnings):
            return what, hint
    return "", ""


def pipeline_of(header: Header) -> str | None:
    """The class of diffusers that a single-file checkpoint is a pipeline of; None for any other file."""
    hint = kind(header)[1]
    return next((name for name in TEXT_PIPELINES if hint == SINGLE_FILE.format(name)), None)
