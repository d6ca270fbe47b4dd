"""Headers of safetensors files are checked before anything is multiplied, allocated or believed."""

import json
import random
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save

from pfode.errors import FileError, UsageError
from pfode.files import parse_json
from pfode.header import MAX_HEADER, content_digest, pack, read_header
from pfode.tensors import read_tensors, write_tensors


def packed(header: str | bytes | dict, data: bytes = bytes(8)) -> bytes:
    """A safetensors file of this header, whatever it says."""
    raw = json.dumps(header) if isinstance(header, dict) else header
    raw = raw.encode() if isinstance(raw, str) else raw
    return len(raw).to_bytes(8, "little") + raw + data


def entry(**changes) -> dict:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


LONG = "9" * 4000
ONE = '{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
NINES = 10**18
HOSTILE = {
    "shape of strings": entry(shape=["a" * 1000, NINES]),
    "a string times a number": entry(shape=["a", 10**9]),
    "a shape that is a string": entry(shape="22"),
    "floats": entry(shape=[2.0]),
    "booleans": entry(shape=[True, 2]),
    "null": entry(shape=None),
    "negative": entry(shape=[-2]),
    "two negatives": entry(shape=[-1, -2]),
    "huge": entry(shape=[NINES] * 64),
    "many sides": entry(shape=[1] * 65),
    "huge but for a zero": entry(shape=[NINES, 0, NINES]),
    "long digits": ONE.replace("[2]", f"[{LONG}]"),
    "long digits in offsets": ONE.replace("8]", f"{LONG}]"),
    "not a number": ONE.replace("[2]", "[NaN]"),
    "an infinite shape": ONE.replace("[2]", "[1e999]"),
    "names twice": ONE[:-1] + "," + ONE[1:],
    "fields twice": ONE.replace('"shape"', '"shape":[2],"shape"'),
    "metadata twice": '{"__metadata__":{},"__metadata__":{},' + ONE[1:],
    "an empty tensor that is too large": entry(shape=[NINES, 0, NINES], data_offsets=[0, 0]),
    "overlap": {**entry(), "y": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    "gap": {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    "short": entry(shape=[1], data_offsets=[0, 4]),
    "past the end": entry(shape=[4], data_offsets=[0, 16]),
    "backwards": entry(shape=[0], data_offsets=[8, 0]),
    "one offset": entry(data_offsets=[8]),
    "three offsets": entry(data_offsets=[0, 8, 8]),
    "offsets by name": entry(data_offsets={"0": 8}),
    "an unknown dtype": entry(dtype="F4"),
    "a dtype that is a list": entry(dtype=["F32"]),
    "a dtype that is a number": entry(dtype=1),
    "no dtype": {"x": {"shape": [2], "data_offsets": [0, 8]}},
    "an entry that is a list": {"x": [1, 2]},
    "an entry that is a string": {"x": "dtype"},
    "metadata of numbers": {**entry(), "__metadata__": {"a": 1}},
    "metadata that is a list": {**entry(), "__metadata__": []},
    "a list": "[1]",
    "deep": "[" * 200_000,
    "deep objects": '{"a":' * 200_000,
    "half a surrogate": '{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "no UTF-8": b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "UTF-16": json.dumps(entry()).encode("utf-16"),
}  # fmt: skip


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers(header, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed(header))
    tracemalloc.start()
    try:
        with pytest.raises(FileError) as caught:
            read_header(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.code == 3
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < len(str(path)) + 250
    assert peak < 50e6


def test_a_last_name_twice_among_many_is_found_in_one_pass():
    raw = "{" + ",".join(f'"{i}":0' for i in range(200_000)) + ',"199999":0}'
    with pytest.raises(FileError, match="'199999' appears twice"):
        parse_json("x", raw.encode())


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_or_the_limit(length, tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        file.truncate(MAX_HEADER + 100)
    with pytest.raises(FileError, match="header"):
        read_header(tmp_path / "x")


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "a JPEG picture"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG picture"),
        (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(100), "a WebP picture"),
        (b"PK\x03\x04" + bytes(100), "a zip archive"),
        (b"\x80\x04\x95" + bytes(100), "a pickle"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"<!DOCTYPE html><html>not found</html>", "a web page"),
        (bytes(100), "nothing but zeros"),
        (b"", "empty"),
        (b"plain text, longer than eight bytes", "truncated or not a safetensors file"),
    ],
)
def test_other_files_are_called_what_they_are(raw, what, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(FileError, match=what):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("tail", [b"\0", b"more", bytes(1000)])
def test_trailing_bytes_are_said(tail, tmp_path):
    (tmp_path / "x").write_bytes(packed(entry()) + tail)
    with pytest.raises(FileError, match="something follows its end"):
        read_header(tmp_path / "x")


def test_empty_tensors_and_scalars_in_any_order(tmp_path):
    header = {
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "a": {"dtype": "F32", "shape": [0, 10**9], "data_offsets": [0, 0]},
        "c": {"dtype": "I64", "shape": [3, 0], "data_offsets": [8, 8]},
        "d": {"dtype": "F64", "shape": [], "data_offsets": [8, 16]},
    }
    (tmp_path / "x").write_bytes(packed(header, bytes(16)))
    found = read_header(tmp_path / "x")
    assert found.parameters == 3
    tensors = read_tensors(found, verify=False)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "a": (0, 10**9), "b": (2,), "c": (3, 0), "d": ()
    }  # fmt: skip


EVERY = {
    "half": torch.arange(6).reshape(2, 3).half(),
    "brain": torch.arange(3).bfloat16(),
    "double": torch.tensor(1.5, dtype=torch.float64),
    "flags": torch.tensor([True, False]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "long": torch.tensor([-1, 2**62]),
    "eighth": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "none": torch.zeros(0, 3),
}


def test_what_is_written_is_what_safetensors_reads_and_the_other_way_round(tmp_path):
    path = write_tensors(tmp_path / "x", EVERY, {"b": "2", "a": "ü 1"})
    (tmp_path / "y").write_bytes(save({k: v.contiguous() for k, v in EVERY.items()}, {"a": "1"}))
    theirs = load_file(path)
    own, other = read_tensors(read_header(path)), read_tensors(read_header(tmp_path / "y"), verify=False)
    for found in (theirs, own, other):
        assert set(found) == set(EVERY)
        for name, value in EVERY.items():
            assert found[name].dtype == value.dtype
            assert found[name].shape == value.shape
            assert torch.equal(found[name].double(), value.double())
    assert read_header(path).metadata["a"] == "ü 1"


def test_the_same_content_is_the_same_file(tmp_path):
    names = list(EVERY)
    metadata = {str(i): "x" for i in range(20)}
    first = write_tensors(tmp_path / "a", EVERY, metadata).read_bytes()
    for seed in range(5):
        mixed, keys = random.Random(seed).sample(names, len(names)), random.Random(seed).sample(list(metadata), 20)
        again = write_tensors(tmp_path / "b", {n: EVERY[n] for n in mixed}, {k: metadata[k] for k in keys})
        assert again.read_bytes() == first
    length = int.from_bytes(first[:8], "little")
    assert length % 8 == 0
    for entry_ in read_header(tmp_path / "a").entries.values():
        assert entry_.start % {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(entry_.dtype, 1) == 0


def test_the_digest_is_that_of_the_content_wherever_it_lies(tmp_path):
    write_tensors(tmp_path / "a", {"x": torch.ones(2), "y": torch.zeros(1, dtype=torch.float64)}, {"k": "v"})
    header = read_header(tmp_path / "a")
    contents = {name: (e.dtype, e.shape, bytes(data)) for name, e, data in header.tensors()}
    assert header.digest() == content_digest(header.metadata, contents) == header.metadata["pfode.digest"]
    (tmp_path / "b").write_bytes(b"".join(pack(header.metadata, contents)))
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_reading_takes_no_more_than_the_file(tmp_path):
    size = 40_000_000
    write_tensors(tmp_path / "a", {"x": torch.zeros(size // 8), "y": torch.zeros(size // 8)}, {})
    tracemalloc.start()
    try:
        read_header(tmp_path / "a").verify()
        _, verified = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        read_tensors(read_header(tmp_path / "a"))
        _, read = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert verified < 1.01 * size + 1e6
    assert read < 1.01 * size + 1e6


def test_a_file_cut_after_its_header_was_read(tmp_path):
    write_tensors(tmp_path / "a", {"x": torch.zeros(100)}, {})
    header = read_header(tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-4])
    with pytest.raises(FileError, match="truncated while it was read"):
        header.verify()


def test_tensors_that_cannot_be_written(tmp_path):
    with pytest.raises(UsageError, match="meta device"):
        write_tensors(tmp_path / "a", {"x": torch.zeros(2, device="meta")}, {})
    with pytest.raises(UsageError, match=r"x: a safetensors file has no torch\.complex128"):
        write_tensors(tmp_path / "a", {"x": torch.zeros(2, dtype=torch.complex128)}, {})
    assert not list(tmp_path.iterdir())
