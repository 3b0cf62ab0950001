"""MindSpore's `.ckpt` files, read and written without MindSpore.

The file is one protobuf message, ``Checkpoint`` of MindSpore's ``checkpoint.proto``: nothing but records of field 1
(``Value``: a tag and a tensor) one after another, in which neighbours of one tag are slices of one tensor. It is taken
record by record, so that one tensor at a time is held twice and a file may be larger than a protobuf message. After the
last record there may be a CRC-32 of all before it.
"""

import itertools
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint

DTYPES = {
    "Bool": "?",
    **{f"{sign}Int{8 * size}": f"<{sign.lower() or 'i'}{size}" for size in (1, 2, 4, 8) for sign in ("", "U")},
    **{f"Float{8 * size}": f"<f{size}" for size in (2, 4, 8)},
}
SLICE = 512 * 2**20  # bytes; MindSpore cuts a larger tensor, too

_TYPES = {np.dtype(code): name for name, code in DTYPES.items()}
_RECORD = b"\n"  # field 1, length-delimited
_CRC, _CRC_BYTES = b"crc_num", 10
_ENCRYPTED = tuple(number.to_bytes(4, "little") for number in (0x7F3A5ED8, 0x7F3A5ED9, 0x7F3A5EDA))


class _Slice(NamedTuple):
    """A record: a tensor, or one of its slices, whose ``dims`` are those of the whole."""

    tag: str
    kind: str
    dims: tuple[int, ...]
    content: bytes


def looks_like(head: bytes) -> bool:
    """Say whether a file's first bytes may be those of a `.ckpt`, plain or encrypted."""
    return head.startswith((_RECORD, *_ENCRYPTED))


def read(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file by tag, in its order; bfloat16 becomes float32, a text an array of one string.

    OcrnetError names the file where it is damaged, encrypted, no such file, or holds what is no tensor. A file cut
    between two tensors is whole for all that can be seen here: the caller knows which names there must be.
    """
    tensors: dict[str, np.ndarray] = {}
    for tag, slices in itertools.groupby(_slices(path), key=lambda one: one.tag):
        if tag in tensors:
            raise _damaged(path, f"'{tag}' is in it twice")
        tensors[tag] = _array(path, list(slices))
    return tensors


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a file that ``mindspore.load_checkpoint`` reads, as safely as a checkpoint; makes the folder if need be.

    ValueError for a dtype that the format lacks, and for an array without elements, which MindSpore cannot read.
    """
    for name, array in tensors.items():
        if array.dtype.newbyteorder("=") not in _TYPES or not array.size:
            raise ValueError(f"'{name}' {array.dtype} {array.shape} cannot be in a .ckpt file")
    checkpoint.replace(path, (record for name, array in tensors.items() for record in _records(name, array)))


def _records(name: str, array: np.ndarray) -> Iterator[bytes]:
    """Yield one tensor as records, ready to be written."""
    dtype = array.dtype.newbyteorder("=")
    content = np.asarray(array, np.dtype(DTYPES[_TYPES[dtype]]), "C").tobytes()
    for begin in range(0, len(content), SLICE):
        tensor = {
            "dims": array.shape,
            "tensor_type": _TYPES[dtype].encode(),
            "tensor_content": content[begin : begin + SLICE],
        }
        yield _CHECKPOINT(value=[{"tag": name.encode(), "tensor": tensor}]).SerializeToString()


def _slices(path: Path) -> Iterator[_Slice]:
    """Yield the records of a file; whatever is not a whole record, or a right CRC at the end, is an error."""
    try:
        with path.open("rb") as file:
            size, crc = os.fstat(file.fileno()).st_size, 0
            _check_beginning(path, file.peek(4)[:4])
            while (start := file.tell()) < size:
                if (first := file.read(1)) != _RECORD:
                    return _check_crc(path, first + file.read(), crc)
                raw = _length(path, file)
                length = sum((byte & 127) << 7 * place for place, byte in enumerate(raw))
                body = file.read(length) if length <= size - file.tell() else b""
                if len(body) != length:
                    raise _damaged(path, f"the record at byte {start:,} claims {length:,} bytes and is cut short")
                yield _slice(path, start, body)
                crc = zlib.crc32(body, zlib.crc32(_RECORD + raw, crc))
    except OSError as error:
        raise OcrnetError(f"cannot read {path}: {error.strerror}") from error


def _check_beginning(path: Path, head: bytes) -> None:
    if head in _ENCRYPTED:
        raise OcrnetError(f"{path} is an encrypted MindSpore checkpoint; save it again without enc_key")
    if not head.startswith(_RECORD):
        raise OcrnetError(
            f"{path} is {'empty' if not head else 'no MindSpore checkpoint, or its beginning is altered'}; "
            "give another file"
        )


def _length(path: Path, file: BinaryIO) -> bytes:
    """Read the bytes of a protobuf length: seven bits each, lowest first, the last one below 128."""
    raw = b""
    while len(raw) < 10:
        byte = file.read(1)
        if not byte:
            raise _damaged(path, "it ends within the length of a record")
        raw += byte
        if byte[0] < 128:
            return raw
    raise _damaged(path, "the length of a record is no number")


def _check_crc(path: Path, tail: bytes, crc: int) -> None:
    if not tail.startswith(_CRC) or len(tail) != len(_CRC) + _CRC_BYTES:
        raise _damaged(path, "something that is no tensor follows the tensors")
    if int.from_bytes(tail[len(_CRC) :], "big") != crc:
        raise _damaged(path, "it does not have the CRC-32 that it was saved with")


def _slice(path: Path, start: int, body: bytes) -> _Slice:
    """Parse one record."""
    value = _VALUE()
    try:
        value.ParseFromString(body)
        tensor = value.tensor
        one = _Slice(value.tag.decode(), tensor.tensor_type.decode(), tuple(tensor.dims), tensor.tensor_content)
    except (message.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, f"the record at byte {start:,} does not parse: {error}") from error
    if not (value.IsInitialized() and value.HasField("tensor") and one.tag):
        raise _damaged(path, f"the record at byte {start:,} is no named tensor")
    return one


def _array(path: Path, slices: list[_Slice]) -> np.ndarray:
    """Put the slices of a tensor together; their bytes must be just as many as its shape has elements."""
    tag, kind, dims, content = slices[0]
    if any((one.kind, one.dims) != (kind, dims) for one in slices):
        raise _damaged(path, f"the slices of '{tag}' have different shapes or types")
    if len(slices) > 1:
        content = b"".join(one.content for one in slices)
    if kind == "str":
        return np.array(_text(path, tag, content))
    if kind not in (*DTYPES, "BFloat16"):
        raise OcrnetError(f"{path}: '{tag}' is {kind}, which this version does not read")
    dtype = np.dtype(DTYPES.get(kind, "<u2"))
    shape = () if dims == (0,) else dims  # early versions write 0 dimensions so
    if min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != len(content):
        raise _damaged(path, f"'{tag}' {kind} {shape} has {len(content):,} bytes")
    array = np.frombuffer(content, dtype).reshape(shape)
    return (array.astype("<u4") << 16).view("<f4") if kind == "BFloat16" else array.copy()


def _text(path: Path, tag: str, content: bytes) -> str:
    try:
        return content.decode("utf-32-le")
    except UnicodeDecodeError as error:
        raise _damaged(path, f"the text of '{tag}' does not decode") from error


def _damaged(path: Path, why: str) -> OcrnetError:
    return OcrnetError(f"{path} is truncated or altered: {why}; use another file")


def _classes() -> tuple[Any, Any]:
    """Make the message classes Checkpoint and Checkpoint.Value.

    They have a pool of their own: MindSpore, imported into the same process, has these names in the default one. Texts
    are bytes, which are the same on disk: protobuf does not check that a text of this old syntax is UTF-8.
    """
    field = descriptor_pb2.FieldDescriptorProto
    optional, required, repeated = field.LABEL_OPTIONAL, field.LABEL_REQUIRED, field.LABEL_REPEATED
    file = descriptor_pb2.FileDescriptorProto(name="checkpoint.proto", package="ocrnet", syntax="proto2")
    outer = file.message_type.add(name="Checkpoint")
    outer.field.add(name="value", number=1, label=repeated, type=field.TYPE_MESSAGE, type_name=".ocrnet.Value")
    value = file.message_type.add(name="Value")
    value.field.add(name="tag", number=1, label=required, type=field.TYPE_BYTES)
    value.field.add(name="tensor", number=2, label=optional, type=field.TYPE_MESSAGE, type_name=".ocrnet.Tensor")
    tensor = file.message_type.add(name="Tensor")
    tensor.field.add(name="dims", number=1, label=repeated, type=field.TYPE_INT64)
    tensor.field.add(name="tensor_type", number=2, label=required, type=field.TYPE_BYTES)
    tensor.field.add(name="tensor_content", number=3, label=required, type=field.TYPE_BYTES)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    made = (pool.FindMessageTypeByName(f"ocrnet.{name}") for name in ("Checkpoint", "Value"))
    outer_class, value_class = (message_factory.GetMessageClass(found) for found in made)
    return outer_class, value_class


_CHECKPOINT, _VALUE = _classes()
