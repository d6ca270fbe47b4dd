"""Kill `pfode sample` and `pfode train` at random moments, go on, and compare with runs that nobody stopped.

    python benchmarks/kills.py [--samples 50] [--interrupts 20] [--trains 100] [--saving 30] [--json FILE] [--seed 0]

SIGKILL ends a process that was forked from this one, which has imported torch already: nearly every kill falls into
the work itself. Each is followed by the same command, until a run comes to its end; then the folder is compared with
that of an uninterrupted run, and a new one is begun. Kills during saving wait for the temporary folder of a checkpoint;
those that leave it behind are counted. Ctrl-C goes to a process of its own, started as a user would. Exit code 1 if
anything was lost, doubled or different.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import harness
import torch
from safetensors.torch import load_file

import pfode
import pfode.cli.many  # all that the children need
import pfode.cli.train
from pfode.checkpoints import checkpoints, read_checkpoint
from pfode.cli.__main__ import main as command_line
from pfode.errors import FileError
from pfode.scores.training.data import load_data

SAMPLE = [
    "sample",
    "--model",
    "digits",
    "--steps",
    "4",
    "--batch",
    "16",
    "--separate",
    "run",
    "--quiet",
    "--device",
    "cpu",
]
TRAIN = ["train", "--data", "digits", "--widths", "8,16", "--batch", "8", "--warmup", "2", "--no-amp", "--resume"]
TRAIN += ["--out", "run", "--quiet", "--device", "cpu"]
LONGEST = 1.0  # seconds to the kill
LIMIT = 300.0  # seconds for a run
MODEL = "model.safetensors"  # of a checkpoint


class Child:
    """A forked process that runs a command line in a folder."""

    def __init__(self, words: list[str], folder: Path):
        self.folder, self.code = folder, None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(words)

    def _run(self, words: list[str]) -> None:
        code = 99
        try:
            os.chdir(self.folder)
            log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(log, 1)
            os.dup2(log, 2)
            command_line(words)
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else 0
        finally:
            os._exit(code)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Whether it has ended; waits so long, or until something is seen."""
        end = time.perf_counter() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.perf_counter() > end or until():
                return False
            else:
                time.sleep(0.0005)
        return True

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.code = os.waitstatus_to_exitcode(status)

    def finish(self) -> None:
        """Wait for its end, which must be a good one."""
        if not self.wait(LIMIT):
            self.kill()
        if self.code != 0:
            raise SystemExit(f"exit code {self.code}: {(self.folder / 'log.txt').read_text()}")


def digests(folder: Path, pattern: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


# ---- sample


def compare_pictures(folder: Path, whole: dict[str, str], totals: Counter[str]) -> None:
    """Add what is wrong in a folder that should hold these pictures."""
    found = digests(folder, "*.png")
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    totals["lost"] += len(whole.keys() - found.keys()) + len(whole.keys() - {line["file"] for line in lines})
    totals["doubled"] += len(found.keys() - whole.keys()) + len(lines) - len({line["seed"] for line in lines})
    totals["different"] += sum(whole[name] != digest for name, digest in found.items() if name in whole)
    totals["different"] += sum(whole.get(line["file"]) != line["sha256"] for line in lines)
    totals["left over"] += sum(path.suffix == ".tmp" or path.name.startswith("results.0") for path in folder.iterdir())


def kill_sample(work: Path, kills: int, n: int, chance: random.Random) -> Counter[str]:
    """SIGKILL during `pfode sample --separate`."""
    words = [*SAMPLE, "--n", str(n)]
    whole, folder = fresh(work / "whole"), fresh(work / "killed")
    began = time.perf_counter()
    Child(words, whole).finish()
    longest = min(LONGEST, 0.5 * (time.perf_counter() - began))
    wanted, totals = digests(whole / "run", "*.png"), Counter[str]()
    compare_pictures(whole / "run", wanted, totals)
    while totals["kills"] < kills:
        child = Child(words, folder)
        if not child.wait(chance.uniform(0, longest)):
            child.kill()
            totals["kills"] += 1
            totals["while writing"] += any(folder.glob("run/.*.tmp"))
            continue
        child.finish()
        totals["finished"] += 1
        compare_pictures(folder / "run", wanted, totals)
        fresh(folder)
    Child(words, folder).finish()
    totals["finished"] += 1
    compare_pictures(folder / "run", wanted, totals)
    totals["sheets different"] += digests(whole, "sheet.png") != digests(folder, "sheet.png")
    return totals


def interrupt_sample(work: Path, count: int, n: int, chance: random.Random) -> Counter[str]:
    """Ctrl-C during `pfode sample --separate`: exit code, seconds, and what is finished."""
    words = [*SAMPLE, "--n", str(n)]
    whole = fresh(work / "whole")
    Child(words, whole).finish()
    wanted, totals = digests(whole / "run", "*.png"), Counter[str]()
    folder = fresh(work / "stopped")
    endless = [word if word != str(n) else str(100 * n) for word in words]
    slowest, lines = 0.0, []
    for _ in range(count):
        command = [sys.executable, "-m", "pfode.cli", *endless]
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            before = len(list(folder.glob("run/*.png")))
            while process.poll() is None and len(list(folder.glob("run/*.png"))) == before:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.5))
            began = time.perf_counter()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=LIMIT)
            seconds = time.perf_counter() - began
        slowest = max(slowest, seconds)
        totals["interrupts"] += 1
        totals["exit code not 130"] += process.returncode != 130
        totals["later than 2 s"] += seconds > 2
        totals["tracebacks"] += b"Traceback" in err or bool(out)
        found = digests(folder / "run", "*.png")
        totals["different"] += sum(wanted.get(name, digest) != digest for name, digest in found.items())
        lines = [json.loads(line) for line in (folder / "run" / "results.jsonl").read_text().splitlines()]
        totals["different"] += sum(found.get(line["file"]) != line["sha256"] for line in lines)
        totals["doubled"] += len(lines) - len({line["seed"] for line in lines})
        totals["left over"] += len(list(folder.glob("run/.*.tmp")))
    print(f"  slowest exit {slowest:.2f} s, {len(lines)} pictures at the end")
    return totals


# ---- train


def compare_networks(folder: Path, whole: Path, totals: Counter[str]) -> None:
    """Add what is different between two finished runs: weights, averages, optimiser, losses; of the checkpoint as a
    model, whose text tells how long it was trained, its tensors."""
    ours, theirs = (digests(checkpoints(place / "run")[0], "*.safetensors") for place in (folder, whole))
    totals["different"] += {**ours, MODEL: None} != {**theirs, MODEL: None}
    model, wanted = (load_file(checkpoints(place / "run")[0] / MODEL) for place in (folder, whole))
    same = model.keys() == wanted.keys() and all(torch.equal(model[name], wanted[name]) for name in wanted)
    totals["different"] += not same
    losses = [
        [json.loads(line)["loss"] for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
        for place in (folder, whole)
    ]
    totals["different losses"] += losses[0] != losses[1]


def last_step(folder: Path) -> int:
    """The last step that metrics.jsonl tells of."""
    step = 0
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "run" / "metrics.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                step = int(json.loads(line)["step"])
    return step


def inspect_checkpoints(folder: Path, interval: int, totals: Counter[str]) -> None:
    """Add what a kill has broken: every complete checkpoint must be sound, and the newest a recent one."""
    newest = 0
    for path in checkpoints(folder / "run"):
        if not (path / "manifest.json").exists():  # being removed
            continue
        try:
            manifest, _ = read_checkpoint(path)
            newest = max(newest, manifest["step"])
            totals["mixed"] += manifest["step"] != int(path.name.removeprefix("step-"))
        except FileError:
            totals["unloadable"] += 1
    totals["lost more than an interval"] += last_step(folder) - newest > interval


def kill_train(work: Path, kills: int, saving: int, steps: int, interval: int, chance: random.Random) -> Counter[str]:
    """SIGKILL during `pfode train`; so many of the kills leave a half-written checkpoint."""
    words = [*TRAIN, "--steps", str(steps), "--save-every", str(interval)]
    whole, folder = fresh(work / "whole"), fresh(work / "killed")
    Child(words, whole).finish()
    totals = Counter[str]()

    def half_written() -> bool:
        return any(folder.glob("run/.step-*.tmp"))

    while totals["kills"] < kills:
        child = Child(words, folder)
        ended = child.wait(chance.uniform(0.1, LONGEST))
        if not ended and totals["during saving"] < saving:
            ended = child.wait(LIMIT, half_written) or child.wait(chance.uniform(0, 0.01))
        if not ended:
            child.kill()
            totals["kills"] += 1
            totals["during saving"] += half_written()
            inspect_checkpoints(folder, interval, totals)
            continue
        child.finish()
        totals["finished"] += 1
        compare_networks(folder, whole, totals)
        fresh(folder)
    Child(words, folder).finish()
    totals["finished"] += 1
    compare_networks(folder, whole, totals)
    return totals


COUNTED = ("kills", "interrupts", "while writing", "during saving", "finished")
WRONG = {
    "sample, SIGKILL": ("lost", "doubled", "different", "left over", "sheets different"),
    "sample, Ctrl-C": ("exit code not 130", "later than 2 s", "tracebacks", "doubled", "different", "left over"),
    "train, SIGKILL": ("unloadable", "mixed", "lost more than an interval", "different", "different losses"),
}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--samples", type=int, default=50, metavar="N", help="kills of pfode sample (50)")
    parser.add_argument("--pictures", type=int, default=1000, metavar="N", help="of a run that is killed (1000)")
    parser.add_argument("--interrupts", type=int, default=20, metavar="N", help="Ctrl-C for pfode sample (20)")
    parser.add_argument("--trains", type=int, default=100, metavar="N", help="kills of pfode train (100)")
    parser.add_argument("--saving", type=int, default=30, metavar="N", help="of these at least during saving (30)")
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="of a training that is killed (150)")
    parser.add_argument("--interval", type=int, default=5, metavar="N", help="steps between its checkpoints (5)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # and nothing is computed before the forks
    if options.trains:
        load_data("digits")  # its imports, once
    pfode.make_plan("auto", pfode.load("digits").process, 4)
    chance = random.Random(options.seed)
    totals: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        parts: dict[str, tuple[int, Callable[[], Counter[str]]]] = {
            "sample, SIGKILL": (
                options.samples, lambda: kill_sample(work, options.samples, options.pictures, chance)
            ),
            "sample, Ctrl-C": (
                options.interrupts, lambda: interrupt_sample(work, options.interrupts, options.pictures, chance)
            ),
            "train, SIGKILL": (
                options.trains,
                lambda: kill_train(work, options.trains, options.saving, options.steps, options.interval, chance),
            ),
        }  # fmt: skip
        for title, (count, part) in parts.items():
            if count:
                began = time.perf_counter()
                totals[title] = part()
                counted = [key for key in COUNTED if key in totals[title]]
                totals[title] = Counter({key: totals[title][key] for key in (*counted, *WRONG[title])})
                said = ", ".join(f"{key} {value}" for key, value in totals[title].items())
                print(f"{title}: {said} ({time.perf_counter() - began:.0f} s)", flush=True)
    harness.record(options, {"totals": totals})
    wrong = sum(counts[key] for title, counts in totals.items() for key in WRONG[title])
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
