"""A small network with no zero branch, and denoisers made of it."""

import torch

import pfode
from pfode.process import Process
from pfode.scores.denoiser import Denoiser
from pfode.scores.networks.unet import UNet, UNetConfig

CONFIG = UNetConfig(size=8, channels=1, classes=3, widths=(8, 16), blocks=(1, 1), attention=(4,), head=8)
NAMES = ("ant", "bee", "cat")


def network(config: UNetConfig = CONFIG) -> UNet:
    torch.manual_seed(0)
    net = UNet(config)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net.eval().requires_grad_(False)


def denoiser(process: Process | None = None, prediction: str = "edm") -> Denoiser:
    return Denoiser(network(), process or pfode.EDM(), prediction, shape=(1, 8, 8), labels=NAMES)
