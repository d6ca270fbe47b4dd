"""Malicious and broken pickles: nothing of them is executed, and each ends in one error that says why."""

import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pfode
from pfode.errors import FileError
from pfode.scores.io import pickles
from pfode.scores.io.edm_files import _torch
from tests.scores import pickled

ROOT = Path(__file__).parents[3]
EMA = b"\x80\x04}\x8c\x03ema"  # a dict whose "ema" follows
RECONSTRUCT = b"\x8c\x17torch_utils.persistence\x8c\x1b_reconstruct_persistent_obj\x93"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def call(module: str, name: str, *arguments: str) -> bytes:
    """A pickle that calls a function with strings, named by STACK_GLOBAL."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93(" + b"".join(map(text, arguments)) + b"tR."


CALLS = [
    ("os", "system", "touch canary"), ("posix", "system", "touch canary"), ("nt", "system", "x"), ("os", "popen", "x"),
    ("os", "execv", "/bin/sh"), ("os", "remove", "canary"), ("subprocess", "Popen", "x"), ("pty", "spawn", "x"),
    ("subprocess", "check_output", "x"), ("builtins", "eval", "1"), ("builtins", "exec", "1"),
    ("__builtin__", "eval", "1"), ("builtins", "compile", "1"), ("builtins", "getattr", "a", "b"),
    ("builtins", "__import__", "os"), ("builtins", "open", "canary", "w"), ("builtins", "type", "a"),
    ("builtins", "breakpoint"), ("importlib", "import_module", "os"), ("runpy", "run_path", "x"),
    ("socket", "create_connection", "x"), ("urllib.request", "urlopen", "http://x"), ("webbrowser", "open", "x"),
    ("shutil", "rmtree", "x"), ("ctypes", "CDLL", "x"), ("timeit", "timeit", "1"), ("cProfile", "run", "1"),
    ("pdb", "run", "1"), ("code", "interact"), ("operator", "attrgetter", "system"), ("functools", "partial", "x"),
    ("operator", "methodcaller", "x"), ("torch", "load", "x"), ("torch.hub", "load", "x"), ("numpy", "load", "x"),
    ("torch.serialization", "load", "x"), ("torch.jit", "load", "x"), ("pickle", "loads", "x"),
    ("copyreg", "_reconstructor", "x"), ("copyreg", "add_extension", "os", "system"), ("joblib", "load", "x"),
    ("numpy.testing._private.utils", "runstring", "1"), ("dill._dill", "_create_code", "x"), ("sys", "exit", "0"),
    ("torch_utils.persistence", "_src_to_module", "import os"), ("torch_utils.persistence", "import_hook", "x"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__", "x"), ("collections", "OrderedDict.__class__", "x"),
    ("training.networks", "EDMPrecond", "x"), ("pfode.scores.io.pickles", "read", "x"),
    ("torch.nn.modules.container", "ModuleDict.__reduce__"), ("dnnlib.util", "open_url", "http://x"),
]  # fmt: skip


class Reduced:
    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


def bare_tensor(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """A tensor of these sizes over a storage of four numbers."""
    rebuild = text("torch._utils") + text("_rebuild_tensor_v2") + b"\x93"
    return b"\x80\x04" + rebuild + b"(" + storage(4) + number(offset) + sequence(shape) + sequence(stride) + b"\x89NtR."


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def sequence(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def legacy(numel: int, data: int, name: str = "FloatStorage", magic: int = pickles.MAGIC) -> bytes:
    """What `torch.save` wrote of a storage before its zip files."""
    about = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = b"".join(pickle.dumps(value, 2) for value in (magic, 1001, about))
    named = b"\x80\x02(" + text("storage") + f"ctorch\n{name}\n".encode() + text("0") + text("cpu")
    return head + named + number(numel) + b"NtQ." + pickle.dumps(["0"], 2) + struct.pack("<q", numel) + bytes(data)


def storage(numel: int, raw: bytes | None = None) -> bytes:
    raw = legacy(numel, 4 * numel) if raw is None else raw
    whole = b"B" + struct.pack("<I", len(raw)) + raw
    return text("torch.storage") + text("_load_from_bytes") + b"\x93" + whole + b"\x85R"


def zipped() -> bytes:
    stream = io.BytesIO()
    torch.save({"ema": torch.zeros(2)}, stream)
    return stream.getvalue()


def crafted() -> dict[str, tuple[bytes, str]]:
    """Files, and a word of the message each must end in."""
    sound = pickled.dump({"ema": pickled.preconditioned(pickled.network("ddpm++"), "EDMPrecond")})
    deep = 100_000
    files: dict[str, tuple[bytes, str]] = {
        "global": (b"\x80\x02cposix\nsystem\nX\x05\x00\x00\x00touch\x85R.", "'posix.system'"),
        "text protocol": (b"cos\nsystem\n(S'touch canary'\ntR.", "'os.system'"),
        "reduce": (pickle.dumps({"ema": Reduced()}), "'posix.system'"),
        "inst": (b"(S'touch canary'\nios\nsystem\n.", "STRING"),
        "inst alone": (b"(ios\nsystem\n.", "INST"),
        "obj": (b"\x80\x02(ccollections\nOrderedDict\no.", "OBJ"),
        "newobj": (b"\x80\x02cbuiltins\nobject\n)\x81.", "'builtins.object'"),
        "newobj of a function": (b"\x80\x04" + RECONSTRUCT + b")\x81.", "it makes a"),
        "newobj_ex": (b"\x80\x04" + text("collections") + text("OrderedDict") + b"\x93)}\x92.", "NEWOBJ_EX"),
        "ext1": (b"\x80\x02\x82\x01.", "EXT1"),
        "ext2": (b"\x80\x02\x83\x01\x00.", "EXT2"),
        "ext4": (b"\x80\x02\x84\x01\x00\x00\x00.", "EXT4"),
        "persid": (b"\x80\x02Pos.system\n.", "PERSID"),
        "binpersid": (b"\x80\x02X\x02\x00\x00\x00osQ.", "persistent id"),
        "dup": (b"\x80\x02]2.", "DUP"),
        "build on a name": (b"\x80\x04" + RECONSTRUCT + b"}b.", "BUILD"),
        "build on a list": (b"\x80\x02]}b.", "BUILD"),
        "build slots": (b"\x80\x04" + RECONSTRUCT + b"N}X\x08\x00\x00\x00__code__NR\x86b.", ""),
        "call of a string": (b"\x80\x02X\x02\x00\x00\x00os)R.", "it calls"),
        "call of a result": (b"\x80\x02ccollections\nOrderedDict\n)R)R.", "it calls"),
        "call of an array": (b"\x80\x02cnumpy\nndarray\n)R.", "it calls 'numpy.ndarray'"),
        "object array": (b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R.", "dtype 'O8'"),
        "storage of a pickle": (b"\x80\x04" + storage(0, pickle.dumps(Reduced(), 2)) + b".", "'posix.system'"),
        "storage of a zip": (b"\x80\x04" + storage(0, zipped()) + b".", "truncated or no pickle"),
        "storage within a storage": (
            b"\x80\x04" + storage(0, b"\x80\x04" + storage(1) + b".") + b".", "'torch.storage._load_from_bytes'"
        ),
        "storage of another class": (
            b"\x80\x04" + storage(0, legacy(1, 4, "load")) + b".", "'torch.load'"
        ),
        "storage of another magic": (b"\x80\x04" + storage(0, legacy(1, 4, magic=7)) + b".", "torch did not write"),
        "huge storage": (b"\x80\x04" + storage(0, legacy(10**13, 4)) + b".", "a storage of 10000000000000 numbers"),
        "negative storage": (b"\x80\x04" + storage(0, legacy(-1, 0)) + b".", ""),
        "short storage": (b"\x80\x04" + storage(0, legacy(4, 15)) + b".", "15 bytes"),
        "huge tensor": (bare_tensor((10**9, 10**9), (0, 0)), "in a storage of 4 numbers"),
        "tensor beyond": (bare_tensor((4,), (1,), 1), "in a storage of 4 numbers"),
        "tensor before": (bare_tensor((2,), (1,), -1), "a tensor of shape"),
        "tensor backwards": (bare_tensor((2,), (-1,), 3), "a tensor of shape"),
        "huge bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.", "truncated or no pickle"),
        "huge bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.", "it uses the opcode BYTEARRAY8"),
        "huge string": (b"\x80\x04X\xff\xff\xff\xffx.", "truncated or no pickle"),
        "huge integer": (b"\x80\x02\x8b\xff\xff\xff\x7fx.", "truncated or no pickle"),
        "memo bomb": (b"\x80\x02]r\xff\xff\xff\x7f.", "expected a network"),
        "memo of nothing": (b"\x80\x02h\x05.", "BINGET"),
        "laughs": (b"\x80\x02]q\x00" + b"".join(
            b"]q" + bytes([i + 1]) + b"(" + b"h" + bytes([i]) + (b"h" + bytes([i])) * 9 + b"e" for i in range(60)
        ) + b"\x85.", "broken"),
        "hash of tuples": (b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * 60 + b"K\x01s.", ""),
        "unhashable": (b"\x80\x02}]K\x01s.", "SETITEM"),
        "itself": (b"\x80\x02}q\x00" + text("ema") + b"h\x00s.", "'dict'"),
        "list of itself": (EMA + b"]\x94h\x00as.", "expected a network"),
        "nested lists": (EMA + b"]" * deep + b"a" * (deep - 1) + b"s.", "'list'"),
        "no network": (pickle.dumps([1, 2, 3]), "expected a network"),
        "two pickles": (pickle.dumps({}) + pickle.dumps(Reduced()), "more bytes after its end"),
        "stack underflow": (b"\x80\x02\x85.", "TUPLE1"),
        "no mark": (b"\x80\x02t.", "TUPLE"),
        "values left": (b"\x80\x02]].", "ends with 2 values"),
        "nothing": (b"", "truncated or no pickle"),
        "only stop": (b".", "ends with 0 values"),
        "unknown opcode": (b"\x80\x04\xfe.", "truncated or no pickle"),
        "noise": (bytes(range(256)) * 8, ""),
        "zip": (zipped(), ""),
        "no state": (b"\x80\x04" + RECONSTRUCT + b"}" + text("class_name") + text("EDMPrecond") + b"s\x85R.", "REDUCE"),
        "numpy scalar": (b"\x80\x02cnumpy.core.multiarray\nscalar\nK\x01C\x08xxxxxxxx\x86R.", "REDUCE"),
    }  # fmt: skip
    files |= {f"{module}.{name}": (call(module, name, *args), f"'{module}.{name}'") for module, name, *args in CALLS}
    for share in (0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.99999):
        files[f"truncated {share}"] = (sound[: int(len(sound) * share)], "truncated")
    return files


FILES = crafted()


READ = """
import pfode
from pfode.errors import FileError
read = pfode.load
read(folder / "sound.pkl")  # everything that reading needs is imported here
try: read(folder / "warm.pkl")
except FileError: pass
"""
UNPICKLE = """
import pickle
FileError = ValueError
def read(file): pickle.loads(file.read_bytes())
"""
WATCH = """
seen, watching = [], False
BAD = ("os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.putenv", "os.remove", "os.rename",
       "os.mkdir", "subprocess.Popen", "exec", "compile", "import", "socket.", "ctypes.", "pickle.find_class",
       "shutil.", "code.__new__", "marshal.", "webbrowser.", "urllib.", "builtins.input", "sys.set")
def hook(event, arguments):
    if watching and (event.startswith(BAD) or (event == "open" and str(arguments[1]) not in ("r", "rb", "None"))):
        seen.append(f"{event} {str(arguments)[:200]}")
sys.addaudithook(hook)
found = {}
for file in sorted(folder.glob("*.pkl")):
    seen.clear()
    watching = True
    try:
        read(file)
        outcome = ["loaded", ""]
    except FileError as error:
        outcome = ["FileError", error.message]
    except BaseException as error:
        outcome = [type(error).__name__, str(error)]
    watching = False
    found[file.name] = [*outcome, list(seen)]
print(json.dumps(found))
"""


def watched(folder: Path, read: str) -> dict[str, Any]:
    """What a process under an audit hook, with at most 6 GB, says about every file of a folder."""
    limits = "import json, resource, sys\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n"
    limits += "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
    run = subprocess.run(
        [sys.executable, "-c", limits + read + WATCH, str(folder)], cwd=folder, capture_output=True, text=True,
        timeout=120, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The folder of the files, and what was seen of each."""
    folder = tmp_path_factory.mktemp("pickles")
    pickled.snapshot(folder / "sound.pkl", pickled.network("ddpm++"), "EDMPrecond")
    (folder / "warm.pkl").write_bytes(b"no pickle")
    for i, (raw, _) in enumerate(FILES.values()):
        (folder / f"{i}.pkl").write_bytes(raw)
    return folder, watched(folder, READ)


def test_there_are_many():
    assert len(FILES) >= 100


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_executed_and_one_error_says_why(outcomes, name):
    folder, found = outcomes
    kind, message, events = found[f"{list(FILES).index(name)}.pkl"]
    assert events == []
    assert kind == "FileError", message
    assert FILES[name][1] in message
    assert message.startswith(str(folder))
    assert "\n" not in message
    assert len(message) < 500


def test_sound_pickles_load_and_their_source_is_not_run(outcomes):
    folder, found = outcomes
    assert found["sound.pkl"] == ["loaded", "", []]
    assert not list(folder.glob("canary"))


def test_the_audit_hook_sees_what_unpickling_would_do(tmp_path):
    """The check itself can fail: such a file through the pickle module."""
    (tmp_path / "a.pkl").write_bytes(call("os", "system", "touch canary"))
    events = " ".join(watched(tmp_path, UNPICKLE)["a.pkl"][2])
    assert "pickle.find_class" in events
    assert "os.system" in events
    assert (tmp_path / "canary").exists()


def test_values_and_tensors_are_read(tmp_path):
    value = {
        "plain": [1, -5, 2**70, 1.5, "word", b"bytes", None, True, (1, (2, 3)), {4, 5}, OrderedDict(a=1)],
        "numpy": [np.float64(0.25), np.float32(0.5), np.int64(7)],
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "tensors": [torch.arange(6.0).reshape(2, 3).T, torch.zeros(0), torch.tensor([True, False]),
                    torch.tensor([1, 2], dtype=torch.int16), torch.ones(3, dtype=torch.bfloat16)],
    }  # fmt: skip
    for protocol in (2, 3, 4):
        (tmp_path / "v.pkl").write_bytes(pickle.dumps(value, protocol))
        found = pickles.read(tmp_path / "v.pkl")
        assert found["plain"] == [*value["plain"][:-1], {"a": 1}]
        assert found["numpy"] == [0.25, 0.5, 7]
        assert pickles.numbers(found["array"]) == [0, 1, 2, 3, 4, 5]
        for tensor, wanted in zip(found["tensors"], value["tensors"], strict=True):
            assert torch.equal(_torch(tensor), wanted)


@pytest.mark.parametrize("seed", range(5))
def test_flipped_bits_never_crash(tmp_path, seed):
    """Ten flips each: an error of ours, or a network whose numbers alone have changed."""
    sound = pickled.dump({"ema": pickled.preconditioned(pickled.network("ddpm++"), "EDMPrecond")})
    generator = torch.Generator().manual_seed(seed)
    for _ in range(10):
        raw = bytearray(sound)
        place = int(torch.randint(0, len(raw), (), generator=generator))
        raw[place] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
        (tmp_path / "x.pkl").write_bytes(raw)
        with contextlib.suppress(FileError):
            assert pfode.load(tmp_path / "x.pkl").shape == (2, 8, 8)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileError, match=r"nowhere\.pkl': no such file"):
        pfode.load(tmp_path / "nowhere.pkl")
    for suffix in (".pt", ".bin", ".ckpt", ".pth"):
        file = tmp_path / f"weights{suffix}"
        file.write_bytes(zipped())
        with pytest.raises(FileError, match="is a pickle, which can run any code when read: refused"):
            pfode.load(file)


def test_gigabytes_of_zeros_are_refused_before_they_are_read(tmp_path, monkeypatch):
    with open(tmp_path / "net.pkl", "wb") as file:
        file.truncate(10 << 30)
    monkeypatch.setattr(pickles, "read_file", lambda *_: pytest.fail("it was read"))
    with pytest.raises(FileError, match="not a network pickle"):
        pickles.read(tmp_path / "net.pkl")
