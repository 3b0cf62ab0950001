"""An unpickler for files of NumPy arrays, such as Paddle's `.pdparams`, that cannot run code.

Python's unpickler calls any function that a file names. This one supports only the instructions for dicts, lists,
tuples, strings, numbers and NumPy arrays (protocols 2 to 4). The few function names that it accepts are mapped to
functions of this module. It rejects everything else. The result is not larger than the file.
"""

import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ocrnet.utils.errors import OcrnetError

PROTOCOLS = (2, 3, 4)
DTYPES = {f"{kind}{size}" for kind, sizes in {"f": "248", "i": "1248", "u": "1248", "b": "1"}.items() for size in sizes}

_NESTING = 100  # levels; Paddle's files have three


class _RejectedError(Exception):
    """The reason why a file is rejected."""


class _Dtype:
    """A ``numpy.dtype`` under construction, before its state is known."""

    def __init__(self, code: str) -> None:
        if code not in DTYPES:
            raise _RejectedError(f"it holds the type '{code[:20]}', but only numbers are supported")
        self.code, self.order = code, "<"

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise _RejectedError("a dtype in it has an invalid state")
        self.order = state[1]

    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """A ``numpy.ndarray`` under construction, before its state is known."""

    array: np.ndarray | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Dtype):
            raise _RejectedError("an array in it has an invalid state")
        _, shape, dtype, fortran, content = state
        self.array = _view(shape, dtype.dtype(), bool(fortran), content)


def read(path: Path) -> Any:
    """Return the content of a pickle: dicts, lists, tuples, strings, numbers, None and arrays.

    Raise OcrnetError if the file holds anything else, or if it is damaged or unreadable.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OcrnetError(f"weights file '{path}' cannot be read: {error.strerror}") from None
    try:
        return _Finisher(len(content)).finish(_Machine(content).run())
    except _RejectedError as rejected:
        raise OcrnetError(
            f"weights file '{path}' is refused: {rejected}; only files of arrays are read, such as a "
            "state dict from paddle.save, and no code in them is run"
        ) from None
    except (struct.error, IndexError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise OcrnetError(
            f"weights file '{path}' is truncated or altered ({type(error).__name__}); use another copy"
        ) from None


class _Machine:
    """The stack machine of the pickle format, limited to the instructions of `CODES`."""

    def __init__(self, content: bytes) -> None:
        self.content, self.position = content, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.remaining = len(content)  # number of bytes that `_encode` may still create

    def run(self) -> Any:
        while (code := self.take(1)) != b".":
            if code not in CODES:
                raise _RejectedError(
                    f"the instruction {code!r} at byte {self.position - 1:,} could run code or is damaged"
                )
            CODES[code](self)
        if len(self.stack) != 1:
            raise _RejectedError("it does not end with one value")
        return self.stack[0]

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.content):
            raise _RejectedError(f"it is truncated: {count:,} bytes are claimed at byte {self.position:,}")
        start, self.position = self.position, end
        return self.content[start:end]

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.content.index(b"\n", self.position)
        text = self.content[self.position : end].decode()
        self.position = end + 1
        return text

    def above_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def last(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise _RejectedError("the pickle in it is damaged: its instructions are inconsistent")
        return self.stack[-1]

    def set_items(self, items: list[Any]) -> None:
        target = self.last(dict)
        if any(not isinstance(name, str | int) for name in items[::2]) or len(items) % 2:
            raise _RejectedError("it contains a dict with a key that is not a string")
        target.update(zip(items[::2], items[1::2], strict=True))

    def push_known(self, module: str, name: str) -> None:
        if (module, name) not in KNOWN:
            raise _RejectedError(
                f"it names {module}.{name}, which is not an array: reading it could run code".replace("\n", " ")
            )
        self.stack.append(KNOWN[module, name])

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not callable(function) or not isinstance(arguments, tuple):
            raise _RejectedError("it calls an object that is not a function")
        self.stack.append(function(self, *arguments))

    def build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Array | _Dtype):
            raise _RejectedError("it sets the state of an object that has none")
        self.stack[-1].build(state)


def _reconstruct(machine: _Machine, kind: Any, shape: Any, typecode: Any) -> _Array:
    if kind is not _ndarray or shape != (0,) or typecode not in (b"b", "b"):
        raise _RejectedError("it creates an array in an unknown way")
    return _Array()


def _ndarray(machine: _Machine, *arguments: Any) -> Any:
    raise _RejectedError("it creates an array in an unknown way")


def _dtype(machine: _Machine, code: Any, align: Any = False, copy: Any = True) -> _Dtype:
    return _Dtype(code if isinstance(code, str) else code.decode("ascii"))


def _scalar(machine: _Machine, dtype: Any, content: Any) -> Any:
    if not isinstance(dtype, _Dtype):
        raise _RejectedError("a number in it has no type")
    return _view((), dtype.dtype(), False, content)[()]


def _encode(machine: _Machine, text: Any, encoding: Any) -> bytes:
    """Return the bytes of a Latin-1 string; pickle protocol 2 has no bytes type and stores them as strings."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise _RejectedError("it encodes an object that is not a string")
    machine.remaining -= len(text)
    if machine.remaining < 0:
        raise _RejectedError("its contents would need more bytes than the file has")
    return text.encode("latin1")


def _tuple(machine: _Machine, items: Any) -> tuple[Any, ...]:
    """Return the tuple ``items``; Paddle writes a tensor outside a plain state dict as a call tuple((name, array))."""
    if not isinstance(items, tuple):
        raise _RejectedError("it creates a tuple in an unknown way")
    return items


def _ordered(machine: _Machine, *arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise _RejectedError("it creates a dict in an unknown way")
    return {}


# The (module, name) pairs that a file may name, each with the function of this module that is called in its place.
KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _ordered,
    **{(module, "tuple"): _tuple for module in ("builtins", "__builtin__")},
}


def _view(shape: Any, dtype: np.dtype, fortran: bool, content: Any) -> np.ndarray:
    """Return bytes as an array without a copy; raise `_RejectedError` if their count does not match shape and dtype."""
    if isinstance(content, str):  # Python 2 stored bytes as strings
        content = content.encode("latin1")
    if not isinstance(content, bytes) or not isinstance(shape, tuple) or len(shape) > 8:
        raise _RejectedError("an array in it has an invalid state")
    possible = all(type(side) is int and 0 <= side <= len(content) for side in shape)
    if not possible or math.prod(shape) * dtype.itemsize != len(content):
        raise _RejectedError(f"an array in it has {len(content):,} bytes, which do not match its shape")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


class _Finisher:
    """A converter that replaces each `_Array` by its array.

    A list may contain itself, or another list many times. Therefore the number of converted values is limited to the
    number of bytes of the file.
    """

    def __init__(self, most: int) -> None:
        self.remaining = most

    def finish(self, value: Any, depth: int = 0) -> Any:
        self.remaining -= 1
        if depth > _NESTING or self.remaining < 0:
            raise _RejectedError("it is nested too deeply")
        if isinstance(value, _Array):
            if value.array is None:
                raise _RejectedError("an array in it has no state")
            return value.array
        if isinstance(value, dict):
            return {key: self.finish(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([self.finish(item, depth + 1) for item in value])
        if value is not None and not isinstance(value, str | bytes | int | float | np.generic):
            raise _RejectedError("it holds an object that is not data")
        return value


def _codes() -> Iterator[tuple[bytes, Callable[[_Machine], Any]]]:
    """Yield the supported instructions as pairs of a byte and the function that executes it."""

    def push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
        return lambda machine: machine.stack.append(make(machine))

    def sized(form: str, make: Callable[[bytes], Any]) -> Callable[[_Machine], None]:
        return push(lambda machine: make(machine.take(machine.number(form))))

    def memoize(position: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
        return lambda machine: machine.memo.__setitem__(position(machine), machine.stack[-1])

    def last(count: int) -> Callable[[_Machine], None]:
        def make(machine: _Machine) -> None:
            items = tuple(machine.stack[-count:])
            if len(items) != count:
                raise _RejectedError("the pickle in it is damaged: its instructions are inconsistent")
            machine.stack[-count:] = [items]

        return make

    def text(content: bytes) -> str:
        return content.decode("utf-8", "surrogatepass")

    def integer(content: bytes) -> int:
        return int.from_bytes(content, "little", signed=True)

    def protocol(machine: _Machine) -> None:
        if (number := machine.number("B")) not in PROTOCOLS:
            raise _RejectedError(f"it has pickle protocol {number}; save it again with protocol 4")

    def stack_global(machine: _Machine) -> None:
        name, module = machine.stack.pop(), machine.stack.pop()
        machine.push_known(str(module)[:200], str(name)[:200])

    yield b"\x80", protocol
    yield b"\x95", lambda machine: machine.number("Q")  # the length of a frame, which is needed only to prefetch
    yield b"(", lambda machine: machine.marks.append(len(machine.stack))
    yield b"}", push(lambda machine: {})
    yield b"]", push(lambda machine: [])
    yield b")", push(lambda machine: ())
    yield b"N", push(lambda machine: None)
    yield b"\x88", push(lambda machine: True)
    yield b"\x89", push(lambda machine: False)
    for code, form in {b"J": "i", b"K": "B", b"M": "H"}.items():
        yield code, push(lambda machine, form=form: machine.number(form))  # type: ignore[misc]
    yield b"G", push(lambda machine: struct.unpack(">d", machine.take(8))[0])
    for code, form in {b"\x8a": "B", b"\x8b": "I"}.items():
        yield code, sized(form, integer)
    for code, form in {b"X": "I", b"\x8c": "B", b"\x8d": "Q"}.items():
        yield code, sized(form, text)
    for code, form in {b"B": "I", b"C": "B", b"\x8e": "Q"}.items():
        yield code, sized(form, bytes)
    for code, form in {b"T": "I", b"U": "B"}.items():
        yield code, sized(form, lambda content: content.decode("latin1"))
    for code, count in {b"\x85": 1, b"\x86": 2, b"\x87": 3}.items():
        yield code, last(count)
    yield b"t", push(lambda machine: tuple(machine.above_mark()))
    yield b"a", lambda machine: (item := machine.stack.pop(), machine.last(list).append(item))
    yield b"e", lambda machine: (items := machine.above_mark(), machine.last(list).extend(items))
    yield b"s", lambda machine: machine.set_items([machine.stack.pop(-2), machine.stack.pop()])
    yield b"u", lambda machine: machine.set_items(machine.above_mark())
    yield b"q", memoize(lambda machine: machine.number("B"))
    yield b"r", memoize(lambda machine: machine.number("I"))
    yield b"\x94", memoize(lambda machine: len(machine.memo))
    yield b"h", push(lambda machine: machine.memo[machine.number("B")])
    yield b"j", push(lambda machine: machine.memo[machine.number("I")])
    yield b"c", lambda machine: machine.push_known(machine.line(), machine.line())
    yield b"\x93", stack_global
    yield b"R", lambda machine: machine.call()
    yield b"b", lambda machine: machine.build()


CODES = dict(_codes())
