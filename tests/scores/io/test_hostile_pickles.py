"""Small pickles that would be large: shared values, long numbers, calls without end. Each is refused at once."""

import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch

import pfode
from pfode.errors import FileError
from pfode.fields import shown
from pfode.scores.io import pickles
from tests.scores import pickled

DEEP = 60


def leaves(depth: int = DEEP, first: bytes = b")") -> bytes:
    """Opcodes that push a tuple of 2^depth leaves, each tuple the one before twice."""
    steps = b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(depth))  # MEMOIZE, BINGET i, TUPLE2
    return first + steps


def text(word: str) -> bytes:
    raw = word.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def network(state: bytes, name: str = "EDMPrecond") -> bytes:
    """A persistent object of theirs whose state these opcodes push."""
    meta = b"}(" + text("class_name") + text(name) + text("state") + state + b"u"
    return call("torch_utils.persistence", "_reconstruct_persistent_obj", meta)


HUGE = leaves()
LONG = b"\x8b" + struct.pack("<i", 4000) + b"\xff" * 3999 + b"\x00"  # an integer of 32,000 bits
STATE = b"}(" + text("img_resolution") + b"%s" + text("img_channels") + b"K\x02" + text("label_dim") + b"K\x03u"
FILES = {
    "a value of 2^60 leaves": HUGE,
    "as a key": b"}(" + HUGE + b"K\x01u",
    "as an item": b"}" + HUGE + b"K\x01s",
    "in a set": b"\x8f(" + HUGE + b"\x90",
    "as the key of a mapping": call("collections", "OrderedDict", b"](" + HUGE + b"K\x01\x86e"),
    "in a set by a call": call("builtins", "set", b"](" + HUGE + b"e"),
    "as a dtype": call("numpy", "dtype", HUGE),
    "as the state of a dtype": call("numpy.core.multiarray", "scalar", call("numpy", "dtype", text("f8")) + HUGE + b"b",
                                    b"C\x08" + bytes(8)),
    "as the order of a dtype": call("numpy.core.multiarray", "scalar",
                                    call("numpy", "dtype", text("f8")) + b"(K\x03" + HUGE + b"tb", b"C\x08" + bytes(8)),
    "as an encoding": call("_codecs", "encode", text("x"), HUGE),
    "as a scalar": call("numpy.core.multiarray", "scalar", HUGE, HUGE),
    "as the class of an object": call("torch_utils.persistence", "_reconstruct_persistent_obj",
                                      b"}(" + text("class_name") + HUGE + text("state") + b"}u"),
    "as what is called": HUGE + b")R",
    "as a class": HUGE + b")\x81",
    "as the arguments of a class": b"ccollections\nOrderedDict\n" + HUGE + b"\x81",
    "as a field": network(STATE.replace(b"%s", HUGE)),
    "as positional arguments": network(
        STATE.replace(b"%s", b"K\x08")[:-1] + text("_modules") + b"}(" + text("model")
        + network(b"}(" + text("_init_args") + HUGE + text("_init_kwargs") + b"}u", "SongUNet") + b"uu"),
    "as a configuration": network(
        STATE.replace(b"%s", b"K\x08")[:-1] + text("_modules") + b"}(" + text("model")
        + network(b"}(" + text("_init_kwargs") + b"}(" + text("in_channels") + HUGE + b"uu", "SongUNet") + b"uu"),
    "as a module": network(
        STATE.replace(b"%s", b"K\x08")[:-1] + text("_modules") + b"}(" + text("model") + HUGE + b"uu"),
    "as buffers": network(STATE.replace(b"%s", b"K\x08")[:-1] + text("_buffers") + HUGE + b"u"),
    "lists within themselves": b"]\x94h\x00a",
    "a list within itself as a field": network(STATE.replace(b"%s", b"]\x94h\x00a")),
    "a long integer": LONG,
    "a long integer as a key": b"}(" + LONG + b"K\x01u",
    "a long integer as a field": network(STATE.replace(b"%s", LONG)),
    "one list made into many": b"](" + b"K\x01K\x02\x86" * 20_000 + b"e\x94" + b"(" + (
        b"ccollections\nOrderedDict\nh\x00\x85R") * 20_000 + b"t",
    "one text encoded again and again": text("x" * 100_000) + b"\x94" + text("latin1") + b"\x94" + b"(" + (
        b"c_codecs\nencode\nh\x00h\x01\x86R") * 10_000 + b"t",
}  # fmt: skip


@pytest.mark.parametrize("body", FILES.values(), ids=FILES)
def test_small_files_that_would_be_large(body, tmp_path):
    """Without bounds they end in no time that anybody has: that it ends at all is the test."""
    file = tmp_path / "x.pkl"
    file.write_bytes(b"\x80\x04" + body + b".")
    tracemalloc.start()
    try:
        with pytest.raises(FileError) as caught:
            pfode.load(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < len(str(file)) + 250
    assert peak < 200e6


def test_a_shape_of_text_is_not_multiplied():
    array = pickles.Stored("numpy.ndarray")
    dtype = pickles.Stored("numpy.dtype", "f8")
    for shape in (("x" * 1000, 10**9), (10**30,), ((),), [2], (-1,), (True,)):
        array.state = {"state": (1, shape, dtype, False, bytes(8))}
        with pytest.raises(pickles.Refused, match="broken NumPy array"):
            pickles.numbers(array)


def test_modules_that_stand_in_many_places(tmp_path):
    """32 levels of two references each are 2^32 modules."""
    net = pickled.network("ddpm++")
    honest = pickled.preconditioned(net, "EDMPrecond")
    inner = pickled.Persistent("Linear", {"_parameters": {}, "_buffers": {}, "_modules": {}})
    for _ in range(30):
        modules = {"a": inner, "b": inner}
        inner = pickled.Persistent("Linear", {"_parameters": {}, "_buffers": {}, "_modules": modules})
    honest.contents["_modules"]["model"].contents["_modules"]["more"] = inner
    (tmp_path / "x.pkl").write_bytes(pickled.dump({"ema": honest}))
    with pytest.raises(FileError, match="a module that stands in two places"):
        pfode.load(tmp_path / "x.pkl")


def test_tensors_that_share_their_numbers_are_no_larger_than_the_file(tmp_path, monkeypatch):
    file = pickled.snapshot(tmp_path / "x.pkl", pickled.network("ddpm++"), "EDMPrecond")
    shared = pickles.Storage("F32", bytearray(400_000))

    def tensor(arguments: tuple) -> pickles.Tensor:
        shape = arguments[2]
        return pickles.Tensor(shared, 0, shape, tuple(0 for _ in shape))

    value = pickles.read(file)
    monkeypatch.setitem(pickles.CALLS, pickles.Name("torch._utils", "_rebuild_tensor_v2"), tensor)
    shared_value = pickles.read(file)
    size = len(file.read_bytes())
    file.write_bytes(bytes(size // 4))
    monkeypatch.setattr(pickles, "read", lambda path: shared_value)
    with pytest.raises(FileError, match="share their numbers"):
        pfode.load(file)
    file.write_bytes(bytes(size))
    monkeypatch.setattr(pickles, "read", lambda path: value)
    assert pfode.load(file).shape == (2, 8, 8)


def test_what_torch_and_numpy_write_is_still_read(tmp_path):
    value = [torch.arange(6.0).reshape(2, 3).T, np.arange(4.0).reshape(2, 2), 2**77, "x" * 100_000]
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(value, 2))
    tensor, array, number, words = pickles.read(tmp_path / "v.pkl")
    assert tensor.shape == (3, 2)
    assert pickles.numbers(array) == [0, 1, 2, 3]
    assert (number, words) == (2**77, "x" * 100_000)


def test_values_are_shown_by_their_beginning():
    huge: tuple = ()
    for _ in range(DEEP):
        huge = (huge, huge)
    loop: list = []
    loop.append(loop)
    assert shown([1, "two", (3,), {"four": None}]) == "[1, 'two', (3,), {'four': None}]"
    assert shown("x" * 10**6) == "'" + "x" * 56 + "..."
    for value in (huge, loop, {1: huge}, 10**5000, [10**5000], object(), list(range(10**6)), b"x" * 10**6):
        assert len(shown(value)) <= 60
        assert len(shown(value, 20)) <= 20
