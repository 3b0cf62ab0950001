"""Checkpoints: one safetensors file of named arrays with one JSON document in its header.

A file is written under a temporary name and renamed, so that a crash leaves the old file or none under the final
name. ``load`` accepts a file only if its checksums match. Pickle is never used.

The JSON document is the header's only metadata value (key ``ocrnet``). It holds the caller's values and ``format``,
``sha256`` and ``meta_sha256``, which is always its last member:

* ``sha256`` covers, for each name in sorted order, the line ``["name","dtype",[shape]]`` (JSON without blanks, NumPy's
  dtype name, a newline at its end) and the array's bytes, little-endian, in C order. It does not depend on the layout
  of the file.
* ``meta_sha256`` covers the document's text without that last member.
"""

import contextlib
import difflib
import errno
import hashlib
import json
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

FORMAT = 1

# Suffixes of files of weights, ours and those of other implementations.
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
    """A loaded checkpoint: its file, its arrays by canonical name, and its JSON document."""

    path: Path
    tensors: dict[str, np.ndarray]
    meta: dict[str, Any]


@dataclass(frozen=True, eq=False)
class NewestCheckpoint:
    """The newest checkpoint that loads, if any, and the newer ones that failed to load, each with the reason."""

    checkpoint: Checkpoint | None
    passed_over: tuple[tuple[Path, str], ...]


def save(path: AnyPath, tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write a checkpoint atomically, and create its folder if needed.

    A ``.ckpt`` of the same name holds the weights of an older checkpoint. It is removed first, so that the two never
    disagree.

    Args:
        path: The file; it is never incomplete.
        tensors: The arrays by canonical name.
        meta: The members of the JSON document; ``format`` and ``sha256`` are set here.

    Raises:
        OcrnetError: The write failed; an older file of that name is unchanged.
        ValueError: safetensors lacks a dtype, or strict JSON lacks a value (nan).
    """
    path = Path(path)
    data = pack(tensors, meta)
    with _wrap_os_error(path):
        if path.suffix == ".safetensors":
            path.with_suffix(".ckpt").unlink(missing_ok=True)
    replace(path, [data])


def pack(tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> bytes:
    """Return the bytes of a checkpoint; raise ValueError as `save` does."""
    for name, tensor in tensors.items():
        if tensor.dtype.name not in _DTYPES:
            raise ValueError(f"tensor '{name}' is {tensor.dtype}; a checkpoint holds {', '.join(_DTYPES)}")
    plain = {name: _plain(tensor) for name, tensor in tensors.items()}
    return safetensors.numpy.save(plain, metadata={_KEY: document(plain, meta)})


def replace(path: Path, parts: Iterable[bytes | memoryview], *, flag: str = "save_dir") -> None:
    """Write a file atomically, and create its folder if needed.

    Args:
        path: The file.
        parts: Its content.
        flag: The option to change, as named in the error message.

    Raises:
        OcrnetError: The write failed; an older file of that name is unchanged.
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
        what = f"checkpoint {path}" if flag == "save_dir" else str(path)
        raise OcrnetError(f"cannot write {what}: {error.strerror}; make room there or choose another {flag}") from error


def load(path: AnyPath) -> Checkpoint:
    """Read a checkpoint and verify its checksums; raise OcrnetError, which names the file and the reason."""
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
            # A run replaced the file between two reads, as it does with its best checkpoint. Read the new one.


def _version(path: Path) -> tuple[int, int, int] | None:
    """Return inode, size and modification time, which change when a file is replaced; None if it is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of any safetensors file, ours or not, by name; only the layout is checked."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error
    except (TypeError, AttributeError) as error:  # NumPy lacks the dtype
        raise OcrnetError(f"{path} holds a type that NumPy lacks ({error}); save it as float32 or float16") from error


def is_ours(path: Path) -> bool:
    """Return whether a safetensors file has our document; raise OcrnetError if it is not a safetensors file."""
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
    """Read and verify only the JSON document, which is fast; the tensors are neither read nor checked."""
    path = Path(path)
    header = _read_header(path)
    stored = header.get("__metadata__")
    text = stored.get(_KEY) if isinstance(stored, dict) else None
    if not isinstance(text, str):
        raise OcrnetError(
            f"{path} is a safetensors file, but not an ocrnet checkpoint: its metadata has no '{_KEY}' entry; "
            "convert weights of other implementations with ocrnet convert"
        )
    return opened(path, text)


def document(tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> str:
    """Return the JSON document of a file, with format and checksums; raise ValueError if strict JSON lacks a value."""
    return _seal({**meta, "format": FORMAT, "sha256": _digest(tensors)})


def opened(path: Path, text: str) -> dict[str, Any]:
    """Return the content of a document, verified; raise OcrnetError, which names the file."""
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
    """Return a checkpoint's file name for an HRNet width and a tag: the step (an int) or a word such as ``best``."""
    return f"OCRNet_hrnet_seg_w{width}_{tag}_rank0.safetensors"


def step_of(path: AnyPath) -> int | None:
    """Return the step in a checkpoint's file name, or None for any other name."""
    match = _NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def steps(folder: AnyPath) -> list[Path]:
    """Return the numbered checkpoints of a folder by ascending step; empty if the folder does not exist."""
    found = [(step, path) for path in Path(folder).glob("*.safetensors") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found)]


def newest_valid(folder: AnyPath) -> NewestCheckpoint:
    """Load the newest numbered checkpoint that is valid; also return the newer ones that were skipped, and why."""
    passed_over: list[tuple[Path, str]] = []
    # mutation: skip-damaged-checkpoints
    for path in reversed(steps(folder)):
        try:
            return NewestCheckpoint(load(path), tuple(passed_over))
        except OcrnetError as error:
            passed_over.append((path, str(error)))
    return NewestCheckpoint(None, tuple(passed_over))


def prune(folder: AnyPath, keep: int, spared: Collection[Path] = ()) -> list[Path]:
    """Remove old numbered checkpoints, each with a ``.ckpt`` of the same name.

    The best checkpoint has no number and is kept.

    Args:
        folder: The folder of the checkpoints.
        keep: The number of newest checkpoints to keep; 0 keeps all.
        spared: Checkpoints to keep in addition.

    Returns:
        The removed files.
    """
    assert keep >= 0, f"keep is {keep}"
    old = [path for path in steps(folder)[:-keep] if path not in spared] if keep else []
    removed = [twin for path in old for twin in (path, path.with_suffix(".ckpt")) if twin.exists()]
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


def clean(folder: AnyPath) -> list[Path]:
    """Remove and return temporary files that a killed ``save`` left in a folder; no save may be in progress there."""
    removed = sorted(Path(folder).glob(f".*{_TEMPORARY}"))
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


def resolve(path: AnyPath) -> tuple[Path, str | None]:
    """Return the file that a path refers to and, if that is not the path itself, a sentence to log; else None.

    A folder refers to its newest valid checkpoint, or to that of its ``checkpoint`` subfolder. A missing ``X.ckpt``
    refers to ``X.safetensors`` in the same folder. If the path is a file, its content is not read. Raise OcrnetError
    if nothing is found.
    """
    path = Path(path)
    if path.is_file():
        return path, None
    if path.is_dir():
        return _resolve_folder(path)
    twin = path.with_suffix(".safetensors")
    if path.suffix == ".ckpt" and twin.is_file():
        return twin, f"{path} does not exist: {twin.name} in its folder is used."
    if not path.parent.is_dir():
        raise OcrnetError(f"checkpoint {path} does not exist, nor does its folder; check the path")
    names = [name for name in _names(path.parent) if Path(name).suffix in WEIGHTS]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4) or names
    raise OcrnetError(f"checkpoint {path} does not exist; its folder contains {_listing(close or ['no checkpoint'])}")


def resolve_state(path: AnyPath) -> tuple[Path, str | None]:
    """Return the file from which a run can resume, and a sentence to log or None, as `resolve` does.

    A ``.ckpt`` holds only weights, so it refers to the safetensors file of the same name in its folder. Raise
    OcrnetError if that does not exist.
    """
    found, meaning = resolve(path)
    if found.suffix != ".ckpt":
        return found, meaning
    twin = found.with_suffix(".safetensors")
    if not twin.is_file():
        raise OcrnetError(
            f"{found} holds only weights, and resuming also needs the momentum, step and losses: those are in "
            f"{twin.name}, which is missing; give a .safetensors checkpoint, or the run's folder"
        )
    return twin, f"{found} holds only weights: {twin.name} in its folder is used."


def _resolve_folder(folder: Path) -> tuple[Path, str]:
    passed_over: list[tuple[Path, str]] = []
    for place in (folder, folder / "checkpoint"):
        newest = newest_valid(place)
        passed_over += newest.passed_over
        if newest.checkpoint:
            found = newest.checkpoint.path
            reasons = "".join(f" Skipped: {reason}." for _, reason in passed_over)
            return found, f"{folder} is a folder: its newest valid checkpoint {found} is used.{reasons}"
    there = _names(folder) + [f"checkpoint/{name}" for name in _names(folder / "checkpoint")]
    reasons = "".join(f"; {reason}" for _, reason in passed_over)
    raise OcrnetError(f"folder {folder} has no valid numbered checkpoint{reasons}; it contains {_listing(there)}")


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _listing(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing"


def _plain(tensor: np.ndarray) -> np.ndarray:
    """Return the array as little-endian, in C order, with its shape; ``np.ascontiguousarray`` may add an axis."""
    return np.asarray(tensor, dtype=tensor.dtype.newbyteorder("<"), order="C")


def _digest(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = _plain(tensors[name])
        line = json.dumps([name, array.dtype.name, list(array.shape)], separators=(",", ":"))
        digest.update(f"{line}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _seal(meta: dict[str, Any]) -> str:
    for key, value in meta.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"checkpoint meta '{key}' is not strict JSON: {error}") from error
    text = json.dumps(meta, allow_nan=False)
    return f'{text[:-1]}, "meta_sha256": "{_text_digest(text)}"}}'


def _text_digest(text: str) -> str:
    # surrogatepass: an altered escape sequence can be a lone surrogate.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _read_header(path: Path) -> dict[str, Any]:
    """Read the JSON header; the safetensors package validates its structure."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if file.read(1) not in (b"{", b""):
                raise OcrnetError(f"{path} is not a safetensors file, or its beginning is altered")
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
    """Replace the file atomically, or leave it unchanged."""
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
    """Sync the folder to disk, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Network and FUSE file systems may not support this; the file itself is already synced and in place.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def _damaged(path: Path, why: str) -> OcrnetError:
    return OcrnetError(f"{path} is truncated or altered: {why}; use an earlier checkpoint")
