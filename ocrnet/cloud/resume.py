"""Resume a run from its uploads: the newest valid checkpoint in save_dir or train_url, and its record."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from ocrnet.cloud.cache import Pulled, Say, alone, fetch, is_first
from ocrnet.cloud.factory import open_store
from ocrnet.cloud.push import CHECKPOINTS, RECORD, RESULTS
from ocrnet.cloud.retry import retry
from ocrnet.cloud.store import Item, Store
from ocrnet.config import Cloud, Config
from ocrnet.utils import urls
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.format import size_text
from ocrnet.weights import checkpoint

# mutation: download-damaged-copy-again
TRIES = 2  # download a damaged copy once more, in case the transfer damaged it


def numbered(cfg: Config, store: Store, say: Say) -> dict[int, Item]:
    """Return the numbered checkpoints in train_url.

    Args:
        cfg: The config.
        store: The store of train_url.
        say: Receives a line for each retry.

    Returns:
        The checkpoints by step.

    Raises:
        OcrnetError: The listing failed after all retries.
    """
    items = retry(lambda: store.list(CHECKPOINTS), f"train_url {cfg.train_url}", retries=cfg.cloud.retries, say=say)
    return {step: item for item in items if (step := checkpoint.step_of(item.name)) is not None}


def begin(cfg: Config, resume: str | None, say: Say) -> tuple[Store | None, str | None, list[str]]:
    """Open the store of train_url; with ``auto``, ensure that save_dir has the newest valid checkpoint.

    Args:
        cfg: The config.
        resume: The value of ``--resume_ckpt``, or None. None means ``auto`` if enable_modelarts and train_url are set.
        say: Receives progress lines.

    Returns:
        The store, or None without train_url; what to resume from; and the lines to log.

    Raises:
        OcrnetError: The store is not available, or a fresh start would mix with an earlier run's checkpoints in
            train_url.
    """
    if not cfg.train_url:
        return None, resume, []
    store = open_store(urls.parse("train_url", cfg.train_url), cfg.cloud)
    lines = []
    if resume is None and cfg.enable_modelarts:
        resume = "auto"
        lines.append("resume: auto, because of enable_modelarts with train_url")
    if resume == "auto":
        # mutation: look-for-remote-checkpoint
        brought = download(cfg, store, say)
        for line in brought if not is_first(say) else ():
            say(line)
        return store, resume, [*lines, *brought]
    if resume is None and numbered(cfg, store, say):
        raise OcrnetError(
            f"train_url {cfg.train_url} holds checkpoints of an earlier run; resume from them with --resume_ckpt auto, "
            "or give another --train_url"
        )
    return store, resume, lines


def download(cfg: Config, store: Store, say: Say) -> list[str]:
    """Download the newest valid checkpoint from train_url to save_dir, unless save_dir has one that is as new.

    Its record (metrics, log) and the best checkpoint are downloaded with it. A damaged checkpoint is skipped and
    logged.

    Args:
        cfg: The config.
        store: The store of train_url.
        say: Receives progress lines.

    Returns:
        The lines to log.

    Raises:
        OcrnetError: The store does not respond. Resuming from older weights instead would lose the steps between.
    """
    folder = Path(cfg.save_dir)
    with alone(folder / ".pull.lock", lambda: _tell_of_other(say)):
        remote = numbered(cfg, store, say)
        local = {checkpoint.step_of(path) or 0: path for path in checkpoint.steps(folder / "checkpoint")}
        lines: list[str] = []
        for step in sorted(remote.keys() | local.keys(), reverse=True):
            if step in local and _is_valid(local[step]):
                return lines
            if step in remote:
                why = _fetched(store, remote[step], folder, cfg.cloud, say)
                if not why:
                    size = size_text(remote[step].size)
                    return [*lines, f"resume: {store.url}/{remote[step].name} ({size}) is downloaded to {folder}"]
                lines.append(f"resume: skipped: {store.url}/{remote[step].name}: {why}")
    return lines


def _tell_of_other(say: Say) -> None:
    if is_first(say):
        say("resume: another process on this machine is searching train_url")


def bring_results(cfg: Config, store: Store, say: Say) -> None:
    """Prepend the results of earlier evaluations in train_url to those in save_dir, so that the upload keeps them.

    Lines that save_dir already has are not repeated.

    Args:
        cfg: The config.
        store: The store of train_url.
        say: Receives a line for each retry.

    Raises:
        OcrnetError: A file cannot be downloaded.
    """
    for name in RESULTS:
        item = retry(
            lambda name=name: store.stat(name),  # type: ignore[misc]
            f"{store.url}/{name}",
            retries=cfg.cloud.retries,
            say=say,
        )
        if item is None:
            continue
        target = Path(cfg.save_dir) / name
        draft = target.with_name(f".{target.name}.brought")
        fetch(store, item, draft, cfg.cloud, sums={}, say=say, pulled=Pulled())
        there = draft.read_text(encoding="utf-8").splitlines(keepends=True)
        here = target.read_text(encoding="utf-8").splitlines(keepends=True) if target.exists() else []
        draft.write_text("".join([line for line in there if line not in set(here)] + here), encoding="utf-8")
        os.replace(draft, target)


def _is_valid(path: Path) -> bool:
    try:
        checkpoint.load(path)
    except OcrnetError:
        return False
    return True


def _fetched(store: Store, item: Item, folder: Path, cloud: Cloud, say: Say) -> str:
    """Download a checkpoint; return why it is not valid, or an empty string.

    A valid one gets its name in save_dir only after its record is downloaded.
    """
    target = folder / item.name
    draft = target.with_name(f".{target.name}.brought")
    by_content = dataclasses.replace(cloud, checksum=False)  # a checkpoint contains its own sha256
    why = ""
    for _ in range(TRIES):
        fetch(store, item, draft, by_content, sums={}, say=say, pulled=Pulled())
        try:
            # mutation: skip-damaged-remote-checkpoint
            checkpoint.load(draft)
        except OcrnetError as error:
            why = str(error).replace(str(draft), item.name)
            draft.unlink()
            continue
        # mutation: download-record-with-checkpoint
        _bring_record(store, folder, cloud, say)
        os.replace(draft, target)
        return ""
    return why


def _bring_record(store: Store, folder: Path, cloud: Cloud, say: Say) -> None:
    """Download the files that a resumed run continues to write, and the best checkpoints.

    Local files of another start are kept next to them with the suffix ``.before``.
    """
    best = [item for item in retry(lambda: store.list(CHECKPOINTS), store.url, retries=cloud.retries, say=say)
            if "_best_" in item.name]  # fmt: skip
    items: Sequence[Item | None] = [
        *best,
        *(retry(lambda name=name: store.stat(name), f"{store.url}/{name}", retries=cloud.retries, say=say)  # type: ignore[misc]
          for name in RECORD),
    ]  # fmt: skip
    for item in filter(None, items):
        target = folder / item.name
        draft = target.with_name(f".{target.name}.brought")
        fetch(store, item, draft, cloud, sums={}, say=say, pulled=Pulled())
        if target.exists():
            os.replace(target, target.with_name(f"{target.name}.before"))
        os.replace(draft, target)
