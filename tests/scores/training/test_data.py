"""Data sets: what they hold, and one clear error for everything that is broken."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from pfode.errors import FileError, MissingError, UsageError
from pfode.scores.training.data import EMOJI_FONT, EMOJI_LIST, Data, emoji, load_data

installed = pytest.mark.skipif(
    not (EMOJI_FONT.is_file() and EMOJI_LIST.is_file()), reason="the emoji packages are not installed"
)


def png(colour="red", size=(12, 10), mode="RGB", kind="PNG"):
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, kind)
    return stream.getvalue()


def test_digits():
    data = load_data("digits")
    assert data.images.shape == (1797, 1, 8, 8)
    assert (int(data.images.min()), int(data.images.max())) == (0, 255)
    assert data.names == tuple("0123456789")
    assert data.labels is not None
    assert torch.bincount(data.labels).min() > 170
    assert data.card["licence"]
    assert data.card["sha256"]


@installed
def test_emoji():
    data = load_data("emoji")
    assert 1800 <= len(data) <= 2000
    assert data.shape == (3, 32, 32)
    assert len(data.names) == 9
    assert data.names[0] == "Smileys & Emotion"
    assert data.names[-1] == "Flags"
    corners = data.images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).float().mean() > 0.6  # on white
    people = data.images[data.labels == data.names.index("People & Body")].int()
    assert (people.amax(1) - people.amin(1)).flatten(1).amax(1).min() >= 24  # no silhouettes
    assert len(data.card["sha256_font"]) == 64
    assert "Flags" not in data.card["flip"]


@pytest.mark.parametrize("which", ["font", "listing"])
def test_emoji_files_that_are_missing_name_their_package(tmp_path, which):
    here = tmp_path / "there"
    here.write_bytes(b"")
    paths = {"font": here, "listing": here} | {which: tmp_path / "nowhere"}
    with pytest.raises(
        MissingError, match="apt-get install " + {"font": "fonts-noto", "listing": "unicode-data"}[which]
    ):
        emoji(**paths)


@installed
def test_emoji_files_that_are_broken(tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\xff" * 100)
    with pytest.raises(FileError, match="not a colour bitmap font"):
        emoji(font=broken)
    with pytest.raises(FileError, match="not a list of emoji"):
        emoji(listing=broken)
    broken.write_text("# group: Flags\nnothing\n")
    with pytest.raises(FileError, match="no emoji found"):
        emoji(listing=broken)


@pytest.mark.parametrize(
    "line", ["110000 ; fully-qualified # x", "F" * 40 + " ; fully-qualified # x", "0041 ; fully-qualified"]
)
def test_lists_that_are_no_lists_of_emoji(tmp_path, line):
    """Code points that are none, and emoji outside of any group."""
    (tmp_path / "font").write_bytes(b"")
    (tmp_path / "list").write_text(line + "\n")
    face = ImageFont.load_default(20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFont, "truetype", lambda *_: face)
        with pytest.raises(FileError, match="list"):
            emoji(tmp_path / "font", tmp_path / "list")


def test_a_folder_with_classes(tmp_path):
    for name, colour in (("cat/1.png", "red"), ("cat/deep/2.JPG", "red"), ("ant/x.png", "blue")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(colour, kind="JPEG" if name.endswith("JPG") else "PNG"))
    (tmp_path / "notes.txt").write_text("ignored")
    data = load_data(tmp_path, size=8)
    assert data.shape == (3, 8, 8)
    assert data.names == ("ant", "cat")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 1]
    assert data.images[0, :, 0, 0].tolist() == [0, 0, 255]


def test_a_folder_without_classes(tmp_path):
    (tmp_path / "a.png").write_bytes(png("white", mode="L"))
    data = load_data(tmp_path, size=8)
    assert data.shape == (1, 8, 8)
    assert data.labels is None
    assert data.names == ()


def test_transparency_is_white_and_the_centre_is_kept(tmp_path):
    picture = Image.new("RGBA", (30, 10), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (10, 0, 15, 10))
    picture.save(tmp_path / "a.png")
    images = load_data(tmp_path, size=10).images[0]
    assert images[:, 5, 1].tolist() == [255, 0, 0]
    assert images[:, 5, 8].tolist() == [255, 255, 255]


def test_a_zip_is_read_like_a_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
        file.writestr("cat/1.png", png())
        file.writestr("ant/1.png", png("blue"))
        file.writestr("readme.txt", "ignored")
    data = load_data(tmp_path / "d.zip", size=8)
    assert data.names == ("ant", "cat")
    assert list(tmp_path.iterdir()) == [tmp_path / "d.zip"]


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/../../evil.png", "C:/evil.png", "..\\evil.png"])
def test_paths_out_of_a_zip_are_refused(tmp_path, name):
    info = zipfile.ZipInfo("x")
    info.filename = name
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
        file.writestr(info, png())
    with pytest.raises(FileError, match="leads out of the archive"):
        load_data(tmp_path / "d.zip")


def test_broken_zips(tmp_path):
    path = tmp_path / "d.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/1.png", png())
    raw = path.read_bytes()
    for changed in (b"", raw[:20], raw[:-30], raw[:40] + b"\0" * 8 + raw[48:]):
        path.write_bytes(changed)
        with pytest.raises(FileError, match=r"d\.zip"):
            load_data(path)


@pytest.mark.parametrize(
    "raw",
    [b"", b"GIF89a", png()[:40], png()[:-20], png()[:50] + b"\0" + png()[51:], b"<svg/>", png(kind="JPEG")[:100]],
    ids=["empty", "gif", "header", "cut", "flip", "svg", "jpeg"],
)
def test_broken_pictures_are_named(tmp_path, raw):
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "bad.png").write_bytes(raw)
    with pytest.raises(FileError, match=r"bad\.png: broken picture") as caught:
        load_data(tmp_path)
    assert " at 0x" not in caught.value.message  # where it lies in memory says nothing


def test_too_many_pixels(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(FileError, match=r"bomb\.png"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [((5, 8, 8), (1, 8, 8)), ((5, 8, 8, 3), (3, 8, 8)), ((5, 3, 8, 8), (3, 8, 8)), ((5, 8, 8, 1), (1, 8, 8))],
)
def test_npz(tmp_path, layout, shape):
    images = np.arange(np.prod(layout)).reshape(layout).astype(np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=np.array([0, 1, 0, 1, 2]))
    data = load_data(tmp_path / "d.npz")
    assert data.shape == shape
    assert data.names == ("0", "1", "2")
    assert int(data.images.sum()) == int(images.sum())


GOOD = np.zeros((2, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pictures": GOOD}, "no array 'images'"),
        ({"images": GOOD.astype(np.float32)}, "images: expected uint8"),
        ({"images": GOOD[:0]}, "images: expected uint8"),
        ({"images": GOOD[..., :2]}, "square pictures"),
        ({"images": GOOD[:, :4]}, "square pictures"),
        ({"images": GOOD, "labels": np.array([0])}, "labels: expected 2"),
        ({"images": GOOD, "labels": np.array([0, -1])}, "labels: expected 2"),
        ({"images": GOOD, "labels": np.array([0, 10**9])}, "labels: expected 2"),
        ({"images": GOOD, "labels": np.array([0.0, 1.0])}, "labels: expected 2"),
        ({"images": GOOD, "labels": np.array([0, 5]), "names": np.array(["a", "b"])}, "2 names for labels"),
        ({"images": np.array([{}, {}], dtype=object)}, "not a readable npz"),
    ],
)
def test_npz_errors(tmp_path, content, message):
    np.savez(tmp_path / "d.npz", **content)
    with pytest.raises(FileError, match=message):
        load_data(tmp_path / "d.npz")


def test_broken_npz(tmp_path):
    np.savez(tmp_path / "d.npz", images=GOOD)
    raw = (tmp_path / "d.npz").read_bytes()
    for changed in (b"", b"garbage", raw[:50], raw[:-10]):
        (tmp_path / "d.npz").write_bytes(changed)
        with pytest.raises(FileError, match=r"d\.npz"):
            load_data(tmp_path / "d.npz")


def test_other_sources(tmp_path):
    with pytest.raises(FileError, match="no pictures"):
        load_data(tmp_path)
    with pytest.raises(UsageError, match="did you mean 'emoji'"):
        load_data("emojis")
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(FileError, match="not a folder"):
        load_data(tmp_path / "x.tar")
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "b.png").write_bytes(png())
    with pytest.raises(FileError, match=r"'a\.png' lies beside"):
        load_data(tmp_path)


def test_data_checks_itself():
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    for changed in (images[:0], images[:, :, :4], images.float(), images.expand(2, 2, 8, 8)):
        with pytest.raises(UsageError, match="expected uint8"):
            Data(changed, None)
    with pytest.raises(UsageError, match="go together"):
        Data(images, torch.zeros(2, dtype=torch.long))
    with pytest.raises(UsageError, match="integers from 0 to 0"):
        Data(images, torch.tensor([0, 1]), ("a",))
