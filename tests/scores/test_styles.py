"""Styles: a second condition, a vector per picture, from the data through the network to samples by their seeds."""

from typing import Any

import numpy as np
import pytest
import torch

import pfode
from pfode.errors import FileError, UsageError
from pfode.scores import load, save
from pfode.scores.networks.unet import UNet, UNetConfig
from pfode.scores.styles import bank_of, mixed
from pfode.scores.training.batches import JITTER, Batch
from pfode.scores.training.config import TrainConfig
from pfode.scores.training.data import Data, load_data
from pfode.scores.training.trainer import Trainer

CONFIG = UNetConfig(8, 1, 2, (8, 16), (1, 1), (), 8, styles=3, bank=4)
BANK = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = UNet(CONFIG)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert made.style is not None
    made.style.bank.copy_(BANK)
    return pfode.scores.Denoiser(made.eval(), pfode.EDM(), "edm", shape=(1, 8, 8), labels=("a", "b"))


def test_a_mix_is_a_mean_of_three_and_follows_its_seed():
    found = mixed(BANK, range(200))
    assert ((found >= 0) & (found.sum(1, keepdim=True) <= 1 + 1e-6)).all()
    assert len(torch.unique(found, dim=0)) > 150
    assert torch.equal(mixed(BANK, [7, 3]), torch.cat([mixed(BANK, [7]), mixed(BANK, [3])]))
    assert torch.equal(mixed(BANK.half(), [7, 3]), mixed(BANK, [7, 3]))  # as a model keeps them
    assert mixed(BANK, []).shape == (0, 3)
    assert mixed(BANK, [2**64 - 1]).isfinite().all()
    with pytest.raises(UsageError, match="no styles"):
        mixed(BANK[:0], [1])


def test_a_bank_has_each_style_once_and_not_too_many():
    assert torch.equal(bank_of(BANK.repeat(3, 1)), torch.unique(BANK, dim=0))
    many = torch.arange(2000.0)[:, None]
    assert len(bank_of(many)) == 512
    assert torch.equal(bank_of(many), bank_of(many.flip(0)))


def test_samples_have_the_style_of_their_seed(net):
    whole = pfode.sample(net, seeds=[5, 6, 7], steps=2, label="a").x
    alone = pfode.sample(net, seeds=[7, 5], steps=2, label="a", batch=1).x
    assert torch.equal(alone, whole[[2, 0]])
    same = pfode.sample(net, seeds=[5, 5], steps=2, label=["a", "b"]).x
    assert torch.equal(same[0], whole[0])
    fixed = net.styled(mixed(BANK, [5])[0])
    assert torch.equal(pfode.sample(fixed, seeds=[5], steps=2, label="a").x, whole[:1])
    other = net.styled(BANK[1])
    assert not torch.equal(pfode.sample(other, seeds=[5], steps=2, label="a").x, whole[:1])
    with pytest.raises(UsageError, match="style"):
        net.styled(torch.zeros(4))


def test_guidance_keeps_the_style(net):
    guided = pfode.sample(net, seeds=[5, 6], steps=2, label="a", guidance=2.0).x
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(1.0)
    style = mixed(BANK, [5, 6])
    by_hand = 2 * net(x, t, label=0, style=style) - net(x, t, style=style)
    found: Any = pfode.scores.guide(net, 2.0, label=0)
    torch.testing.assert_close(found(x, t, **found.conditions([5, 6])), by_hand, rtol=1e-4, atol=1e-5)
    assert guided.isfinite().all()


def test_no_style_is_a_row_that_is_not_finite(net):
    x, noise = torch.randn(2, 1, 8, 8), torch.zeros(2)
    hidden = torch.full((2, 3), torch.nan)
    assert torch.equal(net.net(x, noise), net.net(x, noise, style=hidden))
    mixture = torch.cat([hidden[:1], torch.zeros(1, 3)])
    both = net.net(x, noise, style=mixture)
    torch.testing.assert_close(both[0], net.net(x, noise)[0])
    assert not torch.allclose(both[1], net.net(x, noise)[1])
    alone = net.net(x[:1], noise[:1], style=mixture[:1])
    torch.testing.assert_close(alone, both[:1])


def test_a_style_that_cannot_be_is_refused(net):
    x, noise = torch.randn(2, 1, 8, 8), torch.zeros(2)
    for style in (torch.zeros(2), torch.zeros(3, 3), torch.zeros(2, 4), [0.0] * 3):
        with pytest.raises(UsageError, match="style"):
            net.net(x, noise, style=style)
    plain = UNet(UNetConfig(8, 1, 0, (8,), (1,), (), 8))
    with pytest.raises(UsageError, match="takes no style"):
        plain(x, noise, style=torch.zeros(2, 3))
    with pytest.raises(UsageError, match="bank"):
        UNetConfig(8, 1, 0, (8,), (1,), (), 8, bank=4)


def test_the_bank_is_saved_with_the_model(net, tmp_path):
    save(net, tmp_path / "m.safetensors", card={"name": "m"})
    again = load(tmp_path / "m.safetensors")
    assert torch.equal(again.net.style_bank, BANK)
    assert torch.equal(again.conditions([3])["style"], net.conditions([3])["style"])


def data(n=40):
    images = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    styles = BANK[torch.arange(n) % 4].clone()
    return Data(images, torch.arange(n) % 2, ("a", "b"), {"sha256": "x"}, styles=styles)


def test_training_hides_some_styles_and_exports_the_bank(tmp_path):
    network = UNetConfig(8, 1, 2, (8, 16), (1, 1), (), 8, styles=3)
    config = TrainConfig(network=network, process=pfode.EDM().config(), steps=3, batch=200, drop=0.25)
    batch = Batch(config, data())
    styles = batch.styles(0, range(200))
    assert styles is not None
    hidden = styles.isnan().all(1)
    assert torch.equal(hidden, styles.isnan().any(1))
    assert 0.15 < hidden.double().mean() < 0.35
    nearest = torch.cdist(styles[~hidden], BANK).amin(1)
    assert 0 < float(nearest.mean()) < 3 * JITTER
    part = batch.styles(0, range(30, 40))
    assert part is not None
    assert torch.equal(part.nan_to_num(9), styles[30:40].nan_to_num(9))
    trainer = Trainer(config, data(), tmp_path, device="cpu")
    assert len(list(trainer.run())) == 3
    den = load(tmp_path / "step-000003")
    assert torch.equal(den.net.style_bank, bank_of(BANK))
    wrong = UNetConfig(8, 1, 2, (8, 16), (1, 1), (), 8)
    with pytest.raises(UsageError, match="style"):
        Trainer(TrainConfig(network=wrong, process=pfode.EDM().config()), data(), device="cpu")


def test_styles_source_and_licence_are_read(tmp_path):
    images = np.zeros((3, 8, 8), np.uint8)
    given = {"images": images, "labels": np.array(["dog", "cat", "dog"]), "styles": np.arange(6).reshape(3, 2)}
    np.savez(tmp_path / "d.npz", **given, source=np.array("me"), licence=np.array(["CC0"]))
    found = load_data(tmp_path / "d.npz")
    assert found.styles is not None
    assert found.labels is not None
    assert found.styles.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert (found.names, found.labels.tolist()) == (("cat", "dog"), [1, 0, 1])
    assert (found.card["source"], found.card["licence"]) == ("me", "CC0")
    train, held = found.split(0.4)
    assert held is not None
    assert train.styles is not None
    assert (len(train.styles), len(held)) == (2, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("styles", np.zeros(3)),
        ("styles", np.zeros((2, 2))),
        ("styles", np.full((3, 2), np.nan)),
        ("styles", np.zeros((3, 0))),
        ("styles", np.array([["a"]] * 3)),
        ("source", np.array(3)),
        ("licence", np.array(["a", "b"])),
        ("licence", np.array("two\nlines")),
        ("source", np.array("")),
        ("names", np.array(["cat", "dog"])),
        ("labels", np.array([["x", "y", "x"]])),
        ("labels", np.array([0.5, 1, 2])),
    ],
)
def test_arrays_that_cannot_be_are_refused(tmp_path, key, value):
    given = {"images": np.zeros((3, 8, 8), np.uint8), "labels": np.array(["x", "y", "x"]), key: value}
    np.savez(tmp_path / "d.npz", **given)
    with pytest.raises(FileError, match=key):
        load_data(tmp_path / "d.npz")
