"""Download the files of data_url and ckpt_url, once per machine for all its processes."""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

from ocrnet.cloud.cache import CHECKSUM_FILE, Cache, read_checksums
from ocrnet.cloud.factory import open_store
from ocrnet.cloud.folder import FolderStore
from ocrnet.cloud.retry import retry
from ocrnet.cloud.store import Item, Store
from ocrnet.config import Cloud, Config, Data
from ocrnet.utils import urls
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.log import ANY_RANK
from ocrnet.utils.urls import Url
from ocrnet.weights import checkpoint

logger = logging.getLogger(__name__)


def download_dataset(cfg: Config) -> Config:
    """Make the dataset of ``data_url`` available in a local folder.

    A ``data_url`` that is the path of a local folder is used in place, unless the folder contains only tars. Any other
    ``data_url`` is downloaded to the cache, and tars are unpacked there. Files that are already in the cache are not
    downloaded again.

    Returns:
        The config with ``data.dataset_dir`` set to the local folder.

    Raises:
        OcrnetError: The data cannot be downloaded or unpacked.
    """
    if not cfg.data_url:
        return cfg
    url = urls.parse("data_url", cfg.data_url)
    if not url.scheme and Path(url.path).is_dir() and not _only_tars(Path(url.path)):
        folder = Path(url.path)
        logger.info(f"data_url: {url.path} is a local folder and is used in place")
    else:
        folder = _download(url, cfg.cloud)
    folder = _data_root(folder, cfg.data.dataset_dir)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dataset_dir=str(folder)))


def _only_tars(folder: Path) -> bool:
    """Return whether a folder contains tars and, except for a checksum file, nothing else."""
    names = [path.name for path in folder.iterdir() if path.name != CHECKSUM_FILE]
    return bool(names) and all(name.endswith(urls.ARCHIVES) for name in names)


def _data_root(folder: Path, dataset_dir: str) -> Path:
    """Return the folder of the dataset in a downloaded folder.

    As in the public MindSpore scripts, dataset_dir may name a subfolder. Otherwise, a single subfolder is used.
    """
    subfolder = folder / dataset_dir
    if dataset_dir != Data.dataset_dir and not Path(dataset_dir).is_absolute() and subfolder.is_dir():
        logger.info(f"data.dataset_dir: {dataset_dir}, a subfolder of data_url")
        return subfolder
    if dataset_dir != Data.dataset_dir and Path(dataset_dir) != folder:
        logger.info(f"data.dataset_dir: {dataset_dir} is ignored; the data come from data_url")
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if len(entries) == 1 and entries[0].is_dir() and entries[0].name not in ("leftImg8bit", "images"):
        logger.info(f"data.dataset_dir: {entries[0]}, the only folder in data_url")
        return entries[0]
    return folder


def _download(url: Url, cloud: Cloud) -> Path:
    cache = Cache(url, cloud)
    with cache.lock():
        store = open_store(url.parent if url.is_archive else url, cloud)
        items = _list_objects(store, url, cloud)
        checksum_item = next((item for item in items if item.name == CHECKSUM_FILE), None)
        files = [item for item in items if item.name != CHECKSUM_FILE]
        checksums = read_checksums(store, cloud, checksum_item)
        if unknown := checksums.keys() - {item.name for item in files} if not url.is_archive else set():
            raise OcrnetError(
                f"{url}: {CHECKSUM_FILE} names '{min(unknown)}', which is missing; the upload may be incomplete"
            )
        if all(item.name.endswith(urls.ARCHIVES) for item in files):
            _download_and_unpack(cache, store, files, checksums)
        else:
            cache.download(store, files, checksums)
            cache.remove_stale_files(files)
        return cache.folder


def _list_objects(store: Store, url: Url, cloud: Cloud) -> list[Item]:
    """Return the objects to download: a tar and the checksum file next to it, or everything in a folder."""

    def stat(name: str) -> Item | None:
        return retry(lambda: store.stat(name), f"data_url {url}", retries=cloud.retries)

    if url.is_archive:
        archive = stat(url.name)
        if archive is None:
            retry(lambda: store.list(url.name), f"data_url {url}", retries=cloud.retries)  # checks the bucket
            raise OcrnetError(f"data_url {url}: object not found; check the name, and that the upload is complete")
        return [item for item in (archive, stat(CHECKSUM_FILE)) if item]
    items = retry(store.list, f"data_url {url}", retries=cloud.retries)
    if not items:
        missing = isinstance(store, FolderStore) and not store.folder.exists()
        problem = "the folder does not exist" if missing else "the folder is empty"
        raise OcrnetError(f"data_url {url}: {problem}; check the name, or give an archive ({', '.join(urls.ARCHIVES)})")
    return items


def _download_and_unpack(cache: Cache, store: Store, archives: Sequence[Item], checksums: dict[str, str]) -> None:
    """Download the tars, unpack them into the cache's folder, and remove the tars.

    The folder gets its final name only when all tars are unpacked.
    """
    folder = cache.folder
    marker = folder.with_name(f"{folder.name}.unpacked")
    listing = json.dumps([[item.name, item.size, item.etag] for item in archives])
    with contextlib.suppress(OSError):
        if marker.read_text(encoding="utf-8") == listing and folder.is_dir():
            logger.info(f"{cache.url}: already unpacked in {folder}")
            return
    archive_folder, unpacking = folder.with_name(f"{folder.name}.tars"), folder.with_name(f"{folder.name}.unpacking")
    cache.folder = archive_folder
    cache.download(store, archives, checksums)
    cache.folder = folder
    try:
        for old in (unpacking, folder):
            shutil.rmtree(old, ignore_errors=True)
        marker.unlink(missing_ok=True)
        for item in archives:
            logger.info(f"{cache.url}: unpacking {item.name}", extra=ANY_RANK)
            _extract(archive_folder / item.name, unpacking)
        os.replace(unpacking, folder)
        marker.write_text(listing, encoding="utf-8")
        shutil.rmtree(archive_folder)
    except OSError as error:
        reason = error.strerror or error
        raise OcrnetError(
            f"{cache.url} cannot be unpacked in {folder}: {reason}; free some space there, or set cloud.cache_dir"
        ) from error


def _extract(archive: Path, folder: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise OcrnetError("unpacking a tar safely needs Python 3.10.12+, 3.11.4+ or 3.12+; update Python")
    try:
        with tarfile.open(archive) as tar:
            # mutation: extract-tar-safely
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise OcrnetError(f"{archive} cannot be unpacked: {error}; create the tar again") from error


def apply_ckpt_url(cfg: Config, resume: str | None) -> tuple[Config, Path | None]:
    """Apply ckpt_url to training: the file is a checkpoint to start from, or the ImageNet weights of the backbone.

    The content of the file decides which of the two it is. In the public MindSpore scripts, ckpt_url always names
    backbone weights.

    Args:
        cfg: The config.
        resume: The value of ``--resume_ckpt``, or None.

    Returns:
        The config, which names the backbone weights if the file holds those; and the checkpoint to start from, or None.

    Raises:
        OcrnetError: The file is not available, or another setting also names backbone weights or a checkpoint.
    """
    path = download_weights(cfg)
    if path is None:
        return cfg, None
    weights_path = checkpoint.resolve(path)
    try:
        is_run_checkpoint = "source" not in checkpoint.read_meta(weights_path)
    except OcrnetError:
        is_run_checkpoint = False
    if not is_run_checkpoint:
        if cfg.backbone.backbone_ckpt:
            raise OcrnetError(
                f"ckpt_url {cfg.ckpt_url} and backbone.backbone_ckpt {cfg.backbone.backbone_ckpt} both name the "
                "backbone's weights; keep one"
            )
        backbone = dataclasses.replace(cfg.backbone, pretrained=True, backbone_ckpt=str(weights_path))
        logger.info(f"ckpt_url: backbone weights {weights_path}")
        return dataclasses.replace(cfg, backbone=backbone), None
    if resume not in (None, "auto"):
        raise OcrnetError(f"--resume_ckpt {resume} and ckpt_url {cfg.ckpt_url} both name a checkpoint; keep one")
    logger.info(f"ckpt_url: {weights_path} is a checkpoint; the run starts from it if it has no checkpoint of its own")
    return cfg, weights_path


def download_weights(cfg: Config) -> Path | None:
    """Return the local path of ``ckpt_url``, downloading the file if necessary; None if ckpt_url is not set.

    A path without a scheme is returned unchanged; it may be a folder. From a folder in a store, the newest numbered
    checkpoint in it or in its ``checkpoint`` subfolder is downloaded. If there is none, the folder must hold exactly
    one weights file, which is downloaded. Raise `OcrnetError` if the file does not exist or cannot be downloaded.
    """
    if not cfg.ckpt_url:
        return None
    url = urls.parse("ckpt_url", cfg.ckpt_url)
    if not url.scheme:
        return Path(url.path)
    store_url = url.parent if url.path.endswith(checkpoint.WEIGHTS) else url
    cache = Cache(store_url, cfg.cloud)
    with cache.lock():
        store = open_store(store_url, cfg.cloud)
        if store_url is url:
            item = _choose_weights(url, retry(store.list, f"ckpt_url {url}", retries=cfg.cloud.retries))
        else:
            stored = retry(lambda: store.stat(url.name), f"ckpt_url {url}", retries=cfg.cloud.retries)
            if stored is None:
                raise OcrnetError(f"ckpt_url {url}: object not found; check the name")
            item = stored
        cache.download(store, [item], {})
        return cache.target(item.name)


def _choose_weights(url: Url, items: Sequence[Item]) -> Item:
    """Return the newest numbered checkpoint of a folder's objects; without one, the only weights file."""
    files = [item for item in items if item.name.endswith(checkpoint.WEIGHTS)]
    numbered = [
        (step, item)
        for item in files
        if (step := checkpoint.step_of(item.name)) is not None and "/" not in item.name.removeprefix("checkpoint/")
    ]
    if numbered:
        return max(numbered, key=lambda pair: pair[0])[1]
    if len(files) != 1:
        names = ", ".join(item.name for item in files[:5]) or "none"
        raise OcrnetError(
            f"ckpt_url {url}: expected exactly one weights file, found: {names}; give the full url of one file"
        )
    return files[0]
