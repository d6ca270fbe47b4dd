"""The trainer of series: it resumes bit for bit, whenever it was stopped, and refuses what does not belong together."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pfode.errors import FileError, NumericalError, UsageError
from pfode.models import LatentODE, NeuralCDE
from pfode.models.series import Series, Trainer, Training
from tests.held import held

ROOT = Path(__file__).parents[2]


def data(count=20, seed=0):
    draw = torch.Generator().manual_seed(seed)
    t = torch.rand(count, 5, generator=draw).sort(1).values
    return Series(t, torch.randn(count, 5, 2, generator=draw), torch.arange(count) % 2)


def model(kind: Any = LatentODE) -> Any:
    torch.manual_seed(1)
    return LatentODE(2, latent=2, hidden=4, width=4) if kind is LatentODE else NeuralCDE(2, 2, hidden=4, width=4)


HALF: Any = 2.5
NOTHING: Any = None
HOW = Training(epochs=5, batch=4, rate=0.01)


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("kind", [LatentODE, NeuralCDE])
def test_a_run_that_was_stopped_twenty_times_is_the_run_that_was_not(kind, tmp_path):
    whole = model(kind)
    straight = [record.loss for record in Trainer(whole, data(), HOW).run()]
    places, losses, part = random.Random(0), dict[int, float](), model(kind)
    for stops in range(21):
        part = model(kind)
        trainer = Trainer(part, data(), HOW, folder=tmp_path, resume=True, save_every=2)
        for record in trainer.run():
            losses.setdefault(record.step, record.loss)
            assert losses[record.step] == record.loss  # steps that are made again are the same
            if stops < 20 and places.random() < 0.3:
                break
        trainer.close()
    assert torch.equal(weights(part), weights(whole))
    assert [losses[i + 1] for i in range(len(straight))] == straight
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 26))
    assert [line["loss"] for line in lines] == straight
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000024", "step-000025"]


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.models.test_series_training import HOW, Trainer, data, model
import dataclasses
torch = __import__("torch"); torch.set_num_threads(1)
how = dataclasses.replace(HOW, epochs=400)
for record in Trainer(model(), data(), how, folder={folder!r}, resume=True, save_every=3).run():
    print(record.step, flush=True)
"""


def test_a_killed_process_loses_nothing_that_it_had_a_checkpoint_of(tmp_path):
    words, reached = [sys.executable, "-c", SCRIPT.format(root=str(ROOT), folder=str(tmp_path))], 0
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            reached = int(line)
            if reached >= 8:
                break
        time.sleep(random.Random(0).random() * 0.02)
        process.send_signal(signal.SIGKILL)
    kept = Trainer(model(), data(), Training(epochs=400, batch=4, rate=0.01), folder=tmp_path, resume=True)
    assert kept.step > reached - 3
    kept.close()
    straight = model()
    for record in Trainer(straight, data(), Training(epochs=400, batch=4, rate=0.01)).run():
        if record.step == kept.step:
            break
    assert torch.equal(weights(kept.model), weights(straight))


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    trainer = Trainer(model(), data(), HOW, folder=tmp_path, save_every=10)
    for _ in trainer.run():
        pass
    trainer.close()
    newest = tmp_path / "step-000025" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x00")
    again = Trainer(model(), data(), HOW, folder=tmp_path, resume=True)
    assert again.step == 20
    again.close()
    (tmp_path / "step-000020" / "manifest.json").write_text("{}")
    with pytest.raises(FileError, match="every checkpoint is damaged"):
        Trainer(model(), data(), HOW, folder=tmp_path, resume=True)


def test_what_does_not_belong_together_is_refused(tmp_path):
    trainer = Trainer(model(), data(), HOW, folder=tmp_path)
    next(trainer.run())
    trainer.save()
    trainer.close()
    with held(tmp_path), pytest.raises(UsageError, match=r"another process|is working"):
        Trainer(model(), data(), HOW, folder=tmp_path, resume=True)
    with pytest.raises(UsageError, match=r"already holds a run \(step-000001\)"):
        Trainer(model(), data(), HOW, folder=tmp_path)
    with pytest.raises(UsageError, match="the run was started on other series"):
        Trainer(model(), data(seed=1), HOW, folder=tmp_path, resume=True)
    with pytest.raises(UsageError, match=r"rate was 0.01, now 0.02"):
        Trainer(model(), data(), Training(epochs=5, batch=4, rate=0.02), folder=tmp_path, resume=True)
    with pytest.raises(FileError, match="of another model"):
        Trainer(model(NeuralCDE), data(), HOW, folder=tmp_path, resume=True)


def test_each_epoch_has_all_series_once_and_validation_comes_after_it():
    seen: list[Any] = []
    net = model(NeuralCDE)
    loss = net.loss
    net.loss = lambda series, generator, progress: seen.append(series.ids) or loss(series, generator, progress)
    records = list(Trainer(net, data(10), Training(epochs=2, batch=4), valid=data(6, seed=2)).run())
    assert [len(ids) for ids in seen] == [4, 4, 2, 4, 4, 2]
    first, second = sum(seen[:3], ()), sum(seen[3:], ())
    assert sorted(first) == sorted(second) == sorted(data(10).ids)
    assert first != second
    assert [bool(record.valid) for record in records] == [False, False, True] * 2
    assert set(records[-1].valid) == {"loss", "accuracy"}
    assert records[-1].epoch == 2.0


def test_losses_that_are_not_finite_end_the_run():
    net = model(NeuralCDE)
    with torch.no_grad():
        net.readout.weight.fill_(float("inf"))
    with pytest.raises(NumericalError, match=r"the loss is (nan|inf) at step 1"):
        list(Trainer(net, data(), HOW).run())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Trainer(torch.nn.Linear(1, 1), data()), "need a module with loss and metrics, got Linear"),
        (lambda: Trainer(None, data()), "got NoneType"),
        (lambda: Trainer(model(), data()[:0]), "need series to train on"),
        (lambda: Trainer(model(), NOTHING), "need series to train on"),
        (lambda: Trainer(model(), data(), save_every=0), "save_every: need an integer"),
        (lambda: Trainer(model(), data()).save(), "this run has no folder"),
        (lambda: Training(epochs=0), "epochs: need an integer of at least 1"),
        (lambda: Training(batch=HALF), "batch: need an integer"),
        (lambda: Training(rate=0), "rate: need a positive number"),
        (lambda: Training(rate=-1.0), "rate: need a number of at least 0"),
        (lambda: Training(schedule="linear"), "unknown schedule 'linear'"),
        (lambda: Training(seed=-1), "seed: need an integer of at least 0"),
    ],
)
def test_malformed_calls_are_one_clear_error(make, words):
    with pytest.raises(UsageError, match=words):
        make()
