"""The download cache of this machine: only complete files under their names, a journal, one process at a time."""

import concurrent.futures
import contextlib
import hashlib
import json
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
from ocrnet.distributed.launcher import SCHEDULER, World
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.format import size_text
from ocrnet.utils.urls import Url

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BLOCK = 8 << 20  # bytes per request
THREADS = 8
SAID_EVERY = 10.0  # seconds
SUMS = "SHA256SUMS"

Say = Callable[[str], None]


class Speaker:
    """Prints progress lines about the files of this machine.

    The process that does the work prints, whichever it is. Of those that wait, only the first process of the machine
    prints. The lines of any other process start with its rank.
    """

    def __init__(self, world: World) -> None:
        self.first = world.local == 0 and world.launcher != SCHEDULER
        self._lead = "" if self.first else f"rank {world.rank}: "

    def __call__(self, line: str) -> None:
        """Print a line."""
        print(self._lead + line, flush=True)


def is_first(say: Say) -> bool:
    """Return whether this is the process of its machine whose notes become part of the log."""
    return say.first if isinstance(say, Speaker) else True


class Cache:
    """The local folder for the files of one url, with its journal, lock and progress files next to it."""

    def __init__(self, url: Url, cloud: Cloud, say: Say) -> None:
        root = _root(cloud)
        digest = hashlib.sha256(f"{url} {cloud.endpoint}".encode()).hexdigest()[:8]
        name = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', url.name)}-{digest}"
        self.url, self.cloud, self.say = url, cloud, say
        self.place = root / name
        self._journal = root / f"{name}.journal"
        self._progress = root / f"{name}.progress"
        self._lock = root / f"{name}.lock"
        self._writing = threading.Lock()

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Let one process of this machine in at a time; a waiting process prints the progress of the other."""
        return alone(
            self._lock,
            self._tell_of_other,
        )

    def _tell_of_other(self) -> None:
        if is_first(self.say):
            self.say(f"{self.url}: another process on this machine is downloading it: {self._progress_of_other()}")

    def _progress_of_other(self) -> str:
        with contextlib.suppress(OSError):
            return self._progress.read_text(encoding="utf-8")
        return "just started"

    def _known(self) -> dict[str, Item]:
        found: dict[str, Item] = {}
        if not self._journal.exists():
            return found
        for line in self._journal.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError):  # a truncated last line
                item = Item(*json.loads(line))
                found[item.name] = item
        return found

    def target(self, name: str) -> Path:
        """Return the local path of an object; raise `OcrnetError` for a name that is no path inside the folder."""
        if name.startswith("/") or "\0" in name or {"", ".", ".."} & set(name.split("/")):
            raise OcrnetError(
                f"{self.url} has an object named '{name}', which is not a valid file name; rename the object"
            )
        return self.place / name

    def bring(self, store: Store, items: Sequence[Item], sums: dict[str, str]) -> list[str]:
        """Download the objects that are missing or changed; call it while holding the lock of `alone`.

        Args:
            store: The store that holds the objects.
            items: The objects that the folder must contain.
            sums: The expected SHA-256 in hex, by object name; may lack names.

        Returns:
            The lines to log about the download.

        Raises:
            OcrnetError: The disk has too little free space, or an object cannot be downloaded completely. Files
                downloaded before the failure are kept for the next try.
        """
        known = self._known()
        # mutation: keep-downloaded-files
        # mutation: download-changed-files
        missing = [item for item in items if known.get(item.name) != item or not self.has_file(item)]
        total = sum(item.size for item in missing)
        if not missing:
            return [f"{self.url}: all {len(items)} files are already in {self.place}"]
        with _wrap_os_error(self.place):
            self.place.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.place).free
        # mutation: check-disk-space-for-download
        if total > free:
            raise OcrnetError(
                f"{self.url} needs {size_text(total)} in {self.place}, but only {size_text(free)} are free; make room, "
                "or set cloud.cache_dir"
            )
        begun = time.monotonic()
        compared = self._bring_all(store, missing, sums, total)
        seconds = time.monotonic() - begun
        lines = [f"{self.url}: {len(missing)} of {len(items)} files, {size_text(total)}, downloaded in {seconds:.0f} s"]
        if by_size := compared.count("size"):
            lines.append(
                f"{self.url}: {by_size} files were verified by size only, because the store has no MD5 of them; "
                f"to verify their content, add a file {SUMS} to the folder"
            )
        for line in lines if not is_first(self.say) else ():
            self.say(line)
        return lines

    def has_file(self, item: Item) -> bool:
        """Return whether the object's file exists and has the object's size."""
        target = self.target(item.name)
        return target.is_file() and target.stat().st_size == item.size

    def _bring_all(self, store: Store, missing: Sequence[Item], sums: dict[str, str], total: int) -> list[str]:
        """Download with several threads and report progress; return the check used for each file (see `fetch`)."""
        pulled = Pulled()

        def one(item: Item) -> str:
            how = fetch(store, item, self.target(item.name), self.cloud, sums=sums, say=self.say, pulled=pulled)
            with self._writing, self._journal.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps([item.name, item.size, item.etag]) + "\n")
            return how

        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(THREADS))
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            stack.callback(self._progress.unlink, missing_ok=True)
            stack.callback(pulled.stop.set)  # after a failure the other downloads need not finish
            waiting = {pool.submit(one, item) for item in missing}
            done: set[concurrent.futures.Future[str]] = set()
            begun = said = time.monotonic()
            while waiting:
                ended, waiting = concurrent.futures.wait(waiting, 1, concurrent.futures.FIRST_EXCEPTION)
                done |= ended
                for future in ended:
                    future.result()
                now = time.monotonic()
                line = (
                    f"{len(done)} of {len(missing)} files, {size_text(pulled.size)} of {size_text(total)}, "
                    f"{size_text(pulled.size / (now - begun))}/s"
                )
                with _wrap_os_error(self._progress):
                    self._progress.write_text(line, encoding="utf-8")
                if waiting and now - said >= SAID_EVERY:
                    said = now
                    self.say(f"{self.url}: {line}")
        return [future.result() for future in done]

    def forget_others(self, items: Sequence[Item]) -> None:
        """Remove the files whose objects are no longer in the store, and all partial downloads."""
        names = {item.name for item in items}
        for name in self._known().keys() - names:
            self.target(name).unlink(missing_ok=True)
        for path in self.place.rglob(".*.part"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Let one process of this machine in at a time.

    The lock is released when its process ends, even if it is killed. ``waiting`` is called every `SAID_EVERY` seconds
    while another process holds the lock. Windows has no lock.
    """
    with _wrap_os_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        said = -SAID_EVERY
        while fcntl is not None:
            try:
                # mutation: one-download-per-machine
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - said >= SAID_EVERY:
                    said = time.monotonic()
                    waiting()
                time.sleep(0.5)
        yield


@dataclass
class Pulled:
    """The number of bytes downloaded so far, and the event that stops the download threads."""

    size: int = 0
    stop: threading.Event = field(default_factory=threading.Event)


def fetch(
    store: Store, item: Item, target: Path, cloud: Cloud, *, sums: dict[str, str], say: Say, pulled: Pulled
) -> str:
    """Download one object to a file; the file appears under its name only when it is complete and verified.

    A partial download of the same version by an earlier try is continued.

    Args:
        store: The store that holds the object.
        item: The object, as listed.
        target: The path of the file.
        cloud: The settings for retries and checksums.
        sums: The expected SHA-256 in hex, by object name; may lack names.
        say: Receives a line for each retry.
        pulled: Counts the downloaded bytes; its event stops the download.

    Returns:
        The strongest check that the file passed: ``sha256``, ``md5`` or ``size``.

    Raises:
        OcrnetError: The download failed after all retries (names the object), or the file cannot be written.
    """
    version = hashlib.sha256(f"{item.size} {item.etag}".encode()).hexdigest()[:8]
    # mutation: rename-download-when-complete
    part = target.with_name(f".{target.name}.{version}.part")
    what = f"{store.url}/{item.name}"
    wanted = {"sha256": sums.get(item.name, ""), "md5": item.md5 if cloud.checksum else ""}

    def read(start: int, length: int) -> bytes:
        if pulled.stop.is_set():
            raise StoreError("canceled, because another file failed", final=True)
        return retry(lambda: store.read(item.name, start, length), what, retries=cloud.retries, say=say)

    def attempt() -> None:
        if not any(wanted.values()):
            # mutation: check-size-without-md5
            _ask_again(store, item)
        found = _collect(read, item.size, part, pulled)
        for kind, digest in wanted.items():
            # mutation: verify-downloaded-digest
            if digest and found[kind] != digest:
                part.unlink()
                hint = "; if the bucket's encryption is the reason, set cloud.checksum: False" if kind == "md5" else ""
                raise StoreError(f"the download has the {kind.upper()} {found[kind]}, expected {digest}{hint}")

    with _wrap_os_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        retry(attempt, what, retries=cloud.retries, say=say)
        os.replace(part, target)
    return next((kind for kind, digest in wanted.items() if digest), "size")


def _ask_again(store: Store, item: Item) -> None:
    """Compare the listed size with the object's own size; without a checksum nothing else reveals a wrong size."""
    own = store.stat(item.name)
    if own is None or own.size != item.size:
        says = f"the object has {own.size:,} bytes" if own else "the object does not exist"
        raise StoreError(f"the store lists {item.size:,} bytes, but {says}")


def _collect(read: Callable[[int, int], bytes], size: int, part: Path, pulled: Pulled) -> dict[str, str]:
    """Append the missing bytes to ``part``, and return its digests in hex."""
    digests = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    # mutation: resume-partial-download
    if part.exists() and part.stat().st_size > size:
        part.unlink()
    with part.open("a+b") as file:
        file.seek(0)
        while chunk := file.read(BLOCK):
            for digest in digests.values():
                digest.update(chunk)
        while (at := file.tell()) < size:
            chunk = read(at, min(BLOCK, size - at))
            file.write(chunk)
            file.flush()
            pulled.size += len(chunk)
            for digest in digests.values():
                digest.update(chunk)
        os.fsync(file.fileno())
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def read_sums(store: Store, cloud: Cloud, say: Say, item: Item | None) -> dict[str, str]:
    """Return the checksums of a ``SHA256SUMS`` file.

    Args:
        store: The store that holds the file.
        cloud: The settings for retries.
        say: Receives a line for each retry.
        item: The file's object, or None if there is no such file.

    Returns:
        The SHA-256 in hex, by object name; empty if there is no such file.

    Raises:
        OcrnetError: The file cannot be read, or a line does not have the format of sha256sum.
    """
    if item is None:
        return {}
    content = retry(
        lambda: store.read(item.name, 0, item.size), f"{store.url}/{item.name}", retries=cloud.retries, say=say
    )
    found = {}
    for line in content.decode(errors="replace").splitlines():
        digest, _, name = line.strip().partition(" ")
        name = name.strip().lstrip("*").removeprefix("./")
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digest) or not name:
            raise OcrnetError(f"{item.name}: invalid line '{line}'; expected the output format of sha256sum")
        found[name] = digest.lower()
    return found


def _root(cloud: Cloud) -> Path:
    """Return the root folder of all downloads; create it if it is missing."""
    fast = Path("/cache")  # ModelArts' local disk
    given = Path(cloud.cache_dir) if cloud.cache_dir else None
    root = given or (fast if os.access(fast, os.W_OK) else Path.home() / ".cache") / "ocrnet"
    with _wrap_os_error(root):
        root.mkdir(parents=True, exist_ok=True)
    return root


@contextlib.contextmanager
def _wrap_os_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OcrnetError(
            f"{error.filename or path} cannot be written: {error.strerror}; make room there, or set another folder "
            "(cloud.cache_dir, save_dir)"
        ) from error
