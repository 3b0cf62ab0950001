"""Parse and validate the urls of the config without network access; no message contains an access key or a secret."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ocrnet.utils.errors import OcrnetError, nearest

SCHEMES = ("obs", "s3", "file")
ARCHIVES = (".tar", ".tar.gz", ".tgz")

# Environment variables with access keys; `scrub` removes their values from messages.
OBS_KEYS = (
    ("AccessKeyID", "SecretAccessKey", "SecurityToken"),
    ("OBS_ACCESS_KEY_ID", "OBS_SECRET_ACCESS_KEY", "OBS_SECURITY_TOKEN"),
)
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")

_CREDENTIALS = re.compile(r"(\w://)[^/@\s'\"]+@")


@dataclass(frozen=True)
class Url:
    """A url in parts: ``scheme`` (empty for a path without one), ``bucket`` (empty for a local folder), and ``path``.

    In a bucket, ``path`` has no leading or trailing slashes. For a local folder, it is unchanged.
    """

    scheme: str
    bucket: str
    path: str

    def __str__(self) -> str:
        if not self.bucket:
            return f"{self.scheme}://{self.path}" if self.scheme else self.path
        return f"{self.scheme}://{self.bucket}" + (f"/{self.path}" if self.path else "")

    @property
    def name(self) -> str:
        """The last component of the path; if the path is empty, the bucket; if that is empty too, "data"."""
        return self.path.rstrip("/").rpartition("/")[2] or self.bucket or "data"

    @property
    def parent(self) -> "Url":
        """The parent folder."""
        if self.bucket:
            return Url(self.scheme, self.bucket, self.path.rpartition("/")[0])
        return Url(self.scheme, "", str(Path(self.path).parent))

    @property
    def is_archive(self) -> bool:
        """Whether the path ends in a suffix of `ARCHIVES`."""
        return self.path.endswith(ARCHIVES)


def parse(key: str, text: str) -> Url:
    """Parse the url that is the value of ``key``; raise `OcrnetError` if it is invalid."""
    scheme, colon, rest = text.partition("://")
    if not colon:
        return Url("", "", text)
    if has_credentials(text):
        raise OcrnetError(
            f"{key} contains an access key or a password before an '@'; remove it, replace it if others may have seen "
            f"it, and set keys in the environment: {', '.join((*OBS_KEYS[0], *S3_KEYS))}"
        )
    if scheme not in SCHEMES:
        raise OcrnetError(
            f"{key} is '{text}', but must begin with obs://, s3:// or file://, or be a path{nearest(scheme, SCHEMES)}"
        )
    if scheme == "file":
        if not rest.startswith("/"):
            raise OcrnetError(f"{key} is '{text}', but a file:// URL needs an absolute path: file:///mnt/data")
        return Url("file", "", rest)
    bucket, _, path = rest.partition("/")
    if not bucket:
        raise OcrnetError(f"{key} is '{text}', but needs a bucket: {scheme}://BUCKET/FOLDER")
    return Url(scheme, bucket, path.strip("/"))


def has_credentials(text: str) -> bool:
    """Return whether a url contains a user name, a key or a password before its host."""
    # mutation: refuse-credentials-in-url
    return bool(_CREDENTIALS.search(text))


def scrub(text: str) -> str:
    """Return a message with asterisks in place of access keys from the environment and credentials in urls."""
    names = {name for names in (*OBS_KEYS, S3_KEYS) for name in names}
    for secret in filter(None, map(os.environ.get, names)):
        if len(secret) >= 4:
            text = text.replace(secret, "***")
    return _CREDENTIALS.sub(r"\1***@", text)


def problems(urls: dict[str, str], endpoint: str) -> Iterator[str]:
    """Yield an error message for each invalid url and for an invalid ``cloud.endpoint``.

    Args:
        urls: The urls by config key.
        endpoint: The value of ``cloud.endpoint``, or an empty string.
    """
    schemes = set()
    for key, text in urls.items():
        try:
            schemes.add(parse(key, text).scheme)
        except OcrnetError as error:
            yield str(error)
    if not endpoint:
        return
    if has_credentials(endpoint):
        yield (
            "cloud.endpoint contains an access key or a password before an '@'; remove it and set keys in the "
            "environment"
        )
    elif "://" not in endpoint:
        yield f"cloud.endpoint is '{endpoint}', but must include its protocol: https://{endpoint}"
    elif not schemes & {"obs", "s3"}:
        yield "cloud.endpoint has no effect: no URL begins with obs:// or s3://; leave it out"
    elif {"obs", "s3"} <= schemes:
        yield (
            "cloud.endpoint cannot serve both obs:// and s3://; leave it out, and set OBS_ENDPOINT and "
            "AWS_ENDPOINT_URL in the environment"
        )
