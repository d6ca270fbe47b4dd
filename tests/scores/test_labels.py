"""Classes by number and by name, wherever they enter: one rule, and no class drawn in silence."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import pfode
from pfode.errors import UnseenLabelWarning, UsageError
from pfode.labels import class_indices
from pfode.scores import guide, load, save
from pfode.scores.denoiser import Denoiser
from pfode.scores.training.batches import unseen_classes
from pfode.scores.training.data import Data
from pfode.scores.training.trainer import Trainer
from pfode.scores.wrapping import clip
from tests.scores import pickled
from tests.scores.small import CONFIG, NAMES, denoiser, network
from tests.scores.training.test_training import CONFIG as RECIPE

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BAD = [
    3, -1, 10**9, 10**30, True, 1.0, 0.5, "dog", "3", "-1", b"ant", {}, [0], [0, 1, 2], [0, 3], [0, -1], [True, False],
    [0.0, 1.0], [[0], [1]], torch.tensor([1]), torch.tensor([0, 1, 2]), torch.tensor([0.0, 1.0]),
    torch.tensor([[0], [1]]), torch.tensor([True, False]), torch.tensor(1.0), torch.tensor(3), torch.tensor([0, 3]),
    np.array([0, 3]), np.float64(1), np.bool_(True), torch.tensor([0, 1j]), range(3),
]  # fmt: skip
GOOD = {
    1: [1, 1], "bee": [1, 1], "BEE": [1, 1], "2": [2, 2], np.int64(2): [2, 2], (0, "cat"): [0, 2], (None, 1): [3, 1],
    range(1, 3): [1, 2],
}  # fmt: skip
LAST = 3
ids: Any = {"ids": lambda value: f"{type(value).__name__}-{value!r:.40}"}


def entrances(den):
    """Every call that takes a label from a person."""
    return {
        "sample": lambda label: pfode.sample(den, n=2, steps=2, sampler="ddim", label=label),
        "adaptive": lambda label: pfode.sample(den, n=2, sampler="rk23", rtol=0.5, label=label),
        "encode": lambda label: pfode.encode(den, X, steps=2, sampler="ddim", label=label),
        "decode": lambda label: pfode.decode(den, X, steps=2, sampler="ddim", label=label),
        "guided": lambda label: pfode.sample(guide(den, 2.0), n=2, steps=2, sampler="ddim", label=label),
        "clipped": lambda label: pfode.sample(clip(den), n=2, steps=2, sampler="ddim", label=label),
    }


@pytest.mark.parametrize("label", BAD, **ids)
@pytest.mark.parametrize("entrance", entrances(None))
def test_bad_labels_are_refused(entrance, label):
    with pytest.raises(UsageError, match="label"):
        entrances(denoiser())[entrance](label)


@pytest.mark.parametrize(
    "label", [3, -1, True, 1.0, "dog", torch.tensor(3), torch.tensor(True), torch.tensor(0.5)], **ids
)
def test_bad_labels_of_guide_are_refused(label):
    with pytest.raises(UsageError, match="label"):
        guide(denoiser(), 2.0, label=label)
    if label is not LAST and not (isinstance(label, torch.Tensor) and label.dtype == torch.int64):  # away: no class
        for negative in (label, {"label": label}):
            with pytest.raises(UsageError, match="label"):
                guide(denoiser(), 2.0, label=0, negative=negative)


@pytest.mark.parametrize(("label", "expected"), GOOD.items(), **ids)
def test_good_labels(label, expected):
    found = class_indices(denoiser(), label, 2)
    assert found is not None
    assert (found.tolist(), found.dtype) == (expected, torch.int64)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_labels_of_any_integer_type(dtype):
    den = denoiser()
    label = torch.tensor([0, 2], dtype=dtype)
    expected = pfode.sample(den, n=2, steps=2, sampler="ddim", label=[0, 2]).x
    assert torch.equal(pfode.sample(den, n=2, steps=2, sampler="ddim", label=label).x, expected)
    assert torch.equal(den(X, torch.tensor(0.5), label=label), den(X, torch.tensor(0.5), label=torch.tensor([0, 2])))


def test_none_in_a_list_is_no_class():
    den = denoiser()
    some: Any = [None, 1]
    mixed = pfode.sample(den, n=2, steps=2, sampler="ddim", label=some).x
    torch.testing.assert_close(mixed[:1], pfode.sample(den, n=1, steps=2, sampler="ddim").x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "label", [True, 1.5, "bee", [0, 1], torch.tensor([True, False]), torch.tensor([0j, 1j])], **ids
)
def test_the_network_takes_integers_only(label):
    with pytest.raises(UsageError, match="expected integers of shape"):
        denoiser()(X, torch.tensor(0.5), label=label)


@pytest.mark.parametrize(
    "label",
    [
        torch.tensor([1]),
        torch.tensor([0, 4]),
        torch.tensor([-1, 0]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
    ],
    **ids,
)
@pytest.mark.parametrize("kind", ["unet", "ddpm++", "edm2"])
def test_networks_by_themselves_check_labels(kind, label):
    """A label of one sample stood for all; others ended in errors of torch."""
    net: Any = network() if kind == "unet" else pickled.network(kind)
    x = torch.zeros(2, *net.shape)
    with pytest.raises(UsageError, match="label"):
        net(x, torch.zeros(2), label)
    assert torch.equal(net(x, torch.zeros(2), torch.tensor(1)), net(x, torch.zeros(2), torch.tensor([1, 1])))


def test_a_network_whose_classes_have_no_names():
    den = Denoiser(network(), pfode.EDM(), "edm", shape=(1, 8, 8))
    assert den.classes == 3
    assert pfode.sample(den, n=2, steps=2, sampler="ddim", label=2).x.isfinite().all()
    with pytest.raises(UsageError, match="unknown label 3"):
        pfode.sample(den, n=2, steps=2, sampler="ddim", label=3)


def test_an_unconditional_network():
    den = Denoiser(network(replace(CONFIG, classes=0)), pfode.EDM(), "edm", shape=(1, 8, 8))
    labels: Any = (0, "ant", [0, 1], [None, None])
    for label in labels:
        with pytest.raises(UsageError, match="label"):
            pfode.sample(den, n=2, steps=2, sampler="ddim", label=label)


# ---- what a network never saw


def unseen(*labels: int) -> Any:
    return Denoiser(network(), pfode.EDM(), "edm", shape=(1, 8, 8), labels=NAMES, unseen=labels)


def test_classes_that_never_came_up_warn():
    for call in entrances(unseen(1)).values():
        with pytest.warns(UnseenLabelWarning, match=r"label 1 \('bee'\): never came up"):
            call([0, 1])
    for call in entrances(unseen(1)).values():
        call([0, 2])


def test_guidance_where_no_label_was_ever_hidden_warns():
    den = unseen(3)
    with pytest.warns(UnseenLabelWarning, match="no label was ever hidden"):
        guided = guide(den, 2.0, label=1)
    pfode.sample(guided, n=1, steps=2, sampler="ddim")
    with pytest.warns(UnseenLabelWarning, match="no label was ever hidden"):
        pfode.sample(den, n=1, steps=2, sampler="ddim", label=1, guidance=3.0)
    with pytest.warns(UnseenLabelWarning, match="no label was ever hidden"):
        pfode.sample(den, n=1, steps=2, sampler="ddim")
    for quiet in (lambda: guide(den, 1.0, label=1), lambda: guide(den, 2.0, label=1, negative=2)):
        pfode.sample(quiet(), n=1, steps=2, sampler="ddim")
    pfode.sample(den, n=1, steps=2, sampler="ddim", label=1)


def test_wrappers_know_what_was_not_seen():
    weak: Any = guide(denoiser(), 2.0, weak=unseen(2))
    assert weak.unseen == {2}
    bounded: Any = clip(unseen(1))
    assert bounded.unseen == {1}
    assert unseen(1).to(dtype=torch.bfloat16).unseen == {1}
    with pytest.raises(UsageError, match="unseen"):
        unseen(4)


def test_it_is_kept_with_the_model(tmp_path):
    den = load(save(unseen(1, 3), tmp_path / "m.safetensors", card={}))
    assert den.unseen == {1, 3}
    older = load(save(denoiser(), tmp_path / "m.safetensors", card={"training": {"drop": 0.0}}))
    assert older.unseen == {3}
    for drop in (0.1, None):
        assert load(save(denoiser(), tmp_path / "m.safetensors", card={"training": {"drop": drop}})).unseen == set()


@pytest.mark.parametrize(("drop", "expected"), [(0.1, [1]), (0.0, [1, 3]), (1.0, [0, 1, 2])])
def test_training_knows_it(drop, expected):
    data = Data(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 2, 2]), NAMES)
    config = replace(RECIPE, network=replace(RECIPE.network, classes=3), drop=drop)
    assert unseen_classes(config, data) == expected
    assert Trainer(config, data, device="cpu").denoiser().unseen == set(expected)
    assert unseen_classes(config, Data(data.images, None)) == []
