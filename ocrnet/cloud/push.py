"""What a run writes goes to train_url by a thread of its own: no step waits for it, no local copy goes before it."""

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

LONGEST_PAUSE_AT_THE_END = 5.0  # seconds between two tries once the run waits for them
SAID_AGAIN_AFTER = 60.0  # seconds between two lines about failures; those between are counted
CONFIRMING = 3  # how often the question whether a file has arrived is asked again before it is pushed again

CHECKPOINTS = "checkpoint/"
PROBE = ".ocrnet"  # written and removed at the start
RESULTS = ("eval.jsonl", "logs/eval.log")  # of evaluations
RECORD = (  # what a resumed run goes on writing
    "config.yml", "starts.jsonl", "metrics.jsonl", "logs/train.log", "logs/wandb.json", "logs/mlflow.json"
)  # fmt: skip


def check_writable(store: Store, cloud: Cloud, say: Callable[[str], None]) -> None:
    """Raise `OcrnetError` where nothing can be written to the store, before a run begins that could push nothing."""
    # mutation: check-upload-at-start
    retry(lambda: store.upload(b"ocrnet", PROBE), f"train_url {store.url}", retries=cloud.retries, say=say)
    with contextlib.suppress(StoreError):  # the right to remove is not needed
        store.delete(PROBE)


class Push:
    """Pushes a run's folder: checkpoints as they are made, the small files as they are at that moment.

    The record goes before the checkpoint of its moment: whoever finds a checkpoint in the store finds every row and
    line that belongs before it. Failures are tried again for as long as the run lasts; `news` tells of them.
    """

    def __init__(
        self, store: Store, folder: Path, cloud: Cloud, *, keep: int, patterns: Iterable[str] = ("**/*",)
    ) -> None:
        self.store, self.folder, self.keep = store, folder, keep
        self._cloud, self._patterns = cloud, tuple(patterns)
        self._work = threading.Condition()
        self._todo: dict[str, Path | bytes] = {}  # by name in the store; bytes are a file as it was
        self._doing: str | None = None
        self._confirmed_step = -1
        self._remote: set[str] = set()  # checkpoints that are in the store, whoever pushed them
        self._own: set[str] = set()  # and those among them that are this folder's
        self._tries: dict[str, int] = {}  # that failed, by name
        self._seen: dict[str, tuple[int, int]] = {}  # size and time of the small files that were taken
        self._news: list[str] = []
        self._trouble = ""
        self._said_trouble, self._said = False, -SAID_AGAIN_AFTER
        self._failures = 0
        self._pushed = [0, 0]  # objects, bytes
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="push", daemon=True)

    def start(self) -> None:
        """Begin to push what is asked for."""
        self._thread.start()

    def compare(self, remote: Iterable[Item]) -> None:
        """Push what the store, which holds ``remote``, lacks of the folder's checkpoints. Call it before `start`."""
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
        """Push a checkpoint, and MindSpore's file of the same name where there is one."""
        with self._work:
            for file in (path, path.with_suffix(".ckpt")):
                if file.exists():
                    self._todo[CHECKPOINTS + file.name] = file
            self._work.notify()

    def files(self) -> None:
        """Push the small files of the folder that changed since the last call, as they are now."""
        taken: dict[str, bytes] = {}
        for path in sorted({path for pattern in self._patterns for path in self.folder.glob(pattern)}):
            name = path.relative_to(self.folder).as_posix()
            if name.startswith(CHECKPOINTS) or any(part.startswith(".") for part in name.split("/")):
                continue
            with contextlib.suppress(OSError):  # gone again, or not ours to read
                status = path.stat()
                version = (status.st_size, status.st_mtime_ns)
                if path.is_file() and self._seen.get(name) != version:
                    taken[name] = path.read_bytes()
                    self._seen[name] = version
        with self._work:
            self._todo |= taken
            self._work.notify()

    def unconfirmed(self) -> set[Path]:
        """Return the local checkpoints that must stay: neither they nor newer ones are known to be in the store."""
        with self._work:
            confirmed = self._confirmed_step
        files = checkpoint.steps(self.folder / CHECKPOINTS)
        return {path for path in files if (checkpoint.step_of(path) or 0) > confirmed}

    def news(self) -> list[str]:
        """Return what there is to say since the last call."""
        with self._work:
            told, self._news = self._news, []
        return told

    def drain(self, seconds: float, say: Callable[[str], None]) -> list[str]:
        """Wait until all is pushed, at most so long, and end the thread; return what is not, with the last reason."""
        with self._work:
            self._ending = True
            left = len(self._todo) + (self._doing is not None)
            self._work.notify_all()
        if left:
            say(f"push: {left} files are still to be pushed to {self.store.url}; waiting at most {seconds:.0f} s")
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
            failures = f"; {self._failures} tries failed on the way" if self._failures else ""
            say(f"push: {objects} files, {size_text(size)}, went to {self.store.url}{failures}")
            return []
        return [*names, trouble or "there was not enough time"]

    def _run(self) -> None:
        while (found := self._next()) is not None:
            name, source = found
            try:
                size = self._push(name, source)
            except Exception as error:  # of whatever kind: the file is here, and the run goes on
                self._failed(name, source, error)
            else:
                self._succeeded(name, size)

    def _next(self) -> tuple[str, Path | bytes] | None:
        """Wait for work and take what matters most; None at the end."""
        with self._work:
            while not self._todo:
                if self._ending:
                    return None
                self._work.wait()
            # mutation: refused-file-blocks-nothing
            self._doing = name = min(self._todo, key=lambda name: _urgency(name, self._tries.get(name, 0)))
            return name, self._todo.pop(name)

    def _push(self, name: str, source: Path | bytes) -> int:
        """Upload and confirm; return the size, or 0 where the file is gone or no longer wanted."""
        if isinstance(source, Path) and (not source.exists() or self._is_outdated(name)):
            return 0
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        self.store.upload(source, name)
        found = retry(lambda: self.store.stat(name), name, retries=CONFIRMING, say=self._count_failure)
        # mutation: confirm-upload
        if found is None or found.size != size:
            says = f"{found.size:,} bytes" if found else "nothing"
            raise StoreError(f"{size:,} bytes were pushed, but the store says that it has {says}")
        if found.md5 and self._cloud.checksum and found.md5 != md5_of(source).hex():
            raise StoreError(
                f"what the store has, has the MD5 {found.md5}, not that of the file; where the bucket's encryption is "
                "the reason: cloud.checksum: False"
            )
        return size

    def _count_failure(self, line: str) -> None:
        self._failures += 1  # by this thread alone

    def _is_outdated(self, name: str) -> bool:
        """Say whether enough newer checkpoints are in the store."""
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
            self._todo.setdefault(name, source)  # unless there is a newer version by now
            known = isinstance(error, (StoreError, OcrnetError))
            self._trouble = f"{name}: {error if known else repr(error)}"
            self._failures += 1
            if time.monotonic() - self._said > SAID_AGAIN_AFTER:
                self._said, self._said_trouble = time.monotonic(), True
                self._news.append(
                    f"push: {self._trouble}; it stays here, and is tried again in {seconds:.1f} s "
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
                self._news.append(f"push: {self.store.url} takes files again")
            self._trouble, self._said_trouble = "", False
            self._tries.pop(name, None)
            self._doing = None
            if size:
                self._pushed = [self._pushed[0] + 1, self._pushed[1] + size]
            if size and name.startswith(CHECKPOINTS):
                self._news.append(f"pushed {self.store.url}/{name} ({size_text(size)})")
                self._remote.add(name)
            if size and step is not None:
                self._confirmed_step = max(self._confirmed_step, step)
                self._own.add(name)
        if size and step is not None and self.keep:
            self._prune(step)

    def _prune(self, newest: int) -> None:
        """Remove from the store what the run removes from its folder: older ones than the newest, and no others."""
        # mutation: prune-older-steps-only
        older = sorted(
            (step, name) for name in self._remote if (step := checkpoint.step_of(name)) is not None and step <= newest
        )
        for _, name in older[: -self.keep]:
            for twin in self._remote & {name, str(Path(name).with_suffix(".ckpt"))}:
                try:
                    retry(
                        lambda twin=twin: self.store.delete(twin),  # type: ignore[misc]
                        f"push: removing {self.store.url}/{twin}",
                        retries=self._cloud.retries,
                        say=self._count_failure,
                    )
                    self._remote.discard(twin)
                except OcrnetError as error:  # next time
                    with self._work:
                        self._news.append(str(error))

    @staticmethod
    def _is_there(path: Path, own: Item | None) -> bool:
        """Say whether the store's object is this very file; where it tells no MD5, that is not known."""
        return own is not None and own.size == path.stat().st_size and own.md5 == md5_of(path).hex()


def _urgency(name: str, tries: int) -> tuple[int, int, int, str]:
    """Order by what a new machine needs first: record, newest checkpoint, older ones, the best, pictures.

    Of one kind, what failed less often goes first.
    """
    if name in RECORD:
        # mutation: upload-record-before-checkpoint
        return 0, tries, 0, name
    if not name.startswith(CHECKPOINTS):
        return 3, tries, 0, name
    step = checkpoint.step_of(Path(name).with_suffix(".safetensors"))
    return (1, tries, -step, name) if step is not None else (2, tries, 0, name)


class Pushing:
    """Within ``with``, a run's results are on their way; at its end the run waits for them, however it ended.

    What then is not in the store is an `OcrnetError` that names it: it is in the run's folder.
    """

    def __init__(self, cloud: Cloud) -> None:
        self.seconds = cloud.push_timeout
        self._push: Push | None = None

    def begin(self, push: Push, say: Callable[[str], None]) -> Push:
        """Start pushing; ``say`` gets what there is to tell at the end."""
        self._push, self._tell = push, say
        push.start()
        return push

    def _say(self, line: str) -> None:
        try:
            self._tell(line)
        except OcrnetError:  # the log cannot be written, which is no reason not to push
            print(line, flush=True)

    def __enter__(self) -> "Pushing":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._push is None:
            return
        with StopRequest(what="still pushing what is left") as stopped:
            stopped.number = error.status - 128 if isinstance(error, Stopped) else None
            self._push.files()
            # mutation: wait-for-uploads-at-end
            left = self._push.drain(self.seconds, self._say)
        if not left:
            checkpoint.prune(self._push.folder / CHECKPOINTS, self._push.keep)  # what stayed until it was pushed
            return
        *names, trouble = left
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        message = (
            f"not pushed to {self._push.store.url} within {self.seconds} s (cloud.push_timeout): {listed}; the last "
            f"reason: {trouble}; all of it is in {self._push.folder}: the same command with --resume_ckpt auto "
            "pushes it"
        )
        if error is None or isinstance(error, (OcrnetError, Stopped)):
            first = f"{error}; moreover, " if isinstance(error, OcrnetError) else ""
            raise OcrnetError(first + message) from error
        print(f"error: {message}", file=sys.stderr)
