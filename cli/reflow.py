"""pfode reflow: train a flow again on its own pairs of noise and data, so that its paths get straight."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import pfode
from pfode import defaults
from pfode.cli.options import Command, FileName, Finite
from pfode.cli.streams import output
from pfode.errors import UsageError

if TYPE_CHECKING:
    from pfode.scores.training.points import Points

__all__ = ["command"]


@click.command(cls=Command, name="reflow")
@click.argument("model", type=FileName(), metavar="MODEL")
@click.option("--pairs", type=click.IntRange(1, 10**7), default=20_000, help="Pairs of noise and data to make.")
@click.option("--nfe", type=click.IntRange(1, 10_000), default=50, help="Denoiser calls for each pair.")
@click.option("--steps", type=click.IntRange(1), default=defaults.Train.STEPS, help="Optimiser steps.")
@click.option("--batch", type=click.IntRange(1), default=defaults.Train.BATCH, help="Pairs per optimiser step.")
@click.option("--lr", type=Finite(0), default=defaults.Train.RATE, help="Peak learning rate.")
@click.option("--seed", type=click.IntRange(0), default=defaults.Train.SEED, help="Seed of the pairs and of the run.")
@click.option("--out", type=FileName(), metavar="DIR", help="Folder of the run. [default: runs/MODEL-reflow]")
@click.option("--resume", is_flag=True, help="Continue the run in --out from its last checkpoint.")
@click.option("--device", default=defaults.DEVICE, metavar="auto|cpu|cuda|mps", help="Device to train on.")
@click.pass_context
def command(ctx: click.Context, **options: Any) -> None:
    """Train a flow again on its own pairs, which straightens its paths (Liu et al. 2023).

    MODEL is one that `pfode train --process flow` made. The noise of the pairs is keyed by seeds: the same pairs come
    again wherever they are made. Writes model.safetensors to --out and prints its path.
    """
    out = output(ctx)
    from pfode.samplers.settle import find_device
    from pfode.scores.io.load import load
    from pfode.scores.training.trainer import Trainer

    device = find_device(options["device"])
    den = load(options["model"])
    if den.prediction != "flow" or den.process != pfode.Flow():
        got = f"{options['model']}: prediction {den.prediction!r} on {den.process}"
        raise UsageError(f"{got}: reflow straightens velocities", "pfode train --process flow --objective flow")
    out.note(f"{options['pairs']:,} pairs of {options['nfe']} calls")
    data = pairs(den, options)
    folder = Path(options["out"] or f"runs/{Path(options['model']).stem}-reflow")
    trainer = Trainer(configured(den, data, options), data, folder, resume=options["resume"], device=device.type)
    try:
        if not trainer.step:
            trainer.begin(den.net.state_dict())
        before = straightness(den, data)
        losses = [record.loss for record in trainer.run()]
        if trainer.main:
            after = straightness(trainer.denoiser(), data)
            out.note(f"E|v|^2 - E|x_1 - x_0|^2 over the paths, relative: {before:.3f} before, {after:.3f} now")
            path = trainer.export(folder / "model.safetensors", {"name": f"{Path(options['model']).stem}-reflow"})
            loss = sum(losses[-200:]) / len(losses[-200:]) if losses else None
            done = {"steps": trainer.step, "loss": loss, "curvature_before": before, "curvature": after}
            out.emit({"out": str(path), **done}, str(path))
    finally:
        trainer.close()


def pairs(den: Any, options: dict[str, Any]) -> "Points":
    """Noise by seeds, and where the flow takes it; classes in turn where there are some."""
    import hashlib

    from pfode import noise
    from pfode.scores.training.points import Points

    n, names = options["pairs"], tuple(den.labels or ())
    x1 = noise.normal(range(options["seed"], options["seed"] + n), 0, den.shape)
    import torch

    label = torch.arange(n) % len(names) if names else None
    x0 = pfode.sample(den, nfe=options["nfe"], x=x1, label=label).x
    digest = hashlib.sha256(x0.contiguous().numpy().data).hexdigest()
    card = {"name": f"pairs of {Path(options['model']).name}", "count": n, "sha256": digest}
    return Points(x0, pairs=x1, card=card, labels=label, names=names)


def configured(den: Any, data: "Points", options: dict[str, Any]) -> Any:
    """The configuration of the run: the model's network, flow matching on given pairs."""
    from pfode.scores.training.config import TrainConfig
    from pfode.scores.training.coupling import Given
    from pfode.scores.training.objectives import FlowMatching

    network = getattr(den.net, "config", None)
    if network is None or not hasattr(network, "to_json"):
        raise UsageError(
            f"{options['model']}: a network of another kind, {type(den.net).__name__}, is not trained here"
        )
    return TrainConfig(
        network=network,
        process=pfode.Flow().config(),
        prediction="flow",
        levels="uniform",
        steps=options["steps"],
        batch=options["batch"],
        rate=options["lr"],
        drop=defaults.Train.DROP if data.names else 0.0,
        seed=options["seed"],
        objective=FlowMatching(Given()),
    )


def straightness(den: Any, data: "Points") -> float:
    """int E|v|^2 dt along the ODE's own paths over E|x_1 - x_0|^2, minus 1: 0 for straight paths at constant speed."""
    import torch

    assert data.pairs is not None
    steps, x = 20, data.pairs[:256]
    label = None if data.labels is None else data.labels[:256]
    ways = pfode.sample(
        den, steps=steps, x=x, label=label, sampler="ipndm1", chart="flow", grid="time", trajectory=True
    )
    places = torch.stack(ways.trajectory)
    energy = steps * (places[1:] - places[:-1]).square().flatten(2).sum(2).sum(0).mean()
    return float(energy / (places[-1] - places[0]).square().flatten(1).sum(1).mean() - 1)
