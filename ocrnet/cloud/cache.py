"""The download cache of this machine.

Only complete files have their final names. A journal lists them. One process at a time downloads.
"""

import concurrent.futures
import contextlib
import contextvars
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ocrnet.cloud.retry import retry
from ocrnet.cloud.store import Item, Store, StoreError
from ocrnet.config import Cloud
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.format import size_text
from ocrnet.utils.log import ANY_RANK, EACH_MACHINE
from ocrnet.utils.urls import Url

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

BLOCK = 8 << 20  # bytes per request
THREADS = 8
PROGRESS_INTERVAL = 10.0  # seconds between progress lines
CHECKSUM_FILE = "SHA256SUMS"


class Cache:
    """The local folder for the files of one url; its journal, lock and progress files are next to the folder."""

    def __init__(self, url: Url, cloud: Cloud) -> None:
        cache_root = _cache_root(cloud)
        digest = hashlib.sha256(f"{url} {cloud.endpoint}".encode()).hexdigest()[:8]
        name = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', url.name)}-{digest}"
        self.url, self.cloud = url, cloud
        self.folder = cache_root / name
        self._journal = cache_root / f"{name}.journal"
        self._progress_file = cache_root / f"{name}.progress"
        self._lock_file = cache_root / f"{name}.lock"
        self._journal_lock = threading.Lock()

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that only one process of this machine can enter at a time.

        A waiting process logs the progress of the process that holds the lock.
        """
        return lock_process(self._lock_file, self._log_other_download)

    def _log_other_download(self) -> None:
        message = f"{self.url}: another process on this machine is downloading it: {self._read_other_progress()}"
        logger.info(message, extra=EACH_MACHINE)

    def _read_other_progress(self) -> str:
        with contextlib.suppress(OSError):
            return self._progress_file.read_text(encoding="utf-8")
        return "just started"

    def _read_journal(self) -> dict[str, Item]:
        items: dict[str, Item] = {}
        if not self._journal.exists():
            return items
        for line in self._journal.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError):  # a truncated last line
                item = Item(*json.loads(line))
                items[item.name] = item
        return items

    def target(self, name: str) -> Path:
        """Return the local path of an object; raise `OcrnetError` if it would be outside the folder."""
        if name.startswith("/") or "\0" in name or {"", ".", ".."} & set(name.split("/")):
            raise OcrnetError(
                f"{self.url} has an object named '{name}', which is not a valid file name; rename the object"
            )
        return self.folder / name

    def download(self, store: Store, items: Sequence[Item], checksums: dict[str, str]) -> None:
        """Download the objects that are missing or changed; the caller must hold `lock`.

        Args:
            store: The store that holds the objects.
            items: The objects that the folder must contain.
            checksums: The expected SHA-256 in hex, by object name; names may be missing.

        Raises:
            OcrnetError: The disk has too little free space, or an object cannot be downloaded completely. Files
                that were downloaded before the failure are kept and not downloaded again by the next call.
        """
        journal = self._read_journal()
        # mutation: keep-downloaded-files
        # mutation: download-changed-files
        missing = [item for item in items if journal.get(item.name) != item or not self.has_file(item)]
        total = sum(item.size for item in missing)
        if not missing:
            logger.info(f"{self.url}: all {len(items)} files are already in {self.folder}")
            return
        with _wrap_os_error(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        # mutation: check-disk-space-for-download
        if total > free:
            raise OcrnetError(
                f"{self.url} needs {size_text(total)} in {self.folder}, but only {size_text(free)} are free; free some "
                "space, or set cloud.cache_dir to a folder on another disk"
            )
        start = time.monotonic()
        checks = self._download_all(store, missing, checksums, total)
        seconds = time.monotonic() - start
        summary = f"{len(missing)} of {len(items)} files, {size_text(total)}, downloaded in {seconds:.0f} s"
        logger.info(f"{self.url}: {summary}", extra=ANY_RANK)
        if by_size := checks.count("size"):
            logger.info(
                f"{self.url}: {by_size} files were verified by size only, because the store has no MD5 of them; "
                f"to verify their content, add a {CHECKSUM_FILE} file to the folder in the store",
                extra=ANY_RANK,
            )

    def has_file(self, item: Item) -> bool:
        """Return whether the object's file exists and has the object's size."""
        target = self.target(item.name)
        return target.is_file() and target.stat().st_size == item.size

    def _download_all(self, store: Store, missing: Sequence[Item], checksums: dict[str, str], total: int) -> list[str]:
        """Download with several threads and log the progress.

        Return for each file the check that it passed, as `download_object` does.
        """
        progress = DownloadProgress()

        def download_one(item: Item) -> str:
            check = download_object(
                store, item, self.target(item.name), self.cloud, checksums=checksums, progress=progress
            )
            with self._journal_lock, self._journal.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps([item.name, item.size, item.etag]) + "\n")
            return check

        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(THREADS))
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            stack.callback(self._progress_file.unlink, missing_ok=True)
            stack.callback(progress.stop.set)  # after a failure, stop the other downloads
            # Each thread gets a copy of the context, because its messages name this rank.
            pending = {pool.submit(contextvars.copy_context().run, download_one, item) for item in missing}
            done: set[concurrent.futures.Future[str]] = set()
            start = last_logged = time.monotonic()
            while pending:
                finished, pending = concurrent.futures.wait(pending, 1, concurrent.futures.FIRST_EXCEPTION)
                done |= finished
                for future in finished:
                    future.result()
                now = time.monotonic()
                line = (
                    f"{len(done)} of {len(missing)} files, {size_text(progress.size)} of {size_text(total)}, "
                    f"{size_text(progress.size / (now - start))}/s"
                )
                with _wrap_os_error(self._progress_file):
                    self._progress_file.write_text(line, encoding="utf-8")
                if pending and now - last_logged >= PROGRESS_INTERVAL:
                    last_logged = now
                    logger.info(f"{self.url}: {line}", extra=ANY_RANK)
        return [future.result() for future in done]

    def remove_stale_files(self, items: Sequence[Item]) -> None:
        """Remove all partial downloads, and the files whose objects are not in ``items``, the present listing."""
        names = {item.name for item in items}
        for name in self._read_journal().keys() - names:
            self.target(name).unlink(missing_ok=True)
        for path in self.folder.rglob(".*.part"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_process(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a file lock that excludes the other processes of this machine.

    The lock is released when its process ends, even if it is killed. While another process holds the lock, ``on_wait``
    is called every `PROGRESS_INTERVAL` seconds. On Windows, nothing is locked.
    """
    with _wrap_os_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        last_call = -PROGRESS_INTERVAL
        while fcntl is not None:
            try:
                # mutation: one-download-per-machine
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - last_call >= PROGRESS_INTERVAL:
                    last_call = time.monotonic()
                    on_wait()
                time.sleep(0.5)
        yield


@dataclass
class DownloadProgress:
    """The number of bytes downloaded so far, and the event that stops the download threads."""

    size: int = 0
    stop: threading.Event = field(default_factory=threading.Event)


def download_object(
    store: Store,
    item: Item,
    target: Path,
    cloud: Cloud,
    *,
    checksums: dict[str, str],
    progress: DownloadProgress,
) -> str:
    """Download one object to a file, which gets its final name only when it is complete and verified.

    If an earlier try downloaded a part of the same version, only the rest is downloaded.

    Args:
        store: The store that holds the object.
        item: The object, as listed.
        target: The path of the file.
        cloud: The settings for retries and checksums.
        checksums: The expected SHA-256 in hex, by object name; names may be missing.
        progress: Its size is increased by the downloaded bytes; its event stops the download.

    Returns:
        The strongest check that the file passed: ``sha256``, ``md5`` or ``size``.

    Raises:
        OcrnetError: The download failed after all retries, or the file cannot be written.
    """
    version = hashlib.sha256(f"{item.size} {item.etag}".encode()).hexdigest()[:8]
    # mutation: rename-download-when-complete
    part = target.with_name(f".{target.name}.{version}.part")
    object_url = f"{store.url}/{item.name}"
    expected = {"sha256": checksums.get(item.name, ""), "md5": item.md5 if cloud.checksum else ""}

    def read(start: int, length: int) -> bytes:
        if progress.stop.is_set():
            raise StoreError("canceled, because the download of another file failed", final=True)
        return retry(lambda: store.read(item.name, start, length), object_url, retries=cloud.retries)

    def attempt() -> None:
        if not any(expected.values()):
            # mutation: check-size-without-md5
            _check_listed_size(store, item)
        digests = _complete_part(read, item.size, part, progress)
        for kind, digest in expected.items():
            # mutation: verify-downloaded-digest
            if digest and digests[kind] != digest:
                part.unlink()
                hint = "; the ETag of an encrypted bucket may not be an MD5: then set cloud.checksum: False"
                hint = hint if kind == "md5" else ""
                raise StoreError(f"the download has the {kind.upper()} {digests[kind]}, expected {digest}{hint}")

    with _wrap_os_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        retry(attempt, object_url, retries=cloud.retries)
        os.replace(part, target)
    return next((kind for kind, digest in expected.items() if digest), "size")


def _check_listed_size(store: Store, item: Item) -> None:
    """Raise `StoreError` if the listed size is not the object's size.

    Without a checksum, no other check detects a wrong listing.
    """
    stored = store.stat(item.name)
    if stored is None or stored.size != item.size:
        actual = f"the object has {stored.size:,} bytes" if stored else "the object does not exist"
        raise StoreError(f"the store lists {item.size:,} bytes, but {actual}")


def _complete_part(
    read: Callable[[int, int], bytes], size: int, part: Path, progress: DownloadProgress
) -> dict[str, str]:
    """Download the missing bytes to ``part``, and return the SHA-256 and MD5 of the complete file in hex."""
    digests = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    # mutation: resume-partial-download
    if part.exists() and part.stat().st_size > size:
        part.unlink()
    with part.open("a+b") as file:
        position = file.seek(0)
        while chunk := file.read(BLOCK):
            for digest in digests.values():
                digest.update(chunk)
            position += len(chunk)
        while position < size:
            chunk = read(position, min(BLOCK, size - position))
            file.write(chunk)
            file.flush()
            position += len(chunk)
            progress.size += len(chunk)
            for digest in digests.values():
                digest.update(chunk)
        os.fsync(file.fileno())
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def read_checksums(store: Store, cloud: Cloud, item: Item | None) -> dict[str, str]:
    """Return the checksums of a ``SHA256SUMS`` file.

    Args:
        store: The store that holds the file.
        cloud: The settings for retries.
        item: The file's object, or None if there is no such file.

    Returns:
        The SHA-256 in hex, by object name; empty if there is no such file.

    Raises:
        OcrnetError: The file cannot be read, or a line does not have the format of sha256sum.
    """
    if item is None:
        return {}
    content = retry(lambda: store.read(item.name, 0, item.size), f"{store.url}/{item.name}", retries=cloud.retries)
    checksums = {}
    for line in content.decode(errors="replace").splitlines():
        digest, _, name = line.strip().partition(" ")
        name = name.strip().lstrip("*").removeprefix("./")
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digest) or not name:
            raise OcrnetError(f"{item.name}: invalid line '{line}'; expected the output format of sha256sum")
        checksums[name] = digest.lower()
    return checksums


def _cache_root(cloud: Cloud) -> Path:
    """Return the folder that holds all downloads; create it if it is missing."""
    modelarts_disk = Path("/cache")  # ModelArts' local disk
    configured = Path(cloud.cache_dir) if cloud.cache_dir else None
    root = configured or (modelarts_disk if os.access(modelarts_disk, os.W_OK) else Path.home() / ".cache") / "ocrnet"
    with _wrap_os_error(root):
        root.mkdir(parents=True, exist_ok=True)
    return root


@contextlib.contextmanager
def _wrap_os_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OcrnetError(
            f"{error.filename or path} cannot be written: {error.strerror}; free some space there, or set another "
            "folder (cloud.cache_dir, save_dir)"
        ) from error
