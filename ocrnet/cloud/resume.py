"""Resume a run from its uploaded files: the newest valid checkpoint of save_dir and train_url, and its record.

The record of a run consists of its config, metrics and log files (`RECORD` of `ocrnet.cloud.push`).
"""

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from ocrnet.cloud.cache import DownloadProgress, download_object, lock_process
from ocrnet.cloud.factory import open_store
from ocrnet.cloud.push import CHECKPOINTS, RECORD, RESULTS
from ocrnet.cloud.retry import retry
from ocrnet.cloud.store import Item, Store
from ocrnet.config import Cloud, Config
from ocrnet.utils import urls
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.format import size_text
from ocrnet.utils.log import ANY_RANK, EACH_MACHINE
from ocrnet.weights import checkpoint

logger = logging.getLogger(__name__)

# mutation: download-damaged-copy-again
DOWNLOAD_TRIES = 2  # a damaged checkpoint is downloaded again once, because the transfer may have damaged it


def remote_checkpoints(cfg: Config, store: Store) -> dict[int, Item]:
    """Return the numbered checkpoints in train_url.

    Args:
        cfg: The config.
        store: The store of train_url.

    Returns:
        The objects of the checkpoints, by step.

    Raises:
        OcrnetError: The listing failed after all retries.
    """
    items = retry(lambda: store.list(CHECKPOINTS), f"train_url {cfg.train_url}", retries=cfg.cloud.retries)
    return {step: item for item in items if (step := checkpoint.step_of(item.name)) is not None}


def open_train_url(cfg: Config, resume: str | None) -> tuple[Store | None, str | None]:
    """Open the store of train_url; with ``auto``, download its newest valid checkpoint if save_dir lacks it.

    Args:
        cfg: The config.
        resume: The value of ``--resume_ckpt``, or None. None means ``auto`` if enable_modelarts and train_url are set.

    Returns:
        The store, or None without train_url; and the value of ``--resume_ckpt`` to use.

    Raises:
        OcrnetError: The store is not available, or the run would start at step 0 and train_url already holds
            checkpoints of an earlier run.
    """
    if not cfg.train_url:
        return None, resume
    store = open_store(urls.parse("train_url", cfg.train_url), cfg.cloud)
    if resume is None and cfg.enable_modelarts:
        resume = "auto"
        logger.info("resume: auto, because of enable_modelarts with train_url")
    if resume == "auto":
        # mutation: look-for-remote-checkpoint
        download_newest(cfg, store)
        return store, resume
    if resume is None and remote_checkpoints(cfg, store):
        raise OcrnetError(
            f"train_url {cfg.train_url} holds checkpoints of an earlier run; resume from them with --resume_ckpt auto, "
            "or give another --train_url"
        )
    return store, resume


def download_newest(cfg: Config, store: Store) -> None:
    """Download the newest valid checkpoint from train_url, unless save_dir has one of the same or a later step.

    The record of the run and its best checkpoint are downloaded too. A damaged checkpoint is skipped and logged.

    Args:
        cfg: The config.
        store: The store of train_url.

    Raises:
        OcrnetError: The store does not respond. The run does not resume from an older local checkpoint, because that
            would lose the steps in between.
    """
    folder = Path(cfg.save_dir)
    with lock_process(folder / ".pull.lock", _log_other_search):
        remote = remote_checkpoints(cfg, store)
        local = {checkpoint.step_of(path) or 0: path for path in checkpoint.steps(folder / "checkpoint")}
        for step in sorted(remote.keys() | local.keys(), reverse=True):
            if step in local and _is_valid(local[step]):
                return
            if step in remote:
                failure = _download_checkpoint(store, remote[step], folder, cfg.cloud)
                if not failure:
                    size = size_text(remote[step].size)
                    message = f"resume: {store.url}/{remote[step].name} ({size}) is downloaded to {folder}"
                    logger.info(message, extra=ANY_RANK)
                    return
                logger.warning(f"resume: skipped: {store.url}/{remote[step].name}: {failure}", extra=ANY_RANK)


def _log_other_search() -> None:
    logger.info("resume: another process on this machine is searching train_url", extra=EACH_MACHINE)


def merge_remote_results(cfg: Config, store: Store) -> None:
    """Merge the results of earlier evaluations in train_url into the files in save_dir, which are uploaded later.

    Lines that are only in train_url are inserted before the lines in save_dir.

    Args:
        cfg: The config.
        store: The store of train_url.

    Raises:
        OcrnetError: A file cannot be downloaded.
    """
    for name in RESULTS:
        item = retry(
            lambda name=name: store.stat(name),  # type: ignore[misc]
            f"{store.url}/{name}",
            retries=cfg.cloud.retries,
        )
        if item is None:
            continue
        target = Path(cfg.save_dir) / name
        temporary = target.with_name(f".{target.name}.brought")
        download_object(store, item, temporary, cfg.cloud, checksums={}, progress=DownloadProgress())
        remote_lines = temporary.read_text(encoding="utf-8").splitlines(keepends=True)
        local_lines = target.read_text(encoding="utf-8").splitlines(keepends=True) if target.exists() else []
        temporary.write_text(
            "".join([line for line in remote_lines if line not in set(local_lines)] + local_lines), encoding="utf-8"
        )
        os.replace(temporary, target)


def _is_valid(path: Path) -> bool:
    """Return whether a local checkpoint loads."""
    try:
        checkpoint.load(path)
    except OcrnetError:
        return False
    return True


def _download_checkpoint(store: Store, item: Item, folder: Path, cloud: Cloud) -> str:
    """Download a checkpoint and its record; return why it is not valid, or an empty string if it is valid.

    A valid checkpoint gets its final name in save_dir only after its record is downloaded.
    """
    target = folder / item.name
    temporary = target.with_name(f".{target.name}.brought")
    without_md5 = dataclasses.replace(cloud, checksum=False)  # a checkpoint contains its own sha256
    failure = ""
    for _ in range(DOWNLOAD_TRIES):
        download_object(store, item, temporary, without_md5, checksums={}, progress=DownloadProgress())
        try:
            # mutation: skip-damaged-remote-checkpoint
            checkpoint.load(temporary)
        except OcrnetError as error:
            failure = str(error).replace(str(temporary), item.name)
            temporary.unlink()
            continue
        # mutation: download-record-with-checkpoint
        _download_record(store, folder, cloud)
        os.replace(temporary, target)
        return ""
    return failure


def _download_record(store: Store, folder: Path, cloud: Cloud) -> None:
    """Download the files that a resumed run appends to, and the best checkpoints.

    An existing local file is renamed with the suffix ``.before``.
    """
    best = [item for item in retry(lambda: store.list(CHECKPOINTS), store.url, retries=cloud.retries)
            if "_best_" in item.name]  # fmt: skip
    items: Sequence[Item | None] = [
        *best,
        *(retry(lambda name=name: store.stat(name), f"{store.url}/{name}", retries=cloud.retries)  # type: ignore[misc]
          for name in RECORD),
    ]  # fmt: skip
    for item in filter(None, items):
        target = folder / item.name
        temporary = target.with_name(f".{target.name}.brought")
        download_object(store, item, temporary, cloud, checksums={}, progress=DownloadProgress())
        if target.exists():
            os.replace(target, target.with_name(f"{target.name}.before"))
        os.replace(temporary, target)
