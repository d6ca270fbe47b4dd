"""A multilayer perceptron for vectors: a field, a denoiser, or, with one output, a potential."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from pfode.errors import UsageError, unknown
from pfode.labels import label_tensor

__all__ = ["ACTIVATIONS", "MLP", "MLPConfig", "Potential"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "tanh": nn.Tanh, "softplus": nn.Softplus, "selu": nn.SELU}
LIMITS = {"dims": (1, 100_000), "classes": (0, 100_000), "width": (1, 8192), "depth": (1, 64), "frequencies": (0, 64)}


@dataclass(frozen=True)
class MLPConfig:
    """The numbers that define an `MLP`.

    Args:
        dims: of a point.
        classes: number of labels, 0 for none; label `classes` means "none" (guidance).
        width: of every hidden layer.
        depth: hidden layers.
        frequencies: the time enters as sin and cos of 1, 2, 4 ... times it, of so many; 0: as it is.
        activation: "silu", "tanh", "softplus" or "selu".
        potential: the network is a scalar function, and what it returns is minus its gradient (see `Potential`).

    Raises:
        UsageError: a value out of range, named by its field.
    """

    dims: int = 2
    classes: int = 0
    width: int = 64
    depth: int = 3
    frequencies: int = 3
    activation: str = "silu"
    potential: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise UsageError(f"network: {name}: expected an integer from {low} to {high}, got {value!r:.40}")
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        if not isinstance(self.potential, bool):
            raise UsageError(f"network: potential: expected true or false, got {self.potential!r:.40}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one point."""
        return (self.dims,)

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` rebuilds the configuration; its name tells it from other networks'."""
        return {"name": "MLP", **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "MLPConfig":
        """Check an untrusted JSON object.

        Raises:
            UsageError: an unknown key, a wrong type or a value out of range, named by its field.
        """
        known = {field.name for field in fields(cls)}
        given = {key: item for key, item in value.items() if key != "name"}
        for key in given:
            if key not in known:
                raise unknown("network field", key, known)
        return cls(**given)

    def make(self) -> nn.Module:
        """The network, its output zero before training."""
        return Potential(self) if self.potential else MLP(self)


class MLP(nn.Module):
    """A perceptron of (x, features of the time, one-hot class).

    Args:
        config: its numbers.
        outputs: of the last layer; by default as many as a point has dimensions.
    """

    def __init__(self, config: MLPConfig, outputs: int | None = None):
        super().__init__()
        self.config, self.classes, self.shape = config, config.classes, config.shape
        times = 2 * config.frequencies or 1
        widths = [config.dims + times, *[config.width] * config.depth]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), ACTIVATIONS[config.activation]()]
        self.body = nn.Sequential(*layers)
        self.classed = nn.Embedding(config.classes + 1, config.width) if config.classes else None
        self.last = nn.Linear(config.width, config.dims if outputs is None else outputs)
        for p in self.last.parameters():
            nn.init.zeros_(p)

    def architecture(self) -> dict[str, Any]:
        """The JSON object of which `build` makes this network."""
        return self.config.to_json()

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """x: (batch, dims). t: (batch,). label: (batch,) of integers, or None for no class."""
        column = t.to(x.dtype).reshape(-1, 1).expand(len(x), 1)
        if self.config.frequencies:
            rates = math.pi / 2 * 2.0 ** torch.arange(self.config.frequencies, dtype=x.dtype, device=x.device)
            column = torch.cat([torch.sin(rates * column), torch.cos(rates * column)], 1)
        h = self.body[0](torch.cat([x, column], 1))
        if self.classed is not None:
            none = torch.full((len(x),), self.classes, dtype=torch.int64, device=x.device)
            h = h + self.classed(none if label is None else label)
        elif label is not None:
            label_tensor(label, (), x)  # refuses it by name
        return self.last(self.body[1:](h))


class Potential(nn.Module):
    """Minus the gradient, in x, of a scalar network psi(x, t): a field whose Jacobian is symmetric.

    Args:
        config: of the network psi; or any module or function (x, t, label=) -> (batch,) or (batch, 1).
    """

    def __init__(self, config: MLPConfig | Callable[..., Tensor]):
        super().__init__()
        self.config = config if isinstance(config, MLPConfig) else None
        self.psi: Any = _Scaled(config) if isinstance(config, MLPConfig) else config
        self.classes = getattr(self.psi, "classes", 0)
        self.shape = getattr(self.psi, "shape", None)

    def architecture(self) -> dict[str, Any]:
        """The JSON object of which `build` makes this network.

        Raises:
            UsageError: a module of your own.
        """
        if self.config is None:
            raise UsageError(f"save: only potentials of pfode can be saved, got {type(self.psi).__name__}")
        return self.config.to_json()

    def potential(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """psi(x, t), (batch,).

        Raises:
            UsageError: not one number for every sample.
        """
        value = self.psi(x, t, **cond)
        if not isinstance(value, Tensor) or value.numel() != len(x):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"potential: need one number per sample, ({len(x)},), got {got}")
        return value.reshape(-1)

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """-d psi / dx, of the shape of x; differentiable once more where gradients are recorded."""
        record = torch.is_grad_enabled()
        with torch.enable_grad():
            start = x if record and x.requires_grad else x.detach().requires_grad_()
            total = self.potential(start, t, **cond).sum()
            (slope,) = torch.autograd.grad(total, start, create_graph=record)
        return -slope


class _Scaled(MLP):
    """A perceptron of one output, which starts small instead of at zero: at zero, its gradient has none to follow."""

    def __init__(self, config: MLPConfig):
        super().__init__(config, outputs=1)
        nn.init.normal_(self.last.weight, std=0.1 / math.sqrt(config.width))
