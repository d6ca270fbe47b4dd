"""Neural controlled differential equations (Kidger et al. 2020): a hidden state driven by the path through a series."""

import itertools
from typing import Any

import torch
from torch import Tensor

from pfode.cde import Online, Path, cdesolve, hermite, linear, natural, rectilinear
from pfode.errors import UsageError, integer, unknown
from pfode.models.tasks import Task

__all__ = ["CDEField", "NeuralCDE"]

PATHS = {"hermite": hermite, "linear": linear, "natural": natural, "rectilinear": rectilinear}


class CDEField(torch.nn.Module):
    """f(z), a network that ends in tanh: a matrix of shape (..., hidden, channels), which does not depend on the time,
    as that is a channel of the path.

    Args:
        hidden, channels: its sizes. width, depth: of the network's layers in between.
    """

    def __init__(self, hidden: int, channels: int, width: int = 64, depth: int = 1):
        super().__init__()
        sizes = [hidden, *[width] * depth]
        layers = [part for a, b in itertools.pairwise(sizes) for part in (torch.nn.Linear(a, b), torch.nn.ReLU())]
        self.network = torch.nn.Sequential(*layers, torch.nn.Linear(sizes[-1], hidden * channels), torch.nn.Tanh())
        self.channels = channels

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.network(z).view(*z.shape, self.channels)


class NeuralCDE(Task):
    """z(t0) = g(X(t0)), dz = f(z) dX, prediction = l(z): for each series at its end, or at each of its times.

    The path X has the time, the values and, for each of them, how many were observed so far: where values are missing
    says something. A model that is `online` is driven by a rectilinear path: what it
    predicts at a time depends on nothing that comes after it, and `stream` makes it observation by observation.

    Args:
        channels: of the series. outputs: classes, or numbers to predict.
        hidden, width, depth: size of the state, and of the field's network.
        path: "hermite", "linear", "natural" or "rectilinear"; None: "rectilinear" if online, else "hermite".
        online: whether it predicts at each of a series' times.
        counts: whether the path has the numbers of observations.
        method, options: of `cdesolve`; by default one step of "rk4" from each observation to the next.

    Raises:
        UsageError: unknown names; an online model along a path that looks ahead.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        hidden: int = 32,
        width: int = 64,
        depth: int = 1,
        path: str | None = None,
        online: bool = False,
        counts: bool = True,
        method: str = "rk4",
        **options: Any,
    ):
        super().__init__(outputs, online)
        path = path or ("rectilinear" if online else "hermite")
        if path not in PATHS:
            raise unknown("path", path, PATHS)
        if online and path != "rectilinear":
            raise UsageError(f"path: values that are missing make a {path} path look ahead", 'path="rectilinear"')
        self.counts, self.path_kind, self.method, self.options = counts, path, method, options
        self.channels = integer("channels", channels, 1)
        size = 1 + channels * (2 if counts else 1)
        self.initial = torch.nn.Linear(size, hidden)
        self.field = CDEField(hidden, size, width, depth)
        self.readout = torch.nn.Linear(hidden, outputs)

    def path(self, t: Tensor, x: Tensor) -> Path:
        """The path of series: t of shape (batch, length), x of shape (batch, length, channels)."""
        features = [t[..., None], x]
        if self.counts:
            features.append((~torch.isnan(x)).to(x.dtype).cumsum(-2) * _COUNT)
        features = torch.cat(features, -1)
        options: Any = {"time": 0} if self.path_kind == "rectilinear" else {}
        return PATHS[self.path_kind](features, t, **options)

    def states(self, t: Tensor, x: Tensor) -> Tensor:
        """z at each of the times, shape (length, batch, hidden); what is padding has the last one's."""
        if t.shape[-1] < 2:  # a path needs two ends
            t = torch.cat([t, torch.full_like(t, torch.nan)], -1)
            x = torch.cat([x, torch.full_like(x, torch.nan)], -2)
        path = self.path(t, x)
        z0 = self.initial(path.start[..., 0, :].contiguous())
        return cdesolve(self.field, path, z0, None, method=self.method, **self.options).ys

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Predictions, shape (batch, outputs), or (batch, length, outputs) of an online model.

        Args:
            t: times, shape (batch, length), NaN where padded. x: values, shape (batch, length, channels), NaN where
                missing.
        """
        z = self.states(t, x)
        if not self.online:
            return self.readout(z[-1])
        return torch.stack([self.readout(each) for each in z[: t.shape[-1]]], 1)  # one by one, as a stream has them

    def stream(self) -> "CDEStream":
        """Predictions of an online model as the observations come.

        Raises:
            UsageError: the model is not online.
        """
        if not self.online:
            raise UsageError("this model predicts at the end of a series", "NeuralCDE(..., online=True)")
        return CDEStream(self)


_COUNT = 0.05  # of an observation: counts of some tens are of the size of scaled values


class CDEStream:
    """An online `NeuralCDE` fed observation by observation: the numbers of the whole series', bit for bit.

    Args:
        model: it.
    """

    def __init__(self, model: NeuralCDE):
        self.model, self.seen = model, torch.zeros((), device="cpu")
        self.online = Online(model.field, path="rectilinear", time=0, method=model.method)

    def observe(self, t: Tensor | float, x: Tensor) -> Tensor:
        """The prediction after one more observation.

        Args:
            t: its time. x: values, shape (batch, channels), NaN where missing.
        """
        features = [torch.full_like(x[..., :1], float(t)), x]
        if self.model.counts:
            self.seen = self.seen.to(x) + (~torch.isnan(x)).to(x.dtype)
            features.append(self.seen * _COUNT)
        values = torch.cat(features, -1)
        first = None if self.online.count else self.model.initial(values.nan_to_num(0.0))
        return self.model.readout(self.online.observe(t, values, first))
