"""`pfode sample --separate`: continued, repaired, shared, halved, flagged; never lost, doubled or changed."""

import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pfode.cli import images
from pfode.scores.networks.unet import UNet

ROOT = Path(__file__).parents[2]
WORDS = ("sample", "--steps", 2, "--batch", 8, "--quiet")


def digests(folder: Path) -> dict[str, str]:
    """sha256 of the pictures, by name."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.png"))}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def assert_whole(folder: Path, n: int, wanted: dict[str, str]) -> None:
    """n pictures as wanted, each once in the results, and nothing else."""
    assert digests(folder) == wanted
    assert [line["seed"] for line in lines(folder)] == list(range(n))
    assert {line["file"]: line["sha256"] for line in lines(folder)} == wanted
    assert {p.name for p in folder.iterdir()} == {*wanted, "results.jsonl", "run.json"}


@pytest.fixture
def whole(cli, tmp_path):
    """The digests of 20 pictures drawn at once."""
    assert cli(*WORDS, "--n", 20, "--separate", "whole", "--out", "whole.png").code == 0
    found = digests(tmp_path / "whole")
    assert_whole(tmp_path / "whole", 20, found)
    return found


@pytest.fixture
def evaluated(monkeypatch):
    """The batch sizes of all evaluations of the network."""
    sizes: list[int] = []
    forward = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda net, x, *a, **k: sizes.append(len(x)) or forward(net, x, *a, **k))
    return sizes


def test_a_second_run_draws_nothing(cli, tmp_path, whole, evaluated):
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "whole").glob("*.png")}
    done = cli(*WORDS, "--n", 20, "--separate", "whole", "--json")
    assert (done.code, done.json["drawn"], done.json["kept"]) == (0, 0, 20)
    assert evaluated == []
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_what_is_missing_or_damaged_is_drawn_again(cli, tmp_path, whole, evaluated):
    folder = tmp_path / "whole"
    (folder / "000002.png").unlink()
    (folder / "000003.png").write_bytes((folder / "000004.png").read_bytes())
    (folder / "000017.png").write_bytes((folder / "000017.png").read_bytes()[:-1])
    (folder / ".000018.png.x7_yz.tmp").write_bytes(b"half")
    kept = (folder / "000001.png").stat().st_mtime_ns
    done = cli(*WORDS, "--n", 20, "--separate", "whole", "--json")
    assert (done.json["drawn"], done.json["kept"]) == (3, 17)
    assert evaluated == [8, 8, 4, 4]  # the two batches they belong to, two evaluations each
    assert (folder / "000001.png").stat().st_mtime_ns == kept
    assert_whole(folder, 20, whole)


def test_torn_results_are_repaired(cli, tmp_path, whole):
    folder = tmp_path / "whole"
    raw = (folder / "results.jsonl").read_bytes()
    for torn in (
        raw[:-1],
        raw[:-30],
        raw[:700],
        raw + b'{"seed": 3',
        raw + raw,
        b"\xff\x00" + raw,
        b"",
        b"[]\n1\n" + raw,
    ):
        (folder / "results.jsonl").write_bytes(torn)
        assert cli(*WORDS, "--n", 20, "--separate", "whole").code == 0
        assert_whole(folder, 20, whole)


def test_parts_of_stopped_processes_are_taken_over(cli, tmp_path, whole, evaluated):
    folder = tmp_path / "whole"
    raw = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "results.jsonl").write_bytes(b"".join(raw[:9]))
    (folder / "results.1.jsonl").write_bytes(b"".join(raw[8:15]) + raw[15][:40])
    (folder / "results.2.jsonl").write_bytes(b"".join(raw[15:]))
    assert cli(*WORDS, "--n", 20, "--separate", "whole").code == 0
    assert evaluated == []
    assert_whole(folder, 20, whole)


def test_more_pictures_may_follow(cli, tmp_path, whole):
    assert cli(*WORDS, "--n", 11, "--separate", "part").code == 0
    done = cli(*WORDS, "--n", 20, "--batch", 5, "--separate", "part", "--json")
    assert (done.json["drawn"], done.json["kept"]) == (9, 11)
    assert_whole(tmp_path / "part", 20, whole)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", 3), "--steps is 2 there, 3 here"),
        (("--sampler", "heun"), "--sampler is"),
        (("--model", "digits-vp"), "--model is digits there, digits-vp here"),
        (("--label", "3"), "--label is none there, 3 here"),
        (("--dtype", "fp64"), "--dtype is not given there, fp64 here"),
        (("--n", 4), "--n is 6 there, 4 here"),
        (("--seed", 1), "--seed is 0 there, 1 here"),
        (("--seeds", "0,2"), "--seeds is 6 seeds there, 2 others here"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_other_settings_are_refused(cli, tmp_path, words, said):
    assert cli(*WORDS, "--n", 6, "--separate", "a").code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    n = () if "--seeds" in words else ("--n", 6)
    refused = cli(*WORDS, *n, "--separate", "a", *words)
    assert refused.code == 2
    assert said in refused.err
    assert "--overwrite" in refused.err
    assert before == {p: p.read_bytes() for p in (tmp_path / "a").iterdir()}


def test_overwrite_starts_anew(cli, tmp_path, whole):
    folder = tmp_path / "whole"
    (folder / "notes.txt").write_text("mine")
    assert cli(*WORDS, "--n", 5, "--separate", "whole", "--steps", 3, "--overwrite").code == 0
    assert {p.name for p in folder.glob("*.png")} == {f"{i:06d}.png" for i in range(5)}
    assert digests(folder)["000000.png"] != whole["000000.png"]
    assert (folder / "notes.txt").read_text() == "mine"
    assert cli(*WORDS, "--overwrite").code == 2


def test_folders_of_others(cli, tmp_path, whole):
    folder = tmp_path / "whole"
    settings = json.loads((folder / "run.json").read_text())
    for broken in ("", "[]", "{", "{}", json.dumps(settings | {"options": 3}), json.dumps(settings | {"model": None})):
        (folder / "run.json").write_text(broken)
        refused = cli(*WORDS, "--n", 20, "--separate", "whole")
        assert (refused.code, "run.json: damaged" in refused.err) == (3, True)
    (folder / "run.json").unlink()
    refused = cli(*WORDS, "--n", 20, "--separate", "whole")
    assert (refused.code, "no run.json" in refused.err) == (2, True)
    assert digests(folder) == whole


def test_a_full_disk_keeps_what_is_finished(cli, tmp_path, whole, monkeypatch):
    sync, calls = os.fsync, []

    def full(handle):
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            calls.append(handle)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = cli(*WORDS, "--n", 20, "--separate", "a")
    assert (done.code, "No space left" in done.err) == (7, True)
    assert len(digests(tmp_path / "a")) == len(lines(tmp_path / "a")) == 10  # two were run.json and results.jsonl
    done = cli(*WORDS, "--n", 20, "--separate", "a", "--json")
    assert (done.json["drawn"], done.json["kept"]) == (10, 10)
    assert_whole(tmp_path / "a", 20, whole)


def test_the_sheet_shows_the_first_hundred(cli, tmp_path):
    words = ("--steps", 1, "--label", "all", "--quiet")
    done = cli("sample", *words, "--n", 110, "--separate", "a", "--trajectory", "path.gif", "--json")
    assert done.json["files"] == ["sheet.png", "path.gif", "a/results.jsonl", "a/run.json"]
    assert images.read_settings(tmp_path / "sheet.png")["options"]["n"] == 100
    assert cli("sample", "--like", "sheet.png", "--out", "again.png").code == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "sheet.png").read_bytes()
    assert len(digests(tmp_path / "a")) == 110


# ---- memory


@pytest.fixture
def small_memory(monkeypatch):
    """A function that lets the network run out of memory above so many samples, in one of three ways."""
    forward = UNet.forward

    def limit(most: int, error: BaseException) -> None:
        def limited(net, x, *args, **options):
            if len(x) > most:
                raise error
            return forward(net, x, *args, **options)

        monkeypatch.setattr(UNet, "forward", limited)

    return limit


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 bytes")],
)
def test_the_batch_halves(cli, tmp_path, whole, small_memory, error):
    small_memory(3, error)
    done = cli("sample", "--steps", 2, "--batch", 8, "--n", 20, "--separate", "a")
    assert done.code == 0
    assert "out of memory: going on with --batch 2" in done.err
    assert_whole(tmp_path / "a", 20, whole)
    assert cli(*WORDS, "--n", 20, "--out", "again.png").code == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_out_of_memory_at_one(cli, tmp_path, small_memory):
    small_memory(0, MemoryError())
    for words in ((), ("--separate", "a")):
        done = cli(*WORDS, "--n", 3, *words)
        assert done.code == 6
        assert done.err.startswith("pfode: error: out of memory at a single sample")
        assert "hint: " in done.err
    assert not digests(tmp_path)


# ---- not finite


@pytest.fixture
def sick(monkeypatch):
    """The network gives NaN for one row of its second evaluation of every batch."""
    forward, calls = UNet.forward, []

    def broken(net, x, *args, **options):
        out = forward(net, x, *args, **options)
        calls.append(1)
        if len(calls) == 3 or len(calls) > 100:
            out[2] = torch.nan
        return out

    def start(always: bool = False) -> None:
        calls.extend([1] * 100 * always)
        monkeypatch.setattr(UNet, "forward", broken)

    return start


def test_flagged_pictures_are_left_out(cli, tmp_path, whole, sick, monkeypatch):
    """Seed 10 is spoilt at the first of two evaluations; the others are those of a sound network."""
    with monkeypatch.context():
        sick()
        done = cli(*WORDS, "--n", 20, "--separate", "a", "--nan", "flag", "--json")
    assert done.code == 5
    assert "seed 10 after step" in done.json["error"]["message"]
    assert "of 2, t = " in done.json["error"]["message"]
    assert digests(tmp_path / "a") == {name: digest for name, digest in whole.items() if name != "000010.png"}
    (line,) = (line for line in lines(tmp_path / "a") if line["status"] == "non_finite")
    assert (line["seed"], line["sample"], line["step"] in (1, 2), line["time"] > 0) == (10, 10, True, True)
    with Image.open(tmp_path / "sheet.png") as sheet:  # a cross on white, never a black picture
        tile = np.asarray(sheet)[2 + 2 * 98 : 98 + 2 * 98 : 12, 2:98:12]
    assert tile.shape == (8, 8)
    assert (tile == 0).sum() <= 16
    done = cli(*WORDS, "--n", 20, "--separate", "a", "--json")  # the network has recovered
    assert (done.code, done.json["drawn"]) == (0, 1)
    assert_whole(tmp_path / "a", 20, whole)


def test_a_spoilt_picture_stops_the_run(cli, tmp_path, whole, sick):
    sick()
    done = cli(*WORDS, "--n", 20, "--separate", "a")
    assert done.code == 5
    assert "1 of 20 pictures not finite: seed 10 after step" in done.err
    assert digests(tmp_path / "a") == {f"{i:06d}.png": whole[f"{i:06d}.png"] for i in range(16) if i != 10}


def test_a_sheet_with_a_spoilt_picture(cli, tmp_path, sick):
    sick(always=True)
    assert cli("sample", "--steps", 2, "--n", 4, "--quiet").code == 5
    assert not (tmp_path / "sheet.png").exists()
    done = cli("sample", "--steps", 2, "--n", 4, "--quiet", "--nan", "flag")
    assert done.code == 5
    assert "seed 2 after step 1 of 2, t = 80" in done.err
    assert (tmp_path / "sheet.png").exists()


# ---- stops and processes


def start(words: str, folder: Path, **env: str) -> subprocess.Popen[str]:
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        [sys.executable, "-m", *words.split()],
        cwd=folder,
        env=everything,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_kills(tmp_path):
    """The short form of `benchmarks/kills.py`: SIGKILL at random moments loses, doubles and changes nothing."""
    few = "--samples 5 --pictures 200 --interrupts 0 --trains 3 --saving 1 --steps 20"
    script = [sys.executable, ROOT / "benchmarks" / "kills.py", *few.split()]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sample, SIGKILL: kills 5" in done.stdout
    assert "train, SIGKILL: kills 3" in done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_and_continued(cli, tmp_path, whole, number, code):
    """How soon it ends is measured by benchmarks/kills.py; here it ends well before its 20,000 pictures."""
    words = "sample --model digits --label none --steps 2 --batch 8 --quiet --n 20000 --separate a"
    with start(f"pfode.cli {words}", tmp_path) as process:
        while not (tmp_path / "a" / "000030.png").exists():
            time.sleep(0.01)
            assert process.poll() is None, process.communicate()
        process.send_signal(number)
        process.communicate(timeout=20)
    assert process.returncode == code
    folder = tmp_path / "a"
    drawn = [line for line in (folder / "results.jsonl").read_bytes().splitlines() if line.endswith(b"}")]
    assert len(drawn) >= 30
    settings = (folder / "run.json").read_text().replace("20000", "20")
    (folder / "run.json").write_text(settings)
    for path in folder.glob("*.png"):  # what lies beyond the 20 is not looked at here
        if path.name not in whole:
            path.unlink()
    done = cli(*WORDS, "--n", 20, "--separate", "a", "--json")
    assert (done.json["drawn"], done.json["kept"]) == (0, 20)
    assert_whole(folder, 20, whole)


def test_two_runs_in_one_folder(cli, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "a").mkdir()
    handle = os.open(tmp_path / "a", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    refused = cli(*WORDS, "--n", 2, "--separate", "a")
    os.close(handle)
    assert (refused.code, "another run" in refused.err) == (2, True)
    assert cli(*WORDS, "--n", 2, "--separate", "a").code == 0


def test_two_processes_draw_as_one(tmp_path, whole):
    """Two `accelerate launch --cpu`, told who they are by the environment, as mpirun does."""
    folder = tmp_path / "whole"
    shutil.copytree(folder, tmp_path / "a")
    for name in ("000001.png", "000009.png", "000012.png", "000019.png"):
        (tmp_path / "a" / name).unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = "accelerate.commands.launch --cpu --num_processes=1 --num_machines=1 --mixed_precision=no "
    launch += (
        "--dynamo_backend=no -m pfode.cli sample --model digits --label none --steps 2 --batch 8 --n 20 --separate a"
    )
    shared = {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    started = [start(launch, tmp_path, **shared, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert [out for out, _ in said] == ["sheet.png\n", ""]
    assert "4 drawn, 16 kept" in said[0][1]
    assert_whole(tmp_path / "a", 20, whole)
    assert (tmp_path / "a" / "run.json").read_bytes() == (folder / "run.json").read_bytes()
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_processes_need_a_folder(cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    refused = cli(*WORDS)
    assert (refused.code, "--separate" in refused.err) == (2, True)
