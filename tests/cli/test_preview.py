"""The sheet on a terminal: which graphics it has, what is written, nothing without one."""

import base64
import io
import os
import re
import sys

import numpy as np
import pytest
from PIL import Image

from pfode.cli import places, preview
from pfode.cli.places import PREVIEWS, open_picture

KITTY_ANSWER = b"\x1b_Gi=31;OK\x1b\\\x1b[?62;c"
SIXEL_ANSWER = b"\x1b_Gi=31;ENOTSUPPORTED\x1b\\\x1b[?62;4;22c"
PLAIN_ANSWER = b"\x1b[?64;14;42c"  # no sixel, though the digit is there
XTERM = {"TERM": "xterm-256color"}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "answer", "kind"),
    [
        ({"TERM": "xterm-kitty"}, b"", "kitty"),
        ({**XTERM, "KITTY_WINDOW_ID": "1"}, b"", "kitty"),
        ({**XTERM, "TERM_PROGRAM": "ghostty"}, b"", "kitty"),
        ({**XTERM, "TERM_PROGRAM": "iTerm.app"}, b"", "iterm"),
        ({**XTERM, "TERM_PROGRAM": "WezTerm"}, b"", "iterm"),
        ({**XTERM, "LC_TERMINAL": "iTerm2"}, b"", "iterm"),
        (XTERM, KITTY_ANSWER, "kitty"),
        (XTERM, SIXEL_ANSWER, "sixel"),
        (XTERM, PLAIN_ANSWER, "blocks"),
        (XTERM, b"", "blocks"),
        ({**XTERM, "NO_COLOR": "1"}, b"", "none"),
        ({**XTERM, "NO_COLOR": "1"}, SIXEL_ANSWER, "sixel"),
        ({"TERM": "tmux-256color", "TMUX": "x", "KITTY_WINDOW_ID": "1"}, KITTY_ANSWER, "blocks"),
        ({"TERM": "tmux-256color", "TMUX": "x", "TERM_PROGRAM": "iTerm.app"}, SIXEL_ANSWER, "sixel"),
        ({"TERM": "dumb"}, KITTY_ANSWER, "none"),
        ({}, KITTY_ANSWER, "none"),
    ],
)
def test_the_terminal_says_what_it_has(environment, answer, kind, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert preview.find_kind(environment, lambda: answer) == kind


def test_a_terminal_that_cannot_write_half_blocks_shows_none(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(Terminal, "encoding", "ascii")
    assert preview.find_kind(XTERM, lambda: b"") == "none"


def picture(height: int = 13, width: int = 11) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8))


def test_kitty_gets_the_picture_as_a_png_in_chunks():
    large = picture(64, 64)
    found = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", preview.kitty(large))
    assert [head for head, _ in found] == ["a=T,f=100,q=2,m=1", *["m=1"] * (len(found) - 2), "m=0"]
    assert len(found) > 2
    assert all(len(data) <= 4096 for _, data in found)
    with Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in found)))) as back:
        assert np.array_equal(np.asarray(back), np.asarray(large))


def test_iterm_gets_the_picture_as_a_png_of_its_size():
    head, data = re.fullmatch(r"\x1b\]1337;File=(.*):(.*)\x07", preview.iterm(picture())).groups()  # type: ignore[union-attr]
    raw = base64.b64decode(data)
    assert f"size={len(raw)};width=11px;height=13px" in head
    with Image.open(io.BytesIO(raw)) as back:
        assert np.array_equal(np.asarray(back), np.asarray(picture()))


def decoded(text: str) -> np.ndarray:
    """The picture that a sequence of sixels draws, by the rules of the VT340."""
    width, height = map(int, re.match(r'\x1bP0;1;0q"1;1;(\d+);(\d+)', text).groups())  # type: ignore[union-attr]
    colours = {int(i): rgb for i, *rgb in re.findall(r"#(\d+);2;(\d+);(\d+);(\d+)", text)}
    made, colour, x, top = np.full((height + 6, width, 3), -1), [], 0, 0
    body = re.sub(r"#\d+;2;\d+;\d+;\d+", "", text.partition(f";{width};{height}")[2].removesuffix("\x1b\\"))
    for number, count, mark in re.findall(r"#(\d+)|(?:!(\d+))?([?-~$-])", body):
        if number:
            colour = list(map(int, colours[int(number)]))
        elif mark == "$":
            x = 0
        elif mark == "-":
            x, top = 0, top + 6
        else:
            for k in range(6):
                if (ord(mark) - 63) >> k & 1:
                    made[top + k, x : x + int(count or 1)] = colour
            x += int(count or 1)
    return made[:height]


@pytest.mark.parametrize(("height", "width"), [(13, 11), (6, 40), (1, 1)])
def test_sixels_draw_the_picture(height, width):
    few = Image.fromarray((np.asarray(picture(height, width)) // 128 * 255).astype(np.uint8))  # 8 colours
    assert np.array_equal(decoded(preview.sixel(few)), np.asarray(few) // 255 * 100)
    flat = preview.sixel(Image.new("RGB", (200, 6), "white"))
    assert "!200~" in flat


def test_half_blocks_have_two_pixels_each():
    pixels = np.arange(3 * 2 * 3, dtype=np.uint8).reshape(3, 2, 3)
    lines = preview.half_blocks(pixels, all_colours=True).splitlines()
    assert lines[0] == "\x1b[38;2;0;1;2;48;2;6;7;8m▀\x1b[38;2;3;4;5;48;2;9;10;11m▀\x1b[0m"
    assert lines[1].startswith("\x1b[38;2;12;13;14;48;2;255;255;255m▀")
    assert preview.half_blocks(np.full((2, 3, 3), 255, np.uint8), False) == "\x1b[38;5;231;48;5;231m▀▀▀\x1b[0m"


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (40, 10), (10, 3)])
@pytest.mark.parametrize(("n", "side", "columns"), [(40, 32, 10), (40, 8, 10), (1, 256, 1), (3, 32, 2)])
def test_half_blocks_fit_the_terminal(width, height, n, side, columns):
    shown = preview.few(np.zeros((n, side, side, 3), np.uint8), columns, width, height)
    assert shown.shape[1] <= width
    assert shown.shape[0] <= max(2 * (height - 4), 16 if side > 16 else side, width)
    if (width, side) == (80, 32):
        assert shown.shape == ((33, 4 * 17 - 1, 3) if n == 40 else shown.shape)  # 4 x 2 pictures of 16 pixels


@pytest.mark.parametrize("kind", ["auto", *PREVIEWS])
def test_nothing_is_shown_without_a_terminal(cli, kind):
    run = cli("sample", "--steps", 1, "--n", 2, "--preview", kind)
    assert (run.code, "\x1b" in run.err) == (0, False)


@pytest.mark.parametrize(
    ("kind", "mark"), [("kitty", "\x1b_G"), ("iterm", "\x1b]1337"), ("sixel", "\x1bP"), ("blocks", "▀")]
)
def test_a_terminal_shows_the_sheet_beside_its_path(cli, monkeypatch, kind, mark, capsys):
    from pfode.cli.__main__ import main

    screen = Terminal()
    for quiet in (True, False):
        monkeypatch.setattr(sys, "stderr", screen)
        with pytest.raises(SystemExit) as done:
            main(["sample", "--steps", "1", "--n", "2", "--preview", kind, "--out", "a.png", *["-q"] * quiet])
        assert done.value.code == 0
        assert (mark in screen.getvalue()) is not quiet
    assert "\x1b" not in capsys.readouterr().out


def test_open_asks_the_system_or_says_why_not(cli, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(places.sys, "platform", "linux")
    monkeypatch.setattr(places.click, "launch", lambda path: asked.append(path) or len(asked) - 1)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    words = ("sample", "--steps", 1, "--n", 1, "--out", "a.png", "--open")
    run = cli(*words)
    assert (run.code, asked) == (0, [])
    assert "no screen here" in run.err
    monkeypatch.setenv("DISPLAY", ":0")
    assert "--open" not in cli(*words).err
    assert asked == ["a.png"]
    assert open_picture("b.png") == "--open: nothing here opens b.png"
    assert cli("sample", "--out", "-", "--open").code == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no terminals here")
@pytest.mark.parametrize("answer", [SIXEL_ANSWER, b""])
def test_a_terminal_is_asked_and_left_as_it_was(answer):
    """In a process of its own, whose terminal is a pair of descriptors that we hold the other end of."""
    import pty
    import select
    import subprocess  # noqa: F401  (imported before the fork)
    import termios

    child, ours = pty.fork()
    if child == 0:  # pragma: no cover
        before = termios.tcgetattr(0)
        found = preview.ask()
        same = termios.tcgetattr(0) == before
        os.write(1, b"<" + repr(found).encode() + repr(same).encode() + b">")
        os._exit(0)
    said = b""
    while b">" not in said and select.select([ours], [], [], 20)[0]:
        said += os.read(ours, 1024)
        if answer and said.endswith(b"\x1b[c"):
            os.write(ours, answer)
    os.waitpid(child, 0)
    os.close(ours)
    assert f"<{answer!r}True>".encode() in said
