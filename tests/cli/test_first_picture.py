"""The first picture: its sheet, its name, the kinds of files, stdout, and what a terminal shows."""

import io
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

import pfode
from pfode.cli import images
from pfode.cli.places import write_free
from pfode.cli.streams import Output

DRAW = ("sample", "--steps", 2, "--n", 4)


def pixels(source) -> np.ndarray:
    with Image.open(source) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize("label", ["all", "none", "3"])
def test_a_sheet_that_nothing_is_said_of_has_4_rows_of_10_cells_of_96_pixels(cli, tmp_path, label):
    run = cli("sample", "--steps", 1, "--label", label, "--json")
    assert (run.code, run.json["n"]) == (0, 40)
    sheet = pixels(tmp_path / "sheet.png")
    assert sheet.shape == (2 + 4 * 98, 2 + 10 * 98)
    cells = sheet[2:, 2:].reshape(4, 98, 10, 98)[:, :96, :, :96].reshape(4, 8, 12, 10, 8, 12)
    assert (cells == cells[:, :, :1, :, :, :1]).all()  # enlarged by repeating pixels


@pytest.mark.parametrize(
    ("classes", "side", "n", "columns"),
    [
        (0, 32, 40, 10),
        (1, 32, 40, 10),
        (2, 32, 40, 10),
        (3, 8, 45, 9),
        (9, 32, 45, 9),
        (10, 64, 40, 10),
        (17, 32, 68, 17),
    ],
)
def test_the_usual_sheet_has_as_many_of_every_class(classes, side, n, columns):
    assert images.usual_count(classes, side, side) == n >= 40
    assert images.sheet_columns(n, classes) == columns
    assert n % max(1, classes) == n % columns == 0
    assert n // columns >= 4
    assert side * images.default_scale(n, side, side, columns) >= 96


def test_large_pictures_and_very_many_classes_are_drawn_when_asked_for():
    assert images.usual_count(0, 65, 32) is None
    assert images.usual_count(21, 32, 32) is None


def test_nothing_is_overwritten_unasked(cli, tmp_path):
    names = [cli(*DRAW, "--seed", seed).out.strip() for seed in range(3)]
    assert names == ["sheet.png", "sheet-2.png", "sheet-3.png"]
    assert len({(tmp_path / name).read_bytes() for name in names}) == 3
    (tmp_path / "sheet-2.png").unlink()
    assert cli("sample", "--like", "sheet-3.png").out == "sheet-2.png\n"
    assert (tmp_path / "sheet-2.png").read_bytes() == (tmp_path / "sheet-3.png").read_bytes()
    (tmp_path / "sheet-4.png").symlink_to("nowhere.png")
    assert cli(*DRAW).out == "sheet-5.png\n"
    assert cli(*DRAW, "--out", "sheet.png").out == "sheet.png\n"  # asked for
    assert not list(tmp_path.glob(".*"))


def test_a_folder_gets_the_first_free_name(cli, tmp_path):
    assert [cli(*DRAW, "--out", "new/deep/").out for _ in range(2)] == [
        "new/deep/sheet.png\n",
        "new/deep/sheet-2.png\n",
    ]
    (tmp_path / "there").mkdir()
    assert cli(*DRAW, "--out", "there", "--json").json["out"] == "there/sheet.png"
    (tmp_path / "file").touch()
    run = cli(*DRAW, "--out", "file/")
    assert (run.code, len(run.err.splitlines()) <= 2) == (7, True)


def test_the_sheet_of_a_run_that_is_continued_is_written_anew_and_no_other(cli, tmp_path):
    assert cli(*DRAW, "--separate", "a").out == "sheet.png\n"
    whole = (tmp_path / "sheet.png").read_bytes()
    assert cli("sample", "--steps", 2, "--n", 6, "--separate", "a").out == "sheet.png\n"
    assert (tmp_path / "sheet.png").read_bytes() != whole
    assert cli("sample", "--steps", 3, "--n", 4, "--separate", "b").out == "sheet-2.png\n"
    assert cli("sample", "--steps", 2, "--n", 6, "--separate", "a").out == "sheet.png\n"


def test_a_name_that_is_taken_meanwhile_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "sheet.png").write_bytes(b"mine")
    assert write_free(tmp_path, b"new") == tmp_path / "sheet-2.png"

    def no_links(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    assert write_free(tmp_path, b"newer") == tmp_path / "sheet-3.png"
    assert [(tmp_path / f"sheet{n}.png").read_bytes() for n in ("", "-2", "-3")] == [b"mine", b"new", b"newer"]


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "WEBP"])
def test_other_kinds_of_files_keep_the_settings(cli, tmp_path, suffix):
    name = f"sheet.{suffix}"
    assert cli(*DRAW, "--out", "plain.png").code == cli(*DRAW, "--out", name).code == 0
    with Image.open(tmp_path / name) as picture:
        assert picture.format == ("WEBP" if suffix.lower() == "webp" else "JPEG")
        found = np.asarray(picture.convert("L")).astype(int)
    wanted = pixels(tmp_path / "plain.png").astype(int)
    assert np.abs(found - wanted).max() <= (0 if suffix.lower() == "webp" else 12)
    assert images.read_settings(tmp_path / name) == images.read_settings(tmp_path / "plain.png")
    assert images.read_text(tmp_path / name)["parameters"] == images.read_text(tmp_path / "plain.png")["parameters"]
    assert cli("info", name, "--json").json["kind"] == "picture"
    assert cli("sample", "--like", name, "--out", "again.png").code == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_what_a_jpeg_cannot_hold_is_an_error_and_no_file(cli, tmp_path):
    seeds = ",".join(str(seed) for seed in range(10**18, 10**18 + 2 * 4000, 2))
    run = cli("sample", "--steps", 1, "--seeds", seeds, "--scale", 1, "--out", "sheet.jpg")
    assert (run.code, "--out sheet.png" in run.err) == (2, True), run.err
    assert not list(tmp_path.iterdir())


def test_stdout_takes_the_picture(cli, tmp_path, monkeypatch):
    assert cli(*DRAW, "--out", "a.png").code == 0
    raw = io.BytesIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(raw))
        run = cli(*DRAW, "--out", "-")
        assert (run.code, "steps 2" in run.err) == (0, True)
        assert raw.getvalue() == (tmp_path / "a.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]
    both = cli(*DRAW, "--out", "-", "--json")
    assert (both.code, both.json["error"]["hint"]) == (2, "--out sheet.png")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    run = cli(*DRAW, "--out", "-")
    assert (run.code, "--out - > sheet.png" in run.err) == (2, True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_takes_a_moment_is_said_until_something_else_is(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    out = Output()
    out.wait("loading")
    assert screen.getvalue() == "loading"
    out.note("done")
    assert screen.getvalue() == "loading\r       \rdone\n"
    Output(quiet=True).wait("loading")
    no_screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", no_screen)
    out.wait("loading")
    assert no_screen.getvalue() == ""
    assert screen.getvalue() == "loading\r       \rdone\n"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_a_terminal_hears_before_torch_is_imported(tmp_path):
    """The order of what happens stands for the time: something is said first, and torch is looked for after it."""
    import subprocess

    ours, theirs = os.openpty()
    (tmp_path / "torch.py").write_text("raise ImportError('a stand-in', name='torch')")
    code = "import sys; sys.path.insert(0, '.'); from pfode.cli.__main__ import main; main(['sample'])"
    run = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, stdout=subprocess.DEVNULL, cwd=tmp_path)
    os.close(theirs)
    assert run.wait() == 4
    said = os.read(ours, 10_000).decode()
    os.close(ours)
    assert said.startswith("pfode: loading torch ...\r")
    assert "a stand-in" in said


def test_settings_of_a_sheet_are_json_of_their_own(cli, tmp_path):
    assert cli(*DRAW, "--out", "a.webp").code == 0
    assert json.loads(images.read_text(tmp_path / "a.webp")["pfode"])["version"] == pfode.__version__
