"""The U-Net: shapes, gradients, and a configuration that is checked before anything is built."""

import math

import pytest
import torch
from torch.nn import functional

from pfode.errors import UsageError
from pfode.scores.networks.unet import MAX_PARAMETERS, Norm, UNet, UNetConfig, attend, waves
from tests.scores.small import CONFIG as SMALL
from tests.scores.small import network


@pytest.mark.parametrize("size", [8, 16, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(size, channels):
    config = UNetConfig(size=size, channels=channels, classes=2, widths=(8, 16), blocks=(1, 1), attention=(8,), head=8)
    x = torch.randn(2, channels, size, size)
    out = network(config)(x, torch.zeros(2), torch.tensor([0, 2]))
    assert out.shape == x.shape
    assert out.isfinite().all()


def test_a_new_network_predicts_zero():
    assert not UNet(SMALL)(torch.randn(2, 1, 8, 8), torch.zeros(2)).any()


def test_no_label_is_the_null_class():
    net, x, noise = network(), torch.randn(2, 1, 8, 8), torch.tensor([0.1, -0.4])
    assert torch.equal(net(x, noise), net(x, noise, torch.full((2,), 3)))
    assert not torch.equal(net(x, noise), net(x, noise, torch.full((2,), 1)))


def test_an_unconditional_network_takes_no_label():
    net = network(UNetConfig(size=8, channels=1, widths=(8,), blocks=(1,), attention=()))
    assert net(torch.randn(1, 1, 8, 8), torch.zeros(1)).shape == (1, 1, 8, 8)
    with pytest.raises(UsageError, match="takes no label"):
        net(torch.randn(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))


def test_every_parameter_gets_a_gradient():
    net = network().requires_grad_(True)
    net(torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 3])).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


def test_the_samples_of_a_batch_do_not_mix():
    net, x, noise = network().double(), torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.rand(3)
    alone = torch.cat([net(x[i : i + 1], noise[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(net(x, noise), alone, rtol=1e-12, atol=1e-12)


def test_attention_is_the_same_with_and_without_gradients():
    q, k, v = torch.randn(3, 2, 4, 16, 8, dtype=torch.float64).unbind(0)
    fused = functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attend(q, k, v), fused)
    torch.testing.assert_close(attend(q.clone().requires_grad_(), k, v), fused)


def test_half_precision_sees_the_noise_level_in_single_precision():
    fine = torch.tensor([0.5, 0.5 + 1e-5])
    assert waves(fine).dtype == torch.float32
    assert not torch.equal(*waves(fine))


@pytest.mark.parametrize("width", [8, 16, 24, 40, 48, 96, 128, 192])
def test_groups_divide_the_width(width):
    assert width % Norm(width).num_groups == 0


@pytest.mark.parametrize(
    "config", [SMALL, UNetConfig(), UNetConfig(size=8, channels=1, widths=(24, 48), blocks=(1, 1), head=24)]
)
def test_the_estimate_bounds_the_parameters(config):
    real = sum(p.numel() for p in UNet(config).parameters())
    assert real <= config.parameters() <= 4 * real


def test_json_round_trip():
    assert UNetConfig.from_json(SMALL.to_json()) == SMALL


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"size": 0}, "size"),
        ({"size": 7}, "size"),
        ({"size": 1 << 40}, "size"),
        ({"size": "32"}, "size"),
        ({"size": True}, "size"),
        ({"channels": 0}, "channels"),
        ({"channels": 2.5}, "channels"),
        ({"classes": -1}, "classes"),
        ({"classes": None}, "classes"),
        ({"widths": []}, "widths"),
        ({"widths": "8, 16"}, "widths"),
        ({"widths": [8, 12]}, "widths"),
        ({"widths": [8, 10**9]}, "widths"),
        ({"widths": [1024, 1024], "blocks": [8, 8]}, "widths"),
        ({"widths": {"0": 8}}, "widths"),
        ({"blocks": [1]}, "blocks"),
        ({"blocks": [0, 1]}, "blocks"),
        ({"blocks": 2}, "blocks"),
        ({"attention": [0]}, "attention"),
        ({"attention": [[8]]}, "attention"),
        ({"head": 5}, "head"),
        ({"head": 0}, "head"),
        ({"dropout": 1}, "dropout"),
        ({"dropout": math.nan}, "dropout"),
        ({"dropout": "none"}, "dropout"),
        ({"width": 8}, "width"),
        ({"__class__": "x"}, "__class__"),
    ],
)
def test_untrusted_configurations_are_refused_by_field(change, field):
    with pytest.raises(UsageError, match=field):
        UNetConfig.from_json({**SMALL.to_json(), **change})


def test_the_largest_network_is_bounded():
    with pytest.raises(UsageError, match="parameters"):
        UNetConfig(widths=(1024, 1024, 1024), blocks=(8, 8, 8), attention=())
    assert MAX_PARAMETERS * 4 < 1 << 30
