"""Malformed calls and files: one clear line, a hint, the right exit code, nothing half-written."""

import io
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

import pfode
from pfode.scores.io.shipped import shipped

LONG = "x" * 5000
CALLS = [
    ("smaple", 2, "did you mean 'sample'"),
    ("--smaple", 2, "No such option"),
    ("sample --stepz 3", 2, "--steps"),
    ("sample --steps -3", 2, "-3 is not in the range"),
    ("sample --steps 0", 2, "0 is not in the range"),
    ("sample --steps 2.5", 2, "'2.5' is not a valid"),
    ("sample --steps", 2, "requires an argument"),
    ("sample extra", 2, "unexpected extra argument"),
    ("sample --steps 3 --nfe 3", 2, "exclude each other"),
    ("sample --seed 1 --seeds 1-3", 2, "exclude each other"),
    ("sample --n 2 --seeds 1-3", 2, "exclude each other"),
    ("sample --nfe 0", 2, "0 is not in the range"),
    ("sample --n 0", 2, "0 is not in the range"),
    ("sample --n 999999999", 2, "more than"),
    ("sample --n 100000 --scale 8", 2, "pixels"),
    ("sample --n 4000 --steps 500 --trajectory x.gif", 2, "frames"),
    ("sample --seed -1", 2, "-1 is not in the range"),
    (f"sample --seed {2**64}", 2, "2^64"),
    ("sample --seeds 3-1", 2, "cannot read '3-1'"),
    ("sample --seeds a", 2, "cannot read 'a'"),
    ("sample --seeds 1,1", 2, "twice"),
    ("sample --seeds 0-999999999999", 2, "more than"),
    ("sample --sampler huen", 2, "did you mean 'heun'"),
    ("sample --sampler rk54 --rtol 1e-3", 2, "did you mean 'rk4' or 'rk45'"),
    ("sample --sampler rk45 --steps 5", 2, "--steps with rk45, which chooses its own steps"),
    ("sample --sampler rk45 --set tau=1", 2, "leave --set out"),
    ("sample --sampler rk45 --rtol 0", 2, "rtol: need a positive number"),
    ("sample --sampler rk45 --rtol x", 2, "'x' is not a valid float"),
    ("sample --sampler rk45 --atol -1", 2, "finite"),
    ("sample --sampler rk45 --brownian", 2, "draws no noise"),
    ("sample --sampler rk45 --trajectory x.gif", 2, "share no frames"),
    ("sample --sampler dpm-adaptive --chart flow", 2, "unknown chart for dpm-adaptive"),
    ("sample --rtol 1e-3", 2, "--rtol with auto, whose steps lie on a grid"),
    ("sample --sampler heun --atol 1e-3", 2, "an adaptive --sampler, such as rk45"),
    ("sample --grid karas", 2, "did you mean 'karras'"),
    ("sample --chart dpm --sampler dpm++2m", 2, "unknown chart"),
    ("sample --label 11", 2, "unknown label '11'"),
    ("sample --eta -1", 2, "finite"),
    ("sample --eta 0.5 --sampler heun", 2, "eta"),
    ("sample --set tau", 2, "NAME=VALUE"),
    ("sample --set tau=x", 2, "--set tau"),
    ("sample --set tau= --sampler sa-solver", 2, "--set tau"),
    ("sample --set chrn=3", 2, "did you mean 'churn'"),
    ("sample --set process=3", 2, "unknown sampler option"),
    ("sample --set eta=0.5", 2, "--eta 0.5"),
    ("sample --set tau=1 --set tau=2 --sampler sa-solver", 2, "twice"),
    ("sample --set tau=1 --sampler heun", 2, "heun takes no tau"),
    ("sample --set tau=1,2 --sampler sa-solver", 2, "tau"),
    ("sample --set between=1 --sampler sa-solver", 2, "between"),
    ("sample --set between=nan,1 --sampler sa-solver", 2, "between"),
    ("sample --set predictor=2.5 --sampler sa-solver", 2, "predictor"),
    ("sample --set churn=inf --sampler edm", 2, "churn"),
    ("sample --lower-order-final --sampler heun", 2, "one order only"),
    ("sample --afs --model digits-vp", 2, "--afs 0.5"),
    ("sample --afs 0.5 --sampler heun", 2, "inner calls"),
    ("sample --init bare.png --strength -1", 2, "of at least 0"),
    ("sample --afs much", 2, "not a valid float"),
    ("sample --brownian", 2, "draws no noise"),
    ("sample --grid karras(x)", 2, "need a number"),
    ("sample --strength 0.5", 2, "--init"),
    ("sample --init none.png", 3, "cannot be read"),
    ("sample --init text.txt", 3, "broken picture"),
    ("sample --init folder", 3, "cannot be read"),
    ("sample --init bomb.png", 3, "bomb.png"),
    ("sample --init bare.png --strength 0", 2, "no noise below"),
    ("sample --init bare.png --strength 2", 2, "up to 1"),
    ("sample --init bare.png --strength nan", 2, "finite"),
    ("sample --sampler plan.safetensors --set tau=1", 2, "leave --set out"),
    ("sample --sampler plan.safetensors --lower-order-final", 2, "leave --lower-order-final out"),
    ("sample --sampler plan.safetensors --afs", 2, "leave --afs out"),
    ("sample --sampler plan.safetensors --init bare.png --strength 0.5", 2, "leave --strength out"),
    ("sample --negative 3", 2, "--guidance"),
    ("sample --guidance 1 --guidance-rescale 0.7", 2, "--guidance-rescale does nothing at --guidance 1"),
    ("sample --label 3 --guidance 2 --negative 11", 2, "unknown label '11'"),
    ("sample --label 3 --guidance 2 --guidance-interval 5", 2, "two numbers"),
    ("sample --label 3 --guidance 2 --guidance-interval a,b", 2, "two numbers"),
    ("sample --label 3 --guidance 2 --guidance-interval 5,1", 2, "low < high"),
    ("sample --label 3 --guidance 2 --guidance-rescale 2", 2, "up to 1"),
    ("sample --label 3 --guidance 1e9", 2, "--guidance"),
    ("sample --guidance nan", 2, "finite"),
    ("sample --guidance 2", 2, "label"),
    ("sample --dtype fp8", 2, "fp8"),
    ("sample --device gpu", 2, "unknown device 'gpu'"),
    ("sample --device cuda:x", 2, "unknown device"),
    ("sample --batch 0", 2, "0 is not in the range"),
    ("sample --scale 0", 2, "0 is not in the range"),
    ("sample --out sheet.bmp", 2, "--out sheet.png"),
    ("sample --trajectory path.mp4", 2, "unknown kind '.mp4'"),
    ("sample --trajectory sheet.png", 2, "same file"),
    ("sample --model digitz", 2, "did you mean 'digits'"),
    ("sample --model nothing.safetensors", 3, "no such file"),
    ("sample --model text.txt", 3, "not a safetensors file"),
    ("sample --model plan.safetensors", 3, "plan"),
    ("sample --sampler model.safetensors", 3, "not a plan"),
    ("sample --sampler none.safetensors", 3, "cannot be read"),
    ("sample --sampler vp.safetensors", 2, "was made for"),
    ("sample --model folder", 3, "folder"),
    ("sample --config none.toml", 3, "cannot be read"),
    ("sample --like none.png", 3, "cannot be read"),
    ("sample --like text.txt", 3, "not a PNG"),
    ("sample --like bare.png", 3, "no pfode settings"),
    ("sample --like cut.png", 3, "cut.png"),
    ("sample --like bomb.png", 3, "too many pixels"),
    ("sample --out missing/sheet.png", 7, "No such file"),
    ("sample --out text.txt/sheet.png", 7, "Not a directory"),
    ("sample --out taken.png", 7, "is a folder"),
    ("sample --trajectory missing/x.gif", 7, "No such file"),
    ("sample --separate text.txt/x", 7, "Not a directory"),
    ("sample --separate new --sampler huen", 2, "unknown sampler"),
    ("sample --separate new --out new/000003.png", 2, "--separate"),
    ("info", 2, "Missing argument"),
    ("info nothing", 2, "unknown model"),
    ("info text.txt", 3, "not a safetensors file"),
    ("info folder", 3, "is a folder"),
    ("info bare.png", 3, "no pfode settings"),
    ("info bare.png --verify", 2, "--verify"),
    (f"sample --out {LONG}.png", 7, "name too long"),
    (f"sample --trajectory {LONG}.gif", 7, "name too long"),
    (f"sample --separate {LONG}", 7, "name too long"),
    (f"sample --model {LONG}", 2, "unknown model"),
    (f"sample --model {LONG}.safetensors", 3, "no such file"),
    (f"sample --sampler {LONG}.safetensors", 3, "name too long"),
    (f"sample --like {LONG}.png", 3, "File name too long"),
    (f"sample --config {LONG}.toml", 3, "name too long"),
    ("samplers heun extra", 2, "unexpected extra argument"),
    ("samplers huen", 2, "did you mean 'heun'"),
    ("samplers heun --markdown", 2, "--markdown"),
]


@pytest.fixture
def files(tmp_path):
    """A folder with one file of every wrong kind."""
    (tmp_path / "text.txt").write_text("no model at all")
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken.png").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "bare.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "bare.png").read_bytes()[:30])
    (tmp_path / "bomb.png").write_bytes(bomb())
    (tmp_path / "model.safetensors").write_bytes(shipped()["digits"].read_bytes())
    pfode.make_plan("ddim", process=pfode.EDM(), steps=2).save(tmp_path / "plan.safetensors")
    pfode.make_plan("ddim", process=pfode.VP(), steps=2).save(tmp_path / "vp.safetensors")
    return tmp_path


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def listing(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def assert_clear(run, code: int, text: str) -> None:
    assert run.code == code, run.err
    lines = run.err.splitlines()
    assert lines[0].startswith("pfode: error: ")
    assert len(lines) <= 2
    assert all(line.startswith("hint: ") for line in lines[1:])
    assert text.lower() in run.err.lower()
    assert "Traceback" not in run.err
    assert not run.out


@pytest.mark.parametrize(("words", "code", "text"), CALLS, ids=[words[:40] for words, _, _ in CALLS])
def test_malformed_calls(cli, files, words, code, text):
    before = listing(files)
    assert_clear(cli(*words.split()), code, text)
    assert listing(files) == before


def test_errors_as_json(cli):
    run = cli("sample", "--json", "--sampler", "huen")
    assert run.code == 2
    assert run.json["error"]["code"] == 2
    assert run.json["error"]["kind"] == "usage"
    assert "huen" in run.json["error"]["message"]
    assert "heun" in run.json["error"]["hint"]


def test_missing_device(cli, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for command in ("sample", "train"):
        assert_clear(cli(command, "--device", "cuda"), 4, "device 'cuda': this torch sees 0 CUDA devices")


def test_missing_package(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    run = cli("sample", "--quiet")
    assert_clear(run, 4, "pip install tqdm")


def test_bug(cli, monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("pfode.cli.sample.write", broken)
    run = cli("sample", "--steps", 1, "--n", 1, "--quiet")
    assert_clear(run, 1, "please report")
    log = Path(run.err.split()[-1])
    assert "Traceback" in log.read_text()
    assert "Traceback" in cli("sample", "--steps", 1, "--n", 1, "--debug").err


def test_not_finite(cli, monkeypatch, tmp_path):
    import torch

    from pfode.scores.networks.unet import UNet

    whole = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda *a, **k: whole(*a, **k) * torch.nan)
    assert_clear(cli("sample", "--steps", 2, "--n", 2, "--quiet"), 5, "not finite")
    assert not listing(tmp_path)


@pytest.mark.parametrize("error", [MemoryError, "torch"])
def test_out_of_memory(cli, monkeypatch, tmp_path, error):
    import torch

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory") if error == "torch" else MemoryError

    monkeypatch.setattr("pfode.samplers.sampling.batches", full)
    assert_clear(cli("sample", "--quiet"), 6, "--batch")


def test_interrupt(cli, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pfode.samplers.sampling.batches", stop)
    run = cli("sample", "--quiet")
    assert run.code == 130
    assert run.err.strip() == "pfode: error: interrupted"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(tmp_path, number, code):
    """A run of 10,000 steps, stopped after its settings line."""
    words = ["sample", "--model", "digits", "--steps", "10000", "--n", "1", "--sampler", "euler"]
    start = [sys.executable, "-m", "pfode.cli", *words]
    with subprocess.Popen(start, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "model digits" in process.stderr.readline()
        time.sleep(0.3)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert "Traceback" not in err
    assert out == ""
    assert not listing(tmp_path)


def test_broken_pipe(tmp_path):
    """The reader is gone before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "pfode.cli", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == ""


def test_full_disk_keeps_the_old_sheet(cli, sheet, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    before = sheet.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    run = cli("sample", "--n", 2, "--steps", 2, "--out", sheet, "--quiet")
    assert_clear(run, 7, "No space left")
    assert sheet.read_bytes() == before
    assert [path.name for path in sheet.parent.iterdir()] == [sheet.name]


SETTINGS = [
    ("[]", "expected a JSON object"),
    ("{", "broken JSON"),
    ("[" * 100_000, "broken JSON"),
    ("9" * 10_000, "broken JSON"),
    ('{"version": 1, "options": {}, "model": {}}', "version: expected str"),
    ('{"version": "1", "options": [], "model": {}}', "options: expected dict"),
    ('{"version": "1", "options": {"out": "x.png"}, "model": {}}', "unknown option 'out'"),
    ('{"version": "1", "options": {"separate": "d"}, "model": {}}', "unknown option 'separate'"),
    ('{"version": "1", "options": {"steps": "3"}, "model": {}}', "steps: expected a whole number"),
    ('{"version": "1", "options": {"steps": -3}, "model": {}}', "-3 is not in the range"),
    ('{"version": "1", "options": {"guidance": NaN}, "model": {}}', "not a finite number"),
    ('{"version": "1", "options": {"guidance": 1e999}, "model": {}}', "not a finite number"),
    ('{"version": "1", "options": {"model": "a\\u0000b"}, "model": {}}', "model: expected a string"),
    ('{"version": "1", "options": {"set": "tau=1"}, "model": {}}', "set: expected a list of strings"),
    ('{"version": "1", "options": {"set": [1]}, "model": {}}', "set: expected a list of strings"),
    ('{"version": "1", "options": {"afs": "x"}, "model": {}}', "afs: expected a number or 'model'"),
    ('{"version": "1", "options": {"brownian": 1}, "model": {}}', "brownian: expected true or false"),
    ('{"version": "1", "options": {"strength": 7}, "model": {}}', "not a finite number"),
    ('{"version": "1", "options": {"init": "missing.png"}, "model": {}}', "missing.png: cannot be read"),
    ('{"version": "1", "options": {}, "model": {}, "init": 5}', "digest: expected a string"),
    ('{"version": "1", "options": {"model": "digits"}, "model": {"digest": "0"}}', "made with another digits"),
    ('{"version": "1", "options": {"model": "digits"}, "model": {"digest": [1]}}', "digest: expected"),
    ('{"version": "1", "options": {"seeds": "0-99999999"}, "model": {}}', "more than"),
]


@pytest.mark.parametrize(("text", "message"), SETTINGS, ids=[text[:50] for text, _ in SETTINGS])
def test_hostile_settings(cli, tmp_path, text, message):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("pfode", text)
    Image.new("L", (4, 4)).save(tmp_path / "hostile.png", pnginfo=info)
    assert cli("info", "hostile.png").code in (0, 3)
    run = cli("sample", "--like", "hostile.png")
    assert_clear(run, 2 if "seeds" in text else 3, message)
    assert len(listing(tmp_path)) == 1


def test_damaged_models(cli, tmp_path):
    """Truncations and flipped bits: always an error of the file, or the very same picture."""
    whole = shipped()["digits"].read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(0)
    places = [0, 3, 7, 8, 9, *chance.sample(range(8, length), 12), *chance.sample(range(length, len(whole)), 4)]
    damaged = [whole[:n] for n in (0, 5, 8, length - 1, length, len(whole) - 1)]
    damaged += [whole[:i] + bytes([whole[i] ^ 1 << chance.randrange(8)]) + whole[i + 1 :] for i in places]
    for data in [*damaged, whole + b"x"]:
        (tmp_path / "bad.safetensors").write_bytes(data)
        run = cli("sample", "--model", "bad.safetensors", "--steps", 1, "--n", 1, "--quiet")
        assert_clear(run, 3, "bad.safetensors")
    assert len(listing(tmp_path)) == 1


def test_damaged_pictures(cli, sheet):
    """Every prefix and some flipped bytes of a sheet: repeated, or refused in one line."""
    whole = sheet.read_bytes()
    chance = random.Random(1)
    texts = whole.index(b"IDAT")
    damaged = [whole[:n] for n in range(0, texts, 37)]
    damaged += [whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :] for i in chance.sample(range(texts), 25)]
    for data in damaged:
        sheet.write_bytes(data)
        run = cli("info", sheet)
        assert run.code in (0, 3)
        if run.code == 3:
            assert_clear(run, 3, str(sheet))
    stream = io.BytesIO(whole)
    assert Image.open(stream).format == "PNG"
