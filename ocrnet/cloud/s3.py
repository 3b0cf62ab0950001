"""S3 and compatible stores through s3fs.

Access keys, region and profile come from the same environment variables and files as for the AWS tools.
"""

import base64
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ocrnet.cloud.store import Item, StoreError, check_length, md5_of
from ocrnet.config import Cloud
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.urls import Url


class S3Store:
    """A folder in an S3 bucket. Each request is sent once; the caller does the retries."""

    page = 1000  # objects per listing request

    def __init__(self, url: Url, cloud: Cloud) -> None:
        try:
            from s3fs import S3FileSystem
        except ImportError:
            raise OcrnetError(f"{url} needs s3fs, which is not installed: pip install 'ocrnet[s3]'") from None
        self.url, self.bucket, self.prefix = str(url), url.bucket, f"{url.path}/" if url.path else ""
        self._client = S3FileSystem(
            endpoint_url=cloud.endpoint or None,
            config_kwargs={
                "connect_timeout": cloud.timeout,
                "read_timeout": cloud.timeout,
                "retries": {"max_attempts": 0},
            },
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        self._client.retries = 1

    def list(self, prefix: str = "") -> list[Item]:
        """Return the objects whose names begin with ``prefix``; objects that represent a folder are left out."""
        items: list[Item] = []
        continuation: dict[str, str] = {}
        while True:
            page = self._call(
                "list_objects_v2", Bucket=self.bucket, Prefix=self.prefix + prefix, MaxKeys=self.page, **continuation
            )
            for entry in page.get("Contents", []):
                name = entry["Key"][len(self.prefix) :]
                if name and not name.endswith("/"):
                    items.append(Item(name, entry["Size"], entry.get("ETag", "").strip('"')))
            if not page.get("IsTruncated"):
                return sorted(items, key=lambda item: item.name)
            continuation = {"ContinuationToken": page["NextContinuationToken"]}

    def stat(self, name: str) -> Item | None:
        """Return one object, or None if it does not exist."""
        try:
            head = self._call("head_object", Bucket=self.bucket, Key=self.prefix + name)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        return Item(name, head["ContentLength"], head.get("ETag", "").strip('"'))

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
        path = f"{self.bucket}/{self.prefix}{name}"
        return check_length(_call_sdk(lambda: self._client.cat_file(path, start=start, end=start + length)), length)

    def upload(self, source: Path | bytes, name: str) -> None:
        """Upload an object in one part; the request contains its MD5, which the server verifies."""
        digest = base64.b64encode(md5_of(source)).decode()
        with contextlib.nullcontext(source) if isinstance(source, bytes) else source.open("rb") as body:
            self._call("put_object", Bucket=self.bucket, Key=self.prefix + name, Body=body, ContentMD5=digest)

    def delete(self, name: str) -> None:
        """Remove an object."""
        self._call("delete_object", Bucket=self.bucket, Key=self.prefix + name)

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return _call_sdk(lambda: self._client.call_s3(method, **arguments))


def _call_sdk(call: Callable[[], Any]) -> Any:
    """Call the SDK and return its result; raise `StoreError` for any exception, as the SDK's have no common class."""
    import botocore.exceptions

    final_errors = (
        FileNotFoundError,
        PermissionError,
        botocore.exceptions.NoCredentialsError,
        botocore.exceptions.PartialCredentialsError,
        botocore.exceptions.ParamValidationError,
        botocore.exceptions.ProfileNotFound,
    )
    try:
        return call()
    except Exception as error:
        text = str(error) or type(error).__name__
        if isinstance(error, (PermissionError, botocore.exceptions.NoCredentialsError)):
            text += (
                "; the access keys come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or from the profile named by "
                "AWS_PROFILE; check the keys, their permissions for this bucket, and this machine's clock"
            )
        raise StoreError(text, final=isinstance(error, final_errors)) from error
