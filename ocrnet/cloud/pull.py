"""Download data_url and ckpt_url, once per machine for all its processes."""

import contextlib
import dataclasses
import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

from ocrnet.cloud import cache
from ocrnet.cloud.cache import SUMS, Cache, Say
from ocrnet.cloud.factory import open_store
from ocrnet.cloud.folder import FolderStore
from ocrnet.cloud.retry import retry
from ocrnet.cloud.store import Item, Store
from ocrnet.config import Cloud, Config, Data
from ocrnet.utils import urls
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.urls import Url
from ocrnet.weights import checkpoint


def dataset(cfg: Config, say: Say) -> tuple[Config, list[str]]:
    """Return the config with ``dataset_dir`` set to the local data of ``data_url``, and the lines to log.

    A folder that is given by its path is used in place, unless it contains only tars. Anything else is downloaded to
    the cache, and tars are unpacked there. Files that are already in the cache are not downloaded again. Raise
    `OcrnetError` naming what is not available.
    """
    if not cfg.data_url:
        return cfg, []
    url = urls.parse("data_url", cfg.data_url)
    if not url.scheme and Path(url.path).is_dir() and not _only_tars(Path(url.path)):
        folder, lines = Path(url.path), [f"data_url: {url.path} is a local folder and is used in place"]
    else:
        folder, lines = _pull(url, cfg.cloud, say)
    folder, line = _root_of_data(folder, cfg.data.dataset_dir)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dataset_dir=str(folder))), [*lines, *line]


def _only_tars(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir() if path.name != SUMS]
    return bool(names) and all(name.endswith(urls.ARCHIVES) for name in names)


def _root_of_data(folder: Path, asked: str) -> tuple[Path, list[str]]:
    """Return the folder to read from; as in the public MindSpore scripts, dataset_dir may be a subfolder."""
    below = folder / asked
    if asked != Data.dataset_dir and not Path(asked).is_absolute() and below.is_dir():
        return below, [f"data.dataset_dir: {asked}, a subfolder of data_url"]
    lines = []
    if asked != Data.dataset_dir and Path(asked) != folder:
        lines = [f"data.dataset_dir: {asked} is ignored; the data come from data_url"]
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if len(inside) == 1 and inside[0].is_dir() and inside[0].name not in ("leftImg8bit", "images"):
        return inside[0], [*lines, f"data.dataset_dir: {inside[0]}, the only folder in data_url"]
    return folder, lines


def _pull(url: Url, cloud: Cloud, say: Say) -> tuple[Path, list[str]]:
    kept = Cache(url, cloud, say)
    with kept.alone():
        store = open_store(url.parent if url.is_archive else url, cloud)
        items = _contents(store, url, cloud, say)
        listed = next((item for item in items if item.name == SUMS), None)
        files = [item for item in items if item.name != SUMS]
        sums = cache.read_sums(store, cloud, say, listed)
        if unknown := sums.keys() - {item.name for item in files} if not url.is_archive else set():
            raise OcrnetError(f"{url}: {SUMS} names '{min(unknown)}', which is missing; the upload may be incomplete")
        if all(item.name.endswith(urls.ARCHIVES) for item in files):
            return kept.place, _unpacked(kept, store, files, sums)
        lines = kept.bring(store, files, sums)
        kept.forget_others(files)
        return kept.place, lines


def _contents(store: Store, url: Url, cloud: Cloud, say: Say) -> list[Item]:
    """Return the objects to download: a tar and the checksum file next to it, or everything in a folder."""

    def ask(name: str) -> Item | None:
        return retry(lambda: store.stat(name), f"data_url {url}", retries=cloud.retries, say=say)

    if url.is_archive:
        found = ask(url.name)
        if found is None:
            retry(lambda: store.list(url.name), f"data_url {url}", retries=cloud.retries, say=say)  # checks the bucket
            raise OcrnetError(f"data_url {url}: object not found; check the name, and that the upload is complete")
        return [item for item in (found, ask(SUMS)) if item]
    items = retry(store.list, f"data_url {url}", retries=cloud.retries, say=say)
    if not items:
        missing = isinstance(store, FolderStore) and not store.folder.exists()
        what = "the folder does not exist" if missing else "the folder is empty"
        raise OcrnetError(f"data_url {url}: {what}; check the name, or give an archive ({', '.join(urls.ARCHIVES)})")
    return items


def _unpacked(kept: Cache, store: Store, archives: Sequence[Item], sums: dict[str, str]) -> list[str]:
    """Download the tars, unpack them into the cache's folder, and remove the tars; return the lines to log.

    The folder appears under its name only when all tars are unpacked.
    """
    place = kept.place
    marker = place.with_name(f"{place.name}.unpacked")
    wanted = json.dumps([[item.name, item.size, item.etag] for item in archives])
    with contextlib.suppress(OSError):
        if marker.read_text(encoding="utf-8") == wanted and place.is_dir():
            return [f"{kept.url}: already unpacked in {place}"]
    drafts, unpacking = place.with_name(f"{place.name}.tars"), place.with_name(f"{place.name}.unpacking")
    kept.place = drafts
    lines = kept.bring(store, archives, sums)
    kept.place = place
    try:
        for old in (unpacking, place):
            shutil.rmtree(old, ignore_errors=True)
        marker.unlink(missing_ok=True)
        for item in archives:
            kept.say(f"{kept.url}: unpacking {item.name}")
            _extract(drafts / item.name, unpacking)
        os.replace(unpacking, place)
        marker.write_text(wanted, encoding="utf-8")
        shutil.rmtree(drafts)
    except OSError as error:
        why = error.strerror or error
        raise OcrnetError(
            f"{kept.url} cannot be unpacked in {place}: {why}; make room there, or set cloud.cache_dir"
        ) from error
    return lines


def _extract(archive: Path, folder: Path) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise OcrnetError("unpacking a tar safely needs Python 3.10.12, 3.11.4 or newer; update Python")
    try:
        with tarfile.open(archive) as tar:
            # mutation: extract-tar-safely
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise OcrnetError(f"{archive} cannot be unpacked: {error}; create the tar again") from error


def begin_from(cfg: Config, resume: str | None, say: Say) -> tuple[Config, Path | None, list[str]]:
    """Apply ckpt_url to training: a checkpoint of a run to begin from, or the backbone's ImageNet weights.

    The file's content decides, because ckpt_url means backbone weights in the public MindSpore scripts, but users may
    mean a checkpoint.

    Args:
        cfg: The config.
        resume: The value of ``--resume_ckpt``, or None.
        say: Receives progress lines of a download.

    Returns:
        The config, with the backbone weights if the file contains such; the checkpoint to begin from, or None; and the
        lines to log.

    Raises:
        OcrnetError: The file is not available, or another setting names weights of the same kind.
    """
    path = weights_file(cfg, say)
    if path is None:
        return cfg, None, []
    found, meaning = checkpoint.resolve(path)
    lines = [f"ckpt_url: {meaning}"] if meaning else []
    try:
        of_a_run = "source" not in checkpoint.read_meta(found)
    except OcrnetError:
        of_a_run = False
    if not of_a_run:
        if cfg.backbone.backbone_ckpt:
            raise OcrnetError(
                f"ckpt_url {cfg.ckpt_url} and backbone.backbone_ckpt {cfg.backbone.backbone_ckpt} both name the "
                "backbone's weights; keep one"
            )
        backbone = dataclasses.replace(cfg.backbone, pretrained=True, backbone_ckpt=str(found))
        return dataclasses.replace(cfg, backbone=backbone), None, [*lines, f"ckpt_url: backbone weights {found}"]
    if resume not in (None, "auto"):
        raise OcrnetError(f"--resume_ckpt {resume} and ckpt_url {cfg.ckpt_url} both name a checkpoint; keep one")
    return cfg, found, [*lines, f"ckpt_url: {found} is a checkpoint; a run that has none begins from it"]


def weights_file(cfg: Config, say: Say) -> Path | None:
    """Return the local path of ``ckpt_url``: a file, or for a plain path also a folder; None if ckpt_url is not set.

    A folder in a store means its newest numbered checkpoint, there or in its ``checkpoint`` subfolder; without one, its
    only weights file. Raise `OcrnetError` naming what is not available.
    """
    if not cfg.ckpt_url:
        return None
    url = urls.parse("ckpt_url", cfg.ckpt_url)
    if not url.scheme:
        return Path(url.path)
    lies_in = url.parent if url.path.endswith(checkpoint.WEIGHTS) else url
    kept = Cache(lies_in, cfg.cloud, say)
    with kept.alone():
        store = open_store(lies_in, cfg.cloud)
        if lies_in is url:
            item = _chosen(url, retry(store.list, f"ckpt_url {url}", retries=cfg.cloud.retries, say=say))
        else:
            found = retry(lambda: store.stat(url.name), f"ckpt_url {url}", retries=cfg.cloud.retries, say=say)
            if found is None:
                raise OcrnetError(f"ckpt_url {url}: object not found; check the name")
            item = found
        for line in kept.bring(store, [item], {}):
            say(line)
        return kept.target(item.name)


def _chosen(url: Url, items: Sequence[Item]) -> Item:
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
        raise OcrnetError(f"ckpt_url {url}: expected one weights file, found: {names}; give the full url of one")
    return files[0]
