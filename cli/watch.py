"""A training run as it is watched: a bar or a line a minute, sheets of samples, a polite stop."""

import contextlib
import io
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import pfode
from pfode.cli.streams import Output
from pfode.files import write_atomic

if TYPE_CHECKING:
    from pfode.scores.training.trainer import Record, Trainer

__all__ = ["Stop", "draw", "duration", "stoppable", "watch"]

EVERY = 60.0  # seconds between plain lines
RECENT = 200  # steps whose mean loss is shown
SHEET_STEPS = 12
SHEET = 64  # pictures of a sheet without classes
MANY = 100  # classes that a sheet shows at most


class Stop:
    """Whether a signal has asked for the end of the run, and which."""

    number: int | None = None


@contextlib.contextmanager
def stoppable(active: bool) -> Iterator[Stop]:
    """Let the first SIGINT or SIGTERM only ask for the end, so that the step under way is finished; a second one ends.

    Args:
        active: False leaves the signals as they are, as a run of several processes must, whose steps are in common.
    """
    stop = Stop()
    if not active or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.number = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch(trainer: "Trainer", out: Output, stop: Stop, budget: float | None, sheets: dict[str, Any]) -> float | None:
    """Train until the end or until `stop` asks for it; the mean loss of the last steps, None if there were none.

    Args:
        budget: seconds of training in all, or None.
        sheets: every (steps between sheets, 0 for none), sampler, guidance.
    """
    from tqdm import tqdm

    speaks = trainer.main and not out.quiet
    terminal = sys.stderr is not None and sys.stderr.isatty()
    losses: deque[float] = deque(maxlen=RECENT)
    lines = Lines(out, trainer)
    hidden = not (speaks and terminal)
    with tqdm(total=trainer.config.steps, initial=trainer.step, disable=hidden, unit="step", dynamic_ncols=True) as bar:
        for record in trainer.run(budget):
            losses.append(record.loss)
            mean = sum(losses) / len(losses)
            bar.total = trainer.config.steps
            bar.set_postfix_str(f"loss {mean:.4f}, {record.images_per_second:.0f} images/s", refresh=False)
            bar.update()
            if speaks and not terminal:
                lines.say(record, mean)
            if trainer.main and sheets["every"] and record.step % sheets["every"] == 0:
                draw(trainer, record.step, sheets["sampler"], sheets["guidance"])
            if stop.number is not None:
                break
    return sum(losses) / len(losses) if losses else None


class Lines:
    """Plain lines for where there is no terminal: after ten steps, then one a minute."""

    def __init__(self, out: Output, trainer: "Trainer"):
        self.out, self.trainer = out, trainer
        self.first, self.began = trainer.step, time.monotonic()
        self.next: float | None = None

    def say(self, record: "Record", loss: float) -> None:
        """A line, if it is time for one."""
        now, done = time.monotonic(), record.step - self.first
        if done < 10 if self.next is None else now < self.next:
            return
        self.next = now + EVERY
        each = (now - self.began) / done
        steps = self.trainer.config.steps
        pictures = self.trainer.config.batch / each if each > 0 else 0
        left = duration(each * (steps - record.step))
        self.out.note(f"step {record.step} of {steps}, loss {loss:.4f}, {pictures:.0f} images/s, {left} left")


def duration(seconds: float) -> str:
    """A time in words: "45 s", "12 min", "1 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def draw(trainer: "Trainer", step: int, sampler: str, guidance: float | None) -> None:
    """A sheet of samples from the average so far: every class in turn, the same seeds each time."""
    from PIL import Image

    from pfode.cli import images, plane
    from pfode.scores.training.points import Points

    assert trainer.folder is not None
    den: Any = trainer.denoiser()
    if isinstance(trainer.data, Points):
        write_atomic(trainer.folder / f"points-{step:06d}.png", plane.draw(den, trainer.data))
        return
    classes = len(trainer.data.names)
    rows = 4 if classes <= 20 else 1
    n = rows * min(classes, MANY) if classes > 1 else SHEET
    label = [i % classes for i in range(n)] if classes else None
    guided = guidance if classes else None
    x = pfode.sample(den, n, SHEET_STEPS, sampler, label=label, guidance=guided, nan="flag").x.nan_to_num()
    pixels = images.to_pixels(x)
    columns = images.sheet_columns(n, classes)
    sheet = images.contact_sheet(pixels, images.default_scale(n, x.shape[2], x.shape[3], columns), columns)
    stream = io.BytesIO()
    Image.fromarray(sheet).save(stream, "PNG")
    write_atomic(trainer.folder / f"sheet-{step:06d}.png", stream.getvalue())
