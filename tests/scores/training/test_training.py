"""Training: the loss falls, and a run that was killed continues as if nothing had happened."""

import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pfode
from pfode import checkpoints as writing
from pfode.checkpoints import checkpoints, read_checkpoint
from pfode.errors import FileError, MissingError, NumericalError, UsageError
from pfode.scores import load
from pfode.scores.networks.unet import UNetConfig
from pfode.scores.training.averages import ema_power
from pfode.scores.training.batches import Batch
from pfode.scores.training.config import TrainConfig, usual_network
from pfode.scores.training.data import Data, load_data
from pfode.scores.training.objectives import problem
from pfode.scores.training.trainer import METRICS, Trainer
from tests import problems

NETWORK = UNetConfig(size=8, channels=1, classes=10, widths=(8, 16), blocks=(1, 1), attention=(4,), head=8)
CONFIG = TrainConfig(network=NETWORK, process=pfode.EDM().config(), steps=12, batch=16, warmup=2, rate=3e-3)


@pytest.fixture(scope="module")
def data() -> Any:
    return load_data("digits")


def finish(trainer: Trainer) -> list[float]:
    return [record.loss for record in trainer.run()]


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything that must be equal after a resume."""
    found = {f"net.{name}": p.detach() for name, p in trainer.net.named_parameters()}
    for width, average in trainer.ema.items():
        found |= {f"{width}.{name}": p for name, p in average.items()}
    for name, p in trainer.net.named_parameters():
        found |= {f"adam.{name}.{key}": value for key, value in trainer.optimiser.state[p].items()}
    return found


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    ("process", "prediction"),
    [
        (pfode.EDM(), ""),
        (pfode.VP(), ""),
        (pfode.Flow(), ""),
        (pfode.VP(), "v"),
        (pfode.EDM(), "x0"),
        (pfode.VPCosine(), "edm"),
    ],
    ids=lambda value: str(value).split("(")[0],
)
def test_the_loss_falls(data, process, prediction):
    config = replace(CONFIG, process=process.config(), prediction=prediction, levels="", steps=60, batch=32)
    losses = finish(Trainer(config, data, device="cpu"))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("process", problems.ALL_PROCESSES.values(), ids=list(problems.ALL_PROCESSES))
def test_a_perfect_network_has_no_loss(data, process):
    """The target is what makes D exact: x0 comes back from it."""
    trainer = Trainer(TrainConfig(network=NETWORK, process=process.config(), batch=8), data, device="cpu")
    x0, noise, t, _ = trainer.batch.draw(3, range(8))
    assert ((t >= process.t_min) & (t <= process.t_max)).all()
    x, c, target = problem(trainer.den, x0, noise, t)
    wide = [value.reshape(-1, 1, 1, 1) for value in c]
    torch.testing.assert_close(wide[2] * x + wide[3] * target, x0)


def test_resuming_is_exact(data, tmp_path):
    whole = Trainer(CONFIG, data, device="cpu")
    losses = finish(whole)
    first = Trainer(CONFIG, data, tmp_path / "run", save_every=5, device="cpu")
    for record in first.run():
        if record.step == 7:  # two steps after the checkpoint
            break
    second = Trainer(CONFIG, data, tmp_path / "run", resume=True, save_every=5, device="cpu")
    assert second.step == 5
    assert finish(second) == losses[5:]
    assert_equal(state(second), state(whole))
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["loss"] for line in lines] == [float(f"{loss:.6g}") for loss in losses]
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-000012", "step-000010"]
    third = Trainer(CONFIG, data, tmp_path / "run", resume=True, device="cpu")
    assert finish(third) == []
    assert_equal(state(third), state(whole))


def test_dropout_resumes_too(data, tmp_path):
    config = replace(CONFIG, network=replace(NETWORK, dropout=0.3), steps=6)
    losses = finish(Trainer(config, data, device="cpu"))
    for record in Trainer(config, data, tmp_path, save_every=2, device="cpu").run():
        if record.step == 3:
            break
    assert finish(Trainer(config, data, tmp_path, resume=True, device="cpu")) == losses[2:]


def test_damaged_checkpoints_are_passed_over(data, tmp_path):
    finish(Trainer(replace(CONFIG, steps=4), data, tmp_path, save_every=2, device="cpu"))
    newest, older = checkpoints(tmp_path)
    for name in ("network.safetensors", "ema-0.1.safetensors", "optimiser.safetensors", "manifest.json"):
        raw = (newest / name).read_bytes()
        for changed in (raw[:-1], raw[:100], b"", raw[:200] + bytes([raw[200] ^ 1]) + raw[201:]):
            (newest / name).write_bytes(changed)
            if name != "manifest.json" or len(changed) < len(raw):
                with pytest.raises(FileError):
                    read_checkpoint(newest)
        (newest / name).write_bytes(raw)
    read_checkpoint(newest)
    (newest / "network.safetensors").unlink()
    assert Trainer(replace(CONFIG, steps=4), data, tmp_path, resume=True, device="cpu").step == 2
    assert older.name == "step-000002"


def test_any_bit_of_a_manifest_counts(data, tmp_path):
    finish(Trainer(replace(CONFIG, steps=1), data, tmp_path, device="cpu"))
    file = checkpoints(tmp_path)[0] / "manifest.json"
    raw = file.read_bytes()
    for i in range(0, len(raw), 7):
        if raw[i : i + 1].isspace():
            continue
        file.write_bytes(raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :])
        with pytest.raises(FileError, match="step-000001"):
            read_checkpoint(file.parent)


def test_where_every_checkpoint_is_damaged_nothing_starts_anew(data, tmp_path):
    finish(Trainer(replace(CONFIG, steps=4), data, tmp_path, save_every=2, device="cpu"))
    lines = (tmp_path / METRICS).read_bytes()
    newest, older = checkpoints(tmp_path)
    (newest / "network.safetensors").write_bytes(b"")
    resumed = Trainer(replace(CONFIG, steps=4), data, tmp_path, resume=True, device="cpu")
    assert resumed.step == 2
    assert ["step-000004" in error.message for error in resumed.damaged] == [True]
    (tmp_path / METRICS).write_bytes(lines)
    (older / "manifest.json").unlink()
    with pytest.raises(FileError, match="every checkpoint is damaged") as caught:
        Trainer(replace(CONFIG, steps=4), data, tmp_path, resume=True, device="cpu")
    assert caught.value.code == 3
    assert (tmp_path / METRICS).read_bytes() == lines


def test_metrics_that_were_changed_are_named(data, tmp_path):
    for record in Trainer(replace(CONFIG, steps=4), data, tmp_path, save_every=2, device="cpu").run():
        if record.step == 3:
            break
    file = tmp_path / METRICS
    raw = file.read_bytes()
    file.write_bytes(raw + b'{"step": 4, "lo')  # torn by a kill
    assert Trainer(replace(CONFIG, steps=4), data, tmp_path, resume=True, device="cpu").step == 2
    assert file.read_bytes() == b"".join(raw.splitlines(keepends=True)[:2])
    file.write_bytes(raw.replace(b'"loss": ', b'"loss": 1', 1))
    with pytest.raises(FileError, match=r"metrics\.jsonl: line 1: damaged"):
        Trainer(replace(CONFIG, steps=4), data, tmp_path, resume=True, device="cpu")


def test_a_checkpoint_of_another_kind_with_good_digests(data, tmp_path):
    trainer = Trainer(replace(CONFIG, steps=1), data, tmp_path, device="cpu")
    finish(trainer)
    manifest, parts = read_checkpoint(checkpoints(tmp_path)[0])
    for change in ({}, {"network.safetensors": {}}, {"optimiser.safetensors": {}}, {"ema-0.1.safetensors": {}}):
        changed = {**parts, **change} if change else {}
        writing.write_checkpoint(tmp_path, 1, {k: v for k, v in manifest.items() if k != "files"}, changed)
        if change.keys() == {"optimiser.safetensors"}:
            continue  # Adam's moments start at nothing, too
        with pytest.raises(FileError, match="of another kind"):
            Trainer(replace(CONFIG, steps=2), data, tmp_path, resume=True, device="cpu")


def test_without_accelerate_it_is_named(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingError, match=r"training needs accelerate\nhint: pip install accelerate"):
        Trainer(CONFIG, data, device="cpu")


HOLD = """
import sys, time
from pfode.files import lock_folder
lock = lock_folder(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_one_run_at_a_time(data, tmp_path):
    pytest.importorskip("fcntl")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            for resume in (False, True):
                with pytest.raises(UsageError, match="another run is working in it"):
                    Trainer(replace(CONFIG, steps=1), data, tmp_path, resume=resume, device="cpu")
        finally:
            other.kill()
    assert len(finish(Trainer(replace(CONFIG, steps=1), data, tmp_path, device="cpu"))) == 1


@pytest.mark.parametrize("point", range(7))
def test_a_kill_at_any_point_of_a_save_loses_one_interval(data, tmp_path, monkeypatch, point):
    """A save is five files, a rename and the removal of the oldest; here it stops dead before one of them."""
    config = replace(CONFIG, steps=4)
    losses = finish(Trainer(config, data, device="cpu"))
    trainer = Trainer(config, data, tmp_path, save_every=1, device="cpu")
    run = trainer.run()
    for _ in range(3):
        next(run)
    calls = iter(range(100))

    def killed(function):
        def call(*args, **options):
            if next(calls) == point:
                raise SystemExit("killed")
            return function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_atomic", killed(writing.write_atomic))
        patch.setattr(os, "replace", killed(os.replace) if point == 5 else os.replace)
        patch.setattr(Path, "unlink", killed(Path.unlink) if point == 6 else Path.unlink)
        patch.setattr(shutil, "rmtree", lambda *args, **options: None)  # a killed process tidies nothing
        with contextlib.suppress(SystemExit):
            next(run)
    resumed = Trainer(config, data, tmp_path, resume=True, device="cpu")
    start = resumed.step
    assert start in (3, 4)
    assert finish(resumed) == losses[start:]
    assert len([json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]) == 4
    assert not list(tmp_path.glob(".*"))


def test_a_folder_is_not_overwritten_by_another_run(data, tmp_path):
    finish(Trainer(replace(CONFIG, steps=2), data, tmp_path, device="cpu"))
    with pytest.raises(UsageError, match="already holds a run"):
        Trainer(replace(CONFIG, steps=2), data, tmp_path, device="cpu")
    with pytest.raises(UsageError, match=r"seed was 0, now 1"):
        Trainer(replace(CONFIG, steps=2, seed=1), data, tmp_path, resume=True, device="cpu")
    other = replace(data, card={**data.card, "sha256": "0"})
    with pytest.raises(UsageError, match="other data"):
        Trainer(replace(CONFIG, steps=2), other, tmp_path, resume=True, device="cpu")
    longer = Trainer(replace(CONFIG, steps=3), data, tmp_path, resume=True, device="cpu")
    assert len(finish(longer)) == 1


def test_parts_of_a_batch_add_up(data):
    config = replace(CONFIG, steps=4)
    whole, parts = (finish(Trainer(replace(config, accum=accum), data, device="cpu")) for accum in (1, 4))
    assert parts == pytest.approx(whole, rel=1e-4)


def test_the_export_is_the_average(data, tmp_path):
    trainer = Trainer(replace(CONFIG, ema=(0.05, 0.2)), data, device="cpu")
    finish(trainer)
    for width in (0.05, 0.2):
        den = load(trainer.export(tmp_path / "m.safetensors", {"licence": "none"}, width))
        for name, value in den.net.state_dict().items():
            assert torch.equal(value, trainer.ema[width][name].half().float())
    assert den.labels == data.names


def test_averages_have_the_width_they_are_asked_for():
    for width in (0.02, 0.05, 0.1, 0.2):
        steps = 4000
        weight = np.zeros(steps)
        for step in range(steps):
            keep = (1 - 1 / (step + 1)) ** (ema_power(width) + 1)
            weight *= keep
            weight[step] += 1 - keep
        times = np.arange(1, steps + 1) / steps
        mean = (weight * times).sum()
        assert weight.sum() == pytest.approx(1)
        assert math.sqrt((weight * (times - mean) ** 2).sum()) == pytest.approx(width, rel=0.02)


def test_rates(data):
    trainer = Trainer(replace(CONFIG, steps=100, warmup=9), data, device="cpu")
    rates = [trainer.rate(step) / CONFIG.rate for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[0] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0)
    flat = Trainer(replace(CONFIG, steps=100, warmup=9, schedule="constant", cooldown=20), data, device="cpu")
    assert {flat.rate(step) for step in range(9, 81)} == {CONFIG.rate}
    assert flat.rate(90) == pytest.approx(CONFIG.rate / 2)


def test_draws_depend_on_nothing_but_the_position(data):
    a, b = Batch(CONFIG, data), Batch(CONFIG, data)
    whole: tuple[Any, ...] = a.draw(200, range(16))
    b.draw(7, range(3))
    for i in (0, 5, 15):
        part: tuple[Any, ...] = b.draw(200, range(i, i + 1))
        assert all(torch.equal(one[0], every[i]) for one, every in zip(part, whole, strict=True))
    other = Batch(replace(CONFIG, seed=1), data).draw(200, range(16))
    assert not torch.equal(other[1], whole[1])


def test_every_epoch_shows_every_picture_once(data):
    few = Data(data.images[:48], data.labels[:48], data.names, {})
    batch = Batch(CONFIG, few)
    orders = [[batch._chosen(position) for position in range(48 * e, 48 * e + 48)] for e in range(3)]
    assert all(sorted(order) == list(range(48)) for order in orders)
    assert orders[0] != orders[1]


def test_classes_are_dropped_and_pictures_mirrored_as_told(data):
    def share(**change: Any) -> Any:
        batch = Batch(replace(CONFIG, batch=500, **change), data)
        x0, _, _, labels = batch.draw(0, range(500))
        plain, _, _, kept = Batch(replace(CONFIG, batch=500, drop=0.0), data).draw(0, range(500))
        return (labels == 10).double().mean(), (x0 != plain).flatten(1).any(1), kept

    assert abs(share(drop=0.2)[0] - 0.2) < 0.06
    assert share(drop=0.0)[0] == 0
    assert share(drop=1.0)[0] == 1
    assert not share()[1].any()
    assert 0.3 < share(flip=("*",))[1].double().mean() < 0.6
    _, changed, kept = share(flip=("3",))
    assert set(kept[changed].tolist()) == {3}


def test_noise_levels(data):
    batch = Batch(replace(CONFIG, batch=4000), data)
    logs = batch.times((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000).log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.01)
    assert float(logs.std()) == pytest.approx(1.2, abs=0.01)


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    trainer = Trainer(CONFIG, data, tmp_path, device="cpu")
    trainer.net.get_parameter("last.weight").data.fill_(math.inf)
    with pytest.raises(NumericalError, match="the loss is"):
        finish(trainer)
    assert not checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": "noise"}, "unknown prediction"),
        ({"levels": "normal"}, "unknown noise levels"),
        ({"levels": "logit-normal"}, "logit-normal"),
        ({"schedule": "step"}, "unknown schedule"),
        ({"steps": 0}, "steps"),
        ({"batch": 0}, "batch"),
        ({"accum": 3}, "accum"),
        ({"warmup": -1}, "warmup"),
        ({"rate": 0.0}, "rate"),
        ({"rate": math.nan}, "rate"),
        ({"drop": 1.5}, "drop"),
        ({"ema": ()}, "ema"),
        ({"ema": (0.5,)}, "ema"),
        ({"seed": -1}, "seed"),
        ({"steps": 10**40}, "steps"),
        ({"steps": 2.0}, "steps"),
        ({"batch": 10**20}, "batch"),
        ({"batch": True}, "batch"),
        ({"warmup": None}, "warmup"),
        ({"sigma_data": 1e300}, "sigma_data"),
        ({"rate": "fast"}, "rate"),
        ({"ema": (0.1, 0.1)}, "ema"),
        ({"ema": 0.1}, "ema"),
        ({"ema": (0.999,)}, "no decay"),
        ({"flip": "*"}, "flip"),
        ({"amp": 1}, "amp"),
    ],
)
def test_bad_recipes(change, message):
    with pytest.raises(UsageError, match=message):
        replace(CONFIG, **change)


def test_recipes_are_json():
    assert TrainConfig.from_json(json.loads(json.dumps(CONFIG.to_json()))) == CONFIG
    with pytest.raises(UsageError, match="unknown training field 'step'"):
        TrainConfig.from_json({**CONFIG.to_json(), "step": 3})


@pytest.mark.parametrize(("size", "levels"), [(4, 2), (8, 2), (12, 2), (16, 3), (32, 3), (64, 4), (128, 4)])
def test_usual_networks(size, levels):
    config = usual_network(size, 3, 0)
    assert (config.size, len(config.widths), len(config.blocks)) == (size, levels, levels)
    assert usual_network(size, 3, 0, widths=(8, 16)).blocks == (1, 1 if levels == 2 else 2)
    with pytest.raises(UsageError, match="a size of 28 or 32"):
        usual_network(30, 3, 0)


def test_network_and_data_must_fit(data):
    with pytest.raises(UsageError, match="no class 'seven'"):
        Trainer(replace(CONFIG, flip=("seven",)), data, device="cpu")
    with pytest.raises(UsageError, match="does not fit"):
        Trainer(replace(CONFIG, network=replace(NETWORK, classes=3)), data, device="cpu")


SCRIPT = """
import json, sys
from tests.scores.training.test_training import CONFIG, Trainer, load_data, replace
trainer = Trainer(replace(CONFIG, steps=6), load_data("digits"), sys.argv[1], save_every=3, device="cpu")
assert trainer.accelerator.num_processes == int(sys.argv[2])
list(trainer.run())
trainer.close()
"""


def test_two_processes_train_as_one(data, tmp_path):
    """Two `accelerate launch --cpu`, told who they are by the environment, as mpirun does."""
    losses = finish(Trainer(replace(CONFIG, steps=6), data, device="cpu"))
    (tmp_path / "script.py").write_text(SCRIPT)
    run, root = tmp_path / "run", Path(__file__).parents[3]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", str(tmp_path / "script.py"), str(run), "2"]
    shared = {
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    started = [
        subprocess.Popen(
            command,
            cwd=root,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-4)
    assert Trainer(replace(CONFIG, steps=6), data, run, resume=True, device="cpu").step == 6
