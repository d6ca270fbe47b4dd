"""Models of irregular time series: what they reach, beside recurrent networks trained by the same budget.

    python benchmarks/series.py step --json benchmarks/series.json                       # about 1 CPU minute
    python benchmarks/series.py vowels --data aeon-1.6.0-py3-none-any.whl --seeds 5      # about 3 CPU minutes

vowels: accuracy on JapaneseVowels with 70 % of the times dropped, five seeds: a neural CDE, an ODE-RNN and a GRU-D (Che
et al. 2018, written here) with the same trainer, epochs and size of state. The data (UCI, CC BY 4.0) are read from the
wheel of aeon 1.6, which has them: pip download --no-deps aeon.
step: a training step of a latent ODE at the times of each of 100 series, and at the union of all their times, as its
first implementation has them (Rubanova et al. 2019); processor time of one thread.
"""

import statistics
import time
import zipfile
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

from pfode.models import ODERNN, LatentODE, NeuralCDE
from pfode.models.series import Scale, Series, Trainer, Training, read_ts
from pfode.models.series.data import generator
from pfode.models.tasks import Task


class GRUD(Task):
    """GRU-D: what is missing decays from the last value to the mean (0), and the state decays, with the time since.

    Args:
        channels, outputs, hidden: sizes.
    """

    def __init__(self, channels: int, outputs: int, hidden: int = 32):
        super().__init__(outputs)
        self.cell = torch.nn.GRUCell(2 * channels, hidden)
        self.values, self.state = torch.nn.Parameter(torch.zeros(channels)), torch.nn.Linear(channels, hidden)
        self.readout = torch.nn.Linear(hidden, outputs)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        seen, there = ~torch.isnan(x), ~torch.isnan(t)
        h, last, since = (
            x.new_zeros(len(x), self.cell.hidden_size),
            torch.zeros_like(x[:, 0]),
            torch.zeros_like(x[:, 0]),
        )
        for i in range(t.shape[1]):
            gap = torch.nan_to_num(t[:, i] - t[:, i - 1])[:, None] if i else torch.zeros_like(t[:, :1])
            since = since + gap
            decayed = last * torch.exp(-torch.relu(self.values) * since)
            now = torch.where(seen[:, i], torch.nan_to_num(x[:, i]), decayed)
            state = h * torch.exp(-torch.relu(self.state(since)))
            after = self.cell(torch.cat([now, seen[:, i].to(x)], -1), state)
            h = torch.where(there[:, i, None], after, h)
            last = torch.where(seen[:, i], torch.nan_to_num(x[:, i]), last)
            since = torch.where(seen[:, i], 0.0, since)
        return self.readout(h)


def vowels(wheel: Path, seeds: int, epochs: int, dropped: float) -> dict[str, Any]:
    """Accuracies on the archive's own test part, by model."""
    with zipfile.ZipFile(wheel) as archive:
        name = "aeon/datasets/data/JapaneseVowels/JapaneseVowels_{}.ts"
        train, test = (read_ts(archive.read(name.format(part))) for part in ("TRAIN", "TEST"))
    scale = Scale.of(train)
    models = {
        "neural CDE": lambda: NeuralCDE(12, 9, hidden=32, width=64),
        "ODE-RNN": lambda: ODERNN(12, 9, hidden=32, width=64),
        "GRU-D": lambda: GRUD(12, 9, hidden=32),
    }
    found: dict[str, list[float]] = {name: [] for name in models}
    for seed in range(seeds):
        parts = [scale.apply(part.dropped(dropped, seed)) for part in (train, test)]
        for name, make in models.items():
            torch.manual_seed(seed)
            trainer = Trainer(make(), parts[0], Training(epochs=epochs, batch=32, rate=5e-3, decay=0.01, seed=seed))
            for _ in trainer.run():
                pass
            found[name].append(trainer.evaluate(parts[1])["accuracy"])
            print(f"  seed {seed}  {name:12s} {found[name][-1]:.4f}", flush=True)
    for name, values in found.items():
        print(f"{name:12s} {statistics.mean(values):.4f} +- {statistics.stdev(values) if len(values) > 1 else 0:.4f}")
    return {"dropped": dropped, "epochs": epochs, "accuracy": found}


def step(repeats: int, count: int = 100, times: int = 20) -> dict[str, Any]:
    """Seconds of a training step, by whose times it is made at."""
    draw = torch.Generator().manual_seed(0)
    t = torch.rand(count, times, generator=draw).sort(1).values
    own = Series(t, torch.stack([(7 * t).sin(), (7 * t).cos()], -1))
    union = t.flatten().sort().values
    place = torch.searchsorted(union, t)
    x = torch.full((count, len(union), 2), float("nan")).scatter(1, place[..., None].expand(-1, -1, 2), own.x)
    joined = Series(union.expand(count, -1).contiguous(), x)
    model, found = LatentODE(2, latent=6, hidden=32, width=48), {}

    def made(series: Series) -> Any:
        def run() -> None:
            model.zero_grad()
            model.loss(series, generator("step"), 1.0).backward()

        return harness.seconds(run, time.process_time)

    found["own times"] = min(harness.turns({"own": made(own)}, repeats, 1)["own"])
    found["union of times"] = made(joined)()
    print(
        f"{count} series of {times} times: own {found['own times']:.3f} s, union {found['union of times']:.3f} s, ",
        end="",
    )
    print(f"{found['own times'] / found['union of times']:.3f}x")
    return found


def main() -> None:
    parser = harness.parser(__doc__, 3)
    parser.add_argument("what", choices=("vowels", "step"))
    parser.add_argument("--data", type=Path, help="the wheel of aeon, for vowels")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--dropped", type=float, default=0.7, help="share of the times (0.7)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "step":
        harness.record(options, {"step": step(options.repeats)})
        return
    if options.data is None:
        parser.error("vowels: --data aeon-1.6.0-py3-none-any.whl (pip download --no-deps aeon==1.6.0)")
    harness.record(options, {"vowels": vowels(options.data, options.seeds, options.epochs, options.dropped)})


if __name__ == "__main__":
    main()
