"""Huawei's OBS through esdk-obs-python, with access keys from the environment."""

import base64
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ocrnet.cloud.store import Item, StoreError, check_length, md5_of
from ocrnet.config import Cloud
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.urls import OBS_KEYS, Url

# HTTP statuses after which a retry may succeed.
RETRYABLE_STATUSES = (408, 429, 500, 502, 503, 504)


class HostVerifyingContext(ssl.SSLContext):
    """An SSL context that always verifies the server's host name; the SDK tries to turn this off."""

    check_hostname = property(lambda self: True, lambda self, value: None)


class ObsStore:
    """A folder in an OBS bucket. Each request is sent once; the caller does the retries."""

    page = 1000  # objects per listing request

    def __init__(self, url: Url, cloud: Cloud) -> None:
        try:
            from obs import ObsClient, PutObjectHeader
        except ImportError:
            raise OcrnetError(
                f"{url} needs esdk-obs-python, which is not installed (ModelArts' moxing is not available either): "
                "pip install 'ocrnet[obs]'"
            ) from None
        endpoint = cloud.endpoint or os.environ.get("OBS_ENDPOINT", "")
        if not endpoint:
            raise OcrnetError(
                f"{url}: the address of the OBS server is not set; set cloud.endpoint, or OBS_ENDPOINT in the "
                "environment, to https://obs.REGION.myhuaweicloud.com"
            )
        key, secret, token = _access_keys(url)
        self.url, self.bucket, self.prefix = str(url), url.bucket, f"{url.path}/" if url.path else ""
        self._header = PutObjectHeader
        # mutation: give-up-stalled-request
        self._client = ObsClient(
            access_key_id=key,
            secret_access_key=secret,
            security_token=token,
            server=endpoint,
            timeout=cloud.timeout,
            max_retry_count=0,
        )
        if endpoint.startswith("https"):
            self._client.context = HostVerifyingContext(
                ssl.PROTOCOL_TLS_CLIENT
            )  # the SDK's own context trusts any certificate
            self._client.context.load_default_certs()

    def list(self, prefix: str = "") -> list[Item]:
        """Return the objects whose names begin with ``prefix``; objects that represent a folder are left out."""
        items: list[Item] = []
        marker = None
        while True:
            body = _call_sdk(
                lambda marker=marker: self._client.listObjects(  # type: ignore[misc]
                    self.bucket, prefix=self.prefix + prefix, marker=marker, max_keys=self.page
                )
            ).body
            for entry in body.contents:
                name = entry.key[len(self.prefix) :]
                if name and not name.endswith("/"):
                    items.append(Item(name, int(entry.size), (entry.etag or "").strip('"')))
            if not body.is_truncated:
                return sorted(items, key=lambda item: item.name)
            marker = body.next_marker or body.contents[-1].key

    def stat(self, name: str) -> Item | None:
        """Return one object, or None if it does not exist."""
        response = _call_sdk(lambda: self._client.getObjectMetadata(self.bucket, self.prefix + name), allowed=(404,))
        if response.status == 404:
            return None
        return Item(name, int(response.body.contentLength), (response.body.etag or "").strip('"'))

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return a part of an object.

        Args:
            name: The object's name.
            start: The offset of the first byte.
            length: The number of bytes.

        Returns:
            Exactly ``length`` bytes.

        Raises:
            StoreError: The request failed, or returned another number of bytes.
        """
        from obs import GetObjectHeader

        header = GetObjectHeader(range=f"{start}-{start + length - 1}")
        response = _call_sdk(
            lambda: self._client.getObject(self.bucket, self.prefix + name, headers=header, loadStreamInMemory=True)
        )
        return check_length(response.body.buffer or b"", length)

    def upload(self, source: Path | bytes, name: str) -> None:
        """Upload an object in one part; the request contains its MD5, which the server verifies."""
        key = self.prefix + name
        header = self._header(md5=base64.b64encode(md5_of(source)).decode())
        if isinstance(source, bytes):
            _call_sdk(lambda: self._client.putContent(self.bucket, key, content=source, headers=header))
        else:
            _call_sdk(lambda: self._client.putFile(self.bucket, key, str(source), headers=header))

    def delete(self, name: str) -> None:
        """Remove an object."""
        _call_sdk(lambda: self._client.deleteObject(self.bucket, self.prefix + name))


def _access_keys(url: Url) -> tuple[str, str, str | None]:
    """Return the access key, the secret key and the security token (None if not set) from the environment."""
    for names in OBS_KEYS:
        key, secret, token = (os.environ.get(name) for name in names)
        if key and secret:
            return key, secret, token
    expected = " or ".join(f"{key} and {secret}" for key, secret, _ in OBS_KEYS)
    raise OcrnetError(
        f"{url} needs access keys: set {expected} in the environment (temporary keys also need the security token)"
    )


def _call_sdk(call: Callable[[], Any], *, allowed: tuple[int, ...] = ()) -> Any:
    """Call the SDK and return its response; raise `StoreError` for an error status and for any exception."""
    try:
        response = call()
    except Exception as error:
        raise StoreError(f"{type(error).__name__}: {error}") from error
    if response.status < 300 or response.status in allowed:
        return response
    text = ", ".join(str(part) for part in (response.errorCode or response.reason, response.errorMessage) if part)
    raise StoreError(f"HTTP {response.status} {text}".strip(), final=response.status not in RETRYABLE_STATUSES)
