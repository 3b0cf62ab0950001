"""Open the store for a url."""

from pathlib import Path

from ocrnet.cloud.folder import FolderStore
from ocrnet.cloud.store import Store
from ocrnet.config import Cloud
from ocrnet.utils.urls import Url


def open_store(url: Url, cloud: Cloud) -> Store:
    """Return the store for a url.

    Raise `OcrnetError` if its SDK is not installed, or if its server address or access keys are not set.
    """
    if url.scheme == "s3":
        from ocrnet.cloud.s3 import S3Store

        return S3Store(url, cloud)
    if url.scheme == "obs":
        from ocrnet.cloud import moxing
        from ocrnet.cloud.obs import ObsStore

        file = moxing.find()
        return moxing.MoxingStore(url, file) if file is not None else ObsStore(url, cloud)
    return FolderStore(Path(url.path))
