"""Checkpoints: safetensors files that hold named arrays and, in the header, one JSON document.

A file is written under a temporary name and then renamed. Therefore a crash leaves the old file unchanged or, if there
was none, no file. ``load`` accepts a file only if its checksums match. Pickle is never used.

The JSON document is the only metadata value of the header (key ``ocrnet``). It holds the caller's values and three
members that this module adds, ``format``, ``sha256`` and, always last, ``meta_sha256``:

* ``sha256`` is the hash of all arrays. For each name in sorted order it covers the line ``["name","dtype",[shape]]``
  (JSON without spaces, NumPy's dtype name, ending with a newline) and the bytes of the array, little-endian in C order.
  It does not depend on the layout of the file.
* ``meta_sha256`` is the hash of the document's text without this member.
"""

import contextlib
import difflib
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ocrnet.utils.errors import OcrnetError

logger = logging.getLogger(__name__)

FORMAT = 1

# Suffixes of weights files, both ours and those of other implementations.
WEIGHTS = (".safetensors", ".ckpt", ".pth", ".pdparams")

_KEY = "ocrnet"
_TEMPORARY = ".ocrnet-tmp"
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_NAME = re.compile(r"OCRNet_hrnet_seg_w\d+_(\d+)_rank0\.safetensors")
_SEAL = re.compile(r'(\{.*), "meta_sha256": "([0-9a-f]{64})"\}', re.DOTALL)
_INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
_DTYPES = ("bool", *_INTEGERS, "float16", "float32", "float64")

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A loaded checkpoint: the path of its file, its arrays by canonical name, and its JSON document."""

    path: Path
    tensors: dict[str, np.ndarray]
    meta: dict[str, Any]


@dataclass(frozen=True, eq=False)
class NewestCheckpoint:
    """The newest valid checkpoint of a folder, if any, and the newer ones that failed to load, each with the reason."""

    checkpoint: Checkpoint | None
    skipped: tuple[tuple[Path, str], ...]


def save(path: AnyPath, tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write a checkpoint atomically, and create its folder if needed.

    A ``.ckpt`` file of the same name would hold the weights of an older checkpoint. Therefore it is removed first.

    Args:
        path: The file; readers never see it incomplete.
        tensors: The arrays by canonical name.
        meta: The members of the JSON document; ``format``, ``sha256`` and ``meta_sha256`` are added.

    Raises:
        OcrnetError: The write failed; an existing file is unchanged.
        ValueError: A dtype is not supported by safetensors, or a value is not valid in strict JSON (such as nan).
    """
    path = Path(path)
    data = pack(tensors, meta)
    with _wrap_os_error(path):
        if path.suffix == ".safetensors":
            path.with_suffix(".ckpt").unlink(missing_ok=True)
    replace(path, [data])


def pack(tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> bytes:
    """Return the bytes of a checkpoint file; raise ValueError as `save` does."""
    for name, tensor in tensors.items():
        if tensor.dtype.name not in _DTYPES:
            raise ValueError(f"tensor '{name}' is {tensor.dtype}; a checkpoint holds {', '.join(_DTYPES)}")
    little_endian = {name: _to_little_endian(tensor) for name, tensor in tensors.items()}
    return safetensors.numpy.save(little_endian, metadata={_KEY: build_document(little_endian, meta)})


def replace(path: Path, parts: Iterable[bytes | memoryview], *, flag: str = "save_dir") -> None:
    """Write a file atomically, and create its folder if needed.

    Args:
        path: The file.
        parts: Its content, in pieces.
        flag: The key or flag that sets the location; the error message names it.

    Raises:
        OcrnetError: The write failed; an existing file is unchanged.
    """
    with _wrap_os_error(path, flag):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, parts)
        _sync_folder(path.parent)


@contextlib.contextmanager
def _wrap_os_error(path: Path, flag: str = "save_dir") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        target = f"checkpoint {path}" if flag == "save_dir" else str(path)
        raise OcrnetError(
            f"cannot write {target}: {error.strerror}; free some space there or choose another {flag}"
        ) from error


def load(path: AnyPath) -> Checkpoint:
    """Read a checkpoint and verify its checksums; raise OcrnetError if it is missing, unreadable or damaged."""
    path = Path(path)
    while True:
        version = _version(path)
        try:
            meta = read_meta(path)
            tensors = arrays(path)
            verify(path, tensors, meta)
            return Checkpoint(path, tensors, meta)
        except OcrnetError:
            if _version(path) == version:
                raise
            # A run replaced the file between two reads, as it does with its best checkpoint: read the new file.


def _version(path: Path) -> tuple[int, int, int] | None:
    """Return inode, size and modification time, which differ if the file is replaced; None if it is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of any safetensors file by name; checksums are not verified.

    Raise OcrnetError if the file is damaged, or if NumPy does not support a dtype.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error
    except (TypeError, AttributeError) as error:  # NumPy does not support the dtype
        raise OcrnetError(
            f"{path} holds a dtype that NumPy does not support ({error}); save it as float32 or float16"
        ) from error


def is_ours(path: Path) -> bool:
    """Return whether a file is a checkpoint of this project; raise OcrnetError if it is not a safetensors file."""
    stored = _read_header(path).get("__metadata__")
    return isinstance(stored, dict) and _KEY in stored


def verify(path: Path, tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Verify the checksum of a checkpoint's tensors.

    Args:
        path: The file, for the error message.
        tensors: The arrays by canonical name.
        meta: The JSON document of the file.

    Raises:
        OcrnetError: The tensors do not match the ``sha256`` of the document.
    """
    # mutation: verify-checkpoint-digest
    if _digest(tensors) != meta["sha256"]:
        raise _damaged(path, "the sha256 of its tensors does not match")


def read_meta(path: AnyPath) -> dict[str, Any]:
    """Return the JSON document of a checkpoint; verify it, but do not read the tensors.

    Raise OcrnetError if the file is not a checkpoint of this project, or if it is damaged.
    """
    path = Path(path)
    header = _read_header(path)
    stored = header.get("__metadata__")
    text = stored.get(_KEY) if isinstance(stored, dict) else None
    if not isinstance(text, str):
        raise OcrnetError(
            f"{path} is a safetensors file, but not an ocrnet checkpoint: its metadata has no '{_KEY}' entry; "
            "convert weights of other implementations with ocrnet convert"
        )
    return parse_document(path, text)


def build_document(tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> str:
    """Return the text of the JSON document, with format and checksums.

    Raise ValueError if a value of ``meta`` is not valid in strict JSON.
    """
    return _seal({**meta, "format": FORMAT, "sha256": _digest(tensors)})


def parse_document(path: Path, text: str) -> dict[str, Any]:
    """Verify the text of a JSON document and return its members without ``meta_sha256``.

    Raise OcrnetError, which names ``path``, if the checksum does not match or the format is not supported.
    """
    sealed = _SEAL.fullmatch(text)
    if not sealed or _text_digest(sealed[1] + "}") != sealed[2]:
        raise _damaged(path, "the sha256 of its metadata does not match")
    meta = json.loads(sealed[1] + "}")
    if meta["format"] != FORMAT:
        raise OcrnetError(
            f"{path} has checkpoint format {meta['format']}, this version reads format {FORMAT}; update ocrnet"
        )
    return meta


def file_name(width: int, tag: int | str) -> str:
    """Return the file name of a checkpoint of an HRNet width; ``tag`` is the step or a word such as ``best``."""
    return f"OCRNet_hrnet_seg_w{width}_{tag}_rank0.safetensors"


def step_of(path: AnyPath) -> int | None:
    """Return the step in the file name of a numbered checkpoint, or None for any other file name."""
    match = _NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def steps(folder: AnyPath) -> list[Path]:
    """Return the numbered checkpoints of a folder, sorted by step; empty if the folder does not exist."""
    numbered = [(step, path) for path in Path(folder).glob("*.safetensors") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(numbered)]


def newest_valid(folder: AnyPath) -> NewestCheckpoint:
    """Load the newest valid numbered checkpoint of a folder; skip newer ones that are damaged."""
    skipped: list[tuple[Path, str]] = []
    # mutation: skip-damaged-checkpoints
    for path in reversed(steps(folder)):
        try:
            return NewestCheckpoint(load(path), tuple(skipped))
        except OcrnetError as error:
            skipped.append((path, str(error)))
    return NewestCheckpoint(None, tuple(skipped))


def prune(folder: AnyPath, keep: int, protected: Collection[Path] = ()) -> list[Path]:
    """Remove old numbered checkpoints, and the ``.ckpt`` files of the same names.

    The best checkpoint is kept, because its name has no number.

    Args:
        folder: The folder of the checkpoints.
        keep: The number of newest checkpoints to keep; 0 keeps all.
        protected: Older checkpoints that must not be removed.

    Returns:
        The removed files.
    """
    assert keep >= 0, f"keep is {keep}"
    old = [path for path in steps(folder)[:-keep] if path not in protected] if keep else []
    removed = [file for path in old for file in (path, path.with_suffix(".ckpt")) if file.exists()]
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


def clean(folder: AnyPath) -> list[Path]:
    """Remove the temporary files that a killed ``save`` left in a folder, and return their paths.

    Call it only while no process saves to the folder.
    """
    removed = sorted(Path(folder).glob(f".*{_TEMPORARY}"))
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


def resolve(path: AnyPath) -> Path:
    """Return the weights file for a path; log it if it is not the path itself.

    A folder gives its newest valid checkpoint or, if it has none, that of its ``checkpoint`` subfolder. For a missing
    ``X.ckpt``, ``X.safetensors`` of the same folder is used. A path of a file is returned without reading the file.
    Raise OcrnetError if there is no such file.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        return _resolve_folder(path)
    safetensors_path = path.with_suffix(".safetensors")
    if path.suffix == ".ckpt" and safetensors_path.is_file():
        logger.info(f"{path} does not exist: {safetensors_path.name} in the same folder is used instead")
        return safetensors_path
    if not path.parent.is_dir():
        raise OcrnetError(f"checkpoint {path} does not exist, nor does its folder; check the path")
    names = [name for name in _names(path.parent) if Path(name).suffix in WEIGHTS]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4) or names
    raise OcrnetError(
        f"checkpoint {path} does not exist; its folder contains {_format_names(close or ['no checkpoint'])}"
    )


def resolve_state(path: AnyPath) -> Path:
    """Return the file from which a run can resume; log it if it is not the path itself.

    A ``.ckpt`` file holds only weights, so the safetensors file of the same name in its folder is used. Raise
    OcrnetError if that does not exist.
    """
    resolved = resolve(path)
    if resolved.suffix != ".ckpt":
        return resolved
    safetensors_path = resolved.with_suffix(".safetensors")
    if not safetensors_path.is_file():
        raise OcrnetError(
            f"{resolved} holds only weights, and resuming also needs the momentum, step and losses: those are in "
            f"{safetensors_path.name}, which is missing; give a .safetensors checkpoint, or the run's folder"
        )
    logger.info(f"{resolved} holds only weights: {safetensors_path.name} in the same folder is used instead")
    return safetensors_path


def _resolve_folder(folder: Path) -> Path:
    """Return the newest valid checkpoint of a folder or its ``checkpoint`` subfolder."""
    skipped: list[tuple[Path, str]] = []
    for place in (folder, folder / "checkpoint"):
        newest = newest_valid(place)
        skipped += newest.skipped
        if newest.checkpoint:
            for _, reason in skipped:
                logger.warning(f"skipped: {reason}")
            logger.info(f"{folder} is a folder; its newest valid checkpoint {newest.checkpoint.path} is used")
            return newest.checkpoint.path
    entries = _names(folder) + [f"checkpoint/{name}" for name in _names(folder / "checkpoint")]
    reasons = "".join(f"; {reason}" for _, reason in skipped)
    raise OcrnetError(
        f"folder {folder} has no valid numbered checkpoint{reasons}; it contains {_format_names(entries)}"
    )


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _format_names(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing"


def _to_little_endian(tensor: np.ndarray) -> np.ndarray:
    """Return the array in little-endian byte order and C order, with its shape.

    ``np.ascontiguousarray`` is not used, because it adds an axis to a scalar array.
    """
    return np.asarray(tensor, dtype=tensor.dtype.newbyteorder("<"), order="C")


def _digest(tensors: dict[str, np.ndarray]) -> str:
    """Return the ``sha256`` of the arrays, as the module docstring defines it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = _to_little_endian(tensors[name])
        line = json.dumps([name, array.dtype.name, list(array.shape)], separators=(",", ":"))
        digest.update(f"{line}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _seal(meta: dict[str, Any]) -> str:
    """Return ``meta`` as JSON with ``meta_sha256`` appended; raise ValueError if a value is not strict JSON."""
    for key, value in meta.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"checkpoint meta '{key}' is not strict JSON: {error}") from error
    text = json.dumps(meta, allow_nan=False)
    return f'{text[:-1]}, "meta_sha256": "{_text_digest(text)}"}}'


def _text_digest(text: str) -> str:
    # surrogatepass, because a damaged escape sequence can be a lone surrogate, which UTF-8 does not allow.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _read_header(path: Path) -> dict[str, Any]:
    """Read the JSON header; the safetensors package validates its structure."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if file.read(1) not in (b"{", b""):
                raise OcrnetError(f"{path} is not a safetensors file, or its first bytes are damaged")
            if size < 10 or length > min(size - 8, _MAX_HEADER):
                raise _damaged(path, f"its header claims {length:,} bytes, the file has {size:,}")
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise OcrnetError(f"cannot read checkpoint {path}: {error.strerror}") from error
    try:
        header = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict) or not text.rstrip(b" ").endswith(b"}"):
        raise _damaged(path, "its header is not one JSON object padded with spaces")
    return header


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a temporary file, sync it to disk and rename it to ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        # mutation: rename-checkpoint-when-complete
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that renames in it survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Network and FUSE file systems may not support this. The file itself is already synced and renamed.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def _damaged(path: Path, reason: str) -> OcrnetError:
    return OcrnetError(f"{path} is truncated or altered: {reason}; use an earlier checkpoint")
