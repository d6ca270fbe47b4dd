"""What models of series are asked: a class or numbers, for each series or at each of its times; loss and figures."""

import torch
from torch import Tensor

from pfode.errors import UsageError, integer
from pfode.models.series.data import Series

__all__ = ["Task"]


class Task(torch.nn.Module):
    """A model with `forward(t, x)` that predicts labels: classes by their logits where these are whole numbers, else
    one number.

    Args:
        outputs: how many numbers it predicts.
        online: whether at each time, (batch, length, outputs), or of each series.
    """

    def __init__(self, outputs: int, online: bool = False):
        super().__init__()
        self.outputs, self.online = integer("outputs", outputs, 1), online

    def errors(self, series: Series) -> tuple[Tensor, Tensor]:
        """Predictions and labels of each series, or, of an online model, of each of its times: padding has none.

        Raises:
            UsageError: series without labels, or with more classes than outputs.
        """
        label = series.label
        if label is None:
            raise UsageError("the series have no labels to predict", "read(table, label=...)")
        if not label.is_floating_point() and len(series) and int(label.max()) >= self.outputs:
            raise UsageError(f"{int(label.max()) + 1} classes, and a model of {self.outputs} outputs")
        found = self(series.t, series.x)
        if self.online:
            there = ~torch.isnan(series.t)
            found, label = found[there], label[:, None].expand(there.shape)[there]
        return found, label

    def loss(self, series: Series, generator: torch.Generator, progress: float) -> Tensor:
        """Cross entropy of classes, or the mean square error."""
        found, label = self.errors(series)
        if label.is_floating_point():
            return (found[..., 0] - label).square().mean()
        return torch.nn.functional.cross_entropy(found, label)

    @torch.no_grad()
    def metrics(self, series: Series) -> dict[str, float]:
        """The loss, and the accuracy or the root mean square error."""
        found, label = self.errors(series)
        if label.is_floating_point():
            mean = float((found[..., 0] - label).square().mean())
            return {"loss": mean, "rmse": mean**0.5}
        loss = float(torch.nn.functional.cross_entropy(found, label))
        return {"loss": loss, "accuracy": float((found.argmax(-1) == label).float().mean())}
