"""Pictures of others are opened with a few formats, none of which starts a program."""

import io
import os
import socket
import subprocess

import numpy as np
import pytest
from PIL import Image

from pfode.errors import FileError
from pfode.scores.io import pictures
from pfode.scores.io.pictures import opened, read_picture
from pfode.scores.training.data import load_data

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print quit\n%%EOF\n"
OTHERS = {  # what Pillow would read or hand to a program, were it asked
    "eps": EPS,
    "eps in DOS": b"\xc5\xd0\xd3\xc6" + (32).to_bytes(4, "little") + len(EPS).to_bytes(4, "little") + bytes(20) + EPS,
    "ppm": b"P6 2 2 255\n" + bytes(12),
    "xbm": b"#define x_width 8\n#define x_height 1\nstatic char x_bits[] = {0x00};\n",
    "tga": bytes([0, 0, 2, *[0] * 9, 2, 0, 2, 0, 24, 0, *[0] * 12]),
    "wmf": b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(60),
}


def encoded(format_: str, size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (200, 30, 10)).save(stream, format_)
    return stream.getvalue()


@pytest.fixture
def no_programs(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a program was started: {args}")

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, refuse)
    monkeypatch.setattr(os, "system", refuse)


@pytest.mark.parametrize("raw", OTHERS.values(), ids=OTHERS)
def test_other_formats_are_refused_before_they_are_looked_at(raw, no_programs):
    with pytest.raises(FileError, match=r"x\.png: broken picture") as caught, opened("x.png", raw) as picture:
        picture.load()
    assert caught.value.code == 3


def test_a_picture_in_postscript_starts_nothing_anywhere(tmp_path, no_programs):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.png").write_bytes(EPS)
    with pytest.raises(FileError, match=r"x\.png: broken picture"):
        load_data(tmp_path / "data", size=8)


@pytest.mark.parametrize("format_", pictures.FORMATS)
def test_every_format_of_the_list_is_read(format_):
    Image.init()
    if format_ not in Image.SAVE:
        pytest.skip(f"this Pillow has no {format_}")
    with opened("x", encoded(format_)) as picture:
        red, green, blue = np.asarray(picture.convert("RGB"), dtype=float).mean((0, 1))
    assert abs(red - 200) < 6
    assert abs(green - 30) < 6
    assert abs(blue - 10) < 6


def test_only_formats_of_the_list_can_be_asked_for():
    with pytest.raises(ValueError, match="not among"), opened("x", EPS, ("EPS",)):
        pass


@pytest.mark.parametrize("most", [1, 8 * 9 - 1])
def test_too_many_pixels(most):
    with pytest.raises(FileError, match="x: 9x8 pixels are too many"), opened("x", encoded("PNG", (9, 8)), most=most):
        pass


@pytest.mark.parametrize("cut", range(27, 70, 7))
def test_a_cut_picture_is_a_damaged_file(cut):
    with pytest.raises(FileError, match="broken picture"), opened("x", encoded("PNG")[:-cut]) as picture:
        picture.load()


def test_what_is_no_regular_file_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
        (tmp_path / "zero.png").symlink_to("/dev/zero")
        for name, kind in (("pipe", "a pipe"), ("socket", "a socket"), ("zero", "a device")):
            with pytest.raises(FileError, match=f"is {kind}"):
                read_picture(tmp_path / f"{name}.png")
            with pytest.raises(FileError, match=f"is {kind}"), opened("x", tmp_path / f"{name}.png"):
                pass


def test_a_long_file_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "long.png", "wb") as file:
        file.truncate(pictures.MAX_FILE + 1)
    with pytest.raises(FileError, match="a picture may have"):
        read_picture(tmp_path / "long.png")
