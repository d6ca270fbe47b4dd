"""Progress bars on stderr, hidden where that is no terminal or the run is quiet, as callbacks of the library."""

import shutil
from typing import TYPE_CHECKING, Any

from pfode.cli.streams import Output

if TYPE_CHECKING:
    from tqdm import tqdm

    from pfode.plans.executor import Point
    from pfode.samplers import Progress

__all__ = ["CellBar", "FitBar", "PictureBar", "bar"]


def bar(out: Output, total: int | None = None, **options: Any) -> "tqdm[Any]":
    """A bar of tqdm; `options` are its own."""
    from tqdm import tqdm

    out.clear()
    columns, rows = shutil.get_terminal_size()  # sound also where the terminal claims to have no size
    return tqdm(total=total, disable=not out.watched, leave=False, ncols=min(columns, 100), nrows=rows, **options)


class _Bar:
    """A bar for the length of a `with`."""

    def __init__(self, out: Output, total: int, unit: str):
        self.out, self.bar = out, bar(out, total, unit=unit)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


class PictureBar(_Bar):
    """The callback of `pfode.sample`: a bar over n pictures, with their rate and the time left."""

    def __init__(self, n: int, out: Output):
        super().__init__(out, n, " pictures")
        self.visible = not self.bar.disable
        self.done = 0  # in the batches before

    def __call__(self, point: "Point") -> None:
        self.bar.set_postfix_str(f"NFE {point.nfe}", refresh=False)
        self.bar.update(self.done + len(point.x) * point.step // point.steps - self.bar.n)
        if point.step == point.steps:
            self.done += len(point.x)


class CellBar(_Bar):
    """The callback of `bench`: a bar over the measurements, with what is being measured."""

    def __init__(self, out: Output):
        super().__init__(out, 0, " cells")

    def __call__(self, done: int, total: int, what: str) -> None:
        self.bar.total = total
        self.bar.set_postfix_str(what, refresh=False)
        self.bar.update(done - self.bar.n)
        self.bar.refresh()


class FitBar(_Bar):
    """The callback of `pfode.fit_plan`: a bar over the samples of the fine solution, the iterations, the steps."""

    def __init__(self, out: Output, nfe: int):
        super().__init__(out, 0, "")
        self.nfe, self.stage = nfe, ""

    def __call__(self, progress: "Progress") -> None:
        if progress.stage != self.stage:
            self.bar.close()
            self.stage = progress.stage
            unit = {"teacher": " samples", "fit": " iterations", "tune": " steps"}[progress.stage]
            self.bar = bar(self.out, progress.total, unit=unit, desc=f"NFE {self.nfe}, {progress.stage}")
        if progress.stage != "teacher":
            ratios = progress.rms / progress.start_rms, progress.median / progress.start_median
            what = "start" if progress.stage == "fit" else "fitted plan"
            self.bar.set_postfix_str(f"rms {ratios[0]:.3f}, median {ratios[1]:.3f} of the {what}", refresh=False)
        self.bar.update(progress.done - self.bar.n)
