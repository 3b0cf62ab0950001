"""Reading and writing MindSpore's `.ckpt` files without MindSpore.

A file is one protobuf message, ``Checkpoint`` of MindSpore's ``checkpoint.proto``. It is a sequence of records of field
1 (``Value``: a tag, which is the tensor's name, and a tensor). Consecutive records with the same tag are slices of one
tensor. A CRC-32 of all records may follow the last record.

The file is read record by record. Therefore it may exceed the size limit of a protobuf message, and only one tensor at
a time is in memory twice.
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
SLICE = 512 * 2**20  # bytes; MindSpore also splits larger tensors

_TYPES = {np.dtype(code): name for name, code in DTYPES.items()}
_RECORD = b"\n"  # field 1, length-delimited
_CRC, _CRC_BYTES = b"crc_num", 10
_ENCRYPTED = tuple(number.to_bytes(4, "little") for number in (0x7F3A5ED8, 0x7F3A5ED9, 0x7F3A5EDA))


class _Slice(NamedTuple):
    """A record: a tensor or a slice of it; ``kind`` is its dtype in MindSpore, ``dims`` the whole tensor's shape."""

    tag: str
    kind: str
    dims: tuple[int, ...]
    content: bytes


def is_ckpt_start(head: bytes) -> bool:
    """Return whether a file that begins with these bytes can be a `.ckpt` file, encrypted or not."""
    return head.startswith((_RECORD, *_ENCRYPTED))


def read(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file by tag, in file order; bfloat16 becomes float32, and a text an array of one string.

    Raise OcrnetError, which names the file, if it is damaged, encrypted or not a `.ckpt`, or if it holds an unsupported
    entry. A file without CRC-32 that is truncated between two tensors cannot be detected here; the caller must check
    that all names are present.
    """
    tensors: dict[str, np.ndarray] = {}
    for tag, slices in itertools.groupby(_slices(path), key=lambda part: part.tag):
        if tag in tensors:
            raise _damaged(path, f"'{tag}' occurs twice")
        tensors[tag] = _array(path, list(slices))
    return tensors


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a file for ``mindspore.load_checkpoint`` atomically, and create its folder if needed.

    Raise ValueError for a dtype that the format does not support, and for an empty array, which MindSpore cannot read.
    """
    for name, array in tensors.items():
        if array.dtype.newbyteorder("=") not in _TYPES or not array.size:
            raise ValueError(f"'{name}' {array.dtype} {array.shape} cannot be stored in a .ckpt file")
    checkpoint.replace(path, (record for name, array in tensors.items() for record in _records(name, array)))


def _records(name: str, array: np.ndarray) -> Iterator[bytes]:
    """Yield the serialized records of one tensor."""
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
    """Yield the records of a file; raise OcrnetError for an incomplete record, unknown content or a wrong CRC."""
    try:
        with path.open("rb") as file:
            size, crc, start = os.fstat(file.fileno()).st_size, 0, 0
            _check_beginning(path, file.peek(4)[:4])
            while start < size:
                if (first := file.read(1)) != _RECORD:
                    return _check_crc(path, first + file.read(), crc)
                raw = _length(path, file)
                length = sum((byte & 127) << 7 * place for place, byte in enumerate(raw))
                body = file.read(length) if length <= size - start - 1 - len(raw) else b""
                if len(body) != length:
                    raise _damaged(path, f"the record at byte {start:,} claims {length:,} bytes and is truncated")
                yield _slice(path, start, body)
                crc = zlib.crc32(body, zlib.crc32(_RECORD + raw, crc))
                start += 1 + len(raw) + len(body)
    except OSError as error:
        raise OcrnetError(f"cannot read {path}: {error.strerror}") from error


def _check_beginning(path: Path, head: bytes) -> None:
    if head in _ENCRYPTED:
        raise OcrnetError(f"{path} is an encrypted MindSpore checkpoint; save it again without enc_key")
    if not head.startswith(_RECORD):
        raise OcrnetError(
            f"{path} is {'empty' if not head else 'not a MindSpore checkpoint, or its first bytes are damaged'}; "
            "give another file"
        )


def _length(path: Path, file: BinaryIO) -> bytes:
    """Return the bytes of a protobuf length (varint): seven bits per byte, lowest first; the last byte is below 128."""
    raw = b""
    while len(raw) < 10:
        byte = file.read(1)
        if not byte:
            raise _damaged(path, "it ends within the length of a record")
        raw += byte
        if byte[0] < 128:
            return raw
    raise _damaged(path, "the length of a record is not a valid number")


def _check_crc(path: Path, tail: bytes, crc: int) -> None:
    """Raise OcrnetError unless ``tail``, the bytes after the last record, is the CRC-32 entry with value ``crc``."""
    if not tail.startswith(_CRC) or len(tail) != len(_CRC) + _CRC_BYTES:
        raise _damaged(path, "unexpected data follows the tensors")
    if int.from_bytes(tail[len(_CRC) :], "big") != crc:
        raise _damaged(path, "its CRC-32 does not match")


def _slice(path: Path, start: int, body: bytes) -> _Slice:
    """Parse one record."""
    value = _VALUE()
    try:
        value.ParseFromString(body)
        tensor = value.tensor
        record = _Slice(value.tag.decode(), tensor.tensor_type.decode(), tuple(tensor.dims), tensor.tensor_content)
    except (message.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, f"the record at byte {start:,} does not parse: {error}") from error
    if not (value.IsInitialized() and value.HasField("tensor") and record.tag):
        raise _damaged(path, f"the record at byte {start:,} is not a named tensor")
    return record


def _array(path: Path, slices: list[_Slice]) -> np.ndarray:
    """Return the array of a tensor's slices; raise OcrnetError if the bytes do not match shape and dtype."""
    tag, kind, dims, content = slices[0]
    if any((part.kind, part.dims) != (kind, dims) for part in slices):
        raise _damaged(path, f"the slices of '{tag}' have different shapes or types")
    if len(slices) > 1:
        content = b"".join(part.content for part in slices)
    if kind == "str":
        return np.array(_text(path, tag, content))
    if kind not in (*DTYPES, "BFloat16"):
        raise OcrnetError(f"{path}: '{tag}' is {kind}, which this version cannot read")
    dtype = np.dtype(DTYPES.get(kind, "<u2"))
    shape = () if dims == (0,) else dims  # early versions write a scalar's shape as (0,)
    if min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != len(content):
        raise _damaged(path, f"'{tag}' {kind} {shape} has {len(content):,} bytes")
    array = np.frombuffer(content, dtype).reshape(shape)
    return (array.astype("<u4") << 16).view("<f4") if kind == "BFloat16" else array.copy()


def _text(path: Path, tag: str, content: bytes) -> str:
    try:
        return content.decode("utf-32-le")
    except UnicodeDecodeError as error:
        raise _damaged(path, f"the text of '{tag}' does not decode") from error


def _damaged(path: Path, reason: str) -> OcrnetError:
    return OcrnetError(f"{path} is truncated or altered: {reason}; use another file")


def _classes() -> tuple[Any, Any]:
    """Return the protobuf message classes Checkpoint and Checkpoint.Value.

    They are in a separate descriptor pool, because MindSpore registers the same names in the default pool. String
    fields are declared as bytes, which have the same encoding, because protobuf does not validate the UTF-8 of a proto2
    string.
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
    descriptors = (pool.FindMessageTypeByName(f"ocrnet.{name}") for name in ("Checkpoint", "Value"))
    outer_class, value_class = (message_factory.GetMessageClass(descriptor) for descriptor in descriptors)
    return outer_class, value_class


_CHECKPOINT, _VALUE = _classes()
