"""Upload a run's files to train_url in a separate thread.

Training steps do not wait for uploads. A local checkpoint is removed only after it or a newer one is uploaded.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from ocrnet.cloud.retry import MAX_PAUSE, pause, retry
from ocrnet.cloud.store import Item, Store, StoreError, md5_of
from ocrnet.config import Cloud
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.format import size_text
from ocrnet.utils.signals import Stopped, StopRequest
from ocrnet.weights import checkpoint

logger = logging.getLogger(__name__)

MAX_PAUSE_AT_END = 5.0  # seconds between two tries while the run waits for its last uploads
FAILURE_LOG_INTERVAL = 60.0  # seconds between two log lines about failures; the failures in between are only counted
CONFIRM_RETRIES = 3  # retries of the check that an uploaded object is in the store; after that, the upload is retried

CHECKPOINTS = "checkpoint/"
PROBE_NAME = ".ocrnet"  # the object of the test upload, which is removed again
RESULTS = ("eval.jsonl", "logs/eval.log")  # files that evaluations write
RECORD = (  # files of a run to which a resumed run appends
    "config.yml", "starts.jsonl", "metrics.jsonl", "logs/train.log", "logs/wandb.json", "logs/mlflow.json"
)  # fmt: skip


def check_writable(store: Store, cloud: Cloud) -> None:
    """Check that the store is writable with a test upload, so that a run without permission fails at its start.

    Args:
        store: The store of train_url.
        cloud: The settings for retries.

    Raises:
        OcrnetError: The test upload failed after all retries.
    """
    # mutation: check-upload-at-start
    retry(lambda: store.upload(b"ocrnet", PROBE_NAME), f"train_url {store.url}", retries=cloud.retries)
    with contextlib.suppress(StoreError):  # the permission to delete is not needed
        store.delete(PROBE_NAME)


class Uploader:
    """Uploads a run's checkpoints and small files in a thread.

    Each small file is uploaded with the content that it has when it is queued. The record is uploaded before a
    checkpoint that is queued at the same time. Therefore the record in the store always includes the metrics and log
    lines up to the newest checkpoint. Failed uploads are retried until the run ends.
    """

    def __init__(
        self, store: Store, folder: Path, cloud: Cloud, *, keep: int, patterns: Iterable[str] = ("**/*",)
    ) -> None:
        self.store, self.folder, self.keep = store, folder, keep
        self._cloud, self._patterns = cloud, tuple(patterns)
        self._condition = threading.Condition()
        self._queue: dict[str, Path | bytes] = {}  # by name in the store: a path, or the content of a small file
        self._current: str | None = None
        self._confirmed_step = -1
        self._remote: set[str] = set()  # names of the checkpoints in the store
        self._own_remote: set[str] = set()  # those names in _remote whose checkpoints come from this folder
        self._failed_tries: dict[str, int] = {}  # number of failed tries, by name
        self._queued_versions: dict[str, tuple[int, int]] = {}  # size and mtime of queued small files
        self._last_failure = ""
        self._failure_logged, self._last_logged = False, -FAILURE_LOG_INTERVAL
        self._failures = 0
        self._uploaded = [0, 0]  # objects, bytes
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="push", daemon=True)

    def start(self) -> None:
        """Start the upload thread."""
        self._thread.start()

    def queue_missing(self, remote: Iterable[Item]) -> None:
        """Queue the folder's checkpoints that are not in the store; call it before `start`.

        Of the numbered checkpoints, only the newest ``keep`` (0: all) are compared, by size. The best checkpoint is
        compared by size and MD5. ``remote`` lists the objects in the store's ``checkpoint/``.
        """
        remote_items = {item.name: item for item in remote}
        self._remote = set(remote_items)
        numbered = checkpoint.steps(self.folder / CHECKPOINTS)
        for path in numbered[-self.keep :] if self.keep else numbered:
            remote_item = remote_items.get(CHECKPOINTS + path.name)
            if remote_item is not None and remote_item.size == path.stat().st_size:
                self._confirmed_step = checkpoint.step_of(path) or 0
                self._own_remote.add(remote_item.name)
            else:
                self.queue_checkpoint(path)
        for path in sorted((self.folder / CHECKPOINTS).glob("*_best_*.safetensors")):
            if not self._is_uploaded(path, remote_items.get(CHECKPOINTS + path.name)):
                self.queue_checkpoint(path)

    def queue_checkpoint(self, path: Path) -> None:
        """Queue a checkpoint, and its MindSpore ``.ckpt`` file if it exists."""
        with self._condition:
            for file in (path, path.with_suffix(".ckpt")):
                if file.exists():
                    self._queue[CHECKPOINTS + file.name] = file
            self._condition.notify()

    def queue_files(self) -> None:
        """Queue the small files that changed since the last call, with their current content."""
        contents: dict[str, bytes] = {}
        for path in sorted({path for pattern in self._patterns for path in self.folder.glob(pattern)}):
            name = path.relative_to(self.folder).as_posix()
            if name.startswith(CHECKPOINTS) or any(part.startswith(".") for part in name.split("/")):
                continue
            with contextlib.suppress(OSError):  # the file was removed or is not readable
                status = path.stat()
                version = (status.st_size, status.st_mtime_ns)
                if path.is_file() and self._queued_versions.get(name) != version:
                    contents[name] = path.read_bytes()
                    self._queued_versions[name] = version
        with self._condition:
            self._queue |= contents
            self._condition.notify()

    def unconfirmed(self) -> set[Path]:
        """Return the local checkpoints to keep: those newer than the newest checkpoint confirmed in the store."""
        with self._condition:
            confirmed = self._confirmed_step
        paths = checkpoint.steps(self.folder / CHECKPOINTS)
        return {path for path in paths if (checkpoint.step_of(path) or 0) > confirmed}

    def drain(self, seconds: float) -> list[str]:
        """Wait at most ``seconds`` until all files are uploaded and the thread ends.

        Return the names of the files that are not uploaded, followed by the last failure or ``timeout``. Return an
        empty list if all files are uploaded.
        """
        with self._condition:
            self._ending = True
            left = len(self._queue) + (self._current is not None)
            self._condition.notify_all()
        if left:
            _log(f"upload: {left} files are not yet uploaded to {self.store.url}; waiting at most {seconds:.0f} s")
        end = time.monotonic() + seconds
        # mutation: bound-wait-for-uploads
        while self._thread.is_alive() and time.monotonic() < end:
            self._thread.join(min(1.0, max(0.01, end - time.monotonic())))
        with self._condition:
            names = sorted(self._queue.keys() | ({self._current} if self._current else set()))
            objects, size = self._uploaded
            last_failure = self._last_failure
        if not names:
            failures = f"; {self._failures} tries failed" if self._failures else ""
            _log(f"upload: {objects} files, {size_text(size)}, uploaded to {self.store.url}{failures}")
            return []
        return [*names, last_failure or "timeout"]

    def _run(self) -> None:
        while (entry := self._next()) is not None:
            name, source = entry
            try:
                size = self._upload(name, source)
            except Exception as error:  # no exception ends the run: the file is still in the folder
                self._on_failure(name, source, error)
            else:
                self._on_success(name, size)

    def _next(self) -> tuple[str, Path | bytes] | None:
        """Wait for a queued file and take the most urgent one; return None if the queue is empty and the run ends."""
        with self._condition:
            while not self._queue:
                if self._ending:
                    return None
                self._condition.wait()
            # mutation: refused-file-blocks-nothing
            self._current = name = min(self._queue, key=lambda name: _urgency(name, self._failed_tries.get(name, 0)))
            return name, self._queue.pop(name)

    def _upload(self, name: str, source: Path | bytes) -> int:
        """Upload a file and check that it is in the store; return its size, or 0 if it is removed or outdated."""
        if isinstance(source, Path) and (not source.exists() or self._is_outdated(name)):
            return 0
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        self.store.upload(source, name)
        stored = retry(lambda: self.store.stat(name), name, retries=CONFIRM_RETRIES, on_failure=self._count_failure)
        # mutation: confirm-upload
        if stored is None or stored.size != size:
            actual = f"has {stored.size:,} bytes" if stored else "does not exist"
            raise StoreError(f"{size:,} bytes were uploaded, but the object in the store {actual}")
        if stored.md5 and self._cloud.checksum and stored.md5 != md5_of(source).hex():
            raise StoreError(
                f"the object in the store has the MD5 {stored.md5}, which is not the file's; the ETag of an encrypted "
                "bucket may not be an MD5: then set cloud.checksum: False"
            )
        return size

    def _count_failure(self) -> None:
        self._failures += 1  # only this thread changes it

    def _is_outdated(self, name: str) -> bool:
        """Return whether ``name`` is a checkpoint, and ``keep`` newer ones of this folder are already in the store."""
        step = checkpoint.step_of(Path(name).with_suffix(".safetensors"))
        if step is None or not self.keep:
            return False
        newer = [other for other in self._own_remote if (checkpoint.step_of(other) or 0) > step]
        return len(newer) >= self.keep

    def _on_failure(self, name: str, source: Path | bytes, error: Exception) -> None:
        with self._condition:
            self._failed_tries[name] = tries = self._failed_tries.get(name, 0) + 1
            seconds = min(pause(tries), MAX_PAUSE_AT_END if self._ending else MAX_PAUSE)
            self._current = None
            self._queue.setdefault(name, source)  # unless a newer version is already queued
            known = isinstance(error, (StoreError, OcrnetError))
            self._last_failure = f"{name}: {error if known else repr(error)}"
            self._failures += 1
            if time.monotonic() - self._last_logged > FAILURE_LOG_INTERVAL:
                self._last_logged, self._failure_logged = time.monotonic(), True
                _log(
                    f"upload: {self._last_failure}; the file is kept, retrying in {seconds:.1f} s "
                    f"(failures so far: {self._failures})",
                    logging.WARNING,
                )
            if not self._ending:
                self._condition.wait_for(lambda: self._ending, seconds)
                return
        time.sleep(seconds)

    def _on_success(self, name: str, size: int) -> None:
        step = checkpoint.step_of(name)
        with self._condition:
            if self._failure_logged:
                _log(f"upload: {self.store.url} accepts files again")
            self._last_failure, self._failure_logged = "", False
            self._failed_tries.pop(name, None)
            self._current = None
            if size:
                self._uploaded = [self._uploaded[0] + 1, self._uploaded[1] + size]
            if size and name.startswith(CHECKPOINTS):
                _log(f"uploaded {self.store.url}/{name} ({size_text(size)})")
                self._remote.add(name)
            if size and step is not None:
                self._confirmed_step = max(self._confirmed_step, step)
                self._own_remote.add(name)
        if size and step is not None and self.keep:
            self._prune(step)

    def _prune(self, newest: int) -> None:
        """Remove old checkpoints from the store, as the run does in its folder.

        Of the checkpoints up to step ``newest``, the newest ``keep`` are kept. Checkpoints of later steps are not
        removed.
        """
        # mutation: prune-older-steps-only
        older = sorted(
            (step, name) for name in self._remote if (step := checkpoint.step_of(name)) is not None and step <= newest
        )
        for _, name in older[: -self.keep]:
            for twin in self._remote & {name, str(Path(name).with_suffix(".ckpt"))}:
                try:
                    retry(
                        lambda twin=twin: self.store.delete(twin),  # type: ignore[misc]
                        f"upload: removing {self.store.url}/{twin}",
                        retries=self._cloud.retries,
                        on_failure=self._count_failure,
                    )
                    self._remote.discard(twin)
                except OcrnetError as error:  # the next call tries again
                    _log(str(error), logging.WARNING)

    @staticmethod
    def _is_uploaded(path: Path, remote_item: Item | None) -> bool:
        """Return whether the store's object has the size and MD5 of the file; False if its MD5 is unknown."""
        return (
            remote_item is not None
            and remote_item.size == path.stat().st_size
            and remote_item.md5 == md5_of(path).hex()
        )


def _urgency(name: str, tries: int) -> tuple[int, int, int, str]:
    """Return the sort key of the upload order, in which the files that a resumed run needs come first.

    The order is: record, numbered checkpoints, best checkpoint, other files such as images. Within each group, files
    with fewer failures come first, then newer checkpoints.
    """
    if name in RECORD:
        # mutation: upload-record-before-checkpoint
        return 0, tries, 0, name
    if not name.startswith(CHECKPOINTS):
        return 3, tries, 0, name
    step = checkpoint.step_of(Path(name).with_suffix(".safetensors"))
    return (1, tries, -step, name) if step is not None else (2, tries, 0, name)


def _log(message: str, level: int = logging.INFO) -> None:
    with contextlib.suppress(OcrnetError):  # the log file cannot be written; the uploads continue
        logger.log(level, message)


class UploadContext:
    """A context manager that uploads a run's results; its exit waits for the uploads, also after an exception.

    If files are not uploaded in time, the exit raises an `OcrnetError` that names them. They are kept in the run's
    folder. If the run ended with an unexpected exception, the message is logged instead.
    """

    def __init__(self, cloud: Cloud) -> None:
        self.seconds = cloud.push_timeout
        self._uploader: Uploader | None = None

    def start(self, uploader: Uploader) -> Uploader:
        """Start the uploads."""
        self._uploader = uploader
        uploader.start()
        return uploader

    def __enter__(self) -> "UploadContext":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._uploader is None:
            return
        with StopRequest(message="uploading the remaining files") as stopped:
            stopped.number = error.status - 128 if isinstance(error, Stopped) else None
            self._uploader.queue_files()
            # mutation: wait-for-uploads-at-end
            left = self._uploader.drain(self.seconds)
        if not left:
            checkpoint.prune(
                self._uploader.folder / CHECKPOINTS, self._uploader.keep
            )  # the old ones were kept until their upload
            return
        *names, last_failure = left
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        message = (
            f"not uploaded to {self._uploader.store.url} within {self.seconds} s (cloud.push_timeout): {listed}; last "
            f"failure: {last_failure}; all files are kept in {self._uploader.folder}; "
            "run the same command with --resume_ckpt auto to upload them"
        )
        if error is None or isinstance(error, (OcrnetError, Stopped)):
            first = f"{error}; also, " if isinstance(error, OcrnetError) else ""
            raise OcrnetError(first + message) from error
        _log(message, logging.ERROR)
