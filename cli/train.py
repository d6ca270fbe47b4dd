"""pfode train: train a score network on pictures, with a progress bar, sheets of samples, and checkpoints."""

import io
import shlex
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import pfode
from pfode import defaults
from pfode.cli.options import Command, FileName, Finite
from pfode.cli.settings import listed
from pfode.cli.streams import Output, output, printable
from pfode.files import write_atomic

if TYPE_CHECKING:
    import torch

    from pfode.scores.networks.unet import UNetConfig
    from pfode.scores.training.config import TrainConfig
    from pfode.scores.training.dataset import Data
    from pfode.scores.training.trainer import Trainer

__all__ = ["command"]

PROCESSES = {
    "edm": "EDM", "vp": "VP", "flow": "Flow", "ve": "VE", "sub-vp": "SubVP", "vp-cosine": "VPCosine",
}  # fmt: skip
PREDICTIONS = ("edm", "x0", "eps", "v", "flow", "score")
SHEET_STEPS = 12
FORMS = "digits|emoji|DIR|FILE.npz|FILE.zip"


@click.command(cls=Command, name="train")
@click.option("--data", type=FileName(), default="digits", metavar=FORMS, help="Pictures to train on.")
@click.option(
    "--size",
    type=click.IntRange(4, 256),
    default=32,
    help="Side in pixels that pictures of files are resized to.",
)
@click.option("--font", type=FileName(), metavar="FILE", help="Font of the emoji, if not Debian's.")
@click.option("--listing", type=FileName(), metavar="FILE", help="emoji-test.txt, if not Debian's.")
@click.option("--process", type=click.Choice(list(PROCESSES)), default="edm", help="Noise process.")
@click.option(
    "--prediction", type=click.Choice(PREDICTIONS), help="What the network predicts. [default: by the process]"
)
@click.option(
    "--sigma-data",
    type=Finite(0),
    default=defaults.Train.SIGMA_DATA,
    help="Standard deviation of the data, for --prediction edm.",
)
@click.option("--widths", metavar="LIST", help="Channels of each resolution, such as 32,96,128. [default: by the size]")
@click.option("--blocks", metavar="LIST", help="Residual blocks of each resolution, such as 1,2,2.")
@click.option("--attention", metavar="LIST", help="Resolutions with self-attention, such as 8,16; 0 for none.")
@click.option("--dropout", type=Finite(0), default=0.0, help="Dropout probability inside the residual blocks.")
@click.option("--steps", type=click.IntRange(1), default=defaults.Train.STEPS, help="Optimiser steps.")
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
    help="Widths of the weight averages, as shares of the run; the first is exported.",
)
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
    from pfode.samplers.settle import find_device

    device = find_device(options["device"])
    folder, model = places(options)
    from pfode.scores.training.data import EMOJI_FONT, EMOJI_LIST, load_data
    from pfode.scores.training.trainer import Trainer

    if options["data"] != "digits" and not options["data"].endswith(".npz"):
        network(options, options["size"], 3, 0)  # a size that does not fit is said before a thousand pictures are read
    font, listing = Path(options["font"] or EMOJI_FONT), Path(options["listing"] or EMOJI_LIST)
    data = load_data(options["data"], size=options["size"], font=font, listing=listing)
    config = configured(options, data, device)
    trackers = tuple(name.strip() for name in (options["tracker"] or "").split(",") if name.strip())
    trainer = Trainer(
        config,
        data,
        folder,
        resume=options["resume"],
        save_every=options["save_every"],
        device=device.type,
        trackers=trackers,
    )
    try:
        if trainer.main:
            introduce(trainer, options, out)
        loss = train(trainer, options["sheet_every"], out)
        if trainer.main:
            path = trainer.export(model, card(data, loss))
            done = {"out": str(path), "steps": trainer.step, "loss": loss}
            out.emit({**done, "seconds": round(trainer.seconds, 1), "run": str(folder)}, str(path))
    finally:
        trainer.close()


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
    out.note(
        f"{len(data)} pictures of {data.shape}, {count:,} parameters, "
        f"{trainer.config.prediction} on {options['process']}, {trainer.folder}{begin}"
    )


def train(trainer: "Trainer", sheet_every: int, out: Output) -> float | None:
    """Run to the end under a bar; the mean loss of the last steps, None if there were none."""
    from tqdm import tqdm

    hidden = out.quiet or not trainer.main or not sys.stderr.isatty()
    losses: deque[float] = deque(maxlen=200)
    with tqdm(total=trainer.config.steps, initial=trainer.step, disable=hidden, unit="step", dynamic_ncols=True) as bar:
        for record in trainer.run():
            losses.append(record.loss)
            mean = sum(losses) / len(losses)
            bar.set_postfix_str(f"loss {mean:.4f}, {record.images_per_second:.0f} images/s", refresh=False)
            bar.update()
            if trainer.main and sheet_every and record.step % sheet_every == 0:
                draw(trainer, record.step)
    return sum(losses) / len(losses) if losses else None


def draw(trainer: "Trainer", step: int) -> None:
    """A sheet of samples from the average so far: every class in turn, the same seeds each time."""
    from PIL import Image

    from pfode.cli import images

    assert trainer.folder is not None
    den = trainer.denoiser()
    classes = len(trainer.data.names)
    n = 4 * classes if 1 < classes <= 20 else 64
    label = [i % classes for i in range(n)] if classes else None
    x = pfode.sample(den, n=n, steps=SHEET_STEPS, label=label, nan="flag").x.nan_to_num()
    pixels = images.to_pixels(x)
    columns = images.sheet_columns(n, classes)
    sheet = images.contact_sheet(pixels, images.default_scale(n, *trainer.data.shape[1:], columns), columns)
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "PNG")
    write_atomic(trainer.folder / f"sheet-{step:06d}.png", stream.getvalue())


def configured(options: dict[str, Any], data: "Data", device: "torch.device") -> "TrainConfig":
    """The options as a `TrainConfig`.

    Raises:
        UsageError: a value out of range.
    """
    from pfode import process
    from pfode.scores.training.config import TrainConfig
    from pfode.scores.training.trainer import fast_bfloat16

    channels, size, _ = data.shape
    flips = {None: tuple(data.card.get("flip", ())), True: ("*",), False: ()}
    return TrainConfig(
        network=network(options, size, channels, len(data.names)),
        process=process.PROCESSES[PROCESSES[options["process"]]]().config(),
        prediction=options["prediction"] or "",
        sigma_data=options["sigma_data"],
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
        amp=fast_bfloat16(device) if options["amp"] is None else options["amp"],
    )


def network(options: dict[str, Any], size: int, channels: int, classes: int) -> "UNetConfig":
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
    return usual_network(size, channels, classes, **how, dropout=options["dropout"])


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


def card(data: "Data", loss: float | None) -> dict[str, Any]:
    """What the model file says about its making."""
    return {
        "name": data.card.get("name", "model"),
        "licence": f"data: {data.card.get('licence', 'unknown')}",
        "command": printable(shlex.join(["pfode", *sys.argv[1:]])),
        "loss": None if loss is None else float(f"{loss:.4g}"),
    }
