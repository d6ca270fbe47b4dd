"""Equations of every kind of noise, non-linear and non-autonomous, and networks of these forms."""

import torch
from torch import Tensor, nn

from pfode.sde import SDE

NOISES = ("diagonal", "scalar", "additive", "general")
CHANNELS = {"diagonal": 2, "scalar": 1, "additive": 2, "general": 2}


def drift(t: Tensor, y: Tensor) -> Tensor:
    return 0.5 * torch.sin(y.flip(-1)) - 0.4 * y + 0.2 * torch.cos(2 * t)[..., None]


def diagonal(t: Tensor, y: Tensor) -> Tensor:
    return 1 + 0.4 * torch.sin(y) + 0.2 * t[..., None]


def scalar(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([0.5 + 0.2 * y[..., 1], 0.3 + 0.4 * torch.cos(y[..., 0])], -1)[..., None]


def additive(t: Tensor, y: Tensor) -> Tensor:
    return (torch.tensor([[1.0, 0.5], [0.2, 1.1]], dtype=y.dtype) * (1 + t[..., None, None])).expand(len(y), 2, 2)


def general(t: Tensor, y: Tensor) -> Tensor:
    a, b = y.unbind(-1)
    rows = [torch.stack([torch.cos(b), 0.5 * a], -1), torch.stack([0.3 * a * b + 0.2, torch.sin(a)], -1)]
    return 0.6 * torch.stack(rows, -2)


DIFFUSIONS = {"diagonal": diagonal, "scalar": scalar, "additive": additive, "general": general}


def equation(noise: str, calculus: str) -> SDE:
    return SDE(drift, DIFFUSIONS[noise], noise, calculus)


class Network(nn.Module):
    """A small network on (t, y), its result of a given shape."""

    def __init__(self, *shape: int, d: int = 3, scale: float = 0.5):
        super().__init__()
        self.shape, self.scale = shape, scale
        size = int(torch.Size(shape).numel())
        self.layers = nn.Sequential(nn.Linear(d + 1, 8), nn.Tanh(), nn.Linear(8, size)).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        time = t.expand(len(y))[:, None].to(y)
        return self.scale * self.layers(torch.cat([y, time], -1)).view(len(y), *self.shape)


class Elementwise(nn.Module):
    """Each component from its own: diagonal noise."""

    def __init__(self, d: int = 3):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, d, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        a, b, c = self.weights
        return torch.sigmoid(a + b * y + c * t.reshape(-1, 1))


class OfTime(nn.Module):
    """Additive noise."""

    def __init__(self, d: int = 3, m: int = 2):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(d, m, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return (0.5 * self.weights * (1 + t.reshape(-1, 1, 1))).expand(len(y), *self.weights.shape)


def network(noise: str, calculus: str) -> SDE:
    made = {"diagonal": Elementwise, "scalar": lambda: Network(3, 1), "additive": OfTime}
    return SDE(Network(3), made.get(noise, lambda: Network(3, 2))(), noise, calculus)
