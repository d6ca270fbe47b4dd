"""The help pages: options in groups, examples, and the page of `pfode` itself with what every command shares."""

import os

import click

from pfode.cli.codes import describe_codes

__all__ = ["COMPLETION", "EPILOG", "EXAMPLES", "GROUPS", "colour_of", "write_examples", "write_options"]

COMPLETION = {
    "bash": 'eval "$(_PFODE_COMPLETE=bash_source pfode)"', "zsh": 'eval "$(_PFODE_COMPLETE=zsh_source pfode)"',
    "fish": "_PFODE_COMPLETE=fish_source pfode | source",
}  # fmt: skip
EPILOG = f"""\b
Where the value of an option comes from, the strongest first:
        its flag, PFODE_<OPTION> in the environment, --config FILE.toml,
        [tool.pfode] in ./pfode.toml, the default.
        `pfode info config` shows each value and where it comes from.
Completion of commands, options and their values, for the start-up file of a shell:
{chr(10).join(f"  {shell:<4} {line}" for shell, line in COMPLETION.items())}
Exit codes:
{describe_codes()}
"""
SHARED, OTHERS = "Every command", "Other options"
OF_ALL = ("config", "json", "quiet", "debug", "trust_python", "help", "_click_default_help")
TO_IMAGE = ("prompt", "negative_prompt", "size", "true_cfg", "variant", "base", "tiling")
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {  # by command and heading, the options by their names in Python
    "sample": {
        "What is drawn": (
            "model", "text", "n", "seed", "seeds", "label", "like", "init", "mask", "strength",
        ),
        "Text to image": TO_IMAGE,
        "Steps and samplers": (
            "steps", "nfe", "sampler", "fitted", "calibrate", "grid", "chart", "rtol", "atol", "eta", "set",
            "lower_order_final", "afs", "brownian",
        ),
        "Guidance": ("guidance", "negative", "guidance_interval", "guidance_rescale"),
        "What is written and shown": (
            "out", "scale", "open", "preview", "trajectory", "separate", "overwrite", "nan",
        ),
        "Where it runs": ("device", "dtype", "batch"),
    },
    "train": {
        "Data": ("data", "size", "held_out", "name", "source", "licence", "font", "listing", "flip"),
        "Noise and objective": (
            "objective", "process", "prediction", "sigma_data", "levels", "level_mean", "level_std", "balance",
            "weighting", "coupling", "interpolant", "from_data", "drop",
        ),
        "Network": ("width", "depth", "widths", "blocks", "attention", "dropout", "energy"),
        "Optimiser": (
            "steps", "time_budget", "batch", "accum", "lr", "schedule", "warmup", "cooldown", "clip", "ema",
            "export_ema", "seed",
        ),
        "The run": (
            "out", "resume", "save_every", "keep", "sheet_every", "sheet_sampler", "sheet_guidance", "tracker",
        ),
        "Where it runs": ("device", "amp"),
    },
    "reflow": {
        "What is trained": ("pairs", "nfe", "steps", "batch", "lr", "seed"),
        "The run": ("out", "resume"),
        "Where it runs": ("device",),
    },
    "likelihood": {
        "Whose": ("data", "n", "against", "label", "guidance"),
        "How": ("probes", "rtol", "end", "bins", "draws", "elbo", "seed"),
        "What is written": ("out", "overwrite"),
        "Where it runs": ("device", "batch"),
    },
    "fit": {
        "What is fitted": (
            "model", "nfe", "start", "grid", "chart", "parameterisation", "time_only", "label", "guidance",
        ),
        "Text to image": TO_IMAGE,
        "How": ("loss", "iterations", "n", "active", "check", "teacher", "seed"),
        "Tuning by gradients": ("tune", "tune_steps", "tune_batch", "checkpoint"),
        "What is written": ("out", "overwrite"),
        "Where it runs": ("device", "dtype", "batch"),
    },
    "bench": {
        "What is measured": ("model", "sampler", "nfe", "n", "seed", "validation", "teacher", "truth", "features"),
        "Text to image": (*TO_IMAGE, "guidance"),
        "What is written": ("out", "overwrite"),
        "Where it runs": ("device", "batch"),
    },
}  # fmt: skip
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "": (
        ("pfode sample", "a sheet of pictures from the default model, sheet.png"),
        ("pfode train --data FOLDER", "a network of your own pictures"),
        ("pfode sample --help", "the page of a command"),
    ),
    "sample": (
        ("pfode sample --open", "a sheet of every class, shown"),
        ("pfode sample --text PFODE --seed 7", "a word in a typeface that does not exist"),
        ("pfode sample --label 3 --model digits --n 16 --guidance 2 --out three.png", "one class, more of it"),
        ("pfode sample --nfe 8 --sampler 'DPM++ 2M Karras'", "another sampler, at most 8 network calls"),
        ("pfode sample --model ./sdxl --prompt 'a red bicycle' --size 1024", "text to image, by diffusers' models"),
        ("pfode sample --like sheet.png --seed 40", "the settings of a picture, other seeds"),
        ("pfode sample --model mynet:net --separate pictures --n 1000", "a network of your own, picture by picture"),
    ),
    "train": (
        ("pfode train --data digits --process flow", "a minute, to see how it goes"),
        ("pfode train --data FOLDER --size 32 --steps 20000 --out runs/mine", "a sub-folder per class"),
        ("pfode train --data FOLDER --size 32 --steps 20000 --out runs/mine --resume", "go on after a stop"),
    ),
    "reflow": (
        ("pfode train --data digits --process flow --out runs/flow", "first a flow"),
        ("pfode reflow runs/flow/model.safetensors --pairs 5000 --steps 1000", "then a straighter one"),
    ),
    "likelihood": (
        ("pfode likelihood digits --data digits-test --n 8", "bits per dimension of eight pictures"),
        ("pfode likelihood digits --data digits-test --n 8 --label all", "which class each one is"),
        ("pfode likelihood avatars a.png b.png --out found", "of files; a sheet and a histogram in found"),
        ("pfode likelihood digits --data digits-test --against digits-train", "two sets, and their AUROC"),
    ),
    "fit": (
        ("pfode fit --model digits --nfe 4,6,8", "plans/digits.plan-4.safetensors ..."),
        ("pfode fit --model avatars@2 --nfe 6", "for guidance of scale 2"),
        ("pfode sample --model digits --sampler plans/digits.plan-6.safetensors", "draw with one"),
    ),
    "convert": (
        ("pfode convert FOLDER model.safetensors", "a pipeline of diffusers"),
        ("pfode convert edm-cifar10-32x32-cond-vp.pkl cifar10.safetensors --dtype fp16", "a network of EDM"),
    ),
    "info": (
        ("pfode info models", "the models that come with pfode"),
        ("pfode info sheet.png", "how a picture was made, and the command that makes it again"),
        ("pfode info config", "every option's value and where it comes from"),
    ),
    "samplers": (
        ("pfode samplers", "all of them"),
        ("pfode samplers dpm++2m", "one in full, with its options"),
        ("pfode samplers auto", "what auto takes"),
    ),
    "bench": (
        ("pfode bench --model digits --nfe 4,8 --n 32", "a quick look: bench/report.html"),
        ("pfode bench --model digits --sampler auto --sampler 'diffusers:UniPCMultistepScheduler?grid=best'", "a peer"),
        ("pfode bench --model mynet:net --sampler plans --nfe 4,6,8", "plans of your own network"),
    ),
}  # fmt: skip


def colour_of(environment: "os._Environ[str] | dict[str, str]") -> bool | None:
    """Whether to colour: never where NO_COLOR says so or the terminal is dumb; None: where the stream is a terminal."""
    return False if environment.get("NO_COLOR") or environment.get("TERM") == "dumb" else None


def write_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """The options of a command in its groups; those that no group names stand in one of their own."""
    records = {}
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
        if record is not None and param.name:
            records[param.name] = (click.style(record[0], fg="cyan"), record[1])
    groups = {
        name: [key for key in keys if key in records] for name, keys in GROUPS.get(command.name or "", {}).items()
    }
    named = {key for keys in groups.values() for key in keys} | set(OF_ALL)
    groups[OTHERS if groups else "Options"] = [key for key in records if key not in named]
    groups[SHARED] = [key for key in records if key in OF_ALL]
    for heading, keys in groups.items():
        if keys:
            with formatter.section(click.style(heading, bold=True)):
                formatter.write_dl([records[key] for key in keys], col_max=34)


def write_examples(name: str, formatter: click.HelpFormatter) -> None:
    """The examples of a command, each above what it does."""
    if name not in EXAMPLES:
        return
    with formatter.section(click.style("Examples", bold=True)):
        for line, what in EXAMPLES[name]:
            formatter.write(f"{'':>{formatter.current_indent}}{click.style(line, fg='cyan')}\n")
            formatter.write(f"{'':>{formatter.current_indent}}    {what}\n")
