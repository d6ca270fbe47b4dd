"""What is measured of data before training, and noise levels that count alike."""

import math
from dataclasses import replace

import pytest
import torch

import pfode
from pfode.scores.networks.unet import UNetConfig
from pfode.scores.training.balance import RATE, STRATA, Balance
from pfode.scores.training.batches import Batch
from pfode.scores.training.clock import Clock
from pfode.scores.training.config import TrainConfig
from pfode.scores.training.data import Data, digits
from pfode.scores.training.measure import NARROW, WIDE, measure
from pfode.scores.training.trainer import Trainer

NETWORK = UNetConfig(size=8, channels=1, classes=10, widths=(8, 16), blocks=(1, 1), attention=(), head=8)
CONFIG = TrainConfig(network=NETWORK, process=pfode.EDM().config(), steps=8, batch=16, warmup=2, balance=True)


def pictures(deviation, n=4000, side=4):
    values = torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(0)) * deviation
    return Data(((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), None)


def test_of_white_noise_every_component_is_decided_at_its_deviation():
    found = measure(pictures(0.25))
    assert found.sigma_data == pytest.approx(0.25, rel=0.02)
    assert found.level_mean == pytest.approx(math.log(0.25), abs=0.05)
    assert found.level_std == NARROW


def test_contrast_shifts_the_levels():
    full, half = measure(pictures(0.3)), measure(pictures(0.15))
    assert full.level_mean - half.level_mean == pytest.approx(math.log(2), abs=0.02)
    assert full.sigma_data / half.sigma_data == pytest.approx(2, rel=0.02)


def test_large_shapes_beside_fine_detail_need_wide_levels():
    n = 512
    shape = torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(1)).sign() * 0.8
    fine = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 0.02
    data = Data(((shape + fine + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), None)
    found = measure(data)
    assert found.level_std == WIDE
    assert math.log(0.02) < found.level_mean < math.log(0.8 * 8)  # the one component of all 64 pixels


def test_the_order_of_the_pictures_does_not_matter():
    data = digits()
    turned = replace(data, images=data.images.flip(0), labels=None, names=())
    assert measure(data) == measure(turned)


def test_one_plain_colour_has_nothing_to_measure():
    assert measure(Data(torch.full((5, 3, 8, 8), 7, dtype=torch.uint8), None)) == (0.5, -1.2, 1.2)


def test_levels_of_equal_relative_loss_weigh_the_same():
    balance = Balance(32)
    whole = range(32)
    assert torch.equal(balance.weights(whole), torch.ones(32, dtype=torch.float64))
    losses = torch.linspace(0.01, 1.0, STRATA, dtype=torch.float64)[balance.of]
    for _ in range(1500):
        balance.update(balance.sums(whole, losses))
    products = balance.weights(whole) * losses
    torch.testing.assert_close(products, products[:1].expand(32), rtol=1e-6, atol=0)
    assert float(balance.weights(whole).mean()) == pytest.approx(1)
    first = balance.sums(range(16), losses[:16]) + balance.sums(range(16, 32), losses[16:])
    torch.testing.assert_close(first, balance.sums(whole, losses))


def test_a_running_mean_moves_by_its_rate():
    balance = Balance(16)
    balance.update(torch.full((16,), 3.0))
    torch.testing.assert_close(balance.mean, torch.full((16,), 1 + 2 * RATE, dtype=torch.float64))


def test_the_table_has_the_levels_in_order():
    trainer = Trainer(CONFIG, digits(), device="cpu")
    rows = trainer.levels()
    assert [row["loss"] for row in rows] == [1.0] * 16
    assert all(row["from"] < row["to"] for row in rows)
    assert [row["to"] for row in rows[:-1]] == [row["from"] for row in rows[1:]]
    median = float(Batch(CONFIG, trainer.data).times(torch.tensor([0.5], dtype=torch.float64)))
    assert rows[8]["from"] == pytest.approx(median, rel=0.01)


def test_a_balanced_run_resumes_exactly(tmp_path):
    data = digits()
    whole = Trainer(CONFIG, data, device="cpu")
    losses = [record.loss for record in whole.run()]
    assert (whole.balance.mean != 1).all()
    for record in Trainer(CONFIG, data, tmp_path, save_every=3, device="cpu").run():
        if record.step == 4:
            break
    again = Trainer(CONFIG, data, tmp_path, resume=True, device="cpu")
    assert [record.loss for record in again.run()] == losses[3:]
    assert torch.equal(again.balance.mean, whole.balance.mean)


def test_parts_of_a_batch_change_nothing():
    data = digits()
    plain, parts = (Trainer(replace(CONFIG, accum=n, steps=3), data, device="cpu") for n in (1, 4))
    losses = [[record.loss for record in trainer.run()] for trainer in (plain, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(plain.balance.mean, parts.balance.mean, rtol=1e-5, atol=0)


def test_held_out_pictures_are_never_drawn():
    data = digits()
    train, held = data.split(0.1)
    assert held is not None
    assert (len(train) + len(held), len(held)) == (len(data), 180)
    assert train.card["sha256"] != data.card["sha256"]
    trainer = Trainer(replace(CONFIG, steps=1), train, device="cpu", held_out=held)
    found = trainer.held_out_loss()
    assert found == trainer.held_out_loss()
    assert found is not None
    assert found[0] == pytest.approx(found[1], rel=0.05)  # of a new network, which answers 0
    assert Trainer(CONFIG, data, device="cpu").held_out_loss() is None


@pytest.mark.parametrize("share", [0.6, -0.1, 1e-9])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(pfode.errors.UsageError, match="held_out"):
        digits().split(share)


def test_a_budget_of_time_becomes_steps():
    clock = Clock(100.0, 50, 20.0)  # 50 steps took 20 s before this process
    assert clock.steps(55, 21.0) is None
    assert clock.steps(60, 25.0) == 60 + 150  # 10 steps in 5 s, 75 s left
    assert clock.steps(60, 25.0) is None
    assert clock.steps(70, 101.0) == 71  # over the time: one more step


def test_a_run_with_a_budget_ends(tmp_path):
    trainer = Trainer(replace(CONFIG, steps=10**6, cooldown=10**5), digits(), tmp_path, device="cpu")
    steps = [record.step for record in trainer.run(budget=1e-9)]
    assert steps == list(range(1, len(steps) + 1))
    assert 10 <= len(steps) <= 12
    assert trainer.config.steps == len(steps)
