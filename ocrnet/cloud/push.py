"""Upload a run's files to train_url in a separate thread.

No training step waits for an upload, and no local checkpoint is removed before it or a newer one is uploaded.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from ocrnet.cloud.retry import LONGEST_PAUSE, pause, retry
from ocrnet.cloud.store import Item, Store, StoreError, md5_of
from ocrnet.config import Cloud
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.format import size_text
from ocrnet.utils.signals import Stopped, StopRequest
from ocrnet.weights import checkpoint

LONGEST_PAUSE_AT_THE_END = 5.0  # seconds between two tries once the run waits for its uploads
SAID_AGAIN_AFTER = 60.0  # seconds between two lines about failures; failures in between are counted
CONFIRMING = 3  # retries of the check that an upload has arrived, before the upload itself is retried

CHECKPOINTS = "checkpoint/"
PROBE = ".ocrnet"  # object that is written and removed at the start
RESULTS = ("eval.jsonl", "logs/eval.log")  # files of evaluations
RECORD = (  # files that a resumed run continues to write
    "config.yml", "starts.jsonl", "metrics.jsonl", "logs/train.log", "logs/wandb.json", "logs/mlflow.json"
)  # fmt: skip


def check_writable(store: Store, cloud: Cloud, say: Callable[[str], None]) -> None:
    """Check that the store is writable, before a run begins that could not upload anything.

    Args:
        store: The store of train_url.
        cloud: The settings for retries.
        say: Receives a line for each retry.

    Raises:
        OcrnetError: The test upload failed after all retries.
    """
    # mutation: check-upload-at-start
    retry(lambda: store.upload(b"ocrnet", PROBE), f"train_url {store.url}", retries=cloud.retries, say=say)
    with contextlib.suppress(StoreError):  # the permission to delete is not needed
        store.delete(PROBE)


class Push:
    """Uploads a run's folder: checkpoints when they are saved, small files with their content at that moment.

    The record is uploaded before the checkpoint of the same moment: a checkpoint in the store comes with every row and
    log line that precedes it. Failed uploads are retried for as long as the run lasts; `news` reports them.
    """

    def __init__(
        self, store: Store, folder: Path, cloud: Cloud, *, keep: int, patterns: Iterable[str] = ("**/*",)
    ) -> None:
        self.store, self.folder, self.keep = store, folder, keep
        self._cloud, self._patterns = cloud, tuple(patterns)
        self._work = threading.Condition()
        self._todo: dict[str, Path | bytes] = {}  # by name in the store; bytes are the content that a file had
        self._doing: str | None = None
        self._confirmed_step = -1
        self._remote: set[str] = set()  # checkpoints in the store, whoever uploaded them
        self._own: set[str] = set()  # the part of _remote that belongs to this folder
        self._tries: dict[str, int] = {}  # failed tries, by name
        self._seen: dict[str, tuple[int, int]] = {}  # size and modification time of the small files that were queued
        self._news: list[str] = []
        self._trouble = ""
        self._said_trouble, self._said = False, -SAID_AGAIN_AFTER
        self._failures = 0
        self._pushed = [0, 0]  # objects, bytes
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="push", daemon=True)

    def start(self) -> None:
        """Start the upload thread."""
        self._thread.start()

    def compare(self, remote: Iterable[Item]) -> None:
        """Queue the folder's checkpoints that the store, which holds ``remote``, lacks; call it before `start`.

        Of the numbered checkpoints only the newest ``keep`` (0: all) are compared, by size. The best one is compared by
        size and MD5.
        """
        there = {item.name: item for item in remote}
        self._remote = set(there)
        numbered = checkpoint.steps(self.folder / CHECKPOINTS)
        for path in numbered[-self.keep :] if self.keep else numbered:
            own = there.get(CHECKPOINTS + path.name)
            if own is not None and own.size == path.stat().st_size:
                self._confirmed_step = checkpoint.step_of(path) or 0
                self._own.add(own.name)
            else:
                self.checkpoint(path)
        for path in sorted((self.folder / CHECKPOINTS).glob("*_best_*.safetensors")):
            if not self._is_there(path, there.get(CHECKPOINTS + path.name)):
                self.checkpoint(path)

    def checkpoint(self, path: Path) -> None:
        """Queue a checkpoint, and the MindSpore file of the same name if it exists."""
        with self._work:
            for file in (path, path.with_suffix(".ckpt")):
                if file.exists():
                    self._todo[CHECKPOINTS + file.name] = file
            self._work.notify()

    def files(self) -> None:
        """Queue the small files that changed since the last call, with their present content."""
        taken: dict[str, bytes] = {}
        for path in sorted({path for pattern in self._patterns for path in self.folder.glob(pattern)}):
            name = path.relative_to(self.folder).as_posix()
            if name.startswith(CHECKPOINTS) or any(part.startswith(".") for part in name.split("/")):
                continue
            with contextlib.suppress(OSError):  # removed meanwhile, or not readable
                status = path.stat()
                version = (status.st_size, status.st_mtime_ns)
                if path.is_file() and self._seen.get(name) != version:
                    taken[name] = path.read_bytes()
                    self._seen[name] = version
        with self._work:
            self._todo |= taken
            self._work.notify()

    def unconfirmed(self) -> set[Path]:
        """Return the local checkpoints to keep: those newer than the newest one that is confirmed in the store."""
        with self._work:
            confirmed = self._confirmed_step
        files = checkpoint.steps(self.folder / CHECKPOINTS)
        return {path for path in files if (checkpoint.step_of(path) or 0) > confirmed}

    def news(self) -> list[str]:
        """Return the lines to log since the last call."""
        with self._work:
            told, self._news = self._news, []
        return told

    def drain(self, seconds: float, say: Callable[[str], None]) -> list[str]:
        """End the thread after the last upload; wait for this at most ``seconds``.

        Return the names that are not uploaded, followed by the last failure; return an empty list if all are uploaded.
        """
        with self._work:
            self._ending = True
            left = len(self._todo) + (self._doing is not None)
            self._work.notify_all()
        if left:
            say(f"upload: {left} files are not yet uploaded to {self.store.url}; waiting at most {seconds:.0f} s")
        end = time.monotonic() + seconds
        # mutation: bound-wait-for-uploads
        while self._thread.is_alive() and time.monotonic() < end:
            self._thread.join(min(1.0, max(0.01, end - time.monotonic())))
            for line in self.news():
                say(line)
        for line in self.news():
            say(line)
        with self._work:
            names = sorted(self._todo.keys() | ({self._doing} if self._doing else set()))
            objects, size = self._pushed
            trouble = self._trouble
        if not names:
            failures = f"; {self._failures} tries failed" if self._failures else ""
            say(f"upload: {objects} files, {size_text(size)}, uploaded to {self.store.url}{failures}")
            return []
        return [*names, trouble or "timeout"]

    def _run(self) -> None:
        while (found := self._next()) is not None:
            name, source = found
            try:
                size = self._push(name, source)
            except Exception as error:  # of any type: the file is still in the folder, and the run continues
                self._failed(name, source, error)
            else:
                self._succeeded(name, size)

    def _next(self) -> tuple[str, Path | bytes] | None:
        """Wait for work and take the most urgent file; return None at the end."""
        with self._work:
            while not self._todo:
                if self._ending:
                    return None
                self._work.wait()
            # mutation: refused-file-blocks-nothing
            self._doing = name = min(self._todo, key=lambda name: _urgency(name, self._tries.get(name, 0)))
            return name, self._todo.pop(name)

    def _push(self, name: str, source: Path | bytes) -> int:
        """Upload a file and confirm it; return its size, or 0 if the file is gone or outdated."""
        if isinstance(source, Path) and (not source.exists() or self._is_outdated(name)):
            return 0
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        self.store.upload(source, name)
        found = retry(lambda: self.store.stat(name), name, retries=CONFIRMING, say=self._count_failure)
        # mutation: confirm-upload
        if found is None or found.size != size:
            says = f"has {found.size:,} bytes" if found else "does not exist"
            raise StoreError(f"{size:,} bytes were uploaded, but the object in the store {says}")
        if found.md5 and self._cloud.checksum and found.md5 != md5_of(source).hex():
            raise StoreError(
                f"the object in the store has the MD5 {found.md5}, not that of the file; if the bucket's encryption is "
                "the reason, set cloud.checksum: False"
            )
        return size

    def _count_failure(self, line: str) -> None:
        self._failures += 1  # only this thread changes it

    def _is_outdated(self, name: str) -> bool:
        """Return whether ``keep`` newer checkpoints of this folder are already in the store."""
        step = checkpoint.step_of(Path(name).with_suffix(".safetensors"))
        if step is None or not self.keep:
            return False
        newer = [other for other in self._own if (checkpoint.step_of(other) or 0) > step]
        return len(newer) >= self.keep

    def _failed(self, name: str, source: Path | bytes, error: Exception) -> None:
        with self._work:
            self._tries[name] = tries = self._tries.get(name, 0) + 1
            seconds = min(pause(tries), LONGEST_PAUSE_AT_THE_END if self._ending else LONGEST_PAUSE)
            self._doing = None
            self._todo.setdefault(name, source)  # unless a newer version is already queued
            known = isinstance(error, (StoreError, OcrnetError))
            self._trouble = f"{name}: {error if known else repr(error)}"
            self._failures += 1
            if time.monotonic() - self._said > SAID_AGAIN_AFTER:
                self._said, self._said_trouble = time.monotonic(), True
                self._news.append(
                    f"upload: {self._trouble}; the file is kept, retrying in {seconds:.1f} s "
                    f"(failures so far: {self._failures})"
                )
            if not self._ending:
                self._work.wait_for(lambda: self._ending, seconds)
                return
        time.sleep(seconds)

    def _succeeded(self, name: str, size: int) -> None:
        step = checkpoint.step_of(name)
        with self._work:
            if self._said_trouble:
                self._news.append(f"upload: {self.store.url} accepts files again")
            self._trouble, self._said_trouble = "", False
            self._tries.pop(name, None)
            self._doing = None
            if size:
                self._pushed = [self._pushed[0] + 1, self._pushed[1] + size]
            if size and name.startswith(CHECKPOINTS):
                self._news.append(f"uploaded {self.store.url}/{name} ({size_text(size)})")
                self._remote.add(name)
            if size and step is not None:
                self._confirmed_step = max(self._confirmed_step, step)
                self._own.add(name)
        if size and step is not None and self.keep:
            self._prune(step)

    def _prune(self, newest: int) -> None:
        """Remove old checkpoints from the store, as the run does from its folder.

        Of the checkpoints up to step ``newest``, the newest ``keep`` stay. Checkpoints of later steps are not removed.
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
                        say=self._count_failure,
                    )
                    self._remote.discard(twin)
                except OcrnetError as error:  # retried at the next call
                    with self._work:
                        self._news.append(str(error))

    @staticmethod
    def _is_there(path: Path, own: Item | None) -> bool:
        """Return whether the store's object equals the file in size and MD5; without an MD5 return False."""
        return own is not None and own.size == path.stat().st_size and own.md5 == md5_of(path).hex()


def _urgency(name: str, tries: int) -> tuple[int, int, int, str]:
    """Return the sort key by which a new machine needs the files; smaller is more urgent.

    The order is: record, numbered checkpoints, best checkpoint, other files (such as pictures). Within a kind, files
    with fewer failures come first, then newer checkpoints.
    """
    if name in RECORD:
        # mutation: upload-record-before-checkpoint
        return 0, tries, 0, name
    if not name.startswith(CHECKPOINTS):
        return 3, tries, 0, name
    step = checkpoint.step_of(Path(name).with_suffix(".safetensors"))
    return (1, tries, -step, name) if step is not None else (2, tries, 0, name)


class Pushing:
    """Uploads a run's results within ``with``; the exit waits for the uploads, however the run ended.

    Files that are then not in the store raise an `OcrnetError` that names them; they remain in the run's folder. If the
    run ended with an unexpected exception, the message is printed to stderr instead.
    """

    def __init__(self, cloud: Cloud) -> None:
        self.seconds = cloud.push_timeout
        self._push: Push | None = None

    def begin(self, push: Push, say: Callable[[str], None]) -> Push:
        """Start the uploads; ``say`` receives the lines to log at the end."""
        self._push, self._tell = push, say
        push.start()
        return push

    def _say(self, line: str) -> None:
        try:
            self._tell(line)
        except OcrnetError:  # the log cannot be written; the uploads continue
            print(line, flush=True)

    def __enter__(self) -> "Pushing":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._push is None:
            return
        with StopRequest(what="uploading the remaining files") as stopped:
            stopped.number = error.status - 128 if isinstance(error, Stopped) else None
            self._push.files()
            # mutation: wait-for-uploads-at-end
            left = self._push.drain(self.seconds, self._say)
        if not left:
            checkpoint.prune(self._push.folder / CHECKPOINTS, self._push.keep)  # those kept until their upload
            return
        *names, trouble = left
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        message = (
            f"not uploaded to {self._push.store.url} within {self.seconds} s (cloud.push_timeout): {listed}; last "
            f"failure: {trouble}; all files are kept in {self._push.folder}; "
            "run the same command with --resume_ckpt auto to upload them"
        )
        if error is None or isinstance(error, (OcrnetError, Stopped)):
            first = f"{error}; moreover, " if isinstance(error, OcrnetError) else ""
            raise OcrnetError(first + message) from error
        print(f"error: {message}", file=sys.stderr)
