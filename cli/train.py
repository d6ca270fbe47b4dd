"""pfode train: train a score network on pictures, with a progress bar, sheets of samples, and checkpoints."""

import re
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pfode import defaults
from pfode.cli.objective import OBJECTIVES, find_objective, find_points, perceptron, usual
from pfode.cli.options import Command, FileName, Finite
from pfode.cli.settings import find_sampler, listed
from pfode.cli.streams import Output, output, printable
from pfode.cli.watch import Stop, duration, stoppable, watch
from pfode.errors import UsageError
from pfode.files import write_atomic

if TYPE_CHECKING:
    import torch

    from pfode.scores.networks.mlp import MLPConfig
    from pfode.scores.networks.unet import UNetConfig
    from pfode.scores.training.config import TrainConfig
    from pfode.scores.training.dataset import Data
    from pfode.scores.training.points import Points
    from pfode.scores.training.trainer import Trainer

__all__ = ["command"]

PROCESSES = {
    "edm": "EDM", "vp": "VP", "flow": "Flow", "ve": "VE", "sub-vp": "SubVP", "vp-cosine": "VPCosine",
}  # fmt: skip
PREDICTIONS = ("edm", "x0", "eps", "v", "flow", "score")
FORMS = "digits|emoji|DIR|FILE.npz|FILE.zip|moons|..."


@click.command(cls=Command, name="train")
@click.option(
    "--data", type=FileName(), default="digits", metavar=FORMS, help="Pictures to train on, or a law of points."
)
@click.option("--objective", type=click.Choice(OBJECTIVES), default="denoising", help="What is minimised.")
@click.option(
    "--weighting", type=click.Choice(["network", "likelihood"]), help="Of the noise levels, for --objective denoising."
)
@click.option(
    "--coupling",
    type=click.Choice(["independent", "assignment", "entropic"]),
    help="Of noise and data within a batch, for --objective flow.",
)
@click.option(
    "--interpolant",
    type=click.Choice(["linear", "trigonometric", "bridge"]),
    help="Between noise and data, for --objective flow.",
)
@click.option("--from-data", metavar="LAW", help="Points at the other end of a flow, instead of noise.")
@click.option("--energy", is_flag=True, help="Let the network of points be the gradient of a scalar.")
@click.option(
    "--size",
    type=click.IntRange(4, 256),
    help="Side in pixels that pictures are resized to. [default: 32 for files of pictures, as they are in arrays]",
)
@click.option(
    "--held-out", type=Finite(0, 0.5), default=0.0, help="Share of the pictures to keep for a loss of its own."
)
@click.option("--name", metavar="TEXT", help="Name of the model. [default: of the data]")
@click.option("--source", metavar="TEXT", help="Where the pictures come from, for the model's card.")
@click.option("--licence", metavar="TEXT", help="Licence of the pictures, for the model's card.")
@click.option("--font", type=FileName(), metavar="FILE", help="Font of the emoji, if not Debian's.")
@click.option("--listing", type=FileName(), metavar="FILE", help="emoji-test.txt, if not Debian's.")
@click.option("--process", type=click.Choice(list(PROCESSES)), default="edm", help="Noise process.")
@click.option(
    "--prediction", type=click.Choice(PREDICTIONS), help="What the network predicts. [default: by the process]"
)
@click.option(
    "--sigma-data",
    type=Finite(0),
    help="Standard deviation of the data, for --prediction edm. [default: measured]",
)
@click.option(
    "--level-mean",
    type=Finite(),
    help="Mean of the logarithm of the noise levels that are trained on. [default: measured]",
)
@click.option("--level-std", type=Finite(0), help="Standard deviation of that logarithm. [default: measured]")
@click.option(
    "--balance/--no-balance", default=True, help="Let every noise level count alike: divide by its mean loss."
)
@click.option("--widths", metavar="LIST", help="Channels of each resolution, such as 32,96,128. [default: by the size]")
@click.option("--blocks", metavar="LIST", help="Residual blocks of each resolution, such as 1,2,2.")
@click.option("--width", type=Finite(0.1, 16), help="Factor on the usual channels, such as 0.5 or 2.")
@click.option("--depth", type=click.IntRange(1, 8), help="Residual blocks at every resolution.")
@click.option("--attention", metavar="LIST", help="Resolutions with self-attention, such as 8,16; 0 for none.")
@click.option("--dropout", type=Finite(0), default=0.0, help="Dropout probability inside the residual blocks.")
@click.option("--steps", type=click.IntRange(1), default=defaults.Train.STEPS, help="Optimiser steps.")
@click.option("--time-budget", metavar="TIME", help="Train for a time, such as 90s, 30m or 1.5h, in place of --steps.")
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=defaults.Train.BATCH,
    help="Pictures per optimiser step, over all processes.",
)
@click.option(
    "--accum",
    type=click.IntRange(1),
    default=defaults.Train.ACCUM,
    help="Parts of a batch whose gradients are accumulated.",
)
@click.option("--lr", type=Finite(0), default=defaults.Train.RATE, help="Peak learning rate.")
@click.option(
    "--schedule",
    type=click.Choice(["cosine", "constant"]),
    default=defaults.Train.SCHEDULE,
    help="Schedule of the learning rate.",
)
@click.option(
    "--warmup", type=click.IntRange(0), default=defaults.Train.WARMUP, help="Steps over which the learning rate rises."
)
@click.option(
    "--cooldown",
    type=click.IntRange(0),
    default=defaults.Train.COOLDOWN,
    help="Last steps, over which a constant rate falls to 0.",
)
@click.option("--clip", type=Finite(0), default=defaults.Train.CLIP, help="Norm to which gradients are clipped.")
@click.option(
    "--ema",
    default=",".join(map(str, defaults.Train.EMA)),
    metavar="LIST",
    help="Widths of the weight averages, as shares of the run.",
)
@click.option("--export-ema", type=Finite(0, 0.25), help="Average that the model takes. [default: the first of --ema]")
@click.option(
    "--drop",
    type=Finite(0),
    default=defaults.Train.DROP,
    help="Probability of hiding the class, which guidance needs.",
)
@click.option(
    "--flip/--no-flip", default=None, help="Mirror half of the pictures. [default: classes that the data set names]"
)
@click.option("--seed", type=click.IntRange(0), default=defaults.Train.SEED, help="Seed of every random number.")
@click.option(
    "--out",
    type=FileName(),
    metavar="DIR|FILE",
    help="Folder of the run, or the model file. [default: runs/DATA-PROCESS]",
)
@click.option("--resume", is_flag=True, help="Continue the run in --out from its last checkpoint.")
@click.option("--save-every", type=click.IntRange(1), default=500, help="Steps between checkpoints.")
@click.option(
    "--sheet-every",
    type=click.IntRange(0),
    default=0,
    help="Steps between sheets of samples; 0 for none.",
)
@click.option("--sheet-sampler", default="auto", metavar="NAME", help="Sampler of the sheets.")
@click.option("--sheet-guidance", type=Finite(), metavar="W", help="Scale of guidance of the sheets.")
@click.option("--tracker", metavar="LIST", help="Experiment trackers of accelerate: tensorboard, wandb ...")
@click.option(
    "--amp/--no-amp", default=None, help="bfloat16 inside the network. [default: where the device is faster in it]"
)
@click.option("--device", default=defaults.DEVICE, metavar="auto|cpu|cuda|mps", help="Device to train on.")
@click.pass_context
def command(ctx: click.Context, **options: Any) -> None:
    """Train a score network on pictures.

    Writes checkpoints, metrics.jsonl and model.safetensors to --out and prints the path of the model. A run that was
    stopped continues with --resume, bit for bit on a CPU. In several processes: `accelerate launch -m pfode.cli train`.
    """
    out = output(ctx)
    usual(ctx, options)
    from pfode.samplers.settle import find_device

    device = find_device(options["device"])
    budget = parse_time(options["time_budget"])
    if budget is not None and ctx.get_parameter_source("steps") is click.core.ParameterSource.COMMANDLINE:
        raise UsageError("--steps and --time-budget exclude each other", "give one of them")
    folder, model = places(options)
    from pfode.scores.training.data import load_data
    from pfode.scores.training.trainer import Trainer

    points = find_points(options)
    if points is None and options["data"] != "digits" and not options["data"].endswith(".npz"):
        network(options, options["size"] or 32, 3, 0)  # what does not fit is said before a thousand pictures are read
    if options["sheet_sampler"] != "auto":
        find_sampler(options["sheet_sampler"])
    if points is not None:
        data, held = points, None
    else:
        pictures = load_data(options["data"], size=options["size"], **emoji_files(options))
        data, held = pictures.split(options["held_out"])
    for key in ("name", "source", "licence"):
        if options[key] is not None:
            data.card[key] = printable(options[key])
    config = configured(options, data, device)
    width = options["export_ema"]
    if width is not None and width not in config.ema:
        raise UsageError(
            f"--export-ema {width:g}: not one of --ema {options['ema']}", f"--export-ema {config.ema[0]:g}"
        )
    trackers = tuple(name.strip() for name in (options["tracker"] or "").split(",") if name.strip())
    trainer = Trainer(
        config,
        data,
        folder,
        resume=options["resume"],
        save_every=options["save_every"],
        device=device.type,
        trackers=trackers,
        held_out=held,
        card=card(data, None),
    )
    try:
        if trainer.main:
            introduce(trainer, options, out)
        sheets = {"every": options["sheet_every"], "sampler": options["sheet_sampler"]}
        sheets |= {"guidance": options["sheet_guidance"]}
        with stoppable(trainer.accelerator.num_processes == 1) as stop:
            loss = watch(trainer, out, stop, budget, sheets)
            if stop.number is not None:
                interrupted(trainer, stop, out)
        if trainer.main:
            finish(trainer, model, width, loss, out)
    finally:
        trainer.close()


def interrupted(trainer: "Trainer", stop: Stop, out: Output) -> None:
    """Keep what was done, say how it goes on, and end as the signal asks.

    Raises:
        KeyboardInterrupt, SystemExit: always.
    """
    place = trainer.save()
    again = [word for word in sys.argv[1:] if word != "--resume"]
    out.note(f"stopped after step {trainer.step}, kept in {place}; it goes on with")
    out.note(shlex.join(["pfode", *again, "--resume"]))
    if stop.number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(143)


def finish(trainer: "Trainer", model: Path, width: float | None, loss: float | None, out: Output) -> None:
    """Write the model, say how well it answers, and what to do next."""
    from pfode.scores.training.points import Points

    levels, held = trainer.levels(), trainer.held_out_loss()
    about = card(trainer.data, loss) | {"loss_by_level": levels}
    done: dict[str, Any] = {"steps": trainer.step, "loss": loss}
    if held is not None:
        about["held_out_loss"], about["training_loss"] = (float(f"{value:.4g}") for value in held)
        done["held_out_loss"], done["training_loss"] = held
        out.note(f"loss on held-out pictures {held[0]:.4f}, on as many of those trained on {held[1]:.4f}")
    path = trainer.export(model, about, width)
    shown = levels[:: max(1, len(levels) // 8)]
    out.note("loss by noise level, from sigma: " + ", ".join(f"{row['from']:.2g}: {row['loss']:.2g}" for row in shown))
    name = str(path if model.suffix != ".safetensors" else model)
    next_ = shlex.join(["pfode", "sample", "--model", name])
    if isinstance(trainer.data, Points):
        done |= drawn(trainer, width, out)
        next_ = f"python -c \"import pfode; print(pfode.sample(pfode.load('{name}'), n=8).x)\""
    out.note(f"{duration(trainer.seconds)} of training; next: {next_}")
    done |= {"seconds": round(trainer.seconds, 1), "run": str(trainer.folder), "loss_by_level": levels, "next": next_}
    out.emit({"out": str(path), **done}, str(path))


def drawn(trainer: "Trainer", width: float | None, out: Output) -> dict[str, Any]:
    """Draw a model of points beside its data, and say how likely fresh points are to it."""
    from pfode.cli import plane
    from pfode.scores.training.points import Points

    assert trainer.folder is not None
    den, data, found = trainer.denoiser(width).to("cpu"), trainer.data, {}
    assert isinstance(data, Points)
    measured = plane.describe(den, data)
    if measured is not None:
        found, line = measured
        out.note(line)
    picture = trainer.folder / "points.png"
    write_atomic(picture, plane.draw(den, data))
    out.note(f"data, samples, density and paths: {picture}")
    return {**found, "picture": str(picture)}


def emoji_files(options: dict[str, Any]) -> dict[str, Path]:
    """The font and the list of the emoji."""
    from pfode.scores.training.data import EMOJI_FONT, EMOJI_LIST

    return {"font": Path(options["font"] or EMOJI_FONT), "listing": Path(options["listing"] or EMOJI_LIST)}


def introduce(trainer: "Trainer", options: dict[str, Any], out: Output) -> None:
    """Say what is trained on what, what was left out, and where the run goes on."""
    data = trainer.data
    for reason, count in data.left_out.items():
        out.note(f"left out: {count} {reason}")
    if data.names:
        shown = ", ".join(data.names[:10]) + (", ..." if len(data.names) > 10 else "")
        out.note(f"{len(data.names)} classes: {shown}")
    for error in trainer.damaged:
        out.note(f"damaged, passed over: {error.message}")
    begin = f", continuing after step {trainer.step}" if trainer.step else ""
    if options["resume"] and not trainer.step:
        begin = ", no checkpoint there: from the start"
    count = sum(p.numel() for p in trainer.net.parameters())
    kind = f"{len(data)} pictures" if hasattr(data, "images") else f"points of {data.card.get('name')}"
    out.note(
        f"{kind} of {data.shape}, {count:,} parameters, "
        f"{trainer.config.prediction} on {options['process']}, {trainer.folder}{begin}"
    )


def configured(options: dict[str, Any], data: "Data | Points", device: "torch.device") -> "TrainConfig":
    """The options as a `TrainConfig`.

    Raises:
        UsageError: a value out of range.
    """
    from pfode import process
    from pfode.scores.training.config import TrainConfig
    from pfode.scores.training.measure import measure
    from pfode.scores.training.points import Points
    from pfode.scores.training.trainer import fast_bfloat16

    found = measure(data)
    own = options["level_mean"] is not None or options["level_std"] is not None
    how = PROCESSES[options["process"]]
    flips = {None: tuple(data.card.get("flip", ())), True: ("*",), False: ()}
    return TrainConfig(
        network=network_of(options, data),
        process=process.PROCESSES[how]().config(),
        prediction=options["prediction"] or "",
        sigma_data=found.sigma_data if options["sigma_data"] is None else options["sigma_data"],
        levels="lognormal" if own else "uniform" if options["objective"] in ("flow", "likelihood") else "",
        level_mean=found.level_mean if options["level_mean"] is None else options["level_mean"],
        level_std=found.level_std if options["level_std"] is None else options["level_std"],
        balance=options["balance"],
        steps=options["steps"],
        batch=options["batch"],
        accum=options["accum"],
        rate=options["lr"],
        schedule=options["schedule"],
        warmup=options["warmup"],
        cooldown=options["cooldown"],
        ema=fractions("--ema", options["ema"]),
        drop=options["drop"],
        flip=flips[options["flip"]],
        clip=options["clip"],
        seed=options["seed"],
        amp=fast_bfloat16(device) and not isinstance(data, Points) if options["amp"] is None else options["amp"],
        objective=find_objective(options),
    )


def network_of(options: dict[str, Any], data: "Data | Points") -> "UNetConfig | MLPConfig":
    """The network of the options, for these data."""
    from pfode.scores.training.points import Points

    if isinstance(data, Points):
        return perceptron(options, data, None if options["widths"] is None else numbers("--widths", options["widths"]))
    channels, size, _ = data.shape
    styles = 0 if data.styles is None else data.styles.shape[1]
    return network(options, size, channels, len(data.names), styles)


def network(options: dict[str, Any], size: int, channels: int, classes: int, styles: int = 0) -> "UNetConfig":
    """The network of the options, or the usual one for pictures of this size.

    Raises:
        UsageError: a value out of range.
    """
    from pfode.scores.training.config import usual_network

    def given(name: str) -> tuple[int, ...] | None:
        text = options[name]
        return None if text is None else numbers(f"--{name}", text)

    attention = given("attention")
    if attention is not None:
        attention = tuple(side for side in attention if side)
    how: dict[str, Any] = {"widths": given("widths"), "blocks": given("blocks"), "attention": attention}
    for name, other in (("width", "widths"), ("depth", "blocks")):
        if options[name] is not None and how[other] is not None:
            raise UsageError(f"--{name} and --{other} exclude each other", "give one of them")
    if options["width"] is not None:
        usual = usual_network(size, channels, classes).widths
        how["widths"] = tuple(max(8, round(width * options["width"] / 8) * 8) for width in usual)
    if options["depth"] is not None:
        levels = len(how["widths"] or usual_network(size, channels, classes).widths)
        how["blocks"] = (options["depth"],) * levels
    return usual_network(size, channels, classes, **how, dropout=options["dropout"], styles=styles)


def parse_time(text: str | None) -> float | None:
    """Seconds of a time such as "90s", "30m" or "1.5h"; None for None.

    Raises:
        UsageError: no such time.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,7}(?:\.\d{1,6})?)\s*(s|m|min|h)", text.strip())
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2][0]] if found else 0.0
    if not seconds > 0:
        raise UsageError(f"--time-budget: cannot read {text!r:.60}", "--time-budget 30m (or 90s, 1.5h)")
    return seconds


def numbers(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    return listed(name, text, int, "whole numbers", f"{name} 4,8")


def fractions(name: str, text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    return listed(name, text, float, "numbers", f"{name} 0.05,0.1")


def places(options: dict[str, Any]) -> tuple[Path, Path]:
    """The folder of the run and the file of the model."""
    name = options["out"]
    if name is None:
        name = f"runs/{Path(options['data']).stem or 'data'}-{options['process']}"
    path = Path(name)
    if path.suffix == ".safetensors":
        return path.with_suffix(""), path
    return path, path / "model.safetensors"


def card(data: "Data | Points", loss: float | None) -> dict[str, Any]:
    """What the model file says about its making."""
    return {
        "name": data.card.get("name", "model"),
        "licence": f"data: {data.card.get('licence', 'unknown')}",
        "command": printable(shlex.join(["pfode", *sys.argv[1:]])),
        "loss": None if loss is None else float(f"{loss:.4g}"),
    }
