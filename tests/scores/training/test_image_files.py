"""Folders and zips as people have them: links, chunks, dataset.json, 16 bits, hidden files, and hostile ones."""

import contextlib
import io
import json
import os
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pfode.cli.images import from_picture
from pfode.errors import FileError
from pfode.scores.training import archives, image_files
from pfode.scores.training.data import decode, load_data


def png(value: Any = 0, size=(8, 8), mode="L", kind="PNG", **options):
    stream = io.BytesIO()
    Image.new(mode, size, value).save(stream, kind, **options)
    return stream.getvalue()


def fill(root, names):
    """Files with these names, each of another grey: 0, 10, 20 ..."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(10 * i))


def zipped(path, content, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, raw in content.items():
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, method
            file.writestr(info, raw)
    return path


def greys(data):
    return data.images[:, 0, 0, 0].tolist()


# ---- what a folder means


def both(tmp_path, names, **more):
    """The same files as a folder and as a zip."""
    fill(tmp_path / "d", names)
    for name, raw in more.items():
        (tmp_path / "d" / name.replace("__", ".")).write_bytes(raw)
    content = {
        p.relative_to(tmp_path / "d").as_posix(): p.read_bytes() for p in (tmp_path / "d").rglob("*") if p.is_file()
    }
    zipped(tmp_path / "d.zip", content)
    return [load_data(tmp_path / name, size=8) for name in ("d", "d.zip")]


def test_hidden_files_are_left_out_and_counted(tmp_path):
    names = [
        "cat/1.png",
        "cat/._1.png",
        "dog/2.png",
        "__MACOSX/cat/._1.png",
        ".cache/x.png",
        "cat/.DS_Store",
        "cat/notes.txt",
    ]
    folder, archive = both(tmp_path, names)
    for data in (folder, archive):
        assert (data.names, greys(data)) == (("cat", "dog"), [0, 20])
        assert data.left_out["files that are no pictures"] == 1
        assert data.left_out["hidden files and folders"] == 4


def test_a_lone_folder_around_the_classes_is_entered(tmp_path):
    for data in both(tmp_path, ["outer/inner/cat/1.png", "outer/inner/dog/2.png", "outer/inner/dog/deep/3.png"]):
        assert (data.names, greys(data)) == (("cat", "dog"), [0, 10, 20])


def test_one_class_stays_one(tmp_path):
    for data in both(tmp_path, ["cat/1.png", "cat/2.png"]):
        assert data.names == ("cat",)


@pytest.mark.parametrize("around", ["", "outer/"])
def test_labels_of_dataset_json(tmp_path, around):
    """EDM's and StyleGAN's layout: chunks of a thousand, labels by name."""
    names = [f"{around}00000/img{i:08d}.png" for i in range(3)] + [f"{around}00001/img00001000.png"]
    labels = [[name.removeprefix(around), label] for name, label in zip(names, [2, 0, 2, 1], strict=True)]
    listing = json.dumps({"labels": [*labels, ["00009/absent.png", 7]]}).encode()
    (tmp_path / "d" / around).mkdir(parents=True)
    for data in both(tmp_path, names, **{f"{around}dataset__json": listing}):
        assert data.labels is not None
        assert (data.labels.tolist(), data.names) == ([2, 0, 2, 1], ("0", "1", "2"))
        assert not data.left_out


def test_labels_of_dataset_json_may_be_null_or_an_object(tmp_path):
    fill(tmp_path, ["00000/a.png", "00001/b.png"])
    for labels, expected in ((None, None), ({"00000/a.png": 1, "00001/b.png": 0}, [1, 0])):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
        data = load_data(tmp_path, size=8)
        assert (None if data.labels is None else data.labels.tolist()) == expected


def test_chunks_are_no_classes(tmp_path):
    for data in both(tmp_path, ["00000/a.png", "00001/b.png", "01000/c.png"]):
        assert (data.labels, data.names, len(data)) == (None, (), 3)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]" * 3, b"[" * 100_000, b'{"labels": 3}', b'{"labels": [[1, 2, 3]]}', b'{"labels": []}', b"\xff\xfe"]
    + [
        json.dumps({"labels": [["cat/1.png", label]]}).encode()
        for label in (-1, 1.0, True, None, "3", [1], 10**9, float("nan"))
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_a_dataset_json_that_does_not_fit(tmp_path, content):
    fill(tmp_path, ["cat/1.png", "dog/2.png"])
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(FileError, match=r"dataset\.json"):
        load_data(tmp_path)


def test_links_to_class_folders_are_followed_and_circles_end(tmp_path):
    fill(tmp_path, ["pool/cats/1.png", "pool/cats/2.png", "d/dog/3.png"])
    (tmp_path / "d" / "cat").symlink_to(tmp_path / "pool" / "cats")
    (tmp_path / "d" / "dog" / "back").symlink_to(tmp_path / "d")
    (tmp_path / "pool" / "cats" / "self").symlink_to(".")
    data = load_data(tmp_path / "d", size=8)
    assert (data.names, greys(data)) == (("cat", "dog"), [0, 10, 20])
    assert data.left_out == {"links to a folder around them": 2}


def test_links_that_multiply_are_refused(tmp_path):
    for k in range(20):
        (tmp_path / f"f{k}").mkdir()
    for k in range(19):
        for name in "ab":
            (tmp_path / f"f{k}" / name).symlink_to(tmp_path / f"f{k + 1}")
    with pytest.raises(FileError, match="again and again"):
        load_data(tmp_path / "f0")


def test_what_is_no_regular_file_is_left_out(tmp_path):
    fill(tmp_path, ["a.png"])
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to("nowhere")
    data = load_data(tmp_path, size=8)
    assert (len(data), data.left_out) == (1, {"pipes, devices and broken links": 3})


def test_a_class_whose_name_cannot_be_written_is_named(tmp_path):
    fill(tmp_path, ["cat\n/1.png", "dog/2.png"])
    with pytest.raises(FileError, match="no name for a class"):
        load_data(tmp_path)
    (tmp_path / "cat\n").rename(os.fsdecode(os.fsencode(tmp_path) + b"/c\xff"))
    with pytest.raises(FileError, match="no name for a class"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.tif", "TIFF"), ("a.TIFF", "TIFF"), ("a.jfif", "JPEG"), ("a.avif", "AVIF")]
)
def test_kinds_of_pictures(tmp_path, name, kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"Pillow was built without {kind}")
    (tmp_path / name).write_bytes(png((200, 40, 40), (16, 16), "RGB", kind))
    pixel = load_data(tmp_path, size=8).images[0, :, 4, 4].int()
    assert (pixel - pixel.new_tensor([200, 40, 40])).abs().max() <= 4


# ---- 16 bits

RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
EIGHT = np.rint(RAMP / 257).astype(int)


def sixteen(values=RAMP, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_levels(kind):
    pixels = decode("x", sixteen(kind=kind), (8, 8))
    assert (pixels == EIGHT[..., None]).all()
    tensor = from_picture("x", sixteen(kind=kind), (1, 8, 8))
    assert np.abs(tensor.numpy()[0] - (EIGHT / 127.5 - 1)).max() < 1e-6


def test_big_endian_tiff_of_16_bits():
    assert (decode("x", sixteen(RAMP.astype(">u2"), "TIFF"), (8, 8))[..., 0] == EIGHT).all()


def tiff(values, bits, photometric=1, sample=1, order="<"):
    """A TIFF of one strip, written by hand (TIFF 6.0, section 2)."""
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 8, 279: len(values), 339: sample}
    start = 8 + 2 + 12 * len(tags) + 4
    tags[273] = start
    head = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    fields = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    return head + fields + struct.pack(order + "I", 0) + values


def test_tiff_in_which_white_is_zero():
    assert (decode("x", tiff(RAMP.tobytes(), 16, photometric=0), (8, 8))[..., 0] == 255 - EIGHT).all()


def test_tiff_of_12_bits():
    ramp = np.linspace(0, 4095, 64).round().astype(int)
    pairs = ramp.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    pixels = decode("x", tiff(packed.astype(np.uint8).tobytes(), 12), (8, 8))[..., 0]
    assert np.abs(pixels.flatten() - ramp * 255 / 4095).max() <= 0.5


def test_a_transparent_level_of_16_bits_is_white():
    values = RAMP.copy()
    values[0] = 7
    pixels = decode("x", sixteen(values, transparency=7), (8, 8))[..., 0]
    assert (pixels[0] == 255).all()
    assert (pixels[1:] == EIGHT[1:]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bits_are_refused(dtype):
    with pytest.raises(FileError, match="32 bits per value"):
        decode("x", sixteen(RAMP.astype(dtype), "TIFF"), (8, 8))


def test_colour_of_16_bits():
    """Pillow reads the high byte; written by hand, since it does not write such files."""
    rows = b"".join(
        b"\0" + struct.pack(">24H", *[v for x in range(8) for v in (65535, 0x8000, 257 * x)]) for _ in range(8)
    )

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    pixels = decode("x", raw, (8, 8))
    assert pixels[3, 5].tolist() == [255, 128, 5]


# ---- hostile zips

METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


@pytest.mark.parametrize("method", METHODS)
def test_damaged_streams_name_file_and_entry(tmp_path, method):
    path = zipped(tmp_path / "d.zip", {"cat/1.png": png(7, (64, 64)), "dog/2.png": png(9)}, method)
    assert load_data(path, size=8).names == ("cat", "dog")
    raw = path.read_bytes()
    start = raw.index(b"cat/1.png") + len("cat/1.png")
    failures = 0
    for i in range(start, raw.index(b"PK\3\4", start)):
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 0x5A]) + raw[i + 1 :])
        with contextlib.suppress(FileError):
            load_data(path, size=8)
            continue
        with pytest.raises(FileError, match=r"d\.zip.*cat/1\.png"):
            load_data(path, size=8)
        failures += 1
    assert failures > 5


@pytest.mark.parametrize("name", ["", ".", "./", "a/.", "/", "//", "a/..", "../a.png", "C:x.png", "\\a.png"])
def test_entries_without_a_name_or_outside(tmp_path, name):
    path = zipped(tmp_path / "d.zip", {"a.png": png(), name: png()})
    with pytest.raises(FileError, match=r"d\.zip"):
        load_data(path)


def test_names_that_are_not_utf8(tmp_path):
    path = zipped(tmp_path / "d.zip", {"cat/é.png": png(), "dog/1.png": png()})
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xfe"))
    with pytest.raises(FileError, match=r"d\.zip"):
        load_data(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_is_there_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
        file.writestr("a.png", png())
        file.writestr("a.png", png(9))
    with pytest.raises(FileError, match="is there twice"):
        load_data(tmp_path / "d.zip")


def test_a_link_in_a_zip_is_left_out(tmp_path):
    info = zipfile.ZipInfo("b.png")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
        file.writestr("a.png", png())
        file.writestr(info, "/etc/passwd")
    assert load_data(tmp_path / "d.zip", size=8).left_out == {"pipes, devices and broken links": 1}


def test_pictures_that_are_too_long_or_unpack_to_too_much(tmp_path, monkeypatch):
    path = zipped(tmp_path / "d.zip", {f"{i}.bmp": b"\0" * 50_000 for i in range(8)})
    monkeypatch.setattr(archives, "FREE", 100_000)
    with pytest.raises(FileError, match="that unpack to"):
        load_data(path)
    huge = zipped(tmp_path / "e.zip", {"a.bmp": bytes(60_000)}, zipfile.ZIP_BZIP2)
    monkeypatch.setattr(image_files, "MAX_FILE", 50_000)
    with pytest.raises(FileError, match=r"a\.bmp.*when unpacked"):
        load_data(huge)


def test_an_encrypted_entry(tmp_path):
    path = zipped(tmp_path / "d.zip", {"a.png": png()})
    raw = bytearray(path.read_bytes())
    raw[6] |= 1  # the flag, in the entry and in the list
    raw[raw.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(raw)
    with pytest.raises(FileError, match=r"a\.png"):
        load_data(path)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_many_pixels_in_a_short_file_are_refused(kind):
    raw = png(size=(6000, 6000), mode="1" if kind == "PNG" else "L", kind=kind)
    with pytest.raises(FileError, match="pixels are too many"):
        decode("x", raw[:40_000], (8, 8))


def test_a_large_picture_is_read_in_bands():
    rows = np.random.default_rng(0).integers(0, 256, (1200, 1300, 4)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(rows).save(stream, "PNG")
    ground = Image.new("RGBA", (1300, 1200), "white")
    whole = Image.alpha_composite(ground, Image.fromarray(rows)).convert("RGB")
    assert (decode("x", stream.getvalue(), (1300, 1200)) == np.asarray(whole)).all()


def test_labels_of_far_more_bytes_than_their_archive_are_refused_before_they_are_unpacked(tmp_path):
    """30 kB that became 30 MB of JSON, and a gigabyte of Python's lists."""
    content = {"00000/a.png": png(), "dataset.json": b'{"labels": [' + b"[]," * 10_000_000 + b"[]]}"}
    zipped(tmp_path / "d.zip", content)
    with pytest.raises(FileError, match=r"dataset\.json': 30,000,016 bytes when unpacked; at most"):
        load_data(tmp_path / "d.zip", size=8)
