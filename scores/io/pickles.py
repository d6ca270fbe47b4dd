"""Pickles of EDM and EDM2 networks, read by a small machine that can build values and nothing else.

The networks of Karras et al. were pickled by `torch_utils.persistence`, which keeps the source code of every class in
the file and executes it when the file is unpickled. Here no pickle module takes part: the opcodes are walked one by
one, a name is a key of the tables below or the end, nothing is imported, and no object of the file is ever called.
Nothing here imports torch.
"""

import io
import math
import os
import pickletools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pfode.errors import FileError
from pfode.fields import shown
from pfode.files import open_regular, read_file
from pfode.header import SIZES

__all__ = ["Refused", "Storage", "Stored", "Tensor", "numbers", "read"]

MAX_BYTES = 1 << 34  # of a file
MAX_BITS = 128  # of an integer: the largest that torch writes has 77
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before its zip files
HINT = "nothing of it was executed; take the weights as .safetensors, or a network pickle of the EDM or EDM2 repository"
_BY_BYTE = {opcode.code.encode("latin1"): opcode for opcode in pickletools.opcodes}
STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
NUMPY = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u1": "B", "b1": "?"}
SCALARS = (str, int, float, bool, bytes, type(None))


class Name(NamedTuple):
    """What a pickle names; never looked up anywhere but in the tables of this module."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Stored:
    """An object of the file: the name of its class and its state."""

    name: str
    state: Any = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Storage:
    """The bytes behind tensors; dtype as safetensors names it."""

    dtype: str
    data: bytearray

    @property
    def numel(self) -> int:
        """How many numbers there are."""
        return len(self.data) // SIZES[self.dtype]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A strided view of a storage that stays within it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it shows."""
        return math.prod(self.shape)


class Refused(Exception):
    """Why a pickle is not taken."""


def read(path: str | os.PathLike[str]) -> Any:
    """The value in a pickle file: plain values, dicts, lists, `Stored` objects and `Tensor`s.

    Raises:
        FileError: it cannot be read, is broken, or asks for anything else, which the message names.
    """
    file = Path(path)
    with open_regular(file) as stream:
        if stream.peek(1)[:1] not in _BY_BYTE:  # zeros, gigabytes of them in a download that was not finished
            raise FileError(f"{file}: not a network pickle: truncated or no pickle (byte 0)", HINT)
    data = read_file(file, MAX_BYTES, "a pickle")
    try:
        stream = io.BytesIO(data)
        value = Machine(stream, GLOBALS, CALLS, CLASSES).run()
        if stream.read(1):
            raise Refused(f"more bytes after its end (byte {stream.tell() - 1})")
        return value
    except Refused as reason:
        raise FileError(f"{file}: not a network pickle: {reason}", HINT) from None


# ---- the machine


class Machine:
    """A stack, a memo and a table of opcodes; `names` are the globals that may be named, `calls` what REDUCE may do,
    `classes` what NEWOBJ may make.

    Values may be shared: a few dozen tuples, each of the one before, twice, are a value of 2^60 parts. So nothing is
    compared, hashed or written out before its type is known, and all calls together may copy no more than `budget`
    parts and bytes.
    """

    def __init__(
        self,
        stream: io.BytesIO,
        names: frozenset[Name],
        calls: "dict[Name, Callable[[tuple[Any, ...]], Any]]",
        classes: frozenset[Name] = frozenset(),
        persistent: "Callable[[Any], Any] | None" = None,
    ):
        self.stream, self.names, self.calls, self.classes = stream, names, calls, classes
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.budget = 1_000_000 + 4 * len(stream.getbuffer())

    def run(self) -> Any:
        """Walk to STOP and give the value on the stack.

        Raises:
            Refused: broken, or something that is not to be done.
        """
        for code, argument, place in self._opcodes():
            if code == "STOP":
                if len(self.stack) != 1 or self.marks:
                    raise Refused(f"broken at byte {place}: it ends with {len(self.stack)} values")
                return self.stack[0]
            try:
                OPCODES[code](self, argument)
            except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
                raise Refused(f"broken at byte {place}: {code}: {type(error).__name__}") from None
        raise Refused("truncated or no pickle")

    def _opcodes(self) -> Iterator[tuple[str, Any, int]]:
        """Name, argument and place of every opcode; the argument of one that no network pickle needs is not read."""
        while code := self.stream.read(1):
            place = self.stream.tell() - 1
            opcode = _BY_BYTE.get(code)
            if opcode is None:
                raise Refused(f"truncated or no pickle (byte {place})")
            if opcode.name != "STOP" and opcode.name not in OPCODES:
                raise Refused(f"it uses the opcode {opcode.name} (byte {place}), which no network pickle needs")
            try:
                if opcode.name == "GLOBAL":
                    argument = self._line(), self._line()
                else:
                    argument = None if opcode.arg is None else opcode.arg.reader(self.stream)
            except (ValueError, IndexError, OverflowError, MemoryError, struct.error) as error:
                raise Refused(f"truncated or no pickle ({str(error)[:100]})") from None
            yield opcode.name, argument, place

    def _line(self) -> str:
        """A name as protocol 2 writes it, up to the end of the line."""
        line = self.stream.readline()
        if not line.endswith(b"\n"):
            raise ValueError("no end of the line")
        return line[:-1].decode("ascii")

    def pop(self) -> Any:
        """The value on top, which must not lie below the last mark."""
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise IndexError
        return self.stack.pop()

    def marked(self) -> list[Any]:
        """All values above the last mark."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def named(self, module: Any, name: Any) -> None:
        """Push a name, if it is one of the table."""
        if type(module) is not str or type(name) is not str:
            raise TypeError
        found = Name(module, name)
        if found not in self.names:
            raise Refused(f"it asks for {str(found)!r:.100}")
        self.stack.append(found)

    def tuple(self, count: int) -> None:
        """Replace the last values by a tuple of them."""
        values = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))

    def append(self, values: list[Any]) -> None:
        """Append values to the list on top."""
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError
        target.extend(values)

    def put(self, values: list[Any]) -> None:
        """Set items of the dict on top."""
        target = self.stack[-1]
        if type(target) is not dict or len(values) % 2:
            raise TypeError
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def add(self, values: list[Any]) -> None:
        """Add values to the set on top."""
        target = self.stack[-1]
        if type(target) is not set:
            raise TypeError
        target.update(map(_key, values))

    def reduce(self) -> None:
        """Call one of the functions of the table with the arguments on top."""
        arguments, function = self.pop(), self.pop()
        if type(function) is not Name or function not in self.calls:
            raise Refused(f"it calls {str(function) if type(function) is Name else type(function).__name__!r:.100}")
        if type(arguments) is not tuple:
            raise TypeError
        self.budget -= sum(len(value) for value in arguments if type(value) in (str, bytes, list, tuple, dict, set))
        if self.budget < 0:
            raise Refused("it copies one value again and again")
        self.stack.append(self.calls[function](arguments))

    def newobj(self) -> None:
        """Make an empty object of one of the classes of the table."""
        arguments, cls = self.pop(), self.pop()
        if type(cls) is not Name or cls not in self.classes or type(arguments) is not tuple or arguments:
            raise Refused(f"it makes a {str(cls) if type(cls) is Name else type(cls).__name__!r:.100}")
        self.stack.append({} if cls in DICTS else Stored(str(cls)))

    def build(self) -> None:
        """Give the object on top its state."""
        state, target = self.pop(), self.stack[-1]
        if type(target) is Stored:
            target.state = state if type(state) is dict else {"state": state, "arguments": target.state}
        elif type(target) is not dict or type(state) not in (dict, type(None)):
            raise TypeError

    def remember(self, index: int) -> None:
        """Keep the value on top under a number, for `BINGET`."""
        self.memo[index] = self.stack[-1]

    def persist(self) -> None:
        """Replace the identifier on top by what it stands for."""
        if self.persistent is None:
            raise Refused("it uses a persistent id")
        self.stack.append(self.persistent(self.pop()))


def _key(key: Any) -> Any:
    if type(key) not in SCALARS:  # hashing nested tuples can take for ever
        raise TypeError
    return key


def _push(machine: Machine, argument: Any) -> None:
    if type(argument) is int and argument.bit_length() > MAX_BITS:
        raise Refused(f"an integer of {argument.bit_length():,} bits")
    machine.stack.append(argument)


def _constant(value: Any) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.stack.append(value)


OPCODES: dict[str, Callable[[Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"), _push),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), _push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _push),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_TUPLE": _constant(()),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_SET": lambda m, _: m.stack.append(set()),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.marked())),
    "TUPLE1": lambda m, _: m.tuple(1),
    "TUPLE2": lambda m, _: m.tuple(2),
    "TUPLE3": lambda m, _: m.tuple(3),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.marked()),
    "SETITEM": lambda m, _: m.put([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.put(m.marked()),
    "ADDITEMS": lambda m, _: m.add(m.marked()),
    "MEMOIZE": lambda m, _: m.remember(len(m.memo)),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, index: m.remember(index)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, index: m.stack.append(m.memo[index])),
    "GLOBAL": lambda m, words: m.named(*words),
    "STACK_GLOBAL": lambda m, _: m.named(*[m.pop(), m.pop()][::-1]),
    "REDUCE": lambda m, _: m.reduce(),
    "NEWOBJ": lambda m, _: m.newobj(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.persist(),
}


# ---- what may be called, each by a function of ours


def _mapping(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    pairs = arguments[0] if arguments else []
    return {_key(key): value for key, value in pairs}


def _set(arguments: tuple[Any, ...]) -> set[Any]:
    return {_key(value) for value in arguments[0]}


def _latin1(arguments: tuple[Any, ...]) -> bytes:
    """Bytes, as protocol 2 writes them."""
    text, encoding = arguments
    if type(text) is not str or type(encoding) is not str or encoding != "latin1":
        raise TypeError
    return text.encode("latin1")


def _object(arguments: tuple[Any, ...]) -> Stored:
    """A class instance of torch_utils.persistence: its name and state are kept, its source code is not looked at."""
    (meta,) = arguments
    if type(meta) is not dict:
        raise TypeError
    name, state = meta["class_name"], meta["state"]
    if type(name) is not str or type(state) not in (dict, type(None)):
        raise TypeError
    return Stored(name, state or {})


def _parameter(arguments: tuple[Any, ...]) -> Tensor:
    if type(arguments[0]) is not Tensor:
        raise TypeError
    return arguments[0]


def _tensor(arguments: tuple[Any, ...]) -> Tensor:
    storage, offset, shape, stride = arguments[:4]
    if type(storage) is not Storage or type(shape) is not tuple or type(stride) is not tuple:
        raise TypeError
    if not _numbers(offset, *shape, *stride) or len(shape) != len(stride) or len(shape) > 8:
        raise Refused(f"a tensor of shape {shown(shape)} and stride {shown(stride)}")
    found = Tensor(storage, offset, shape, stride)
    last = offset + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
    if found.numel > storage.numel or (found.numel and last >= storage.numel):
        raise Refused(f"a tensor of shape {shown(list(shape))} in a storage of {storage.numel} numbers")
    return found


def _numbers(*values: Any) -> bool:
    """Whether all are integers of at least 0 that fit into 63 bits."""
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _storage(arguments: tuple[Any, ...]) -> Storage:
    """The bytes of `torch.save(storage)` before its zip files: five pickles, the number of elements, the elements."""
    (raw,) = arguments
    if type(raw) is not bytes:
        raise TypeError
    stream = io.BytesIO(raw)

    def next_value(persistent: Callable[[Any], Any] | None = None) -> Any:
        return Machine(stream, STORAGE_NAMES, {}, persistent=persistent).run()

    if raw.startswith(b"PK"):
        raise Refused("truncated or no pickle: a storage in a zip archive")
    magic, protocol, system = next_value(), next_value(), next_value()
    if type(magic) is not int or magic != MAGIC or type(protocol) is not int or protocol != PROTOCOL:
        raise Refused("a storage that torch did not write")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("a storage that torch did not write, or not a little-endian one")
    dtype, key, numel = next_value(_persistent_storage)
    keys = next_value()
    if type(keys) is not list or len(keys) != 1 or type(keys[0]) is not str or keys[0] != key:
        raise Refused("a storage that torch did not write")
    head = stream.read(8)
    data = bytearray(stream.read())  # tensors are views of it
    if len(head) != 8 or int.from_bytes(head, "little") != numel or len(data) != numel * SIZES[dtype]:
        raise Refused(f"a storage of {numel} numbers {dtype} that has {len(data)} bytes")
    return Storage(dtype, data)


def _persistent_storage(found: Any) -> tuple[str, str, int]:
    if type(found) is not tuple:
        raise TypeError
    kind, cls, key, _, numel = found[:5]
    if type(kind) is not str or kind != "storage" or type(cls) is not Name or type(key) is not str:
        raise TypeError
    if not _numbers(numel):
        raise Refused("a storage of no number of elements")
    return STORAGES[cls.name], key, numel


def _dtype(arguments: tuple[Any, ...]) -> Stored:
    name = arguments[0]
    if type(name) is not str or name not in NUMPY:
        raise Refused(f"a NumPy array of dtype {shown(name)}")
    return Stored("numpy.dtype", name)


def _scalar(arguments: tuple[Any, ...]) -> Any:
    dtype, raw = arguments
    letter = _numpy_format(dtype)
    if type(raw) is not bytes:
        raise TypeError
    (value,) = struct.unpack("<" + letter, raw)
    return value


def _array(arguments: tuple[Any, ...]) -> Stored:
    return Stored("numpy.ndarray")


def _numpy_format(dtype: Any) -> str:
    """The format letter of a dtype as `_dtype` and BUILD made it."""
    if type(dtype) is not Stored or dtype.name != "numpy.dtype":
        raise TypeError
    state = dtype.state
    if type(state) is dict:
        order, state = state["state"][1], state["arguments"]
        if type(order) is not str or order not in ("<", "|"):
            raise Refused("NumPy numbers that are not little-endian")
    if type(state) is not str:
        raise TypeError
    return NUMPY[state]


def numbers(array: Stored) -> list[float]:
    """The values of a NumPy array of the file, flat.

    Raises:
        Refused: it is none.
    """
    try:
        _, shape, dtype, fortran, raw = array.state["state"]
        letter = _numpy_format(dtype)
        if type(shape) is not tuple or len(shape) > 32 or not _numbers(*shape) or type(raw) is not bytes:
            raise TypeError
        if fortran is not False and len(shape) > 1:
            raise Refused("a NumPy array in Fortran order")
        if len(raw) != math.prod(shape) * struct.calcsize(letter):
            raise ValueError
        return [value for (value,) in struct.iter_unpack("<" + letter, raw)]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, struct.error) as error:
        raise Refused(f"a broken NumPy array ({type(error).__name__})") from None


DICTS = frozenset((Name("collections", "OrderedDict"), Name("dnnlib.util", "EasyDict"), Name("dnnlib", "EasyDict")))
CALLS: dict[Name, Callable[[tuple[Any, ...]], Any]] = {
    **dict.fromkeys(DICTS, _mapping),
    Name("builtins", "set"): _set,
    Name("__builtin__", "set"): _set,
    Name("_codecs", "encode"): _latin1,
    Name("torch_utils.persistence", "_reconstruct_persistent_obj"): _object,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch.storage", "_load_from_bytes"): _storage,
    Name("numpy", "dtype"): _dtype,
    **{Name(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{Name(f"numpy.{core}.multiarray", "_reconstruct"): _array for core in ("core", "_core")},
}
CLASSES = DICTS | {Name("torch.nn.modules.container", name) for name in ("ModuleDict", "ModuleList", "Sequential")}
GLOBALS = frozenset(CALLS) | CLASSES | {Name("numpy", "ndarray")}
STORAGE_NAMES = frozenset(Name("torch", name) for name in STORAGES)
