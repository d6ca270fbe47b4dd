"""npz files: what is not known is refused, and headers are checked before anything is allocated."""

import io
import os
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest

from pfode.errors import FileError
from pfode.scores.training import archives
from pfode.scores.training.data import digits, load_data

GOOD = np.zeros((2, 8, 8, 3), dtype=np.uint8)
LABELS = np.array([0, 1])


def npy(array, version=None):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version, allow_pickle=True)
    return stream.getvalue()


def zipped(path, content, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, raw in content.items():
            file.writestr(name, raw)
    return path


def header(text, data=b"", version=1):
    raw = text.encode("latin1") + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(raw).to_bytes(2 if version == 1 else 4, "little") + raw + data


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_form_is_read(tmp_path, version, method):
    images = np.asfortranarray(np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(GOOD.shape))
    content = {
        "images.npy": npy(images, version),
        "labels.npy": npy(LABELS.astype(">i2"), version),
        "names.npy": npy(np.array(["ant", "bé"]), version),
    }
    data = load_data(zipped(tmp_path / "d.npz", content, method))
    assert (data.images.permute(0, 2, 3, 1).numpy() == images).all()
    assert data.labels is not None
    assert (data.labels.tolist(), data.names) == ([0, 1], ("ant", "bé"))


@pytest.mark.parametrize("key", ["label", "Labels", "y", "targets", "arr_0", "labels.txt", "images2"])
def test_arrays_that_are_not_known_are_refused(tmp_path, key):
    np.savez(tmp_path / "d.npz", **{"images": GOOD, key: LABELS})
    with pytest.raises(FileError, match=f"{key}.*not an array that is known"):
        load_data(tmp_path / "d.npz")


@pytest.mark.parametrize(
    "content",
    [
        {"images": np.uint8(3)},
        {"images": GOOD, "labels": np.int64(0)},
        {"images": GOOD, "labels": LABELS, "names": np.array("a")},
        {"images": GOOD, "labels": LABELS, "names": np.array([["a", "b"]])},
        {"images": GOOD, "labels": LABELS, "names": np.array([b"a", b"b"])},
        {"images": GOOD, "labels": LABELS, "names": np.array([0.0, 1.0])},
        {"images": GOOD, "labels": LABELS, "names": np.array(["a", "a"])},
        {"images": GOOD, "labels": LABELS, "names": np.array(["a", "b\n"])},
        {"images": GOOD, "labels": LABELS, "names": np.array(["a", ""])},
        {"images": GOOD, "labels": LABELS, "names": np.array([], dtype="U3")},
        {"images": GOOD, "labels": LABELS, "names": np.zeros(2, dtype="U0")},
        {"images": GOOD, "names": np.array(["a", "b"])},
        {"images": GOOD, "labels": LABELS > 0},
        {"images": GOOD, "labels": np.array([0, 2**64 - 1], dtype=np.uint64)},
        {"images": GOOD, "labels": LABELS.reshape(2, 1)},
        {"images": GOOD.astype([("a", np.uint8)])},
        {"images": GOOD, "labels": np.array([0, 1], dtype="m8[s]")},
    ],
    ids=lambda content: ", ".join(f"{k}: {v.dtype}{v.shape}" for k, v in content.items()),
)
def test_wrong_types_and_shapes(tmp_path, content: Any):
    np.savez(tmp_path / "d.npz", **content)
    with pytest.raises(FileError, match=r"d\.npz: .*(images|labels|name)"):
        load_data(tmp_path / "d.npz")


U8 = "{'descr': '|u1', 'fortran_order': False, 'shape': %s}"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPZ\x01\x00" + b"\0" * 80,
        b"\x93NUMPY\x09\x00" + b"\0" * 80,
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
        header("{}"),
        header("[1]"),
        header("__import__('os').system('true')"),
        header("(" * 5000),
        header(U8 % "3"),
        header(U8 % "(-1, 8, 8)"),
        header(U8 % "(1.0, 8, 8)"),
        header(U8 % "(True, 8, 8)"),
        header(U8 % ("(" + "9" * 4300 + ", 8, 8)")),
        header(U8 % ("(" + "9" * 5000 + ", 8, 8)")),
        header(U8 % "(1000000000000, 8, 8)"),
        header(U8 % ("(" + "1, " * 40 + ")")),
        header(U8 % "(1, 8, 8)", b"\0" * 63),
        header(U8 % "(1, 8, 8)", b"\0" * 65),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1, 8, 8)}", b"\0" * 512),
        header("{'descr': 'nothing', 'fortran_order': False, 'shape': (1, 8, 8)}"),
        header("{'descr': '|u1', 'fortran_order': 0, 'shape': (1, 8, 8)}", b"\0" * 64),
        header("{'descr': '|V0', 'fortran_order': False, 'shape': (99999999999, 8, 8)}"),
        header("\udc80".encode("utf-8", "surrogatepass").decode("latin1"), version=3),
        npy(np.array([{}, {}], dtype=object)),
    ],
    ids=lambda raw: repr(raw[6:60]),
)
def test_broken_headers(tmp_path, raw):
    with pytest.raises(FileError, match=r"d\.npz"):
        load_data(zipped(tmp_path / "d.npz", {"images.npy": raw}))


def test_nothing_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    for key in ("images", "labels", "names"):
        content: Any = {"images": GOOD, "labels": LABELS, "names": np.array(["a", "b"]), key: np.array([Evil()] * 2)}
        np.savez(tmp_path / "d.npz", **content)
        with pytest.raises(FileError, match="Python objects"):
            load_data(tmp_path / "d.npz")
    assert not (tmp_path / "evil").exists()


def test_names_without_an_end_are_not_listed(tmp_path):
    """A dtype of no bytes lets an array be endless for nothing."""
    names = header("{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000000,)}")
    content = {"images.npy": npy(GOOD), "labels.npy": npy(LABELS), "names.npy": names}
    with pytest.raises(FileError, match="names: expected"):
        load_data(zipped(tmp_path / "d.npz", content))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_unpacks_to_too_much_is_refused_before_it_is_allocated(tmp_path, method, monkeypatch):
    monkeypatch.setattr(archives, "FREE", 8 << 20)
    with zipfile.ZipFile(tmp_path / "d.npz", "w", method) as file, file.open("images.npy", "w") as entry:
        entry.write(header(U8 % "(16, 1024, 1024)"))
        for _ in range(16):
            entry.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(FileError, match="that unpack to"):
        load_data(tmp_path / "d.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 19


def test_an_entry_shorter_or_longer_than_it_says(tmp_path):
    """The sizes in a zip's list are claims; here they are wrong."""
    path = zipped(tmp_path / "d.npz", {"images.npy": npy(GOOD)}, zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\1\2") + 24
    for change in (-1, 1, 10**9):
        changed = raw.copy()
        changed[at : at + 4] = (int.from_bytes(raw[at : at + 4], "little") + change).to_bytes(4, "little")
        path.write_bytes(changed)
        with pytest.raises(FileError, match=r"d\.npz"):
            load_data(path)


def test_damaged_entries_are_named(tmp_path):
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        images = np.random.default_rng(0).integers(0, 256, GOOD.shape, dtype=np.uint8)
        path = zipped(tmp_path / "d.npz", {"images.npy": npy(images)}, method)
        raw = path.read_bytes()
        for i in range(60, 180, 7):
            path.write_bytes(raw[:i] + bytes([raw[i] ^ 0xFF]) + raw[i + 1 :])
            with pytest.raises(FileError, match=r"d\.npz.*images"):
                load_data(path)


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "d.npz")
    (tmp_path / "e.zip").symlink_to("/dev/zero")
    for name in ("d.npz", "e.zip"):
        with pytest.raises(FileError, match="not a regular file"):
            load_data(tmp_path / name)


def test_digits_are_those_that_the_shipped_networks_saw():
    assert digits().card["sha256"] == "b41ca9fd335466eee997366c2e6f6bbe0a1b4582afe091fc4eba35f4a254182f"
    labels = digits().labels
    assert labels is not None
    assert labels.tolist()[:12] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
